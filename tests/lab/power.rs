//! The node loses its power at a step, or is shut down in order, and in the next boot what was asked
//! for comes about.
//!
//! Told in two parts, between which `hack/lab/power` resets or reboots the node.

use std::fs;
use std::time::Duration;

use lunplug::step::{KillPoint, Way};
use serde_json::{Value, json};

use crate::kill::Killable;
use crate::node::{
    Lab, Lun, POD, VM, add, guest_disk, guest_has, in_guest, lunplug, remove, sh, snapshot, until,
    volume,
};

const LONG: Duration = Duration::from_secs(150);

/// What the second part has to know of the first; on the node's disk.
const FACTS: &str = "/var/lib/lunplug-lab/power-cut.json";

const REQUEST: [&str; 3] = ["--volume-name", "data", "--no-wait"];

fn point() -> KillPoint {
    let text = std::env::var("LUNPLUG_POWER_CUT").expect("hack/lab/power sets it");
    text.parse().expect("a kill point")
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn power_cut_comes() {
    let point = point();
    let lun = a_guest_with_data();
    let added = ["addvolume", VM, "--source", &lun.source()];
    let request = match point.step.way() {
        Way::Attach => [&added[..], &REQUEST].concat(),
        Way::Expand | Way::Retune => panic!("no power cut is ordered there"),
        Way::Detach => {
            add("data", &lun.source(), &[]).ok();
            [&["removevolume", VM][..], &REQUEST].concat()
        }
    };
    // The array, which is this node too, loses nothing.
    sh("sync").ok();
    let daemon = Killable::for_good();
    daemon.dies_at(point, &request);
    // It is not to come back in this boot.
    std::mem::forget(daemon);
}

/// Has volume `kept` attached, with data on it, and a LUN for another; both outlive this part.
fn a_guest_with_data() -> std::mem::ManuallyDrop<Lun> {
    let lab = Lab::get();
    let [kept, lun] = [("kept", 1), ("data", 2)]
        .map(|(name, number)| std::mem::ManuallyDrop::new(Lun::new(name, number, "16M")));
    let facts = json!({ "uid": lab.uid(), "clean": snapshot() });
    fs::write(FACTS, facts.to_string()).expect("the disk is writable");
    add("kept", &kept.source(), &[]).ok();
    let disk = guest_disk("kept").name;
    in_guest(&format!("yes kept | dd of=/dev/{disk} bs=512 count=1 iflag=fullblock oflag=direct"))
        .ok();
    lun
}

/// The SAN, the daemon, and then the VM are there again, and the VM has its volume and data.
fn the_guest_has_its_data() -> Value {
    let facts = fs::read_to_string(FACTS).expect("the first part wrote it");
    let facts: Value = serde_json::from_str(&facts).expect("the first part wrote JSON");
    sh("target up").ok();
    sh("daemon start").ok();
    assert_ne!(volume("kept")["phase"], "Ready", "there is no VM yet");
    sh(&format!("pod up {POD} --uid {}", facts["uid"].as_str().expect("a UID"))).ok();
    Lab::get();
    until("the volume is back", LONG, || volume("kept")["phase"] == "Ready");
    let disk = guest_disk("kept").name;
    let read = in_guest(&format!("head -c 4 /dev/{disk}")).ok();
    assert_eq!(read, "kept");
    facts
}

/// Nothing of it is left.
fn all_goes(facts: &Value) {
    remove("kept", &[]).ok();
    guest_has(0);
    let left = snapshot();
    sh("target lun rm kept; target lun rm data").ok();
    assert_eq!(left, facts["clean"].as_str().expect("a snapshot"));
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn power_cut_is_over() {
    let facts = the_guest_has_its_data();
    match point().step.way() {
        Way::Attach => {
            until("the other has come", LONG, || volume("data")["phase"] == "Ready");
            assert_eq!(guest_disk("data").bytes, 16 << 20);
            remove("data", &[]).ok();
        }
        Way::Expand | Way::Retune => panic!("no power cut is ordered there"),
        Way::Detach => {
            until("the other has gone", LONG, || lunplug(&["describe", VM, "data"]).code != 0);
        }
    }
    all_goes(&facts);
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn shutdown_comes() {
    let _data = a_guest_with_data();
    // The journal of this boot is to be read in the next one.
    sh("mkdir -p /var/log/journal /etc/systemd/journald.conf.d").ok();
    sh("printf '[Journal]\\nStorage=persistent\\n' >/etc/systemd/journald.conf.d/zz-lab.conf").ok();
    sh("systemctl restart systemd-journald; journalctl --flush; sync").ok();
}

/// When systemd told first, in seconds of the boot before this one, that a unit has ended.
fn ended(unit: &str) -> f64 {
    let line = format!(
        "journalctl -b -1 -o short-monotonic --no-pager _PID=1 | grep -E '(Stopped|Removed slice|Closed) {unit}' | head -n 1"
    );
    let told = sh(&line).ok();
    let seconds = told.trim_start_matches(['[', ' ']).split(']').next().unwrap_or_default();
    seconds.trim().parse().unwrap_or_else(|_| panic!("{unit} did not end: {told:?}"))
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn shutdown_is_over() {
    let order = ["kubepods.slice", "lunplugd.service", "iscsid.service", "multipathd.service"];
    let [pods, daemon, iscsid, multipathd] = order.map(ended);
    assert!(pods <= daemon && daemon <= iscsid && daemon <= multipathd, "{order:?}");
    let log =
        sh("journalctl -b -1 -k --no-pager | grep -iE 'i/o error|rejecting i/o' || true").ok();
    assert_eq!(log, "", "a disk was taken from under somebody");
    let log = sh("journalctl -b -1 -u lunplugd --no-pager -o cat").ok();
    assert!(!log.contains("Killing process"), "it did not end in time: {log}");
    let facts = the_guest_has_its_data();
    all_goes(&facts);
}
