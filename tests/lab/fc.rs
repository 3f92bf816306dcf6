//! Fibre Channel, over a fabric of two software ports: real `fc_host`s, remote ports and SCSI targets.

use std::time::Duration;

use serde_json::Value;

use crate::node::{
    DOMAIN, Lab, Lun, Ran, Story, add, guest_disk, guest_has, in_guest, lunplug, reason, refused,
    remove, sh, until, volume,
};

const LONG: Duration = Duration::from_secs(120);

/// Two pairs of ports, which show one LUN. Nothing scans by itself, as docs/operations.md has it. The ports stay
/// when the story ends: libfcoe does not stand that they are removed and made anew (`fcoe_ctlr_vn_recv` follows a
/// null pointer when a frame comes in between).
struct Fabric {
    lun: Lun,
    wwpns: Vec<String>,
}

impl Fabric {
    #[track_caller]
    fn up(name: &str, number: u16) -> Self {
        let lun = Lun::new(name, number, "16M");
        sh("printf manual > /sys/module/scsi_mod/parameters/scan").ok();
        let wwpns = sh("fabric up").ok().lines().map(str::to_owned).collect();
        let fabric = Self { lun, wwpns };
        sh(&format!("fabric export {name} {number}")).ok();
        fabric
    }

    /// Both ports, spelt as switches do.
    fn source(&self) -> String {
        format!("fc://{}/{}", self.wwpns.join(","), self.lun.number)
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        let name = &self.lun.name;
        sh(&format!("fabric unexport {name}; printf sync > /sys/module/scsi_mod/parameters/scan"));
    }
}

fn paths(name: &str) -> u64 {
    volume(name)["device"]["paths"].as_u64().unwrap_or_default()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn two_ports_carry_data_and_one_is_lost_and_comes_back() {
    Lab::get();
    let fabric = Fabric::up("fc", 7);
    let story = Story::begin();
    let node: Value = serde_json::from_str(&lunplug(&["node", "-o", "json"]).ok()).expect("JSON");
    let hbas = node["hbas"].as_array().expect("the node has HBAs");
    let online = hbas.iter().filter(|hba| hba["state"] == "Online").count();
    assert_eq!(online, 4, "two of the node's and the two targets': {hbas:?}");

    add("fc", &fabric.source(), &["--multipath", "required"]).ok();
    let told = volume("fc");
    assert_eq!(told["device"]["wwid"], fabric.lun.wwid.as_str());
    until("both paths are there", LONG, || paths("fc") == 2);
    let disk = guest_disk("fc");
    assert_eq!(disk.bytes, 16 << 20);
    in_guest(&format!("echo first > /dev/{}; sync", disk.name)).ok();
    assert_eq!(fabric.lun.read(5), *b"first");

    println!("a cable is pulled, and plugged in again");
    sh("fabric port down 0").ok();
    until("a path is lost", LONG, || reason("fc") == "PATHS_DEGRADED");
    in_guest(&format!("echo second > /dev/{}; sync", disk.name)).ok();
    assert_eq!(fabric.lun.read(6), *b"second");
    sh("fabric port up 0").ok();
    until("both paths are back", LONG, || paths("fc") == 2 && reason("fc").is_empty());

    fabric.lun.grow("32M");
    lunplug(&["expand", "vm", "--volume-name", "fc"]).ok();
    until("the guest sees its size", LONG, || guest_disk("fc").bytes == 32 << 20);

    remove("fc", &[]).ok();
    guest_has(0);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_port_that_no_hba_sees_is_named_and_the_other_does() {
    Lab::get();
    let fabric = Fabric::up("fc", 256);
    let story = Story::begin();
    // tcm_fc does not know flat addressing.
    let (seen, lun) = (&fabric.wwpns[1], format!("plain:{}", fabric.lun.number));
    let lost = add("lost", &format!("fc://500a0982991b8dc5/{lun}"), &["--timeout", "20s"]);
    refused(lost, "FC_PORT_NOT_FOUND");
    remove("lost", &[]).ok();

    add("fc", &format!("fc://0x500a0982991b8dc5,{}/{lun}", seen.replace(':', "")), &[]).ok();
    assert_eq!(volume("fc")["device"]["wwid"], fabric.lun.wwid.as_str());
    guest_disk("fc");
    remove("fc", &[]).ok();
    guest_has(0);
    story.nothing_left();
}

/// The guest's VM is registered as it was when the story ends, whatever came of it.
struct Registered;

impl Registered {
    #[track_caller]
    fn with(fc: &'static str) -> Self {
        register(fc).ok();
        Self
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        register("");
    }
}

fn register(fc: &str) -> Ran {
    let lab = Lab::get();
    let mut args = vec!["vm", "register", "vm", "--pod-uid", lab.uid(), "--domain", DOMAIN];
    if !fc.is_empty() {
        args.extend(["--fc", fc]);
    }
    lunplug(&args)
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_vm_without_support_is_to_be_powered_off_first() {
    Lab::get();
    let fabric = Fabric::up("fc", 9);
    let story = Story::begin();
    let registered = Registered::with("unsupported");
    refused(add("able", &fabric.source(), &[]), "FC_NOT_SUPPORTED");
    assert!(lunplug(&["vm", "list"]).ok().contains("unsupported"));
    register("supported").ok();
    add("able", &fabric.source(), &[]).ok();
    guest_disk("able");
    register("unsupported").ok();
    until("it is looked at again", LONG, || volume("able")["phase"] == "Ready");
    remove("able", &[]).ok();
    drop(registered);
    guest_has(0);
    story.nothing_left();
}
