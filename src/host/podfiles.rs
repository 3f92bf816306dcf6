//! Files of the host's that are seen in a pod's hotplug directory.

#[cfg(test)]
mod container;
mod mount;
mod open;
mod real;

use std::io;
use std::path::PathBuf;

use async_trait::async_trait;

use super::local::{HostFile, SourceError};
use super::nodes::{NodeError, NodeOwner};
use super::poddir::{HotplugDir, Inode};
use super::procs::ProcessId;
use crate::reason::Reason;
use crate::types::{Outcome, VolumeName};

pub use real::HostPodFiles;

/// A pod's hotplug directory from both sides.
#[derive(Debug, Clone)]
pub struct InPod {
    /// On the host.
    pub hotplug: HotplugDir,
    /// As the process sees it.
    pub dir_in_pod: PathBuf,
    /// The process in whose mount namespace files are seen.
    pub process: ProcessId,
}

/// How QEMU will open a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenAs {
    /// Its user.
    pub user: NodeOwner,
    /// To write, too.
    pub write: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
}

/// A file could not be shown in a pod, or taken from it.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The place in the pod's directory.
    #[error("the file's place in the pod cannot be used")]
    Place(#[source] NodeError),
    /// The file itself.
    #[error("the file cannot be shown in the pod")]
    Source(#[source] SourceError),
    /// Somebody has it open there.
    #[error(
        "{name} in {dir} is still open in the pod: fuser or lsof in its container tell by whom"
    )]
    Busy {
        /// The directory.
        dir: String,
        /// The file's name there.
        name: String,
    },
    /// QEMU's user may not have it.
    #[error("{} cannot be opened for {how} by QEMU's user {}:{}", .path.display(), .user.uid, .user.gid)]
    NoAccess {
        /// The file.
        path: PathBuf,
        /// For what.
        how: &'static str,
        /// The user.
        user: NodeOwner,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its file system has no direct I/O.
    #[error("the file system of {} has no direct I/O, which cache none needs: give cache writethrough or writeback", .0.display())]
    NoDirect(PathBuf),
    /// A call failed.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl From<io::Error> for FileError {
    fn from(source: io::Error) -> Self {
        Self::Io { what: "work on a file in the pod", source }
    }
}

impl FileError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Place(error) => crate::devnode::reason_of(error),
            Self::Source(SourceError::NotThere(_) | SourceError::Other { .. }) => {
                Reason::SourceNotFound
            }
            Self::Source(SourceError::Leaves { .. } | SourceError::Symlink { .. }) => {
                Reason::SourceNotAllowed
            }
            Self::Busy { .. } | Self::Source(SourceError::Exchanged(_)) => Reason::DeviceHeld,
            Self::NoAccess { .. } | Self::NoDirect(_) => Reason::FileNotAccessible,
            Self::Io { source, .. } | Self::Source(SourceError::Io { source, .. }) => {
                match source.kind() {
                    io::ErrorKind::TimedOut => Reason::DeadlineExceeded,
                    _ => Reason::HostIoFailed,
                }
            }
        }
    }
}

/// What became of a file in a pod that was to be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// Whether there was anything.
    pub outcome: Outcome,
    /// Somebody had it open there, and has it still.
    pub was_open: bool,
}

/// The door to files in pods.
#[async_trait]
pub trait PodFiles: Send + Sync {
    /// Whether QEMU will be able to open the file: the kernel is asked as its user.
    async fn may_open(&self, file: &HostFile, how: OpenAs) -> Result<(), FileError>;

    /// Sees to it that the process sees the file by that name. What else has the name is replaced, as by
    /// [`Nodes::ensure`](super::nodes::Nodes::ensure).
    async fn ensure(
        &self,
        at: &InPod,
        name: &VolumeName,
        file: &HostFile,
        read_only: bool,
    ) -> Result<Outcome, FileError>;

    /// Whether the process sees that file by that name.
    async fn is_seen(&self, at: &InPod, name: &VolumeName, file: Inode) -> Result<bool, FileError>;

    /// Takes a file from all of the pod's processes. `process` is one that sees it, and may be asked whether it is
    /// open there; one that is goes only by `force`. What has the name and is no file of ours stays.
    async fn remove(
        &self,
        dir: &HotplugDir,
        seen: Option<&InPod>,
        name: &VolumeName,
        force: bool,
    ) -> Result<Taken, FileError>;
}
