//! Faults to order: at any door, on any call, an error or a call that never returns.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::host::killpoint::KillPoints;
use crate::step::KillPoint;

/// What happens at the door.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultAction {
    /// The call fails with this text.
    Fail(String),
    /// The call never returns: its caller's deadline has to end it.
    Hang,
    /// The call waits until the fault is cleared, then goes on.
    Stall,
}

/// One fault: the calls that it meets, and what happens to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The door and call, e.g. `sysfs.write` or `libvirt.attach`; empty for every door.
    #[serde(default)]
    pub point: String,
    /// Only calls whose detail (path, arguments, alias) contains this.
    #[serde(default)]
    pub detail: String,
    /// How many matching calls pass before the first that is met.
    #[serde(default)]
    pub skip: u32,
    /// How many calls are met; `None` means all from then on.
    #[serde(default)]
    pub times: Option<u32>,
    /// What happens to them.
    pub action: FaultAction,
}

/// The faults in force, shared by all doors of one simulated host.
#[derive(Debug, Default)]
pub struct Faults {
    active: Mutex<Vec<Fault>>,
    changed: tokio::sync::Notify,
    calls: AtomicUsize,
    met: Mutex<Option<String>>,
    reached: Mutex<VecDeque<KillPoint>>,
    meeting: tokio::sync::Notify,
}

impl Faults {
    /// Puts a fault in force.
    pub fn inject(&self, fault: Fault) {
        self.lock().push(fault);
    }

    /// Ends all faults; stalled calls go on, and what was met is forgotten.
    pub fn clear(&self) {
        self.lock().clear();
        *self.met.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.changed.notify_waiters();
    }

    /// How many calls came to any door so far.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    /// The call that a fault met last, as `point detail`.
    pub fn met(&self) -> Option<String> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns when a fault meets a call.
    pub async fn meeting(&self) {
        self.meeting.notified().await;
    }

    /// The kill points that were reached since the last call of this, in their order; the last ones,
    /// where nobody asked for long.
    pub fn reached(&self) -> Vec<KillPoint> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }

    /// Called by every simulated door before it does anything: returns at once, fails, or hangs.
    pub async fn pass(&self, point: &str, detail: &str) -> io::Result<()> {
        match self.meet(point, detail) {
            None => Ok(()),
            Some(action) => self.keep(action).await,
        }
    }

    /// The same for one who cannot wait: what is to happen to the call.
    pub(super) fn meet(&self, point: &str, detail: &str) -> Option<FaultAction> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.take(point, detail)
    }

    /// Lets it happen.
    pub(super) async fn keep(&self, action: FaultAction) -> io::Result<()> {
        match action {
            FaultAction::Fail(text) => Err(io::Error::other(text)),
            FaultAction::Hang => std::future::pending().await,
            FaultAction::Stall => {
                self.changed.notified().await;
                Ok(())
            }
        }
    }

    /// The same, but that a call that hangs returns with an error when the faults are cleared: for
    /// doors at which somebody waits for it to be over.
    pub async fn pass_or_end(&self, point: &str, detail: &str) -> io::Result<()> {
        let cleared = self.changed.notified();
        tokio::select! {
            biased;
            passed = self.pass(point, detail) => passed,
            () = cleared => Err(io::Error::other("the call hung and was given up")),
        }
    }

    fn take(&self, point: &str, detail: &str) -> Option<FaultAction> {
        for fault in self.lock().iter_mut() {
            let named = fault.point == point || fault.point.is_empty() && point != KILL;
            if !named || !detail.contains(&fault.detail) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                continue;
            }
            match &mut fault.times {
                Some(0) => continue,
                Some(n) => *n -= 1,
                None => {}
            }
            *self.met.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(format!("{point} {detail}"));
            self.meeting.notify_one();
            return Some(fault.action.clone());
        }
        None
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Fault>> {
        // A poisoned list of faults is still a list of faults.
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The point of a fault that is to meet a kill point, whose name is the detail; no door, so only a
/// fault that names it meets it.
const KILL: &str = "kill";

/// How many kill points are remembered: more than a test asks for at once.
const REACHED: usize = 4096;

/// A fault that hangs here stands for the process's end, once its life is dropped.
#[async_trait]
impl KillPoints for Faults {
    async fn reach(&self, point: KillPoint) {
        {
            let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
            if reached.len() == REACHED {
                reached.pop_front();
            }
            reached.push_back(point);
        }
        if self.take(KILL, &point.to_string()).is_some() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_fault_meets_the_calls_it_names_and_no_other() {
        let faults = Faults::default();
        faults.inject(Fault {
            point: "sysfs.write".into(),
            detail: "scan".into(),
            skip: 1,
            times: Some(1),
            action: FaultAction::Fail("no".into()),
        });
        assert!(faults.pass("sysfs.write", "host1/scan").await.is_ok(), "the first is skipped");
        assert!(faults.pass("sysfs.write", "device/delete").await.is_ok(), "another detail");
        assert!(faults.pass("sysfs.read", "host1/scan").await.is_ok(), "another door");
        assert!(faults.pass("sysfs.write", "host1/scan").await.is_err());
        assert!(faults.pass("sysfs.write", "host1/scan").await.is_ok(), "it was for one call");
    }
}
