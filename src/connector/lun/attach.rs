//! The way of an attach: lease, paths, claim, map; each is noted before it is made.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join_all;

use super::Luns;
use super::access::{Access, note_route, ways};
use super::base::describe;
use super::gather::Gathered;
use super::transport::{Job, Transport};
use crate::connector::error::Error;
use crate::connector::identity::Identity;
use crate::connector::lease::{Claim, Made as _, MapLease, User};
use crate::connector::multipath::{self, Above, Map};
use crate::connector::scsi::{self, Opens, ScsiPath};
use crate::connector::{AttachRequest, Attachment, DetachOptions};
use crate::connector::{guestlun, mapchange};
use crate::host::multipathd::MultipathdError;
use crate::reason::Reason;
use crate::spec::MultipathPolicy;
use crate::step::Step;
use crate::types::{DevNum, Outcome, VolumeKey};

impl<T: Transport> Luns<T> {
    /// Attaches a LUN, or finds it attached; what this attach made is undone when it fails.
    pub(super) async fn attach(
        self: &Arc<Self>,
        request: &AttachRequest,
        source: &T::Source,
    ) -> Result<Outcome<Attachment>, Error> {
        let targets = T::targets(source);
        let _lun = self.lun_lock(&targets).await?;
        self.await_walks(&request.owner).await;
        let before = self.held(&request.owner, &targets).await?;
        if let Some(user) = &before
            && let Some(found) = self.still_right(user, &request.expect).await?
        {
            self.heal(request, source, &found).await;
            return Ok(Outcome::Already(found));
        }
        if let Some((target, lun)) = self.other_lun(&request.owner, &targets).await? {
            let device = format!("LUN {lun} of {target}");
            let holder = format!("{}, which must let go of it first", request.owner);
            return Err(Error::DeviceHeld { device, holder });
        }
        // What a guest may have in use is not undone because looking at it again failed.
        let in_use = before.as_ref().is_some_and(|u| u.attachment.is_some());
        let targets = T::routes(self, source, targets).await?;
        let job = self.job(request, source, targets).await?;
        match self.build(&job).await {
            Ok(attachment) => Ok(Outcome::Done(attachment)),
            Err(cause) if in_use => Err(cause),
            Err(cause) => {
                let force = DetachOptions { force: true, ..DetachOptions::default() };
                match self.release(&job.owner, &job.whole, force).await {
                    Ok(_) => Err(cause),
                    Err(undo) => Err(Error::Undo { cause: Box::new(cause), undo: Box::new(undo) }),
                }
            }
        }
    }

    /// The attach proper; each step is in the lease before it is made.
    async fn build(self: &Arc<Self>, job: &Job<T>) -> Result<Attachment, Error> {
        let tracker = &self.doors.tracker;
        tracker.run(Step::Lease, self.intend(job)).await?;
        let gathered = self.gather(&job.parts()).await?;
        let first = &gathered.paths[0];
        tracker.run(Step::Claim, self.claim(job, &first.identity)).await?;
        let map = tracker.run(Step::Map, self.map(job, &gathered)).await?;
        self.refuse_protected(job, &gathered.paths, map.as_ref()).await?;
        self.refuse_holders(job, &gathered.paths, map.as_ref()).await?;
        let attachment = describe(&gathered.paths, map.as_ref());
        self.complete(job, &gathered, &attachment).await?;
        self.claim_late(gathered.late, &attachment);
        Ok(attachment)
    }

    /// Decides between map and single path, once, before anything is made. The job is at the first of
    /// `targets`.
    pub(super) async fn job(
        &self,
        request: &AttachRequest,
        source: &T::Source,
        targets: Vec<Access<T>>,
    ) -> Result<Job<T>, Error> {
        let with = T::with(request, source)?;
        let alive = multipath::alive(&*self.doors.multipathd).await;
        if let Err(silent @ MultipathdError::TimedOut { .. }) = alive {
            // It runs, and would put a map over a path that was given away without one.
            return Err(Error::Multipathd(silent));
        }
        let multipath = match request.multipath {
            MultipathPolicy::Off => false,
            MultipathPolicy::Required => {
                alive.map_err(Error::MultipathUnavailable)?;
                true
            }
            MultipathPolicy::Preferred if ways(&targets) < 2 => false,
            MultipathPolicy::Preferred => {
                if let Err(error) = &alive {
                    tracing::warn!(%error, "no multipath: the volume gets a single path");
                }
                alive.is_ok()
            }
        };
        Ok(Job {
            owner: request.owner.clone(),
            source: targets[0].clone(),
            whole: targets.into(),
            expect: request.expect.clone(),
            policy: request.multipath,
            shareable: request.shareable,
            read_only: request.read_only,
            with,
            multipath,
            called_off: Arc::default(),
        })
    }

    /// Enters the owner into the lease of each target; what an earlier try made stays known.
    async fn intend(&self, job: &Job<T>) -> Result<(), Error> {
        for part in job.parts() {
            let renew = |user: &mut User, intent: User| {
                user.shareable = intent.shareable;
                user.routes = intent.routes;
                user.first = intent.first;
            };
            self.leases.enter::<T::Made>(part.source.lease(), part.user(), renew).await?;
        }
        Ok(())
    }

    /// Claims the LUN's identity for the owner: the same LUN may come by another name.
    async fn claim(&self, job: &Job<T>, identity: &Identity) -> Result<(), Error> {
        let wwid = &identity.wwid;
        let claim = Claim {
            owner: job.owner.clone(),
            transport: <T::Made>::TRANSPORT.into(),
            target: job.first().target.to_string(),
            shareable: job.shareable,
        };
        // In the lease first, so that a detach finds the claim whatever happens in between.
        let note = |user: &mut User| {
            user.step = Some(Step::Claim);
            user.wwid.replace(wwid.clone())
        };
        let before = self.change(&job.owner, job.first(), note).await?.flatten();
        if let Some(other) = before.filter(|w| w != wwid) {
            self.leases.unclaim(&other, &job.owner).await?;
        }
        self.leases.claim(wwid, claim, async |c| self.is_live(&c, wwid).await).await
    }

    /// The map above the paths where there is to be one. With policy `off` a map that multipathd
    /// made by itself is taken off again; with one route and `preferred` it is used: multipathd
    /// would come back to it, and two ways to the same data are one too many.
    async fn map(&self, job: &Job<T>, gathered: &Gathered<T>) -> Result<Option<Map>, Error> {
        let paths = &gathered.paths;
        let note = async |map: &Map| {
            let made = !gathered.had_map;
            let note = |user: &mut User| {
                let known = user.map.as_ref().filter(|m| m.uuid == map.uuid);
                let made = made || known.is_some_and(|m| m.made);
                user.map = Some(MapLease { uuid: map.uuid.clone(), made });
                user.step = Some(Step::Map);
            };
            self.change(&job.owner, job.first(), note).await
        };
        if job.multipath {
            let map = multipath::ensure(&self.doors, &self.settings, paths).await?;
            note(&map).await?;
            return Ok(Some(map));
        }
        match multipath::alive(&*self.doors.multipathd).await {
            Ok(()) => {}
            // It runs, and would come to the path later.
            Err(silent @ MultipathdError::TimedOut { .. }) => {
                return Err(Error::Multipathd(silent));
            }
            Err(_) => return Ok(None),
        }
        multipath::decide(&self.doors, &self.settings, paths).await?;
        match multipath::above(&*self.doors.sysfs, paths).await? {
            Above::Nothing => Ok(None),
            Above::Partial(map) | Above::Whole(map) => {
                note(&map).await?;
                if job.policy == MultipathPolicy::Off {
                    if gathered.had_map && !T::SCANNED_BY_KERNEL {
                        let device = paths[0].disk.name.clone();
                        return Err(Error::DeviceHeld { device, holder: map.name });
                    }
                    multipath::take_off(&self.doors, &self.settings, &map, paths).await?;
                    return Ok(None);
                }
                multipath::ensure(&self.doors, &self.settings, paths).await.map(Some)
            }
        }
    }

    /// What is to be written to may not be write-protected: QEMU would not open it, and say so in words
    /// of its own. Each path was read anew. A map stays write-protected that was made when its paths
    /// were; such a one is reloaded.
    async fn refuse_protected(
        &self,
        job: &Job<T>,
        paths: &[ScsiPath],
        map: Option<&Map>,
    ) -> Result<(), Error> {
        if job.read_only {
            return Ok(());
        }
        let sysfs = &*self.doors.sysfs;
        for path in paths {
            let block = format!("{}/block/{}", path.dir, path.disk.name);
            if scsi::is_protected(sysfs, &block).await? {
                let device = format!("{} ({})", path.hctl, path.disk.name);
                return Err(Error::ReadOnly { device, hint: " by the target" });
            }
        }
        match map {
            Some(map) => mapchange::make_writable(&self.doors, &self.settings, map).await,
            None => Ok(()),
        }
    }

    /// Nobody but our own map may hold a path, and nobody at all the device that is given away. A
    /// guest may have it open where it is shared, or was attached before; nothing may be stacked
    /// on it even then.
    async fn refuse_holders(
        &self,
        job: &Job<T>,
        paths: &[ScsiPath],
        map: Option<&Map>,
    ) -> Result<(), Error> {
        let held = self.held(&job.owner, &job.whole).await?;
        let attached = held.is_some_and(|u| u.attachment.is_some());
        let wwid = &paths[0].identity.wwid;
        let in_use = attached || !self.sharers(&job.owner, Some(wwid)).await?.is_empty();
        let ours: Vec<String> = map.iter().map(|m| m.kernel.clone()).collect();
        let mut all = Vec::new();
        for path in paths {
            let block = format!("{}/block/{}", path.dir, path.disk.name);
            let name = format!("{} ({})", path.disk.name, path.hctl);
            all.push((name, block, path.disk.dev, &ours[..]));
        }
        all.extend(map.map(|map| (map.name.clone(), map.dir(), map.dev, &[][..])));
        let devs: Vec<DevNum> = all.iter().map(|(_, _, dev, _)| *dev).collect();
        let unopened = match in_use {
            true => BTreeSet::new(),
            false => scsi::unopened(&self.doors, &devs).await,
        };
        let holder = async |block: &str, dev, ours: &[String]| {
            if in_use {
                return scsi::stacked(&*self.doors.sysfs, block, ours).await;
            }
            let opens = if unopened.contains(&dev) { Opens::None } else { Opens::Unknown };
            scsi::await_free(&self.doors, &self.settings, block, dev, ours, opens).await
        };
        let holders = all.iter().map(|(_, block, dev, ours)| holder(block, *dev, ours));
        let holders = join_all(holders).await;
        for ((device, ..), holder) in all.into_iter().zip(holders) {
            if let Some(holder) = holder? {
                return Err(Error::DeviceHeld { device, holder });
            }
        }
        Ok(())
    }

    /// Writes down that it is attached; a single path needs no other route any more.
    async fn complete(
        &self,
        job: &Job<T>,
        gathered: &Gathered<T>,
        found: &Attachment,
    ) -> Result<(), Error> {
        // The first last: it says that all is done.
        for part in job.parts().into_iter().rev() {
            let is_first = part.source == *job.first();
            let mine = gathered.used.iter().filter(|(key, _)| *key == part.source.key());
            let used: Vec<T::Route> = mine.map(|(_, route)| *route).collect();
            if T::SCANNED_BY_KERNEL {
                self.mark(&job.owner, &part.source).await?;
            }
            let note = |user: &mut User| {
                if T::SCANNED_BY_KERNEL {
                    user.adopt();
                }
                user.attachment = is_first.then(|| found.clone());
                user.step = Some(Step::Remember);
                if !job.multipath {
                    user.routes = used.iter().map(ToString::to_string).collect();
                } else {
                    let routes = &part.source.routes;
                    used.iter().for_each(|came| note_route::<T>(user, routes, *came));
                }
            };
            self.change(&job.owner, &part.source, note).await?;
        }
        if !job.multipath {
            for at in job.whole.iter() {
                match T::settle(self, &at.target, &at.routes).await {
                    // What was tried and is not needed stays until the volume goes.
                    Err(error) if error.reason() == Reason::IscsidUnavailable => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "not tidied up");
                    }
                    settled => drop(settled?),
                }
            }
        }
        Ok(())
    }

    /// Tells udev that the paths at a target are guests', and has it look again at those that were there
    /// before.
    async fn mark(&self, owner: &VolumeKey, at: &Access<T>) -> Result<(), Error> {
        let user = self.leases.user::<T::Made>(at.lease(), owner, at.lun).await?;
        for path in user.iter().flat_map(|user| &user.paths) {
            guestlun::mark(&*self.doors.rundir, path.hctl).await?;
            if let Some(seen) = path.seen.as_ref().filter(|_| !path.made) {
                let block = format!("{}/block/{}", path.dir, seen.name);
                guestlun::look_again(&*self.doors.sysfs, &block).await;
            }
        }
        Ok(())
    }
}
