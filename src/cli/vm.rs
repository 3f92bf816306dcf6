//! `lunplug vm register|list|unregister`.

use std::path::Path;

use clap::Subcommand;

use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format};
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
#[command(group = clap::ArgGroup::new("place").required(true).args(["pod_uid", "host"]))]
pub(super) struct Register {
    #[command(flatten)]
    vm: VmArg,
    /// The UID of the VM's pod, as in its metadata.uid.
    #[arg(long, value_name = "UID")]
    pod_uid: Option<String>,
    /// The VM runs under this host's own libvirt, without a pod.
    #[arg(long)]
    host: bool,
    /// libvirt's name of the domain [default: NAMESPACE_NAME].
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// The container's cgroup directory, absolute [default: found by way of QEMU].
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    cgroup: Option<String>,
    /// The hotplug directory, relative to the pod's kubelet directory [default:
    /// volumes/kubernetes.io~empty-dir/hotplug-disks].
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    hotplug_dir: Option<String>,
    /// The same directory as QEMU sees it [default: /var/run/kubevirt/hotplug-disks].
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    hotplug_dir_in_pod: Option<String>,
    /// libvirt's socket: with --pod-uid relative to the pod's kubelet directory, with --host
    /// absolute.
    #[arg(long, value_name = "PATH")]
    libvirt_socket: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Unregister {
    #[command(flatten)]
    vm: VmArg,
}

impl Register {
    fn to_wire(&self) -> Result<v1::VmSpec, Failure> {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let libvirt_socket = text(&self.libvirt_socket);
        let place = match &self.pod_uid {
            Some(uid) => v1::vm_spec::Place::Pod(v1::PodPlace {
                uid: uid.clone(),
                cgroup: text(&self.cgroup),
                hotplug_dir: text(&self.hotplug_dir),
                hotplug_dir_in_pod: text(&self.hotplug_dir_in_pod),
                libvirt_socket,
            }),
            None => v1::vm_spec::Place::Host(v1::HostPlace { libvirt_socket }),
        };
        Ok(v1::VmSpec {
            id: Some(wire_vm_id(&self.vm.id()?)),
            domain: text(&self.domain),
            place: Some(place),
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
