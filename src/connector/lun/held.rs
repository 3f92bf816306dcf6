//! Devices that somebody does not let go of, or that do not answer any more: made harmless, and told.

use super::Luns;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::lease::{PathLease, Seen, User};
use crate::connector::multipath::Map;
use crate::connector::{DetachOptions, scsi};
use crate::host::block::Exclusive;
use crate::host::sysfs::{Guard, is_gone};
use crate::types::DevNum;

/// What is given up when a flush fails.
pub(super) fn flush_lost(dev: DevNum, error: &std::io::Error) -> String {
    format!("the flush of {dev} failed: {error}: what the host's cache had of it may be lost")
}

impl<T: Transport> Luns<T> {
    /// Makes a path harmless that was a guest's without a map and that a process still has open: it only
    /// gives errors from now on, but its address stays taken, so it is nobody else's. iscsid sets a
    /// session's devices running again when it comes back from a failure; so does the next try set it
    /// offline again. What is stacked upon it or mounted is left alone: it never came from the guest.
    pub(super) async fn silence(
        &self,
        user: &User,
        path: &PathLease,
        seen: &Seen,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let sysfs = &*self.doors.sysfs;
        let state = format!("{}/state", path.dir);
        let block = format!("{}/block/{}", path.dir, seen.name);
        let claimed = scsi::stacked(sysfs, &block, &[]).await?.is_some()
            || !matches!(self.doors.blocks.exclusive(seen.dev).await, Ok(Exclusive::Free));
        let is = sysfs.text(&state).await.map_err(Error::io(format!("reading {state}")))?;
        if user.attachment.is_none() || claimed || is.as_deref() == Some("offline") {
            return Ok(());
        }
        tracing::warn!(path = %path.hctl, dev = %seen.dev, "it is still held open after its revoke: from now on it only gives errors");
        if let Err(error) = self.doors.blocks.flush(seen.dev).await {
            options.gave_up(flush_lost(seen.dev, &error));
        }
        let guards = [
            Guard { path: format!("{block}/dev"), expect: seen.dev.to_string() },
            Guard { path: format!("{block}/diskseq"), expect: seen.diskseq.to_string() },
        ];
        // The kernel wants the line's end (store_state_field, drivers/scsi/scsi_sysfs.c).
        match sysfs.write_guarded(&state, "offline\n", &guards).await {
            Err(e) if !is_gone(&e) => Err(Error::io(format!("setting {} offline", path.hctl))(e)),
            _ => Ok(()),
        }
    }

    /// Whether a path of a map takes I/O, as far as the kernel knows.
    pub(super) async fn has_live_path(&self, map: &Map) -> bool {
        for slave in &map.slaves {
            let state = self.doors.sysfs.text(&format!("block/{slave}/device/state")).await;
            if state.is_ok_and(|s| s.as_deref() == Some("running")) {
                return true;
            }
        }
        false
    }

    /// A path that cannot even be opened has nothing that could still be written to it. Not so one that
    /// [`Self::silence`] set offline: it was flushed then.
    pub(super) async fn tell_dead(
        &self,
        path: &PathLease,
        seen: &Seen,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let state = format!("{}/state", path.dir);
        let is = self.doors.sysfs.text(&state).await;
        let is = is.map_err(Error::io(format!("reading {state}")))?;
        if let Some(is) = is.filter(|is| is != "offline") {
            let (hctl, dev) = (path.hctl, seen.dev);
            options.gave_up(format!(
                "path {hctl} is {is}: what the host's cache had of {dev} may be lost"
            ));
        }
        Ok(())
    }
}
