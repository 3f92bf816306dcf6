//! A block device as sysfs shows it, and what its driver says that it is.

use crate::connector::error::Error;
use crate::connector::identity::{Identity, IdentityError, Unit};
use crate::connector::scsi::{self, Hctl};
use crate::host::sysfs::{Sysfs, is_gone};
use crate::types::{DevNum, Wwid};

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// Its number.
    pub(super) dev: DevNum,
    /// Its directory below /sys.
    pub(super) dir: String,
    /// Kernel name.
    pub(super) name: String,
    /// Its sequence number.
    pub(super) diskseq: u64,
    /// Bytes.
    pub(super) size: u64,
}

/// The whole device of that number; `None` when there is none, or a partition has the number.
pub(super) async fn read(sysfs: &dyn Sysfs, dev: DevNum) -> Result<Option<Device>, Error> {
    let link = format!("dev/block/{dev}");
    let dir = match sysfs.resolve(&link).await {
        Ok(dir) => dir,
        Err(e) if is_gone(&e) => return Ok(None),
        Err(e) => return Err(Error::io(format!("resolving {link}"))(e)),
    };
    let name = dir.rsplit('/').next().unwrap_or_default().to_owned();
    let size = text(sysfs, &format!("{dir}/size")).await?;
    // A partition has none.
    let diskseq = text(sysfs, &format!("{dir}/diskseq")).await?;
    Ok((|| {
        // `size` counts sectors of 512 bytes, whatever the device's own are.
        let size = size?.parse::<u64>().ok()?.checked_mul(512)?;
        Some(Device { dev, diskseq: diskseq?.parse().ok()?, size, name, dir })
    })())
}

/// The disk that a partition is of, with the partition's own name; `None` of what is no partition.
pub(super) async fn disk_of(
    sysfs: &dyn Sysfs,
    link: &str,
) -> Result<Option<(String, String)>, Error> {
    let dir = match sysfs.resolve(link).await {
        Ok(dir) => dir,
        Err(e) if is_gone(&e) => return Ok(None),
        Err(e) => return Err(Error::io(format!("resolving {link}"))(e)),
    };
    if text(sysfs, &format!("{dir}/partition")).await?.is_none() {
        return Ok(None);
    }
    let mut names = dir.rsplit('/').map(str::to_owned);
    Ok(names.next().zip(names.next()))
}

/// Has a LUN's identity and capacity read anew; those of a map's paths as far as they can be. Other drivers tell
/// what is so now.
pub(super) async fn refresh(sysfs: &dyn Sysfs, device: &Device) -> Result<(), Error> {
    if let Some((_, dir)) = scsi_of(sysfs, &device.dir).await? {
        return scsi::rescan(sysfs, &dir).await;
    }
    let uuid = text(sysfs, &format!("{}/dm/uuid", device.dir)).await?;
    if !uuid.is_some_and(|uuid| uuid.starts_with("mpath-")) {
        return Ok(());
    }
    for slave in slaves(sysfs, &device.dir).await? {
        if let Some((hctl, dir)) = scsi_of(sysfs, &format!("block/{slave}")).await?
            && let Err(error) = scsi::rescan(sysfs, &dir).await
        {
            tracing::debug!(%hctl, %error, "a path of a map could not be read anew");
        }
    }
    Ok(())
}

/// What its driver says that it is; `None` where that is nothing which is unique by construction. `at` is for
/// errors.
pub(super) async fn identity(
    sysfs: &dyn Sysfs,
    device: &Device,
    at: &str,
) -> Result<Option<Identity>, Error> {
    let dir = &device.dir;
    if let Some(uuid) = text(sysfs, &format!("{dir}/dm/uuid")).await? {
        return match uuid.strip_prefix("mpath-") {
            // The LUN's own, which other transports know it by.
            Some(_) => of_map(sysfs, device, at).await.map(Some),
            None => Ok(plain("dm", &uuid)),
        };
    }
    if let Some((hctl, scsi_dir)) = scsi_of(sysfs, dir).await? {
        return Ok(scsi::identity(sysfs, hctl, &scsi_dir).await?.1.map(Some).or_else(|error| {
            match error {
                IdentityError::NotUnique { .. } => Ok(None),
                other => Err(other),
            }
        })?);
    }
    // NVMe's, of the namespace: eui. and uuid., or nvme. with vendor, serial number and model (nvme core,
    // wwid_show).
    if let Some(wwid) = text(sysfs, &format!("{dir}/wwid")).await? {
        return Ok(wwid.parse().ok().map(known_by));
    }
    if let Some(uuid) = text(sysfs, &format!("{dir}/md/uuid")).await? {
        return Ok(plain("md", &uuid));
    }
    of_rbd(sysfs, &device.name).await
}

/// The SCSI device of a disk, and its address.
async fn scsi_of(sysfs: &dyn Sysfs, dir: &str) -> Result<Option<(Hctl, String)>, Error> {
    let link = format!("{dir}/device");
    match sysfs.resolve(&link).await {
        Ok(found) => {
            let hctl = found.rsplit('/').next().unwrap_or_default().parse().ok();
            Ok(hctl.map(|hctl| (hctl, found)))
        }
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(Error::io(format!("resolving {link}"))(e)),
    }
}

/// The identity of a multipath map: what all its paths prove to be.
async fn of_map(sysfs: &dyn Sysfs, map: &Device, at: &str) -> Result<Identity, Error> {
    let mut found: Option<(String, Identity)> = None;
    for slave in slaves(sysfs, &map.dir).await? {
        let Some((hctl, dir)) = scsi_of(sysfs, &format!("block/{slave}")).await? else {
            return Err(IdentityError::NotUnique { at: at.into() }.into());
        };
        let identity = scsi::identity(sysfs, hctl, &dir).await?.1?;
        match &found {
            Some((one_at, one)) if one.wwid != identity.wwid => {
                return Err(IdentityError::Disagree {
                    one_at: one_at.clone(),
                    one: one.wwid.to_string(),
                    other_at: hctl.to_string(),
                    other: identity.wwid.to_string(),
                }
                .into());
            }
            Some(_) => {}
            None => found = Some((hctl.to_string(), identity)),
        }
    }
    let found = found.map(|(_, identity)| identity);
    found.ok_or_else(|| IdentityError::NotUnique { at: at.into() }.into())
}

/// An image of Ceph's, by what the cluster calls it (Documentation/ABI/testing/sysfs-bus-rbd).
async fn of_rbd(sysfs: &dyn Sysfs, name: &str) -> Result<Option<Identity>, Error> {
    let number = name.strip_prefix("rbd").filter(|n| n.parse::<u32>().is_ok());
    let Some(number) = number else { return Ok(None) };
    let mut parts = Vec::new();
    // An image of the old format has no id.
    for attribute in ["cluster_fsid", "pool_id", "pool_ns", "image_id", "current_snap"] {
        let path = format!("bus/rbd/devices/{number}/{attribute}");
        parts.push(text(sysfs, &path).await?.filter(|t| !t.is_empty()));
    }
    let [Some(fsid), Some(pool), ns, Some(image), snap] = &parts[..] else { return Ok(None) };
    let ns = ns.as_ref().map_or(String::new(), |ns| format!("{ns}/"));
    // `-` is the image itself.
    let snap = snap.as_ref().filter(|s| *s != "-").map_or(String::new(), |s| format!("@{s}"));
    Ok(plain("rbd", &format!("{fsid}/{pool}/{ns}{image}{snap}")))
}

fn plain(kind: &str, text: &str) -> Option<Identity> {
    format!("{kind}.{text}").parse().ok().map(known_by)
}

/// An identity that has one name only.
pub(super) fn known_by(wwid: Wwid) -> Identity {
    Identity { all: vec![wwid.clone()], wwid, unit: Unit::default() }
}

/// The identities of all that a device lies on, to the bottom, each with its kernel name.
pub(super) async fn below(
    sysfs: &dyn Sysfs,
    device: &Device,
) -> Result<Vec<(String, Wwid)>, Error> {
    let mut found = Vec::new();
    let mut seen = Vec::new();
    let mut rest = slaves(sysfs, &device.dir).await?;
    while let Some(name) = rest.pop() {
        if seen.contains(&name) {
            continue;
        }
        seen.push(name.clone());
        let link = format!("class/block/{name}");
        if let Some((_, disk)) = disk_of(sysfs, &link).await? {
            rest.push(disk);
            continue;
        }
        let dev = text(sysfs, &format!("{link}/dev")).await?;
        let Some(dev) = dev.and_then(|dev| dev.parse().ok()) else { continue };
        let Some(under) = read(sysfs, dev).await? else { continue };
        if let Ok(Some(identity)) = identity(sysfs, &under, &name).await {
            found.extend(identity.all.into_iter().map(|wwid| (name.clone(), wwid)));
        }
        rest.extend(slaves(sysfs, &under.dir).await?);
    }
    Ok(found)
}

/// Whether the device takes I/O, as far as its driver tells; `Some` is the state that it is in instead.
pub(super) async fn state(sysfs: &dyn Sysfs, device: &Device) -> Result<Option<String>, Error> {
    // Other drivers mean other things by it: Xen's disks are `Connected`.
    let works = match scsi_of(sysfs, &device.dir).await? {
        Some(_) => "running",
        None if device.name.starts_with("nvme") => "live",
        None => return Ok(None),
    };
    let state = text(sysfs, &format!("{}/device/state", device.dir)).await?;
    Ok(state.filter(|state| state != works))
}

async fn slaves(sysfs: &dyn Sysfs, dir: &str) -> Result<Vec<String>, Error> {
    let path = format!("{dir}/slaves");
    sysfs.entries(&path).await.map_err(Error::io(format!("reading {path}")))
}

/// An attribute; `None` where there is none, or the driver has nothing to say by it.
async fn text(sysfs: &dyn Sysfs, path: &str) -> Result<Option<String>, Error> {
    match sysfs.text(path).await {
        Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => Ok(None),
        other => other.map_err(Error::io(format!("reading {path}"))),
    }
}
