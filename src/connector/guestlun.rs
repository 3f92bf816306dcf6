//! Tells udev which LUNs are guests', before their devices exist.
//!
//! `dist/59-lunplug.rules` looks for a file `guest-luns/H:C:T:L` in our run directory, and keeps the
//! host from interpreting what is behind that address. It must be there before the first event, so
//! before the scan; and must go with the device, for the address may be another's afterwards.

use super::error::Error;
use super::scsi::Hctl;
use crate::host::lock::RunDir;
use crate::host::sysfs::Sysfs;

fn file(hctl: Hctl) -> String {
    format!("guest-luns/{hctl}")
}

/// From now on what appears at `hctl` is a guest's.
pub(crate) async fn mark(run: &dyn RunDir, hctl: Hctl) -> Result<(), Error> {
    let file = file(hctl);
    run.store(&file, b"").await.map_err(Error::store(format!("writing {file}")))
}

/// Has udev go through its rules again for a disk that was there before its mark. That it fails changes
/// nothing for the volume.
pub(crate) async fn look_again(sysfs: &dyn Sysfs, block_dir: &str) {
    let path = format!("{block_dir}/uevent");
    if let Err(error) = sysfs.write(&path, "change").await {
        tracing::warn!(%error, path, "udev could not be told of a guest's disk");
    }
}

/// There is nothing of a guest's at `hctl` any more.
pub(crate) async fn unmark(run: &dyn RunDir, hctl: Hctl) -> Result<(), Error> {
    let file = file(hctl);
    run.remove(&file).await.map_err(Error::store(format!("removing {file}")))
}
