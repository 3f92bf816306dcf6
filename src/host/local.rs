//! What is on the host already and a volume may be: opened beneath a configured directory, by path.

mod real;

use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::host::poddir::Inode;
use crate::types::DevNum;

pub use real::RealLocalSources;
pub(in crate::host) use real::open_file;

/// What a path leads to is not what it must be.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing is there.
    #[error("{} is not there", .0.display())]
    NotThere(PathBuf),
    /// It leads out of the directory beneath which it must be.
    #[error("{} leads out of {} by a symlink: give the path that it leads to", .path.display(), .root.display())]
    Leaves {
        /// The path.
        path: PathBuf,
        /// The directory.
        root: PathBuf,
    },
    /// A symlink leads to it, where none is followed.
    #[error("{} has a symlink in it beneath {}: give the path that it leads to", .path.display(), .root.display())]
    Symlink {
        /// The path.
        path: PathBuf,
        /// The directory.
        root: PathBuf,
    },
    /// It was another file when the volume was attached.
    #[error("{} is another file than when the volume was attached", .0.display())]
    Exchanged(PathBuf),
    /// It is something else.
    #[error("{} is {is}, not {wanted}", .path.display())]
    Other {
        /// The path.
        path: PathBuf,
        /// What it is.
        is: &'static str,
        /// What it would have to be.
        wanted: &'static str,
    },
    /// It could not be opened.
    #[error("{} could not be opened", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A file on the host, to be found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    /// The configured directory beneath which it is.
    pub root: PathBuf,
    /// Its path from there.
    pub rest: PathBuf,
    /// Which file it is, whatever has its path later.
    pub inode: Inode,
}

impl HostFile {
    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.rest)
    }
}

/// A file as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSeen {
    /// Which file it is.
    pub inode: Inode,
    /// Bytes.
    pub size: u64,
    /// Its first bytes, at most [`FILE_HEAD`].
    pub head: Vec<u8>,
    /// It is on a file system that is mounted for reading only.
    pub read_only: bool,
    /// Somebody has locked it as QEMU locks the images that it has open (`RAW_LOCK_PERM_BASE` of its
    /// block/file-posix.c).
    pub locked: bool,
}

/// How many bytes of a file's beginning are read.
pub const FILE_HEAD: usize = 104;

/// The door to what is on the host.
#[async_trait]
pub trait LocalSources: Send + Sync {
    /// The number of the block device to which `rest` leads beneath `root`: by symlinks that stay beneath it,
    /// if need be. The device itself is not opened.
    async fn block(&self, root: &Path, rest: &Path) -> Result<DevNum, SourceError>;

    /// The regular file at `rest` beneath `root`; no symlink is followed beneath that.
    async fn file(&self, root: &Path, rest: &Path) -> Result<FileSeen, SourceError>;

    /// Writes out what the host has in its cache of a file.
    async fn sync(&self, file: &HostFile) -> Result<(), SourceError>;
}
