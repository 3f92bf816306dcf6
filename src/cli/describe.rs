//! `lunplug describe`.

use std::path::Path;

use super::client::{connect, timed};
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
    volume: String,
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let vm = Some(wire_vm_id(&args.vm.id()?));
    let request = v1::GetVolumeRequest { vm, volume: args.volume };
    let mut client = connect(socket).await?;
    let volume = client.get_volume(timed(request)).await?.into_inner().volume.unwrap_or_default();
    Ok(output::volume(format, &volume, screen.out)?)
}
