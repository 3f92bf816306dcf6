//! Telling a guest that its disk has grown.

use std::time::Duration;

use tokio::time::Instant;

use super::apply::{At, Error};
use crate::host::libvirt::{Connection, Definition, DomainState};
use crate::types::{Outcome, VolumeName};

/// Has QEMU take over that our disk of that volume has `size` bytes, which its device has by now, and
/// tell the guest; or finds that it has. A `medium` is known by its source instead, and is for reading only. On bus scsi the guest gets a unit attention, on bus virtio a
/// change of the configuration; both make Linux read the capacity anew.
///
/// libvirt knows disks by target name or source, not by alias, and a target name may be another disk's
/// a moment later; so it is named by its source, which no disk but ours has.
pub async fn resize(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    medium: Option<&str>,
    size: u64,
    deadline: Duration,
) -> Result<Outcome, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let alias = super::alias(volume);
    match at.info().await? {
        Some(info) if info.state != DomainState::Shutoff => {
            if let Some(job) = info.job {
                return Err(Error::Busy { domain: domain.to_owned(), job });
            }
        }
        _ => return Err(Error::NotRunning { domain: domain.to_owned() }),
    }
    let live = at.read(Definition::Live).await?;
    let missing = || Error::NoDisk { alias: alias.clone(), domain: domain.to_owned() };
    let disk = match medium {
        Some(source) => live.drive_with(source),
        None => live.disk(&alias),
    };
    let disk = disk.ok_or_else(missing)?;
    let source = disk.source.as_deref().ok_or_else(missing)?;
    let capacity = async || {
        let capacity = connection.block_capacity(domain, source, at.left()).await;
        capacity.map_err(at.failed("query", &alias))
    };
    if capacity().await? == size {
        return Ok(Outcome::Already(()));
    }
    if disk.readonly {
        // QEMU's bdrv_co_truncate: "Image is read-only".
        return Err(Error::ReadOnlyDisk { alias, size });
    }
    let resized = connection.block_resize(domain, source, size, at.left()).await;
    resized.map_err(at.failed("resize", &alias))?;
    match capacity().await? {
        shown if shown == size => Ok(Outcome::Done(())),
        shown => Err(Error::NotResized { alias, shown, size }),
    }
}
