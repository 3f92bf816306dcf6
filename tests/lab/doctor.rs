//! The doctor finds what would hurt, on a node that has it.

use std::time::Duration;

use serde_json::Value;

use crate::node::{Lab, Ran, lunplug, sh, until};

const SOON: Duration = Duration::from_secs(20);

/// Undoes a change of the node's when this is dropped.
struct Undo(&'static str);

impl Drop for Undo {
    fn drop(&mut self) {
        sh(self.0);
    }
}

fn doctor() -> Ran {
    lunplug(&["doctor", "--all", "-o", "json"])
}

/// The findings on one thing: how bad it is, and what is said.
#[track_caller]
fn findings(ran: &Ran, check: &str) -> Vec<(String, String)> {
    let all: Vec<Value> = serde_json::from_str(&ran.stdout).expect("doctor -o json prints JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let told = all.iter().filter(|f| f["check"] == check);
    told.map(|f| (text(&f["severity"]), text(&f["what"]))).collect()
}

#[track_caller]
fn told(ran: &Ran, check: &str, severity: &str, words: &str) {
    let found = findings(ran, check);
    let is_it = |(how, what): &(String, String)| how == severity && what.contains(words);
    assert!(found.iter().any(is_it), "no {severity} with {words:?} in {found:?}");
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn the_doctor_finds_what_would_hurt() {
    Lab::get();
    let well = doctor();
    println!("{}", well.stdout);
    assert_eq!((well.code, well.stdout.contains("problem")), (0, false));

    {
        let _undo = Undo("mv /etc/multipath.conf.kept /etc/multipath.conf; multipathd reconfigure");
        sh("cp -a /etc/multipath.conf /etc/multipath.conf.kept
            printf 'overrides {\\nno_path_retry queue\\n}\\nblacklist {\\nwwid \".*\"\\n}\\n' \
                >>/etc/multipath.conf
            multipathd reconfigure")
        .ok();
        // multipathd reads it when it has answered.
        until("it is told", SOON, || doctor().code == 9);
        let ran = doctor();
        told(&ran, "multipath.config", "problem", "blacklist");
        told(&ran, "multipath.config", "warning", "waits for ever");
    }
    until("all is well again", SOON, || doctor().code == 0);

    {
        let _undo = Undo("systemctl start iscsid.socket");
        sh("systemctl stop iscsid.socket iscsid.service").ok();
        let ran = doctor();
        assert_eq!(ran.code, 9);
        told(&ran, "iscsi.service", "problem", "nobody listens");
    }

    {
        let _undo = Undo("mv /etc/lvm/lvmlocal.conf.kept /etc/lvm/lvmlocal.conf");
        sh("mv /etc/lvm/lvmlocal.conf /etc/lvm/lvmlocal.conf.kept").ok();
        told(&doctor(), "lvm", "warning", "does not know guests' LUNs");
    }
    assert_eq!(doctor().code, 0);
}
