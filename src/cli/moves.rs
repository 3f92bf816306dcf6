//! `lunplug preparestart` and `lunplug migration prepare|finish|cancel`.

use std::path::Path;
use std::time::Duration;

use clap::Subcommand;

use super::add::duration;
use super::client::{connect, timed_for};
use super::failure::Failure;
use super::output::Format;
use super::place::{Place, Written};
use super::{Screen, VmArg, batch};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

/// A VM that is about to start.
#[derive(Debug, clap::Args)]
pub(super) struct Start {
    #[command(flatten)]
    vm: VmArg,
    #[command(flatten)]
    waiting: Waiting,
    /// How long the VM may take to start, e.g. 10m; then what was made ready is undone [default: the
    /// node's deadlines.start].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    within: Option<Duration>,
}

#[derive(Debug, clap::Args)]
struct Waiting {
    /// Wait so long at most, e.g. 30s or 2m.
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = duration)]
    timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(super) enum Migration {
    /// Make a VM's volumes ready where its guest is about to come.
    Prepare(Box<Prepare>),
    /// The guest has moved: the volumes leave the pod, or the node, where it was.
    Finish(Vm),
    /// The guest stays where it is: undo what was made ready.
    Cancel(Vm),
}

#[derive(Debug, clap::Args)]
pub(super) struct Prepare {
    #[command(flatten)]
    vm: VmArg,
    #[command(flatten)]
    place: Place,
    /// From another node: how long the guest may take to come, e.g. 10m [default: the node's
    /// deadlines.start].
    #[arg(long, value_name = "TIME", value_parser = duration)]
    within: Option<Duration>,
    #[command(flatten)]
    waiting: Waiting,
}

#[derive(Debug, clap::Args)]
pub(super) struct Vm {
    #[command(flatten)]
    vm: VmArg,
    #[command(flatten)]
    waiting: Waiting,
}

fn wire(time: Option<Duration>) -> Option<prost_types::Duration> {
    // Those that are read are short enough.
    time.and_then(|time| time.try_into().ok())
}

pub(super) async fn start(
    args: Start,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let vm = Some(wire_vm_id(&args.vm.id()?));
    let request = v1::PrepareStartRequest { vm, within: wire(args.within), domain: String::new() };
    let mut client = connect(socket).await?;
    let answer = client.prepare_start(timed_for(args.waiting.timeout, request)).await?;
    batch::told(answer.into_inner().results, "prepare", format, screen)
}

pub(super) async fn migration(
    command: Migration,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    use v1::prepare_migration_target_request::Place as Wire;
    match command {
        Migration::Prepare(args) => {
            let place = match args.place.to_wire() {
                Written::Pod(pod) => Wire::Pod(pod),
                Written::Host(host) => Wire::Host(host),
            };
            let request = v1::PrepareMigrationTargetRequest {
                vm: Some(wire_vm_id(&args.vm.id()?)),
                place: Some(place),
                within: wire(args.within),
            };
            let mut client = connect(socket).await?;
            let request = timed_for(args.waiting.timeout, request);
            let answer = client.prepare_migration_target(request).await?;
            batch::told(answer.into_inner().results, "prepare", format, screen)
        }
        Migration::Finish(args) => {
            let request = v1::FinishMigrationRequest { vm: Some(wire_vm_id(&args.vm.id()?)) };
            let mut client = connect(socket).await?;
            let answer = client.finish_migration(timed_for(args.waiting.timeout, request)).await?;
            batch::told(answer.into_inner().results, "move", format, screen)
        }
        Migration::Cancel(args) => {
            let request = v1::CancelMigrationRequest { vm: Some(wire_vm_id(&args.vm.id()?)) };
            let mut client = connect(socket).await?;
            let answer = client.cancel_migration(timed_for(args.waiting.timeout, request)).await?;
            if !answer.into_inner().changed {
                writeln!(screen.err, "nothing was prepared")?;
            }
            Ok(())
        }
    }
}
