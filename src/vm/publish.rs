//! What is known of every volume, for whoever asks or watches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::broadcast;

use super::failure::Failure;
use crate::spec::{Phase, VolumeSpec, VolumeStatus};
use crate::types::{VmId, VolumeKey, VolumeName};

/// How many changes a slow watcher may lag behind before it is told to take a new list, which of a large node is as long as
/// thousands of changes: a burst of 1000 removals has four each.
const BACKLOG: usize = 4096;

/// The statuses of all volumes on this node. Clones share it.
#[derive(Debug, Clone)]
pub struct Board {
    inner: Arc<Mutex<Inner>>,
    changes: broadcast::Sender<Arc<VolumeStatus>>,
}

#[derive(Debug, Default)]
struct Inner {
    vms: BTreeMap<VmId, BTreeMap<VolumeName, Arc<VolumeStatus>>>,
    /// One counter for all volumes: it keeps growing when a name is removed and added again.
    generation: u64,
}

impl Inner {
    fn of(&self, vm: &VmId, volume: &VolumeName) -> Option<&Arc<VolumeStatus>> {
        self.vms.get(vm)?.get(volume)
    }

    fn put(&mut self, key: &VolumeKey, status: Arc<VolumeStatus>) {
        if let Some(volumes) = self.vms.get_mut(&key.vm) {
            volumes.insert(key.volume.clone(), status);
        } else {
            self.vms.insert(key.vm.clone(), BTreeMap::from([(key.volume.clone(), status)]));
        }
    }

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
        inner.put(key, shared.clone());
        self.send(shared);
        status
    }

    /// Changes a volume's status. Time and generation are kept here; a volume that is not on the
    /// board (its VM was unregistered meanwhile) is left off it.
    pub fn update(&self, key: &VolumeKey, change: impl FnOnce(&mut VolumeStatus)) {
        let mut inner = self.lock();
        let Some(before) = inner.of(&key.vm, &key.volume) else { return };
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
        inner.put(key, shared.clone());
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
        let mut inner = self.lock();
        if let Some(volumes) = inner.vms.get_mut(&key.vm) {
            volumes.remove(&key.volume);
            if volumes.is_empty() {
                inner.vms.remove(&key.vm);
            }
        }
    }

    /// One volume.
    pub fn get(&self, key: &VolumeKey) -> Option<VolumeStatus> {
        self.lock().of(&key.vm, &key.volume).map(|status| VolumeStatus::clone(status))
    }

    /// A volume's phase.
    pub fn phase_of(&self, vm: &VmId, volume: &VolumeName) -> Option<Phase> {
        self.lock().of(vm, volume).map(|status| status.phase)
    }

    /// The phases of many volumes of a VM, which are named in order.
    pub fn phases<'a>(
        &self,
        vm: &VmId,
        names: impl Iterator<Item = &'a VolumeName>,
    ) -> Vec<Option<Phase>> {
        let inner = self.lock();
        let mut there = inner.vms.get(vm).into_iter().flatten().peekable();
        let phase = |name| {
            while there.next_if(|(known, _)| *known < name).is_some() {}
            there.next_if(|(known, _)| *known == name).map(|(_, status)| status.phase)
        };
        names.map(phase).collect()
    }

    /// How many volumes there are.
    pub fn count(&self) -> usize {
        self.lock().vms.values().map(BTreeMap::len).sum()
    }

    /// All volumes, or those of one VM, ordered by VM and name.
    pub fn list(&self, vm: Option<&VmId>) -> Vec<Arc<VolumeStatus>> {
        let inner = self.lock();
        match vm {
            Some(vm) => inner.vms.get(vm).into_iter().flat_map(BTreeMap::values).cloned().collect(),
            None => inner.vms.values().flat_map(BTreeMap::values).cloned().collect(),
        }
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
        let of = |names: &[&str]| {
            let names: Vec<VolumeName> = names.iter().map(|name| name.parse().unwrap()).collect();
            board.phases(&key().vm, names.iter())
        };
        assert_eq!(of(&["a", "v", "w"]), [None, Some(Phase::Failed), None]);
        board.open(&key(), &volume_fixture("v").into());
        board.close(&key());
        assert_eq!(of(&["a", "v"]), [None, None]);
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
