//! Iface records of ours: made before the first node record that goes by them, removed after the last.
//!
//! One serves all volumes of the node that ask for the same initiator name. Whoever wants it is in a lease
//! before it is made, and who leaves looks for others after its own lease is gone; both under the record's
//! lock, so that nobody loses it.

use std::io;

use super::login::Made;
use super::{Inner, Job};
use crate::connector::error::Error;
use crate::connector::lease::file_name;
use crate::connector::settings::ms;
use crate::host::lock::LockGuard;
use crate::types::{IfaceName, Nexus};

impl Inner {
    /// Sees to it that there is the iface record that the job's sessions go by.
    pub(super) async fn put_iface(&self, job: &Job) -> Result<(), Error> {
        if job.with.iface.is_default() {
            return Ok(());
        }
        let name = &job.with.iface.name;
        let _lock = self.iface_lock(&job.with.iface.record()).await?;
        let doing = || format!("making the iface record of {}", job.source.target);
        let unlocked = self.iscsiadm(&job.source.target).unlocked().await;
        unlocked.map_err(|source| Error::Command { doing: doing(), source })?;
        match self.doors.iscsidb.put_iface(&job.with.iface).await {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let known = self.doors.iscsidb.ifaces().await.unwrap_or_default();
                let theirs = known.iter().filter(|name| !name.is_own()).map(IfaceName::as_str);
                let known = theirs.collect::<Vec<_>>().join(", ");
                Err(Error::NoIface { name: name.clone(), known })
            }
            Err(source) => Err(Error::Io { doing: doing(), source }),
        }
    }

    /// Removes an iface record of ours that no volume goes by any more; `true` when it did.
    pub(super) async fn drop_iface(&self, name: &IfaceName) -> Result<bool, Error> {
        if !name.is_own() {
            return Ok(false);
        }
        let _lock = self.iface_lock(name).await?;
        let by_it = |target: &str| target.parse().is_ok_and(|at: Nexus| at.iface() == name);
        if self.leases.all::<Made>().await?.iter().any(|lease| by_it(&lease.target)) {
            return Ok(false);
        }
        let removed = self.doors.iscsidb.remove_iface(name).await;
        removed.map_err(Error::io(format!("removing iface record {name}")))
    }

    /// Removes those that a killed daemon left.
    pub(super) async fn sweep_ifaces(&self) {
        let known = match self.doors.iscsidb.ifaces().await {
            Ok(known) => known,
            // Without open-iscsi there is nothing that could have been made.
            Err(error) => return tracing::debug!(%error, "iface records were not looked at"),
        };
        for name in known {
            if let Err(error) = self.drop_iface(&name).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%name, error, "an iface record that was left could not be removed");
            }
        }
    }

    async fn iface_lock(&self, name: &IfaceName) -> Result<Box<dyn LockGuard>, Error> {
        let name = format!("ifaces/{}", file_name(name.as_str()));
        Ok(self.doors.rundir.lock(&name, ms(self.settings.lock_ms)).await?)
    }
}
