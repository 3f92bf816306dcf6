use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::super::poddir::{Inode, PodDir};
use super::*;

const DISK: DevNum = DevNum { major: 7, minor: 6 };
const NEWER: DevNum = DevNum { major: 7, minor: 5 };
const QEMU: NodeOwner = NodeOwner { uid: 64055, gid: 107 };

/// A pod's directory with a hotplug directory in it.
struct Pod {
    _root: tempfile::TempDir,
    path: PathBuf,
    dir: HotplugDir,
    name: VolumeName,
}

impl Pod {
    /// `None`, said aloud, without root.
    fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("{test}: skipped, needs root");
            return None;
        }
        let root = tempfile::tempdir().expect("a temporary directory");
        let pod = PodDir { path: root.path().join("pods/uid-1") };
        let rel = PathBuf::from("volumes/hotplug");
        let path = pod.path.join(&rel);
        std::fs::create_dir_all(&path).expect("directories can be made");
        let meta = std::fs::metadata(&path).expect("it exists");
        let inode = Inode { dev: meta.dev(), ino: meta.ino() };
        let dir = HotplugDir { pod, rel, inode, owner: (0, 0) };
        Some(Self { _root: root, path, dir, name: "vol-1".parse().expect("a label") })
    }

    fn ensure(&self, dev: DevNum) -> Result<Outcome> {
        Work::open(&self.dir, &self.name)?.ensure(dev, QEMU)
    }

    fn remove(&self, expect: Option<DevNum>) -> Result<Outcome> {
        Work::open(&self.dir, &self.name)?.remove(expect)
    }

    fn seen(&self) -> Option<Seen> {
        let work = Work::open(&self.dir, &self.name).expect("the directory is fine");
        work.look("vol-1").expect("it can be looked at").map(|f| f.seen)
    }

    fn is_right(&self, dev: DevNum) -> bool {
        let names: Vec<_> = std::fs::read_dir(&self.path).expect("readable").collect();
        names.len() == 1 && self.seen() == Some(Seen::Node { dev, owner: QEMU, mode: NODE_MODE })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

fn make(path: &Path, kind: SFlag, dev: DevNum) {
    nix::sys::stat::mknod(path, kind, Mode::from_bits_truncate(0o666), dev.to_dev_t())
        .expect("root may make nodes");
}

#[test]
fn root_a_node_is_made_found_and_removed() {
    let Some(pod) = Pod::new("root_a_node_is_made_found_and_removed") else { return };
    assert_eq!(pod.seen(), None);
    assert!(pod.ensure(DISK).expect("made").changed());
    assert!(pod.is_right(DISK));
    assert!(!pod.ensure(DISK).expect("there").changed());
    assert!(!pod.remove(Some(NEWER)).expect("another's").changed());
    assert!(pod.is_right(DISK), "a node of another device is not what was meant");
    assert!(pod.remove(Some(DISK)).expect("removed").changed());
    assert!(!pod.remove(Some(DISK)).expect("gone").changed());
    assert_eq!(pod.seen(), None);
}

#[test]
fn root_what_the_pod_planted_is_replaced_and_never_followed() {
    let Some(pod) = Pod::new("root_what_the_pod_planted_is_replaced_and_never_followed") else {
        return;
    };
    let outside = pod.path.parent().expect("it has one").join("outside");
    let untouched = || {
        let meta = std::fs::metadata(&outside).expect("it is there");
        (meta.uid(), meta.mode() & 0o7777) == (0, 0o644)
    };
    std::fs::write(&outside, "the host's").expect("writable");

    for name in ["vol-1", ".lunplug-vol-1"] {
        symlink(&outside, pod.at(name)).expect("a symlink");
        assert!(pod.ensure(DISK).expect("replaced").changed() && pod.is_right(DISK), "{name}");
        std::fs::remove_file(pod.at("vol-1")).expect("removable");

        std::fs::write(pod.at(name), "a file").expect("writable");
        assert!(pod.ensure(DISK).expect("replaced").changed() && pod.is_right(DISK), "{name}");
        std::fs::remove_file(pod.at("vol-1")).expect("removable");

        std::fs::hard_link(&outside, pod.at(name)).expect("a link");
        assert!(pod.ensure(DISK).expect("replaced").changed() && pod.is_right(DISK), "{name}");
        std::fs::remove_file(pod.at("vol-1")).expect("removable");

        make(&pod.at(name), SFlag::S_IFCHR, DISK);
        assert!(pod.ensure(DISK).expect("replaced").changed() && pod.is_right(DISK), "{name}");
        std::fs::remove_file(pod.at("vol-1")).expect("removable");
    }
    assert!(untouched());
}

#[test]
fn root_a_node_with_another_device_owner_or_mode_is_replaced() {
    let Some(pod) = Pod::new("root_a_node_with_another_device_owner_or_mode_is_replaced") else {
        return;
    };
    pod.ensure(DISK).expect("made");
    assert!(pod.ensure(NEWER).expect("replaced").changed(), "another device");
    assert!(pod.is_right(NEWER));
    nix::unistd::chown(&pod.at("vol-1"), Some(Uid::from_raw(1)), None).expect("root may");
    assert!(pod.ensure(NEWER).expect("replaced").changed() && pod.is_right(NEWER), "owner");
    make(&pod.at("x"), SFlag::S_IFBLK, NEWER);
    std::fs::rename(pod.at("x"), pod.at("vol-1")).expect("the pod may rename");
    assert!(pod.ensure(NEWER).expect("replaced").changed() && pod.is_right(NEWER), "mode");
}

#[test]
fn root_a_directory_in_the_way_is_refused() {
    let Some(pod) = Pod::new("root_a_directory_in_the_way_is_refused") else { return };
    std::fs::create_dir(pod.at("vol-1")).expect("a directory");
    assert!(matches!(pod.ensure(DISK), Err(NodeError::Refused { .. })));
    assert!(!pod.remove(None).expect("not ours").changed());
    assert!(pod.at("vol-1").is_dir());
    std::fs::remove_dir(pod.at("vol-1")).expect("removable");
    std::fs::create_dir(pod.at(".lunplug-vol-1")).expect("a directory");
    assert!(matches!(pod.ensure(DISK), Err(NodeError::Refused { .. })));
}

#[test]
fn root_an_exchanged_hotplug_directory_is_refused() {
    let Some(pod) = Pod::new("root_an_exchanged_hotplug_directory_is_refused") else { return };
    let aside = pod.path.with_file_name("aside");
    std::fs::rename(&pod.path, &aside).expect("the pod may rename");
    let dir = |r: Result<Outcome>| match r {
        Err(NodeError::Dir(e)) => e,
        other => panic!("{other:?}"),
    };
    assert!(matches!(dir(pod.ensure(DISK)), PathError::Missing(_)));
    symlink(&aside, &pod.path).expect("a symlink");
    assert!(matches!(dir(pod.ensure(DISK)), PathError::Unsafe { .. }));
    std::fs::remove_file(&pod.path).expect("removable");
    std::fs::create_dir(&pod.path).expect("another directory");
    assert!(matches!(dir(pod.ensure(DISK)), PathError::Unsafe { .. }));
    std::fs::remove_dir_all(&pod.dir.pod.path).expect("the pod is gone");
    assert!(matches!(dir(pod.ensure(DISK)), PathError::PodGone(_)));
}

#[test]
fn root_the_node_gets_the_directorys_label() {
    let Some(pod) = Pod::new("root_the_node_gets_the_directorys_label") else { return };
    let dir = File::open(&pod.path).expect("it exists");
    let wanted = b"system_u:object_r:container_file_t:s0:c1,c2\0";
    if let Err(e) = set_label(&dir, wanted) {
        eprintln!("skipped: this file system takes no labels: {e}");
        return;
    }
    pod.ensure(DISK).expect("made");
    let work = Work::open(&pod.dir, &pod.name).expect("fine");
    let node = work.look("vol-1").expect("fine").expect("it is there");
    assert_eq!(label(&node.fd).expect("readable").as_deref(), Some(&wanted[..]));
    assert!(!pod.ensure(DISK).expect("there").changed());
    set_label(&node.fd, b"another\0").expect("it can be changed");
    assert!(pod.ensure(DISK).expect("replaced").changed(), "a wrong label is wrong");
}

#[test]
fn root_a_pod_that_exchanges_names_never_gets_another_file_changed() {
    let test = "root_a_pod_that_exchanges_names_never_gets_another_file_changed";
    let Some(pod) = Pod::new(test) else { return };
    let victim = pod.path.parent().expect("it has one").join("victim");
    std::fs::write(&victim, "the host's").expect("writable");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for name in [".lunplug-vol-1", "vol-1"] {
                    let _ = std::fs::remove_file(pod.at(name));
                    let _ = std::fs::hard_link(&victim, pod.at(name));
                    let _ = symlink(&victim, pod.at("link"));
                    let _ = std::fs::rename(pod.at("link"), pod.at(name));
                }
            }
        });
        for _ in 0..300 {
            // It may win or be refused; what it says it made is right at that moment.
            if let Err(e) = pod.ensure(DISK) {
                assert!(matches!(e, NodeError::Refused { .. }), "{e:?}");
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let meta = std::fs::metadata(&victim).expect("it is there");
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o644), "the host's file is untouched");
}

#[tokio::test]
async fn root_nodes_are_looked_at_together_and_each_is_told_of() {
    let Some(pod) = Pod::new("root_nodes_are_looked_at_together_and_each_is_told_of") else {
        return;
    };
    assert!(pod.ensure(DISK).expect("made").changed());
    std::fs::write(pod.at("file"), "").expect("writable");
    let names = ["file", "none", "vol-1"].map(|name| name.parse().expect("a label"));
    let seen = HostNodes.observe_each(&pod.dir, &names).await;
    let seen: Vec<_> = seen.into_iter().map(|seen| seen.expect("the directory is fine")).collect();
    let node = Seen::Node { dev: DISK, owner: QEMU, mode: NODE_MODE };
    assert_eq!(seen, [Some(Seen::Other), None, Some(node)]);
    std::fs::remove_dir_all(&pod.dir.pod.path).expect("removable");
    let seen = HostNodes.observe_each(&pod.dir, &names).await;
    assert_eq!(seen.len(), names.len());
    assert!(seen.iter().all(|seen| matches!(seen, Err(NodeError::Dir(_)))), "{seen:?}");
}
