//! open-iscsi fails: iscsid killed, restarted and hung, iscsiadm killed in the middle of its work.

use crate::node::{Lab, Lun, Story, VM, add, guest_has, iqn, lunplug, remove, sh, until, volume};
use crate::san::{Brisk, Fault, SOON, Writer, is_whole};

const KILL: &str = "systemctl kill -s KILL iscsid || true";

#[test]
#[ignore = "runs in the lab: hack/test"]
fn volumes_outlive_iscsid_and_new_ones_come_without_it() {
    Lab::get();
    let luns = [Lun::new("isd1", 1, "16M"), Lun::new("isd2", 2, "16M")];
    let story = Story::begin();
    let brisk = Brisk::new();
    let writer = Writer::begin("isd1", &luns[0]);
    sh(KILL).ok();
    writer.goes_on("sessions are the kernel's");
    // The sessions are there: no program is needed.
    add("isd2", &luns[1].source(), &[]).ok();
    is_whole("isd2", &luns[1]);
    sh("systemctl reset-failed iscsid iscsid.socket; systemctl start iscsid").ok();
    writer.goes_on("iscsid connects the sessions anew");
    is_whole("isd1", &luns[0]);
    remove("isd2", &[]).ok();
    assert_eq!(writer.errors(), 0);
    // The last one logs out, of an iscsid that was killed again.
    sh(KILL).ok();
    writer.finish(&luns[0]);
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_add_in_which_iscsid_is_killed_converges() {
    Lab::get();
    let lun = Lun::new("isk", 1, "16M");
    let story = Story::begin();
    let brisk = Brisk::new();
    let source = lun.source();
    for after in ["0.1", "0.4", "0.8"] {
        lunplug(&["addvolume", VM, "--volume-name", "isk", "--source", &source, "--no-wait"]).ok();
        sh(&format!("sleep {after}; {KILL}")).ok();
        add("isk", &source, &[]).ok();
        is_whole_or_single("isk");
        remove("isk", &[]).ok();
        story.nothing_left();
    }
    drop(brisk);
    story.nothing_left();
}

/// A path whose login died with iscsid comes when the volume is next looked at.
#[track_caller]
fn is_whole_or_single(name: &str) {
    let told = volume(name);
    assert_eq!(told["phase"], "Ready");
    assert!([1, 2].contains(&told["device"]["paths"].as_u64().unwrap_or(0)), "{told}");
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_hung_iscsid_is_told_and_what_it_does_late_is_undone() {
    Lab::get();
    let lun = Lun::new("hung", 1, "16M");
    let story = Story::begin();
    let brisk = Brisk::new();
    sh("systemctl start iscsid").ok();
    let hung = Fault::stopped("iscsid");
    let ran = add("hung", &lun.source(), &["--timeout", "25s"]).fails();
    println!("told: {}", ran.stderr.trim());
    assert!(ran.stderr.contains("DEADLINE_EXCEEDED"), "{}", ran.stderr);
    assert!(ran.stderr.contains("iscsid"), "{}", ran.stderr);
    remove("hung", &[]).ok();
    guest_has(0);
    hung.end();
    // iscsid comes to the logins that nobody waits for any more: their sessions are ended.
    until("iscsid has made the late sessions, and lunplug has ended them", SOON, || {
        story.is_clean()
    });
    add("hung", &lun.source(), &[]).ok();
    is_whole("hung", &lun);
    remove("hung", &[]).ok();
    drop(brisk);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_iscsid_that_hangs_for_a_while_only_delays_an_add() {
    Lab::get();
    let luns = [Lun::new("slow1", 1, "16M"), Lun::new("slow2", 2, "16M")];
    let story = Story::begin();
    let brisk = Brisk::new();
    sh("systemctl start iscsid").ok();
    let hung = Fault::stopped("iscsid");
    lunplug(&[
        "addvolume",
        VM,
        "--volume-name",
        "slow1",
        "--source",
        &luns[0].source(),
        "--no-wait",
    ])
    .ok();
    until("the trouble is told", SOON, || volume("slow1")["trouble"]["reason"].is_string());
    hung.end();
    // Whoever comes in the meantime may find the late sessions.
    add("slow2", &luns[1].source(), &[]).ok();
    add("slow1", &luns[0].source(), &[]).ok();
    remove("slow1", &[]).ok();
    remove("slow2", &[]).ok();
    drop(brisk);
    until("nothing is left", SOON, || story.is_clean());
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_iscsiadm_that_was_killed_leaves_a_lock_and_an_empty_record_in_vain() {
    Lab::get();
    let luns = [Lun::new("lock1", 1, "16M"), Lun::new("lock2", 2, "16M")];
    let story = Story::begin();
    let brisk = Brisk::new();
    let source = luns[0].source();
    let iqn = iqn();
    let lock = "mkdir -p /run/lock/iscsi; touch /run/lock/iscsi/lock; ln /run/lock/iscsi/lock /run/lock/iscsi/lock.write";

    // What a SIGKILL at the worst moment leaves: the lock, and a record's file that is empty.
    let record = format!("/var/lib/iscsi/nodes/{iqn}/127.0.0.2,3260");
    let _left = Fault::new(
        &format!("{lock}; mkdir -p $(dirname {record}); : >{record}"),
        &format!("rm -f /run/lock/iscsi/lock.write; [ -s {record} ] || rm -f {record}"),
    );
    let began = std::time::Instant::now();
    add("lock1", &source, &[]).ok();
    println!("added {:?} after the lock was left", began.elapsed());
    is_whole("lock1", &luns[0]);
    let log = sh("daemon log 40").ok();
    assert!(log.contains("locked by a process that is dead"), "{log}");

    // A living one is not robbed: it is named, and waited for.
    let stopped = "iscsiadm -m discovery -t st -p 192.0.2.1 -o nonpersistent >/dev/null 2>&1 </dev/null & pid=$!
        until [ $(cat /proc/$pid/comm) = iscsiadm ]; do :; done; kill -STOP $pid; echo $pid";
    let pid = sh(stopped).ok().trim().to_owned();
    sh(lock).ok();
    let end = format!("kill -KILL {pid} 2>/dev/null; rm -f /run/lock/iscsi/lock.write");
    let held = Fault::new("true", &end);
    let third = format!("iscsi://127.0.0.2:3260/{iqn}.other/1");
    let ran = add("third", &third, &["--timeout", "15s"]).fails();
    assert!(ran.stderr.contains(&format!("iscsiadm[{pid}], which is stopped")), "{}", ran.stderr);
    // With the sessions that are there nothing needs the records.
    add("lock2", &luns[1].source(), &[]).ok();
    remove("lock2", &[]).ok();
    sh("test -e /run/lock/iscsi/lock.write").ok();
    held.end();
    remove("third", &[]).ok();

    // The last removal finds a lock again.
    sh(lock).ok();
    remove("lock1", &[]).ok();
    drop(brisk);
    story.nothing_left();
}
