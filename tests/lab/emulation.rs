//! What emulated KVM does to guests (hack/lab/README.md), told from what lunplug does to them.

use crate::node::{run, sh};

/// hack/lab/stories looks for it.
const BROKEN: &str = "emulated KVM broke this guest";

/// How emulation broke a guest; `None` where it did not, and on real hardware.
pub fn broken(pod: &str, domain: &str) -> Option<String> {
    let ran = run("guest", &["broken", pod, domain]);
    (ran.code == 0).then(|| ran.stdout.trim().to_owned())
}

/// Tells of all guests that emulation broke.
pub fn tell_broken_guests() {
    for pod in sh("pod list").stdout.lines() {
        let domains = run("pod", &["virsh", pod, "list", "--name"]).stdout;
        for domain in domains.lines().filter(|line| !line.is_empty()) {
            if let Some(how) = broken(pod, domain) {
                println!("{BROKEN}: {domain} in pod {pod}: {how}");
            }
        }
    }
}
