//! Attaches a remote LUN to the host as one verified block device, and detaches it; or takes what is on the host
//! already.

pub(crate) mod bounded;
pub mod error;
pub mod facts;
mod fc;
mod guestlun;
mod health;
mod identity;
mod iscsi;
mod lease;
pub mod local;
mod lun;
mod mapchange;
mod multipath;
mod router;
mod scsi;
pub mod settings;
mod size;
mod touched;
mod wait;

pub use error::Error;
pub use health::{Health, Paths};
pub use router::Connectors;
pub use settings::Settings;
pub use touched::Touched;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};

use crate::host::local::HostFile;
use crate::spec::{DeviceStatus, MultipathPolicy, Source};
use crate::types::{Chap, DevNum, Iqn, Outcome, Portal, UnitSerial, VolumeKey, Wwid, Wwpn};

/// What the LUN must prove to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expect {
    /// The identity asked for in the request: strict, whatever was recorded.
    pub wwid: Option<Wwid>,
    /// The unit's serial number asked for: strict, too.
    pub unit_serial: Option<UnitSerial>,
    /// The size asked for, in bytes.
    pub size: Option<u64>,
    /// It had that size once; by now it may have more.
    pub may_have_grown: bool,
    /// The identity recorded at this volume's first attach.
    pub recorded: Option<Wwid>,
    /// Take another identity than the recorded one.
    pub accept_new_identity: bool,
}

/// One attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// For whom: leases are kept in this name.
    pub owner: VolumeKey,
    /// What.
    pub source: Source,
    /// What it must prove to be.
    pub expect: Expect,
    /// How many paths it must have.
    pub multipath: MultipathPolicy,
    /// Others may hold it on this node too.
    pub shareable: bool,
    /// It will not be written to, so it may be write-protected.
    pub read_only: bool,
    /// How to log in where there is no session yet.
    pub authentication: Authentication,
}

/// A target that a portal lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovered {
    /// Its name.
    pub target: Iqn,
    /// The portals at which it says that it is to be had, in the order in which they were told.
    pub portals: Vec<Portal>,
}

/// A Fibre Channel HBA's port, as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hba {
    /// Its SCSI host's number.
    pub host: u32,
    /// Its port's name.
    pub wwpn: Wwpn,
    /// Its node's name.
    pub wwnn: Option<Wwpn>,
    /// `port_state`: `Online`, `Linkdown`, ...
    pub state: String,
    /// `speed`, e.g. `16 Gbit`.
    pub speed: String,
    /// The fabric's name, where it is in one.
    pub fabric: Option<Wwpn>,
    /// `port_type`, e.g. `NPort (fabric via point-to-point)`.
    pub port_type: String,
}

/// The credentials of an attach, or of a discovery.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Authentication {
    /// None are given: what the host is configured with counts.
    #[default]
    None,
    /// These.
    Chap(Chap),
    /// There should be some, and these words say why they cannot be had. It matters only to an attach
    /// that needs them: a volume that is attached goes on without.
    Lost(String),
}

/// One path of an attached volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// SCSI address, `H:C:T:L` in decimal as in sysfs.
    pub hctl: String,
    /// Its device number.
    pub dev: DevNum,
    /// Its kernel name when it was attached (for people; never used to find it again).
    pub name: String,
}

/// An attached volume: one verified block device, or a file. Kept by the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The device to give to the VM.
    pub device: DeviceStatus,
    /// Its disk sequence number (`diskseq`), unique in this boot; 0 of a file.
    pub diskseq: u64,
    /// Its verified paths.
    pub paths: Vec<PathStatus>,
    /// The file, where it is one: there is no device then, and nothing that could be granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<HostFile>,
}

impl Attachment {
    /// Whether two are of the same device or file.
    pub fn is_same(&self, other: &Self) -> bool {
        let which = |a: &Self| (a.device.dev, a.diskseq, a.file.as_ref().map(|f| f.inode));
        which(self) == which(other)
    }
}

/// The size of a LUN, as all its paths show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Bytes as they were handed out.
    pub before: u64,
    /// Bytes now; never less.
    pub now: u64,
}

/// How long others may wait for a device that is yet to be released. Mostly it takes a tenth of this.
const SOON: Duration = Duration::from_secs(1);

/// Says how to let go.
#[derive(Debug, Clone, Copy, Default)]
pub struct DetachOptions<'a> {
    /// Go on although data cannot be flushed (all paths are dead).
    pub force: bool,
    /// Where it is told what was given up on the way; otherwise only the log has it.
    pub gave_up: Option<&'a GaveUp>,
    /// Where it is told (`true`) that nothing of the guest's can come to the device any more; until then a detach only
    /// reads. Without it that is so already.
    pub released: Option<&'a watch::Receiver<bool>>,
}

impl DetachOptions<'_> {
    /// Returns once the device was released. It never will be where who was to tell so has gone: [`Error::NotReleased`].
    pub(crate) async fn released(&self) -> Result<(), Error> {
        let Some(released) = self.released else { return Ok(()) };
        let told = { released.clone() }.wait_for(|released| *released).await.map(drop);
        told.map_err(|_| Error::NotReleased)
    }

    /// The same for one who has locks: the error is also that it takes long.
    pub(crate) async fn released_soon(&self) -> Result<(), Error> {
        let soon = tokio::time::timeout(SOON, self.released()).await;
        soon.unwrap_or(Err(Error::NotReleased))
    }

    /// Something was given up, in words.
    pub(crate) fn gave_up(&self, what: String) {
        tracing::warn!(what, "given up");
        if let Some(list) = self.gave_up {
            list.note(what);
        }
    }
}

/// What a removal gave up on, in words, in the order in which it happened. Told as it happens, for a
/// detach that fails later has given it up all the same.
#[derive(Debug, Default)]
pub struct GaveUp(std::sync::Mutex<Vec<String>>);

impl GaveUp {
    /// Adds to the list, unless it says so already.
    pub fn note(&self, what: String) {
        let mut list = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !list.contains(&what) {
            list.push(what);
        }
    }

    /// The list so far.
    pub fn list(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// What every transport offers. All calls are idempotent and safe to repeat after a crash at any
/// point: what was begun is known from the leases under /run/lunplug, written before each effect.
#[async_trait]
pub trait Connector: Send + Sync {
    /// Attaches, or finds attached and verifies again.
    async fn attach(&self, request: &AttachRequest) -> Result<Outcome<Attachment>, Error>;

    /// Detaches whatever is there of this owner's volume, also a half-done attach. Never touches a
    /// device whose identity is not the one that was attached.
    async fn detach(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error>;

    /// Has the host forget a LUN that was attached in an earlier boot: what it remembers of it across
    /// boots beside its records. Left alone when somebody has it, and where lunplug did not bring it.
    async fn forget(&self, source: &Source, wwid: &Wwid) -> Result<(), Error>;

    /// What is attached in this owner's name, verified anew against sysfs; `None` when nothing is.
    async fn observe(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<Option<Attachment>, Error>;

    /// The targets that a portal lists to this node. Leaves no record behind.
    async fn discover(
        &self,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error>;

    /// The node's Fibre Channel HBAs, in the order of their SCSI hosts.
    async fn hbas(&self) -> Result<Vec<Hba>, Error> {
        Ok(Vec::new())
    }

    /// How attached volumes are, in the order asked for. Cheap: no program is run, nothing is scanned
    /// or rescanned, and multipathd is asked once at most.
    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>>;

    /// Has every path of an attached volume read anew and proves and compares them; `expected` is the
    /// size that it must have by now. Nothing else is changed: neither the map nor the device's size
    /// as it was handed out. A path that is down, or of another size, is an error that names it.
    async fn measure(
        &self,
        owner: &VolumeKey,
        source: &Source,
        expected: Option<u64>,
    ) -> Result<Measured, Error>;

    /// Grows the map to `size`, which all its paths were measured to have, and notes that. Of a single
    /// path there is only the note.
    async fn grow(
        &self,
        owner: &VolumeKey,
        source: &Source,
        size: u64,
    ) -> Result<Outcome<Attachment>, Error>;

    /// Tells, from now on, which attached volumes may have changed.
    fn changes(&self) -> broadcast::Receiver<Arc<Touched>>;

    /// Everybody in whose name something is held on this node, to find what nobody wants any more.
    async fn owners(&self) -> Result<Vec<VolumeKey>, Error>;
}
