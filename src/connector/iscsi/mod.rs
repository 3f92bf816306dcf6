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
//!
//! A LUN may be had at several targets. Each has its lease, records and sessions; the paths of all of them
//! are one volume's: they are gathered side by side, proven to be the same, and one map is above them.
//! The LUN's locks are taken at all targets, in the order of their names; a detach takes the device
//! away first, then leaves one target after the other, the first of them last.

mod access;
mod attach;
mod base;
mod chap;
mod detach;
mod discover;
mod expand;
mod gather;
mod held;
mod ifaces;
mod late;
mod login;
mod noderecords;
mod observe;
mod records;
mod release;
mod scan;
mod session;
mod settle;
#[cfg(test)]
mod tests;
mod verdict;
mod whole;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio::sync::{broadcast, watch};
use tracing::Instrument;

use access::Access;
pub use verdict::LoginError;

use super::bounded::bounded;
use super::error::Error;
use super::lease::{Lease, Leases, User};
use super::multipath::{self};
use super::settings::{Settings, ms};
use super::touched::{self, Touched};
use super::{
    AttachRequest, Attachment, Authentication, Connector, DetachOptions, Discovered, Expect,
    Health, Measured, health,
};
use crate::host::storage::StorageDoors;
use crate::spec::{MultipathPolicy, Source};
use crate::step::Step;
use crate::types::{Chap, Iface, Nexus, Outcome, Portal, VolumeKey, Wwid};
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

/// What one attach is about, at one of the targets.
#[derive(Debug, Clone)]
struct Job {
    owner: VolumeKey,
    source: Access,
    /// All targets, this one among them.
    whole: Arc<[Access]>,
    expect: Expect,
    policy: MultipathPolicy,
    shareable: bool,
    read_only: bool,
    chap: Option<Chap>,
    /// What makes the sessions' iface record.
    iface: Iface,
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
            first: (self.source.key() != self.first().key())
                .then(|| self.first().nexus.to_string()),
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
        self.inner.sweep_discoveries().await;
        let mut left: Vec<(Nexus, Vec<Portal>)> = Vec::new();
        for lease in self.inner.leases.all::<Made>().await? {
            let Ok(target) = lease.target.parse() else { continue };
            left.push((target, lease.made.portals().into_iter().collect()));
        }
        let marked = session::marked(&*self.inner.doors.sysfs).await?;
        left.extend(marked.into_iter().map(|(target, portal)| (target, vec![portal])));
        for (target, portals) in left {
            // One target's trouble must not keep what is left at the others.
            if let Err(error) = self.inner.settle(&target, &portals).await {
                let why = super::error::chain(&error);
                tracing::error!(%target, why, "what was left behind could not be swept");
            }
        }
        self.inner.sweep_ifaces().await;
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
            let targets = Access::of(source);
            let _lun = self.inner.lun_lock(&targets).await?;
            self.inner.await_walks(owner).await;
            self.inner.release(owner, &targets, options).await
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
        match self.inner.held(owner, &Access::of(source)).await? {
            Some(user) => self.inner.observe(&user).await,
            None => Ok(None),
        }
    }

    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>> {
        let mut leases: HashMap<Nexus, Lease<Made>> = HashMap::new();
        let mut checked = None;
        let mut found = Vec::with_capacity(volumes.len());
        for (owner, source) in volumes {
            let Source::Iscsi(source) = source;
            let user = match self.inner.held_now(owner, &Access::of(source), &mut leases).await {
                Ok(user) => user,
                Err(error) => {
                    found.push(Err(error));
                    continue;
                }
            };
            let Some(user) = user else {
                found.push(Ok(Health::Differs("nothing is attached in its name".into())));
                continue;
            };
            if user.map.is_some() && checked.is_none() {
                checked = Some(health::checked(&*self.inner.doors.multipathd).await);
            }
            found.push(self.inner.inspect(&user, checked.as_ref()).await);
        }
        found
    }

    async fn measure(
        &self,
        owner: &VolumeKey,
        source: &Source,
        expected: Option<u64>,
    ) -> Result<Measured, Error> {
        let Source::Iscsi(source) = source;
        self.inner.measure(owner, source, expected).await
    }

    async fn grow(
        &self,
        owner: &VolumeKey,
        source: &Source,
        size: u64,
    ) -> Result<Outcome<Attachment>, Error> {
        let Source::Iscsi(source) = source;
        self.inner.grow(owner, source, size).await
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

    async fn discover(
        &self,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error> {
        let span = tracing::info_span!("discover", %portal);
        self.inner.discover(portal, authentication).instrument(span).await
    }

    async fn owners(&self) -> Result<Vec<VolumeKey>, Error> {
        let leases = self.inner.leases.all::<Made>().await?;
        let owners: BTreeSet<_> =
            leases.into_iter().flat_map(|l| l.users).map(|u| u.owner).collect();
        Ok(owners.into_iter().collect())
    }
}
