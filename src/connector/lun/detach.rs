//! The device goes: flush, map, paths.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::Luns;
use super::held::flush_lost;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::guestlun;
use crate::connector::lease::{MapLease, PathLease, Seen, User};
use crate::connector::multipath::Map;
use crate::connector::settings::ms;
use crate::connector::wait::Wait;
use crate::connector::{DetachOptions, multipath, scsi};
use crate::host::sysfs::is_gone;
use crate::step::Step;
use crate::types::{DevNum, Wwid};

impl<T: Transport> Luns<T> {
    /// Flushes and removes the map and the paths that are ours.
    pub(super) async fn remove_device(
        &self,
        user: &User,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let tracker = &self.doors.tracker;
        let map = match &user.map {
            Some(map) => Some(map.clone()),
            None => self.map_above(user).await?,
        };
        let map_device = match &map {
            Some(map) => multipath::by_uuid(&*self.doors.sysfs, &map.uuid).await?,
            None => None,
        };
        let made = map.as_ref().is_some_and(|m| m.made);
        let mut maps = BTreeSet::new();
        let swapped = self.swapped(user).await?;
        if let Some(error) = swapped {
            if !options.force {
                return Err(error);
            }
            options.gave_up(format!("{error}: it was not flushed"));
        } else {
            let flush = self.flush_device(user, map_device.as_ref(), made, options, &mut maps);
            tracker.run(Step::Flush, flush).await?;
        }
        if let Some(map) = map.filter(|m| m.made) {
            let remove = multipath::remove(&self.doors, &self.settings, &map.uuid);
            tracker.run(Step::Unmap, remove).await?;
            maps.insert(map.uuid);
        }
        self.delete_paths(user, &mut maps).await?;
        // Last: as long as it had a path, multipathd could have written them again.
        if !maps.is_empty() {
            multipath::drain(&*self.doors.multipathd).await;
        }
        for uuid in maps {
            let forget = multipath::forget_deleted(&self.doors, &self.settings, &uuid);
            tracker.run(Step::ForgetMap, forget).await?;
        }
        Ok(())
    }

    /// A path that is still the device that it was, but shows another LUN.
    async fn swapped(&self, user: &User) -> Result<Option<Error>, Error> {
        let sysfs = &*self.doors.sysfs;
        for path in &user.paths {
            let Some(seen) = &path.seen else { continue };
            match scsi::disk(sysfs, &path.dir).await? {
                Some(disk) if disk.diskseq == seen.diskseq => {}
                _ => continue,
            }
            let found = scsi::raw_wwid(sysfs, &path.dir).await?;
            if found != seen.wwid {
                let (at, was) = (path.hctl.to_string(), seen.wwid.clone());
                return Ok(Some(Error::Swapped { at, was, found }));
            }
        }
        Ok(None)
    }

    /// Writes out what the host has in its cache of the device, which nobody may hold.
    async fn flush_device(
        &self,
        user: &User,
        map: Option<&Map>,
        made: bool,
        options: DetachOptions<'_>,
        maps: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        match map {
            // It was disarmed before: its paths are gone, and all that was to be written is.
            Some(map) if made && map.slaves.is_empty() => {
                self.refuse_held(&map.name, &map.dir(), map.dev).await
            }
            Some(map) => {
                if made {
                    let free = self.refuse_held(&map.name, &map.dir(), map.dev).await;
                    if let Err(held) = free {
                        self.disarm(user, map, options, maps).await?;
                        return Err(held);
                    }
                }
                if made && options.force {
                    if !self.has_live_path(map).await {
                        options.gave_up(format!(
                            "map {} has no path left: its queueing was switched off, and what waited in it failed",
                            map.name
                        ));
                    }
                    multipath::stop_queueing(&*self.doors.multipathd, &map.name).await;
                }
                self.flush(map.dev, options).await.map(drop)
            }
            None => self.flush_paths(user, options, maps).await,
        }
    }

    /// Makes a map harmless that was a guest's and that somebody still holds open: it gives errors
    /// from now on, and its paths go. What is stacked upon it on this host is left alone: it never
    /// came from the guest, and is somebody's mistake to be mended.
    async fn disarm(
        &self,
        user: &User,
        map: &Map,
        options: DetachOptions<'_>,
        maps: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        let stacked = scsi::stacked(&*self.doors.sysfs, &map.dir(), &[]).await?;
        if user.attachment.is_none() || stacked.is_some() {
            return Ok(());
        }
        tracing::warn!(map = map.name, dev = %map.dev, "it is still held open after its revoke: from now on it only gives errors");
        if let Err(error) = self.doors.blocks.flush(map.dev).await {
            options.gave_up(flush_lost(map.dev, &error));
        }
        multipath::disarm(&self.doors, &self.settings, map).await?;
        self.delete_paths(user, maps).await
    }

    /// A map that multipathd made above our paths, though the lease does not know it (the attach
    /// was cut short, or there was not to be one): it goes with them if it lies on them alone.
    pub(super) async fn map_above(&self, user: &User) -> Result<Option<MapLease>, Error> {
        let sysfs = &*self.doors.sysfs;
        let mut names = Vec::new();
        let mut found = None;
        for path in user.paths.iter().filter(|p| p.made) {
            let Some(disk) = scsi::disk(sysfs, &path.dir).await? else { continue };
            if path.seen.as_ref().is_some_and(|s| s.diskseq != disk.diskseq) {
                continue;
            }
            let block = format!("{}/block/{}", path.dir, disk.name);
            names.push(disk.name);
            for holder in scsi::holders(sysfs, &block).await? {
                if let Some(map) = multipath::read(sysfs, &holder).await?
                    && map.uuid.starts_with("mpath-")
                {
                    found = Some(map);
                }
            }
        }
        Ok(found
            .filter(|m| m.slaves.iter().all(|s| names.contains(s)))
            .map(|m| MapLease { uuid: m.uuid, made: true }))
    }

    async fn flush_paths(
        &self,
        user: &User,
        options: DetachOptions<'_>,
        maps: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        for path in &user.paths {
            let Some(seen) = &path.seen else { continue };
            match scsi::disk(&*self.doors.sysfs, &path.dir).await? {
                Some(disk) if disk.diskseq == seen.diskseq => {}
                _ => continue,
            }
            let block = format!("{}/block/{}", path.dir, seen.name);
            if path.made {
                // Its maps go as it goes.
                let free = self.free_path(user, path.hctl, &block, seen, maps).await;
                if let Err(held @ Error::DeviceHeld { .. }) = free {
                    self.silence(user, path, seen, options).await?;
                    return Err(held);
                }
                free?;
            }
            // What was never given away has nothing of anybody's to be written out.
            if user.attachment.is_some() && !self.flush(seen.dev, options).await? {
                self.tell_dead(path, seen, options).await?;
            }
        }
        Ok(())
    }

    async fn refuse_held(&self, name: &str, block: &str, dev: DevNum) -> Result<(), Error> {
        match scsi::await_unheld(&self.doors, &self.settings, block, dev, &[]).await? {
            None => Ok(()),
            Some(holder) => Err(Error::DeviceHeld { device: name.into(), holder }),
        }
    }

    /// Whether it was flushed; not if it is gone, or if that is to be no obstacle.
    async fn flush(&self, dev: DevNum, options: DetachOptions<'_>) -> Result<bool, Error> {
        match self.doors.blocks.flush(dev).await {
            Ok(()) => Ok(true),
            Err(e) if is_gone(&e) => Ok(false),
            Err(error) if options.force => {
                options.gave_up(flush_lost(dev, &error));
                Ok(true)
            }
            Err(source) => Err(Error::Flush { dev, source }),
        }
    }

    /// Deletes our paths, those that are still what they were and that nobody holds; their addresses are
    /// nobody's then. One after the other they are taken out of maps, so that the last one of somebody's map is
    /// found to be so; the kernel's part, which takes the longest, goes side by side.
    async fn delete_paths(&self, user: &User, maps: &mut BTreeSet<String>) -> Result<(), Error> {
        let mut free = Vec::new();
        for path in user.paths.iter().filter(|p| p.made) {
            free.push((path, self.free(user, path, maps).await?));
        }
        // multipathd may have made a map in between, and taken it off with a path, unseen.
        let wwids = free.iter().filter_map(|(_, seen)| seen.as_ref()?.wwid.parse::<Wwid>().ok());
        maps.extend(wwids.map(|wwid| format!("mpath-{}", wwid.multipath())));
        let tracker = &self.doors.tracker;
        let delete = |(path, seen)| tracker.run(Step::DeletePath, self.delete_path(path, seen));
        let deleted = join_all(free.into_iter().map(delete)).await;
        deleted.into_iter().collect()
    }

    async fn delete_path(&self, path: &PathLease, seen: Option<Seen>) -> Result<(), Error> {
        if let Some(seen) = seen {
            scsi::delete(&self.doors, &self.settings, path.hctl, &path.dir, &seen).await?;
        }
        if scsi::disk(&*self.doors.sysfs, &path.dir).await?.is_none() {
            guestlun::unmark(&*self.doors.rundir, path.hctl).await?;
        }
        Ok(())
    }

    /// What a path of ours is now, once nobody holds it; `None` where there is nothing to be deleted.
    async fn free(
        &self,
        user: &User,
        path: &PathLease,
        maps: &mut BTreeSet<String>,
    ) -> Result<Option<Seen>, Error> {
        let sysfs = &*self.doors.sysfs;
        let Some(disk) = scsi::disk(sysfs, &path.dir).await? else {
            self.delete_diskless(path).await?;
            return Ok(None);
        };
        let seen = match &path.seen {
            Some(seen) if seen.diskseq != disk.diskseq => return Ok(None), // Another's by now.
            // What it shows now: a swapped one came here only by force.
            Some(seen) => Seen { wwid: scsi::raw_wwid(sysfs, &path.dir).await?, ..seen.clone() },
            // Announced, never seen: it was not there when the scan began, so it is of our scan.
            None => Seen {
                wwid: scsi::raw_wwid(sysfs, &path.dir).await?,
                dev: disk.dev,
                diskseq: disk.diskseq,
                name: disk.name.clone(),
            },
        };
        let block = format!("{}/block/{}", path.dir, seen.name);
        self.free_path(user, path.hctl, &block, &seen, maps).await?;
        Ok(Some(seen))
    }

    /// Waits until nobody holds a path. multipathd may be about to make a map above it, or to make
    /// one anew: that is not a holder, it is taken off as it comes.
    async fn free_path(
        &self,
        user: &User,
        hctl: scsi::Hctl,
        block: &str,
        seen: &Seen,
        maps: &mut BTreeSet<String>,
    ) -> Result<(), Error> {
        let mut wait = Wait::new(&*self.doors.uevents, ms(self.settings.holders_ms));
        loop {
            multipath::part(&self.doors, &self.settings, &seen.name, block).await?;
            if let Some(map) = self.map_above(user).await? {
                multipath::remove(&self.doors, &self.settings, &map.uuid).await?;
                maps.insert(map.uuid);
            }
            let Some(holder) = scsi::holder(&self.doors, block, seen.dev, &[]).await? else {
                return Ok(());
            };
            if !wait.next_before(Instant::now() + scsi::CLOSES).await {
                let device = format!("{} ({hctl})", seen.name);
                return Err(Error::DeviceHeld { device, holder });
            }
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
        let mut wait = Wait::new(&*self.doors.uevents, ms(self.settings.disk_ms));
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
