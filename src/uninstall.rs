//! `lunplugd --uninstall`: takes the override program off the host's cgroup root.
//!
//! Stopping or removing lunplugd leaves the program attached, so that guests keep their disks. This
//! is for a host that lunplug leaves for good.

use std::path::{Path, PathBuf};

use crate::cgroup::{CgroupError, Grants};
use crate::host::facts::System;
use crate::host::pods::PodDoors;
use crate::preflight::{Facts as _, Lack};
use crate::types::{DevNum, Outcome};

/// Nothing was taken off.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not root.
    #[error(transparent)]
    Lack(Lack),
    /// Containers still have devices by it.
    #[error(
        "{count} grants are in use, e.g. device {dev} of {}: remove these volumes first, or add --force (guests keep what they have open, but cannot open it again)",
        .cgroup.display()
    )]
    InUse {
        /// How many.
        count: usize,
        /// The device of one of them.
        dev: DevNum,
        /// Its cgroup.
        cgroup: PathBuf,
    },
    /// The kernel refused.
    #[error("the device program could not be taken off")]
    Grants(#[source] CgroupError),
}

/// Takes this host's program off. Refused while a living cgroup has grants, unless `force`.
pub async fn run(force: bool) -> Result<Outcome, Error> {
    let euid = System.euid();
    if euid != 0 {
        return Err(Error::Lack(Lack::Root(euid)));
    }
    let doors = PodDoors::real(Path::new("/proc"));
    take_off(&Grants::new(doors.overrides, doors.lists), force).await
}

async fn take_off(grants: &Grants, force: bool) -> Result<Outcome, Error> {
    let all = grants.list().await.map_err(Error::Grants)?;
    let living: Vec<_> = all.into_iter().filter_map(|e| Some((e.dev, e.path?))).collect();
    if let Some((dev, cgroup)) = living.first().filter(|_| !force) {
        return Err(Error::InUse { count: living.len(), dev: *dev, cgroup: cgroup.clone() });
    }
    grants.uninstall().await.map_err(Error::Grants)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::cgroup::{Access, Hierarchy};
    use crate::host::sim::pods::SimPods;

    const DISK: DevNum = DevNum { major: 253, minor: 3 };

    #[tokio::test]
    async fn it_refuses_while_a_container_has_a_grant_unless_forced() {
        let pods = SimPods::new(Arc::default());
        pods.add_vm("uid-1", "ns_vm", Hierarchy::V2);
        pods.add_vm("uid-2", "ns_other", Hierarchy::V2);
        let doors = pods.doors();
        let grants = Grants::new(doors.overrides.clone(), doors.lists.clone());
        let one = doors.procs.pod_cgroups("uid-1").await.unwrap().remove(0);
        let other = doors.procs.pod_cgroups("uid-2").await.unwrap().remove(0);
        for cgroup in [&one, &other] {
            let record = grants.prepare(cgroup, DISK, Access::READ).await.unwrap();
            grants.grant(&record).await.unwrap();
        }
        // A grant of a pod that is gone is in nobody's use.
        pods.remove_pod("uid-2");
        let refused = take_off(&grants, false).await.unwrap_err();
        assert!(matches!(refused, Error::InUse { count: 1, dev: DISK, .. }), "{refused:?}");
        assert_eq!(grants.observe(&one, DISK).await.unwrap(), Access::READ);
        assert!(take_off(&grants, true).await.unwrap().changed());
        assert_eq!(grants.observe(&one, DISK).await.unwrap(), Access::NONE);
        assert!(!take_off(&grants, false).await.unwrap().changed());
    }
}
