//! Tells udev which LUNs are guests', before their devices exist.
//!
//! `dist/59-lunplug.rules` looks for a file `guest-luns/H:C:T:L` in our run directory, and keeps the
//! host from interpreting what is behind that address. It must be there before the first event, so
//! before the scan; and must go with the device, for the address may be another's afterwards.

use super::error::Error;
use super::scsi::Hctl;
use crate::host::lock::RunDir;

fn file(hctl: Hctl) -> String {
    format!("guest-luns/{hctl}")
}

/// From now on what appears at `hctl` is a guest's.
pub(crate) async fn mark(run: &dyn RunDir, hctl: Hctl) -> Result<(), Error> {
    let file = file(hctl);
    run.store(&file, b"").await.map_err(Error::store(format!("writing {file}")))
}

/// There is nothing of a guest's at `hctl` any more.
pub(crate) async fn unmark(run: &dyn RunDir, hctl: Hctl) -> Result<(), Error> {
    let file = file(hctl);
    run.remove(&file).await.map_err(Error::store(format!("removing {file}")))
}
