//! What a transport supplies: who reaches a LUN now, how it is made reachable, and how it is let go of.

use std::collections::HashMap;
use std::fmt::{Debug, Display};
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;

use super::Luns;
use super::access::Access;
use crate::connector::error::Error;
use crate::connector::lease::{self, User};
use crate::connector::scsi::Hctl;
use crate::connector::{AttachRequest, Authentication, Discovered, Expect};
use crate::spec::{MultipathPolicy, Source};
use crate::step::Step;
use crate::types::{Portal, VolumeKey};

/// One kind of SAN. Everything from the scan of a LUN upwards is the same for all of them.
#[async_trait]
pub(crate) trait Transport: Debug + Clone + PartialEq + Eq + Send + Sync + 'static {
    /// A LUN as it is asked for.
    type Source: Sync;
    /// What leases are of, by the name that it is written as.
    type Target: Clone + Debug + Display + AsRef<str> + Eq + Hash + Send + Sync;
    /// One route to a target, which may bring one path: as it is asked for, and written.
    type Route: Copy + Debug + Display + Eq + Hash + Ord + Send + Sync + 'static;
    /// What a route has become on this host, once it is up.
    type Way: Way<Self>;
    /// What a job has of this transport alone.
    type With: Clone + Debug + Send + Sync;
    /// That a route is being made usable.
    type Begun: Clone + Send + Sync;
    /// Why a route did not come up.
    type Refused: Send + Sync;
    /// What leases keep of what was made.
    type Made: lease::Made;
    /// What the connector keeps in memory.
    type State: Default + Send + Sync;

    /// The kernel scans by itself what comes to be reachable. What it has made so, and multipathd above it,
    /// is used as it is, and belongs to the volume from when that is attached: a detach takes it away. Until
    /// then it is left alone.
    const SCANNED_BY_KERNEL: bool = false;

    /// The source, where it is of this transport.
    fn source(source: &Source) -> Option<&Self::Source>;

    /// The targets of a source, in their order: at least one. Whatever the node has.
    fn targets(source: &Self::Source) -> Vec<Access<Self>>;

    /// What LUNs of a target are locked by.
    fn lock_name(target: &Self::Target) -> &str;

    /// What a job has of a request.
    fn with(request: &AttachRequest, source: &Self::Source) -> Result<Self::With, Error>;

    /// The routes that the node has, or may come to have, to the targets; at least one in all.
    async fn routes(
        luns: &Luns<Self>,
        source: &Self::Source,
        targets: Vec<Access<Self>>,
    ) -> Result<Vec<Access<Self>>, Error>;

    /// The ways to the job's target that are on the host, up or not.
    async fn ways(luns: &Luns<Self>, job: &Job<Self>) -> Result<Vec<Self::Way>, Error>;

    /// Sees to it that each of the routes comes up, as far as the host can. Short: what takes its time goes
    /// on in the background.
    async fn reach(
        luns: &Arc<Luns<Self>>,
        job: &Job<Self>,
        routes: &[Self::Route],
    ) -> Result<HashMap<Self::Route, Self::Begun>, Error>;

    /// Waits until a route is up, as long as one that is just coming may take.
    async fn await_way(
        luns: &Arc<Luns<Self>>,
        job: &Job<Self>,
        route: Self::Route,
        begun: Option<Self::Begun>,
    ) -> Result<Self::Way, Self::Refused>;

    /// Whether a route that came up is what was asked for.
    fn covers(asked: Self::Route, came: Self::Route) -> bool {
        asked == came
    }

    /// No route came up: the error that says most. `refused` has the numbers of the parts.
    async fn unreached(
        luns: &Luns<Self>,
        parts: &[Job<Self>],
        refused: Vec<(usize, Self::Refused)>,
    ) -> Error;

    /// Whether the job may use a way that is there.
    async fn admit(luns: &Luns<Self>, job: &Job<Self>, way: &Self::Way) -> Result<(), Error>;

    /// Whether nobody but us scans by that way, so that what is behind it is ours or left by us.
    fn is_ours(made: &Self::Made, target: &Self::Target, way: &Self::Way) -> bool;

    /// Undoes what was made for those of `routes` that no user of the target wants; whether there was
    /// something.
    async fn settle(
        luns: &Luns<Self>,
        target: &Self::Target,
        routes: &[Self::Route],
    ) -> Result<bool, Error>;

    /// Undoes what was made at a target, also by an earlier boot, and that no user of it wants.
    async fn leave(luns: &Luns<Self>, at: &Access<Self>) -> Result<bool, Error>;

    /// See [`Connector::discover`](crate::connector::Connector::discover).
    async fn discover(
        luns: &Arc<Luns<Self>>,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error>;
}

/// A route that has come to be on this host.
pub(crate) trait Way<T: Transport>: Clone + Send + Sync + 'static {
    /// The route.
    fn route(&self) -> T::Route;

    /// Where a LUN of it is, or would be.
    fn hctl(&self, lun: u64) -> Hctl;

    /// Directory below /sys of the SCSI device at `hctl`.
    fn device_dir(&self, hctl: Hctl) -> String;

    /// Whether LUNs can be had by it now.
    fn is_up(&self) -> bool;
}

/// What one attach is about, at one of the targets.
#[derive(Debug, Clone)]
pub(crate) struct Job<T: Transport> {
    pub(crate) owner: VolumeKey,
    pub(crate) source: Access<T>,
    /// All targets, this one among them.
    pub(crate) whole: Arc<[Access<T>]>,
    pub(crate) expect: Expect,
    pub(crate) policy: MultipathPolicy,
    pub(crate) shareable: bool,
    pub(crate) read_only: bool,
    /// What matters to the transport alone.
    pub(crate) with: T::With,
    /// All routes, for a map; otherwise the first that is up.
    pub(crate) multipath: bool,
    /// It is wanted no more: no scan is to begin.
    pub(crate) called_off: Arc<AtomicBool>,
}

impl<T: Transport> Job<T> {
    /// The owner's entry in the lease, before anything was made.
    pub(super) fn user(&self) -> User {
        User {
            owner: self.owner.clone(),
            lun: self.source.lun,
            shareable: self.shareable,
            routes: self.source.routes.iter().map(ToString::to_string).collect(),
            wwid: None,
            paths: Vec::new(),
            map: None,
            attachment: None,
            first: (self.source.key() != self.first().key())
                .then(|| self.first().target.to_string()),
            step: Some(Step::Lease),
        }
    }

    /// The target whose lease has what is of the whole.
    pub(super) fn first(&self) -> &Access<T> {
        &self.whole[0]
    }

    /// The same for each of the volume's targets.
    pub(super) fn parts(&self) -> Vec<Self> {
        let part = |target: &Access<T>| Self { source: target.clone(), ..self.clone() };
        self.whole.iter().map(part).collect()
    }
}
