//! What the handler's steps work with: the VM's place, its libvirt, the modules that make effects.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Mutex, mpsc, watch};

use super::discover::{self, Place, Wanted};
use super::facade::{Refusal, VmState};
use super::failure::Failure;
use super::order::Order;
use super::plan::fc::Power;
use super::publish::Board;
use super::steps::{
    AttachFailure, Came, Circumstances, ExpandFailure, Grown, LookedAt, Sight, Steps, Stir,
};
use super::{attach, checks, detach, expand, limits, look};
use crate::cgroup::Grants;
use crate::connector::settings::LocalSettings;
use crate::connector::{Connector, Touched};
use crate::devnode::DevNodes;
use crate::domain;
use crate::host::libvirt::{
    Connection, Definition, DomainEvent, DomainEvents, DomainState, Hypervisor, Lifecycle, Shared,
};
use crate::host::pods::PodDoors;
use crate::host::secrets::Secrets;
use crate::journal::{Desired, EffectsStore, StoredVolume};
use crate::reason::Reason;
use crate::spec::{RemoveOptions, VmPlace, VmSpec, VolumeSpec};
use crate::step::Tracker;
use crate::types::{Bus, Outcome, VolumeKey, VolumeName};

/// How long the parts of a way may take, and what is allowed on it.
#[derive(Debug, Clone)]
pub struct WaySettings {
    /// Where pods are found.
    pub discover: discover::Settings,
    /// One attempt to attach a volume.
    pub attach: Duration,
    /// One attempt to detach a volume, the guest's answer not counted.
    pub detach: Duration,
    /// One piece of work of libvirt's.
    pub libvirt: Duration,
    /// The whole of a check of a request, or of a look at a VM's volumes.
    pub check: Duration,
    /// The names of a request's portals.
    pub resolve: Duration,
    /// The guest agent's answer.
    pub agent: Duration,
    /// The guest's answer to a request to let a disk go.
    pub guest_unplug: Duration,
    /// A removal goes on when nobody can say whether the guest uses the disk.
    pub allow_unproven: bool,
    /// The socket of qemu-pr-helper as QEMU sees it, where there is one.
    pub pr_helper: Option<String>,
    /// What of the host's own volumes may be.
    pub local: LocalSettings,
}

/// The host's side of a VM's steps, shared by all VMs of a node.
#[derive(Clone)]
pub struct Host {
    /// Pods, nodes and processes.
    pub pods: PodDoors,
    /// libvirt.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The LUNs.
    pub connector: Arc<dyn Connector>,
    /// Device grants.
    pub grants: Grants,
    /// Secrets that volumes refer to.
    pub secrets: Arc<dyn Secrets>,
    /// Runs the steps.
    pub tracker: Tracker,
    /// How and how long.
    pub settings: Arc<WaySettings>,
}

/// One VM's ways.
pub struct Ways {
    pub(super) vm: VmSpec,
    pub(super) host: Host,
    pub(super) nodes: DevNodes,
    pub(super) board: Board,
    pub(super) desired: Desired,
    pub(super) effects: EffectsStore,
    link: Mutex<Option<Arc<dyn Connection>>>,
    /// The same, for whoever waits for there to be one.
    linked: watch::Sender<Option<Weak<dyn Connection>>>,
    /// The VM's place as it was found last.
    found: std::sync::Mutex<Option<Place>>,
    /// Held while a disk is planned and attached, so that two never plan for the same place.
    pub(super) turn: Mutex<()>,
    /// Who is on its way to the guest.
    pub(super) order: Order,
    /// The target names that are being removed.
    leaving: std::sync::Mutex<BTreeSet<String>>,
}

impl Ways {
    /// The ways of `vm`.
    pub fn new(
        vm: VmSpec,
        host: Host,
        board: Board,
        desired: Desired,
        effects: EffectsStore,
    ) -> Self {
        let nodes = DevNodes::new(host.pods.nodes.clone());
        Self {
            vm,
            host,
            nodes,
            board,
            desired,
            effects,
            link: Mutex::default(),
            linked: watch::Sender::new(None),
            found: std::sync::Mutex::default(),
            turn: Mutex::default(),
            order: Order::default(),
            leaving: std::sync::Mutex::default(),
        }
    }

    /// The VM as it was registered.
    pub fn spec(&self) -> &VmSpec {
        &self.vm
    }

    /// The pod's directory on the host, were it there or not.
    pub fn pod_dir(&self) -> Option<PathBuf> {
        match &self.vm.place {
            VmPlace::Pod { uid, .. } => {
                Some(self.settings().discover.kubelet_root.join("pods").join(uid))
            }
            VmPlace::Host { .. } => None,
        }
    }

    pub(super) fn settings(&self) -> &WaySettings {
        &self.host.settings
    }

    pub(super) fn key(&self, name: &VolumeName) -> VolumeKey {
        VolumeKey { vm: self.vm.id.clone(), volume: name.clone() }
    }

    /// The target names that are being removed: not free, though they may be gone from the XML.
    pub(super) fn leaving(&self) -> BTreeSet<String> {
        self.leaving_names().clone()
    }

    /// The disks of all volumes that are wanted, but that of `name`: each has its place, or will have it.
    /// A store that cannot be read now says nothing of them.
    pub(super) async fn wanted(&self, name: &VolumeName) -> Vec<(String, Bus)> {
        let disks = self.desired.disks(&self.vm.id).await.unwrap_or_default();
        let others = disks.into_iter().filter(|d| d.keeps_place && d.volume != name.as_str());
        others.map(|d| (d.disk, d.bus)).collect()
    }

    /// Notes that a target name is being removed, until what is returned is dropped.
    pub(super) fn set_leaving(&self, target: &str) -> impl Drop + '_ {
        struct LeavingName<'a>(&'a Ways, String);
        impl Drop for LeavingName<'_> {
            fn drop(&mut self) {
                self.0.leaving_names().remove(&self.1);
            }
        }
        self.leaving_names().insert(target.to_owned());
        LeavingName(self, target.to_owned())
    }

    fn leaving_names(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        // Held for single changes only.
        self.leaving.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Which of the VM's lives the effects belong to.
    pub(super) fn incarnation(&self) -> &str {
        match &self.vm.place {
            VmPlace::Pod { uid, .. } => uid,
            VmPlace::Host { .. } => "",
        }
    }

    /// The connection to the VM's libvirt: the one there is, if it lives, or a new one.
    pub(super) async fn libvirt(&self) -> Result<Arc<dyn Connection>, Failure> {
        let mut link = self.link.lock().await;
        if let Some(connection) = link.as_ref().filter(|c| c.is_alive()) {
            return Ok(connection.clone());
        }
        let found =
            discover::endpoint(&self.host.pods, &self.settings().discover, &self.vm.place).await?;
        let endpoint = self.host.pods.dirs.pin(&found).await;
        let endpoint = endpoint.map_err(discover::DiscoverError::Socket)?;
        let connection = self.host.hypervisor.connect(&endpoint, self.settings().libvirt).await?;
        let connection: Arc<dyn Connection> = Arc::new(Shared::new(connection, &endpoint.name));
        *link = Some(connection.clone());
        self.linked.send_replace(Some(Arc::downgrade(&connection)));
        Ok(connection)
    }

    /// What the domain does; `None` when libvirt knows none of that name.
    pub(super) async fn domain_state(&self) -> Result<Option<DomainState>, Failure> {
        let connection = self.libvirt().await?;
        Ok(connection.state(&self.vm.domain, self.settings().libvirt).await?)
    }

    /// Whether the running domain has our disk of that name, or a medium with that source in a drive. A
    /// domain that does not run has none.
    pub(super) async fn shows_disk(
        &self,
        disk: &VolumeName,
        medium: Option<&str>,
    ) -> Result<bool, Failure> {
        let runs =
            matches!(self.domain_state().await?, Some(DomainState::Running | DomainState::Paused));
        if !runs {
            return Ok(false);
        }
        let connection = self.libvirt().await?;
        let limit = self.settings().libvirt;
        let xml = connection.xml(&self.vm.domain, Definition::Live, limit).await?;
        let unread = |e| Failure::of(Reason::DomainXmlUnsupported, &e);
        let domain = domain::xml::recall(xml).map_err(unread)?;
        Ok(match medium {
            Some(source) => domain.drive_with(source).is_some(),
            None => domain.disk(&domain::alias(disk)).is_some(),
        })
    }

    /// The VM's place, all of it proven anew; the domain must run.
    pub(super) async fn place(&self) -> Result<Place, Failure> {
        self.refuse_unless_it_runs().await?;
        self.prove_place().await
    }

    async fn refuse_unless_it_runs(&self) -> Result<(), Failure> {
        match self.domain_state().await? {
            Some(DomainState::Running | DomainState::Paused) => Ok(()),
            Some(DomainState::Shutoff) | None => {
                let message =
                    format!("domain {} of VM {} does not run", self.vm.domain, self.vm.id);
                Err(Failure::new(Reason::VmNotRunning, message))
            }
        }
    }

    async fn prove_place(&self) -> Result<Place, Failure> {
        let settings = &self.settings().discover;
        let (pods, qemu) = (&self.host.pods, Wanted::Qemu(self.vm.domain.clone()));
        let place = discover::discover(pods, settings, &self.vm.place, &qemu).await?;
        *self.found() = Some(place.clone());
        Ok(place)
    }

    /// The place at which the VM will be, before it runs.
    pub(super) async fn place_to_be(&self) -> Result<Place, Failure> {
        let settings = &self.settings().discover;
        let pods = &self.host.pods;
        Ok(discover::discover(pods, settings, &self.vm.place, &Wanted::Libvirt).await?)
    }

    /// The VM's place of a domain that is known to run: as it was found last, while that QEMU runs.
    pub(super) async fn present_place(&self) -> Result<Place, Failure> {
        match self.found_place().await? {
            Some(place) => Ok(place),
            None => self.place().await,
        }
    }

    /// The VM's place as its check has proven it, a moment ago, while that QEMU runs; the domain must run.
    pub(super) async fn checked_place(&self) -> Result<Place, Failure> {
        // A QEMU that is ending is still there when its domain is not.
        self.refuse_unless_it_runs().await?;
        match self.found_place().await? {
            Some(place) => Ok(place),
            None => self.prove_place().await,
        }
    }

    /// The place that was found last, unless the QEMU by which it was found is gone.
    async fn found_place(&self) -> Result<Option<Place>, Failure> {
        let Some(place) = self.found().clone() else { return Ok(None) };
        match &place.pod {
            Some(pod) if !pod.is_current(&self.host.pods).await? => Ok(None),
            _ => Ok(Some(place)),
        }
    }

    /// Has the place proven anew by whoever needs it next.
    pub(super) fn doubt_place(&self) {
        *self.found() = None;
    }

    fn found(&self) -> std::sync::MutexGuard<'_, Option<Place>> {
        // Held for single changes only.
        self.found.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How the VM is, for people: never fails, but says why it cannot be served.
    pub async fn look(&self) -> Looked {
        match self.place().await {
            Ok(place) => Looked {
                state: VmState::Running,
                cgroup: place.pod.as_ref().map(|p| p.cgroup.path.clone()),
                hotplug_dir: place.pod.as_ref().map(|p| p.hotplug.to_string().into()),
                hotplug_dir_in_pod: place.pod.map(|p| p.dir_in_pod),
                failure: self.paused().await,
            },
            Err(failure) => {
                let state = match failure.reason {
                    Reason::VmNotRunning => VmState::Stopped,
                    _ => VmState::Unreachable,
                };
                let failure = (state == VmState::Unreachable).then_some(failure);
                Looked { state, cgroup: None, hotplug_dir: None, hotplug_dir_in_pod: None, failure }
            }
        }
    }

    /// What has paused the guest, if it was an I/O error.
    async fn paused(&self) -> Option<Failure> {
        let connection = self.libvirt().await.ok()?;
        let info = connection.info(&self.vm.domain, self.settings().libvirt).await.ok()??;
        let message = || {
            let domain = &self.vm.domain;
            format!("an I/O of the guest's failed, so QEMU has paused domain {domain}")
        };
        info.io_error.then(|| Failure::new(Reason::VmPausedIoError, message()))
    }

    /// Whether this life of the VM has ended, so that its volumes may go over to another pod of the same
    /// name: nothing is taken from under a guest.
    pub async fn has_ended(&self) -> Result<bool, Failure> {
        let VmPlace::Pod { uid, .. } = &self.vm.place else { return Ok(false) };
        match self.domain_state().await {
            Ok(state) => Ok(!matches!(state, Some(DomainState::Running | DomainState::Paused))),
            // Its directory may be gone and its QEMU not.
            Err(_) => Ok(!discover::runs(&self.host.pods, uid, &self.vm.domain).await?),
        }
    }

    /// Checks what can be checked of a VM before it runs: its pod and libvirt's socket.
    pub async fn check(&self) -> Result<(), Failure> {
        discover::endpoint(&self.host.pods, &self.settings().discover, &self.vm.place).await?;
        match self.place().await {
            // It may be registered before it runs, and before its libvirt answers.
            Err(f) if [Reason::VmNotRunning, Reason::LibvirtUnreachable].contains(&f.reason) => {
                Ok(())
            }
            other => other.map(drop),
        }
    }
}

/// Tells what happens to the domain, until nobody can tell any more.
async fn watch_domain(mut events: DomainEvents, stirs: &mpsc::Sender<Stir>) {
    // What happened before is not known.
    let mut stir = Some(Stir::Vm);
    loop {
        if let Some(stir) = stir.take() {
            // The handler may have ended; this is dropped then.
            let _ = stirs.send(stir).await;
        }
        match events.event().await {
            DomainEvent::Disconnected => return,
            DomainEvent::Lifecycle(Lifecycle::Started | Lifecycle::Stopped) => {
                stir = Some(Stir::Vm);
            }
            DomainEvent::DeviceRemoved(alias) if alias.starts_with(domain::ALIAS_PREFIX) => {
                stir = Some(Stir::Disks);
            }
            DomainEvent::Recheck => stir = Some(Stir::Disks),
            DomainEvent::Lifecycle(_)
            | DomainEvent::DeviceAdded(_)
            | DomainEvent::DeviceRemoved(_)
            | DomainEvent::DeviceRemovalFailed(_) => {}
        }
    }
}

/// Between the end of a connection and listening on the next one.
const AFTER_BREAK: Duration = Duration::from_secs(2);

/// Runs what has no deadline of its own as a whole.
async fn within<T, E: From<Failure>>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let message = format!("{what} took longer than {limit:?}");
        Err(Failure::new(Reason::DeadlineExceeded, message).into())
    })
}

/// What was found of a VM.
#[derive(Debug)]
pub struct Looked {
    /// How it is.
    pub state: VmState,
    /// The cgroup that grants are made for.
    pub cgroup: Option<PathBuf>,
    /// The hotplug directory on the host.
    pub hotplug_dir: Option<PathBuf>,
    /// And as QEMU sees it.
    pub hotplug_dir_in_pod: Option<PathBuf>,
    /// Why it cannot be served.
    pub failure: Option<Failure>,
}

#[async_trait]
impl Steps for Ways {
    async fn check_add(
        &self,
        spec: &VolumeSpec,
        leaving: &BTreeSet<VolumeName>,
    ) -> Result<Power, Refusal> {
        within(self.settings().check, "the check", checks::add(self, spec, leaving)).await
    }

    async fn check_remove(
        &self,
        name: &VolumeName,
        known: Option<&VolumeSpec>,
        options: RemoveOptions,
    ) -> Result<Vec<String>, Refusal> {
        let check = checks::remove(self, name, known, options);
        within(self.settings().check, "the check", check).await
    }

    async fn attach(
        &self,
        volume: &StoredVolume,
        how: Circumstances,
    ) -> Result<Came, AttachFailure> {
        attach::attach(self, volume, how).await
    }

    async fn expand(
        &self,
        volume: &StoredVolume,
        expected: Option<u64>,
    ) -> Result<Outcome<Grown>, ExpandFailure> {
        expand::expand(self, volume, expected).await
    }

    async fn set_limits(&self, volume: &StoredVolume) -> Result<Outcome, Failure> {
        limits::set(self, volume).await
    }

    async fn look(&self, volumes: &[LookedAt]) -> Result<BTreeMap<VolumeName, Sight>, Failure> {
        within(self.settings().check, "a look at the VM", look::look(self, volumes)).await
    }

    async fn watch(&self, stirs: mpsc::Sender<Stir>) {
        let domain = async {
            let mut linked = self.linked.subscribe();
            loop {
                let connection = linked.borrow_and_update().as_ref().and_then(Weak::upgrade);
                if let Some(connection) = connection {
                    let events = connection.events(&self.vm.domain);
                    drop(connection);
                    tokio::select! {
                        () = watch_domain(events, &stirs) => {
                            // Whoever looks now connects anew, and says so when that fails.
                            let _ = stirs.send(Stir::Vm).await;
                            // A libvirt that drops each connection at once is not to keep us busy.
                            tokio::time::sleep(AFTER_BREAK).await;
                        }
                        changed = linked.changed() => match changed {
                            Ok(()) => continue,
                            Err(_) => return,
                        }
                    }
                }
                if linked.changed().await.is_err() {
                    return;
                }
            }
        };
        let storage = async {
            let mut changes = self.host.connector.changes();
            loop {
                let touched = match changes.recv().await {
                    Ok(touched) => touched,
                    Err(RecvError::Lagged(_)) => Arc::new(Touched::any()),
                    Err(RecvError::Closed) => return,
                };
                let _ = stirs.send(Stir::Storage(touched)).await;
            }
        };
        tokio::join!(domain, storage);
    }

    async fn detach(&self, volume: &VolumeSpec, options: RemoveOptions) -> Result<(), Failure> {
        detach::detach(self, volume, options).await
    }
}
