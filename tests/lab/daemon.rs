//! The daemon comes and goes; volumes stay.

use crate::node::{
    Lab, Lun, Story, VM, add, guest_disk, guest_has, in_guest, lunplug, remove, sh, snapshot,
    volume,
};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn volumes_outlive_the_daemon_and_are_removed_by_its_successor() {
    Lab::get();
    let luns = [Lun::new("restart1", 1, "16M"), Lun::new("restart2", 2, "16M")];
    let story = Story::begin();
    add("a", &luns[0].source(), &[]).ok();
    add("b", &luns[1].source(), &["--bus", "virtio"]).ok();
    let attached = snapshot();
    let disk = guest_disk("a").name;
    for how in
        ["systemctl restart lunplugd", "systemctl kill -s KILL lunplugd; systemctl start lunplugd"]
    {
        sh(how).ok();
        in_guest(&format!("dd if=/dev/{disk} of=/dev/null bs=64k count=1 iflag=direct")).ok();
        for name in ["a", "b"] {
            lunplug(&[
                "addvolume",
                VM,
                "--volume-name",
                name,
                "--timeout",
                "60s",
                "--source",
                &luns[usize::from(name == "b")].source(),
                "--bus",
                if name == "b" { "virtio" } else { "scsi" },
            ])
            .ok();
            assert_eq!(volume(name)["phase"], "Ready", "after {how}");
        }
        assert_eq!(snapshot(), attached, "after {how}");
    }
    sh("systemctl restart lunplugd").ok();
    remove("a", &[]).ok();
    remove("b", &[]).ok();
    guest_has(0);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_daemon_killed_in_mid_attach_converges() {
    Lab::get();
    let lun = Lun::new("killed", 3, "16M");
    let story = Story::begin();
    lunplug(&["addvolume", VM, "--volume-name", "killed", "--source", &lun.source(), "--no-wait"])
        .ok();
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    add("killed", &lun.source(), &[]).ok();
    assert_eq!(guest_disk("killed").bytes, 16 << 20);
    lunplug(&["removevolume", VM, "--volume-name", "killed", "--no-wait"]).ok();
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    // Either it was gone before the kill, or the successor finishes it.
    let _ = remove("killed", &[]);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn the_same_vm_is_not_served_twice() {
    Lab::get();
    let second =
        sh(&format!("timeout 20 lunplugd --vm default/{VM} --socket /run/lunplug/second.sock"))
            .fails();
    assert!(
        second.stderr.contains("VM_SERVED_ELSEWHERE") || second.stderr.contains("served"),
        "{}",
        second.stderr
    );
}
