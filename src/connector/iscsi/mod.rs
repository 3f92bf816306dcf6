//! iSCSI: how a target's portals become sessions by which LUNs are scanned, and how sessions and node
//! records go again. What follows from the scan on is [`lun`]'s.
//!
//! ```text
//! reach:   records -> logins, side by side, in the background -> sessions, as sysfs shows them
//! settle:  logout where nobody uses the session -> its record -> its iface record
//! ```
//!
//! The target's lock is held only while records are written or a logout is made, never while something
//! is waited for.

mod chap;
mod discover;
mod ifaces;
mod leave;
mod login;
mod noderecords;
mod records;
mod session;
mod settle;
#[cfg(test)]
mod tests;
mod transport;
mod verdict;

pub use verdict::LoginError;

use super::error::Error;
use super::lun::{self, Luns};
use crate::types::{Nexus, Portal};
pub(super) use login::Made;
pub(crate) use transport::Iscsi;

/// The LUNs that are had by iSCSI.
type Inner = Luns<Iscsi>;
type Job = lun::Job<Iscsi>;
type Access = lun::Access<Iscsi>;

impl Inner {
    /// Undoes what no volume wants: sessions and records that a killed daemon's login left. For the
    /// start, and harmless at any time.
    pub(crate) async fn sweep(&self) -> Result<(), Error> {
        self.sweep_discoveries().await;
        let mut left: Vec<(Nexus, Vec<Portal>)> = Vec::new();
        for lease in self.leases.all::<Made>().await? {
            let Ok(target) = lease.target.parse() else { continue };
            left.push((target, lease.made.portals().into_iter().collect()));
        }
        let marked = session::marked(&*self.doors.sysfs).await?;
        left.extend(marked.into_iter().map(|(target, portal)| (target, vec![portal])));
        for (target, portals) in left {
            // One target's trouble must not keep what is left at the others.
            if let Err(error) = self.settle(&target, &portals).await {
                let why = super::error::chain(&error);
                tracing::error!(%target, why, "what was left behind could not be swept");
            }
        }
        self.sweep_ifaces().await;
        Ok(())
    }

    /// What is known to be wrong with the iscsiadm that is installed, in words.
    pub(crate) async fn tool_fault(&self) -> Option<String> {
        records::tool_fault(&self.doors, &self.settings).await
    }
}
