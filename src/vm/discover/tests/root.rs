//! On the real host: a process that looks like QEMU, in a pod's cgroup and directory.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::devnode::DevNodes;
use crate::types::DevNum;

const OWNER: NodeOwner = NodeOwner { uid: 64055, gid: 107 };

/// A pod with a process in its container, all of it removed at the end.
struct RealPod {
    kubelet: tempfile::TempDir,
    uid: String,
    /// Innermost first.
    cgroups: Vec<PathBuf>,
    qemu: Child,
    _libvirt: UnixListener,
}

impl RealPod {
    fn new(root: &Path, name: &str) -> Self {
        let kubelet = tempfile::tempdir().expect("a temporary directory");
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(kubelet.path(), open).expect("it is ours");
        let uid = format!("{name}-{}", std::process::id());
        let dir = kubelet.path().join("pods").join(&uid);
        std::fs::create_dir_all(dir.join(HOTPLUG_DIR)).expect("made");
        let socket = dir.join(POD_SOCKET);
        std::fs::create_dir_all(socket.parent().expect("it has one")).expect("made");
        // The name of a Unix socket is at most 107 bytes: too short for kubelet's layout.
        let short = kubelet.path().join("s");
        let libvirt = UnixListener::bind(&short).expect("bound");
        std::fs::rename(&short, &socket).expect("moved into place");

        let kubepods = root.join(format!("lunplug-test-kubepods-{uid}"));
        let pod = kubepods.join(format!("pod{uid}"));
        let container = pod.join("container");
        for cgroup in [&kubepods, &pod, &container] {
            std::fs::create_dir(cgroup).expect("a cgroup can be made");
        }
        let qemu = start_qemu(kubelet.path(), OWNER);
        let procs = container.join("cgroup.procs");
        std::fs::write(procs, qemu.id().to_string()).expect("root may move it");
        Self { kubelet, uid, cgroups: vec![container, pod, kubepods], qemu, _libvirt: libvirt }
    }

    fn settings(&self) -> Settings {
        Settings { kubelet_root: self.kubelet.path().into() }
    }

    fn dir(&self) -> PathBuf {
        self.kubelet.path().join("pods").join(&self.uid).join(HOTPLUG_DIR)
    }

    fn place(&self) -> VmPlace {
        VmPlace::Pod {
            uid: self.uid.clone(),
            cgroup: None,
            hotplug_dir: None,
            hotplug_dir_in_pod: Some(self.dir()),
            libvirt_socket: None,
        }
    }

    fn end_qemu(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for RealPod {
    fn drop(&mut self) {
        self.end_qemu();
        for cgroup in &self.cgroups {
            std::fs::remove_dir(cgroup).expect("nobody is in it");
        }
    }
}

/// A shell by QEMU's name and with its arguments, which waits for its standard input to end.
#[expect(clippy::disallowed_methods, reason = "the test itself ends and reaps it")]
fn start_qemu(dir: &Path, owner: NodeOwner) -> Child {
    let program = dir.join("qemu-system-x86_64");
    // Not by this process: a child that another test starts meanwhile would inherit the descriptor
    // that the copy is written through, and until it runs its program ours could not (ETXTBSY).
    let copied = Command::new("cp").arg("/bin/sh").arg(&program).status().expect("cp runs");
    assert!(copied.success(), "there is a shell");
    let name = format!("guest={DOMAIN},debug-threads=on");
    let mut command = Command::new(program);
    command.args(["-c", "read -r line", "-name", &name]).stdin(Stdio::piped());
    command.uid(owner.uid).gid(owner.gid).spawn().expect("it starts")
}

fn roots(test: &str) -> Vec<PathBuf> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("{test}: skipped, needs root");
        return Vec::new();
    }
    PodDoors::real(Path::new("/proc")).procs.roots().into_iter().map(|r| r.dir).collect()
}

#[tokio::test]
async fn root_a_real_process_is_found_and_gets_its_node() {
    for root in roots("root_a_real_process_is_found_and_gets_its_node") {
        let mut pod = RealPod::new(&root, "found");
        let doors = PodDoors::real(Path::new("/proc"));
        let place = discover(&doors, &pod.settings(), &pod.place(), &qemu()).await;
        let found = place.expect("it is there").pod.expect("in a pod");
        assert_eq!(found.owner, OWNER);
        assert_eq!(found.cgroup.path, pod.cgroups[0]);
        assert_eq!(found.by.pid, pod.qemu.id());

        let nodes = DevNodes::new(doors.nodes.clone());
        let dev = DevNum { major: 7, minor: 6 };
        let volume = "vol-1".parse().expect("a label");
        nodes.ensure(&found.hotplug, &volume, dev, found.owner).await.expect("made");
        let meta = std::fs::symlink_metadata(pod.dir().join("vol-1")).expect("it is there");
        assert!(meta.file_type().is_block_device());
        assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (64055, 107, 0o600));

        let other =
            discover(&doors, &pod.settings(), &pod.place(), &Wanted::Qemu("another".into())).await;
        assert_eq!(other.expect_err("not its domain").reason(), Reason::QemuNotFound);
        pod.end_qemu();
        assert!(!found.is_current(&doors).await.expect("readable"));
        let ended = discover(&doors, &pod.settings(), &pod.place(), &qemu()).await;
        assert_eq!(ended.expect_err("it ended").reason(), Reason::QemuNotFound);
    }
}

#[tokio::test]
async fn root_a_qemu_outside_of_the_pod_is_not_the_pods() {
    for root in roots("root_a_qemu_outside_of_the_pod_is_not_the_pods") {
        let mut pod = RealPod::new(&root, "outside");
        let pid = pod.qemu.id().to_string();
        let doors = PodDoors::real(Path::new("/proc"));
        let reason = async |pod: &RealPod| {
            let found = discover(&doors, &pod.settings(), &pod.place(), &qemu()).await;
            found.expect_err("it must be refused").reason()
        };
        // In the pod's own cgroup, in no container.
        std::fs::write(pod.cgroups[1].join("cgroup.procs"), &pid).expect("root may");
        assert_eq!(reason(&pod).await, Reason::CgroupRefused);
        // In the root, as a poisoned peer would be.
        std::fs::write(root.join("cgroup.procs"), &pid).expect("root may");
        assert_eq!(reason(&pod).await, Reason::QemuNotFound);
        let mut place = pod.place();
        if let VmPlace::Pod { cgroup, .. } = &mut place {
            *cgroup = Some(root.clone());
        }
        let error = discover(&doors, &pod.settings(), &place, &qemu()).await;
        assert_eq!(error.expect_err("the root").reason(), Reason::CgroupRefused);
        pod.end_qemu();
    }
}
