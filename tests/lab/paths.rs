//! The SAN fails under a volume: portals, the target, the LUN. A second volume of the same target
//! that has nothing to do with it goes on.

use crate::node::{
    DOMAIN, Lab, Lun, Story, add, guest_has, iqn, lunplug, refused, remove, sh, source_of, until,
    volume,
};
use crate::san::{Brisk, Fault, SOON, Writer, is_whole, living_paths};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_portal_that_falls_silent_during_the_login_holds_up_nothing_and_joins_later() {
    Lab::get();
    let (lun, other) = (Lun::new("mute1", 1, "16M"), Lun::new("mute2", 2, "16M"));
    let story = Story::begin();
    let brisk = Brisk::new();
    // It accepts the connection and then answers nothing, so that the login is under way.
    let mute = Fault::new("target portal mute 127.0.0.3", "target portal restore 127.0.0.3");
    add("mute", &lun.source(), &[]).ok();
    assert_eq!(volume("mute")["device"]["paths"], 1);
    let alone = format!("iscsi://127.0.0.3:3260/{}/2", iqn());
    refused(add("alone", &alone, &["--timeout", "20s"]), "PORTAL_UNREACHABLE");
    remove("alone", &[]).ok();

    mute.end();
    add("mute2", &other.source(), &[]).ok();
    // Each start looks at all volumes.
    sh("systemctl restart lunplugd").ok();
    until("the path joins", SOON, || living_paths(&lun) == 2);
    assert_eq!(volume("mute")["phase"], "Ready");
    is_whole("mute2", &other);
    remove("mute", &[]).ok();
    remove("mute2", &[]).ok();
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn guests_write_on_while_a_portal_and_the_target_go_and_come_back() {
    Lab::get();
    let luns = [Lun::new("cut1", 1, "16M"), Lun::new("cut2", 2, "16M")];
    let story = Story::begin();
    let brisk = Brisk::patient();
    let writers = [Writer::begin("cut1", &luns[0]), Writer::begin("cut2", &luns[1])];

    let dead = Fault::dead("127.0.0.2");
    until("the path is seen to be dead", SOON, || living_paths(&luns[0]) == 1);
    for writer in &writers {
        writer.goes_on("the guest writes on by the other portal");
    }
    dead.end();
    until("both paths are back", SOON, || luns.iter().all(|lun| living_paths(lun) == 2));

    // The target's service is restarted: all connections end at once.
    sh("target stop && target up").ok();
    for writer in &writers {
        let after = writer.goes_on("the guest writes on after the target's restart");
        println!("the guest wrote on {after:?} after the target's restart");
    }
    is_whole("cut1", &luns[0]);
    is_whole("cut2", &luns[1]);
    for writer in &writers {
        assert_eq!(writer.errors(), 0, "the guest has seen an error");
    }
    let [one, two] = writers;
    one.finish(&luns[0]);
    two.finish(&luns[1]);
    drop(brisk);
    story.nothing_left();
}

/// No packet of either portal passes.
fn both_dead() -> Fault {
    let each =
        |verb: &str| format!("target portal {verb} 127.0.0.2; target portal {verb} 127.0.0.3");
    Fault::new(&each("drop"), &each("restore"))
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn without_any_path_io_waits_then_fails_and_goes_on_when_one_is_back() {
    Lab::get();
    let lun = Lun::new("none1", 1, "16M");
    let story = Story::begin();
    let brisk = Brisk::patient();
    let writer = Writer::begin("none1", &lun);

    // Shorter than multipath's patience: the guest only waits.
    let dead = both_dead();
    until("no path is alive", SOON, || living_paths(&lun) == 0);
    dead.end();
    writer.goes_on("the guest writes on");
    assert_eq!(writer.errors(), 0, "it was to wait");
    until("both paths are back", SOON, || living_paths(&lun) == 2);

    // Longer: the guest gets errors, and its disk works again when a path is back.
    brisk.loses_patience();
    let dead = both_dead();
    until("the guest sees errors", SOON, || writer.errors() > 0);
    println!("without a path: {}", volume("none1"));
    dead.end();
    writer.goes_on("the guest writes on");
    is_whole("none1", &lun);
    writer.finish(&lun);
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_lun_that_was_unmapped_at_the_array_can_be_removed() {
    Lab::get();
    let (lun, forced, other) =
        (Lun::new("gone1", 1, "16M"), Lun::new("gone2", 2, "16M"), Lun::new("gone3", 3, "16M"));
    let story = Story::begin();
    let brisk = Brisk::new();
    add("gone", &lun.source(), &[]).ok();
    add("forced", &forced.source(), &[]).ok();
    let bystander = Writer::begin("gone3", &other);
    sh("target lun unmap gone1; target lun unmap gone2").ok();
    until("multipath has noticed", SOON, || living_paths(&lun) + living_paths(&forced) == 0);

    let plain = remove("gone", &["--timeout", "20s"]);
    println!("without force: {} {}", plain.code, plain.stderr.trim());
    if plain.code != 0 {
        refused(plain, "FLUSH_FAILED");
        remove("gone", &["--force"]).ok();
    }
    remove("forced", &["--force"]).ok();
    bystander.goes_on("the other volume goes on");
    guest_has(1);
    // The sessions are the other volume's, and its paths are alone under them.
    is_whole("gone3", &other);
    assert_eq!(sh("ls -d /sys/bus/scsi/devices/*:*:*:3 | wc -l").ok().trim(), "2");
    assert_eq!(sh("ls -d /sys/bus/scsi/devices/*:*:*:[12] 2>/dev/null | wc -l").stdout.trim(), "0");
    bystander.finish(&other);
    drop(brisk);
    sh("target lun map gone1; target lun map gone2").ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_lun_that_was_swapped_under_a_volume_is_given_to_nobody_else() {
    let lab = Lab::get();
    let (mut lun, other) = (Lun::new("under1", 1, "16M"), Lun::new("under2", 2, "16M"));
    let story = Story::begin();
    let brisk = Brisk::new();
    lunplug(&["vm", "register", "twin", "--pod-uid", lab.uid(), "--domain", DOMAIN]).ok();
    add("under", &lun.source(), &[]).ok();
    let bystander = Writer::begin("under2", &other);
    let was = lun.wwid.clone();
    lun.swap();

    let source = source_of(1);
    refused(add("again", &source, &[]), "SOURCE_IN_USE");
    let twin = ["addvolume", "twin", "--volume-name", "twin", "--timeout", "30s", "--source"];
    let ran = lunplug(&[&twin[..], &[&source]].concat()).fails();
    println!("another VM: {}", ran.stderr.trim());
    assert!(
        ran.stderr.contains("STALE_DEVICE_HELD") || ran.stderr.contains("SOURCE_IN_USE"),
        "{}",
        ran.stderr
    );
    guest_has(2); // nobody got anything
    assert_eq!(volume("under")["device"]["wwid"], was.as_str());
    bystander.goes_on("the other volume goes on");

    // Nothing of the old LUN's is written to the new one.
    let ran = remove("under", &["--timeout", "20s"]);
    println!("without force: {} {}", ran.code, ran.stderr.trim());
    if ran.code != 0 {
        remove("under", &["--force"]).ok();
    }
    assert!(lun.read(1 << 20).iter().all(|byte| *byte == 0), "the new LUN was written to");
    bystander.goes_on("the other volume goes on");
    lunplug(&["vm", "unregister", "twin"]).ok();
    bystander.finish(&other);
    drop(brisk);
    story.nothing_left();
}
