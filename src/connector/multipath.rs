//! The multipath map above verified paths: awaited, proven, removed. Nothing here knows a transport.
//!
//! multipathd makes maps by itself when udev tells it of paths; we wait for that, nudge it if it
//! does not come, and believe sysfs only. A map counts when it is the common holder of all our
//! paths, its device-mapper uuid is `mpath-` and one of the LUN's proven designators, and each of
//! its slaves is verified. It is never looked for by name.

mod coming;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use tokio::time::Instant;

use crate::host::cmd::Tool;
use crate::host::multipathd::{Multipathd, MultipathdError};
use crate::host::storage::StorageDoors;
use crate::host::sysfs::{ReadError, Sysfs, View};
use crate::types::{DevNum, Outcome};

pub(crate) use coming::{decide, ensure, joins, nudge};
pub(crate) use memory::{drain, forget, forget_ahead, forget_deleted, forget_unused};

use super::error::Error;
use super::identity::Identity;
use super::scsi::{self, Opens, ScsiPath};
use super::settings::{Settings, ms};
use super::wait::{About, Wait};

/// A device-mapper device as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Map {
    /// Kernel name, `dm-0`: reused, so good for this moment only.
    pub(crate) kernel: String,
    /// device-mapper's name.
    pub(crate) name: String,
    /// device-mapper's uuid.
    pub(crate) uuid: String,
    /// Its number.
    pub(crate) dev: DevNum,
    /// Its sequence number.
    pub(crate) diskseq: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Kernel names of what is beneath it.
    pub(crate) slaves: BTreeSet<String>,
}

impl Map {
    /// Its directory below /sys.
    pub(crate) fn dir(&self) -> String {
        format!("block/{}", self.kernel)
    }

    /// Whether it is multipath's map of that LUN.
    pub(crate) fn is_of(&self, identity: &Identity) -> bool {
        self.uuid.strip_prefix("mpath-").is_some_and(|wwid| identity.is_multipath(wwid))
    }
}

/// Whether multipathd can be asked.
pub(crate) async fn alive(multipathd: &dyn Multipathd) -> Result<(), MultipathdError> {
    multipathd.ask("show daemon").await.map(drop)
}

/// Reads a device-mapper device; `None` when there is none of that name, or it is just going.
fn read_in(view: &View<'_>, kernel: &str) -> Result<Option<Map>, ReadError> {
    let base = format!("block/{kernel}");
    let text = |name: &str| view.text(&format!("{base}/{name}"));
    let read = || {
        let (name, uuid) = (text("dm/name")?, text("dm/uuid")?);
        let (dev, size, diskseq) = (text("dev")?, text("size")?, text("diskseq")?);
        let slaves = view.entries(&format!("{base}/slaves"))?;
        Ok((|| {
            Some(Map {
                kernel: kernel.into(),
                name: name?,
                uuid: uuid?,
                dev: dev?.parse().ok()?,
                diskseq: diskseq?.parse().ok()?,
                size: size?.parse::<u64>().ok()?.checked_mul(512)?,
                slaves: slaves.into_iter().collect(),
            })
        })())
    };
    match read() {
        // dm's attributes answer EINVAL once the device is being freed (dm-sysfs.c, dm_attr_show).
        Err(e) if ReadError::is_invalid(&e) => Ok(None),
        other => other,
    }
}

/// The map that has that number now.
pub(crate) async fn by_number(sysfs: &dyn Sysfs, dev: DevNum) -> Result<Option<Map>, Error> {
    let link = format!("dev/block/{dev}");
    Ok(sysfs.look(&link, move |view| by_number_in(view, dev)).await?)
}

pub(crate) fn by_number_in(view: &View<'_>, dev: DevNum) -> Result<Option<Map>, ReadError> {
    match view.resolve(&format!("dev/block/{dev}"))? {
        Some(dir) => read_in(view, dir.rsplit('/').next().unwrap_or_default()),
        None => Ok(None),
    }
}

/// The map of that uuid. It is looked for `at` the number that it had first; then device-mapper is asked.
pub(crate) async fn by_uuid(
    doors: &StorageDoors,
    uuid: &str,
    at: Option<DevNum>,
) -> Result<Option<Map>, Error> {
    let sysfs = &*doors.sysfs;
    if let Some(dev) = at
        && let Some(map) = by_number(sysfs, dev).await?.filter(|map| map.uuid == uuid)
    {
        return Ok(Some(map));
    }
    match doors.blocks.mapped(uuid).await {
        Ok(None) => return Ok(None),
        Ok(Some(dev)) => {
            // Another one, where it has gone meanwhile.
            return Ok(by_number(sysfs, dev).await?.filter(|map| map.uuid == uuid));
        }
        Err(error) => {
            tracing::debug!(uuid, %error, "device-mapper was not asked: each map is, by /sys");
        }
    }
    let uuid = uuid.to_owned();
    let look = move |view: &View<'_>| {
        for kernel in view.entries("block")?.iter().filter(|n| n.starts_with("dm-")) {
            // The rest is read of the one alone. What cannot be read here is told by that.
            let its = view.text(&format!("block/{kernel}/dm/uuid"));
            if its.is_ok_and(|its| its.as_deref() != Some(uuid.as_str())) {
                continue;
            }
            if let Some(map) = read_in(view, kernel)?.filter(|map| map.uuid == uuid) {
                return Ok(Some(map));
            }
        }
        Ok(None)
    };
    Ok(sysfs.look("block", look).await?)
}

/// What is stacked upon a disk, each with the map that it is, if it is one.
pub(crate) async fn on(
    sysfs: &dyn Sysfs,
    block_dir: &str,
) -> Result<Vec<(String, Option<Map>)>, Error> {
    let block = block_dir.to_owned();
    Ok(sysfs.look(block_dir, move |view| on_in(view, &block)).await?)
}

pub(crate) fn on_in(
    view: &View<'_>,
    block_dir: &str,
) -> Result<Vec<(String, Option<Map>)>, ReadError> {
    let holders = scsi::holders_in(view, block_dir)?.into_iter();
    holders.map(|holder| read_in(view, &holder).map(|map| (holder, map))).collect()
}

/// What stands above the paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Above {
    /// Nothing.
    Nothing,
    /// The LUN's map, but not above every path, or its size is not set yet.
    Partial(Map),
    /// The LUN's map, above every path.
    Whole(Map),
}

/// What stands above `paths` now. Anything but their own map is an error that names it.
pub(crate) async fn above(sysfs: &dyn Sysfs, paths: &[ScsiPath]) -> Result<Above, Error> {
    let mut map: Option<Map> = None;
    let mut whole = true;
    for path in paths {
        let block = format!("{}/block/{}", path.dir, path.disk.name);
        let holders = on(sysfs, &block).await?;
        whole &= !holders.is_empty();
        for (holder, found) in holders {
            if map.as_ref().is_some_and(|m| m.kernel == holder) {
                continue;
            }
            let held = |by: String| Error::DeviceHeld {
                device: format!("{} ({})", path.disk.name, path.hctl),
                holder: by,
            };
            match found {
                // A map that was caught while being made has no uuid yet.
                Some(m) if m.uuid.is_empty() => whole = false,
                Some(m) if m.is_of(&path.identity) && map.is_none() => map = Some(m),
                Some(m) if m.uuid.starts_with("mpath-") => {
                    let problem =
                        format!("is not {} ({}): the path {} is in it", m.name, m.uuid, path.hctl);
                    return Err(Error::Map { wwid: path.identity.wwid.clone(), problem });
                }
                Some(m) => return Err(held(format!("{holder} ({})", m.name))),
                None if holder.starts_with("dm-") => whole = false,
                None => return Err(held(holder)),
            }
        }
    }
    Ok(match map {
        None => Above::Nothing,
        Some(map) if whole && paths.iter().all(|p| p.disk.size == map.size) => Above::Whole(map),
        Some(map) => Above::Partial(map),
    })
}

/// Removes the map of that uuid, which may be `at` that number. Nobody may hold it; what is in its queue is failed,
/// not kept.
pub(crate) async fn remove(
    doors: &StorageDoors,
    settings: &Settings,
    uuid: &str,
    at: Option<DevNum>,
    opens: Opens,
) -> Result<Outcome, Error> {
    match by_uuid(doors, uuid, at).await? {
        Some(map) => remove_found(doors, settings, &map, opens).await,
        None => Ok(Outcome::Already(())),
    }
}

/// The same of a map that was just found.
pub(crate) async fn remove_found(
    doors: &StorageDoors,
    settings: &Settings,
    map: &Map,
    opens: Opens,
) -> Result<Outcome, Error> {
    let held = scsi::await_free(doors, settings, &map.dir(), map.dev, &[], opens).await?;
    if let Some(holder) = held {
        return Err(Error::DeviceHeld { device: format!("{} ({})", map.kernel, map.name), holder });
    }
    let mut wait = Wait::about(&*doors.uevents, About::Blocks, ms(settings.map_ms));
    // udev has a new map open for a moment: a refusal is worth another try, for as long as holders
    // may need to let go.
    let patience = Instant::now() + ms(settings.holders_ms);
    // What nobody holds and was flushed has nothing in its queue.
    let queues = opens != Opens::Unheld;
    let mut refused = delete(doors, settings, map, queues).await?;
    loop {
        // `del map` may answer that it is delayed: sysfs is the truth.
        match by_number(&*doors.sysfs, map.dev).await? {
            Some(now) if now.diskseq == map.diskseq => {}
            _ => return Ok(Outcome::Done(())),
        }
        let hopeless = refused.is_some() && Instant::now() >= patience;
        if hopeless || !wait.next_before(Instant::now() + scsi::CLOSES).await {
            let why = refused.unwrap_or_else(|| format!("no end within {:?}", ms(settings.map_ms)));
            return Err(Error::DeviceHeld {
                device: format!("{} ({})", map.kernel, map.name),
                holder: format!("something that keeps multipathd from removing it: {}", why.trim()),
            });
        }
        if refused.is_some() {
            refused = delete(doors, settings, map, true).await?;
        }
    }
}

/// Asks multipathd, or does without it where it does not run; `Some` is a refusal. What it may have in its queue (`queues`) is
/// failed.
async fn delete(
    doors: &StorageDoors,
    settings: &Settings,
    map: &Map,
    queues: bool,
) -> Result<Option<String>, Error> {
    let name = &map.name;
    if map.slaves.is_empty() {
        // Disarmed, or left by its paths: multipathd may not know it any more.
        return Ok(dmsetup(doors, settings, &["remove", name]).await.err().map(|e| e.to_string()));
    }
    if queues {
        stop_queueing(&*doors.multipathd, name).await;
    }
    match doors.multipathd.ask(&format!("del map {name}")).await {
        Ok(_) => Ok(None),
        Err(MultipathdError::Refused { answer, .. }) => Ok(Some(answer)),
        Err(MultipathdError::NotRunning) => {
            let doing = format!("removing the map {name}");
            let args = ["-f", name.as_str()];
            match doors.commands.run(Tool::Multipath, &args, ms(settings.command_ms)).await {
                Ok(out) if out.code == Some(0) => Ok(None),
                Ok(out) => Ok(Some(format!("{} {}", out.stdout.trim(), out.stderr.trim()))),
                Err(source) => Err(Error::Command { doing, source }),
            }
        }
        Err(e) => Err(Error::Multipathd(e)),
    }
}

/// Puts an `error` table under a map that somebody still holds open though nobody may use it any
/// more: a descriptor outlives its cgroup grant, and must not read or write the LUN. Its paths are
/// let go of by that.
pub(crate) async fn disarm(
    doors: &StorageDoors,
    settings: &Settings,
    map: &Map,
) -> Result<(), Error> {
    // Not waiting for what is in its queue: with no path left that could be for ever.
    dmsetup(doors, settings, &["wipe_table", "--force", "--noflush", "--nolockfs", &map.name]).await
}

async fn dmsetup(doors: &StorageDoors, settings: &Settings, args: &[&str]) -> Result<(), Error> {
    let doing = || format!("dmsetup {}", args.join(" "));
    match doors.commands.run(Tool::Dmsetup, args, ms(settings.command_ms)).await {
        Ok(out) if out.code == Some(0) => Ok(()),
        Ok(out) => Err(Error::Tool {
            doing: doing(),
            code: out.code,
            stderr: out.stderr.trim().to_owned(),
        }),
        Err(source) => Err(Error::Command { doing: doing(), source }),
    }
}

/// A map without live paths that queues would keep its last writers, and us, for ever. Only for a
/// map that is being removed. That it fails is not worse than not trying.
pub(crate) async fn stop_queueing(multipathd: &dyn Multipathd, name: &str) {
    if let Err(e) = multipathd.ask(&format!("disablequeueing map {name}")).await {
        tracing::debug!(map = %name, error = %e, "queueing was not turned off");
    }
}

/// Takes a map off paths that are to be used without one: multipathd lets go of the paths first,
/// or it would make the map again.
pub(crate) async fn take_off(
    doors: &StorageDoors,
    settings: &Settings,
    map: &Map,
    paths: &[ScsiPath],
) -> Result<(), Error> {
    let known = |slave: &String| paths.iter().any(|p| p.disk.name == *slave);
    if let Some(slave) = map.slaves.iter().find(|s| !known(s)) {
        let problem = format!("({}) has {slave} in it too, which is not this volume's", map.name);
        return Err(Error::Map { wwid: paths[0].identity.wwid.clone(), problem });
    }
    for path in paths {
        let asked = doors.multipathd.ask(&format!("del path {}", path.disk.name)).await;
        asked.map_err(Error::Multipathd)?;
    }
    remove(doors, settings, &map.uuid, Some(map.dev), Opens::Unknown).await?;
    forget(&*doors.multipathd, &map.uuid).await
}

/// Takes one path out of a map that goes on without it: somebody else's map of the same LUN. The
/// last path of a map is left in it, and whoever wants to delete it finds the map as its holder.
pub(crate) async fn part(
    doors: &StorageDoors,
    settings: &Settings,
    name: &str,
    block_dir: &str,
) -> Result<(), Error> {
    let mut wait = Wait::about(&*doors.uevents, About::Blocks, ms(settings.map_ms));
    for (holder, map) in on(&*doors.sysfs, block_dir).await? {
        let Some(map) = map else { continue };
        if !map.uuid.starts_with("mpath-") || map.slaves.iter().all(|s| s == name) {
            continue;
        }
        let asked = doors.multipathd.ask(&format!("del path {name}")).await;
        asked.map_err(Error::Multipathd)?;
        while scsi::holders(&*doors.sysfs, block_dir).await?.contains(&holder) {
            if !wait.next().await {
                break; // It is named as the holder by whoever looks next.
            }
        }
    }
    Ok(())
}
