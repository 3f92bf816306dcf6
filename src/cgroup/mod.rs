//! Device grants: which container may open which block device.
//!
//! One API over two mechanisms; the VM's cgroup says which one applies.
//!
//! - v2: an entry in the map of the override program at the host's cgroup root ([`crate::host::bpf`]).
//!   The runtime's own rules are never touched.
//! - v1: bits added to the device lists of the container's group and, where they lack them, of its
//!   parents ([`crate::host::grants::DeviceLists`]). Only the added bits are taken away again.
//!
//! ```text
//! prepare -> GrantRecord -> (journal it) -> grant ... revoke -> (forget it)
//! ```
//!
//! The record is made before the effect, so that it can be journaled first: on v1, what a crashed
//! call has added could not be told from what was there before. A grant gates open(2), not open
//! descriptors: revoking takes nothing from whoever has the device open.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use crate::host::grants::{
    Access, CgroupRef, Entry, GrantStoreError, Hierarchy, ListChange, OverrideStatus,
};
use crate::host::grants::{DeviceLists, Overrides};
use crate::reason::Reason;
use crate::types::{DevNum, Outcome};

/// What a grant changes; enough to make it again, and to take it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantRecord {
    /// The container's cgroup.
    pub cgroup: CgroupRef,
    /// The device.
    pub dev: DevNum,
    /// What is allowed.
    pub access: Access,
    /// On v1 the bits that each group lacked before, parents first; empty on v2.
    pub lists: Vec<ListChange>,
}

/// A grant could not be made, taken back or read.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Not granted.
    #[error("cannot allow device {dev} in cgroup {cgroup}")]
    Grant {
        /// The cgroup.
        cgroup: CgroupRef,
        /// The device.
        dev: DevNum,
        /// Why.
        #[source]
        source: GrantStoreError,
    },
    /// Not revoked.
    #[error("cannot withdraw device {dev} from cgroup {cgroup}")]
    Revoke {
        /// The cgroup.
        cgroup: CgroupRef,
        /// The device.
        dev: DevNum,
        /// Why.
        #[source]
        source: GrantStoreError,
    },
    /// The mechanism itself is in trouble.
    #[error("device grants cannot be used")]
    Store(#[source] GrantStoreError),
}

impl CgroupError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        let (Self::Grant { source, .. } | Self::Revoke { source, .. } | Self::Store(source)) = self;
        match source {
            GrantStoreError::KernelTooOld { .. } => Reason::KernelTooOld,
            GrantStoreError::Refused { .. } => Reason::CgroupRefused,
            GrantStoreError::Gone(_) => Reason::VmNotRunning,
            GrantStoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => {
                Reason::DeadlineExceeded
            }
            GrantStoreError::NoRoot
            | GrantStoreError::OtherShape { .. }
            | GrantStoreError::Io { .. } => Reason::GrantRefused,
        }
    }
}

type Result<T> = std::result::Result<T, CgroupError>;

/// The device grants of this host.
#[derive(Clone)]
pub struct Grants {
    overrides: Arc<dyn Overrides>,
    lists: Arc<dyn DeviceLists>,
}

impl Grants {
    /// Over the doors of cgroup v2 and v1.
    pub fn new(overrides: Arc<dyn Overrides>, lists: Arc<dyn DeviceLists>) -> Self {
        Self { overrides, lists }
    }

    /// Finds or attaches the override program of v2; at start, so that a kernel which cannot do it
    /// is noticed then. A program of another version is replaced without a gap.
    pub async fn install(&self) -> Result<Outcome<OverrideStatus>> {
        self.overrides.install().await.map_err(CgroupError::Store)
    }

    /// What a grant will change. Changes nothing itself. To be called once for a grant: after the
    /// grant was made on v1, nothing is missing any more, and a new record would be empty.
    pub async fn prepare(
        &self,
        cgroup: &CgroupRef,
        dev: DevNum,
        access: Access,
    ) -> Result<GrantRecord> {
        let lists = match cgroup.hierarchy {
            Hierarchy::V2 => Vec::new(),
            Hierarchy::V1 => self
                .lists
                .missing(cgroup, dev, access)
                .await
                .map_err(|source| CgroupError::Grant { cgroup: cgroup.clone(), dev, source })?,
        };
        Ok(GrantRecord { cgroup: cgroup.clone(), dev, access, lists })
    }

    /// Makes the grant.
    pub async fn grant(&self, record: &GrantRecord) -> Result<Outcome> {
        let GrantRecord { cgroup, dev, access, .. } = record;
        let error = |source| CgroupError::Grant { cgroup: cgroup.clone(), dev: *dev, source };
        match cgroup.hierarchy {
            Hierarchy::V2 => self.overrides.put(cgroup, *dev, *access).await.map_err(error),
            Hierarchy::V1 => {
                let mut changed = false;
                for change in &record.lists {
                    changed |= self.lists.allow(change, *dev).await.map_err(error)?.changed();
                }
                Ok(outcome(changed))
            }
        }
    }

    /// Takes the grant back. A cgroup that is gone took its grants with it.
    pub async fn revoke(&self, record: &GrantRecord) -> Result<Outcome> {
        let GrantRecord { cgroup, dev, .. } = record;
        let error = |source| CgroupError::Revoke { cgroup: cgroup.clone(), dev: *dev, source };
        match cgroup.hierarchy {
            Hierarchy::V2 => self.overrides.take(cgroup.id, *dev).await.map_err(error),
            Hierarchy::V1 => {
                let mut changed = false;
                // The container's own group, and all below it, loses the device in any case; a
                // parent only when no other container needs it any more.
                for change in record.lists.iter().rev() {
                    let is_parent = change.cgroup != *cgroup;
                    let denied = self.lists.deny(change, *dev, is_parent).await;
                    changed |= denied.map_err(error)?.changed();
                }
                Ok(outcome(changed))
            }
        }
    }

    /// What the cgroup may do with the device: on v2 by our grants alone (what the runtime allows
    /// is its own), on v1 by the group's list.
    pub async fn observe(&self, cgroup: &CgroupRef, dev: DevNum) -> Result<Access> {
        match cgroup.hierarchy {
            Hierarchy::V1 => self.lists.allowed(cgroup, dev).await.map_err(CgroupError::Store),
            Hierarchy::V2 => Ok(self
                .list()
                .await?
                .into_iter()
                .find(|e| e.cgroup == cgroup.id && e.dev == dev)
                .map_or(Access::NONE, |e| e.access)),
        }
    }

    /// Whether grants are in force as they were made, in the order asked for.
    pub async fn hold(&self, records: &[GrantRecord]) -> Result<Vec<bool>> {
        let mut hold = Vec::with_capacity(records.len());
        // Those of one VM are of one cgroup.
        for group in records.chunk_by(|a, b| a.cgroup == b.cgroup) {
            let cgroup = &group[0].cgroup;
            if cgroup.hierarchy == Hierarchy::V2 {
                let devs: Vec<DevNum> = group.iter().map(|r| r.dev).collect();
                let found = self.overrides.look_up(cgroup.id, &devs).await;
                let found = found.map_err(CgroupError::Store)?;
                hold.extend(group.iter().zip(found).map(|(record, has)| record.access == has));
                continue;
            }
            for record in group {
                let mut holds = true;
                for change in &record.lists {
                    let has = self.lists.allowed(&change.cgroup, record.dev).await;
                    holds &= has.map_err(CgroupError::Store)?.covers(change.added);
                }
                hold.push(holds);
            }
        }
        Ok(hold)
    }

    /// All grants of v2 on this host, those of other lunplug processes and dead cgroups included.
    pub async fn list(&self) -> Result<Vec<Entry>> {
        self.overrides.entries().await.map_err(CgroupError::Store)
    }

    /// Forgets the grants of cgroups that are gone; returns how many.
    pub async fn collect_dead(&self) -> Result<usize> {
        let mut collected = 0;
        for entry in self.list().await?.into_iter().filter(|e| e.path.is_none()) {
            let taken = self.overrides.take(entry.cgroup, entry.dev).await;
            collected += usize::from(taken.map_err(CgroupError::Store)?.changed());
        }
        Ok(collected)
    }

    /// Detaches the override program and so withdraws all grants of v2, whoever made them.
    pub async fn uninstall(&self) -> Result<Outcome> {
        self.overrides.uninstall().await.map_err(CgroupError::Store)
    }
}

fn outcome(changed: bool) -> Outcome {
    if changed { Outcome::Done(()) } else { Outcome::Already(()) }
}
