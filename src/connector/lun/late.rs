//! Paths that come after the attach is done: taken into the map, or undone.

use std::sync::Arc;

use tracing::Instrument;

use super::Luns;
use super::access::{note_route, ways};
use super::base::agree;
use super::gather::Late;
use super::scan::Proven;
use super::transport::{Job, Transport, Way as _};
use crate::connector::error::Error;
use crate::connector::lease::{PathLease, User};
use crate::connector::scsi::ScsiPath;
use crate::connector::{
    AttachRequest, Attachment, DetachOptions, Expect, guestlun, multipath, scsi,
};

impl<T: Transport> Luns<T> {
    /// Begins the login again at routes that an attached volume has no path by; what comes joins
    /// in the background. That it fails changes nothing for the volume.
    pub(super) async fn heal(
        self: &Arc<Self>,
        request: &AttachRequest,
        source: &T::Source,
        found: &Attachment,
    ) {
        if found.device.map.is_none() {
            return;
        }
        let begun = async {
            let targets = T::routes(self, source, T::targets(source)).await?;
            if found.paths.len() >= ways(&targets) {
                return Ok(());
            }
            for job in self.job(request, source, targets).await?.parts() {
                // One target's trouble keeps none of the others.
                if let Err(error) = self.heal_at(&job, found).await {
                    let (target, error) = (&job.source.target, &error as &dyn std::error::Error);
                    tracing::warn!(%target, error, "missing paths could not be tried again");
                }
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = begun.await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "missing paths could not be tried again");
        }
    }

    async fn heal_at(self: &Arc<Self>, job: &Job<T>, found: &Attachment) -> Result<(), Error> {
        let missing = self.missing(job, found).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let mut begun = T::reach(self, job, &missing).await?;
        let late = |route| Late::<T> { job: job.clone(), route, begun: begun.remove(&route) };
        self.claim_late(missing.into_iter().map(late).collect(), found);
        Ok(())
    }

    /// The routes by which there is no path.
    async fn missing(&self, job: &Job<T>, found: &Attachment) -> Result<Vec<T::Route>, Error> {
        let ways = T::ways(self, job).await?;
        let lun = job.source.lun.scsi();
        let has = |p: &T::Route| {
            ways.iter().filter(|way| way.route() == *p).any(|way| {
                let hctl = way.hctl(lun).to_string();
                found.paths.iter().any(|path| path.hctl == hctl)
            })
        };
        Ok(job.source.routes.iter().copied().filter(|p| !has(p)).collect())
    }

    /// Goes on waiting for routes that did not come in time; what they bring joins the map.
    pub(super) fn claim_late(self: &Arc<Self>, late: Vec<Late<T>>, found: &Attachment) {
        for Late::<T> { mut job, route, begun } in late.into_iter().filter(|l| l.job.multipath) {
            let inner = self.clone();
            let wwid = found.device.wwid.clone();
            job.expect = Expect {
                wwid: Some(wwid.clone()),
                unit_serial: job.expect.unit_serial.clone(),
                size: Some(found.device.size),
                ..Expect::default()
            };
            let span = tracing::info_span!("late", %route, owner = %job.owner);
            let late = async move {
                let waited = T::await_way(&inner, &job, route, begun).await;
                let Ok(way) = waited else { return };
                if let Err(error) = inner.late_path(&job, &way).await {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "a late path was not taken");
                }
            };
            self.background(late.instrument(span));
        }
    }

    /// The path of a late way, if the volume is still there; undone if it is not the LUN.
    async fn late_path(self: &Arc<Self>, job: &Job<T>, way: &T::Way) -> Result<(), Error> {
        let lun = self.lun_lock(&job.whole).await?;
        if self.attached(job).await?.is_none() {
            return Ok(());
        }
        let added = match self.path(job, way).await {
            Ok(proven) => match self.refuse_unlike(job, &proven).await {
                Ok(()) => self.add_path(job, way.route(), proven).await,
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        };
        let cause = match added {
            Ok(path) => {
                drop(lun);
                return self.see_joined(job, path).await;
            }
            Err(cause) => cause,
        };
        match self.drop_path(job, way.hctl(job.source.lun.scsi())).await {
            Ok(()) => Err(cause),
            Err(undo) => Err(Error::Undo { cause: Box::new(cause), undo: Box::new(undo) }),
        }
    }

    /// Takes a path that was walked to its end after the attach went on without it. What was `kept` for its
    /// having been there is left where there is no volume.
    pub(super) async fn take_late(
        &self,
        job: &Job<T>,
        way: &T::Way,
        proven: Proven,
        kept: bool,
    ) -> Result<(), Error> {
        let lun = self.lun_lock(&job.whole).await?;
        match self.attached(job).await? {
            Some(found)
                if job.multipath
                    && found.device.wwid == proven.path.identity.wwid
                    && self.refuse_unlike(job, &proven).await.is_ok() =>
            {
                let path = self.add_path(job, way.route(), proven).await?;
                drop(lun);
                self.see_joined(job, path).await
            }
            Some(_) => {
                self.drop_path(job, proven.path.hctl).await?;
                drop(lun);
                T::settle(self, &job.source.target, &[way.route()]).await.map(drop)
            }
            None if kept => Ok(()),
            None => {
                drop(lun);
                self.reclaim(job, way).await
            }
        }
    }

    /// What the owner has now, by the lease.
    async fn attached(&self, job: &Job<T>) -> Result<Option<Attachment>, Error> {
        let held = self.held(&job.owner, &job.whole).await?;
        Ok(held.and_then(|u| u.attachment))
    }

    /// A late path must say the same of itself as those that the volume has.
    async fn refuse_unlike(&self, job: &Job<T>, late: &Proven) -> Result<(), Error> {
        let sysfs = &*self.doors.sysfs;
        let Some(held) = self.held(&job.owner, &job.whole).await? else { return Ok(()) };
        let mut paths = vec![late.path.clone()];
        for known in held.paths.iter().filter(|p| p.hctl != late.path.hctl) {
            let (Some(seen), Some(disk)) = (&known.seen, scsi::disk(sysfs, &known.dir).await?)
            else {
                continue;
            };
            let (raw_wwid, identity) = scsi::identity(sysfs, known.hctl, &known.dir).await?;
            // What has become of a path that is there is not the late one's fault.
            if let Ok(identity) = identity
                && disk.diskseq == seen.diskseq
                && raw_wwid == seen.wwid
            {
                let (hctl, dir) = (known.hctl, known.dir.clone());
                paths.push(ScsiPath { hctl, dir, disk, raw_wwid, identity });
            }
        }
        Ok(agree(&paths)?)
    }

    /// Removes what a scan brought after nobody waited for it any more, unless it is somebody's by
    /// now; then what was kept for it.
    pub(super) async fn reclaim(&self, job: &Job<T>, way: &T::Way) -> Result<(), Error> {
        let hctl = way.hctl(job.source.lun.scsi());
        {
            let _lun = self.lun_lock(&job.whole).await?;
            let (at, lun) = (job.source.lease(), job.source.lun);
            for user in self.leases.users_with::<T::Made>(at, lun).await? {
                let used = user.paths.iter().any(|p| p.hctl == hctl && p.seen.is_some());
                // A later attach of the same LUN sees to it itself.
                if used || !self.has_volume(&user).await? {
                    return Ok(());
                }
            }
            let dir = way.device_dir(hctl);
            self.remove_path(job, &PathLease { hctl, dir, made: true, seen: None }).await?;
        }
        T::settle(self, &job.source.target, &[way.route()]).await.map(drop)
    }

    /// Removes one path from the host and from the owner's lease.
    async fn drop_path(&self, job: &Job<T>, hctl: scsi::Hctl) -> Result<(), Error> {
        let (at, lun) = (job.source.lease(), job.source.lun);
        let user = self.leases.user::<T::Made>(at, &job.owner, lun).await?;
        let path = user.iter().flat_map(|u| &u.paths).find(|p| p.hctl == hctl);
        if let Some(path) = path.filter(|p| p.made) {
            self.remove_path(job, path).await?;
        }
        let forget = |user: &mut User| user.paths.retain(|p| p.hctl != hctl);
        self.change(&job.owner, &job.source, forget).await.map(drop)
    }

    /// Removes one path, with a map that multipathd made above it alone.
    async fn remove_path(&self, job: &Job<T>, path: &PathLease) -> Result<(), Error> {
        let mut user = job.user();
        user.paths.push(path.clone());
        let options = DetachOptions { force: true, ..DetachOptions::default() };
        let looked = self.look_over(&user, true).await?;
        self.remove_device(&user, looked.above, looked.there, options).await
    }

    /// multipathd takes a late path into the map by itself; where it does not, it is told of it. Nobody is kept from the
    /// volume while that is waited for, so the path may have gone meanwhile, and its name be another's.
    async fn see_joined(&self, job: &Job<T>, path: ScsiPath) -> Result<(), Error> {
        if multipath::joins(&self.doors, &self.settings, &path).await? {
            return Ok(());
        }
        let _lun = self.lun_lock(&job.whole).await?;
        let held = self.held(&job.owner, &job.whole).await?;
        let is_it = |p: &PathLease| {
            p.hctl == path.hctl && p.seen.as_ref().is_some_and(|s| s.diskseq == path.disk.diskseq)
        };
        let disk = scsi::disk(&*self.doors.sysfs, &path.dir).await?;
        if held.is_some_and(|user| user.paths.iter().any(is_it)) && disk == Some(path.disk.clone())
        {
            multipath::nudge(&*self.doors.multipathd, &[path]).await?;
        }
        Ok(())
    }

    /// Makes a late path part of the volume.
    async fn add_path(
        &self,
        job: &Job<T>,
        route: T::Route,
        late: Proven,
    ) -> Result<ScsiPath, Error> {
        let status = late.path.status();
        let note = |user: &mut User| {
            if let Some(found) = &mut user.attachment {
                found.paths.retain(|p| p.hctl != status.hctl);
                found.paths.push(status);
                found.device.paths = u32::try_from(found.paths.len()).unwrap_or(u32::MAX);
            }
        };
        self.change(&job.owner, job.first(), note).await?;
        let hctl = late.path.hctl;
        if T::SCANNED_BY_KERNEL {
            guestlun::mark(&*self.doors.rundir, hctl).await?;
            let block = format!("{}/block/{}", late.path.dir, late.path.disk.name);
            guestlun::look_again(&*self.doors.sysfs, &block).await;
        }
        let routed = |user: &mut User| {
            note_route::<T>(user, &job.source.routes, route);
            if T::SCANNED_BY_KERNEL {
                user.paths.iter_mut().filter(|p| p.hctl == hctl).for_each(|p| p.made = true);
            }
        };
        self.change(&job.owner, &job.source, routed).await?;
        tracing::info!(%route, "a late path joined");
        Ok(late.path)
    }
}
