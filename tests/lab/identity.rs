//! Right device or none: swapped LUNs, stale devices, expectations.

use crate::node::{Lab, Lun, Story, add, guest_disk, guest_has, iqn, refused, remove, sh, volume};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_lun_swapped_between_detach_and_attach_is_refused_until_accepted() {
    Lab::get();
    let mut lun = Lun::new("swap1", 1, "16M");
    let story = Story::begin();
    add("swapped", &lun.source(), &[]).ok();
    remove("swapped", &[]).ok();
    lun.swap();
    refused(add("swapped", &lun.source(), &[]), "IDENTITY_CHANGED");
    guest_has(0);
    story.nothing_left();
    add("swapped", &lun.source(), &["--accept-new-identity"]).ok();
    assert_eq!(volume("swapped")["device"]["wwid"], lun.wwid.as_str());
    remove("swapped", &[]).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_expected_identity_or_size_is_strict() {
    Lab::get();
    let lun = Lun::new("expect", 2, "16M");
    let story = Story::begin();
    let other = "naa.60014050000000000000000000000001";
    refused(add("expected", &lun.source(), &["--wwid", other]), "IDENTITY_MISMATCH");
    refused(add("expected", &lun.source(), &["--size", "33554432"]), "IDENTITY_MISMATCH");
    story.nothing_left();
    add("expected", &lun.source(), &["--wwid", &lun.wwid, "--size", "16777216"]).ok();
    remove("expected", &[]).ok();
    story.nothing_left();
}

/// A session of somebody else's, with the LUN scanned before it was swapped: the kernel keeps the
/// old identity until someone asks anew.
fn leave_a_stale_path(lun: &mut Lun) {
    let iqn = iqn();
    let node = format!("iscsiadm -m node -T {iqn} -p 127.0.0.2:3260");
    sh(&format!(
        "{node} -o new >/dev/null; {node} -o update -n node.session.scan -v manual; {node} --login >/dev/null"
    ))
    .ok();
    sh(&format!(
        "echo 0 0 {} >/sys/class/scsi_host/$({HOST_OF_SESSION})/scan; udevadm settle",
        lun.number
    ))
    .ok();
    // Its map goes, so that only the path is left behind.
    sh(&format!("multipathd del map 3{0} || true; multipath -w 3{0} >/dev/null || true; sed -i '/3{0}/d' /etc/multipath/bindings", &lun.wwid[4..])).ok();
    lun.swap();
}

const HOST_OF_SESSION: &str = "for s in /sys/class/iscsi_session/*; do realpath $s | grep -o 'host[0-9]*' | head -n 1; done | head -n 1";

fn end_foreign_session() {
    let iqn = iqn();
    let node = format!("iscsiadm -m node -T {iqn} -p 127.0.0.2:3260");
    sh(&format!("{node} --logout >/dev/null; {node} -o delete")).ok();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_stale_path_is_replaced_when_nobody_holds_it() {
    Lab::get();
    let mut lun = Lun::new("stale1", 4, "16M");
    let story = Story::begin();
    leave_a_stale_path(&mut lun);
    add("stale", &lun.source(), &[]).ok();
    assert_eq!(volume("stale")["device"]["wwid"], lun.wwid.as_str());
    assert_eq!(guest_disk("stale").bytes, 16 << 20);
    remove("stale", &[]).ok();
    let sessions = sh("iscsiadm -m session").ok();
    assert_eq!(sessions.lines().count(), 1, "the foreign session stays: {sessions}");
    end_foreign_session();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_stale_path_that_is_held_is_refused_and_left() {
    Lab::get();
    let mut lun = Lun::new("stale2", 5, "16M");
    let story = Story::begin();
    leave_a_stale_path(&mut lun);
    let path = sh("basename $(ls -d /sys/bus/scsi/devices/*:0:0:5/block/*)").ok().trim().to_owned();
    sh(&format!("dmsetup create holder --table '0 8 linear /dev/{path} 0'")).ok();
    refused(add("held", &lun.source(), &[]), "STALE_DEVICE_HELD");
    guest_has(0);
    sh("dmsetup remove --retry holder").ok();
    end_foreign_session();
    story.nothing_left();
}
