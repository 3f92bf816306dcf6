//! A VM's whole set of volumes from a file: around a portal that is dead, and a `kill -9` in the middle.

use std::time::Duration;

use serde_json::Value;

use crate::kill::Killable;
use crate::node::{
    Lab, Lun, Ran, Story, VM, guest_disks, guest_has, iqn, lunplug, refused, remove, until,
    vm_info, volume,
};
use crate::san::{Fault, SOON};

/// Has the VM's volumes be these: each a name, the last number of its portal and its LUN.
pub fn sync(revision: u64, volumes: &[(&str, u8, &Lun)], more: &[&str]) -> Ran {
    let line = |(name, portal, lun): &(&str, u8, &Lun)| {
        format!("\n- {{name: {name}, source: 'iscsi://127.0.0.{portal}/{}/{}'}}", iqn(), lun.number)
    };
    let list: String = volumes.iter().map(line).collect();
    let list = if list.is_empty() { " []".to_owned() } else { list };
    std::fs::write(FILE, format!("volumes:{list}\n")).expect("/tmp is writable");
    let revision = revision.to_string();
    let args = ["sync", VM, "-f", FILE, "--revision", &revision, "--timeout", "120s"];
    lunplug(&[&args[..], more].concat())
}

const FILE: &str = "/tmp/volumes.yaml";

/// The serials of the guest's disks, in order.
#[track_caller]
fn guest_serials(expected: &[&str]) {
    until(&format!("the guest has {expected:?}"), SOON, || {
        let mut serials: Vec<_> = guest_disks().into_iter().map(|disk| disk.serial).collect();
        serials.sort();
        serials == expected
    });
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_set_is_made_so_whatever_one_portal_does_and_outlives_a_kill() {
    Lab::get();
    let luns: Vec<Lun> = (1..=4).map(|n| Lun::new(&format!("set{n}"), n, "16M")).collect();
    let [one, two, three, four] = &luns[..] else { unreachable!("there are four") };
    let story = Story::begin();
    // The shared VM may have had sets before.
    let first = vm_info(VM)["revision"].as_u64().expect("a number") + 1;

    let dead = Fault::dead("127.0.0.3");
    let set = [("set-one", 2, one), ("set-dead", 3, four), ("set-two", 2, two)];
    sync(first, &set, &["--no-wait"]).ok();
    guest_serials(&["set-one", "set-two"]);
    assert_ne!(volume("set-dead")["phase"], "Ready");
    dead.end();
    until("the third volume comes when its portal does", Duration::from_secs(180), || {
        volume("set-dead")["phase"] == "Ready"
    });
    guest_serials(&["set-dead", "set-one", "set-two"]);
    let told = sync(first, &set, &["-o", "json"]).ok();
    let told: Vec<Value> = serde_json::from_str(&told).expect("JSON");
    assert!(told.iter().all(|part| part["changed"] == false), "{told:?}");

    let daemon = Killable::begin();
    let next = [("set-two", 2, two), ("set-three", 2, three)];
    // What the daemon is asked for then is written by a dry run, which it outlives.
    sync(first + 1, &next, &["--dry-run"]).ok();
    let revision = (first + 1).to_string();
    let request = ["sync", VM, "-f", FILE, "--revision", &revision, "--no-wait"];
    daemon.dies_at("before intent".parse().expect("a point"), &request);
    assert_eq!(vm_info(VM)["revision"], first + 1);
    refused(sync(first, &set, &[]), "REVISION_OUTDATED");
    refused(sync(first + 1, &set, &[]), "REVISION_REUSED");
    sync(first + 1, &next, &[]).ok();
    guest_serials(&["set-three", "set-two"]);
    drop(daemon);

    // By hand, until the next set.
    remove("set-three", &[]).ok();
    guest_has(1);
    sync(first + 1, &next, &[]).ok();
    guest_serials(&["set-three", "set-two"]);
    sync(first + 2, &[], &[]).ok();
    guest_has(0);
    story.nothing_left();
}
