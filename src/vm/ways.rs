//! What the handler's steps work with: the VM's place, its libvirt, the modules that make effects.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::discover::{self, Place};
use super::facade::{Refusal, VmState};
use super::failure::Failure;
use super::publish::Board;
use super::steps::{AttachFailure, Steps};
use super::{attach, checks, detach};
use crate::cgroup::Grants;
use crate::connector::Connector;
use crate::devnode::DevNodes;
use crate::domain;
use crate::host::libvirt::{
    Connection, Definition, DomainEvent, DomainState, Hypervisor, Lifecycle,
};
use crate::host::pods::PodDoors;
use crate::journal::{Desired, EffectsStore, StoredVolume};
use crate::reason::Reason;
use crate::spec::{RemoveOptions, VmPlace, VmSpec, VolumeSpec};
use crate::types::{VolumeKey, VolumeName};

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
    /// The guest agent's answer.
    pub agent: Duration,
    /// The guest's answer to a request to let a disk go.
    pub guest_unplug: Duration,
    /// A removal goes on when nobody can say whether the guest uses the disk.
    pub allow_unproven: bool,
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
    /// Held while a disk is planned and attached, so that two never plan for the same place.
    pub(super) turn: Mutex<()>,
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
            turn: Mutex::default(),
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

    /// Notes that a target name is being removed, or that it is no more.
    pub(super) fn set_leaving(&self, target: &str, leaving: bool) {
        if leaving {
            self.leaving_names().insert(target.to_owned());
        } else {
            self.leaving_names().remove(target);
        }
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
        *link = Some(connection.clone());
        Ok(connection)
    }

    /// Returns when the domain has stopped or started, or when nobody can tell any more.
    async fn gone_or_back(&self, connection: &dyn Connection) {
        let mut events = connection.events(&self.vm.domain);
        loop {
            match events.next().await {
                DomainEvent::Disconnected
                | DomainEvent::Lifecycle(Lifecycle::Started | Lifecycle::Stopped) => return,
                DomainEvent::Recheck if !connection.is_alive() => return,
                DomainEvent::Lifecycle(_)
                | DomainEvent::DeviceAdded(_)
                | DomainEvent::DeviceRemoved(_)
                | DomainEvent::DeviceRemovalFailed(_)
                | DomainEvent::Recheck => {}
            }
        }
    }

    /// What the domain does; `None` when libvirt knows none of that name.
    pub(super) async fn domain_state(&self) -> Result<Option<DomainState>, Failure> {
        let connection = self.libvirt().await?;
        let info = connection.info(&self.vm.domain, self.settings().libvirt).await?;
        Ok(info.map(|i| i.state))
    }

    /// Whether the running domain has our disk of that name. A domain that does not run has none.
    pub(super) async fn shows_disk(&self, disk: &VolumeName) -> Result<bool, Failure> {
        let runs =
            matches!(self.domain_state().await?, Some(DomainState::Running | DomainState::Paused));
        if !runs {
            return Ok(false);
        }
        let connection = self.libvirt().await?;
        let limit = self.settings().libvirt;
        let xml = connection.xml(&self.vm.domain, Definition::Live, limit).await?;
        let unread = |e| Failure::of(Reason::DomainXmlUnsupported, &e);
        let domain = domain::xml::parse(&xml).map_err(unread)?;
        Ok(domain.disk(&domain::alias(disk)).is_some())
    }

    /// The VM's place, all of it proven anew; the domain must run.
    pub(super) async fn place(&self) -> Result<Place, Failure> {
        match self.domain_state().await? {
            Some(DomainState::Running | DomainState::Paused) => {}
            Some(DomainState::Shutoff) | None => {
                let message =
                    format!("domain {} of VM {} does not run", self.vm.domain, self.vm.id);
                return Err(Failure::new(Reason::VmNotRunning, message));
            }
        }
        let settings = &self.settings().discover;
        Ok(discover::discover(&self.host.pods, settings, &self.vm.place, &self.vm.domain).await?)
    }

    /// How the VM is, for people: never fails, but says why it cannot be served.
    pub async fn look(&self) -> Looked {
        match self.place().await {
            Ok(place) => Looked {
                state: VmState::Running,
                cgroup: place.pod.as_ref().map(|p| p.cgroup.path.clone()),
                hotplug_dir: place.pod.as_ref().map(|p| p.hotplug.to_string().into()),
                hotplug_dir_in_pod: place.pod.map(|p| p.dir_in_pod),
                failure: None,
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

/// Between two tries to reach a libvirt that cannot tell its events.
const RECONNECT: Duration = Duration::from_secs(10);

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
    async fn check_add(&self, spec: &VolumeSpec) -> Result<(), Refusal> {
        checks::add(self, spec).await
    }

    async fn check_remove(
        &self,
        name: &VolumeName,
        known: Option<&VolumeSpec>,
        options: RemoveOptions,
    ) -> Result<Vec<String>, Refusal> {
        checks::remove(self, name, known, options).await
    }

    async fn attach(&self, volume: &StoredVolume) -> Result<(), AttachFailure> {
        attach::attach(self, volume).await
    }

    async fn vm_changed(&self) {
        let mut unreachable = false;
        loop {
            match self.libvirt().await {
                Ok(_) if unreachable => return,
                Ok(connection) => return self.gone_or_back(&*connection).await,
                Err(failure) => {
                    tracing::debug!(why = failure.message, "the VM's libvirt is not to be watched");
                    unreachable = true;
                    tokio::time::sleep(RECONNECT).await;
                }
            }
        }
    }

    async fn detach(&self, volume: &VolumeSpec, options: RemoveOptions) -> Result<(), Failure> {
        detach::detach(self, volume, options).await
    }
}
