//! Volumes come and go; the daemon stays as it was.

use std::fs;
use std::time::Duration;

use crate::emulation;
use crate::node::{DOMAIN, Lab, Lun, POD, Story, add, gone, nightly, remove, sh};

/// What the daemon holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    fds: usize,
    threads: usize,
    rss_kib: u64,
}

fn held() -> Held {
    let pid = sh("systemctl show --property MainPID --value lunplugd").ok().trim().to_owned();
    let count = |what| fs::read_dir(format!("/proc/{pid}/{what}")).expect("it runs").count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("it has memory");
    let rss_kib = rss.trim().trim_end_matches(" kB").parse().expect("a number");
    Held { fds: count("fd"), threads: count("task"), rss_kib }
}

/// 300 times a volume is added and removed in the nightly run, a handful of times else. Two are there at
/// once, so that sessions are made, shared and ended.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn cycles_leave_no_descriptor_thread_or_memory_behind() {
    Lab::get();
    let cycles = if nightly() { 300 } else { 10 };
    let luns = [Lun::new("soak1", 1, "16M"), Lun::new("soak2", 2, "16M")];
    let story = Story::begin();
    let two_cycles = || {
        let cycles = || {
            add("soak1", &luns[0].source(), &[]).done()?;
            add("soak2", &luns[1].source(), &["--bus", "virtio"]).done()?;
            remove("soak1", &[]).done()?;
            remove("soak2", &[]).done()
        };
        if let Err(ran) = cycles() {
            // In hours of emulation that comes to pass; the daemon goes on, and so does the soak.
            let why = emulation::broken(POD, DOMAIN).unwrap_or_else(|| panic!("{ran:?}"));
            println!("another guest, for this one is broken: {why}");
            sh(&format!("guest down {POD} {DOMAIN}; guest up {POD} {DOMAIN}")).ok();
            for name in ["soak1", "soak2"] {
                remove(name, &["--force"]);
                gone(name, Duration::from_secs(60));
            }
        }
    };
    // The first ones fill caches and worker pools.
    (0..3).for_each(|_| two_cycles());
    let before = held();
    (0..cycles).step_by(2).for_each(|_| two_cycles());
    let after = held();
    println!("after {cycles} more cycles: {before:?} -> {after:?}");
    assert!(after.fds <= before.fds, "descriptors leak");
    // Idle workers of a pool come and go.
    assert!(after.threads <= before.threads + 4, "threads leak");
    assert!(after.rss_kib <= before.rss_kib * 3 / 2, "memory leaks");
    story.nothing_left();
}
