//! libvirt: connections, calls on a domain, and its events.
//!
//! ```text
//! Hypervisor::connect ──> Connection ──┬─ calls:  one worker thread each, bounded, with a deadline
//!                                      └─ events: one event-loop thread for the whole process
//! ```
//!
//! A call that does not return within its deadline is abandoned, keeps its place among the
//! connection's workers, and is counted ([`Connection::stuck_calls`]); when all places are taken by
//! such calls, further ones fail at once with [`LibvirtError::TimedOut`] while other connections go
//! on. Worker threads are detached: none holds up the end of the process. A connection that
//! [`Connection::is_alive`] denies is to be made anew; with a libvirt client library before 10.4 that
//! is so after any call that timed out (CVE-2024-4418, see `real`).
//!
//! A change of a device that was abandoned may still come about: [`Connection::landed`] tells when
//! that is over. It holds for this process's own calls on connections that live. A libvirtd that hung
//! while its client went away carries out what it had received once it goes on; see `vm::detach` for
//! how that is made harmless.
//!
//! All that libvirt needs of `unsafe` is in `ffi`.

mod domains;
mod error;
mod events;
mod ffi;
mod inflight;
mod real;
mod shared;
mod workers;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::types::IoLimits;

pub use error::LibvirtError;
pub use events::{DomainEvent, DomainEvents, EventSender, Lifecycle};
pub(in crate::host) use inflight::{Flight, InFlight};
pub use real::RealHypervisor;
pub use shared::Shared;

/// Which of libvirt's two instances answers at a socket: this decides the path of the URI. The
/// daemon refuses a client that asks for the other, so this is what is tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Instance {
    /// The privileged one, `qemu:///system`.
    System,
    /// That of an unprivileged user, `qemu:///session`.
    Session,
}

impl Instance {
    /// As it stands in a URI.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Session => "session",
        }
    }

    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::System => Self::Session,
            Self::Session => Self::System,
        }
    }
}

/// How to get at the socket.
#[derive(Debug, Clone)]
pub enum Socket {
    /// A path on the host that may be trusted.
    Path(PathBuf),
    /// The socket itself, opened with `O_PATH` beneath a pod's root: connecting goes through
    /// `/proc/self/fd`, so that what the pod does to the path later does not matter.
    Opened(Arc<OwnedFd>),
    /// A whole URI, for libvirt's built-in `test:///default`.
    Uri(String),
}

/// A libvirt to connect to.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// What people call it, for errors and logs (the socket's path in the pod). The simulated
    /// hypervisor finds its libvirt by it alone.
    pub name: String,
    /// How to get at it.
    pub socket: Socket,
    /// Which instance is expected there; the other is tried when it says that it is that one.
    pub instance: Instance,
}

impl Endpoint {
    /// A trusted path on the host.
    pub fn path(path: impl Into<PathBuf>, instance: Instance) -> Self {
        let path = path.into();
        Self { name: path.display().to_string(), socket: Socket::Path(path), instance }
    }

    /// A socket that was opened beneath a pod's root.
    pub fn opened(name: impl Into<String>, socket: Arc<OwnedFd>, instance: Instance) -> Self {
        Self { name: name.into(), socket: Socket::Opened(socket), instance }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// What a domain does (`virDomainState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// QEMU runs and the guest with it.
    Running,
    /// QEMU runs, the guest is held (paused, suspended to memory, crashed but kept).
    Paused,
    /// No QEMU (shut off, or about to be).
    Shutoff,
}

/// What has the domain to itself for longer (`virDomainJobOperation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// To or from another host.
    Migration,
    /// `virDomainBackupBegin`.
    Backup,
    /// A snapshot is made, reverted to or deleted.
    Snapshot,
    /// Save, restore, dump, or one that we do not know.
    Other,
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Migration => "a migration",
            Self::Backup => "a backup",
            Self::Snapshot => "a snapshot",
            Self::Other => "a save, restore or dump",
        })
    }
}

/// A domain at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainInfo {
    /// What it does.
    pub state: DomainState,
    /// Whether it has a persistent definition (a transient one is gone when it stops).
    pub persistent: bool,
    /// What has it to itself, if anything.
    pub job: Option<Job>,
    /// It is paused because an I/O of the guest's failed (`VIR_DOMAIN_PAUSED_IOERROR`).
    pub io_error: bool,
}

/// Which of a domain's two definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Definition {
    /// The running one (`VIR_DOMAIN_AFFECT_LIVE`).
    Live,
    /// The persistent one (`VIR_DOMAIN_AFFECT_CONFIG`, `VIR_DOMAIN_XML_INACTIVE`).
    Config,
}

/// What a change affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affect {
    /// The running domain.
    pub live: bool,
    /// The persistent definition.
    pub config: bool,
}

impl Affect {
    /// The running domain alone.
    pub const LIVE: Self = Self { live: true, config: false };
    /// The persistent definition alone.
    pub const CONFIG: Self = Self { live: false, config: true };
}

/// What becomes of an I/O thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoThread {
    /// It is added.
    Add,
    /// It is removed.
    Remove,
}

/// What becomes of a drive's medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// One is put in.
    Insert,
    /// It is taken out, unless the guest has locked the tray.
    Eject,
    /// Also then (`VIR_DOMAIN_DEVICE_MODIFY_FORCE`).
    EjectByForce,
}

/// Calls that change a domain's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// Those that add something alone: [`Connection::attach_device`], an insert, an added I/O thread.
    Attach,
    /// Those that remove something too.
    All,
}

/// A libvirt version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// The door to libvirt.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// Connects, sets keepalive and subscribes to the events of all domains there.
    async fn connect(
        &self,
        endpoint: &Endpoint,
        deadline: Duration,
    ) -> Result<Arc<dyn Connection>, LibvirtError>;

    /// Calls at any connection that were abandoned and have not returned yet.
    fn stuck_calls(&self) -> usize;
}

/// One connection. Domains are named; a name is looked up anew in each call, so that a domain that
/// was made again under its name is never mistaken for the old one's handle.
#[async_trait]
pub trait Connection: Send + Sync {
    /// The daemon's version.
    async fn version(&self, deadline: Duration) -> Result<Version, LibvirtError>;

    /// The domain at a glance; `None` when there is none of that name.
    async fn info(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainInfo>, LibvirtError>;

    /// Only what it does, which is half as many calls of libvirt's.
    async fn state(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainState>, LibvirtError>;

    /// One of the domain's definitions, as XML.
    async fn xml(
        &self,
        domain: &str,
        definition: Definition,
        deadline: Duration,
    ) -> Result<String, LibvirtError>;

    /// Adds a device (`virDomainAttachDeviceFlags`), which `landed` knows as `device`.
    async fn attach_device(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// Asks for a device to be removed (`virDomainDetachDeviceAlias`). Success means that it was
    /// asked for; that it is gone is told by [`DomainEvent::DeviceRemoved`], or by
    /// [`LibvirtError::DeviceMissing`] of a further call.
    async fn detach_alias(
        &self,
        domain: &str,
        alias: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// Changes the medium of a drive of the running domain (`virDomainUpdateDeviceFlags`), which `landed` knows
    /// as `device`; `xml` is the whole of the drive. libvirt asks a guest that has locked the tray to open
    /// it and waits 5 s for that (`CHANGE_MEDIA_TIMEOUT`): [`LibvirtError::TrayLocked`].
    async fn update_drive(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        how: Medium,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// How many bytes of a disk QEMU shows to the guest (`virDomainGetBlockInfo`, capacity: QEMU's
    /// `virtual-size`, which stays what it was when the device grows; `physical` follows at once. Seen
    /// with libvirt 11.3 and QEMU 10.0). The disk is named by its source as the XML has it.
    async fn block_capacity(
        &self,
        domain: &str,
        source: &str,
        deadline: Duration,
    ) -> Result<u64, LibvirtError>;

    /// Has QEMU take over a disk's new size and tell the guest (`virDomainBlockResize`). Of a block
    /// device nothing is changed but what QEMU thinks of it, and only the size that it has is accepted;
    /// so a call that was given up on does no harm when it comes late.
    async fn block_resize(
        &self,
        domain: &str,
        source: &str,
        bytes: u64,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// Sets how much I/O the guest may do on a disk, all of it (`virDomainSetBlockIoTune`); 0 lifts a
    /// limit. The disk is named by its source as the XML has it.
    async fn set_io_limits(
        &self,
        domain: &str,
        source: &str,
        limits: &IoLimits,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// Adds an I/O thread (`virDomainAddIOThread`) for the device that `landed` knows as `device`; an
    /// error where there is one of that id. Or removes it (`virDomainDelIOThread`):
    /// [`LibvirtError::DeviceMissing`] where there is none, [`LibvirtError::IoThreadUsed`] where a device
    /// has it.
    async fn change_io_thread(
        &self,
        domain: &str,
        device: &str,
        id: u32,
        how: IoThread,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// Waits until no such call of this process for that device is in flight, given up on or not;
    /// [`LibvirtError::InFlight`] when there still is one after `deadline`.
    async fn landed(
        &self,
        domain: &str,
        device: &str,
        calls: Calls,
        deadline: Duration,
    ) -> Result<(), LibvirtError>;

    /// Sends one command to the guest agent and returns its answer, both JSON.
    async fn agent_command(
        &self,
        domain: &str,
        command: &str,
        deadline: Duration,
    ) -> Result<String, LibvirtError>;

    /// Subscribes to a domain's events; what happens after this call is not missed.
    fn events(&self, domain: &str) -> DomainEvents;

    /// Whether it is still connected, as far as libvirt noticed.
    fn is_alive(&self) -> bool;

    /// Calls that were abandoned and have not returned yet.
    fn stuck_calls(&self) -> usize;
}
