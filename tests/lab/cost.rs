//! How many programs the daemon starts on the way, counted by the kernel.

use std::fs;

use crate::node::{Lab, Lun, Story, add, remove, sh};

const TRACING: &str = "/sys/kernel/tracing";

/// The kernel counts what lunplugd and all its descendants execute, until this is dropped.
struct Programs;

impl Programs {
    #[track_caller]
    fn counted() -> Self {
        let pid = sh("systemctl show --property MainPID --value lunplugd").ok();
        // Every thread of the daemon may be the one that forks.
        sh(&format!(
            "mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}; cd {TRACING}
             echo 1 >options/event-fork; ls /proc/{}/task >set_event_pid
             echo 1 >events/sched/sched_process_exec/enable",
            pid.trim()
        ))
        .ok();
        Self
    }

    /// What was executed since this was last asked.
    #[track_caller]
    fn since(&self) -> Vec<String> {
        let trace = fs::read_to_string(format!("{TRACING}/trace")).expect("tracefs");
        fs::write(format!("{TRACING}/trace"), "").expect("tracefs");
        let name = |line: &str| Some(line.split_once("filename=")?.1.split(' ').next()?.to_owned());
        trace.lines().filter(|l| !l.starts_with('#')).filter_map(name).collect()
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        sh(&format!(
            "cd {TRACING}; echo 0 >events/sched/sched_process_exec/enable; echo 0 >options/event-fork
             echo >set_event_pid; echo >trace"
        ));
    }
}

/// A target with two portals costs four programs to come to and two to leave, and a LUN of a target that is
/// in use costs none.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_lun_on_an_existing_session_costs_no_program() {
    Lab::get();
    let (first, second) = (Lun::new("first", 1, "16M"), Lun::new("second", 2, "16M"));
    let story = Story::begin();
    let programs = Programs::counted();
    add("first", &first.source(), &[]).ok();
    let new = programs.since();
    println!("a new target: {new:?}");
    assert!(!new.is_empty() && new.len() <= 4, "{new:?}");
    add("second", &second.source(), &[]).ok();
    assert_eq!(programs.since(), [""; 0], "attached on sessions that are there");
    remove("second", &[]).ok();
    assert_eq!(programs.since(), [""; 0], "another needs the sessions");
    remove("first", &[]).ok();
    let last = programs.since();
    println!("the last LUN: {last:?}");
    assert!(!last.is_empty() && last.len() <= 2, "{last:?}");
    drop(programs);
    story.nothing_left();
}
