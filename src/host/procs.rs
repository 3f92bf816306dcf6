//! Processes, their cgroups and what they see of the file system: by /proc, pidfd and cgroupfs.

mod cgroups;
mod real;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::grants::{CgroupRef, Hierarchy};
use super::poddir::Inode;
pub(in crate::host) use cgroups::is_gone;
pub use real::HostProcs;

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number in this process's PID namespace.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's start (field 22 of proc_pid_stat(5)).
    pub start: u64,
}

/// The cgroup that a process is in, in one hierarchy that matters for devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// v2's hierarchy, or that of v1's devices controller.
    pub hierarchy: Hierarchy,
    /// The cgroup's directory as this process sees it.
    pub dir: PathBuf,
}

/// What is known of a process, read while it was held by a pidfd: all of it is of that one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Which process.
    pub id: ProcessId,
    /// Its program's path, in its own mount namespace.
    pub exe: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its file system user id, in the host's (this process's) user namespace.
    pub uid: u32,
    /// Its file system group id.
    pub gid: u32,
    /// The cgroups it is in. A hierarchy that this process cannot see is left out.
    pub cgroups: Vec<Membership>,
}

/// A directory as a process sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirView {
    /// Which directory it is.
    pub inode: Inode,
    /// Device nodes in it cannot be opened there (MNT_NODEV).
    pub nodev: bool,
    /// Its owner by way of that mount; differs from the host's view where the mount is idmapped.
    pub uid: u32,
    /// Its group by way of that mount.
    pub gid: u32,
}

/// The door to processes and cgroups.
#[async_trait]
pub trait Procs: Send + Sync {
    /// The cgroups of a pod, found by its UID in kubelet's layout: at most one a hierarchy, that of
    /// v1's devices first.
    async fn pod_cgroups(&self, uid: &str) -> io::Result<Vec<CgroupRef>>;

    /// The cgroup at a path. `InvalidInput` when the path is none of a cgroup with device rules.
    async fn cgroup(&self, path: &Path) -> io::Result<CgroupRef>;

    /// The processes in a cgroup and below it. A 0 among them stands for one of a PID namespace that
    /// this process does not see.
    async fn members(&self, cgroup: &CgroupRef) -> io::Result<Vec<u32>>;

    /// What is known of a process; `None` when it is gone, or ended meanwhile.
    async fn inspect(&self, pid: u32) -> io::Result<Option<ProcessInfo>>;

    /// Whether that very process still runs.
    async fn is_alive(&self, id: ProcessId) -> io::Result<bool>;

    /// A directory as that process sees it: absolute in its root, symlinks followed within that.
    /// `ENOENT` when the directory is not there, `ESRCH` when the process is gone.
    async fn sees(&self, id: ProcessId, dir: &Path) -> io::Result<DirView>;

    /// The cgroups that this process itself is in.
    async fn own(&self) -> io::Result<Vec<Membership>>;

    /// Where the hierarchies are mounted.
    fn roots(&self) -> Vec<Membership>;
}
