use std::process::{Child, Command, Stdio};

use proptest::prelude::*;

use super::super::grants::Hierarchy;
use super::cgroups::{find_pod, is_pod, memberships, roots};
use super::real::{last_id, start_time};
use super::*;

const UID: &str = "0d1c2b3a-1111-2222-3333-444455556666";

#[test]
fn roots_are_found_in_the_mounts_of_a_hybrid_and_of_a_unified_host() {
    let hybrid = "36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
                  37 31 0:34 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    let found: Vec<_> = roots(hybrid).into_iter().map(|r| r.hierarchy).collect();
    assert_eq!(found, [Hierarchy::V1, Hierarchy::V2]);
    let unified = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
    assert_eq!(roots(unified), [member(Hierarchy::V2, "/sys/fs/cgroup")]);
}

fn member(hierarchy: Hierarchy, dir: &str) -> Membership {
    Membership { hierarchy, dir: dir.into() }
}

#[test]
fn memberships_are_those_that_decide_over_devices() {
    let roots = [member(Hierarchy::V1, "/cg/devices"), member(Hierarchy::V2, "/cg/unified")];
    let lines = "9:name=systemd:/a\n5:cpu,devices:/kubepods/b:c\n4:memory:/x\n0::/kubepods/d\n";
    assert_eq!(
        memberships(lines, &roots),
        [
            member(Hierarchy::V1, "/cg/devices/kubepods/b:c"),
            member(Hierarchy::V2, "/cg/unified/kubepods/d")
        ]
    );
    assert_eq!(memberships("0::/\n", &roots), [member(Hierarchy::V2, "/cg/unified")]);
    assert!(memberships("0::/../outside\n", &roots).is_empty(), "outside our cgroup namespace");
    assert!(memberships("0::/a\n", &roots[..1]).is_empty(), "a hierarchy that we do not see");
}

#[test]
fn a_pods_cgroup_has_kubelets_spellings_and_no_other() {
    let slice = UID.replace('-', "_");
    for name in [
        format!("pod{UID}"),
        format!("kubepods-pod{slice}.slice"),
        format!("kubepods-burstable-pod{slice}.slice"),
        format!("kubelet-kubepods-besteffort-pod{slice}.slice"),
    ] {
        assert!(is_pod(&name, UID), "{name}");
    }
    for name in [
        format!("pod{UID}0"),
        format!("xpod{UID}"),
        format!("pod{UID}.scope"),
        format!("kubepods-xpod{slice}.slice"),
        format!("crio-{UID}"),
        "kubepods.slice".into(),
    ] {
        assert!(!is_pod(&name, UID), "{name}");
    }
}

#[test]
fn a_pod_is_found_in_every_layout_and_not_inside_another_pod() {
    let slice = UID.replace('-', "_");
    let systemd =
        format!("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{slice}.slice");
    let kind = format!("system.slice/docker-1.scope/kubelet/kubepods/besteffort/pod{UID}");
    for layout in [systemd, kind, format!("kubepods/pod{UID}")] {
        let root = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir_all(root.path().join(&layout).join("container")).expect("made");
        let found = find_pod(root.path(), UID).expect("readable");
        assert_eq!(found, Some(root.path().join(&layout)));
    }
    let root = tempfile::tempdir().expect("a temporary directory");
    for planted in [
        format!("kubepods/pod-other/ctr/kubepods/pod{UID}"),
        format!("user.slice/user-1000.slice/pod{UID}"),
    ] {
        std::fs::create_dir_all(root.path().join(planted)).expect("made");
    }
    assert_eq!(find_pod(root.path(), UID).expect("readable"), None);
}

#[test]
fn stat_and_status_are_read_whatever_the_command_is_called() {
    let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
    assert_eq!(start_time(stat), Some(4711));
    let status = "Name:\tUid:\nUid:\t1\t2\t3\t64055\nGid:\t5\t6\t7\t107\n";
    assert_eq!((last_id(status, "Uid:"), last_id(status, "Gid:")), (Some(64055), Some(107)));
}

proptest! {
    #[test]
    fn no_text_of_proc_makes_a_parser_panic(text in "[ -~\n\t]{0,200}") {
        let _ = (start_time(&text), last_id(&text, "Uid:"));
        let root = [member(Hierarchy::V2, "/cg")];
        for m in memberships(&text, &root) {
            prop_assert!(m.dir.starts_with("/cg"));
        }
    }
}

/// A child that waits for its standard input to end.
struct Waiting(Child);

impl Waiting {
    fn new() -> Self {
        let mut command = Command::new("/bin/cat");
        Self(command.stdin(Stdio::piped()).spawn().expect("cat starts"))
    }

    /// Ends it and reaps it, so that its number is free.
    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

#[tokio::test]
async fn a_process_is_known_while_it_runs_and_by_its_start() {
    let procs = HostProcs::new("/proc");
    let mut child = Waiting::new();
    let pid = child.0.id();
    let info = procs.inspect(pid).await.expect("readable").expect("it runs");
    assert_eq!(info.id.pid, pid);
    assert_eq!(info.uid, nix::unistd::geteuid().as_raw());
    assert!(procs.is_alive(info.id).await.expect("readable"));
    let reused = ProcessId { start: info.id.start + 1, ..info.id };
    assert!(!procs.is_alive(reused).await.expect("readable"), "another with its number");
    child.end();
    assert!(!procs.is_alive(info.id).await.expect("readable"));
    assert_eq!(procs.inspect(pid).await.expect("readable"), None);
    let error = procs.sees(info.id, Path::new("/")).await.expect_err("it is gone");
    assert_eq!(error.raw_os_error(), Some(nix::libc::ESRCH));
    assert_eq!(procs.inspect(0).await.expect("no process"), None);
}

#[tokio::test]
async fn a_directory_is_seen_as_the_process_sees_it() {
    use std::os::unix::fs::MetadataExt;
    let procs = HostProcs::new("/proc");
    let child = Waiting::new();
    let info = procs.inspect(child.0.id()).await.expect("readable").expect("it runs");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let view = procs.sees(info.id, dir.path()).await.expect("it is there");
    let meta = std::fs::metadata(dir.path()).expect("it is there");
    assert_eq!(view.inode, Inode { dev: meta.dev(), ino: meta.ino() });
    assert_eq!(view.uid, meta.uid());
    assert!(procs.sees(info.id, &dir.path().join("none")).await.is_err());
    assert!(procs.sees(info.id, Path::new("/proc/self/cwd")).await.is_err(), "a magic link");
}

#[tokio::test]
async fn root_a_nodev_mount_in_a_mount_namespace_is_seen() {
    let test = "root_a_nodev_mount_in_a_mount_namespace_is_seen";
    if !nix::unistd::geteuid().is_root() {
        eprintln!("{test}: skipped, needs root");
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let script =
        "mount --bind \"$1\" \"$1\" && mount -o remount,bind,nodev \"$1\" && echo in && exec cat";
    let child = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = Waiting(child.expect("unshare starts"));
    let mut line = String::new();
    let out = child.0.stdout.as_mut().expect("it was asked for");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("it says");
    assert_eq!(line, "in\n");
    let procs = HostProcs::new("/proc");
    let info = procs.inspect(child.0.id()).await.expect("readable").expect("it runs");
    let inside = procs.sees(info.id, dir.path()).await.expect("it is there");
    let own = procs.inspect(std::process::id()).await.expect("readable").expect("we run");
    let outside = procs.sees(own.id, dir.path()).await.expect("it is there");
    assert!(inside.nodev && !outside.nodev);
    assert_eq!(inside.inode, outside.inode);
}
