//! Directories of the pod that go while its VM runs, and calls into the kernel that never return.

use std::time::Duration;

use crate::node::{
    Configured, Lab, Lun, Story, VM, add, gone, guest_disk, in_guest, lunplug, open_in_pod, reason,
    refused, remove, sh, stuck_calls, until, volume,
};

const LONG: Duration = Duration::from_secs(90);

/// A directory that is elsewhere until this is dropped; whoever has it open or mounted keeps it.
struct Moved(String);

impl Moved {
    #[track_caller]
    fn away(dir: &str) -> Self {
        sh(&format!("mv {dir} {dir}.away")).ok();
        Self(dir.to_owned())
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        sh(&format!("mv -T {0}.away {0}", self.0));
    }
}

/// A device-mapper map that takes no I/O until this is dropped.
struct Suspended(String);

impl Suspended {
    #[track_caller]
    fn map(name: &str) -> Self {
        sh(&format!("dmsetup suspend --noflush --nolockfs {name}")).ok();
        Self(name.to_owned())
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        sh(&format!("dmsetup resume {}", self.0));
    }
}

/// The guest reads its disk.
#[track_caller]
fn guest_reads(serial: &str) {
    let disk = guest_disk(serial).name;
    in_guest(&format!("dd if=/dev/{disk} of=/dev/null bs=64k count=1 iflag=direct")).ok();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn directories_that_are_gone_take_nothing_from_the_guest() {
    let lab = Lab::get();
    let (lun, other) = (Lun::new("dirless", 1, "16M"), Lun::new("more", 2, "16M"));
    let story = Story::begin();
    add("dirless", &lun.source(), &[]).ok();

    let moved = Moved::away(lab.hotplug_dir());
    refused(add("more", &other.source(), &[]), "HOTPLUG_DIR_UNSAFE");
    guest_reads("dirless");
    drop(moved);
    add("more", &other.source(), &[]).ok();
    remove("more", &[]).ok();

    // With the pod's directory goes libvirt's socket; what runs in the pod runs on.
    let moved = Moved::away(&format!("/var/lib/kubelet/pods/{}", lab.uid()));
    sh("systemctl restart lunplugd").ok();
    until("the trouble is told", LONG, || reason("dirless") == "POD_GONE");
    assert_eq!(volume("dirless")["phase"], "Ready");
    open_in_pod("dirless").ok();
    lunplug(&["removevolume", VM, "--volume-name", "dirless", "--force", "--no-wait"]).ok();
    until("the removal waits", LONG, || volume("dirless")["trouble"]["retry_at"].is_string());
    assert_eq!(volume("dirless")["phase"], "Detaching");
    open_in_pod("dirless").ok();
    drop(moved);
    gone("dirless", LONG);
    story.nothing_left();
}

/// The map is suspended, as under a SAN that hangs: a flush of it is stuck in the kernel.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_flush_that_does_not_return_holds_up_its_volume_alone() {
    Lab::get();
    let (lun, other) = (Lun::new("stuck", 1, "16M"), Lun::new("free", 2, "16M"));
    let story = Story::begin();
    let short = Configured::with(&["deadlines.kernel_call=3s"]);
    // QEMU itself flushes what it may write before it lets go, and what the guest is just reading would
    // keep it, too.
    add("stuck", &lun.source(), &["--read-only"]).ok();
    in_guest("udevadm settle").ok();
    let map = volume("stuck")["device"]["map"].as_str().expect("a map").to_owned();
    let suspended = Suspended::map(&map);
    lunplug(&["removevolume", VM, "--volume-name", "stuck", "--force", "--no-wait"]).ok();
    until("the call is given up", LONG, || !reason("stuck").is_empty());
    println!("told: {}", volume("stuck")["trouble"]);
    assert!(stuck_calls() > 0);
    add("free", &other.source(), &[]).ok();
    remove("free", &[]).ok();
    drop(suspended);
    gone("stuck", LONG);
    until("no call is stuck", LONG, || stuck_calls() == 0);
    drop(short);
    story.nothing_left();
}
