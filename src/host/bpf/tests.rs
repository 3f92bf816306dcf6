//! On the real kernel: a child process in a cgroup with a deny-all program, as a runtime would set
//! it up. Without root these tests are skipped, aloud.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::super::grants::Hierarchy;
use super::asm::{Assembler, Reg};
use super::*;

/// One test at a time: they share the host's one cgroup root.
static ROOT: Mutex<()> = Mutex::new(());

const LOOP: DevNum = DevNum { major: 7, minor: 6 };
const OTHER: DevNum = DevNum { major: 7, minor: 5 };

/// Whether the test can run; says so when not.
fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("{test}: skipped, needs root");
    }
    root
}

/// A program as a container runtime attaches it: nothing is allowed.
fn deny_all() -> OwnedFd {
    let mut asm = Assembler::default();
    asm.mov_imm(Reg::R0, 0).exit();
    let insns = asm.finish().expect("no labels");
    sys::prog_load(sys::name("test_deny_all"), &insns, c"GPL", sys::ProgKind::DEVICE)
        .expect("a trivial program loads")
}

/// A cgroup for the test, removed at its end.
struct TestCgroup {
    path: PathBuf,
}

impl TestCgroup {
    fn new(parent: &std::path::Path, name: &str) -> Self {
        let path = parent.join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a cgroup can be made");
        Self { path }
    }

    fn cgroup(&self) -> CgroupRef {
        let id = std::fs::metadata(&self.path).expect("it exists").ino();
        CgroupRef { path: self.path.clone(), hierarchy: Hierarchy::V2, id }
    }

    fn deny_all(&self) -> OwnedFd {
        let program = deny_all();
        let dir = std::fs::File::open(&self.path).expect("it exists");
        sys::prog_attach(&dir, &program).expect("a program can be attached");
        program
    }

    fn detach(&self, program: &OwnedFd) {
        let dir = std::fs::File::open(&self.path).expect("it exists");
        assert!(sys::prog_detach(&dir, program).expect("it can be detached"));
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.path).expect("the test's processes have ended");
    }
}

/// A shell in a cgroup that opens, or makes, what it is told to.
struct Prober {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

impl Prober {
    fn new(cgroup: &TestCgroup) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, dev) in [("disk", LOOP), ("other", OTHER)] {
            let made = nix::sys::stat::mknod(
                &dir.path().join(name),
                nix::sys::stat::SFlag::S_IFBLK,
                nix::sys::stat::Mode::from_bits_truncate(0o600),
                dev.to_dev_t(),
            );
            made.expect("root may make nodes");
        }
        let mut child = Command::new("/bin/sh")
            .arg("-c")
            .arg("cd \"$1\" && echo 0 > \"$2\" && echo in && while read -r command; do if sh -c \"$command\" 2>&-; then echo yes; else echo no; fi; done")
            .arg("prober")
            .arg(dir.path())
            .arg(cgroup.path.join("cgroup.procs"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell starts");
        let ask = child.stdin.take().expect("it was asked for");
        let answers = BufReader::new(child.stdout.take().expect("it was asked for"));
        let mut prober = Self { child, ask, answers, dir };
        assert_eq!(prober.line(), "in", "the shell is in the cgroup");
        prober
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the shell answers");
        line.trim().to_owned()
    }

    fn can(&mut self, command: &str) -> bool {
        writeln!(self.ask, "{command}").expect("the shell listens");
        self.line() == "yes"
    }

    /// Opens for reading and writing.
    fn opens(&mut self) -> bool {
        self.can(": <> ./disk")
    }

    fn reads(&mut self) -> bool {
        self.can(": < ./disk")
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        // Ends the shell by its own pid and waits, so that the cgroup can be removed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.dir.path();
    }
}

/// A container on a host with a runtime's program, and the override program gone at the end.
struct Host {
    root: PathBuf,
    overrides: BpfOverrides,
    _alone: MutexGuard<'static, ()>,
    _machine: std::fs::File,
}

impl Host {
    fn new() -> Self {
        let alone = ROOT.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = std::fs::File::create(std::env::temp_dir().join("lunplug-test-bpf.lock"))
            .expect("a lock file for other runs of these tests");
        machine.lock().expect("a lock on it");
        let overrides = BpfOverrides::new();
        let root = overrides.shared.root().expect("cgroup2 is mounted").path().to_owned();
        assert!(
            overrides.shared.find().expect("root can be queried").is_empty(),
            "a lunplug is installed on this machine; not testing under it"
        );
        Self { root, overrides, _alone: alone, _machine: machine }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.overrides.shared.uninstall().expect("it can be uninstalled");
    }
}

#[test]
fn root_a_grant_opens_the_device_and_its_revoke_closes_it() {
    if !is_root("root_a_grant_opens_the_device_and_its_revoke_closes_it") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-container");
    let sibling = TestCgroup::new(&host.root, "lunplug-test-sibling");
    let nested = TestCgroup::new(&container.path, "nested");
    let runtime = container.deny_all();
    let _other = sibling.deny_all();
    let mut inside = Prober::new(&container);
    let mut beside = Prober::new(&sibling);
    let mut below = Prober::new(&nested);
    let store = &host.overrides.shared;
    assert!(!inside.opens(), "the runtime denies it");

    assert!(store.install().expect("this kernel can").changed());
    assert!(!store.install().expect("it is there").changed());
    assert!(!inside.opens(), "the program alone allows nothing");

    let cgroup = container.cgroup();
    assert!(store.put(&cgroup, LOOP, Access::READ_WRITE).expect("granted").changed());
    assert!(!store.put(&cgroup, LOOP, Access::READ_WRITE).expect("granted").changed());
    assert!(inside.opens() && below.opens(), "the container and what is nested in it");
    assert!(!beside.opens(), "another container");
    assert!(!inside.can(": < ./other"), "another device");
    assert!(!inside.can("mknod ./made b 7 6"), "mknod is never granted");
    assert!(!inside.can(": < /dev/null"), "character devices stay the runtime's");
    let entries = store.entries().expect("readable");
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].path.as_deref(), Some(container.path.as_path()));

    assert!(store.take(cgroup.id, LOOP).expect("revoked").changed());
    assert!(!store.take(cgroup.id, LOOP).expect("revoked").changed());
    assert!(!inside.opens() && !below.opens());

    container.detach(&runtime);
    assert!(inside.can("mknod ./made b 7 6"), "it was the runtime's rule that refused it");
}

#[test]
fn root_a_read_grant_covers_reading_alone() {
    if !is_root("root_a_read_grant_covers_reading_alone") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-read");
    let _runtime = container.deny_all();
    let mut inside = Prober::new(&container);
    let store = &host.overrides.shared;
    store.put(&container.cgroup(), LOOP, Access::READ).expect("granted, installing on the way");
    assert!(inside.reads());
    assert!(!inside.opens(), "writing was not granted");
}

#[test]
fn root_grants_outlive_the_manager_and_a_new_runtime_program() {
    if !is_root("root_grants_outlive_the_manager_and_a_new_runtime_program") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-outlive");
    let runtime = container.deny_all();
    let mut inside = Prober::new(&container);
    {
        let first = BpfOverrides::new();
        first.shared.install().expect("installed");
        first.shared.put(&container.cgroup(), LOOP, Access::READ_WRITE).expect("granted");
    }
    assert!(inside.opens(), "after the process that granted it has let go");

    let second = &host.overrides.shared;
    assert!(!second.install().expect("found again").changed());
    assert_eq!(second.entries().expect("the same map").len(), 1);

    let _replacement = container.deny_all();
    container.detach(&runtime);
    assert!(inside.opens(), "as after a systemd reload");

    let third = BpfOverrides::new();
    third.shared.take(container.cgroup().id, LOOP).expect("a sidecar sees the same grants");
    assert!(!inside.opens());
}

#[test]
fn root_another_version_is_replaced_without_losing_grants() {
    if !is_root("root_another_version_is_replaced_without_losing_grants") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-upgrade");
    let _runtime = container.deny_all();
    let mut inside = Prober::new(&container);
    let store = &host.overrides.shared;

    // An older version: the same name and map, other instructions (it allows nothing).
    let map = sys::map_create(sys::name(NAME), KEY_SIZE as u32, VALUE_SIZE as u32, 16);
    let map = map.expect("a map can be made");
    let mut asm = Assembler::default();
    asm.load_map(Reg::R1, map.as_raw_fd()).mov_imm(Reg::R0, 1).exit();
    let old = sys::prog_load(
        sys::name(NAME),
        &asm.finish().expect("no labels"),
        c"Apache-2.0",
        sys::ProgKind::DEVICE,
    );
    let old = old.expect("it loads");
    let root = store.root().and_then(|r| Ok(r.open()?)).expect("the root opens");
    sys::prog_attach(&root, &old).expect("it attaches");
    store.put(&container.cgroup(), LOOP, Access::READ_WRITE).expect("another version serves too");
    assert!(!inside.opens(), "it knows no grants");

    assert!(store.install().expect("upgraded").changed());
    assert!(inside.opens(), "the old one's grants are in force");
    assert_eq!(store.find().expect("readable").len(), 1, "and the old program is gone");
}

#[test]
fn root_grants_of_dead_cgroups_are_told_and_wrong_cgroups_refused() {
    if !is_root("root_grants_of_dead_cgroups_are_told_and_wrong_cgroups_refused") {
        return;
    }
    let host = Host::new();
    let store = &host.overrides.shared;
    let cgroup = {
        let container = TestCgroup::new(&host.root, "lunplug-test-dead");
        store.put(&container.cgroup(), LOOP, Access::READ_WRITE).expect("granted");
        container.cgroup()
    };
    let entries = store.entries().expect("readable");
    assert_eq!((entries.len(), entries[0].path.clone()), (1, None));
    let put = |cgroup: &CgroupRef| store.put(cgroup, LOOP, Access::READ);
    assert!(matches!(put(&cgroup), Err(GrantStoreError::Gone(_))));

    let reborn = TestCgroup::new(&host.root, "lunplug-test-dead");
    let stale = CgroupRef { id: cgroup.id, ..reborn.cgroup() };
    assert!(matches!(put(&stale), Err(GrantStoreError::Gone(_))), "the name is another's now");

    let root = CgroupRef { path: host.root.clone(), hierarchy: Hierarchy::V2, id: 1 };
    assert!(matches!(put(&root), Err(GrantStoreError::Refused { .. })));
    let elsewhere = CgroupRef { path: "/tmp".into(), ..root };
    assert!(matches!(put(&elsewhere), Err(GrantStoreError::Refused { .. })));
}

#[test]
fn root_an_uninstall_by_another_is_noticed_at_the_next_grant() {
    if !is_root("root_an_uninstall_by_another_is_noticed_at_the_next_grant") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-uninstall");
    let _runtime = container.deny_all();
    let mut inside = Prober::new(&container);
    let store = &host.overrides.shared;
    store.put(&container.cgroup(), LOOP, Access::READ_WRITE).expect("granted");
    assert!(BpfOverrides::new().shared.uninstall().expect("uninstalled").changed());
    assert!(!inside.opens() && store.entries().expect("none").is_empty());
    store.put(&container.cgroup(), LOOP, Access::READ_WRITE).expect("granted anew");
    assert!(inside.opens());
}

#[test]
fn what_runs_after_ours_is_told() {
    assert_eq!(after(vec![1, 2, 3], 2), [3]);
    assert!(after(vec![1, 2, 3], 3).is_empty());
    assert_eq!(after(vec![1, 2], 9), [1, 2], "all of it when ours is not in force");
}

#[test]
fn keys_and_values_are_read_as_written() {
    let dev = DevNum { major: 259, minor: 1_048_575 };
    assert_eq!(read_key(&key(u64::MAX - 7, dev)), (u64::MAX - 7, dev));
    for access in [Access::NONE, Access::READ, Access::READ_WRITE] {
        assert_eq!(read_value(value(access)), access);
    }
}

#[test]
fn an_unknown_helper_means_an_old_kernel() {
    let source = io::Error::from_raw_os_error(nix::libc::EINVAL);
    let log = "0: (85) call unknown#186\ninvalid func unknown#186\nprocessed 2 insns\n".to_owned();
    match load_error((source, log)) {
        GrantStoreError::KernelTooOld { log, .. } => assert_eq!(log, "invalid func unknown#186"),
        other => panic!("{other}"),
    }
}

#[test]
fn a_host_without_cgroup2_has_no_grants_and_can_make_none() {
    let overrides = BpfOverrides::with_root(None);
    let store = &overrides.shared;
    assert!(store.entries().expect("none").is_empty());
    assert!(!store.take(1, LOOP).expect("nothing").changed());
    assert!(!store.uninstall().expect("nothing").changed());
    assert!(matches!(store.install(), Err(GrantStoreError::NoRoot)));
}

#[test]
fn root_the_grants_of_the_real_host_are_made_listed_and_collected() {
    if !is_root("root_the_grants_of_the_real_host_are_made_listed_and_collected") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-grants");
    let _runtime = container.deny_all();
    let mut inside = Prober::new(&container);
    let doors = crate::host::pods::PodDoors::real(std::path::Path::new("/proc"));
    let grants = crate::cgroup::Grants::new(doors.overrides, doors.lists);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let cgroup = runtime.block_on(doors.procs.cgroup(&container.path)).expect("it is one");
    assert_eq!(cgroup, container.cgroup());
    runtime.block_on(async {
        grants.install().await.expect("installed");
        let record = grants.prepare(&cgroup, LOOP, Access::READ_WRITE).await.expect("prepared");
        assert!(grants.grant(&record).await.expect("granted").changed());
        assert_eq!(grants.observe(&cgroup, LOOP).await.expect("seen"), Access::READ_WRITE);
        assert_eq!(grants.collect_dead().await.expect("none are dead"), 0);
    });
    assert!(inside.opens());
    drop((inside, container));
    assert_eq!(runtime.block_on(grants.collect_dead()).expect("collected"), 1);
    assert!(runtime.block_on(grants.list()).expect("empty").is_empty());
    assert!(runtime.block_on(grants.uninstall()).expect("gone").changed());
}

#[test]
fn root_several_that_install_at_once_share_one_program() {
    if !is_root("root_several_that_install_at_once_share_one_program") {
        return;
    }
    let host = Host::new();
    let container = TestCgroup::new(&host.root, "lunplug-test-race");
    for _ in 0..20 {
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for minor in 0..4 {
                let (start, cgroup) = (&start, container.cgroup());
                scope.spawn(move || {
                    let mine = BpfOverrides::new();
                    start.wait();
                    let dev = DevNum { major: 7, minor };
                    mine.shared.put(&cgroup, dev, Access::READ).expect("granted");
                });
            }
        });
        let store = &host.overrides.shared;
        assert_eq!(store.find().expect("readable").len(), 1);
        assert_eq!(store.entries().expect("readable").len(), 4, "all in the one map");
        store.uninstall().expect("for the next round");
    }
}
