//! One LUN at two targets.

use std::time::Duration;

use crate::node::{Lab, Lun, Story, add, guest_disk, guest_has, refused, sh, until, volume};
use crate::san::{Brisk, Fault, SOON, Writer, living_paths};

/// A second target of the node's, with two portals of its own, until this is dropped.
pub struct Second;

pub const SECOND: &str = "iqn.2026-01.org.lunplug:second";

impl Second {
    #[track_caller]
    pub fn up() -> Self {
        let second = Self;
        sh(&format!("target up --iqn {SECOND} --portals 127.0.0.4,127.0.0.5")).ok();
        second
    }

    /// Exports a LUN of the lab's target too, under another number; the source that has both.
    #[track_caller]
    pub fn export(&self, lun: &Lun, number: u16) -> String {
        sh(&format!("target lun export {} {number} --iqn {SECOND}", lun.name)).ok();
        both(lun, number)
    }
}

fn both(lun: &Lun, number: u16) -> String {
    format!("{}+127.0.0.4,127.0.0.5/{SECOND}/{number}", lun.source())
}

impl Drop for Second {
    fn drop(&mut self) {
        sh(&format!("target down --iqn {SECOND}"));
    }
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn one_disk_by_two_targets_outlives_one_of_them() {
    Lab::get();
    let _brisk = Brisk::new();
    let second = Second::up();
    let lun = Lun::new("twice", 1, "64M");
    let source = second.export(&lun, 7);
    let story = Story::begin();
    add("twice", &source, &[]).ok();
    let told = volume("twice");
    assert_eq!(told["device"]["wwid"], lun.wwid.as_str());
    until("lunplug has all four paths", SOON, || volume("twice")["device"]["paths"] == 4);
    assert_eq!(living_paths(&lun), 4);
    assert_eq!(sh("multipath -ll -v1 | wc -l").ok().trim(), "1", "one map");
    assert_eq!(guest_disk("twice").bytes, 64 << 20);
    guest_has(1);

    // By the other target alone it is the same LUN.
    let alone = format!("iscsi://127.0.0.4/{SECOND}/7");
    refused(add("again", &alone, &[]), "SOURCE_IN_USE");

    let writer = Writer::on("twice");
    let dead = [Fault::dead("127.0.0.4"), Fault::dead("127.0.0.5")];
    let recovered = writer.goes_on("the guest's I/O goes on by the other target");
    println!("I/O went on {recovered:?} after a target died");
    until("the second target's paths are dead", SOON, || living_paths(&lun) == 2);
    dead.into_iter().for_each(Fault::end);
    until("all paths are back", Duration::from_secs(120), || living_paths(&lun) == 4);
    writer.finish(&lun);
    guest_has(0);
    story.nothing_left();
}

/// LIO makes the identity of the first 25 digits of a serial, so two serials may give one.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn two_targets_that_claim_one_identity_for_two_luns_are_refused() {
    Lab::get();
    let second = Second::up();
    let lun = Lun::new("claimed", 2, "16M");
    let serial =
        sh("sed 's/.*: //' /sys/kernel/config/target/core/fileio_0/claimed/wwn/vpd_unit_serial")
            .ok();
    let other = format!("{}0123456", &serial.trim()[..25]);
    let wwid = sh(&format!("target lun add claimant 9 16M --serial {other} --iqn {SECOND}")).ok();
    assert_eq!(wwid.trim(), lun.wwid);
    let story = Story::begin();
    let ran = add("claimed", &both(&lun, 9), &[]);
    assert!(ran.stderr.contains(&format!("serial {other}")), "{ran:?}");
    refused(ran, "PATHS_DISAGREE");
    guest_has(0);
    story.nothing_left();
    drop(second);
}
