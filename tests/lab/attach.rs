//! The main job: two paths, the guest's view, a dead portal in mid-I/O; several volumes.

use std::time::Duration;

use lunplug::host::block::{Blocks, RealBlocks};

use crate::node::{
    DOMAIN, Lab, Lun, Story, VM, add, guest_disk, guest_disks, guest_has, in_guest, lunplug,
    refused, remove, sh, source_of, until, virsh, volume,
};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn two_paths_carry_data_and_survive_a_dead_portal() {
    Lab::get();
    let lun = Lun::new("attach1", 1, "64M");
    let story = Story::begin();
    add("portals", &lun.source(), &["--serial", "Case-Kept_01", "--disk-name", "p"]).ok();
    assert!(virsh(&["dumpxml", DOMAIN]).ok().contains("<alias name='ua-lunplug-p'/>"));

    let told = volume("portals");
    assert_eq!(told["phase"], "Ready");
    assert_eq!(told["device"]["wwid"], lun.wwid.as_str());
    assert_eq!(told["device"]["paths"], 2, "{told}");
    // device-mapper itself tells the map by its uuid: lunplug asks it whether one is there still.
    let dev = told["device"]["dev"].as_str().expect("a number").to_owned();
    let uuid = sh(&format!("cat /sys/dev/block/{dev}/dm/uuid")).ok().trim().to_owned();
    assert_eq!(mapped(&uuid).as_ref(), Some(&dev));
    let disk = guest_disk("Case-Kept_01");
    assert_eq!(disk.bytes, 64 << 20);

    let pattern = "yes lunplug | head -c 65536";
    in_guest(&format!("{pattern} | dd of=/dev/{} bs=64k iflag=fullblock oflag=direct", disk.name))
        .ok();
    assert_eq!(lun.read(65536), sh(&format!("{pattern} || true")).stdout.as_bytes());

    // I/O goes on in the guest while one portal's packets vanish.
    let write = |seek: u32| {
        format!(
            "yes again | dd of=/dev/{} bs=64k count=4 seek={seek} iflag=fullblock oflag=direct",
            disk.name
        )
    };
    in_guest(&write(16)).ok();
    sh("target portal drop 127.0.0.3").ok();
    let recovered = until("the guest's I/O goes on", Duration::from_secs(60), || {
        in_guest(&write(32)).code == 0
    });
    println!("I/O went on {recovered:?} after a portal died");
    until("the kernel has failed the path", Duration::from_secs(60), || failed_paths(&dev) == 1);
    sh("target portal restore 127.0.0.3").ok();
    until("both paths are back", Duration::from_secs(120), || failed_paths(&dev) == 0);
    remove("portals", &[]).ok();
    guest_has(0);
    assert_eq!(mapped(&uuid), None);
    story.nothing_left();
}

fn mapped(uuid: &str) -> Option<String> {
    asked(async |blocks| blocks.mapped(uuid).await).map(|dev| dev.to_string())
}

/// How many paths of a map the kernel does not use.
fn failed_paths(map: &str) -> usize {
    let map = map.parse().expect("a number");
    asked(async |blocks| blocks.failed_paths(&[map]).await)[0].len()
}

/// device-mapper's answer.
fn asked<T>(ask: impl AsyncFnOnce(&RealBlocks) -> std::io::Result<T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let blocks = RealBlocks::new("/dev/lunplug-story", Duration::from_secs(10));
    runtime.block_on(ask(&blocks)).expect("device-mapper answers")
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn five_volumes_are_added_at_once_removed_and_added_again() {
    Lab::get();
    let luns: Vec<Lun> = (1..=5).map(|n| Lun::new(&format!("five{n}"), n * 2, "16M")).collect();
    let story = Story::begin();
    let name = |lun: &Lun| format!("vol{}", lun.number);
    for round in 1..=2 {
        std::thread::scope(|scope| {
            let adds: Vec<_> = luns
                .iter()
                .map(|lun| scope.spawn(move || add(&name(lun), &lun.source(), &[])))
                .collect();
            for added in adds {
                added.join().expect("the thread ends").ok();
            }
        });
        guest_has(5);
        let mut serials: Vec<_> = guest_disks().into_iter().map(|d| d.serial).collect();
        serials.sort();
        assert_eq!(serials, ["vol10", "vol2", "vol4", "vol6", "vol8"], "round {round}");
        refused(add("vol2", &luns[1].source(), &[]), "VOLUME_EXISTS");
        refused(add("other", &luns[0].source(), &[]), "SOURCE_IN_USE");
        for lun in &luns {
            remove(&name(lun), &[]).ok();
        }
        story.nothing_left();
    }
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_dry_run_checks_and_changes_nothing() {
    Lab::get();
    let lun = Lun::new("dry", 3, "16M");
    let story = Story::begin();
    add("dry", &lun.source(), &["--dry-run"]).ok();
    story.nothing_left();
    refused(lunplug(&["describe", VM, "dry"]), "VOLUME_NOT_FOUND");
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn lun_1_is_not_lun_10_and_large_numbers_work() {
    Lab::get();
    // LIO takes the number as it is on the wire: in flat space addressing LUN 256 is 0x4100.
    let luns = [Lun::new("one", 1, "16M"), Lun::new("ten", 10, "32M")];
    let _far = [Lun::new("far", 0x4100, "48M"), Lun::new("flat", 0x4001, "64M")];
    let story = Story::begin();
    add("ten", &luns[1].source(), &[]).ok();
    add("far", &source_of(256), &[]).ok();
    assert_eq!(guest_disk("ten").bytes, 32 << 20);
    add("flat", &source_of("flat:1"), &[]).ok();
    assert_eq!(guest_disk("far").bytes, 48 << 20);
    assert_eq!(guest_disk("flat").bytes, 64 << 20);
    add("one", &luns[0].source(), &["--multipath", "required"]).ok();
    assert_eq!(guest_disk("one").bytes, 16 << 20);
    remove("one", &[]).ok();
    guest_has(3); // only LUN 1 went
    remove("flat", &[]).ok();
    remove("ten", &[]).ok();
    remove("far", &[]).ok();
    story.nothing_left();
}
