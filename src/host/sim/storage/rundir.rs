//! /run/lunplug in memory, shared by all that run on the simulated node.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::host::lock::{LockError, LockGuard, RunDir, check_name};
use crate::host::sim::Faults;

/// A file operation that hangs ends after this, as on the real host.
const DEADLINE: Duration = Duration::from_secs(10);

/// One boot's files and locks.
#[derive(Debug, Default)]
pub(super) struct RunState {
    files: BTreeMap<String, Vec<u8>>,
    locks: BTreeMap<String, Arc<tokio::sync::Mutex<()>>>,
}

impl RunState {
    /// The files, for a picture of the node.
    pub(super) fn files(&self) -> &BTreeMap<String, Vec<u8>> {
        &self.files
    }
}

/// The door of one boot: what was opened before a reboot keeps the old boot's id and state.
pub(super) struct SimRunDir {
    pub(super) faults: Arc<Faults>,
    pub(super) state: Arc<Mutex<RunState>>,
    pub(super) boot_id: String,
}

struct SimLock(#[allow(dead_code)] tokio::sync::OwnedMutexGuard<()>);
impl LockGuard for SimLock {}

impl SimRunDir {
    async fn pass(&self, point: &str, detail: &str) -> io::Result<()> {
        tokio::time::timeout(DEADLINE, self.faults.pass(point, detail))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, RunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl RunDir for SimRunDir {
    async fn lock(&self, name: &str, deadline: Duration) -> Result<Box<dyn LockGuard>, LockError> {
        let io = |source| LockError::Io { name: name.to_owned(), source };
        check_name(name).map_err(io)?;
        self.pass("rundir.lock", name).await.map_err(io)?;
        let lock = self.state().locks.entry(name.to_owned()).or_default().clone();
        let timed_out = || LockError::TimedOut { name: name.to_owned(), deadline };
        let guard = if deadline.is_zero() {
            lock.try_lock_owned().map_err(|_| timed_out())?
        } else {
            tokio::time::timeout(deadline, lock.lock_owned()).await.map_err(|_| timed_out())?
        };
        Ok(Box::new(SimLock(guard)))
    }

    async fn load(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        check_name(name)?;
        self.pass("rundir.load", name).await?;
        Ok(self.state().files.get(name).cloned())
    }

    async fn store(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        check_name(name)?;
        self.pass("rundir.store", name).await?;
        self.state().files.insert(name.to_owned(), bytes.to_vec());
        Ok(())
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        self.pass("rundir.remove", name).await?;
        self.state().files.remove(name);
        Ok(())
    }

    async fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        check_name(dir)?;
        self.pass("rundir.list", dir).await?;
        let state = self.state();
        let below = |path: &String| {
            let rest = path.strip_prefix(dir)?.strip_prefix('/')?;
            (!rest.contains('/')).then(|| rest.to_owned())
        };
        Ok(state.files.keys().filter_map(below).collect())
    }

    fn boot_id(&self) -> &str {
        &self.boot_id
    }
}
