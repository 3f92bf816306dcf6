//! What is on the host already and a volume may be: opened beneath a configured directory, by path.

mod real;

use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use crate::types::DevNum;

pub use real::RealLocalSources;

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

/// The door to what is on the host.
#[async_trait]
pub trait LocalSources: Send + Sync {
    /// The number of the block device to which `rest` leads beneath `root`: by symlinks that stay beneath it,
    /// if need be. The device itself is not opened.
    async fn block(&self, root: &Path, rest: &Path) -> Result<DevNum, SourceError>;
}
