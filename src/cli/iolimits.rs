//! `lunplug iolimits`: all limits of a volume; what is not given is not limited.

use std::path::Path;
use std::time::Duration;

use super::add::duration;
use super::client::{connect, timed_for};
use super::disk::LimitsFile;
use super::failure::Failure;
use super::output::{self, Format};
use super::{Screen, VmArg};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    vm: VmArg,
    /// The volume's name.
    #[arg(long, value_name = "NAME")]
    volume_name: String,
    #[command(flatten)]
    limits: LimitsFile,
    /// No limit at all.
    #[arg(long, conflicts_with = "limit", required_unless_present = "limit")]
    unlimited: bool,
    /// Wait so long at most, e.g. 30s or 2m.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = duration)]
    timeout: Duration,
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let request = v1::SetIoLimitsRequest {
        vm: Some(wire_vm_id(&args.vm.id()?)),
        volume: args.volume_name,
        limits: args.limits.to_wire(),
    };
    let mut client = connect(socket).await?;
    let answer = client.set_io_limits(timed_for(args.timeout, request)).await?.into_inner();
    if !answer.changed {
        writeln!(screen.err, "nothing to do: it has these limits")?;
    }
    Ok(output::volume(format, &answer.volume.unwrap_or_default(), screen.out)?)
}
