//! `lunplug expand`.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::add::duration;
use super::client::{connect, timed_for};
use super::failure::Failure;
use super::output::{self, Format, VolumeView};
use super::{Screen, VmArg, file};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    vm: VmArg,
    /// The volume's name.
    #[arg(long, value_name = "NAME")]
    volume_name: String,
    /// The size that the LUN must have by now: bytes, or with a unit as 10Gi [default: whatever it
    /// has, but not less than before].
    #[arg(long)]
    size: Option<String>,
    /// Wait so long at most, e.g. 30s or 2m; lunplugd may go on afterwards.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    timeout: Duration,
}

/// The result as JSON and YAML show it.
#[derive(Debug, Serialize)]
struct ExpandedView {
    size_before_bytes: u64,
    size_bytes: u64,
    changed: bool,
    volume: VolumeView,
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let size = args.size.as_deref().map(file::size).transpose();
    let request = v1::ExpandVolumeRequest {
        vm: Some(wire_vm_id(&args.vm.id()?)),
        volume: args.volume_name,
        size_bytes: size.map_err(|error| Failure::malformed("size", &error))?.unwrap_or_default(),
    };
    let mut client = connect(socket).await?;
    let answer = client.expand_volume(timed_for(args.timeout, request)).await?.into_inner();
    let (before, now) = (answer.size_before_bytes, answer.size_bytes);
    let volume = answer.volume.unwrap_or_default();
    if format != Format::Table {
        let view = ExpandedView {
            size_before_bytes: before,
            size_bytes: now,
            changed: answer.changed,
            volume: VolumeView::from(&volume),
        };
        return Ok(output::document(format, &view, screen.out)?);
    }
    let now = output::size(now);
    match answer.changed {
        true if before != answer.size_bytes => {
            writeln!(screen.err, "grown from {} to {now}", output::size(before))?;
        }
        true => writeln!(screen.err, "the guest was told of {now}, which the host had already")?,
        false => writeln!(screen.err, "nothing to do: host and guest have {now}")?,
    }
    Ok(output::volume(format, &volume, screen.out)?)
}
