//! What is on the node already: a loop device, which has no identity, and a LUN that somebody else attached.

use std::time::Duration;

use crate::node::{
    Configured, Lab, Story, add, guest_disk, guest_has, in_guest, lunplug, reason, refused, remove,
    sh, until, volume,
};

const LONG: Duration = Duration::from_secs(60);

/// A loop device on a file of its own, until the story ends.
struct Loop {
    file: String,
    device: String,
}

impl Loop {
    #[track_caller]
    fn new(name: &str, size: &str) -> Self {
        let file = format!("/var/tmp/lunplug-{name}.img");
        sh(&format!("rm -f {file}; truncate -s {size} {file}")).ok();
        let device = sh(&format!("losetup --find --show {file}")).ok().trim().to_owned();
        Self { file, device }
    }

    fn source(&self) -> String {
        format!("block://{}", self.device)
    }

    #[track_caller]
    fn grow(&self, size: &str) {
        sh(&format!("truncate -s {size} {}; losetup -c {}", self.file, self.device)).ok();
    }

    /// The first bytes of the file beneath it.
    #[track_caller]
    fn read(&self, n: usize) -> String {
        sh(&format!("head -c {n} {}", self.file)).ok()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        sh(&format!("losetup -d {}; rm -f {}", self.device, self.file));
    }
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_block_device_of_the_node_is_a_guests_disk_and_stays_on_the_node() {
    Lab::get();
    let device = Loop::new("local", "16M");
    let story = Story::begin();
    let settings = ["local.block_roots=/dev", "local.without_identity=path"];
    let configured = Configured::with(&settings);
    add("local", &device.source(), &[]).ok();
    assert_eq!(volume("local")["device"]["wwid"], format!("path.{}", device.device).as_str());
    let disk = guest_disk("local");
    assert_eq!(disk.bytes, 16 << 20);
    in_guest(&format!("echo first > /dev/{}; sync", disk.name)).ok();

    println!("the daemon comes and goes");
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    until("the volume is ready again", LONG, || {
        volume("local")["phase"] == "Ready" && reason("local").is_empty()
    });

    device.grow("32M");
    lunplug(&["expand", "vm", "--volume-name", "local"]).ok();
    until("the guest sees its size", LONG, || guest_disk("local").bytes == 32 << 20);

    remove("local", &[]).ok();
    guest_has(0);
    assert_eq!(device.read(5), "first");
    sh(&format!("losetup {}", device.device)).ok();
    drop(configured);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn what_may_not_be_given_is_refused() {
    Lab::get();
    let device = Loop::new("refused", "16M");
    let story = Story::begin();
    refused(add("none", &device.source(), &[]), "SOURCE_NOT_ALLOWED");
    {
        let _configured = Configured::with(&["local.block_roots=/dev"]);
        refused(add("nameless", &device.source(), &[]), "NO_UNIQUE_IDENTITY");
        remove("nameless", &[]).ok();
        refused(add("null", "block:///dev/null", &[]), "SOURCE_NOT_FOUND");
        remove("null", &[]).ok();
    }
    {
        let settings = ["local.block_roots=/dev", "local.without_identity=path"];
        let _configured = Configured::with(&settings);
        sh(&format!("mkfs.ext4 -q {0}; mkdir -p /mnt/local; mount {0} /mnt/local", device.device))
            .ok();
        refused(add("mounted", &device.source(), &["--timeout", "20s"]), "DEVICE_HELD");
        remove("mounted", &[]).ok();
        sh("umount /mnt/local; rmdir /mnt/local").ok();
    }
    guest_has(0);
    story.nothing_left();
}
