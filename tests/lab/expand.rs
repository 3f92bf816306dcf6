//! A LUN grows at the array: the guest itself tells the new size, and has its data.

use serde_json::Value;

use crate::node::{
    Configured, Lab, Lun, Ran, Story, VM, add, guest_disk, in_guest, lunplug, reason, refused,
    remove, sh, until, volume,
};
use crate::san::{Brisk, Fault, SOON, living_paths};

const MIB: u64 = 1 << 20;

fn expand(name: &str, more: &[&str]) -> Ran {
    lunplug(&[&["expand", VM, "--volume-name", name][..], more].concat())
}

/// What an expand came to: bytes before, bytes now, whether anything was done.
#[track_caller]
fn expanded(name: &str, more: &[&str]) -> (u64, u64, bool) {
    let json = expand(name, &[more, &["-o", "json"]].concat()).ok();
    let told: Value = serde_json::from_str(&json).expect("JSON");
    let number = |key: &str| told[key].as_u64().expect("a number");
    let changed = told["changed"].as_bool().expect("yes or no");
    assert_eq!(told["volume"]["device"]["size_bytes"], told["size_bytes"]);
    (number("size_before_bytes"), number("size_bytes"), changed)
}

/// Waits until the guest sees its disk with so many bytes: it reads the capacity when it is told to.
#[track_caller]
fn guest_sees(serial: &str, bytes: u64) {
    until(&format!("the guest sees {bytes} bytes"), SOON, || guest_disk(serial).bytes == bytes);
}

/// The size of every SCSI disk of a LUN number and of every map above them, by sysfs.
fn host_sizes(lun: &Lun) -> Vec<u64> {
    let list = format!(
        "for d in /sys/bus/scsi/devices/*:0:0:{}/block/*; do cat $d/size; cat $d/holders/*/size 2>/dev/null || true; done",
        lun.number
    );
    let lines = sh(&list).ok();
    lines.lines().map(|sectors| sectors.parse::<u64>().expect("sectors") * 512).collect()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_grown_lun_is_seen_by_the_guest_and_a_path_that_is_down_is_named() {
    Lab::get();
    let lun = Lun::new("grow", 1, "16M");
    let story = Story::begin();
    let brisk = Brisk::new();
    add("grow", &lun.source(), &["--size", "16Mi"]).ok();
    let disk = guest_disk("grow").name;
    let write = |what: &str, at: u64| {
        let dd = format!("dd of=/dev/{disk} bs=512 seek={} oflag=direct conv=notrunc", at / 512);
        in_guest(&format!("printf %-512s {what} | {dd}")).ok();
    };
    write("kept", MIB);
    assert_eq!(expanded("grow", &[]), (16 * MIB, 16 * MIB, false));

    lun.grow("32M");
    refused(expand("grow", &["--size", "64Mi"]), "SIZE_UNEXPECTED");
    assert_eq!(guest_disk("grow").bytes, 16 * MIB);
    assert_eq!(expanded("grow", &["--size", "32Mi"]), (16 * MIB, 32 * MIB, true));
    assert_eq!(host_sizes(&lun), [32 * MIB; 4], "two paths, and the map above each");
    guest_sees("grow", 32 * MIB);
    assert_eq!(expanded("grow", &[]), (32 * MIB, 32 * MIB, false));
    // What is written behind the old end is the LUN's.
    write("behind", 20 * MIB);
    let data = lun.read(32 << 20);
    assert!(data[1 << 20..].starts_with(b"kept") && data[20 << 20..].starts_with(b"behind"));

    lun.grow("48M");
    let dead = Fault::dead("127.0.0.3");
    until("the path is seen to be dead", SOON, || living_paths(&lun) == 1);
    let named = expand("grow", &[]).fails();
    println!("told: {}", named.stderr.trim());
    let path = sh("p=$(multipathd show paths raw format '%i %d %t' | grep failed); set -- $p; echo \"$1 ($2)\"").ok();
    assert!(named.stderr.contains("PATH_DOWN"), "{}", named.stderr);
    assert!(named.stderr.contains(path.trim()), "{path}: {}", named.stderr);
    assert_eq!(guest_disk("grow").bytes, 32 * MIB);
    dead.end();
    until("the path is back", SOON, || living_paths(&lun) == 2);
    assert_eq!(expanded("grow", &[]), (32 * MIB, 48 * MIB, true));
    guest_sees("grow", 48 * MIB);

    // The size that was asked for at the add is the volume's, and grew with it.
    assert_eq!(volume("grow")["spec"]["size_bytes"], 48 * MIB);
    sh("systemctl restart lunplugd").ok();
    until("the volume is found again", SOON, || volume("grow")["phase"] == "Ready");
    assert_eq!(volume("grow")["device"]["size_bytes"], 48 * MIB);
    in_guest(&format!("dd if=/dev/{disk} bs=512 skip=2048 count=1 iflag=direct | grep kept")).ok();
    remove("grow", &[]).ok();
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn growth_is_followed_by_itself_where_configured_on_either_bus() {
    Lab::get();
    let (map, one) = (Lun::new("auto1", 1, "16M"), Lun::new("auto2", 2, "16M"));
    let story = Story::begin();
    let auto = Configured::with(&["expand.auto=true"]);
    let single = one.source().replace(",127.0.0.3:3260", "");
    add("auto1", &map.source(), &[]).ok();
    add("auto2", &single, &["--bus", "virtio", "--multipath", "off"]).ok();
    // It knows a volume's paths from its first look on.
    for lun in [&map, &one] {
        lun.grow("32M");
        // LIO announces nothing. Somebody reads one path anew, and the kernel tells of that.
        sh(&format!(
            "echo 1 >$(ls -d /sys/bus/scsi/devices/*:0:0:{} | head -n 1)/rescan",
            lun.number
        ))
        .ok();
    }
    for name in ["auto1", "auto2"] {
        guest_sees(name, 32 * MIB);
        let device = volume(name)["device"].clone();
        let sectors = format!("cat /sys/dev/block/{}/size", device["dev"].as_str().expect("text"));
        assert_eq!(sh(&sectors).ok().trim(), (32 * MIB / 512).to_string(), "{name}");
        assert_eq!(device["size_bytes"], 32 * MIB);
        assert_eq!(reason(name), "");
        assert_eq!(expanded(name, &[]), (32 * MIB, 32 * MIB, false));
        remove(name, &[]).ok();
    }
    drop(auto);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_write_protected_lun_is_refused_for_writing_and_becomes_writable() {
    Lab::get();
    let lun = Lun::new("protect", 1, "16M");
    let story = Story::begin();
    let read = |disk: &str| format!("dd if=/dev/{disk} of=/dev/null bs=64k count=1 iflag=direct");
    let write = |disk: &str| format!("dd if=/dev/zero of=/dev/{disk} bs=512 count=1 oflag=direct");
    // A writable LUN for who asks only to read it. The target knows this initiator from now on.
    add("protect", &lun.source(), &["--read-only"]).ok();
    let disk = guest_disk("protect").name;
    in_guest(&read(&disk)).ok();
    in_guest(&write(&disk)).fails();
    remove("protect", &[]).ok();

    sh("target lun protect protect").ok();
    let ran = add("protect", &lun.source(), &[]).fails();
    println!("told: {}", ran.stderr.trim());
    refused(ran, "LUN_READ_ONLY");
    story.nothing_left();

    add("protect", &lun.source(), &["--read-only"]).ok();
    in_guest(&read(&guest_disk("protect").name)).ok();
    // QEMU cannot tell a guest that a disk which it only reads has grown.
    lun.grow("32M");
    refused(expand("protect", &[]), "UNSUPPORTED");
    remove("protect", &[]).ok();

    sh("target lun unprotect protect").ok();
    add("protect", &lun.source(), &[]).ok();
    let disk = guest_disk("protect");
    assert_eq!(disk.bytes, 32 * MIB);
    in_guest(&write(&disk.name)).ok();
    remove("protect", &[]).ok();
    story.nothing_left();
}
