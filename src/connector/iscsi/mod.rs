//! iSCSI: from target, portals and LUN to one verified block device, and back.
//!
//! ```text
//! attach:  lease (intent) -> records -> logins, side by side -> first session
//!            -> scan 0:T:LUN -> read anew, prove -> claim the WWID -> map -> nobody else holds it
//!            -> lease (attached)
//!          a portal that comes late: the same in the background, into the map
//! fails:   everything that this attach made is undone, the way of a detach
//! detach:  nobody holds it -> flush -> map -> paths -> claim -> lease -> sessions, records
//! ```
//!
//! A LUN has a lock of its own, held for the whole of an attach or detach. The target's lock is
//! held only while records are written or a logout is made, never while something is waited for.

mod base;
mod detach;
mod gather;
mod held;
mod late;
mod login;
mod observe;
mod records;
mod scan;
mod session;
mod settle;
#[cfg(test)]
mod tests;
mod verdict;

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio::sync::{broadcast, watch};
use tracing::Instrument;

pub use verdict::LoginError;

use super::bounded::bounded;
use super::error::Error;
use super::identity::Identity;
use super::lease::{Claim, Lease, Leases, Made as _, MapLease, User};
use super::multipath::{self, Above, Map};
use super::scsi::{self, ScsiPath};
use super::settings::{Settings, ms};
use super::touched::{self, Touched};
use super::{AttachRequest, Attachment, Connector, DetachOptions, Expect, Health, health};
use crate::host::multipathd::MultipathdError;
use crate::host::storage::StorageDoors;
use crate::spec::{IscsiSource, MultipathPolicy, Source};
use crate::step::Step;
use crate::types::{Iqn, Outcome, Portal, VolumeKey, Wwid};
use base::describe;
use gather::Gathered;
use login::Logins;
pub(super) use login::Made;

/// Attaches and detaches iSCSI LUNs. Clones share everything.
#[derive(Clone)]
pub struct IscsiConnector {
    inner: Arc<Inner>,
}

struct Inner {
    doors: StorageDoors,
    settings: Settings,
    leases: Leases,
    logins: Logins,
    /// Who is told of changes; from when somebody asked for the first time.
    listeners: OnceLock<broadcast::Sender<Arc<Touched>>>,
    /// How many background tasks run.
    running: watch::Sender<usize>,
    /// Whose paths are being looked for, once for each path, and what calls that off.
    walking: watch::Sender<Vec<(VolumeKey, Arc<AtomicBool>)>>,
}

/// What one attach is about.
#[derive(Debug, Clone)]
struct Job {
    owner: VolumeKey,
    source: IscsiSource,
    expect: Expect,
    policy: MultipathPolicy,
    shareable: bool,
    /// All portals, for a map; otherwise the first that answers.
    multipath: bool,
    /// It is wanted no more: no scan is to begin.
    called_off: Arc<AtomicBool>,
}

impl Job {
    /// The owner's entry in the lease, before anything was made.
    fn user(&self) -> User {
        User {
            owner: self.owner.clone(),
            lun: self.source.lun,
            shareable: self.shareable,
            routes: self.source.portals.iter().map(Portal::to_string).collect(),
            wwid: None,
            paths: Vec::new(),
            map: None,
            attachment: None,
            step: Some(Step::Lease),
        }
    }
}

impl IscsiConnector {
    /// A connector over these doors.
    pub fn new(doors: StorageDoors, settings: Settings) -> Self {
        let doors = bounded(doors, &settings);
        let leases = Leases::new(doors.clone(), ms(settings.lock_ms));
        let (running, walking) = (watch::Sender::new(0), watch::Sender::new(Vec::new()));
        let (logins, listeners) = (Logins::default(), OnceLock::new());
        let inner = Inner { doors, settings, leases, logins, listeners, running, walking };
        Self { inner: Arc::new(inner) }
    }

    /// Undoes what no volume wants: sessions and records that a killed daemon's login left. For the
    /// start, and harmless at any time.
    pub async fn sweep(&self) -> Result<(), Error> {
        for lease in self.inner.leases.all::<Made>().await? {
            let Ok(target) = lease.target.parse::<Iqn>() else { continue };
            let portals: Vec<Portal> = lease.made.portals().into_iter().collect();
            // One target's trouble must not keep what is left at the others.
            if let Err(error) = self.inner.settle(&target, &portals).await {
                let why = super::error::chain(&error);
                tracing::error!(%target, why, "what was left behind could not be swept");
            }
        }
        for (target, portal) in session::marked(&*self.inner.doors.sysfs).await? {
            self.inner.settle(&target, &[portal]).await?;
        }
        Ok(())
    }

    /// What is known to be wrong with the iscsiadm that is installed, in words.
    pub async fn tool_fault(&self) -> Option<String> {
        records::tool_fault(&self.inner.doors, &self.inner.settings).await
    }

    /// Returns when nothing goes on in the background: no login, no late path.
    pub async fn settled(&self) {
        let mut running = self.inner.running.subscribe();
        // The sender is ours, so this ends only by the condition.
        let _ = running.wait_for(|n| *n == 0).await;
    }
}

#[async_trait]
impl Connector for IscsiConnector {
    async fn attach(&self, request: &AttachRequest) -> Result<Outcome<Attachment>, Error> {
        let Source::Iscsi(source) = &request.source;
        let span = tracing::info_span!("attach", owner = %request.owner, target = %source.target, lun = %source.lun);
        self.inner.attach(request, source).instrument(span).await
    }

    async fn detach(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        let Source::Iscsi(source) = source;
        let span =
            tracing::info_span!("detach", %owner, target = %source.target, lun = %source.lun);
        async {
            let _lun = self.inner.lun_lock(source).await?;
            self.inner.await_walks(owner).await;
            self.inner.release(owner, source, options).await
        }
        .instrument(span)
        .await
    }

    async fn forget(&self, wwid: &Wwid) -> Result<(), Error> {
        let Some(_nobody_has_it) = self.inner.leases.unclaimed(wwid).await? else { return Ok(()) };
        multipath::forget_unused(&self.inner.doors, wwid).await
    }

    async fn observe(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<Option<Attachment>, Error> {
        let Source::Iscsi(source) = source;
        let lease: Lease<Made> = self.inner.leases.load(source.target.as_str()).await?;
        match lease.user(owner) {
            Some(user) if user.lun == source.lun => self.inner.observe(user).await,
            _ => Ok(None),
        }
    }

    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>> {
        let mut leases: HashMap<&Iqn, Lease<Made>> = HashMap::new();
        let mut checked = None;
        let mut found = Vec::with_capacity(volumes.len());
        for (owner, source) in volumes {
            let Source::Iscsi(source) = source;
            if !leases.contains_key(&source.target) {
                match self.inner.leases.load(source.target.as_str()).await {
                    Ok(lease) => drop(leases.insert(&source.target, lease)),
                    Err(error) => {
                        found.push(Err(error));
                        continue;
                    }
                }
            }
            let user = leases[&source.target].user(owner).filter(|u| u.lun == source.lun);
            let Some(user) = user else {
                found.push(Ok(Health::Differs("nothing is attached in its name".into())));
                continue;
            };
            if user.map.is_some() && checked.is_none() {
                checked = Some(health::checked(&*self.inner.doors.multipathd).await);
            }
            found.push(self.inner.inspect(user, checked.as_ref()).await);
        }
        found
    }

    fn changes(&self) -> broadcast::Receiver<Arc<Touched>> {
        let inner = &self.inner;
        let listeners = inner.listeners.get_or_init(|| {
            let listeners = touched::channel();
            tokio::spawn(touched::tell(inner.doors.uevents.clone(), listeners.clone()));
            listeners
        });
        listeners.subscribe()
    }

    async fn owners(&self) -> Result<Vec<VolumeKey>, Error> {
        let leases = self.inner.leases.all::<Made>().await?;
        Ok(leases.into_iter().flat_map(|l| l.users).map(|u| u.owner).collect())
    }
}

impl Inner {
    async fn attach(
        self: &Arc<Self>,
        request: &AttachRequest,
        source: &IscsiSource,
    ) -> Result<Outcome<Attachment>, Error> {
        let _lun = self.lun_lock(source).await?;
        self.await_walks(&request.owner).await;
        let lease: Lease<Made> = self.leases.load(source.target.as_str()).await?;
        let before = lease.user(&request.owner).cloned();
        if let Some(user) = &before
            && user.lun == source.lun
            && let Some(found) = self.still_right(user, &request.expect).await?
        {
            self.heal(request, source, &found).await;
            return Ok(Outcome::Already(found));
        }
        if let Some(user) = before.as_ref().filter(|u| u.lun != source.lun) {
            let device = format!("LUN {} of {}", user.lun, source.target);
            let holder = format!("{}, which must let go of it first", user.owner);
            return Err(Error::DeviceHeld { device, holder });
        }
        // What a guest may have in use is not undone because looking at it again failed.
        let in_use = before.as_ref().is_some_and(|u| u.attachment.is_some());
        let job = self.job(request, source).await?;
        match self.build(&job).await {
            Ok(attachment) => Ok(Outcome::Done(attachment)),
            Err(cause) if in_use => Err(cause),
            Err(cause) => {
                let force = DetachOptions { force: true, ..DetachOptions::default() };
                match self.release(&job.owner, source, force).await {
                    Ok(_) => Err(cause),
                    Err(undo) => Err(Error::Undo { cause: Box::new(cause), undo: Box::new(undo) }),
                }
            }
        }
    }

    /// The attach proper; each step is in the lease before it is made.
    async fn build(self: &Arc<Self>, job: &Job) -> Result<Attachment, Error> {
        let tracker = &self.doors.tracker;
        tracker.run(Step::Lease, self.intend(job)).await?;
        let gathered = self.gather(job).await?;
        let first = &gathered.paths[0];
        tracker.run(Step::Claim, self.claim(job, &first.identity)).await?;
        let map = tracker.run(Step::Map, self.map(job, &gathered)).await?;
        self.refuse_holders(job, &gathered.paths, map.as_ref()).await?;
        let attachment = describe(&gathered.paths, map.as_ref());
        self.complete(job, &gathered, &attachment).await?;
        self.claim_late(job, gathered.late, &attachment);
        Ok(attachment)
    }

    /// Decides between map and single path, once, before anything is made.
    async fn job(&self, request: &AttachRequest, source: &IscsiSource) -> Result<Job, Error> {
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
            MultipathPolicy::Preferred if source.portals.len() < 2 => false,
            MultipathPolicy::Preferred => {
                if let Err(error) = &alive {
                    tracing::warn!(%error, "no multipath: the volume gets a single path");
                }
                alive.is_ok()
            }
        };
        Ok(Job {
            owner: request.owner.clone(),
            source: source.clone(),
            expect: request.expect.clone(),
            policy: request.multipath,
            shareable: request.shareable,
            multipath,
            called_off: Arc::default(),
        })
    }

    /// Enters the owner into the lease; what an earlier try made stays known.
    async fn intend(&self, job: &Job) -> Result<(), Error> {
        self.leases
            .update::<Made, _>(job.source.target.as_str(), |lease| {
                match lease.user_mut(&job.owner) {
                    Some(user) => {
                        user.shareable = job.shareable;
                        user.routes = job.user().routes;
                    }
                    None => lease.users.push(job.user()),
                }
            })
            .await
    }

    /// Claims the LUN's identity for the owner: the same LUN may come by another name.
    async fn claim(&self, job: &Job, identity: &Identity) -> Result<(), Error> {
        let wwid = &identity.wwid;
        let claim = Claim {
            owner: job.owner.clone(),
            transport: Made::TRANSPORT.into(),
            target: job.source.target.to_string(),
            shareable: job.shareable,
        };
        let is_live = async |c: Claim| -> Result<bool, Error> {
            // Only this transport's leases can be read here; others' claims count as they are.
            if c.transport != Made::TRANSPORT {
                return Ok(true);
            }
            let lease: Lease<Made> = self.leases.load(&c.target).await?;
            Ok(lease.user(&c.owner).is_some_and(|u| u.wwid.as_ref().is_none_or(|w| w == wwid)))
        };
        // In the lease first, so that a detach finds the claim whatever happens in between.
        let before = self
            .leases
            .update::<Made, _>(job.source.target.as_str(), |lease| {
                let user = lease.user_mut(&job.owner)?;
                user.step = Some(Step::Claim);
                user.wwid.replace(wwid.clone())
            })
            .await?;
        if let Some(other) = before.filter(|w| w != wwid) {
            self.leases.unclaim(&other, &job.owner).await?;
        }
        self.leases.claim(wwid, claim, is_live).await
    }

    /// The map above the paths where there is to be one. With policy `off` a map that multipathd
    /// made by itself is taken off again; with one portal and `preferred` it is used: multipathd
    /// would come back to it, and two ways to the same data are one too many.
    async fn map(&self, job: &Job, gathered: &Gathered) -> Result<Option<Map>, Error> {
        let paths = &gathered.paths;
        let note = async |map: &Map| {
            let made = !gathered.had_map;
            self.leases
                .update::<Made, _>(job.source.target.as_str(), |lease| {
                    if let Some(user) = lease.user_mut(&job.owner) {
                        let made = made || user.map.as_ref().is_some_and(|m| m.made);
                        user.map = Some(MapLease { uuid: map.uuid.clone(), made });
                        user.step = Some(Step::Map);
                    }
                })
                .await
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
                    if gathered.had_map {
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

    /// Nobody but our own map may hold a path, and nobody at all the device that is given away. A
    /// guest may have it open where it is shared, or was attached before; nothing may be stacked
    /// on it even then.
    async fn refuse_holders(
        &self,
        job: &Job,
        paths: &[ScsiPath],
        map: Option<&Map>,
    ) -> Result<(), Error> {
        let lease: Lease<Made> = self.leases.load(job.source.target.as_str()).await?;
        let attached = lease.user(&job.owner).is_some_and(|u| u.attachment.is_some());
        let in_use = attached || lease.other(&job.owner, job.source.lun).is_some();
        let holder = async |block: &str, dev, ours: &[String]| {
            if in_use {
                scsi::stacked(&*self.doors.sysfs, block, ours).await
            } else {
                scsi::await_unheld(&self.doors, &self.settings, block, dev, ours).await
            }
        };
        let ours: Vec<String> = map.iter().map(|m| m.kernel.clone()).collect();
        for path in paths {
            let block = format!("{}/block/{}", path.dir, path.disk.name);
            if let Some(holder) = holder(&block, path.disk.dev, &ours).await? {
                let device = format!("{} ({})", path.disk.name, path.hctl);
                return Err(Error::DeviceHeld { device, holder });
            }
        }
        if let Some(map) = map
            && let Some(holder) = holder(&map.dir(), map.dev, &[]).await?
        {
            return Err(Error::DeviceHeld { device: map.name.clone(), holder });
        }
        Ok(())
    }

    /// Writes down that it is attached; a single path needs no other portal any more.
    async fn complete(
        &self,
        job: &Job,
        gathered: &Gathered,
        found: &Attachment,
    ) -> Result<(), Error> {
        let used: Vec<String> = gathered.used.iter().map(Portal::to_string).collect();
        self.leases
            .update::<Made, _>(job.source.target.as_str(), |lease| {
                if let Some(user) = lease.user_mut(&job.owner) {
                    user.attachment = Some(found.clone());
                    user.step = Some(Step::Remember);
                    if !job.multipath {
                        user.routes = used;
                    }
                }
            })
            .await?;
        if !job.multipath {
            self.settle(&job.source.target, &job.source.portals).await?;
        }
        Ok(())
    }
}
