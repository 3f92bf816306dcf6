mod root;

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::process::{guest_name, is_qemu};
use super::*;
use crate::host::poddir::Inode;
use crate::host::procs::Membership;
use crate::host::sim::pods::{SimEntry, SimPod, SimPods};

const UID: &str = "0d1c2b3a-1111-2222-3333-444455556666";
const DOMAIN: &str = "ns_vm";

fn pod() -> VmPlace {
    VmPlace::Pod {
        uid: UID.into(),
        cgroup: None,
        hotplug_dir: None,
        hotplug_dir_in_pod: None,
        libvirt_socket: None,
    }
}

fn qemu() -> Wanted {
    Wanted::Qemu(DOMAIN.into())
}

fn host(hierarchy: Hierarchy) -> Arc<SimPods> {
    let pods = SimPods::new(Arc::default());
    pods.add_vm(UID, DOMAIN, hierarchy);
    pods
}

async fn find(pods: &Arc<SimPods>, place: &VmPlace) -> Result<Place> {
    discover(&pods.doors(), &Settings::default(), place, &qemu()).await
}

/// The reason of a failed discovery after a change to the pod.
async fn reason_after(change: impl FnOnce(&mut SimPod)) -> Reason {
    let pods = host(Hierarchy::V2);
    pods.edit(UID, change);
    find(&pods, &pod()).await.expect_err("it must be refused").reason()
}

#[tokio::test]
async fn a_vm_is_found_from_its_pods_uid() {
    for hierarchy in [Hierarchy::V1, Hierarchy::V2] {
        let pods = host(hierarchy);
        let place = find(&pods, &pod()).await.expect("it is there");
        let found = place.pod.expect("it is in a pod");
        assert_eq!(found.owner, NodeOwner { uid: 64055, gid: 107 });
        assert_eq!(found.dir_in_pod, Path::new(HOTPLUG_DIR_IN_POD));
        assert_eq!(found.cgroup.hierarchy, hierarchy);
        assert!(found.cgroup.path.ends_with(format!("pod{UID}/compute")), "the container's");
        assert!(found.is_current(&pods.doors()).await.expect("readable"));
        pods.kill_qemu(UID);
        assert!(!found.is_current(&pods.doors()).await.expect("readable"));
    }
}

#[tokio::test]
async fn the_libvirt_of_a_pod_is_known_before_its_vm_runs() {
    let pods = host(Hierarchy::V2);
    pods.kill_qemu(UID);
    let found = endpoint(&pods.doors(), &Settings::default(), &pod()).await;
    assert!(found.expect("it is there").to_string().ends_with("libvirt-sock"));
    let vm = "default/vm".parse().expect("a name");
    let dir = node_dir(&pods.doors(), &Settings::default(), &vm, &pod()).await;
    dir.expect("nodes can be removed after its end");
    let error = find(&pods, &pod()).await.expect_err("there is no QEMU");
    assert_eq!(error.reason(), Reason::QemuNotFound);
}

/// Before it runs, a VM's place is that of the daemon that will start it.
#[tokio::test]
async fn a_vm_that_is_to_start_is_found_by_its_libvirt() {
    for hierarchy in [Hierarchy::V1, Hierarchy::V2] {
        let pods = SimPods::new(Arc::default());
        pods.add_pod(UID, hierarchy);
        let find = async |user: u32| {
            pods.edit(UID, |pod| pod.processes[0].uid = user);
            let found =
                discover(&pods.doors(), &Settings::default(), &pod(), &Wanted::Libvirt).await;
            found.expect("it is there").pod.expect("it is in a pod")
        };
        let found = find(64055).await;
        assert_eq!(found.owner, NodeOwner { uid: 64055, gid: 107 });
        assert!(found.cgroup.path.ends_with(format!("pod{UID}/compute")), "the container's");
        // As whom a daemon of root's will run QEMU is seen by whose directory it is.
        assert_eq!(find(0).await.owner, NodeOwner { uid: 0, gid: 0 });
        pods.edit(UID, |pod| pod.processes.clear());
        let error = discover(&pods.doors(), &Settings::default(), &pod(), &Wanted::Libvirt).await;
        let error = error.expect_err("nobody serves there");
        assert_eq!(error.reason(), Reason::QemuNotFound);
        assert!(error.to_string().contains("libvirt"), "{error}");
    }
}

#[tokio::test]
async fn a_plain_libvirt_host_has_a_socket_and_nothing_more() {
    let pods = host(Hierarchy::V2);
    let place = find(&pods, &VmPlace::Host { libvirt_socket: None }).await.expect("it is there");
    assert_eq!(place.pod, None);
    let other = VmPlace::Host { libvirt_socket: Some("/run/other".into()) };
    let error = find(&pods, &other).await.expect_err("nobody listens there");
    assert_eq!(error.reason(), Reason::LibvirtUnreachable);
}

#[tokio::test]
async fn a_pod_that_vanished_is_told() {
    let pods = host(Hierarchy::V2);
    pods.remove_pod(UID);
    let error = find(&pods, &pod()).await.expect_err("it is gone");
    assert_eq!(error.reason(), Reason::PodGone);
}

#[tokio::test]
async fn a_planted_symlink_is_refused_as_socket_and_as_directory() {
    let plant = |path: &'static str| {
        move |p: &mut SimPod| {
            p.entries.insert(path.into(), SimEntry::Symlink);
        }
    };
    assert_eq!(reason_after(plant(POD_SOCKET)).await, Reason::SocketUntrusted);
    assert_eq!(reason_after(plant(HOTPLUG_DIR)).await, Reason::HotplugDirUnsafe);
    let parent = "volumes/kubernetes.io~empty-dir/libvirt-runtime";
    assert_eq!(reason_after(plant(parent)).await, Reason::SocketUntrusted);
    let file = |p: &mut SimPod| {
        p.entries.insert(POD_SOCKET.into(), SimEntry::File);
    };
    assert_eq!(reason_after(file).await, Reason::SocketUntrusted);
    let none = |p: &mut SimPod| {
        p.entries.remove(Path::new(HOTPLUG_DIR));
    };
    assert_eq!(reason_after(none).await, Reason::HotplugDirUnsafe);
}

#[tokio::test]
async fn paths_that_lead_out_of_the_pod_are_refused() {
    let pods = host(Hierarchy::V2);
    let with = |change: fn(&mut VmPlace)| {
        let mut place = pod();
        change(&mut place);
        place
    };
    for place in [
        with(|p| {
            if let VmPlace::Pod { libvirt_socket, .. } = p {
                *libvirt_socket = Some("../../../run/libvirt/libvirt-sock".into());
            }
        }),
        with(|p| {
            if let VmPlace::Pod { libvirt_socket, .. } = p {
                *libvirt_socket = Some("/run/libvirt/libvirt-sock".into());
            }
        }),
        with(|p| {
            if let VmPlace::Pod { hotplug_dir, .. } = p {
                *hotplug_dir = Some("volumes/../../other-pod/volumes".into());
            }
        }),
        with(|p| {
            if let VmPlace::Pod { hotplug_dir_in_pod, .. } = p {
                *hotplug_dir_in_pod = Some("/var/run/../../etc".into());
            }
        }),
    ] {
        let error = find(&pods, &place).await.expect_err("it must be refused");
        assert_eq!(error.reason(), Reason::PathNotAllowed, "{place:?}");
    }
}

#[tokio::test]
async fn a_nodev_mount_or_another_directory_in_the_pod_is_refused() {
    assert_eq!(reason_after(|p| p.nodev = true).await, Reason::NodevMount);
    assert_eq!(reason_after(|p| p.another_dir = true).await, Reason::HotplugDirUnsafe);
    let elsewhere = |p: &mut SimPod| p.hotplug_in_pod = "/elsewhere".into();
    assert_eq!(reason_after(elsewhere).await, Reason::HotplugDirUnsafe);
}

/// What SO_PEERCRED would give under socket activation: a process outside of the pod's cgroup. It
/// is never looked at; what counts is who is in the pod's cgroup.
#[tokio::test]
async fn whoever_listens_on_the_socket_does_not_matter() {
    let systemd = |p: &mut SimPod| {
        for process in &mut p.processes {
            process.cgroups[0].dir = "/sys/fs/cgroup/init.scope".into();
        }
    };
    assert_eq!(reason_after(systemd).await, Reason::QemuNotFound);
}

#[tokio::test]
async fn qemu_must_be_in_a_container_below_the_pod() {
    let in_pod_itself = |p: &mut SimPod| p.processes[0].cgroups[0].dir = p.pod_cgroup.path.clone();
    assert_eq!(reason_after(in_pod_itself).await, Reason::CgroupRefused);
    let slice = |p: &mut SimPod| {
        p.cgroup.path = p.pod_cgroup.path.join("machine.slice");
        p.processes[0].cgroups[0].dir = p.cgroup.path.clone();
    };
    assert_eq!(reason_after(slice).await, Reason::CgroupRefused);
    let init = |p: &mut SimPod| {
        p.cgroup.path = p.pod_cgroup.path.join("init.scope");
        p.processes[0].cgroups[0].dir = p.cgroup.path.clone();
    };
    assert_eq!(reason_after(init).await, Reason::CgroupRefused);
}

#[tokio::test]
async fn a_grant_on_v2_is_keyed_by_the_container_though_qemu_is_nested_in_it() {
    let pods = host(Hierarchy::V2);
    pods.edit(UID, |p| {
        p.processes[0].cgroups[0].dir = p.cgroup.path.join("machine/qemu-1.scope");
    });
    let place = find(&pods, &pod()).await.expect("it is there");
    assert!(place.pod.expect("a pod").cgroup.path.ends_with("compute"));
}

#[tokio::test]
async fn a_registered_cgroup_is_refused_when_it_is_not_a_containers() {
    let pods = host(Hierarchy::V2);
    let at = |path: &str| {
        let mut place = pod();
        if let VmPlace::Pod { cgroup, .. } = &mut place {
            *cgroup = Some(path.into());
        }
        place
    };
    let good = format!("/sys/fs/cgroup/kubepods/burstable/pod{UID}/compute");
    let found = find(&pods, &at(&good)).await.expect("it is the container's");
    assert_eq!(found.pod.expect("a pod").cgroup.path, Path::new(&good));
    for path in ["/sys/fs/cgroup", "/sys/fs/cgroup/devices", "/sys/fs/cgroup/none"] {
        let error = find(&pods, &at(path)).await.expect_err("it must be refused");
        assert_eq!(error.reason(), Reason::CgroupRefused, "{path}");
    }
    for (name, refused) in [
        ("/sys/fs/cgroup/system.slice", true),
        ("/sys/fs/cgroup/init.scope", true),
        ("/sys/fs/cgroup/system.slice/lunplugd.service", true),
        ("/sys/fs/cgroup/system.slice/other.service", false),
    ] {
        let checked = check_cgroup(&pods.doors(), Path::new(name)).await;
        assert_eq!(checked.is_err(), refused, "{name}");
    }
}

#[tokio::test]
async fn two_that_claim_to_be_the_domains_qemu_must_agree() {
    let pods = host(Hierarchy::V2);
    pods.start_qemu(UID, DOMAIN);
    find(&pods, &pod()).await.expect("a fork in the same place as the same user");
    pods.edit(UID, |p| p.processes[1].uid = 0);
    let error = find(&pods, &pod()).await.expect_err("which one?");
    assert!(matches!(error, DiscoverError::Ambiguous { .. }), "{error}");
    assert_eq!(error.reason(), Reason::QemuNotFound);
}

#[tokio::test]
async fn an_idmapped_mount_shifts_the_nodes_owner() {
    let pods = host(Hierarchy::V2);
    pods.edit(UID, |p| {
        p.idmap = 524_288;
        p.processes[0].uid = 524_288 + 107;
        p.processes[0].gid = 524_288 + 108;
    });
    let place = find(&pods, &pod()).await.expect("it is there");
    assert_eq!(place.pod.expect("a pod").owner, NodeOwner { uid: 107, gid: 108 });
    // A user that the mount cannot express.
    pods.edit(UID, |p| p.processes[0].uid = 107);
    let error = find(&pods, &pod()).await.expect_err("no such owner");
    assert!(matches!(error, DiscoverError::Unmapped { .. }), "{error}");
}

#[tokio::test]
async fn a_reused_number_is_noticed() {
    assert_eq!(reason_after(|p| p.restarts = true).await, Reason::QemuNotFound);
}

#[tokio::test]
async fn a_pid_namespace_that_hides_qemu_is_told() {
    let pods = host(Hierarchy::V2);
    pods.edit(UID, |p| {
        p.hidden = true;
        p.processes.clear();
    });
    let error = find(&pods, &pod()).await.expect_err("it is not to be seen");
    assert_eq!(error.reason(), Reason::QemuNotFound);
    assert!(error.to_string().contains("PID namespace"), "{error}");
}

fn process(exe: &str, args: &[&str]) -> ProcessInfo {
    ProcessInfo {
        id: ProcessId { pid: 1, start: 1 },
        exe: exe.into(),
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        uid: 0,
        gid: 0,
        cgroups: vec![Membership { hierarchy: Hierarchy::V2, dir: "/x".into() }],
    }
}

#[test]
fn qemu_is_known_by_program_and_domain() {
    let args = ["qemu", "-name", "guest=ns_vm,debug-threads=on", "-S"];
    assert!(is_qemu(&process("/usr/bin/qemu-system-x86_64", &args), "ns_vm"));
    assert!(is_qemu(&process("/usr/libexec/qemu-kvm (deleted)", &args), "ns_vm"));
    assert!(!is_qemu(&process("/usr/bin/bash", &args), "ns_vm"), "another program");
    assert!(!is_qemu(&process("/usr/bin/qemu-system-x86_64", &args), "ns_v"), "another domain");
    let hidden = ["qemu", "-fw_cfg", "guest=ns_vm"];
    assert!(!is_qemu(&process("/usr/bin/qemu-system-x86_64", &hidden), "ns_vm"));
    assert!(!is_qemu(&process("/usr/bin/qemu-system-x86_64", &["qemu", "-name"]), "ns_vm"));
}

#[test]
fn names_with_commas_are_read_as_libvirt_writes_them() {
    assert_eq!(guest_name("guest=a,,b,debug-threads=on").as_deref(), Some("a,b"));
    assert_eq!(guest_name("plain").as_deref(), Some("plain"));
    assert_eq!(guest_name("debug-threads=on,guest=x").as_deref(), Some("x"));
    assert_eq!(guest_name("process=x"), None);
}

proptest! {
    #[test]
    fn every_name_comes_back(name in "[ -~]{1,30}") {
        let option = format!("guest={},debug-threads=on", name.replace(',', ",,"));
        prop_assert_eq!(guest_name(&option), Some(name));
    }

    #[test]
    fn the_owner_is_shifted_as_the_directory_is(
        uid in 0u32..60_000, dir in 0u32..60_000, base in 0u32..1_000_000,
    ) {
        let view = DirView { inode: Inode { dev: 0, ino: 0 }, nodev: false, uid: dir + base, gid: base };
        prop_assume!(dir + base != 65534 && base != 65534);
        prop_assert_eq!(owner_on_host((uid + base, base), (dir, 0), view), Some(NodeOwner { uid, gid: 0 }));
    }
}
