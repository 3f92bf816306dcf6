//! `lunplug list`.

use std::path::Path;

use super::client::{connect, timed};
use super::failure::Failure;
use super::output::{self, Format};
use super::{Namespace, Screen};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this VM's volumes: NAME, or NAMESPACE/NAME.
    #[arg(value_name = "VM")]
    vm: Option<String>,
    #[command(flatten)]
    namespace: Namespace,
}

impl Args {
    /// The filter as the contract has it.
    pub(super) fn filter(&self) -> Result<Option<v1::VmId>, Failure> {
        let vm = self.vm.as_ref().map(|vm| self.namespace.vm(vm)).transpose()?;
        Ok(vm.as_ref().map(wire_vm_id))
    }

    /// Whether a volume is in the namespace that was given; the contract filters by VM only.
    pub(super) fn wants(&self, volume: &v1::Volume) -> bool {
        let namespace = volume.vm.as_ref().map(|vm| &vm.namespace);
        self.vm.is_some()
            || self.namespace.namespace.is_none()
            || namespace == self.namespace.namespace.as_ref()
    }
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let request = v1::ListVolumesRequest { vm: args.filter()? };
    let mut client = connect(socket).await?;
    let mut volumes = client.list_volumes(timed(request)).await?.into_inner().volumes;
    volumes.retain(|volume| args.wants(volume));
    Ok(output::volumes(format, &volumes, screen.out)?)
}
