//! The node's commands as tests use them: target, pod, guest, snapshot (see hack/lab/README.md),
//! the lunplug CLI, and the shell for the rest.

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{agent, emulation};

/// What a command left behind.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// The output of a command that had to succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout
    }

    /// Itself, as an error where the command failed.
    pub fn done(self) -> Result<(), Self> {
        if self.code == 0 { Ok(()) } else { Err(self) }
    }

    /// That of one that had to fail.
    #[track_caller]
    pub fn fails(self) -> Self {
        assert_ne!(self.code, 0, "it succeeded: {}", self.stdout);
        self
    }
}

/// Runs a program with arguments.
pub fn run(program: &str, args: &[&str]) -> Ran {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program} could not be run: {e}"));
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs a line of shell as root in the node.
pub fn sh(line: &str) -> Ran {
    run("bash", &["-euo", "pipefail", "-c", line])
}

/// Waits until `holds`, which has to become true by an event that something else brings about.
#[track_caller]
pub fn until(what: &str, deadline: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < deadline, "not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
    began.elapsed()
}

/// The storage state of the node, told by the system's own tools.
#[track_caller]
pub fn snapshot() -> String {
    sh("snapshot").ok()
}

/// Whether this is the long run that nobody waits for (`LUNPLUG_NIGHTLY=1 hack/test`).
pub fn nightly() -> bool {
    std::env::var("LUNPLUG_NIGHTLY").is_ok_and(|v| v == "1")
}

/// One story: what the node's storage was like before it. Begun after its LUNs were made; a story
/// that fails takes its volumes away, so that the next begins on a clean node.
pub struct Story {
    before: String,
}

impl Story {
    #[track_caller]
    pub fn begin() -> Self {
        Self { before: snapshot() }
    }

    /// Asserts that nothing was left since the story began.
    #[track_caller]
    pub fn nothing_left(&self) {
        let after = snapshot();
        if after == self.before {
            return;
        }
        std::fs::write("/tmp/before", &self.before).expect("/tmp is writable");
        std::fs::write("/tmp/after", &after).expect("/tmp is writable");
        panic!(
            "something was left behind:\n{}",
            sh("diff -u /tmp/before /tmp/after || true").stdout
        );
    }

    /// Whether the node is as it was.
    #[track_caller]
    pub fn is_clean(&self) -> bool {
        snapshot() == self.before
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        println!("lunplugd's last lines:\n{}", sh("daemon log 25").stdout);
        println!("the guest's console: {}", run("guest", &["console", POD, DOMAIN, "15"]).stdout);
        emulation::tell_broken_guests();
        sh("target portal restore 127.0.0.3; umount -l /mnt 2>/dev/null");
        signal(POD, "libvirtd", "CONT");
        if signal(POD, QEMU, "CONT").code == 0 {
            virsh(&["resume", DOMAIN]);
        } else {
            sh(&format!("guest down {POD} {DOMAIN}; guest up {POD} {DOMAIN}"));
        }
        run("guest", &["hotplug", POD, DOMAIN, "on"]);
        give_back_all();
    }
}

/// Takes away every volume of every VM, and the pods that a story made beside the shared one.
fn give_back_all() {
    let listed = lunplug(&["list", "-o", "json"]).stdout;
    let volumes: Vec<Value> = serde_json::from_str(&listed).unwrap_or_default();
    for volume in &volumes {
        let (Some(vm), Some(name)) = (volume["vm"].as_str(), volume["name"].as_str()) else {
            continue;
        };
        let ran =
            lunplug(&["removevolume", vm, "--volume-name", name, "--force", "--timeout", "120s"]);
        println!("cleaning up {name} of {vm}: {} {}", ran.code, ran.stderr);
    }
    for pod in sh("pod list").stdout.lines().filter(|pod| *pod != POD) {
        let domain = sh(&format!("pod virsh {pod} list --all --name | head -1")).stdout;
        println!("{pod}: {}", run("guest", &["console", pod, domain.trim()]).stdout);
        run("pod", &["down", pod]);
    }
    let listed = lunplug(&["vm", "list", "-o", "json"]).stdout;
    let vms: Vec<Value> = serde_json::from_str(&listed).unwrap_or_default();
    for vm in vms.iter().filter_map(|v| v["vm"].as_str()).filter(|vm| *vm != "default/vm") {
        lunplug(&["vm", "unregister", vm]);
    }
}

/// The pod and guest that the stories share, made by the first of them, or found; a target with no LUN.
pub struct Lab {
    /// `pod info`.
    pub pod: Value,
}

pub const POD: &str = "lab";
pub const DOMAIN: &str = "default_vm";
pub const VM: &str = "vm";

impl Lab {
    /// The shared lab, with lunplugd running and the VM registered.
    pub fn get() -> &'static Self {
        static LAB: OnceLock<Lab> = OnceLock::new();
        LAB.get_or_init(|| {
            sh("target up").ok();
            sh("daemon start").ok();
            let pod = sh(&format!("pod info {POD} 2>/dev/null || pod up {POD}")).ok();
            let runs = format!("pod virsh {POD} domstate {DOMAIN} 2>/dev/null | grep -q running");
            sh(&format!("{runs} || guest up {POD} {DOMAIN}")).ok();
            let lab = Self { pod: serde_json::from_str(&pod).expect("pod up prints JSON") };
            lunplug(&["vm", "register", VM, "--pod-uid", lab.uid(), "--domain", DOMAIN]).ok();
            lab
        })
    }

    fn text(&self, key: &str) -> &str {
        self.pod[key].as_str().unwrap_or_else(|| panic!("pod info has no {key}"))
    }

    /// The pod's UID.
    pub fn uid(&self) -> &str {
        self.text("uid")
    }

    /// The hotplug directory on the host.
    pub fn hotplug_dir(&self) -> &str {
        self.text("hotplug_dir")
    }

    /// The container's cgroup directory.
    pub fn cgroup(&self) -> &str {
        self.text("cgroup")
    }
}

/// lunplugd with settings of a story's own, until that ends.
pub struct Configured(());

impl Configured {
    /// `settings` as after `--set`.
    #[track_caller]
    pub fn with(settings: &[&str]) -> Self {
        run("daemon", &[&["configure"], settings].concat()).ok();
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        run("daemon", &["configure"]);
    }
}

/// Programs in a pod that are stopped by a signal, until this is dropped.
pub struct Stopped {
    pod: &'static str,
    program: &'static str,
}

impl Stopped {
    #[track_caller]
    pub fn new(pod: &'static str, program: &'static str) -> Self {
        signal(pod, program, "STOP").ok();
        Self { pod, program }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.pod, self.program, "CONT");
    }
}

/// Sends a signal to a program's processes in a pod.
pub fn signal(pod: &str, program: &str, signal: &str) -> Ran {
    run("pod", &["signal", pod, program, signal])
}

pub const QEMU: &str = "qemu-system-x86";

/// A LUN of the lab's target that goes when the test ends.
pub struct Lun {
    pub name: String,
    pub number: u16,
    pub wwid: String,
}

impl Lun {
    #[track_caller]
    pub fn new(name: &str, number: u16, size: &str) -> Self {
        sh(&format!("target lun rm {name} 2>/dev/null || true")).ok();
        let wwid = sh(&format!("target lun add {name} {number} {size}")).ok().trim().to_owned();
        Self { name: name.into(), number, wwid }
    }

    /// The URL by which lunplug finds it: both portals.
    pub fn source(&self) -> String {
        source_of(self.number)
    }

    /// Another disk under the same number.
    #[track_caller]
    pub fn swap(&mut self) {
        self.wwid =
            sh(&format!("target lun swap {} {}", self.name, self.number)).ok().trim().to_owned();
    }

    /// Gives it another size while it is in use; nothing is announced to anybody.
    #[track_caller]
    pub fn grow(&self, size: &str) {
        sh(&format!("target lun grow {} {size}", self.name)).ok();
    }

    /// The first `n` bytes of the backing store.
    #[track_caller]
    pub fn read(&self, n: usize) -> Vec<u8> {
        let path = sh(&format!("target lun file {}", self.name)).ok();
        let mut bytes = std::fs::read(path.trim()).expect("the backing store is a file");
        bytes.truncate(n);
        bytes
    }
}

impl Drop for Lun {
    fn drop(&mut self) {
        sh(&format!("target lun rm {}", self.name));
    }
}

/// The name of the lab's target.
pub fn iqn() -> &'static str {
    static IQN: OnceLock<String> = OnceLock::new();
    IQN.get_or_init(|| sh("target iqn").ok().trim().to_owned())
}

/// The source URL of a LUN number at both portals.
pub fn source_of(lun: impl std::fmt::Display) -> String {
    format!("iscsi://127.0.0.2:3260,127.0.0.3:3260/{}/{lun}", iqn())
}

/// Runs the CLI.
pub fn lunplug(args: &[&str]) -> Ran {
    run("lunplug", args)
}

/// How long the CLI waits, unless the story says.
fn patience(more: &[&str]) -> &'static [&'static str] {
    if more.contains(&"--timeout") { &[] } else { &["--timeout", "120s"] }
}

/// Adds a volume to the shared VM and waits until it is ready.
pub fn add(name: &str, source: &str, more: &[&str]) -> Ran {
    let args = ["addvolume", VM, "--volume-name", name, "--source", source];
    lunplug(&[&args[..], more, patience(more)].concat())
}

/// Removes a volume and waits until it is gone.
pub fn remove(name: &str, more: &[&str]) -> Ran {
    let args = ["removevolume", VM, "--volume-name", name];
    lunplug(&[&args[..], more, patience(more)].concat())
}

/// A volume as the daemon tells it.
#[track_caller]
pub fn volume(name: &str) -> Value {
    let json = lunplug(&["describe", VM, name, "-o", "json"]).ok();
    serde_json::from_str(&json)
        .unwrap_or_else(|e| panic!("describe -o json printed no JSON ({e}): {json}"))
}

/// Why a volume is not further; empty when all is well, or when it is gone.
pub fn reason(name: &str) -> String {
    let json = lunplug(&["describe", VM, name, "-o", "json"]).stdout;
    let told: Value = serde_json::from_str(&json).unwrap_or_default();
    told["trouble"]["reason"].as_str().unwrap_or_default().to_owned()
}

/// Waits until a volume is told to be gone.
#[track_caller]
pub fn gone(name: &str, deadline: Duration) {
    until(&format!("volume {name} is gone"), deadline, || {
        lunplug(&["describe", VM, name]).code == 3
    });
}

/// A VM as the daemon tells it.
#[track_caller]
pub fn vm_info(name: &str) -> Value {
    let json = lunplug(&["vm", "list", "-o", "json"]).ok();
    let vms: Vec<Value> = serde_json::from_str(&json).expect("vm list -o json prints JSON");
    let found = vms.iter().find(|v| v["vm"] == format!("default/{name}"));
    found.unwrap_or_else(|| panic!("no VM {name}: {vms:?}")).clone()
}

/// How many calls of the daemon are stuck.
#[track_caller]
pub fn stuck_calls() -> u64 {
    let json = lunplug(&["node", "-o", "json"]).ok();
    let node: Value = serde_json::from_str(&json).expect("node -o json prints JSON");
    node["stuck_calls"].as_u64().expect("a number")
}

/// The code that a failed call carries in its message.
#[track_caller]
pub fn refused(ran: Ran, code: &str) {
    let ran = ran.fails();
    assert!(ran.stderr.contains(code), "expected {code}: {}", ran.stderr);
}

/// Runs a command in the guest.
pub fn in_guest(line: &str) -> Ran {
    agent::exec(POD, DOMAIN, line)
}

/// A disk as the guest sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct GuestDisk {
    pub name: String,
    pub bytes: u64,
    pub serial: String,
}

/// The guest's disks.
#[track_caller]
pub fn guest_disks() -> Vec<GuestDisk> {
    let lines = agent::disks(POD, DOMAIN);
    let disk = |line: &str| {
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap_or_default().to_owned();
        GuestDisk { name: word(), bytes: word().parse().expect("bytes"), serial: word() }
    };
    lines.lines().map(disk).collect()
}

/// The guest's disk with that serial: its kernel comes to a disk some time after QEMU has it.
#[track_caller]
pub fn guest_disk(serial: &str) -> GuestDisk {
    let mut found = None;
    until(&format!("the guest has a disk {serial}"), Duration::from_secs(30), || {
        found = guest_disks().into_iter().find(|d| d.serial == serial);
        found.is_some()
    });
    found.expect("it was waited for")
}

/// Waits until the guest has so many disks: it comes to them, and lets go of them, some time after QEMU.
#[track_caller]
pub fn guest_has(disks: usize) {
    until(&format!("the guest has {disks} disks"), Duration::from_secs(30), || {
        guest_disks().len() == disks
    });
}

/// Opens a device node in the container, as QEMU would; the error is the kernel's.
pub fn open_in_pod(name: &str) -> Ran {
    let path = format!("if=/run/kubevirt/hotplug-disks/{name}");
    run("pod", &["exec", POD, "dd", &path, "of=/dev/null", "bs=512", "count=1"])
}

/// virsh on the pod's libvirt.
pub fn virsh(args: &[&str]) -> Ran {
    run("pod", &[&["virsh", POD], args].concat())
}
