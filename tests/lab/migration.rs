//! A guest that starts with its volumes, and one that moves to another pod while it uses them.

use std::time::Duration;

use serde_json::Value;

use crate::agent;
use crate::node::{Lab, Lun, Ran, Story, lunplug, refused, run, sh, until};

const LONG: Duration = Duration::from_secs(90);
/// Where a pod finds its volumes' nodes.
const NODES: &str = "/var/run/kubevirt/hotplug-disks";

#[track_caller]
fn pod(name: &str) -> String {
    sh(&format!("pod up {name} >/dev/null && pod info {name} | jq -r .uid")).ok().trim().to_owned()
}

#[track_caller]
fn told(vm: &str) -> Value {
    let json = lunplug(&["describe", vm, "data", "-o", "json"]).ok();
    serde_json::from_str(&json).expect("describe -o json prints JSON")
}

fn open_in(pod: &str) -> Ran {
    let path = format!("if={NODES}/data");
    run("pod", &["exec", pod, "dd", &path, "of=/dev/null", "bs=512", "count=1"])
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_disk_of_the_definition_is_there_before_its_guest_starts() {
    Lab::get();
    let lun = Lun::new("start", 7, "16M");
    let story = Story::begin();
    let uid = pod("start");
    lunplug(&["vm", "register", "start", "--pod-uid", &uid, "--domain", "default_start"]).ok();
    // Of a VM that is off the wish is recorded.
    lunplug(&["addvolume", "start", "--volume-name", "data", "--source", &lun.source()]).ok();
    assert_eq!(told("start")["phase"], "Pending");
    assert_eq!(told("start")["trouble"]["reason"], "VM_NOT_RUNNING");
    sh("iscsiadm -m session").fails();

    lunplug(&["preparestart", "start"]).ok();
    assert_eq!(told("start")["phase"], "MountedToPod");
    open_in("start").ok();
    // As a controller writes it that has the volume in the VM's definition.
    let disk = format!(
        "<disk type='block' device='disk'>
           <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/><source dev='{NODES}/data'/>
           <target dev='sda' bus='scsi'/><serial>data</serial><alias name='ua-lunplug-data'/>
           <address type='drive' controller='0' bus='0' target='0' unit='1'/>
         </disk>"
    );
    std::fs::write("/tmp/definition.xml", disk).expect("/tmp is writable");
    // Emulated KVM may break a guest at its boot; then it is started once more.
    let before = "--before 'lunplug preparestart start'";
    sh(&format!("guest up start default_start --devices /tmp/definition.xml {before}")).ok();
    agent::has("start", "default_start", &format!("{} data", 16 << 20));
    until("the volume is ready", LONG, || told("start")["phase"] == "Ready");
    assert_eq!(told("start")["target"], "sda");

    lunplug(&["removevolume", "start", "--volume-name", "data"]).ok();
    lunplug(&["vm", "unregister", "start"]).ok();
    sh("pod down start").ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_guest_moves_to_another_pod_and_writes_on() {
    Lab::get();
    let lun = Lun::new("moves", 7, "16M");
    let story = Story::begin();
    let (from, to) = (pod("from"), pod("to"));
    sh("guest up from default_moves").ok();
    lunplug(&["vm", "register", "moves", "--pod-uid", &from, "--domain", "default_moves"]).ok();
    lunplug(&["addvolume", "moves", "--volume-name", "data", "--source", &lun.source()]).ok();
    let device = told("moves")["device"]["dev"].clone();
    let in_pods = |expected: (bool, bool)| {
        assert_eq!((open_in("from").code == 0, open_in("to").code == 0), expected);
    };

    println!("a migration that does not come about");
    lunplug(&["migration", "prepare", "moves", "--pod-uid", &to]).ok();
    in_pods((true, true));
    refused(lunplug(&["removevolume", "moves", "--volume-name", "data"]), "VM_MIGRATING");
    refused(lunplug(&["migration", "finish", "moves"]), "VM_RUNNING");
    lunplug(&["migration", "cancel", "moves"]).ok();
    in_pods((true, false));

    println!("the daemon is killed while the guest moves");
    lunplug(&["migration", "prepare", "moves", "--pod-uid", &to]).ok();
    sh("guest exec from default_moves 'echo first > /dev/sda; sync'").ok();
    sh("systemctl kill -s KILL lunplugd").ok();
    sh("pod migrate from to default_moves").ok();
    sh("daemon start").ok();
    refused(lunplug(&["migration", "cancel", "moves"]), "VM_RUNNING");
    lunplug(&["migration", "finish", "moves"]).ok();
    until("the volume is ready", LONG, || told("moves")["phase"] == "Ready");
    until("it has gone over", LONG, || open_in("from").code != 0);
    in_pods((false, true));
    assert_eq!(told("moves")["device"]["dev"], device, "one device throughout");
    let read = "guest exec to default_moves 'head -c 5 /dev/sda; echo second > /dev/sda; sync'";
    assert_eq!(sh(read).ok(), "first");
    assert_eq!(lun.read(6), *b"second");

    lunplug(&["removevolume", "moves", "--volume-name", "data"]).ok();
    lunplug(&["vm", "unregister", "moves"]).ok();
    sh("pod down from && pod down to").ok();
    story.nothing_left();
}
