//! A VM's volumes follow it: they leave the host when it ends, and come back with it.

use std::time::Duration;

use serde_json::Value;

use crate::agent;
use crate::node::{Lab, Lun, Story, lunplug, sh, until};

const LONG: Duration = Duration::from_secs(90);

fn told() -> Value {
    let json = lunplug(&["describe", "life", "data", "-o", "json"]).ok();
    serde_json::from_str(&json).expect("describe -o json prints JSON")
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn volumes_leave_the_host_with_their_vm_and_come_back_with_it() {
    Lab::get();
    let lun = Lun::new("life", 7, "16M");
    let story = Story::begin();
    sh("pod up life && guest up life default_life").ok();
    let uid = sh("pod info life | jq -r .uid").ok();
    lunplug(&["vm", "register", "life", "--pod-uid", uid.trim(), "--domain", "default_life"]).ok();
    lunplug(&["addvolume", "life", "--volume-name", "data", "--source", &lun.source()]).ok();

    sh("guest down life default_life").ok();
    until("the volume waits for its VM", LONG, || told()["trouble"]["reason"] == "VM_NOT_RUNNING");
    assert_eq!(told()["phase"], "Pending");
    sh("iscsiadm -m session").fails();

    sh("guest up life default_life").ok();
    until("the volume is back", LONG, || told()["phase"] == "Ready");
    agent::has("life", "default_life", &format!("{} data", 16 << 20));

    // The pod is deleted, without anybody telling lunplug.
    sh("pod down life").ok();
    until("the volume is off the host", LONG, || told()["trouble"]["reason"] == "POD_GONE");
    sh("iscsiadm -m session").fails();
    lunplug(&["removevolume", "life", "--volume-name", "data"]).ok();
    lunplug(&["vm", "unregister", "life"]).ok();
    story.nothing_left();
}
