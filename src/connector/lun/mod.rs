//! From a LUN's address to one verified block device, and back: what is the same whatever the transport.
//!
//! ```text
//! attach:  lease (intent) -> routes made usable, side by side -> first way
//!            -> scan C:T:LUN -> read anew, prove -> claim the WWID -> map -> nobody else holds it
//!            -> lease (attached)
//!          a route that comes late: the same in the background, into the map
//! fails:   everything that this attach made is undone, the way of a detach
//! detach:  nobody holds it -> flush -> map -> paths -> claim -> lease -> the transport lets go
//! ```
//!
//! A [`transport`] says which ways lead to a LUN's targets, makes them, waits for them and lets go of them.
//!
//! A LUN has a lock of its own, held for the whole of an attach or detach.
//!
//! A LUN may be had at several targets. Each has its lease and routes; the paths of all of them are one
//! volume's: they are gathered side by side, proven to be the same, and one map is above them. The LUN's
//! locks are taken at all targets, in the order of their names; a detach takes the device away first, then
//! leaves one target after the other, the first of them last.

mod access;
mod attach;
mod base;
mod detach;
mod expand;
mod flush;
mod gather;
mod held;
mod late;
mod observe;
mod release;
mod scan;
mod transport;
mod whole;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use tokio::sync::{broadcast, watch};
use tracing::Instrument;

pub(crate) use access::Access;
pub(crate) use transport::{Job, Transport, Way};

use super::bounded::bounded;
use super::error::Error;
use super::lease::{Leases, Made as _};
use super::multipath;
use super::settings::{Settings, ms};
use super::touched::{self, Touched};
use super::{
    AttachRequest, Attachment, Authentication, Connector, DetachOptions, Discovered, Health,
    Measured,
};
use crate::host::storage::StorageDoors;
use crate::spec::Source;
use crate::types::{Outcome, Portal, VolumeKey, Wwid};

/// Whose paths are being looked for, once for each path, and what calls that off.
type Walks = Vec<(VolumeKey, Arc<AtomicBool>)>;

/// The LUNs of one transport.
pub(crate) struct Luns<T: Transport> {
    pub(crate) doors: StorageDoors,
    pub(crate) settings: Settings,
    pub(crate) leases: Leases,
    /// What the transport keeps in memory.
    pub(crate) state: T::State,
    /// Who is told of changes; from when somebody asked for the first time.
    listeners: OnceLock<broadcast::Sender<Arc<Touched>>>,
    /// How many background tasks run.
    running: watch::Sender<usize>,
    walking: watch::Sender<Walks>,
}

impl<T: Transport> Luns<T> {
    /// Over these doors.
    pub(crate) fn new(doors: StorageDoors, settings: Settings) -> Self {
        let doors = bounded(doors, &settings);
        let leases = Leases::new(doors.clone(), ms(settings.lock_ms));
        Self {
            doors,
            settings,
            leases,
            state: T::State::default(),
            listeners: OnceLock::new(),
            running: watch::Sender::new(0),
            walking: watch::Sender::new(Vec::new()),
        }
    }

    /// Returns when nothing goes on in the background: no login, no late path.
    pub(crate) async fn settled(&self) {
        let mut running = self.running.subscribe();
        // The sender is ours, so this ends only by the condition.
        let _ = running.wait_for(|n| *n == 0).await;
    }

    /// See [`Connector::forget`].
    pub(crate) async fn forget(&self, wwid: &Wwid) -> Result<(), Error> {
        let Some(_nobody_has_it) = self.leases.unclaimed(wwid).await? else { return Ok(()) };
        multipath::forget_unused(&self.doors, wwid).await
    }

    /// See [`Connector::changes`].
    pub(crate) fn changes(&self) -> broadcast::Receiver<Arc<Touched>> {
        let listeners = self.listeners.get_or_init(|| {
            let listeners = touched::channel();
            tokio::spawn(touched::tell(self.doors.uevents.clone(), listeners.clone()));
            listeners
        });
        listeners.subscribe()
    }
}

/// The source as this transport's; whoever chooses a connector by the source's kind gives it no other.
fn of<T: Transport>(source: &Source) -> Result<&T::Source, Error> {
    let transport = T::Made::TRANSPORT;
    T::source(source).ok_or_else(|| Error::OtherTransport { transport, source_key: source.key() })
}

#[async_trait]
impl<T: Transport> Connector for Arc<Luns<T>> {
    async fn attach(&self, request: &AttachRequest) -> Result<Outcome<Attachment>, Error> {
        let source = of::<T>(&request.source)?;
        let first = &T::targets(source)[0];
        let span = tracing::info_span!("attach", owner = %request.owner, target = %first.target, lun = %first.lun);
        Luns::attach(self, request, source).instrument(span).await
    }

    async fn detach(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        let targets = T::targets(of::<T>(source)?);
        let first = &targets[0];
        let span = tracing::info_span!("detach", %owner, target = %first.target, lun = %first.lun);
        let locked = async |options| {
            let _lun = self.lun_lock(&targets).await?;
            self.await_walks(owner).await;
            self.release(owner, &targets, options).await
        };
        async {
            match locked(options).await {
                // Others need not wait for that.
                Err(Error::NotReleased) => {
                    options.released().await?;
                    locked(DetachOptions { released: None, ..options }).await
                }
                ended => ended,
            }
        }
        .instrument(span)
        .await
    }

    async fn forget(&self, _: &Source, wwid: &Wwid) -> Result<(), Error> {
        Luns::forget(self, wwid).await
    }

    async fn observe(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<Option<Attachment>, Error> {
        match self.held(owner, &T::targets(of::<T>(source)?)).await? {
            Some(user) => Luns::observe(self, &user).await,
            None => Ok(None),
        }
    }

    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>> {
        let Some((owner, _)) = volumes.first() else { return Vec::new() };
        self.inspect_each(&owner.vm, self.held_each(volumes).await).await
    }

    async fn measure(
        &self,
        owner: &VolumeKey,
        source: &Source,
        expected: Option<u64>,
    ) -> Result<Measured, Error> {
        Luns::measure(self, owner, of::<T>(source)?, expected).await
    }

    async fn grow(
        &self,
        owner: &VolumeKey,
        source: &Source,
        size: u64,
    ) -> Result<Outcome<Attachment>, Error> {
        Luns::grow(self, owner, of::<T>(source)?, size).await
    }

    fn changes(&self) -> broadcast::Receiver<Arc<Touched>> {
        Luns::changes(self)
    }

    async fn discover(
        &self,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error> {
        let span = tracing::info_span!("discover", %portal);
        T::discover(self, portal, authentication).instrument(span).await
    }

    async fn owners(&self) -> Result<Vec<VolumeKey>, Error> {
        let owners: BTreeSet<_> = self.leases.owners::<T::Made>().await?.into_iter().collect();
        Ok(owners.into_iter().collect())
    }
}
