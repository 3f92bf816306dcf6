//! Media in the guest's cdrom drive, as the guest and libvirt see it.

use crate::node::{
    DOMAIN, Lab, Lun, POD, Story, VM, add, gone, in_guest, lunplug, reason, refused, remove, run,
    sh, until, virsh, volume,
};
use crate::san::SOON;

/// The drive of the lab's guest (hack/lab/in-node/guest).
const DRIVE: &str = "sdz";

/// What libvirt says is in the drive; empty when nothing.
#[track_caller]
fn in_drive() -> String {
    let told = virsh(&["domblklist", DOMAIN]).ok();
    let line = told.lines().find(|line| line.split_whitespace().next() == Some(DRIVE));
    let source = line.and_then(|line| line.split_whitespace().nth(1)).expect("it has the drive");
    if source == "-" { String::new() } else { source.to_owned() }
}

/// Waits until the guest reads these bytes at the beginning of the medium.
#[track_caller]
fn guest_reads(bytes: &str) {
    let line = format!("dd if=/dev/sr0 bs=2048 count=1 2>/dev/null | head -c {}", bytes.len());
    until(&format!("the guest reads {bytes}"), SOON, || in_guest(&line).stdout == bytes);
}

/// A LUN that begins with its name.
#[track_caller]
fn written(name: &str, number: u16) -> Lun {
    let lun = Lun::new(name, number, "16M");
    let line = format!("printf %s {name} | dd of=$(target lun file {name}) conv=notrunc");
    sh(&line).ok();
    lun
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_medium_is_inserted_swapped_and_ejected() {
    Lab::get();
    let (first, second) = (written("first", 1), written("second", 2));
    let story = Story::begin();
    let cdrom = ["--disk-type", "cdrom"];
    refused(
        add("first", &first.source(), &[&cdrom[..], &["--serial", "x"]].concat()),
        "INVALID_SERIAL",
    );
    refused(
        add("first", &first.source(), &[&cdrom[..], &["--drive", "sdq"]].concat()),
        "DRIVE_NOT_FOUND",
    );
    add("first", &first.source(), &cdrom).ok();
    assert_eq!(volume("first")["target"], DRIVE);
    assert!(in_drive().ends_with("/first"), "{}", in_drive());
    guest_reads("first");
    let written = in_guest("dd if=/dev/zero of=/dev/sr0 bs=2048 count=1");
    assert_ne!(written.code, 0, "{written:?}");
    // Killed and started anew, it knows the medium as its own.
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    refused(add("second", &second.source(), &cdrom), "DRIVE_OCCUPIED");
    lunplug(&["removevolume", VM, "--volume-name", "first", "--no-wait"]).ok();
    add("second", &second.source(), &cdrom).ok();
    guest_reads("second");
    gone("first", SOON);
    remove("second", &[]).ok();
    assert_eq!(in_drive(), "");
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_guest_that_locks_the_tray_is_told_and_a_medium_of_somebody_elses_stays() {
    Lab::get();
    let lun = written("locked", 3);
    let story = Story::begin();
    let cdrom = ["--disk-type", "cdrom", "--drive", DRIVE];
    add("locked", &lun.source(), &cdrom).ok();
    guest_reads("locked");
    // Whoever has the device open has the tray locked.
    in_guest("sleep 600 </dev/sr0 >/dev/null 2>&1 & echo $! >/tmp/holder").ok();
    refused(remove("locked", &["--timeout", "40s"]), "IN_USE_BY_GUEST");
    assert_eq!(reason("locked"), "IN_USE_BY_GUEST");
    guest_reads("locked");
    in_guest("kill $(cat /tmp/holder)").ok();
    remove("locked", &[]).ok();
    assert_eq!(in_drive(), "");
    // By force it goes whatever the guest does.
    add("locked", &lun.source(), &cdrom).ok();
    guest_reads("locked");
    in_guest("sleep 600 </dev/sr0 >/dev/null 2>&1 & echo $! >/tmp/holder").ok();
    remove("locked", &["--force"]).ok();
    assert_eq!(in_drive(), "");
    in_guest("kill $(cat /tmp/holder)").ok();
    // Somebody else's medium, in the place of ours, is not ours to take out.
    add("locked", &lun.source(), &cdrom).ok();
    let theirs = "/run/libvirt/theirs.iso";
    run("pod", &["exec", POD, "truncate", "-s", "1M", theirs]).ok();
    virsh(&["change-media", DOMAIN, DRIVE, theirs, "--update", "--live"]).ok();
    remove("locked", &[]).ok();
    assert_eq!(in_drive(), theirs);
    virsh(&["change-media", DOMAIN, DRIVE, "--eject", "--live"]).ok();
    story.nothing_left();
}
