//! `lunplug vm register|list|unregister`.

use std::path::Path;

use clap::Subcommand;

use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format};
use super::place::{Place, Written};
use super::{Screen, VmArg};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a VM known, by its pod or as one of this host's libvirt.
    Register(Box<Register>),
    /// List the registered VMs.
    List,
    /// Forget a VM that has no volumes.
    Unregister(Unregister),
}

#[derive(Debug, clap::Args)]
pub(super) struct Register {
    #[command(flatten)]
    vm: VmArg,
    #[command(flatten)]
    place: Place,
    /// libvirt's name of the domain [default: NAMESPACE_NAME].
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// Whether it may have Fibre Channel volumes: whether its pod is on a node with an HBA for it
    /// [default: what the node's HBAs see decides].
    #[arg(long, value_enum)]
    fc: Option<Fc>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Fc {
    Supported,
    Unsupported,
}

#[derive(Debug, clap::Args)]
pub(super) struct Unregister {
    #[command(flatten)]
    vm: VmArg,
}

impl Register {
    fn to_wire(&self) -> Result<v1::VmSpec, Failure> {
        let place = match self.place.to_wire() {
            Written::Pod(pod) => v1::vm_spec::Place::Pod(pod),
            Written::Host(host) => v1::vm_spec::Place::Host(host),
        };
        Ok(v1::VmSpec {
            id: Some(wire_vm_id(&self.vm.id()?)),
            domain: self.domain.clone().unwrap_or_default(),
            place: Some(place),
            fc: match self.fc {
                None => v1::FcSupport::Unspecified,
                Some(Fc::Supported) => v1::FcSupport::Supported,
                Some(Fc::Unsupported) => v1::FcSupport::Unsupported,
            }
            .into(),
        })
    }
}

pub(super) async fn run(
    command: Command,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    match command {
        Command::Register(args) => {
            let request = v1::RegisterVmRequest { vm: Some(args.to_wire()?) };
            let mut client = connect(socket).await?;
            let answer = client.register_vm(timed(request)).await?.into_inner();
            let vm = answer.vm.unwrap_or_default();
            if !answer.changed {
                writeln!(screen.err, "it was registered already")?;
            }
            Ok(output::vms(format, &[vm], screen.out)?)
        }
        Command::List => {
            let mut client = connect(socket).await?;
            let answer = client.list_vms(timed(v1::ListVmsRequest {})).await?.into_inner();
            Ok(output::vms(format, &answer.vms, screen.out)?)
        }
        Command::Unregister(args) => {
            let request = v1::UnregisterVmRequest { vm: Some(wire_vm_id(&args.vm.id()?)) };
            let mut client = connect(socket).await?;
            if !client.unregister_vm(timed(request)).await?.into_inner().changed {
                writeln!(screen.err, "it was not registered")?;
            }
            Ok(())
        }
    }
}
