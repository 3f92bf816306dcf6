//! `lunplug removevolume`.

use std::path::Path;

use super::add::Waiting;
use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format};
use super::wait::Goal;
use super::{Screen, VmArg, batch};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    vm: VmArg,
    /// The volume's name; several times for several volumes.
    #[arg(long, value_name = "NAME", required = true)]
    volume_name: Vec<String>,
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
    let (vm, volumes) = (Some(wire_vm_id(&args.vm.id()?)), args.volume_name);
    let (force, dry_run) = (args.force, args.waiting.dry_run());
    let mut client = connect(socket).await?;
    let [volume] = &volumes[..] else {
        let request = v1::RemoveVolumesRequest { vm, volumes, force, dry_run };
        let answer = client.remove_volumes(args.waiting.timed(request)).await?.into_inner();
        let results = answer.results.into_iter().map(|result| (Goal::Gone, result)).collect();
        return batch::finish(results, &args.waiting, socket, client, format, screen).await;
    };
    let volume = volume.clone();
    let request = v1::RemoveVolumeRequest { vm, volume, force, dry_run };
    let answer = client.remove_volume(timed(request)).await?.into_inner();
    let volume = answer.volume.unwrap_or_default();
    let volume = args.waiting.end(socket, client, Goal::Gone, volume, screen).await?;
    Ok(output::volume(format, &volume, screen.out)?)
}
