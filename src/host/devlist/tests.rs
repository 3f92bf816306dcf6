use std::process::Command;

use super::*;

const LOOP: DevNum = DevNum { major: 7, minor: 6 };

fn rule(devtype: DeviceType, major: i64, minor: i64, access: &str) -> DeviceResource {
    let access = DevicePermissions::from_str(access).expect("rwm");
    DeviceResource { allow: true, devtype, major, minor, access }
}

#[test]
fn a_list_is_read_with_its_wildcards() {
    let rules = [
        rule(DeviceType::Char, 7, 6, "rw"),
        rule(DeviceType::Block, 7, 6, "r"),
        rule(DeviceType::Block, 8, -1, "rw"),
    ];
    assert_eq!(listed(&rules, LOOP), Access::READ);
    assert_eq!(listed(&rules, DevNum { major: 8, minor: 16 }), Access::READ_WRITE);
    assert_eq!(listed(&rules, DevNum { major: 9, minor: 6 }), Access::NONE);
    assert!(!allows_all(&rules));
    let all = [rule(DeviceType::All, -1, -1, "rwm")];
    assert!(allows_all(&all));
    assert_eq!(listed(&all, LOOP), Access::READ_WRITE);
}

/// A group below the root of the devices hierarchy, removed at the end.
struct Group(PathBuf);

impl Group {
    fn new(parent: &Path, name: &str) -> Self {
        let path = parent.join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a group can be made");
        Self(path)
    }

    fn cgroup(&self) -> CgroupRef {
        let id = std::fs::metadata(&self.0).expect("it exists").ino();
        CgroupRef { path: self.0.clone(), hierarchy: Hierarchy::V1, id }
    }

    fn write(&self, file: &str, rule: &str) {
        std::fs::write(self.0.join(file), rule).expect("root may write rules");
    }

    fn list(&self) -> String {
        std::fs::read_to_string(self.0.join("devices.list")).expect("readable")
    }

    /// Whether a process in the group may open the loop device for reading and writing.
    fn opens(&self) -> bool {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let node = dir.path().join("disk");
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::sys::stat::mknod(&node, nix::sys::stat::SFlag::S_IFBLK, mode, LOOP.to_dev_t())
            .expect("root may make nodes");
        let status = Command::new("/bin/sh")
            .args(["-c", "echo 0 > \"$1\" && exec sh -c ': <> \"$0\"' \"$2\" 2>&-", "prober"])
            .arg(self.0.join("cgroup.procs"))
            .arg(&node)
            .status();
        status.expect("a shell starts").success()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).expect("nobody is in it");
    }
}

/// The hierarchy, where this machine has it and the test may use it.
fn hierarchy(test: &str) -> Option<(CgroupV1Devices, PathBuf)> {
    let lists = CgroupV1Devices::new();
    match lists.mount.clone() {
        Some(mount) if nix::unistd::geteuid().is_root() => Some((lists, mount)),
        Some(_) => {
            eprintln!("{test}: skipped, needs root");
            None
        }
        None => {
            eprintln!("{test}: skipped, this machine has no devices hierarchy of cgroup v1");
            None
        }
    }
}

#[test]
fn root_v1_adds_what_lacks_and_takes_back_only_that() {
    let Some((lists, mount)) = hierarchy("root_v1_adds_what_lacks_and_takes_back_only_that") else {
        return;
    };
    let pod = Group::new(&mount, "lunplug-test-v1-pod");
    // As a runtime does: everything denied while there are no children, then what is allowed.
    pod.write("devices.deny", "a");
    pod.write("devices.allow", "b 7:6 r");
    let container = Group::new(&pod.0, "container");
    let other = Group::new(&pod.0, "other");
    for group in [&container, &other] {
        group.write("devices.deny", "a");
    }
    assert!(!container.opens(), "the runtime denies it");

    let changes = lists.missing(&container.cgroup(), LOOP, Access::READ_WRITE).expect("readable");
    let added: Vec<_> = changes.iter().map(|c| (c.cgroup.path.clone(), c.added)).collect();
    let write = Access { read: false, write: true };
    assert_eq!(
        added,
        [(pod.0.clone(), write), (container.0.clone(), Access::READ_WRITE)],
        "parents first, and only what they lack"
    );
    for change in &changes {
        assert!(lists.allow(change, LOOP).expect("allowed").changed());
        assert!(!lists.allow(change, LOOP).expect("allowed").changed());
    }
    assert!(container.opens());
    assert!(!other.opens(), "another container of the pod");
    assert!(lists.missing(&container.cgroup(), LOOP, Access::READ_WRITE).expect("").is_empty());

    // Another container has it too: the parent keeps it.
    for change in &lists.missing(&other.cgroup(), LOOP, Access::READ_WRITE).expect("readable") {
        lists.allow(change, LOOP).expect("allowed");
    }
    assert!(lists.deny(&changes[1], LOOP, false).expect("denied").changed());
    assert!(!lists.deny(&changes[0], LOOP, true).expect("spared").changed());
    assert!(!container.opens() && other.opens());

    other.write("devices.deny", "b 7:6 rw");
    assert!(lists.deny(&changes[0], LOOP, true).expect("denied").changed());
    assert_eq!(pod.list().trim(), "b 7:6 r", "what was there before is there again");
    assert!(!lists.deny(&changes[0], LOOP, true).expect("nothing left").changed());
}

#[test]
fn root_v1_a_group_that_allows_everything_is_left_alone() {
    let Some((lists, mount)) = hierarchy("root_v1_a_group_that_allows_everything_is_left_alone")
    else {
        return;
    };
    let group = Group::new(&mount, "lunplug-test-v1-all");
    let cgroup = group.cgroup();
    assert!(lists.missing(&cgroup, LOOP, Access::READ_WRITE).expect("readable").is_empty());
    let change = ListChange { cgroup, added: Access::READ_WRITE };
    assert!(!lists.deny(&change, LOOP, false).expect("left alone").changed());
    assert!(group.opens());
}

#[test]
fn root_v1_refuses_the_root_and_other_directories() {
    let Some((lists, mount)) = hierarchy("root_v1_refuses_the_root_and_other_directories") else {
        return;
    };
    for path in [mount.clone(), "/tmp".into(), mount.join("nobody-has-this")] {
        let id = std::fs::metadata(&path).map_or(0, |m| m.ino());
        let cgroup = CgroupRef { path, hierarchy: Hierarchy::V1, id };
        let change = ListChange { cgroup, added: Access::READ };
        assert!(lists.allow(&change, LOOP).is_err());
    }
    let group = Group::new(&mount, "lunplug-test-v1-id");
    let cgroup = CgroupRef { id: 1, ..group.cgroup() };
    let change = ListChange { cgroup, added: Access::READ };
    assert!(matches!(lists.allow(&change, LOOP), Err(GrantStoreError::Gone(_))));
    assert!(!lists.deny(&change, LOOP, false).expect("gone is fine").changed());
}
