//! Files of the node's that are disks: mounted into the pod, where nobody but its container sees them.

use std::time::Duration;

use crate::node::{
    Configured, Lab, Lun, POD, Story, add, gone, guest_disk, guest_has, in_guest, lunplug,
    open_in_pod, reason, refused, remove, sh, snapshot, until, volume,
};

const LONG: Duration = Duration::from_secs(60);

/// A file of QEMU's user, until the story ends.
struct File(String);

impl File {
    #[track_caller]
    fn new(name: &str, make: &str) -> Self {
        let file = Self(format!("/srv/lunplug-{name}"));
        sh(&format!("rm -f {0}; {make} {0} 16M", file.0)).ok();
        let user = sh(&format!("pod exec {POD} id -u")).ok();
        sh(&format!("chown {} {}; chmod 600 {1}", user.trim(), file.0)).ok();
        file
    }

    fn raw(name: &str) -> Self {
        Self::new(name, "f() { truncate -s $2 $1; }; f")
    }

    fn qcow2(name: &str) -> Self {
        Self::new(name, "qemu-img create -q -f qcow2")
    }

    fn source(&self) -> String {
        format!("file://{}", self.0)
    }

    fn image(&self) -> String {
        format!("file+qcow2://{}", self.0)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        sh(&format!("rm -f {}", self.0));
    }
}

/// The mounts of files in pods, as the node's processes have them.
fn mounted() -> String {
    snapshot().split("== files in pods").nth(1).unwrap_or_default().to_owned()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_file_of_the_node_is_a_guests_disk_and_is_seen_by_its_pod_alone() {
    let lab = Lab::get();
    let file = File::raw("file.img");
    let story = Story::begin();
    let configured = Configured::with(&["local.file_roots=/srv"]);
    add("file", &file.source(), &[]).ok();
    let disk = guest_disk("file");
    assert_eq!(disk.bytes, 16 << 20);
    in_guest(&format!("echo first > /dev/{}; sync", disk.name)).ok();
    assert_eq!(sh(&format!("head -c 5 {}", file.0)).ok(), "first");
    let there = mounted();
    assert!(there.contains("/hotplug-disks/file"), "{there}");
    let options = there.lines().find(|l| l.contains("/hotplug-disks/file")).unwrap_or_default();
    for option in ["nosuid", "nodev", "noexec"] {
        assert!(options.contains(option), "{options}");
    }
    let placeholder = format!("{}/file", lab.hotplug_dir());
    let on_host = sh(&format!("stat -c '%s %a %u' {placeholder}")).ok();
    assert_eq!(on_host.trim(), "0 0 0", "the node sees the placeholder");

    println!("the daemon comes and goes");
    let before = snapshot();
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    let ready = || volume("file")["phase"] == "Ready" && reason("file").is_empty();
    until("the volume is ready again", LONG, ready);
    assert_eq!(snapshot(), before);

    println!("the placeholder is removed, and the mount with it");
    // Without a daemon that would bring both back at once.
    sh(&format!("systemctl stop lunplugd; rm {placeholder}")).ok();
    assert!(!mounted().contains("/hotplug-disks/file"), "{}", mounted());
    in_guest(&format!("head -c 5 /dev/{} | grep first", disk.name)).ok();
    sh("systemctl start lunplugd").ok();
    until("it is mounted again", LONG, || ready() && mounted().contains("/hotplug-disks/file"));
    assert_eq!(snapshot(), before);

    println!("it grows");
    sh(&format!("truncate -s 32M {}", file.0)).ok();
    lunplug(&["expand", "vm", "--volume-name", "file"]).ok();
    until("the guest sees its size", LONG, || guest_disk("file").bytes == 32 << 20);

    println!("somebody in the pod has it open");
    open_in_pod("file").ok();
    let pod = format!("pod exec {POD} sh -c 'exec sleep 600 < /run/kubevirt/hotplug-disks/file'");
    sh(&format!("setsid {pod} >/dev/null 2>&1 &")).ok();
    let holder = "pgrep -fx 'sleep 600'";
    until("it is open", LONG, || sh(holder).code == 0);
    refused(remove("file", &["--timeout", "10s"]), "DEVICE_HELD");
    guest_has(0);
    sh("pkill -fx 'sleep 600'").ok();
    gone("file", LONG);
    drop(configured);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_image_beside_a_lun_is_taken_whole_and_a_file_that_qemu_cannot_open_is_refused() {
    Lab::get();
    let (image, other) = (File::qcow2("image.qcow2"), File::raw("other.img"));
    let lun = Lun::new("beside", 1, "16M");
    let story = Story::begin();
    refused(add("image", &image.image(), &[]), "SOURCE_NOT_ALLOWED");
    let configured = Configured::with(&["local.file_roots=/srv"]);
    add("beside", &lun.source(), &[]).ok();
    add("image", &image.image(), &["--bus", "virtio", "--cache", "writeback"]).ok();
    let disk = guest_disk("image");
    assert_eq!(disk.bytes, 16 << 20, "the size of the disk in it");
    in_guest(&format!("echo second > /dev/{}; sync", disk.name)).ok();
    println!("no symlink is followed, and another name is of the same file");
    let link = "/srv/lunplug-link";
    sh(&format!("ln -s {} {link}", other.0)).ok();
    refused(add("link", &format!("file://{link}"), &[]), "SOURCE_NOT_ALLOWED");
    remove("link", &[]).ok();
    sh(&format!("rm {link}; ln {} {link}", image.0)).ok();
    refused(add("twice", &format!("file+qcow2://{link}"), &[]), "SOURCE_IN_USE");
    remove("twice", &[]).ok();
    sh(&format!("rm {link}")).ok();
    remove("image", &[]).ok();
    let first = "/srv/lunplug-first";
    sh(&format!("qemu-img dd -f qcow2 -O raw bs=512 count=1 if={} of={first}", image.0)).ok();
    assert_eq!(sh(&format!("head -c 6 {first}; rm -f {first}")).ok(), "second");

    println!("it gets a backing file");
    let rebase = format!("qemu-img rebase -u -f qcow2 -b {} -F raw {}", other.0, image.0);
    sh(&rebase).ok();
    refused(add("image", &image.image(), &[]), "IMAGE_REFUSED");
    remove("image", &[]).ok();
    println!("it is another user's");
    sh(&format!("chown 0:0 {}", other.0)).ok();
    refused(add("other", &other.source(), &[]), "FILE_NOT_ACCESSIBLE");
    remove("other", &[]).ok();
    assert_eq!(volume("beside")["phase"], "Ready");
    remove("beside", &[]).ok();
    guest_has(0);
    drop(configured);
    story.nothing_left();
}
