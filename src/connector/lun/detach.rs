//! The device goes: flush ([`super::flush`]), map, paths.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::{join, join_all};
use tokio::time::Instant;

use super::Luns;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::guestlun;
use crate::connector::lease::{MapLease, PathLease, Seen, User};
use crate::connector::multipath::Map;
use crate::connector::scsi::{self, Deleted, Opens};
use crate::connector::settings::ms;
use crate::connector::wait::{About, Wait};
use crate::connector::{DetachOptions, multipath};
use crate::host::block::Exclusive;
use crate::host::sysfs::{View, is_gone};
use crate::step::Step;
use crate::types::{DevNum, Wwid};

/// What is known of a device while it goes.
#[derive(Default)]
pub(super) struct Going {
    /// Uuids of the maps above it that go too, or may have gone unseen.
    pub(super) maps: BTreeSet<String>,
    /// The paths that were still what they were when its removal began.
    pub(super) there: BTreeSet<DevNum>,
    /// What is known of who has them open.
    pub(super) opens: BTreeMap<DevNum, Opens>,
}

impl Going {
    pub(super) fn opens(&self, dev: DevNum) -> Opens {
        self.opens.get(&dev).copied().unwrap_or(Opens::Unknown)
    }
}

/// What there is of a device that is to go.
pub(super) struct Looked {
    /// The paths that are still the devices that they were; an error is of one that shows another LUN.
    pub(super) there: Result<BTreeSet<DevNum>, Error>,
    /// A map that multipathd made above our paths, though the lease does not know it (the attach was cut short, or there was
    /// not to be one): it goes with them if it lies on them alone.
    pub(super) above: Option<MapLease>,
}

impl<T: Transport> Luns<T> {
    /// Flushes and removes the map, if there is one above them, and the paths that are still `there`, as far as they are
    /// ours. What was seen of the paths may be of a moment ago: each is proven once more as it is deleted.
    pub(super) async fn remove_device(
        &self,
        user: &User,
        map: Option<MapLease>,
        there: Result<BTreeSet<DevNum>, Error>,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let tracker = &self.doors.tracker;
        let at = user.attachment.as_ref().map(|a| a.device.dev);
        let map_device = async {
            match &map {
                Some(map) => multipath::by_uuid(&self.doors, &map.uuid, at).await,
                None => Ok(None),
            }
        };
        // Now, and not before: what the guest had open it has closed, and nothing of its pod can open it any more.
        let (map_device, unopened) = join(map_device, self.unopened(user, at)).await;
        let map_device = map_device?;
        let made = map.as_ref().is_some_and(|m| m.made);
        let opens = unopened.into_iter().map(|dev| (dev, Opens::None)).collect();
        let mut going = Going { opens, ..Going::default() };
        match there {
            Ok(there) => {
                going.there = there;
                let flush = self.flush_device(user, map_device.as_ref(), made, options, &mut going);
                tracker.run(Step::Flush, flush).await?;
            }
            Err(swapped) if options.force => {
                options.gave_up(format!("{swapped}: it was not flushed"));
            }
            Err(swapped) => return Err(swapped),
        }
        if let Some(map) = map.filter(|m| m.made) {
            let remove = async {
                let Some(map) = &map_device else { return Ok(()) }; // It is looked for once more at the end.
                let opens = going.opens(map.dev);
                let removed = multipath::remove_found(&self.doors, &self.settings, map, opens);
                removed.await.map(drop)
            };
            tracker.run(Step::Unmap, remove).await?;
            going.maps.insert(map.uuid);
        }
        // Multipath's files are waited for to be on the disk: as much of it as can be goes on beside the deletion. Of a map
        // with paths of others nothing: multipathd may have it again by now.
        let is_ours = map_device.is_some_and(|map| lies_on_ours(&map, user));
        let gone = if is_ours { going.maps.clone() } else { BTreeSet::new() };
        let forget = multipath::forget_ahead(&*self.doors.multipathd, &gone);
        let (deleted, ()) = join(self.delete_paths(user, &mut going), forget).await;
        deleted?;
        // Last: as long as it had a path, multipathd could have written them again.
        if !going.maps.is_empty() {
            multipath::drain(&*self.doors.multipathd).await;
        }
        for uuid in going.maps {
            let forget = multipath::forget_deleted(&self.doors, &self.settings, &uuid);
            tracker.run(Step::ForgetMap, forget).await?;
        }
        Ok(())
    }

    /// Looks at the paths, and at what multipathd made above them where that is to be known, all in one.
    pub(super) async fn look_over(&self, user: &User, above: bool) -> Result<Looked, Error> {
        let Some(first) = user.paths.first().map(|path| path.dir.clone()) else {
            return Ok(Looked { there: Ok(BTreeSet::new()), above: None });
        };
        let paths = user.paths.clone();
        let look = move |view: &View<'_>| {
            let (mut there, mut swapped) = (BTreeSet::new(), None);
            let (mut names, mut maps) = (Vec::new(), Vec::new());
            for PathLease { hctl, dir, seen, made } in &paths {
                let now = scsi::present_in(view, dir)?;
                let is_same = |now: &scsi::Present| {
                    seen.as_ref().is_none_or(|seen| seen.diskseq == now.disk.diskseq)
                };
                let Some(now) = now.filter(is_same) else { continue };
                match seen {
                    Some(seen) if now.raw_wwid != seen.wwid => {
                        let found = (hctl.to_string(), seen.wwid.clone(), now.raw_wwid);
                        swapped.get_or_insert(found);
                    }
                    Some(_) => drop(there.insert(now.disk.dev)),
                    None => {}
                }
                if *made && above {
                    let above = multipath::on_in(view, &format!("{dir}/block/{}", now.disk.name))?;
                    maps.extend(above.into_iter().filter_map(|(_, map)| map));
                    names.push(now.disk.name);
                }
            }
            Ok((there, swapped, names, maps))
        };
        let (there, swapped, names, maps) = self.doors.sysfs.look(&first, look).await?;
        let found = maps.into_iter().rfind(|map| map.uuid.starts_with("mpath-"));
        let above = found
            .filter(|m| m.slaves.iter().all(|s| names.contains(s)))
            .map(|m| MapLease { uuid: m.uuid, made: true });
        let there = match swapped {
            Some((at, was, found)) => Err(Error::Swapped { at, was, found }),
            None => Ok(there),
        };
        Ok(Looked { there, above })
    }

    /// See [`Looked::above`].
    async fn map_above(&self, user: &User) -> Result<Option<MapLease>, Error> {
        Ok(self.look_over(user, true).await?.above)
    }

    /// Those of our paths, and of what was attached at that number, that no program has open.
    async fn unopened(&self, user: &User, attached: Option<DevNum>) -> BTreeSet<DevNum> {
        let paths = user.paths.iter().filter(|p| p.made).filter_map(|p| p.seen.as_ref());
        let devs: BTreeSet<DevNum> = paths.map(|seen| seen.dev).chain(attached).collect();
        let devs: Vec<DevNum> = devs.into_iter().collect();
        if devs.is_empty() { BTreeSet::new() } else { scsi::unopened(&self.doors, &devs).await }
    }

    /// Deletes our paths, those that are still what they were and that nobody holds; their addresses are
    /// nobody's then. One after the other they are taken out of maps, so that the last one of somebody's map is
    /// found to be so; the kernel's part, which takes the longest, goes side by side.
    pub(super) async fn delete_paths(&self, user: &User, going: &mut Going) -> Result<(), Error> {
        let mut free = self.all_free(user, going).await?;
        if free.is_empty() {
            for path in user.paths.iter().filter(|p| p.made) {
                free.push((path, self.free(user, path, going).await?));
            }
        }
        // multipathd may have made a map in between, and taken it off with a path, unseen.
        let wwids = free.iter().filter_map(|(_, seen)| seen.as_ref()?.wwid.parse::<Wwid>().ok());
        going.maps.extend(wwids.map(|wwid| format!("mpath-{}", wwid.multipath())));
        let tracker = &self.doors.tracker;
        let delete = |(path, seen)| tracker.run(Step::DeletePath, self.delete_path(path, seen));
        let deleted = join_all(free.into_iter().map(delete)).await;
        deleted.into_iter().collect()
    }

    /// Our paths, read in one, where [`Self::free`] would find of each that it is what it was and that nothing is on it, as
    /// when their map has gone before; else none of them.
    async fn all_free<'u>(
        &self,
        user: &'u User,
        going: &Going,
    ) -> Result<Vec<(&'u PathLease, Option<Seen>)>, Error> {
        let made = user.paths.iter().filter(|p| p.made);
        let known = made.clone().map(|path| Some((path.dir.clone(), path.seen.clone()?)));
        let unopened = |(_, seen): &(String, Seen)| going.opens(seen.dev) != Opens::Unknown;
        let known: Option<Vec<_>> = known.map(|path| path.filter(unopened)).collect();
        let Some(known) = known.filter(|known| !known.is_empty()) else { return Ok(Vec::new()) };
        let unheld = |seen: &Seen| going.opens(seen.dev) == Opens::Unheld;
        if known.iter().all(|(_, seen)| unheld(seen) && going.there.contains(&seen.dev)) {
            return Ok(made.zip(known.into_iter().map(|(_, seen)| Some(seen))).collect());
        }
        let first = known[0].0.clone();
        let look = move |view: &View<'_>| {
            let mut free = Vec::with_capacity(known.len());
            for (dir, seen) in &known {
                let now = scsi::present_in(view, dir)?;
                let now = now.filter(|now| now.disk.diskseq == seen.diskseq);
                let holders = scsi::holders_in(view, &format!("{dir}/block/{}", seen.name))?;
                let Some(now) = now.filter(|_| holders.is_empty()) else { return Ok(Vec::new()) };
                free.push(Seen { wwid: now.raw_wwid, ..seen.clone() });
            }
            Ok(free)
        };
        let free = self.doors.sysfs.look(&first, look).await?;
        let claims = free.iter().map(|seen| self.doors.blocks.exclusive(seen.dev));
        let claims = join_all(claims).await;
        if !claims.iter().all(|claim| matches!(claim, Ok(Exclusive::Free))) {
            return Ok(Vec::new());
        }
        Ok(made.zip(free.into_iter().map(Some)).collect())
    }

    async fn delete_path(&self, path: &PathLease, seen: Option<Seen>) -> Result<(), Error> {
        let deleted = match seen {
            Some(seen) => {
                scsi::delete(&self.doors, &self.settings, path.hctl, &path.dir, &seen).await?
            }
            None => Deleted::NotThere,
        };
        if deleted == Deleted::Gone || scsi::disk(&*self.doors.sysfs, &path.dir).await?.is_none() {
            guestlun::unmark(&*self.doors.rundir, path.hctl).await?;
        }
        Ok(())
    }

    /// What a path of ours is now, once nobody holds it; `None` where there is nothing to be deleted.
    async fn free(
        &self,
        user: &User,
        path: &PathLease,
        going: &mut Going,
    ) -> Result<Option<Seen>, Error> {
        let sysfs = &*self.doors.sysfs;
        let Some(scsi::Present { disk, raw_wwid: wwid, .. }) =
            scsi::present(sysfs, &path.dir).await?
        else {
            self.delete_diskless(path).await?;
            return Ok(None);
        };
        let seen = match &path.seen {
            Some(seen) if seen.diskseq != disk.diskseq => return Ok(None), // Another's by now.
            // What it shows now: a swapped one came here only by force.
            Some(seen) => Seen { wwid, ..seen.clone() },
            // Announced, never seen: it was not there when the scan began, so it is of our scan.
            None => Seen { wwid, dev: disk.dev, diskseq: disk.diskseq, name: disk.name },
        };
        let block = format!("{}/block/{}", path.dir, seen.name);
        self.free_path(user, path.hctl, &block, &seen, going).await?;
        Ok(Some(seen))
    }

    /// Waits until nobody holds a path. multipathd may be about to make a map above it, or to make
    /// one anew: that is not a holder, it is taken off as it comes.
    pub(super) async fn free_path(
        &self,
        user: &User,
        hctl: scsi::Hctl,
        block: &str,
        seen: &Seen,
        going: &mut Going,
    ) -> Result<(), Error> {
        let mut wait =
            Wait::about(&*self.doors.uevents, About::Blocks, ms(self.settings.holders_ms));
        loop {
            multipath::part(&self.doors, &self.settings, &seen.name, block).await?;
            if let Some(map) = self.map_above(user).await? {
                let (uuid, opens) = (&map.uuid, Opens::Unknown);
                multipath::remove(&self.doors, &self.settings, uuid, None, opens).await?;
                going.maps.insert(map.uuid);
            }
            let opens = going.opens(seen.dev);
            let holder = scsi::holder(&self.doors, block, seen.dev, &[], opens).await?;
            let Some(holder) = holder else { return Ok(()) };
            if !wait.next_before(Instant::now() + scsi::CLOSES).await {
                let device = format!("{} ({hctl})", seen.name);
                return Err(Error::DeviceHeld { device, holder });
            }
            // Time has passed.
            going.opens.remove(&seen.dev);
        }
    }

    /// A SCSI device of our scan that has no disk (no medium, or not yet).
    async fn delete_diskless(&self, path: &PathLease) -> Result<(), Error> {
        let sysfs = &*self.doors.sysfs;
        let there = async || {
            let entries = sysfs.entries(&path.dir).await;
            entries.map(|e| !e.is_empty()).map_err(Error::io(format!("listing {}", path.dir)))
        };
        if !there().await? {
            return Ok(());
        }
        let (about, within) = (About::Below(path.dir.clone()), ms(self.settings.disk_ms));
        let mut wait = Wait::about(&*self.doors.uevents, about, within);
        match sysfs.write(&format!("{}/delete", path.dir), "1").await {
            Err(e) if !is_gone(&e) => {
                return Err(Error::io(format!("deleting {}", path.hctl))(e));
            }
            _ => {}
        }
        while there().await? {
            if !wait.next().await {
                let problem = "the kernel was told, but has not removed it".into();
                return Err(Error::Path { at: path.hctl.to_string(), problem });
            }
        }
        Ok(())
    }
}

/// Whether a map has no path beneath it but those that were made for a volume.
fn lies_on_ours(map: &Map, user: &User) -> bool {
    let made = user.paths.iter().filter(|path| path.made).filter_map(|path| path.seen.as_ref());
    let names: BTreeSet<&String> = made.map(|seen| &seen.name).collect();
    map.slaves.iter().all(|slave| names.contains(slave))
}
