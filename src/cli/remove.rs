//! `lunplug removevolume`.

use std::path::Path;

use super::add::Waiting;
use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format};
use super::wait::Goal;
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
    /// Go on although the guest uses the disk, or data cannot be flushed: what was not written is
    /// lost. What it gives up is told, with --dry-run before.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    waiting: Waiting,
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let request = v1::RemoveVolumeRequest {
        vm: Some(wire_vm_id(&args.vm.id()?)),
        volume: args.volume_name,
        force: args.force,
        dry_run: args.waiting.dry_run(),
    };
    let mut client = connect(socket).await?;
    let answer = client.remove_volume(timed(request)).await?.into_inner();
    let volume = answer.volume.unwrap_or_default();
    let volume = args.waiting.end(socket, client, Goal::Gone, volume, screen).await?;
    Ok(output::volume(format, &volume, screen.out)?)
}
