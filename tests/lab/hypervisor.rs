//! libvirt and QEMU fail: what was asked for comes about when they are back, and nothing is left of what
//! they did late.

use std::time::Duration;

use crate::node::{
    Configured, DOMAIN, Lab, Lun, POD, QEMU, Stopped, Story, VM, add, gone, guest_disk, guest_has,
    in_guest, lunplug, open_in_pod, reason, refused, remove, run, sh, signal, stuck_calls, until,
    virsh, vm_info, volume,
};

const LONG: Duration = Duration::from_secs(90);

/// Deadlines that a story can wait for.
const SHORT: &[&str] =
    &["deadlines.libvirt_call=4s", "deadlines.guest_unplug=6s", "deadlines.kernel_call=4s"];

/// Wants a volume, and does not wait for it.
#[track_caller]
fn want(name: &str, source: &str) {
    let args = ["addvolume", VM, "--volume-name", name, "--source", source, "--no-wait"];
    lunplug(&args).ok();
}

#[track_caller]
fn drop_volume(name: &str) {
    lunplug(&["removevolume", VM, "--volume-name", name, "--no-wait", "--force"]).ok();
}

/// A QEMU that answers nothing holds libvirt's attach, and the domain's job with it.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_attach_that_comes_late_is_claimed_or_undone() {
    let lab = Lab::get();
    let lun = Lun::new("late", 1, "16M");
    let story = Story::begin();
    let _short = Configured::with(SHORT);
    let node = format!("{}/late", lab.hotplug_dir());
    for round in ["wanted", "given up", "given up by a killed daemon"] {
        println!("{round}");
        let stopped = Stopped::new(POD, QEMU);
        want("late", &lun.source());
        until("the attach has passed its deadline", LONG, || {
            reason("late") == "LIBVIRT_UNREACHABLE"
        });
        assert!(stuck_calls() > 0);
        if round != "wanted" {
            drop_volume("late");
        }
        if round == "given up by a killed daemon" {
            sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
        }
        until("it is tried again", LONG, || volume("late")["trouble"]["retry_at"].is_string());
        // QEMU may open it at any moment, so all that it needs stays.
        if round != "given up by a killed daemon" {
            sh(&format!("test -b {node}")).ok();
            open_in_pod("late").ok();
        }
        drop(stopped);
        if round == "wanted" {
            until("it is ready", LONG, || volume("late")["phase"] == "Ready");
            assert_eq!(guest_disk("late").bytes, 16 << 20);
            remove("late", &[]).ok();
        }
        gone("late", LONG);
        guest_has(0);
        story.nothing_left();
    }
    until("no call is stuck", LONG, || stuck_calls() == 0);
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_libvirtd_that_hangs_or_is_restarted_holds_up_its_own_vm_alone() {
    Lab::get();
    let (lun, other) = (Lun::new("hung", 1, "16M"), Lun::new("other", 2, "16M"));
    let story = Story::begin();
    sh("pod up second && guest up second default_second").ok();
    let uid = sh("pod info second | jq -r .uid").ok();
    let register = ["vm", "register", "second", "--pod-uid", uid.trim()];
    lunplug(&[&register[..], &["--domain", "default_second"]].concat()).ok();
    let short = Configured::with(SHORT);
    add("hung", &lun.source(), &[]).ok();

    let stopped = Stopped::new(POD, "libvirtd");
    let source = other.source();
    let beside = ["addvolume", "second", "--volume-name", "beside", "--source", &source];
    refused(lunplug(&["addvolume", VM, "--volume-name", "no", "--source", &source]), "LIBVIRT_");
    lunplug(&beside).ok();
    drop_volume("hung");
    until("the removal waits", LONG, || reason("hung") == "LIBVIRT_UNREACHABLE");
    assert_eq!(volume("hung")["phase"], "Detaching");
    assert_eq!(vm_info(VM)["state"], "unreachable");
    assert_eq!(vm_info("second")["state"], "running");
    assert!(stuck_calls() > 0);
    lunplug(&["removevolume", "second", "--volume-name", "beside"]).ok();
    drop(stopped);
    gone("hung", LONG);
    assert_eq!(vm_info(VM)["state"], "running");

    add("hung", &lun.source(), &[]).ok();
    signal(POD, "libvirtd", "KILL").ok();
    until("libvirtd is back", LONG, || vm_info(VM)["state"] == "running");
    let disk = guest_disk("hung").name;
    assert_eq!(volume("hung")["phase"], "Ready");
    in_guest(&format!("dd if=/dev/{disk} of=/dev/null bs=64k count=1")).ok();
    remove("hung", &[]).ok();
    drop(short);
    lunplug(&["vm", "unregister", "second"]).ok();
    sh("pod down second").ok();
    story.nothing_left();
}

/// A live dump into a pipe that nobody empties is a job that has the domain for as long as it takes.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_domain_that_is_busy_is_waited_for() {
    Lab::get();
    let (lun, other) = (Lun::new("busy", 3, "16M"), Lun::new("later", 4, "16M"));
    let story = Story::begin();
    add("busy", &lun.source(), &[]).ok();
    run("pod", &["exec", POD, "sh", "-c", "rm -f /tmp/pipe; mkfifo -m 666 /tmp/pipe"]).ok();
    sh(&format!("setsid pod exec {POD} sh -c 'exec 3</tmp/pipe; exec sleep 987' >/dev/null 2>&1 </dev/null &"))
        .ok();
    sh(&format!("setsid pod virsh {POD} dump --live --memory-only {DOMAIN} /tmp/pipe >/tmp/dump.log 2>&1 </dev/null &"))
        .ok();
    until("the domain has a job", LONG, || virsh(&["domjobinfo", DOMAIN]).stdout.contains("Dump"));
    refused(add("later", &other.source(), &[]), "DOMAIN_BUSY");
    lunplug(&["removevolume", VM, "--volume-name", "busy", "--no-wait", "--force"]).ok();
    until("the removal waits", LONG, || reason("busy") == "DOMAIN_BUSY");
    assert_eq!(volume("busy")["phase"], "Detaching");
    // The pattern is in its own command line too, hence the bracket.
    run("pod", &["exec", POD, "pkill", "-f", "sleep [9]87"]).ok();
    gone("busy", LONG);
    add("later", &other.source(), &[]).ok();
    remove("later", &[]).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_qemu_that_is_killed_leaves_nothing_and_its_volumes_wait() {
    Lab::get();
    let luns = [
        Lun::new("killed1", 1, "16M"),
        Lun::new("killed2", 2, "16M"),
        Lun::new("killed3", 3, "16M"),
    ];
    let story = Story::begin();
    let names = ["c", "a", "b"];
    for (name, lun) in names.iter().zip(&luns).take(2) {
        add(name, &lun.source(), &[]).ok();
    }
    let before = (guest_disk("c").bytes, volume("c")["target"].clone());
    // In the middle of an attach, while another volume is being removed.
    want("b", &luns[2].source());
    drop_volume("a");
    signal(POD, QEMU, "KILL").ok();
    for name in ["b", "c"] {
        until("it waits for its VM", LONG, || reason(name) == "VM_NOT_RUNNING");
        assert_eq!(volume(name)["phase"], "Pending");
    }
    gone("a", LONG);
    sh("iscsiadm -m session").fails();
    sh("multipath -l | grep .").fails();

    sh(&format!("guest down {POD} {DOMAIN} && guest up {POD} {DOMAIN}")).ok();
    for name in ["b", "c"] {
        until("it is back", LONG, || volume(name)["phase"] == "Ready");
    }
    // Serial and place are the volume's; which sdX that is, is the guest's own.
    assert_eq!((guest_disk("c").bytes, volume("c")["target"].clone()), before);
    assert_eq!(guest_disk("b").bytes, 16 << 20);
    remove("b", &[]).ok();
    remove("c", &[]).ok();
    story.nothing_left();
}
