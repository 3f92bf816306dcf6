//! multipathd fails: killed, away during an add, hung, and refusing to let a map go.

use std::time::Duration;

use crate::node::{
    Lab, Lun, Story, VM, add, guest_disk, guest_has, lunplug, refused, remove, sh, until, volume,
};
use crate::san::{Brisk, Fault, SOON, Writer, is_whole};

/// multipathd is away.
pub fn stop() -> Fault {
    // Its socket goes too, or the next question would start it.
    Fault::new(
        "systemctl stop multipathd.socket multipathd.service 2>/dev/null || systemctl stop multipathd",
        "systemctl reset-failed multipathd; systemctl start multipathd.socket 2>/dev/null; systemctl start multipathd",
    )
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn volumes_outlive_multipathd_and_an_add_without_it_is_by_policy() {
    Lab::get();
    let luns = [Lun::new("mpd1", 1, "16M"), Lun::new("mpd2", 2, "16M")];
    let story = Story::begin();
    let brisk = Brisk::new();
    let writer = Writer::begin("mpd1", &luns[0]);
    sh("systemctl kill -s KILL multipathd").ok();
    writer.goes_on("maps are the kernel's");
    until("systemd has restarted it", SOON, || sh("multipathd show daemon").code == 0);
    is_whole("mpd1", &luns[0]);

    let away = stop();
    writer.goes_on("maps are the kernel's");
    refused(add("mpd2", &luns[1].source(), &["--multipath", "required"]), "MULTIPATH_UNAVAILABLE");
    add("mpd2", &luns[1].source(), &[]).ok();
    assert_eq!(volume("mpd2")["device"]["paths"], 1, "a single path");
    // A map can be removed without it.
    let disk = guest_disk("mpd2");
    assert_eq!(disk.bytes, 16 << 20);
    away.end();
    until("it is back", SOON, || sh("multipathd show daemon").code == 0);
    is_whole("mpd1", &luns[0]);
    // It puts a map over the path that the guest has by itself: that goes with it.
    remove("mpd2", &[]).ok();
    writer.finish(&luns[0]);
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_map_is_removed_while_multipathd_is_away() {
    Lab::get();
    let lun = Lun::new("mpa", 1, "16M");
    let story = Story::begin();
    let brisk = Brisk::new();
    add("mpa", &lun.source(), &[]).ok();
    let away = stop();
    remove("mpa", &[]).ok();
    guest_has(0);
    story.nothing_left();
    away.end();
    until("it is back", SOON, || sh("multipathd show daemon").code == 0);
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_hung_multipathd_holds_up_volumes_and_loses_none() {
    Lab::get();
    let luns = [Lun::new("mph1", 1, "16M"), Lun::new("mph2", 2, "16M"), Lun::new("mph3", 3, "16M")];
    let story = Story::begin();
    let brisk = Brisk::new();
    let writer = Writer::begin("mph1", &luns[0]);
    add("mph2", &luns[1].source(), &[]).ok();
    let hung = Fault::stopped("multipathd");
    writer.goes_on("I/O does not need it");
    let third = luns[2].source();
    refused(add("mph3", &third, &["--timeout", "12s"]), "MAP_FAILED");
    let ran = remove("mph2", &["--timeout", "15s"]).fails();
    println!("told: {}", ran.stderr.trim());
    assert!(ran.stderr.contains("MAP_FAILED"), "{}", ran.stderr);
    guest_has(1); // the guest has let go of it
    hung.end();
    add("mph3", &third, &[]).ok();
    is_whole("mph3", &luns[2]);
    remove("mph3", &[]).ok();
    until("the removal ends by itself", SOON, || lunplug(&["describe", VM, "mph2"]).code != 0);
    is_whole("mph1", &luns[0]);
    assert_eq!(writer.errors(), 0);
    writer.finish(&luns[0]);
    drop(brisk);
    story.nothing_left();
}

/// A holder of the map makes multipathd answer `fail` (map in use).
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_map_that_is_held_is_named_and_goes_when_it_is_let_go_of() {
    Lab::get();
    let luns = [Lun::new("mpb1", 1, "16M"), Lun::new("mpb2", 2, "16M")];
    let story = Story::begin();
    let brisk = Brisk::new();
    add("mpb1", &luns[0].source(), &[]).ok();
    add("mpb2", &luns[1].source(), &[]).ok();
    let dev = volume("mpb1")["device"]["dev"].as_str().expect("it has a device").to_owned();
    let holder = Fault::new(
        &format!("dmsetup create busy --table \"0 8 linear /dev/block/{dev} 0\""),
        "dmsetup remove --retry busy",
    );
    let ran = remove("mpb1", &["--timeout", "15s"]).fails();
    assert!(ran.stderr.contains("DEVICE_HELD") && ran.stderr.contains("busy"), "{}", ran.stderr);
    is_whole("mpb2", &luns[1]);
    holder.end();
    let gone =
        until("it goes", Duration::from_secs(90), || lunplug(&["describe", VM, "mpb1"]).code != 0);
    println!("gone {gone:?} after the holder");
    remove("mpb2", &[]).ok();
    drop(brisk);
    story.nothing_left();
}
