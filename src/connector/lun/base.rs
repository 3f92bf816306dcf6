//! Locks, background tasks, and what a gathering of paths amounts to.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{oneshot, watch};
use tracing::Instrument;

use super::Luns;
use super::access::Access;
use super::transport::{Job, Transport};
use crate::connector::Attachment;
use crate::connector::error::Error;
use crate::connector::identity::IdentityError;
use crate::connector::lease::file_name;
use crate::connector::multipath::Map;
use crate::connector::scsi::ScsiPath;
use crate::connector::settings::ms;
use crate::host::lock::LockGuard;
use crate::spec::DeviceStatus;
use crate::types::VolumeKey;

impl<T: Transport> Luns<T> {
    /// One attach or detach at a time for a LUN, at all targets where it is to be had: in the order of
    /// their names, so that two volumes with some of them in common do not wait for each other.
    pub(super) async fn lun_lock(
        &self,
        targets: &[Access<T>],
    ) -> Result<Vec<Box<dyn LockGuard>>, Error> {
        let name = |t: &Access<T>| file_name(&format!("{} {}", T::lock_name(&t.target), t.lun));
        let names: BTreeSet<String> = targets.iter().map(name).collect();
        let mut locks = Vec::new();
        for name in names {
            let name = format!("luns/{name}");
            locks.push(self.doors.rundir.lock(&name, ms(self.settings.lock_ms)).await?);
        }
        Ok(locks)
    }

    /// Notes that a path is being looked for, until what is returned is dropped.
    pub(super) fn walking(&self, job: &Job<T>) -> impl Drop + Send + use<T> {
        struct Walking(watch::Sender<Vec<(VolumeKey, Arc<AtomicBool>)>>, Arc<AtomicBool>);
        impl Drop for Walking {
            fn drop(&mut self) {
                self.0.send_modify(|all| all.retain(|(_, off)| !Arc::ptr_eq(off, &self.1)));
            }
        }
        let off = job.called_off.clone();
        self.walking.send_modify(|all| all.push((job.owner.clone(), off.clone())));
        Walking(self.walking.clone(), off)
    }

    /// Calls off the walks that an earlier attach of this owner began, and lets those end that are
    /// scanning already: what they bring is in the lease then. A scan that hangs is not waited for;
    /// its own end sees to what it brings.
    pub(super) async fn await_walks(&self, owner: &VolumeKey) {
        let mut walking = self.walking.subscribe();
        for (_, off) in walking.borrow_and_update().iter().filter(|(whose, _)| whose == owner) {
            off.store(true, Ordering::Release);
        }
        let ended = walking.wait_for(|all| all.iter().all(|(whose, _)| whose != owner));
        // The sender is ours; too late is what was said above.
        let _ = tokio::time::timeout(ms(self.settings.holders_ms), ended).await;
    }

    /// Waits for work that goes on to its end also when nobody waits for it any more.
    pub(crate) async fn to_its_end<R: Send + 'static>(
        &self,
        work: impl Future<Output = Result<R, Error>> + Send + 'static,
    ) -> Result<R, Error> {
        let (report, ended) = oneshot::channel();
        let task = async move {
            let result = work.await;
            // Whoever asked may have given up.
            let _ = report.send(result);
        };
        self.background(task.in_current_span());
        ended.await.unwrap_or_else(|_| {
            let lost = io::Error::other("it ended without a result");
            Err(Error::Io { doing: "a task in the background".into(), source: lost })
        })
    }

    /// Runs a task that outlives the call that begins it.
    pub(crate) fn background(&self, task: impl Future<Output = ()> + Send + 'static) {
        struct Running(watch::Sender<usize>);
        impl Drop for Running {
            fn drop(&mut self) {
                self.0.send_modify(|n| *n -= 1);
            }
        }
        self.running.send_modify(|n| *n += 1);
        let running = Running(self.running.clone());
        tokio::spawn(async move {
            let _running = running;
            task.await;
        });
    }
}

/// The device to give away, with all that is known of it.
pub(super) fn describe(paths: &[ScsiPath], map: Option<&Map>) -> Attachment {
    let first = &paths[0];
    let (dev, diskseq) = match map {
        Some(map) => (map.dev, map.diskseq),
        None => (first.disk.dev, first.disk.diskseq),
    };
    Attachment {
        device: DeviceStatus {
            dev,
            wwid: first.identity.wwid.clone(),
            size: first.disk.size,
            map: map.map(|m| m.name.clone()),
            paths: u32::try_from(paths.len()).unwrap_or(u32::MAX),
        },
        diskseq,
        paths: paths.iter().map(ScsiPath::status).collect(),
        file: None,
    }
}

/// All paths must be the same LUN, of the same size, and say the same of themselves. Two arrays may give
/// one WWID to two LUNs.
pub(super) fn agree(paths: &[ScsiPath]) -> Result<(), IdentityError> {
    let size = |p: &ScsiPath| format!("{} with {} bytes", p.identity.wwid, p.disk.size);
    let unit = |p: &ScsiPath| format!("{}, {}", size(p), p.identity.unit);
    let disagree = |one: &ScsiPath, other: &ScsiPath, what: &dyn Fn(&ScsiPath) -> String| {
        Err(IdentityError::Disagree {
            one_at: one.hctl.to_string(),
            one: what(one),
            other_at: other.hctl.to_string(),
            other: what(other),
        })
    };
    for (n, other) in paths.iter().enumerate() {
        // Each with each: what one does not tell another may contradict.
        for one in &paths[..n] {
            if size(one) != size(other) {
                return disagree(one, other, &size);
            }
            if !one.identity.unit.agrees(&other.identity.unit) {
                return disagree(one, other, &unit);
            }
        }
    }
    Ok(())
}
