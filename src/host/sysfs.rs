//! Reading and writing /sys.

mod look;
mod real;

use std::io;

use async_trait::async_trait;

pub use look::{Attributes, Look, Looked, ReadError, View};
pub use real::RealSysfs;

/// A condition on an attribute, checked between opening a file and writing to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// The attribute's path below /sys.
    pub path: String,
    /// What it must hold, compared without surrounding white space.
    pub expect: String,
}

/// What came of a guarded write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Guarded {
    /// All guards held and the value was written.
    Written {
        /// The device that the attribute is of was not there any more right after it.
        gone: bool,
    },
    /// A guard did not hold; nothing was written.
    Refused {
        /// The guard that did not hold.
        guard: Guard,
        /// What was found; `None` when the attribute is not there.
        found: Option<String>,
    },
}

/// The door to /sys. Paths are relative to it and have no leading slash.
#[async_trait]
pub trait Sysfs: Send + Sync {
    /// An attribute's bytes, as they are. `NotFound` when the device is not there.
    async fn read(&self, path: &str) -> io::Result<Vec<u8>>;

    /// The names in a directory, sorted. `NotFound` when it is not there.
    async fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// The path with all symlinks followed, relative to /sys.
    async fn resolve(&self, path: &str) -> io::Result<String>;

    /// What `<dyn Sysfs>::look` is made of.
    async fn look_with(&self, about: &str, look: Look) -> Looked;

    /// Writes a value in one write(2). The kernel may work on it for long (scan, rescan, delete):
    /// the call then fails with `TimedOut` and what it does late is for the caller to claim.
    async fn write(&self, path: &str, value: &str) -> io::Result<()>;

    /// Opens `path`, then checks `guards`, then writes through the descriptor opened first, so that
    /// a name that was given to another device in between is never written to.
    async fn write_guarded(&self, path: &str, value: &str, guards: &[Guard])
    -> io::Result<Guarded>;

    /// An attribute as text without surrounding white space; `None` when it is not there (`ENOENT`,
    /// or `ENODEV`/`ENXIO` of a device that is just going).
    async fn text(&self, path: &str) -> io::Result<Option<String>> {
        match self.read(path).await {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned())),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Like [`Sysfs::list`], but an absent directory is empty.
    async fn entries(&self, dir: &str) -> io::Result<Vec<String>> {
        match self.list(dir).await {
            Err(e) if is_gone(&e) => Ok(Vec::new()),
            other => other,
        }
    }
}

/// Whether an error means that the device is not there (any more).
pub fn is_gone(error: &io::Error) -> bool {
    use nix::libc::{ENODEV, ENOENT, ENOTDIR, ENXIO};
    matches!(error.raw_os_error(), Some(ENOENT | ENODEV | ENXIO | ENOTDIR))
        || error.kind() == io::ErrorKind::NotFound
}
