//! The doors to device grants: one for each cgroup version.

use std::fmt;
use std::io;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::types::{DevNum, Outcome};

/// Which version of cgroups decides over a process's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hierarchy {
    /// The `devices` controller of cgroup v1.
    V1,
    /// Device programs (BPF) of cgroup v2.
    V2,
}

/// One cgroup directory. The identity guards against another cgroup of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CgroupRef {
    /// The directory, absolute, as this process sees it.
    pub path: PathBuf,
    /// Whose rules apply.
    pub hierarchy: Hierarchy,
    /// The directory's inode number, which on v2 is the kernel's cgroup id. Never reused while the
    /// host runs.
    pub id: u64,
}

impl fmt::Display for CgroupRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// What may be done with a device. mknod is never granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Access {
    /// Open for reading.
    pub read: bool,
    /// Open for writing.
    pub write: bool,
}

impl Access {
    /// Neither.
    pub const NONE: Self = Self { read: false, write: false };
    /// For a read-only volume.
    pub const READ: Self = Self { read: true, write: false };
    /// For every other.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    /// What `self` has and `other` lacks.
    pub fn without(self, other: Self) -> Self {
        Self { read: self.read && !other.read, write: self.write && !other.write }
    }

    /// What either has.
    pub fn with(self, other: Self) -> Self {
        Self { read: self.read || other.read, write: self.write || other.write }
    }

    /// Whether everything in `other` is in `self`.
    pub fn covers(self, other: Self) -> bool {
        other.without(self) == Self::NONE
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.read, self.write) {
            (true, true) => "rw",
            (true, false) => "r",
            (false, true) => "w",
            (false, false) => "-",
        })
    }
}

/// A grant could not be made, withdrawn or read.
#[derive(Debug, thiserror::Error)]
pub enum GrantStoreError {
    /// The kernel lacks the helpers of the override program.
    #[error("the kernel does not load lunplug's device program: {log}")]
    KernelTooOld {
        /// The last line of the verifier's log, or why there is none.
        log: String,
        /// What the load failed with.
        #[source]
        source: io::Error,
    },
    /// No mount of the host's whole cgroup2 hierarchy is to be seen.
    #[error(
        "the host's cgroup2 root is not mounted here (a private cgroup namespace shows only a part of it); mount it, or run with the host's"
    )]
    NoRoot,
    /// The cgroup is gone, or another has its name.
    #[error("cgroup {} is gone", .0.display())]
    Gone(PathBuf),
    /// The directory is one that must never be granted anything.
    #[error("cgroup {} may not be granted devices: {why}", .path.display())]
    Refused {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A program of our name is attached whose map has another shape.
    #[error(
        "program {id} at the cgroup root is of another lunplug whose map differs; uninstall that one first"
    )]
    OtherShape {
        /// The kernel's id of the program.
        id: u32,
    },
    /// The kernel refused.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl From<io::Error> for GrantStoreError {
    fn from(source: io::Error) -> Self {
        Self::Io { what: "device grant".into(), source }
    }
}

/// The override program as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OverrideStatus {
    /// The kernel's id of our program at the root.
    pub program: u32,
    /// Programs of others that run after ours at the root and can therefore overrule it; a
    /// deliberate policy perhaps: reported, never removed.
    pub after_ours: Vec<u32>,
}

/// One entry of the override program's map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The cgroup's id.
    pub cgroup: u64,
    /// The device.
    pub dev: DevNum,
    /// What is allowed.
    pub access: Access,
    /// The cgroup's directory; `None` when the cgroup is gone.
    pub path: Option<PathBuf>,
}

/// The door to the override program of cgroup v2 (see docs/adr and [`crate::host::bpf`]).
#[async_trait]
pub trait Overrides: Send + Sync {
    /// Finds our program at the host's cgroup2 root, or loads and attaches it. Its map, and with it
    /// all grants, is shared by everybody on this host who calls this.
    async fn install(&self) -> Result<Outcome<OverrideStatus>, GrantStoreError>;

    /// Puts a grant; one for the same cgroup and device is replaced.
    async fn put(
        &self,
        cgroup: &CgroupRef,
        dev: DevNum,
        access: Access,
    ) -> Result<Outcome, GrantStoreError>;

    /// Takes a grant away; an absent one (or an absent program) is fine.
    async fn take(&self, cgroup: u64, dev: DevNum) -> Result<Outcome, GrantStoreError>;

    /// What a cgroup is granted for each of `devs`: looked up one by one, so cheap however many there
    /// are in all. Nothing when the program is not installed.
    async fn look_up(&self, cgroup: u64, devs: &[DevNum]) -> Result<Vec<Access>, GrantStoreError>;

    /// All grants, those of dead cgroups too; empty when the program is not installed.
    async fn entries(&self) -> Result<Vec<Entry>, GrantStoreError>;

    /// Detaches our program, with all grants.
    async fn uninstall(&self) -> Result<Outcome, GrantStoreError>;
}

/// Bits to be added to one group's device list of cgroup v1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListChange {
    /// The group.
    pub cgroup: CgroupRef,
    /// The bits that it lacks.
    pub added: Access,
}

/// The door to the device lists of cgroup v1.
#[async_trait]
pub trait DeviceLists: Send + Sync {
    /// What the group and its parents lack for `access` to `dev`, parents first; empty when nothing.
    async fn missing(
        &self,
        cgroup: &CgroupRef,
        dev: DevNum,
        access: Access,
    ) -> Result<Vec<ListChange>, GrantStoreError>;

    /// Adds bits to one group's list.
    async fn allow(&self, change: &ListChange, dev: DevNum) -> Result<Outcome, GrantStoreError>;

    /// Takes bits from one group's list; the kernel takes them from its child groups too. With
    /// `spare_children` nothing is done while a child group still lists the device. A group that is
    /// gone, or that allows everything, is left.
    async fn deny(
        &self,
        change: &ListChange,
        dev: DevNum,
        spare_children: bool,
    ) -> Result<Outcome, GrantStoreError>;

    /// What the group's list has for `dev`.
    async fn allowed(&self, cgroup: &CgroupRef, dev: DevNum) -> Result<Access, GrantStoreError>;
}
