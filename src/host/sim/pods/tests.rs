use super::super::{Fault, FaultAction};
use super::*;
use crate::cgroup::Grants;
use crate::devnode::DevNodes;

const DISK: DevNum = DevNum { major: 253, minor: 3 };

#[tokio::test]
async fn a_device_opens_only_with_node_and_grant_in_both_hierarchies() {
    for hierarchy in [Hierarchy::V1, Hierarchy::V2] {
        let pods = SimPods::new(Arc::default());
        pods.add_vm("uid-1", "ns_vm", hierarchy);
        let doors = pods.doors();
        let before = pods.snapshot();
        let path = Path::new("/var/run/kubevirt/hotplug-disks/vol-1");
        let errno = |access| pods.open("uid-1", path, access).err().and_then(|e| e.raw_os_error());
        assert_eq!(errno(Access::READ), Some(libc::ENOENT));

        let name: VolumeName = "vol-1".parse().expect("a label");
        let pod = doors.dirs.pod(Path::new("/kubelet"), "uid-1").await.expect("there");
        let rel = Path::new("volumes/kubernetes.io~empty-dir/hotplug-disks");
        let dir = doors.dirs.hotplug(&pod, rel).await.expect("there");
        let nodes = DevNodes::new(doors.nodes.clone());
        let owner = NodeOwner { uid: 64055, gid: 107 };
        assert!(nodes.ensure(&dir, &name, DISK, owner).await.expect("made").changed());
        assert!(!nodes.ensure(&dir, &name, DISK, owner).await.expect("there").changed());
        assert_eq!(errno(Access::READ), Some(libc::EPERM));

        let cgroup = doors.procs.cgroup(Path::new(&pods.cgroup("uid-1"))).await.expect("there");
        let grants = Grants::new(doors.overrides.clone(), doors.lists.clone());
        let record = grants.prepare(&cgroup, DISK, Access::READ_WRITE).await.expect("readable");
        assert!(grants.grant(&record).await.expect("granted").changed());
        assert!(!grants.grant(&record).await.expect("granted").changed());
        assert_eq!(grants.observe(&cgroup, DISK).await.expect("ok"), Access::READ_WRITE);
        assert_eq!(
            pods.open("uid-1", path, Access::READ_WRITE).expect("it opens"),
            SimOpened::Device(DISK)
        );

        assert!(grants.revoke(&record).await.expect("revoked").changed());
        assert!(!grants.revoke(&record).await.expect("revoked").changed());
        assert_eq!(errno(Access::READ), Some(libc::EPERM));
        assert!(nodes.remove(&dir, &name, Some(DISK)).await.expect("removed").changed());
        assert_eq!(nodes.observe(&dir, &name).await.expect("ok"), None);
        assert_eq!(pods.snapshot(), before, "nothing is left");
    }
}

#[tokio::test]
async fn grants_of_a_pod_that_is_gone_are_collected() {
    let pods = SimPods::new(Arc::default());
    pods.add_vm("uid-1", "ns_vm", Hierarchy::V2);
    let doors = pods.doors();
    let grants = Grants::new(doors.overrides.clone(), doors.lists.clone());
    let cgroup = doors.procs.cgroup(Path::new(&pods.cgroup("uid-1"))).await.expect("there");
    let record = grants.prepare(&cgroup, DISK, Access::READ).await.expect("readable");
    grants.grant(&record).await.expect("granted");
    assert_eq!(grants.collect_dead().await.expect("ok"), 0);
    pods.remove_pod("uid-1");
    assert!(grants.grant(&record).await.is_err());
    assert_eq!(grants.collect_dead().await.expect("ok"), 1);
    assert!(grants.list().await.expect("ok").is_empty());
    assert!(!grants.revoke(&record).await.expect("fine").changed());
}

#[tokio::test]
async fn faults_reach_the_doors() {
    let faults = Arc::new(Faults::default());
    let pods = SimPods::new(faults.clone());
    pods.add_vm("uid-1", "ns_vm", Hierarchy::V2);
    faults.inject(Fault {
        point: "grants.grant".into(),
        detail: "253:3".into(),
        skip: 0,
        times: Some(1),
        action: FaultAction::Fail("no".into()),
    });
    let doors = pods.doors();
    let grants = Grants::new(doors.overrides.clone(), doors.lists.clone());
    let cgroup = doors.procs.cgroup(Path::new(&pods.cgroup("uid-1"))).await.expect("there");
    let record = grants.prepare(&cgroup, DISK, Access::READ).await.expect("readable");
    let error = grants.grant(&record).await.expect_err("the fault");
    assert_eq!(error.reason(), crate::reason::Reason::GrantRefused);
    assert!(!pods.may_open("uid-1", DISK, Access::READ));
    grants.grant(&record).await.expect("the fault is over");
    assert!(pods.may_open("uid-1", DISK, Access::READ));
}

impl SimPods {
    /// The directory of a pod's container's cgroup.
    fn cgroup(&self, uid: &str) -> PathBuf {
        self.lock().pods[uid].cgroup.path.clone()
    }
}
