//! Discovery, and portals by IPv6 and by name.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::chap::{SHOWN, nowhere, watched, write};
use crate::node::{
    Configured, Lab, Lun, Ran, Story, add, lunplug, refused, remove, run, sh, source_of, volume,
};
use crate::san::Fault;

const AUTH: &str = "/sys/kernel/config/target/iscsi/discovery_auth";
const FILE: &str = "/run/lab-discovery.yaml";
const SECRET: &str = "hush-discovery-1";

fn discover(portal: &str, more: &[&str]) -> Ran {
    lunplug(&[&["discover", portal, "-o", "json"], more].concat())
}

/// The targets that a portal lists, with their portals.
#[track_caller]
fn targets(ran: Ran) -> BTreeMap<String, Vec<String>> {
    let found: Vec<Value> = serde_json::from_str(&ran.ok()).expect("discover -o json prints JSON");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let portals = |t: &Value| t["portals"].as_array().expect("a list").iter().map(text).collect();
    found.iter().map(|t| (text(&t["target"]), portals(t))).collect()
}

#[track_caller]
fn with(username: &str, password: &str) -> [&'static str; 2] {
    write(FILE, &format!("username: {username}\npassword: \"{password}\""));
    ["--chap-file", FILE]
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn targets_are_discovered_and_nothing_is_left() {
    Lab::get();
    let lun = Lun::new("disc", 1, "16M");
    let settings = ["iscsi.login_timeout=2s", "iscsi.login_retries=0"];
    let _talkative = Configured::with(&[&SHOWN[..], &settings].concat());
    let story = Story::begin();
    let iqn = sh("target iqn").ok().trim().to_owned();

    let found = targets(discover("127.0.0.2", &[]));
    assert_eq!(found[&iqn], ["127.0.0.2:3260", "127.0.0.3:3260"]);
    story.nothing_left();
    refused(discover("127.0.0.9", &[]), "PORTAL_UNREACHABLE");
    refused(discover("10.0.0", &[]), "INVALID_PORTAL");
    refused(discover("lab-san.invalid", &[]), "PORTAL_NOT_RESOLVED");
    let named = Fault::new("echo 127.0.0.2 lab-san >>/etc/hosts", "sed -i /lab-san/d /etc/hosts");
    assert_eq!(targets(discover("lab-san", &[])), found);

    // Portals that tell their targets to who knows the secret.
    let closed = Fault::new(
        &format!("echo 1 >{AUTH}/enforce_discovery_auth"),
        &format!(
            "cd {AUTH}; echo 0 >enforce_discovery_auth; printf NULL >userid; printf NULL >password; rm -rf {FILE} /etc/lunplug/secrets"
        ),
    );
    write(&format!("{AUTH}/userid"), "disco");
    write(&format!("{AUTH}/password"), SECRET);
    let (_, calls) = watched(|| {
        refused(discover("127.0.0.2", &[]), "LOGIN_REFUSED");
        refused(discover("127.0.0.2", &with("disco", "hush-wrong")), "CHAP_REJECTED");
        assert_eq!(targets(discover("127.0.0.2", &with("disco", SECRET))), found);
    });
    assert!(calls > 0, "not one call of iscsiadm was seen");
    let secret = "/etc/lunplug/secrets/disco";
    sh(&format!("mkdir -p {secret}")).ok();
    write(&format!("{secret}/discovery.sendtargets.auth.username"), "disco");
    write(&format!("{secret}/discovery.sendtargets.auth.password"), SECRET);
    assert_eq!(targets(discover("127.0.0.2", &["--chap-secret", "disco"])), found);
    story.nothing_left();

    // A discovery record of somebody else's stays as it is.
    let record = "iscsiadm -m discoverydb -t st -p 127.0.0.3:3260 -o";
    let foreign = Fault::new(&format!("{record} new"), &format!("{record} delete"));
    let sums = "find /etc/iscsi /var/lib/iscsi -type f -exec sha256sum {} + 2>/dev/null | sort";
    let before = run("bash", &["-c", sums]).stdout;
    refused(discover("127.0.0.3", &["--chap-secret", "disco"]), "UNSUPPORTED");
    assert_eq!(run("bash", &["-c", sums]).stdout, before);
    foreign.end();
    closed.end();
    story.nothing_left();

    // A portal of IPv6: discovered, and one of the two paths of a volume, whose other one is by name.
    let np = format!("/sys/kernel/config/target/iscsi/{iqn}/tpgt_1/np/[::1]:3260");
    let sixth = Fault::new(&format!("mkdir '{np}'"), &format!("rmdir '{np}'"));
    assert!(targets(discover("[::1]", &[]))[&iqn].contains(&"[::1]:3260".to_owned()));
    let source = source_of(lun.number)
        .replace("127.0.0.2:3260", "lab-san")
        .replace("127.0.0.3:3260", "[0:0:0:0:0:0:0:1]");
    add("disc", &source, &[]).ok();
    named.end();
    assert_eq!(volume("disc")["resolved_portals"]["lab-san:3260"], "127.0.0.2:3260");
    add("disc", &source, &[]).ok();
    assert_eq!(volume("disc")["device"]["paths"], 2);
    assert!(sh("iscsiadm -m session").ok().contains("[::1]:3260"));
    remove("disc", &[]).ok();
    sixth.end();
    story.nothing_left();
    nowhere();
}
