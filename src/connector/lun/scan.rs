//! One path: the LUN's SCSI device under one way to the target, scanned for exactly, and proven.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Luns;
use super::transport::{Job, Transport, Way as _};
use crate::connector::error::Error;
use crate::connector::guestlun;
use crate::connector::identity::judge;
use crate::connector::lease::{MapLease, PathLease, Seen, User};
use crate::connector::multipath;
use crate::connector::scsi::{self, Deleted, Disk, Hctl, Opens, ScsiPath};
use crate::connector::settings::ms;
use crate::connector::wait::{About, Wait};
use crate::step::Step;

/// How long a scan that was given up is watched: the kernel's own retries end within this.
const LATE_SCAN: Duration = Duration::from_secs(600);

/// A path that was proven.
#[derive(Debug, Clone)]
pub(super) struct Proven {
    /// The path.
    pub(super) path: ScsiPath,
    /// It was there before, and a map above it.
    pub(super) had_map: bool,
}

impl<T: Transport> Luns<T> {
    /// The verified path to the LUN through `way`. What it makes is in the lease before.
    pub(super) async fn path(
        self: &Arc<Self>,
        job: &Job<T>,
        way: &T::Way,
    ) -> Result<Proven, Error> {
        T::admit(self, job, way).await?;
        let hctl = way.hctl(job.source.lun.scsi());
        let dir = way.device_dir(hctl);
        if self.is_there(&dir).await? {
            let existing = self.existing(job, way, hctl, &dir);
            if let Some(proven) = self.doors.tracker.run(Step::Identity, existing).await? {
                return Ok(proven);
            }
        }
        match self.scan(job, hctl, &dir).await {
            Err(Error::Io { doing, source }) if source.kind() == std::io::ErrorKind::TimedOut => {
                self.watch_late(job, way);
                Err(Error::Io { doing, source })
            }
            other => other,
        }
    }

    /// The kernel may end a scan long after it was given up: what it brings then is removed.
    fn watch_late(self: &Arc<Self>, job: &Job<T>, way: &T::Way) {
        let (inner, job, way) = (self.clone(), job.clone(), way.clone());
        let dir = way.device_dir(way.hctl(job.source.lun.scsi()));
        self.background(async move {
            let about = About::Below(dir.clone());
            let mut wait = Wait::about(&*inner.doors.uevents, about, LATE_SCAN);
            while !inner.is_there(&dir).await.unwrap_or(false) {
                if !wait.next().await {
                    return;
                }
            }
            if let Err(error) = inner.reclaim(&job, &way).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%dir, error, "a device that came late could not be removed");
            }
        });
    }

    /// Whether there is something that the kernel has scanned by itself, or may have.
    pub(super) async fn is_kept(&self, job: &Job<T>, way: &T::Way) -> bool {
        let dir = way.device_dir(way.hctl(job.source.lun.scsi()));
        T::SCANNED_BY_KERNEL && self.is_there(&dir).await.unwrap_or(true)
    }

    async fn is_there(&self, dir: &str) -> Result<bool, Error> {
        let entries =
            self.doors.sysfs.entries(dir).await.map_err(Error::io(format!("listing {dir}")))?;
        Ok(!entries.is_empty())
    }

    /// A device that is there already is read anew. `None`: it was stale, unheld, and is gone.
    async fn existing(
        &self,
        job: &Job<T>,
        way: &T::Way,
        hctl: Hctl,
        dir: &str,
    ) -> Result<Option<Proven>, Error> {
        let sysfs = &*self.doors.sysfs;
        let users = self.leases.users_with::<T::Made>(job.source.lease(), job.source.lun).await?;
        let (mine, others): (Vec<User>, _) = users.into_iter().partition(|u| u.owner == job.owner);
        let known = mine.iter().flat_map(|u| &u.paths).find(|p| p.hctl == hctl);
        let made: T::Made = self.leases.made(job.source.lease()).await?;
        // Where nobody else scans, what is under the way is ours or left by us.
        let ours = others.is_empty()
            && (known.is_some_and(|p| p.made) || T::is_ours(&made, &job.source.target, way));
        let mut leftover = false;
        let before = scsi::raw_wwid(sysfs, dir).await?;
        scsi::rescan(sysfs, dir).await?;
        let (raw_wwid, identity) = scsi::identity(sysfs, hctl, dir).await?;
        let disk = scsi::disk(sysfs, dir).await?;
        if let Some(disk) = disk.filter(|d| d.size > 0)
            && raw_wwid == before
        {
            let verdict = identity
                .and_then(|id| judge(&hctl.to_string(), &job.expect, &id, disk.size).map(|()| id));
            match verdict {
                Ok(identity) => {
                    let path = ScsiPath { hctl, dir: dir.into(), disk, raw_wwid, identity };
                    // A leftover is not used even if it is right now: udev and multipathd may
                    // still know it as what it was when they saw it last.
                    // Where the kernel scans, it is one that has come back.
                    let seen = known.and_then(|p| p.seen.as_ref());
                    let back =
                        T::SCANNED_BY_KERNEL && seen.is_none_or(|seen| seen.wwid == path.raw_wwid);
                    leftover = ours && !back && seen != Some(&path.seen());
                    if !leftover {
                        let above = multipath::above(sysfs, std::slice::from_ref(&path)).await?;
                        self.announce(job, hctl, dir, ours, Some(path.seen())).await?;
                        let had_map = above != multipath::Above::Nothing && !ours;
                        return Ok(Some(Proven { path, had_map }));
                    }
                }
                // It was just read anew and is under somebody else's way: no leftover.
                Err(e) if !ours => return Err(e.into()),
                Err(_) => {}
            }
        }
        match self.remove_stale(job, &others, hctl, dir, &before).await {
            Ok(()) => Ok(None),
            // It is what it should be, only used by somebody.
            Err(Error::StaleDeviceHeld { holder, .. }) if leftover => {
                Err(Error::DeviceHeld { device: hctl.to_string(), holder })
            }
            Err(e) => Err(e),
        }
    }

    /// Removes a device that is not what its address shows now, if nobody holds it.
    async fn remove_stale(
        &self,
        job: &Job<T>,
        others: &[User],
        hctl: Hctl,
        dir: &str,
        before: &str,
    ) -> Result<(), Error> {
        let sysfs = &*self.doors.sysfs;
        let held = |holder: String| Error::StaleDeviceHeld {
            at: hctl.to_string(),
            found: if before.is_empty() { "no identity".into() } else { before.to_owned() },
            holder,
        };
        // An address is of one LUN, so it is none of other LUNs' users.
        let has = |u: &&User| u.paths.iter().any(|p| p.hctl == hctl);
        for other in others.iter().filter(has) {
            if self.has_volume(other).await? {
                return Err(held(format!("{}, for which it is attached", other.owner)));
            }
        }
        let Some(disk) = scsi::disk(sysfs, dir).await? else {
            return Err(held("an unknown driver: it is no disk".into()));
        };
        let block = format!("{dir}/block/{}", disk.name);
        self.leave_map(job, &disk.name, &block).await.map_err(|e| match e {
            Error::DeviceHeld { device, holder } => held(format!("{holder} (by way of {device})")),
            other => other,
        })?;
        if let Some(holder) =
            scsi::await_unheld(&self.doors, &self.settings, &block, disk.dev, &[]).await?
        {
            return Err(held(holder));
        }
        let wwid = scsi::raw_wwid(sysfs, dir).await?;
        let seen = Seen { wwid, dev: disk.dev, diskseq: disk.diskseq, name: disk.name };
        tracing::warn!(%hctl, was = before, "removing a stale device that nobody holds");
        match scsi::delete(&self.doors, &self.settings, hctl, dir, &seen).await? {
            Deleted::Gone | Deleted::NotThere => Ok(()),
        }
    }

    /// Takes a stale path out of a multipath map that nobody uses. A map that it is the last path of goes
    /// too, and is in the lease before: without its path nothing else would tell of it.
    async fn leave_map(&self, job: &Job<T>, name: &str, block: &str) -> Result<(), Error> {
        let sysfs = &*self.doors.sysfs;
        let mut wait = Wait::about(&*self.doors.uevents, About::Blocks, ms(self.settings.map_ms));
        for (holder, map) in multipath::on(sysfs, block).await? {
            let Some(map) = map else { continue };
            if !map.uuid.starts_with("mpath-") {
                continue;
            }
            let held =
                scsi::await_unheld(&self.doors, &self.settings, &map.dir(), map.dev, &[]).await?;
            if let Some(holder) = held {
                return Err(Error::DeviceHeld { device: map.name, holder });
            }
            if map.slaves.iter().all(|slave| slave == name) {
                let lease = MapLease { uuid: map.uuid.clone(), made: true };
                let note = |user: &mut User| user.map = user.map.take().or(Some(lease));
                self.change(&job.owner, job.first(), note).await?;
            }
            let asked = self.doors.multipathd.ask(&format!("del path {name}")).await;
            asked.map_err(Error::Multipathd)?;
            while scsi::holders(sysfs, block).await?.contains(&holder) {
                if !wait.next().await {
                    break; // It is named as the holder by whoever looks next.
                }
            }
            // multipathd may take the empty map away by itself.
            let left = multipath::by_uuid(&self.doors, &map.uuid, Some(map.dev)).await?;
            if left.is_none_or(|m| m.slaves.is_empty()) {
                let (uuid, at) = (&map.uuid, Some(map.dev));
                multipath::remove(&self.doors, &self.settings, uuid, at, Opens::None).await?;
                multipath::forget(&*self.doors.multipathd, &map.uuid).await?;
            }
            let forget = |user: &mut User| drop(user.map.take_if(|m| m.uuid == map.uuid));
            self.change(&job.owner, job.first(), forget).await?;
        }
        Ok(())
    }

    /// Scans for the LUN, and for it alone.
    async fn scan(&self, job: &Job<T>, hctl: Hctl, dir: &str) -> Result<Proven, Error> {
        let tracker = &self.doors.tracker;
        let disk = tracker.run(Step::Scan, self.find(job, hctl, dir)).await?;
        tracker.run(Step::Identity, self.identify(job, hctl, dir, disk)).await
    }

    /// Has the kernel look at that address, and waits for the disk there.
    async fn find(&self, job: &Job<T>, hctl: Hctl, dir: &str) -> Result<Disk, Error> {
        let sysfs = &*self.doors.sysfs;
        let target = job.source.target.to_string();
        let lun = job.source.lun;
        self.announce(job, hctl, dir, true, None).await?;
        guestlun::mark(&*self.doors.rundir, hctl).await?;
        let (about, within) = (About::Below(dir.into()), ms(self.settings.lun_ms));
        let mut wait = Wait::about(&*self.doors.uevents, about, within);
        if job.called_off.load(Ordering::Acquire) {
            guestlun::unmark(&*self.doors.rundir, hctl).await?;
            let problem = "its volume is wanted no more".into();
            return Err(Error::Path { at: hctl.to_string(), problem });
        }
        let path = format!("class/scsi_host/host{}/scan", hctl.host);
        let value = format!("{} {} {}", hctl.channel, hctl.target, hctl.lun);
        sysfs.write(&path, &value).await.map_err(Error::io(format!("scanning for {hctl}")))?;
        wait.restart(ms(self.settings.lun_ms));
        while !self.is_there(dir).await? {
            if !wait.next().await {
                guestlun::unmark(&*self.doors.rundir, hctl).await?;
                return Err(Error::LunNotFound { target, lun });
            }
        }
        wait.restart(ms(self.settings.disk_ms));
        let disk = scsi::await_disk(sysfs, &mut wait, dir).await?;
        disk.ok_or_else(|| Error::NoMedium { at: hctl.to_string(), target, lun })
    }

    /// Proves what was found.
    async fn identify(
        &self,
        job: &Job<T>,
        hctl: Hctl,
        dir: &str,
        disk: Disk,
    ) -> Result<Proven, Error> {
        let sysfs = &*self.doors.sysfs;
        let (raw_wwid, identity) = scsi::identity(sysfs, hctl, dir).await?;
        let seen = Seen {
            wwid: raw_wwid.clone(),
            dev: disk.dev,
            diskseq: disk.diskseq,
            name: disk.name.clone(),
        };
        self.announce(job, hctl, dir, true, Some(seen)).await?;
        let identity = identity?;
        judge(&hctl.to_string(), &job.expect, &identity, disk.size)?;
        let path = ScsiPath { hctl, dir: dir.into(), disk, raw_wwid, identity };
        Ok(Proven { path, had_map: false })
    }

    /// Writes a path into the owner's lease.
    async fn announce(
        &self,
        job: &Job<T>,
        hctl: Hctl,
        dir: &str,
        made: bool,
        seen: Option<Seen>,
    ) -> Result<(), Error> {
        let step = if seen.is_some() { Step::Identity } else { Step::Scan };
        let path = PathLease { hctl, dir: dir.into(), made, seen };
        let note = |user: &mut User| {
            user.step = Some(step);
            user.set_path(path);
        };
        match self.change(&job.owner, &job.source, note).await? {
            Some(()) => Ok(()),
            // A detach came in between; without a lease nothing may be made.
            None => Err(Error::Path {
                at: hctl.to_string(),
                problem: "its volume was detached meanwhile".into(),
            }),
        }
    }
}
