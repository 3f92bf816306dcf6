//! What is known of every volume, for whoever asks or watches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::broadcast;

use super::failure::Failure;
use crate::spec::{Phase, VolumeSpec, VolumeStatus};
use crate::types::{VmId, VolumeKey};

/// How many changes a slow watcher may lag behind before it is told to take a new list.
const BACKLOG: usize = 1024;

/// The statuses of all volumes on this node. Clones share it.
#[derive(Debug, Clone)]
pub struct Board {
    inner: Arc<Mutex<Inner>>,
    changes: broadcast::Sender<Arc<VolumeStatus>>,
}

#[derive(Debug, Default)]
struct Inner {
    volumes: BTreeMap<VolumeKey, Arc<VolumeStatus>>,
    /// One counter for all volumes: it keeps growing when a name is removed and added again.
    generation: u64,
}

impl Inner {
    fn next(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }
}

impl Default for Board {
    fn default() -> Self {
        Self { inner: Arc::default(), changes: broadcast::channel(BACKLOG).0 }
    }
}

impl Board {
    /// Puts a volume on the board, or starts it anew.
    pub fn open(&self, key: &VolumeKey, spec: &Arc<VolumeSpec>) -> VolumeStatus {
        let mut inner = self.lock();
        let status = VolumeStatus { generation: inner.next(), ..blank(key, spec) };
        let shared = Arc::new(status.clone());
        inner.volumes.insert(key.clone(), shared.clone());
        self.send(shared);
        status
    }

    /// Changes a volume's status. Time and generation are kept here; a volume that is not on the
    /// board (its VM was unregistered meanwhile) is left off it.
    pub fn update(&self, key: &VolumeKey, change: impl FnOnce(&mut VolumeStatus)) {
        let mut inner = self.lock();
        let Some(before) = inner.volumes.get(key) else { return };
        let mut status = VolumeStatus::clone(before);
        change(&mut status);
        if status == **before {
            return;
        }
        if status.phase != before.phase {
            status.since = Timestamp::now();
        }
        status.generation = inner.next();
        let shared = Arc::new(status);
        inner.volumes.insert(key.clone(), shared.clone());
        self.send(shared);
    }

    /// The volume came to a phase, and all is well.
    pub fn phase(&self, key: &VolumeKey, phase: Phase) {
        self.update(key, |status| {
            status.phase = phase;
            status.reason = None;
            status.message.clear();
            status.retry_at = None;
        });
    }

    /// The volume is in a phase with a trouble.
    pub fn trouble(
        &self,
        key: &VolumeKey,
        phase: Phase,
        failure: &Failure,
        retry_at: Option<Timestamp>,
    ) {
        self.update(key, |status| {
            status.phase = phase;
            status.reason = Some(failure.reason);
            status.message.clone_from(&failure.message);
            status.retry_at = retry_at;
        });
    }

    /// A removal gave up on these.
    pub fn gave_up(&self, key: &VolumeKey, what: &[String]) {
        self.update(key, |status| {
            for what in what {
                if !status.gave_up.contains(what) {
                    status.gave_up.push(what.clone());
                }
            }
        });
    }

    /// Nothing of the volume is left: watchers see `Gone`, and it is off the board.
    pub fn close(&self, key: &VolumeKey) {
        self.phase(key, Phase::Gone);
        self.lock().volumes.remove(key);
    }

    /// One volume.
    pub fn get(&self, key: &VolumeKey) -> Option<VolumeStatus> {
        self.lock().volumes.get(key).map(|status| VolumeStatus::clone(status))
    }

    /// A volume's phase.
    pub fn phase_of(&self, key: &VolumeKey) -> Option<Phase> {
        self.lock().volumes.get(key).map(|status| status.phase)
    }

    /// How many volumes there are.
    pub fn len(&self) -> usize {
        self.lock().volumes.len()
    }

    /// All volumes, or those of one VM, ordered by VM and name.
    pub fn list(&self, vm: Option<&VmId>) -> Vec<Arc<VolumeStatus>> {
        self.lock()
            .volumes
            .values()
            .filter(|v| vm.is_none_or(|vm| v.key.vm == *vm))
            .cloned()
            .collect()
    }

    /// Every change from now on.
    pub fn watch(&self) -> broadcast::Receiver<Arc<VolumeStatus>> {
        self.changes.subscribe()
    }

    fn send(&self, status: Arc<VolumeStatus>) {
        tracing::debug!(volume = %status.key, phase = status.phase.as_str(), reason = status.reason.map(|r| r.code()), "volume changed");
        // No receiver is no error: nobody watches.
        let _ = self.changes.send(status);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every holder leaves whole statuses behind, even when it panics.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A volume's status before anything was done.
pub fn blank(key: &VolumeKey, spec: &Arc<VolumeSpec>) -> VolumeStatus {
    VolumeStatus {
        key: key.clone(),
        spec: spec.clone(),
        phase: Phase::Pending,
        reason: None,
        message: String::new(),
        since: Timestamp::now(),
        retry_at: None,
        device: None,
        target: None,
        gave_up: Vec::new(),
        vm_needs_hba: false,
        generation: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Reason;
    use crate::spec::volume_fixture;

    fn key() -> VolumeKey {
        VolumeKey { vm: "prod/a".parse().unwrap(), volume: "v".parse().unwrap() }
    }

    #[test]
    fn watchers_see_each_change_once_and_in_order() {
        let board = Board::default();
        let mut watch = board.watch();
        board.open(&key(), &volume_fixture("v").into());
        board.phase(&key(), Phase::Bound);
        board.phase(&key(), Phase::Bound);
        let failure = Failure::new(Reason::LunNotFound, "no LUN 1");
        board.trouble(&key(), Phase::Failed, &failure, None);
        board.open(&key(), &volume_fixture("v").into());
        board.close(&key());
        board.phase(&key(), Phase::Ready);
        let mut seen = Vec::new();
        while let Ok(status) = watch.try_recv() {
            seen.push((status.generation, status.phase, status.reason));
        }
        assert_eq!(
            seen,
            [
                (1, Phase::Pending, None),
                (2, Phase::Bound, None),
                (3, Phase::Failed, Some(Reason::LunNotFound)),
                (4, Phase::Pending, None),
                (5, Phase::Gone, None),
            ]
        );
        assert!(board.list(None).is_empty());
    }
}
