//! Where iscsid, multipathd and lunplugd run: on the host or in containers, alive or not. What is expected
//! in each case is in docs/operations.md, "Who serves".

use serde_json::Value;

use crate::mpathd;
use crate::node::{Lab, Lun, Ran, Story, VM, add, guest_disk, guest_has, in_guest, lunplug};
use crate::node::{iqn, reason, remove, run, sh, until, volume};
use crate::san::{Fault, SOON};

/// What the host's iscsid is, until this is dropped.
const AGAIN: &str = "systemctl unmask --runtime -q iscsid.socket iscsid.service
    systemctl reset-failed iscsid.socket iscsid.service 2>/dev/null || true
    systemctl start iscsid.socket";
const STOP: &str =
    "systemctl stop iscsid.socket iscsid.service 2>/dev/null || systemctl stop iscsid.socket";

fn masked() -> Fault {
    let mask = "systemctl mask --runtime -q iscsid.socket iscsid.service";
    Fault::new(&format!("{STOP}; {mask}"), AGAIN)
}

fn stopped() -> Fault {
    Fault::new(STOP, AGAIN)
}

/// Killed; systemd starts it with the next connection to its socket, which still listens.
fn failed() -> Fault {
    Fault::new("systemctl start iscsid; systemctl kill -s KILL iscsid; sleep 0.2", AGAIN)
}

/// Killed, and its socket unit is away, too.
fn failed_with_its_socket() -> Fault {
    let kill =
        "systemctl start iscsid; systemctl kill -s KILL iscsid; systemctl stop iscsid.socket";
    Fault::new(kill, AGAIN)
}

fn running() -> Fault {
    Fault::new("systemctl start iscsid", AGAIN)
}

/// A container with a daemon, until this is dropped.
struct Place(&'static str);

impl Place {
    #[track_caller]
    fn up(name: &'static str) -> Self {
        let place = Self(name);
        run("place", &["up", name]).ok();
        place
    }

    fn root(&self) -> String {
        run("place", &["root", self.0]).ok().trim().to_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{} wrote:\n{}", self.0, run("place", &["log", self.0]).stdout);
        }
        run("place", &["down", self.0]);
    }
}

/// A volume with a single path: one login.
fn source(lun: &Lun) -> String {
    format!("iscsi://127.0.0.2:3260/{}/{}", iqn(), lun.number)
}

fn add_plain(lun: &Lun) -> Ran {
    add(&lun.name, &source(lun), &["--multipath", "off"])
}

/// How many node records are beneath a root.
fn records(root: &str) -> usize {
    let find = format!("find {root}/var/lib/iscsi/nodes -type f 2>/dev/null | wc -l");
    sh(&find).stdout.trim().parse().expect("a number")
}

/// Adds a volume and removes it; its record was beneath that root alone.
#[track_caller]
fn served_by(what: &str, lun: &Lun, root: &str, not: &str) {
    let (here, elsewhere) = (records(root), records(not));
    add_plain(lun).ok();
    println!("{what}: added");
    assert_eq!((records(root), records(not)), (here + 1, elsewhere), "{what}: its record");
    remove(&lun.name, &[]).ok();
    assert_eq!((records(root), records(not)), (here, elsewhere), "{what}: none is left");
}

fn host_runs() -> bool {
    sh("systemctl is-active -q iscsid.service").code == 0
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn the_hosts_iscsid_alone_serves_unless_it_is_masked() {
    Lab::get();
    let lun = Lun::new("host1", 1, "16M");
    let story = Story::begin();
    {
        let masked = masked();
        add("host1", &source(&lun), &["--multipath", "off", "--no-wait"]).ok();
        until("it is told", SOON, || reason("host1") == "ISCSID_UNAVAILABLE");
        let doctor = lunplug(&["doctor"]);
        assert!(doctor.code == 9 && doctor.stdout.contains("nobody listens"), "{}", doctor.stdout);
        // It waits, and comes when somebody serves.
        masked.end();
        add_plain(&lun).ok();
        remove("host1", &[]).ok();
        story.nothing_left();
    }
    // iscsiadm has it started. That the host's serves when only its process has failed, and when it runs, is in
    // the next story.
    for (what, state) in
        [("stopped", stopped as fn() -> Fault), ("failed with its socket", failed_with_its_socket)]
    {
        let state = state();
        served_by(what, &lun, "", "/nonexistent");
        state.end();
    }
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_iscsid_in_a_container_serves_where_the_hosts_does_not_listen() {
    Lab::get();
    let lun = Lun::new("cont1", 1, "16M");
    let story = Story::begin();
    // And where it is stopped, in the next story.
    for (what, state) in
        [("masked", masked as fn() -> Fault), ("failed with its socket", failed_with_its_socket)]
    {
        let state = state();
        let place = Place::up("iscsid");
        served_by(what, &lun, &place.root(), "");
        assert!(!host_runs(), "{what}: the host's stays as it was");
        drop(place);
        state.end();
    }
    for (what, state) in [("failed", failed as fn() -> Fault), ("running", running)] {
        let state = state();
        let told = run("place", &["up", "iscsid"]).fails();
        println!("{what}: the container's ends: {}", told.stderr.trim());
        served_by(what, &lun, "", "/nonexistent");
        state.end();
    }
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_iscsid_whose_container_ends_is_waited_for() {
    Lab::get();
    let luns = [Lun::new("end1", 1, "16M"), Lun::new("end2", 2, "16M")];
    let story = Story::begin();
    // Not masked: the host's could be started.
    let host = stopped();
    let place = Place::up("iscsid");
    add_plain(&luns[0]).ok();
    assert_eq!((records(&place.root()), records("")), (1, 0));
    let doctor = lunplug(&["doctor", "--all"]);
    println!("{}", doctor.stdout);
    assert!(doctor.code == 0 && doctor.stdout.contains("mask --now iscsid"), "{}", doctor.stdout);
    drop(place);
    // The session is the kernel's.
    add_plain(&luns[1]).ok();
    remove("end2", &[]).ok();
    in_guest(&format!("head -c 512 /dev/{} >/dev/null", guest_disk("end1").name)).ok();
    remove("end1", &["--no-wait"]).ok();
    until("it is told", SOON, || reason("end1") == "ISCSID_UNAVAILABLE");
    assert!(!host_runs() && sh("systemctl is-active -q iscsid.socket").code != 0);
    // With a database that knows nothing of the session.
    let place = Place::up("iscsid");
    remove("end1", &[]).ok();
    assert_eq!(records(&place.root()), 0);
    drop(place);
    host.end();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn lunplugd_in_a_container_uses_the_hosts_daemons() {
    Lab::get();
    let lun = Lun::new("inside", 1, "16M");
    let story = Story::begin();
    let host = Fault::new("daemon stop", "systemctl start lunplugd");
    let place = Place::up("lunplugd");
    assert_eq!(run("place", &["exec", "lunplugd", "test", "-e", "/usr/sbin/iscsiadm"]).code, 1);
    let node: Value = serde_json::from_str(&lunplug(&["node", "-o", "json"]).ok()).expect("JSON");
    let name = sh("sed -n s/^InitiatorName=//p /etc/iscsi/initiatorname.iscsi").ok();
    assert_eq!(node["initiator_name"], name.trim());
    let doctor = run("place", &["exec", "lunplugd", "lunplug", "doctor", "--all"]);
    println!("{}", doctor.stdout);
    assert_eq!(doctor.code, 0, "{}", doctor.stdout);

    add("inside", &lun.source(), &["--multipath", "required"]).ok();
    assert_eq!(volume("inside")["device"]["paths"], 2);
    let disk = guest_disk("inside");
    let read = format!("dd if=/dev/{} bs=64k count=1 iflag=direct | wc -c", disk.name);
    assert!(in_guest(&read).ok().contains("65536"));
    assert_eq!(records(""), 2, "in the host's database");
    remove("inside", &[]).ok();
    guest_has(0);
    // A map that nobody hands out any more is removed by the host's tools, and udev's word is waited for.
    add("inside", &lun.source(), &["--multipath", "required"]).ok();
    {
        let _away = mpathd::stop();
        remove("inside", &[]).ok();
    }
    drop(place);
    host.end();
    until("it is back on the host", SOON, || lunplug(&["vm", "list"]).stdout.contains(VM));
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_multipathd_in_a_container_serves_with_files_of_its_own() {
    Lab::get();
    let lun = Lun::new("mpcont", 1, "16M");
    let story = Story::begin();
    let host = mpathd::stop();
    let place = Place::up("multipathd");
    let listed = |root: &str| {
        let wwid = lun.wwid.trim_start_matches("naa.");
        let grep =
            format!("grep -sl {wwid} {root}/etc/multipath/wwids {root}/etc/multipath/bindings");
        sh(&format!("{grep} | wc -l")).stdout.trim().to_owned()
    };
    add("mpcont", &lun.source(), &["--multipath", "required"]).ok();
    assert_eq!(volume("mpcont")["device"]["paths"], 2);
    assert_eq!((listed(&place.root()), listed("")), ("2".into(), "0".into()));
    remove("mpcont", &[]).ok();
    assert_eq!(listed(&place.root()), "0", "forgotten where it was remembered");
    drop(place);
    host.end();
    story.nothing_left();
}
