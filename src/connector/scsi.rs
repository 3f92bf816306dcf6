//! SCSI disks as sysfs shows them: read, rescanned, and deleted only if they are still what they
//! were. Nothing here knows a transport.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::host::block::{Exclusive, listed};
use crate::host::storage::StorageDoors;
use crate::host::sysfs::{Guard, Guarded, ReadError, Sysfs, View, is_gone};
use crate::types::{DevNum, Malformed};

use super::PathStatus;
use super::error::Error;
use super::identity::{Identity, IdentityError, identify};
use super::lease::Seen;
use super::settings::{Settings, ms};
use super::wait::{About, Wait};

/// A close makes no event, so whoever waits for one looks this often; udev's helpers have a new
/// device open for a moment.
pub(crate) const CLOSES: std::time::Duration = std::time::Duration::from_millis(200);

/// A SCSI address. The LUN is the number as the kernel writes it (see [`crate::types::Lun::scsi`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Hctl {
    /// Host.
    pub(crate) host: u32,
    /// Channel.
    pub(crate) channel: u32,
    /// Target.
    pub(crate) target: u32,
    /// LUN.
    pub(crate) lun: u64,
}

impl fmt::Display for Hctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}:{}", self.host, self.channel, self.target, self.lun)
    }
}

impl FromStr for Hctl {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let mut parts = s.split(':');
        let mut next = || {
            let part = parts.next()?;
            part.bytes().all(|c| c.is_ascii_digit()).then(|| part.parse::<u64>().ok())?
        };
        let read = (|| {
            let host = next()?.try_into().ok()?;
            let channel = next()?.try_into().ok()?;
            let target = next()?.try_into().ok()?;
            Some(Self { host, channel, target, lun: next()? })
        })();
        read.filter(|_| parts.next().is_none()).ok_or_else(|| Malformed {
            what: "SCSI address",
            value: s.into(),
            rule: "H:C:T:L in decimal",
        })
    }
}

impl TryFrom<String> for Hctl {
    type Error = Malformed;
    fn try_from(value: String) -> Result<Self, Malformed> {
        value.parse()
    }
}

impl From<Hctl> for String {
    fn from(value: Hctl) -> String {
        value.to_string()
    }
}

/// A SCSI device's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Kernel name, `sda`.
    pub(crate) name: String,
    /// Its number.
    pub(crate) dev: DevNum,
    /// Its sequence number.
    pub(crate) diskseq: u64,
    /// Bytes.
    pub(crate) size: u64,
}

/// A path whose identity was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ScsiPath {
    /// Its address.
    pub(crate) hctl: Hctl,
    /// Its directory below /sys.
    pub(crate) dir: String,
    /// Its disk.
    pub(crate) disk: Disk,
    /// `wwid` as sysfs has it.
    pub(crate) raw_wwid: String,
    /// What it proves to be.
    pub(crate) identity: Identity,
}

impl ScsiPath {
    /// For the attachment.
    pub(crate) fn status(&self) -> PathStatus {
        PathStatus { hctl: self.hctl.to_string(), dev: self.disk.dev, name: self.disk.name.clone() }
    }

    /// For the lease.
    pub(crate) fn seen(&self) -> Seen {
        Seen {
            wwid: self.raw_wwid.clone(),
            dev: self.disk.dev,
            diskseq: self.disk.diskseq,
            name: self.disk.name.clone(),
        }
    }
}

/// A SCSI device with a disk, as it was found by one look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Present {
    /// Its disk.
    pub(crate) disk: Disk,
    /// See [`raw_wwid`].
    pub(crate) raw_wwid: String,
    /// Its `state`: `running`, `offline`, `transport-offline`.
    pub(crate) state: String,
}

/// The disk of the SCSI device in `dir`; `None` while there is none with a size.
pub(crate) async fn disk(sysfs: &dyn Sysfs, dir: &str) -> Result<Option<Disk>, Error> {
    let device = dir.to_owned();
    Ok(sysfs.look(dir, move |view| disk_in(view, &device)).await?)
}

/// The same with what is to be compared of the device, read in a row.
pub(crate) async fn present(sysfs: &dyn Sysfs, dir: &str) -> Result<Option<Present>, Error> {
    let device = dir.to_owned();
    Ok(sysfs.look(dir, move |view| present_in(view, &device)).await?)
}

pub(crate) fn present_in(view: &View<'_>, dir: &str) -> Result<Option<Present>, ReadError> {
    let Some(disk) = disk_in(view, dir)? else { return Ok(None) };
    let raw_wwid = raw_wwid_in(view, dir)?;
    let state = view.text(&format!("{dir}/state"))?.unwrap_or_default();
    Ok(Some(Present { disk, raw_wwid, state }))
}

pub(crate) fn disk_in(view: &View<'_>, dir: &str) -> Result<Option<Disk>, ReadError> {
    let Some(name) = view.entries(&format!("{dir}/block"))?.into_iter().next() else {
        return Ok(None);
    };
    let base = format!("{dir}/block/{name}");
    let dev = view.text(&format!("{base}/dev"))?;
    let size = size_in(view, &base)?;
    let diskseq = view.text(&format!("{base}/diskseq"))?;
    Ok((|| {
        Some(Disk { name, dev: dev?.parse().ok()?, diskseq: diskseq?.parse().ok()?, size: size? })
    })())
}

/// Bytes of a block device. `size` counts sectors of 512 bytes, whatever the disk's own are.
pub(crate) fn size_in(view: &View<'_>, block_dir: &str) -> Result<Option<u64>, ReadError> {
    let sectors = view.text(&format!("{block_dir}/size"))?;
    Ok(sectors.and_then(|sectors| sectors.parse::<u64>().ok()?.checked_mul(512)))
}

/// What sysfs says in `wwid`; empty where the device has no such identity (then the kernel answers
/// the read with EINVAL or ENXIO).
pub(crate) async fn raw_wwid(sysfs: &dyn Sysfs, dir: &str) -> Result<String, Error> {
    let device = dir.to_owned();
    Ok(sysfs.look(dir, move |view| raw_wwid_in(view, &device)).await?)
}

pub(crate) fn raw_wwid_in(view: &View<'_>, dir: &str) -> Result<String, ReadError> {
    match view.text(&format!("{dir}/wwid")) {
        Err(e) if e.is_invalid() => Ok(String::new()),
        text => Ok(text?.unwrap_or_default()),
    }
}

/// Reads the identity of the device in `dir` as the kernel has it now.
pub(crate) async fn identity(
    sysfs: &dyn Sysfs,
    hctl: Hctl,
    dir: &str,
) -> Result<(String, Result<Identity, IdentityError>), Error> {
    let device = dir.to_owned();
    let look = move |view: &View<'_>| {
        let page = |name: &str| match view.bytes(&format!("{device}/{name}")) {
            Err(e) if e.is_invalid() => Ok(None),
            page => page,
        };
        let (pg83, pg80) = (page("vpd_pg83")?, page("vpd_pg80")?);
        Ok((
            pg83.unwrap_or_default(),
            pg80,
            raw_wwid_in(view, &device)?,
            product_in(view, &device)?,
        ))
    };
    let (pg83, pg80, raw, product) = sysfs.look(dir, look).await?;
    let kernel = (!raw.is_empty()).then_some(raw.as_str());
    let identity = identify(&hctl.to_string(), &pg83, pg80.as_deref(), kernel);
    let whole = |mut identity: Identity| {
        identity.unit.product = product;
        identity
    };
    Ok((raw, identity.map(whole)))
}

/// Vendor and product as the kernel read them when the device was found: a rescan does not look at them
/// again (drivers/scsi/scsi_scan.c, scsi_rescan_device).
fn product_in(view: &View<'_>, dir: &str) -> Result<Option<String>, ReadError> {
    let vendor = view.text(&format!("{dir}/vendor"))?;
    let model = view.text(&format!("{dir}/model"))?;
    Ok(vendor.zip(model).map(|(vendor, model)| format!("{} {}", vendor.trim(), model.trim())))
}

/// Has the kernel read the device's VPD pages and capacity anew (a scan of a known LUN does not).
pub(crate) async fn rescan(sysfs: &dyn Sysfs, dir: &str) -> Result<(), Error> {
    let path = format!("{dir}/rescan");
    sysfs.write(&path, "1").await.map_err(Error::io(format!("rescanning {dir}")))
}

/// Whether writes to a disk or map are refused, as the kernel knows it (`ro`): for a SCSI disk what the
/// LUN's mode page said when it was last read.
pub(crate) async fn is_protected(sysfs: &dyn Sysfs, block_dir: &str) -> Result<bool, Error> {
    let block = block_dir.to_owned();
    Ok(sysfs.look(block_dir, move |view| is_protected_in(view, &block)).await?)
}

pub(crate) fn is_protected_in(view: &View<'_>, block_dir: &str) -> Result<bool, ReadError> {
    Ok(view.text(&format!("{block_dir}/ro"))?.as_deref() == Some("1"))
}

/// What is known of the programs that have a device open. To know it is to look at all descriptors of all processes,
/// the most expensive question there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opens {
    /// Nothing: ask.
    Unknown,
    /// That there are none: somebody has asked, in the same step.
    None,
    /// And that nobody has claimed it.
    Unheld,
}

/// Whoever holds a disk: what is stacked on it, or has it open or claimed. `ours` are names (of a
/// map) that do not count.
pub(crate) async fn holder(
    doors: &StorageDoors,
    block_dir: &str,
    dev: DevNum,
    ours: &[String],
    opens: Opens,
) -> Result<Option<String>, Error> {
    if opens == Opens::Unheld {
        return Ok(None);
    }
    if opens == Opens::Unknown {
        if let Some(name) = stacked(&*doors.sysfs, block_dir, ours).await? {
            return Ok(Some(name));
        }
        if let Some(opener) = openers(doors, &[dev]).await?.into_iter().flatten().next() {
            return Ok(Some(opener));
        }
    }
    let holders = holders(&*doors.sysfs, block_dir).await?;
    if !holders.is_empty() {
        // Our own map has claimed it, so an exclusive open says nothing.
        return stacked_of(&*doors.sysfs, &holders, ours).await;
    }
    match doors.blocks.exclusive(dev).await {
        Ok(Exclusive::Free) => Ok(None),
        Ok(Exclusive::Held) => Ok(Some("a mount, swap or other claim on the host".into())),
        // A path whose target is gone cannot be opened by anybody.
        Err(e) if e.kind() == std::io::ErrorKind::TimedOut => {
            Err(Error::io(format!("probing {dev}"))(e))
        }
        Err(_) => Ok(None),
    }
}

/// What is stacked upon a disk, but for `ours`.
pub(crate) async fn stacked(
    sysfs: &dyn Sysfs,
    block_dir: &str,
    ours: &[String],
) -> Result<Option<String>, Error> {
    stacked_of(sysfs, &holders(sysfs, block_dir).await?, ours).await
}

async fn stacked_of(
    sysfs: &dyn Sysfs,
    holders: &[String],
    ours: &[String],
) -> Result<Option<String>, Error> {
    match holders.iter().find(|n| !ours.contains(n)) {
        Some(name) => describe(sysfs, name).await.map(Some),
        None => Ok(None),
    }
}

/// Programs that have each of the devices open, but for those that look after them: multipathd has every path
/// open, and udev looks at each new device for a moment, itself and by what its rules run: `multipath -u`, which they
/// may ask about each path, and `partx`, which takes partitions off it.
pub(crate) async fn openers(
    doors: &StorageDoors,
    devs: &[DevNum],
) -> Result<Vec<Vec<String>>, Error> {
    let all = doors.blocks.openers(devs).await;
    let doing = || format!("looking who has {} open", listed(devs));
    let all = all.map_err(|error| Error::io(doing())(error))?;
    let keeper = |o: &String| {
        let command = o.split('[').next().unwrap_or("");
        let udev = matches!(command, "systemd-udevd" | "(udev-worker)" | "udevd" | "partx");
        udev || matches!(command, "multipathd" | "multipath")
    };
    let strangers = |of_one: Vec<String>| of_one.into_iter().filter(|o| !keeper(o)).collect();
    Ok(all.into_iter().map(strangers).collect())
}

/// Those of the devices that no program has open. Where nobody can say so it is none: who needs to know of one asks for
/// that alone.
pub(crate) async fn unopened(doors: &StorageDoors, devs: &[DevNum]) -> BTreeSet<DevNum> {
    let all = openers(doors, devs).await.unwrap_or_default();
    devs.iter().zip(all).filter(|(_, openers)| openers.is_empty()).map(|(dev, _)| *dev).collect()
}

/// The names stacked upon a disk: device-mapper's, md's; and its partitions' own.
pub(crate) async fn holders(sysfs: &dyn Sysfs, block_dir: &str) -> Result<Vec<String>, Error> {
    let block = block_dir.to_owned();
    Ok(sysfs.look(block_dir, move |view| holders_in(view, &block)).await?)
}

pub(crate) fn holders_in(view: &View<'_>, block_dir: &str) -> Result<Vec<String>, ReadError> {
    let mut all = view.entries(&format!("{block_dir}/holders"))?;
    let disk = block_dir.rsplit('/').next().unwrap_or("");
    for part in view.entries(block_dir)? {
        // A partition is a directory that begins with its disk's name: sda1, nvme0n1p1.
        if part.len() > disk.len() && part.starts_with(disk) {
            all.extend(view.entries(&format!("{block_dir}/{part}/holders"))?);
        }
    }
    Ok(all)
}

/// A holder in words: `dm-3 (vg-root)`.
async fn describe(sysfs: &dyn Sysfs, name: &str) -> Result<String, Error> {
    let path = format!("block/{name}/dm/name");
    let dm = sysfs.text(&path).await.map_err(Error::io(format!("reading {path}")))?;
    Ok(dm.map_or_else(|| name.to_owned(), |dm| format!("{name} ({dm})")))
}

/// What came of a deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// It was there and is gone.
    Gone,
    /// Another device is at its place, or none: nothing was touched.
    NotThere,
}

/// Deletes the SCSI device in `dir` if it is still the one that was `seen`: the identity and the
/// disk are compared between opening `delete` and writing to it.
pub(crate) async fn delete(
    doors: &StorageDoors,
    settings: &Settings,
    hctl: Hctl,
    dir: &str,
    seen: &Seen,
) -> Result<Deleted, Error> {
    let sysfs = &*doors.sysfs;
    let block = format!("{dir}/block/{}", seen.name);
    let mut guards = vec![
        Guard { path: format!("{block}/dev"), expect: seen.dev.to_string() },
        Guard { path: format!("{block}/diskseq"), expect: seen.diskseq.to_string() },
    ];
    if !seen.wwid.is_empty() {
        guards.push(Guard { path: format!("{dir}/wwid"), expect: seen.wwid.clone() });
    }
    let mut wait = Wait::about(&*doors.uevents, About::Below(dir.to_owned()), ms(settings.disk_ms));
    let path = format!("{dir}/delete");
    match sysfs.write_guarded(&path, "1", &guards).await {
        Ok(Guarded::Written { gone: true }) => return Ok(Deleted::Gone),
        // Or another one came to its address.
        Ok(Guarded::Written { gone: false }) => {}
        Ok(Guarded::Refused { guard, found })
            if guard.path.ends_with("/wwid") && found.is_some() =>
        {
            return Err(Error::Path {
                at: hctl.to_string(),
                problem: format!("it is {} now, not {}", found.unwrap_or_default(), guard.expect),
            });
        }
        Ok(Guarded::Refused { .. }) => return Ok(Deleted::NotThere),
        Err(e) if is_gone(&e) => return Ok(Deleted::NotThere),
        Err(e) => return Err(Error::io(format!("deleting {hctl}"))(e)),
    }
    loop {
        match disk(sysfs, dir).await? {
            Some(now) if now.diskseq == seen.diskseq => {}
            _ => return Ok(Deleted::Gone),
        }
        if !wait.next().await {
            let problem = "the kernel was told, but has not removed it".into();
            return Err(Error::Path { at: hctl.to_string(), problem });
        }
    }
}

/// Waits until a disk with a size is in `dir`; `None` when there is none by then.
pub(crate) async fn await_disk(
    sysfs: &dyn Sysfs,
    wait: &mut Wait,
    dir: &str,
) -> Result<Option<Disk>, Error> {
    loop {
        match disk(sysfs, dir).await? {
            Some(disk) if disk.size > 0 => return Ok(Some(disk)),
            _ if !wait.next().await => return Ok(None),
            _ => {}
        }
    }
}

/// Waits until nobody holds a device, for as long as holders may need to let go; `Some` is who
/// still does.
pub(crate) async fn await_unheld(
    doors: &StorageDoors,
    settings: &Settings,
    block_dir: &str,
    dev: DevNum,
    ours: &[String],
) -> Result<Option<String>, Error> {
    await_free(doors, settings, block_dir, dev, ours, Opens::Unknown).await
}

/// The same where something is known already of who has it open.
pub(crate) async fn await_free(
    doors: &StorageDoors,
    settings: &Settings,
    block_dir: &str,
    dev: DevNum,
    ours: &[String],
    mut opens: Opens,
) -> Result<Option<String>, Error> {
    let mut wait = Wait::about(&*doors.uevents, About::Blocks, ms(settings.holders_ms));
    loop {
        let held = holder(doors, block_dir, dev, ours, opens).await?;
        if held.is_none() || !wait.next_before(Instant::now() + CLOSES).await {
            return Ok(held);
        }
        // Time has passed.
        opens = Opens::Unknown;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_exactly() {
        let hctl: Hctl = "3:0:0:16640".parse().expect("address");
        assert_eq!(hctl, Hctl { host: 3, channel: 0, target: 0, lun: 16640 });
        assert_eq!(hctl.to_string(), "3:0:0:16640");
        for bad in ["", "3", "3:0:0", "3:0:0:1:2", "3:0:0:", "a:0:0:1", "+3:0:0:1", "-1:0:0:0"] {
            assert!(bad.parse::<Hctl>().is_err(), "{bad}");
        }
    }
}
