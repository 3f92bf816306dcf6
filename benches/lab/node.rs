//! The node that is measured on: a target with two portals, LUNs for each contender, two pods.

use std::process::{Command, Stdio};

use serde_json::Value;

/// The portals of the lab's target.
pub const PORTALS: [&str; 2] = ["127.0.0.2:3260", "127.0.0.3:3260"];

/// Runs a line of shell, and gives what it prints.
pub fn sh(line: &str) -> String {
    let shell = ["-euo", "pipefail", "-c", line];
    let output = Command::new("bash").args(shell).stdin(Stdio::null()).output().unwrap();
    let [out, err] = [output.stdout, output.stderr].map(|b| String::from_utf8(b).unwrap());
    assert!(output.status.success(), "{line}\n{out}\n{err}");
    out.trim().to_owned()
}

/// A LUN of the target.
#[derive(Debug, Clone)]
pub struct Lun {
    pub number: u16,
    /// As device-mapper and multipathd write it: the type of the identifier, and 32 hex digits.
    pub wwid: String,
}

pub fn iqn() -> String {
    sh("target iqn")
}

/// LUNs `from` to `from + many - 1`, which go with the target.
pub fn make_luns(from: u16, many: u16) -> Vec<Lun> {
    (from..from + many)
        .map(|number| {
            let wwid = sh(&format!("target lun add bench{number} {number} 16M"));
            let digits = wwid.strip_prefix("naa.").expect("LIO has NAA identifiers");
            Lun { number, wwid: format!("3{digits}") }
        })
        .collect()
}

/// A pod with a QEMU whose virtual CPU stands still: it takes disks as any other, and costs no CPU.
pub struct Pod {
    pub name: String,
    pub uid: String,
    pub libvirt_uri: String,
    pub hotplug_dir: String,
    pub hotplug_dir_in_pod: String,
    pub cgroup: String,
    pub domain: String,
}

impl Pod {
    pub fn up(name: &str) -> Self {
        let domain = format!("default_{name}");
        let info: Value = serde_json::from_str(&sh(&format!("pod up {name}"))).unwrap();
        sh(&format!("guest up {name} {domain} --paused"));
        let text = |key: &str| info[key].as_str().unwrap().to_owned();
        Self {
            name: name.into(),
            uid: text("uid"),
            libvirt_uri: text("libvirt_uri"),
            hotplug_dir: text("hotplug_dir"),
            hotplug_dir_in_pod: text("hotplug_dir_in_pod"),
            cgroup: text("cgroup"),
            domain,
        }
    }
}

/// Whether multipathd makes a map over every LUN (`no`), or over those that have two paths or had a map (`yes`).
pub fn find_multipaths(value: &str) {
    sh(&format!(
        "sed -i 's/find_multipaths .*/find_multipaths {value}/' /etc/multipath.conf
         multipathd reconfigure >/dev/null
         timeout 30 sh -c 'until multipathd show daemon | grep -q idle; do sleep 0.1; done'"
    ));
}
