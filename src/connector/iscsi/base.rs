//! Locks, background tasks, and what a gathering of paths amounts to.

use tokio::sync::watch;

use super::Inner;
use crate::connector::Attachment;
use crate::connector::error::Error;
use crate::connector::identity::IdentityError;
use crate::connector::lease::file_name;
use crate::connector::multipath::Map;
use crate::connector::scsi::ScsiPath;
use crate::connector::settings::ms;
use crate::host::lock::LockGuard;
use crate::spec::{DeviceStatus, IscsiSource};
use crate::types::Iqn;

impl Inner {
    /// One attach or detach at a time for a LUN.
    pub(super) async fn lun_lock(&self, source: &IscsiSource) -> Result<Box<dyn LockGuard>, Error> {
        let name = file_name(&format!("{} {}", source.target, source.lun));
        Ok(self.doors.rundir.lock(&format!("luns/{name}"), ms(self.settings.lock_ms)).await?)
    }

    /// For records and logouts of a target; held shortly.
    pub(super) async fn target_lock(&self, target: &Iqn) -> Result<Box<dyn LockGuard>, Error> {
        let name = format!("targets/{}", file_name(target.as_str()));
        Ok(self.doors.rundir.lock(&name, ms(self.settings.lock_ms)).await?)
    }

    /// Runs a task that outlives the call that begins it.
    pub(super) fn background(&self, task: impl Future<Output = ()> + Send + 'static) {
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
    }
}

/// All paths must be the same LUN, of the same size.
pub(super) fn agree(paths: &[ScsiPath]) -> Result<(), IdentityError> {
    let what = |p: &ScsiPath| format!("{} with {} bytes", p.identity.wwid, p.disk.size);
    let Some((first, rest)) = paths.split_first() else { return Ok(()) };
    match rest.iter().find(|p| what(p) != what(first)) {
        None => Ok(()),
        Some(other) => Err(IdentityError::Disagree {
            one_at: first.hctl.to_string(),
            one: what(first),
            other_at: other.hctl.to_string(),
            other: what(other),
        }),
    }
}
