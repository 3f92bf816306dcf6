//! What the API talks to: all VMs of this node and their volumes.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::broadcast;

use super::resolve::Names;
use crate::connector::{Discovered, Hba};
use crate::reason::Reason;
use crate::spec::{AddOptions, RemoveOptions, Revision, VmPlace, VmSpec, VolumeSpec, VolumeStatus};
use crate::types::{
    Chap, HostPort, IoLimits, Outcome, Portal, SecretName, VmId, VolumeKey, VolumeName,
};

/// All VMs of this node and their volumes. Calls return when the wish is durable; what becomes of
/// it is told by [`Volumes::watch`].
#[async_trait]
pub trait Volumes: Send + Sync {
    /// Makes a VM known. The same again is [`Outcome::Already`]; other particulars are
    /// [`Reason::VmExists`] while it has volumes, but for a new pod once the guest in the one before
    /// has ended: its volumes go over to that.
    async fn register_vm(&self, spec: VmSpec) -> Result<Outcome<VmInfo>, Refusal>;

    /// Forgets a VM; an unknown one is [`Outcome::Already`], one with volumes
    /// [`Reason::VmHasVolumes`].
    async fn unregister_vm(&self, id: &VmId) -> Result<Outcome, Refusal>;

    /// All VMs, in the order of their names.
    async fn list_vms(&self) -> Vec<VmInfo>;

    /// Whether that VM is registered, served or not. Asks nothing of the host.
    async fn is_registered(&self, id: &VmId) -> bool;

    /// Wants a volume. Returns when the wish is durable, not when the volume is ready.
    async fn add_volume(
        &self,
        vm: &VmId,
        spec: VolumeSpec,
        options: AddOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal>;

    /// Wants a volume no more. Returns when the wish is durable, not when the volume is gone.
    /// Asked again, it starts a removal anew that was refused: the status returned then carries
    /// no reason of an attempt before.
    async fn remove_volume(
        &self,
        key: &VolumeKey,
        options: RemoveOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal>;

    /// Grants or refuses wishes about volumes of one VM, each for itself: the answers are in their order.
    /// An error is about the VM as a whole. No volume should be in two of them.
    async fn change_volumes(&self, vm: &VmId, wishes: Vec<Wish>) -> Result<Vec<Answer>, Refusal>;

    /// Makes a set the whole of a VM's volumes, unless it is older than the last that was accepted
    /// ([`Reason::RevisionOutdated`]) or another of the same revision ([`Reason::RevisionReused`]).
    async fn sync_volumes(&self, vm: &VmId, set: Set) -> Result<Synced, Refusal>;

    /// A VM is about to start in the pod that it is registered with: its volumes are attached as far as goes
    /// without a guest, and kept so for a time. Returns when each has come there or cannot; which did is
    /// told.
    async fn prepare_start(
        &self,
        vm: &VmId,
        start: Start,
    ) -> Result<Vec<(VolumeName, Answer)>, Refusal>;

    /// A VM's guest is about to come to `place`: from another node to the pod that it is registered with
    /// here, as a start; or from that pod to another of this node, while nothing of the VM is changed.
    async fn prepare_migration_target(
        &self,
        vm: &VmId,
        place: VmPlace,
        within: Option<Duration>,
    ) -> Result<Vec<(VolumeName, Answer)>, Refusal>;

    /// The guest has moved: to the other pod of this node, which is the VM's from now on; or to another
    /// node, and its volumes are wanted here no more. [`Reason::VmRunning`] while it runs where it was.
    async fn finish_migration(&self, vm: &VmId) -> Result<Vec<(VolumeName, Answer)>, Refusal>;

    /// The guest stays where it is, or does not come: what was prepared is undone.
    async fn cancel_migration(&self, vm: &VmId) -> Result<Outcome, Refusal>;

    /// At most so many volumes may be in one request.
    fn max_batch(&self) -> usize;

    /// Has a ready volume follow its LUN, which has grown at the array; `expected` is the size that it
    /// must have by now. Returns when the guest was told, or found told.
    async fn expand_volume(
        &self,
        key: &VolumeKey,
        expected: Option<u64>,
    ) -> Result<Outcome<Expanded>, Refusal>;

    /// Sets how much I/O the guest may do on a volume: durable, and then on the disk that the guest has,
    /// if it has it.
    async fn set_io_limits(
        &self,
        key: &VolumeKey,
        limits: IoLimits,
    ) -> Result<Outcome<VolumeStatus>, Refusal>;

    /// One volume as it is now.
    async fn get_volume(&self, key: &VolumeKey) -> Result<VolumeStatus, Refusal>;

    /// All volumes, or one VM's, ordered by key.
    async fn list_volumes(&self, vm: Option<&VmId>) -> Vec<Arc<VolumeStatus>>;

    /// Every change from now on, the end ([`crate::spec::Phase::Gone`]) included. A subscriber
    /// subscribes first and lists then; `generation`, which one counter gives to the changes of all volumes
    /// in the order in which they are sent, says what the list already had. A change is in the list
    /// before it is sent.
    fn watch(&self) -> broadcast::Receiver<Arc<VolumeStatus>>;

    /// What the names of portals are resolved to: for a volume that is there, what was recorded with it.
    async fn resolve(
        &self,
        volume: Option<&VolumeKey>,
        names: &BTreeSet<HostPort>,
    ) -> Result<Names, Refusal>;

    /// The targets that an iSCSI portal lists to this node. Leaves nothing behind.
    async fn discover(
        &self,
        portal: Portal,
        from: Option<DiscoverWith>,
    ) -> Result<Vec<Discovered>, Refusal>;

    /// What this node is.
    async fn node(&self) -> NodeInfo;
}

/// The credentials of a discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiscoverWith {
    /// Those of a secret of the configured directory.
    Secret(SecretName),
    /// These.
    Chap(Chap),
}

/// A wish that was not granted; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// The request's field that is to blame, in the contract's spelling (`volume.serial`), where
    /// one is.
    pub field: Option<String>,
    /// What happened, with the value. What to do is the reason's remedy.
    pub message: String,
}

impl Refusal {
    /// A refusal that no single field is to blame for.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, field: None, message: message.into() }
    }

    /// Names the field to blame.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }
}

/// A start that is announced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Start {
    /// How long it may take; a setting's, where `None`.
    pub within: Option<Duration>,
    /// The domain that the host's libvirt is starting, which waits for the answer.
    pub domain: Option<String>,
}

/// What became of a wish about one volume.
pub type Answer = Result<Outcome<VolumeStatus>, Refusal>;

/// A wish about one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// It is wanted.
    Add {
        /// The volume.
        spec: Box<VolumeSpec>,
        /// How.
        options: AddOptions,
    },
    /// It is wanted no more.
    Remove {
        /// The volume's name.
        name: VolumeName,
        /// How.
        options: RemoveOptions,
    },
}

/// All volumes that a VM is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// Which set it is.
    pub revision: Revision,
    /// Its volumes, no name twice.
    pub volumes: Vec<(VolumeSpec, AddOptions)>,
    /// Volumes that are in it by name, but cannot be added as they were asked for: they are left alone.
    pub others: BTreeSet<VolumeName>,
    /// How the rest is removed; `dry_run` is for the whole.
    pub removals: RemoveOptions,
}

/// What became of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced {
    /// Its volumes, in their order.
    pub volumes: Vec<Answer>,
    /// Volumes that were there and are not in it, by name.
    pub removed: Vec<(VolumeName, Answer)>,
}

/// A volume that has followed its LUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expanded {
    /// As it is now.
    pub status: VolumeStatus,
    /// Bytes before.
    pub before: u64,
    /// Bytes now.
    pub size: u64,
}

/// How a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmState {
    /// Not known yet.
    Unknown,
    /// Its domain runs.
    Running,
    /// Its domain does not run.
    Stopped,
    /// Its pod or libvirt cannot be reached.
    Unreachable,
}

/// A VM as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmInfo {
    /// It is to be able to have Fibre Channel volumes ([`crate::vm::plan::fc`]).
    pub fc_marked: bool,
    /// As registered.
    pub spec: VmSpec,
    /// How it is.
    pub state: VmState,
    /// In that state since.
    pub since: Timestamp,
    /// How many volumes it has, those being removed included.
    pub volumes: u32,
    /// The set of its volumes that was accepted last; `None` when there was none.
    pub revision: Option<i64>,
    /// The pod's directory on the host.
    pub pod_dir: Option<PathBuf>,
    /// The cgroup that grants are made for.
    pub cgroup: Option<PathBuf>,
    /// The hotplug directory on the host.
    pub hotplug_dir: Option<PathBuf>,
    /// The hotplug directory as QEMU sees it.
    pub hotplug_dir_in_pod: Option<PathBuf>,
    /// Why it cannot be served; `None` when all is well.
    pub reason: Option<Reason>,
    /// The reason in words.
    pub message: String,
}

/// What a node is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// The node's name.
    pub name: String,
    /// lunplugd's version.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// The boot's id.
    pub boot_id: String,
    /// The iSCSI initiator name, where there is one.
    pub initiator_name: Option<String>,
    /// multipathd answers.
    pub multipathd: bool,
    /// How devices can be allowed in a VM's cgroup, e.g. `cgroup2-override`.
    pub grants: Vec<String>,
    /// Nothing here is real. Told to people; nothing decides by it.
    pub simulated: bool,
    /// The one VM that this daemon serves, in its sidecar form.
    pub only_vm: Option<VmId>,
    /// Calls into the kernel or to libvirt that were abandoned and have not come back.
    pub stuck_calls: u64,
    /// Why nothing new can be stored; `None` when all is well.
    pub state_trouble: Option<String>,
    /// At most so many VMs.
    pub max_vms: u32,
    /// At most so many volumes a VM.
    pub max_volumes_per_vm: u32,
    /// Only volumes whose request says which identity the LUN must have.
    pub require_wwid: bool,
    /// Its Fibre Channel HBAs.
    pub hbas: Vec<Hba>,
}
