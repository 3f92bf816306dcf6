//! The pod may open its volume's device, from the grant to the revoke and not a moment longer.

use std::time::Duration;

use crate::node::{
    Lab, Lun, POD, Story, VM, add, lunplug, open_in_pod, remove, run, sh, until, volume,
};

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

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_descriptor_that_outlives_its_grant_only_gives_errors() {
    Lab::get();
    let lun = Lun::new("kept", 4, "16M");
    let story = Story::begin();
    add("kept", &lun.source(), &[]).ok();
    // A process in the pod keeps the device open, and reads when it is told to.
    let in_pod = |line: &str| run("pod", &["exec", POD, "sh", "-c", line]);
    in_pod("rm -f /tmp/opened /tmp/go /tmp/said").ok();
    let keeper = "exec 9</run/kubevirt/hotplug-disks/kept; touch /tmp/opened; \
        until [ -e /tmp/go ]; do sleep 0.1; done; \
        dd bs=4096 count=1 iflag=direct of=/dev/null <&9 2>/tmp/said; sleep 1000 9<&-";
    sh(&format!("setsid pod exec {POD} sh -c '{keeper}' >/dev/null 2>&1 </dev/null &")).ok();
    until("the device is open", Duration::from_secs(20), || {
        in_pod("test -e /tmp/opened").code == 0
    });

    let ran = remove("kept", &[]).fails();
    assert!(ran.stderr.contains("DEVICE_HELD") && ran.stderr.contains("sh["), "{}", ran.stderr);
    assert_eq!(volume("kept")["phase"], "UnMountedFromPod");
    in_pod("touch /tmp/go").ok();
    until("it has read", Duration::from_secs(20), || in_pod("test -s /tmp/said").code == 0);
    let said = in_pod("cat /tmp/said").ok();
    assert!(said.contains("Input/output error"), "{said}");

    // The pattern is in its own command line too, hence the bracket.
    in_pod("pkill -f hotplug-disks/[k]ept").ok();
    until("the volume is gone", Duration::from_secs(120), || {
        lunplug(&["describe", VM, "kept"]).code == 3
    });
    story.nothing_left();
}

/// A single path has no map to make harmless: it stays as it is, and nobody else gets it.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_single_path_that_is_held_open_waits_for_its_holder() {
    Lab::get();
    let lun = Lun::new("single", 5, "16M");
    let story = Story::begin();
    add("single", &lun.source(), &["--multipath", "off"]).ok();
    let in_pod = |line: &str| run("pod", &["exec", POD, "sh", "-c", line]);
    in_pod("rm -f /tmp/opened").ok();
    let keeper = "exec 9</run/kubevirt/hotplug-disks/single; touch /tmp/opened; exec sleep 1000";
    sh(&format!("setsid pod exec {POD} sh -c '{keeper}' >/dev/null 2>&1 </dev/null &")).ok();
    until("the device is open", Duration::from_secs(20), || {
        in_pod("test -e /tmp/opened").code == 0
    });
    let ran = remove("single", &[]).fails();
    assert!(ran.stderr.contains("DEVICE_HELD") && ran.stderr.contains("sleep["), "{}", ran.stderr);
    assert_eq!(volume("single")["phase"], "UnMountedFromPod");
    sh("ls /sys/class/iscsi_session | grep .").ok();
    in_pod("pkill -f 'sleep [1]000'").ok();
    until("the volume is gone", Duration::from_secs(120), || {
        lunplug(&["describe", VM, "single"]).code == 3
    });
    story.nothing_left();
}
