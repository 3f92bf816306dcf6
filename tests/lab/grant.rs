//! The pod may open its volume's device, from the grant to the revoke and not a moment longer.

use crate::node::{Lab, Lun, POD, Story, add, open_in_pod, remove, run, sh, volume};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_grant_is_needed_outlives_reloads_and_ends() {
    let lab = Lab::get();
    let lun = Lun::new("grant1", 1, "16M");
    let story = Story::begin();
    add("reloaded", &lun.source(), &[]).ok();
    open_in_pod("reloaded").ok();

    sh("systemctl daemon-reload").ok();
    open_in_pod("reloaded").ok();
    sh("systemctl daemon-reexec").ok();
    open_in_pod("reloaded").ok();
    let unit = lab.cgroup().split('/').find(|part| part.ends_with(".scope")).expect("a scope");
    sh(&format!("systemctl set-property --runtime {unit} CPUWeight=77")).ok();
    open_in_pod("reloaded").ok();
    run("pod", &["update", POD]).ok();
    open_in_pod("reloaded").ok();

    // The same device by a node of another name, as a hostile pod's accomplice might leave it:
    // what counts is the device, and only while it is granted.
    let dev = volume("reloaded")["device"]["dev"].as_str().expect("a device number").to_owned();
    let (major, minor) = dev.split_once(':').expect("MAJOR:MINOR");
    let other = format!("{}/planted", lab.hotplug_dir());
    sh(&format!("mknod -m 666 {other} b {major} {minor}")).ok();
    open_in_pod("planted").ok();
    remove("reloaded", &[]).ok();
    let denied = open_in_pod("planted").fails();
    assert!(denied.stderr.contains("Operation not permitted"), "{}", denied.stderr);
    sh(&format!("rm {other}")).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn what_is_not_granted_stays_denied() {
    let lab = Lab::get();
    let (granted, other) = (Lun::new("grant2", 2, "16M"), Lun::new("grant3", 3, "16M"));
    let story = Story::begin();
    add("granted", &granted.source(), &[]).ok();
    // The node's own root disk is a device that no pod was given.
    let node = format!("{}/root", lab.hotplug_dir());
    sh(&format!("mknod -m 666 {node} b $(mountpoint -d / | tr : ' ')")).ok();
    let denied = open_in_pod("root").fails();
    assert!(denied.stderr.contains("Operation not permitted"), "{}", denied.stderr);
    sh(&format!("rm {node}")).ok();
    // Nor may the pod make nodes itself, granted or not.
    let dev =
        volume("granted")["device"]["dev"].as_str().expect("a device number").replace(':', " ");
    run("pod", &["exec", POD, "sh", "-c", &format!("mknod /tmp/own b {dev}")]).fails();
    drop(other);
    remove("granted", &[]).ok();
    story.nothing_left();
}
