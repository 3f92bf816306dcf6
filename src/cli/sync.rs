//! `lunplug sync`.

use std::path::{Path, PathBuf};

use super::add::{Waiting, text, wrong};
use super::chap::ChapFile;
use super::client::connect;
use super::failure::Failure;
use super::file::{self, VolumeFile};
use super::output::Format;
use super::wait::Goal;
use super::{Screen, VmArg, batch};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    vm: VmArg,
    /// The volumes that the VM is to have, YAML or JSON, `-` for stdin: a list, alone or under `volumes`, or
    /// one document each, in the form that addvolume -f reads. `volumes: []` for none.
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Which set it is: a number from 1, higher than that of every set before. An older one is refused; the
    /// same again goes on with what is not so yet.
    #[arg(long, value_name = "NUMBER")]
    revision: u64,
    /// Remove what is not in the set although the guest uses the disk, or data cannot be flushed: what was
    /// not written is lost. What it gives up is told, with --dry-run before.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    waiting: Waiting,
}

fn entry(volume: &VolumeFile) -> Result<v1::VolumeEntry, Failure> {
    let spec = volume.to_wire().map_err(|failure| {
        let message = format!("{}: {}", volume.name, failure.message);
        Failure { message, ..failure }
    })?;
    Ok(v1::VolumeEntry {
        spec: Some(spec),
        chap: volume.chap.as_ref().map(ChapFile::to_wire),
        ..v1::VolumeEntry::default()
    })
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let volumes = file::many(&text(&args.file)?).map_err(|error| wrong(&args.file, error))?;
    let request = v1::SyncVolumesRequest {
        vm: Some(wire_vm_id(&args.vm.id()?)),
        volumes: volumes.iter().map(entry).collect::<Result<_, _>>()?,
        revision: args.revision,
        force: args.force,
        dry_run: args.waiting.dry_run(),
    };
    let mut client = connect(socket).await?;
    let answer = client.sync_volumes(args.waiting.timed(request)).await?.into_inner();
    let wanted = answer.volumes.into_iter().map(|result| (Goal::Ready, result));
    let removed = answer.removed.into_iter().map(|result| (Goal::Gone, result));
    let results = wanted.chain(removed).collect();
    batch::finish(results, &args.waiting, socket, client, format, screen).await
}
