//! OFD locks and small state files under /run/lunplug.

mod real;
mod temporary;

use std::io;
use std::time::Duration;

use async_trait::async_trait;

pub use real::RealRunDir;
pub(in crate::host) use real::set_lock;

/// A lock that is held; dropping it releases it.
pub trait LockGuard: Send + Sync {}

/// A lock could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else had it until the deadline.
    #[error("lock {name} was held by someone else for {deadline:?}")]
    TimedOut {
        /// The lock's name.
        name: String,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// The lock file could not be made or locked.
    #[error("lock {name} could not be taken")]
    Io {
        /// The lock's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The door to this boot's shared state: locks and files that a node daemon and sidecars share.
/// Names are relative, of `[A-Za-z0-9._:-]` and `/`.
#[async_trait]
pub trait RunDir: Send + Sync {
    /// Takes the lock `name` (an OFD write lock, so that threads and processes exclude each other).
    /// A `deadline` of zero tries once.
    async fn lock(&self, name: &str, deadline: Duration) -> Result<Box<dyn LockGuard>, LockError>;

    /// A file's bytes; `None` when it is not there.
    async fn load(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// The same of several files, in their order: read one after the other, with a single trip to where files are read.
    async fn load_each(&self, names: &[String]) -> Vec<io::Result<Option<Vec<u8>>>> {
        let mut loaded = Vec::with_capacity(names.len());
        for name in names {
            loaded.push(self.load(name).await);
        }
        loaded
    }

    /// Writes a file whole (temporary file and rename, mode 0600, no fsync: it lives for this boot).
    async fn store(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Removes a file; absent is fine.
    async fn remove(&self, name: &str) -> io::Result<()>;

    /// The names of the files in a directory, sorted; an absent directory is empty.
    async fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// The kernel's boot id; what was written under another one is void.
    fn boot_id(&self) -> &str;
}

/// Refuses a name that is not relative, or not of `[A-Za-z0-9._-]` and `/`: `InvalidInput`.
pub(super) fn check_name(name: &str) -> io::Result<()> {
    let part = |p: &str| {
        !p.is_empty()
            && p != "."
            && p != ".."
            && p.bytes().all(|c| c.is_ascii_alphanumeric() || b"._:-".contains(&c))
    };
    if name.split('/').all(part) {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!(
            "run file name {name:?}: use relative paths of A-Z, a-z, 0-9, '.', '_', ':' and '-'"
        ),
    ))
}
