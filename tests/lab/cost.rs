//! How many programs the daemon starts on the way, and udev for it, counted by the kernel; and the daemon's system calls,
//! counted by strace.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::node::{Lab, Lun, Story, add, remove, sh, until};

const TRACING: &str = "/sys/kernel/tracing";

/// The kernel counts what a unit and all its descendants execute, until this is dropped.
struct Programs;

impl Programs {
    #[track_caller]
    fn of(unit: &str) -> Self {
        let group = sh(&format!("systemctl show --property ControlGroup --value {unit}")).ok();
        // Every thread may be the one that forks; udev's workers are processes.
        sh(&format!(
            "mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}; cd {TRACING}
             echo 1 >options/event-fork; cat $(find /sys/fs/cgroup{} -name cgroup.threads) >set_event_pid
             echo 1 >events/sched/sched_process_exec/enable",
            group.trim()
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
    let programs = Programs::of("lunplugd");
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

/// Rules of others would run a dozen programs for each path of a guest's LUN: what is left is what tells its identity.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn udev_runs_nothing_for_a_path_but_what_tells_its_identity() {
    Lab::get();
    let (first, second) = (Lun::new("first", 1, "16M"), Lun::new("second", 2, "16M"));
    let story = Story::begin();
    add("first", &first.source(), &[]).ok();
    sh("udevadm settle").ok();
    let programs = Programs::of("systemd-udevd");
    add("second", &second.source(), &[]).ok();
    sh("udevadm settle").ok();
    let mut run = programs.since();
    run.sort();
    println!("two paths and a map: {run:?}");
    drop(programs);
    let (of_paths, of_map): (Vec<_>, Vec<_>) =
        run.into_iter().partition(|program| program.ends_with("/sg_inq"));
    // Three an event, of which a path seldom has a second.
    assert!(of_paths.len() >= 2 * 3 && of_paths.len().is_multiple_of(3), "{of_paths:?}");
    let maps = ["/usr/sbin/dmsetup", "/usr/sbin/multipath", "/usr/lib/udev/kpartx_id"];
    assert!(of_map.iter().all(|program| maps.contains(&program.as_str())), "{of_map:?}");
    // Each event of the map runs each of these once: not one `multipath -u` is left for a path.
    let times = |name: &str| of_map.iter().filter(|program| program.ends_with(name)).count();
    assert_eq!(times("/multipath"), times("/kpartx_id"), "{of_map:?}");
    remove("second", &[]).ok();
    remove("first", &[]).ok();
    story.nothing_left();
}

/// Policy and priority of the daemon's threads, once all have the same.
#[track_caller]
fn scheduling() -> String {
    let pid = sh("systemctl show --property MainPID --value lunplugd").ok().trim().to_owned();
    let each = format!(
        "for t in /proc/{pid}/task/*; do
           case $(cat $t/comm) in lunplug*|tokio-rt-worker) chrt -p ${{t##*/}} ;; esac
         done"
    );
    let mut of_all = Vec::new();
    // One that has just begun has not asked for it yet.
    until("all threads have the same", Duration::from_secs(10), || {
        let told = sh(&each).stdout;
        let of_each = told.lines().filter_map(|line| line.split_once("current scheduling "));
        of_all = of_each.map(|(_, what)| what.to_owned()).collect();
        of_all.sort_unstable();
        of_all.dedup();
        of_all.len() == 2
    });
    of_all.join(", ")
}

/// The unit says that the threads are to be ordinary ones, until this is dropped.
struct Ordinary;

impl Ordinary {
    const UNIT: &str = "/run/systemd/system/lunplugd.service.d/ordinary.conf";

    fn now() -> Self {
        sh(&format!(
            "mkdir -p $(dirname {0}); printf '[Service]\\nLimitRTPRIO=0\\n' >{0}
             systemctl daemon-reload; systemctl restart lunplugd",
            Self::UNIT
        ))
        .ok();
        Self
    }
}

impl Drop for Ordinary {
    fn drop(&mut self) {
        sh(&format!("rm {}; systemctl daemon-reload; systemctl restart lunplugd", Self::UNIT));
    }
}

/// Its unit gives it leave to have its threads come before ordinary ones; the programs that it runs are ordinary.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn the_daemons_threads_come_before_ordinary_ones_unless_the_unit_says_no() {
    Lab::get();
    let before_ordinary = || {
        assert_eq!(scheduling(), "policy: SCHED_RR|SCHED_RESET_ON_FORK, priority: 1");
    };
    before_ordinary();
    let ordinary = Ordinary::now();
    assert_eq!(scheduling(), "policy: SCHED_OTHER, priority: 0");
    drop(ordinary);
    before_ordinary();
}

/// strace counts lunplugd's system calls until this is dropped, also by a story that fails: it slows lunplugd down many times.
struct Strace(Child);

impl Strace {
    #[track_caller]
    fn begin() -> Self {
        let pid = sh("systemctl show --property MainPID --value lunplugd").ok().trim().to_owned();
        let arguments = ["-f", "-c", "-U", "calls,name", "-p", &pid];
        let mut strace = Command::new("strace");
        let strace = Self(strace.args(arguments).stderr(Stdio::piped()).spawn().expect("strace"));
        let own = strace.0.id();
        let untraced =
            format!("grep -L 'TracerPid:[[:space:]]*{own}$' /proc/{pid}/task/*/status || true");
        let all_traced = || sh(&untraced).ok().trim().is_empty();
        until("strace has attached to each thread", Duration::from_secs(60), all_traced);
        strace
    }

    /// So many, all kinds together.
    #[track_caller]
    fn end(mut self) -> u64 {
        self.interrupt();
        let mut table = String::new();
        let stderr = self.0.stderr.as_mut().expect("a pipe");
        stderr.read_to_string(&mut table).expect("text");
        let total = table.lines().find_map(|line| line.trim().strip_suffix(" total"));
        total.and_then(|calls| calls.trim().parse().ok()).unwrap_or_else(|| panic!("{table}"))
    }

    fn interrupt(&self) {
        sh(&format!("kill -INT {}", self.0.id()));
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        self.interrupt();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn system_calls(work: impl FnOnce()) -> u64 {
    let strace = Strace::begin();
    work();
    strace.end()
}

/// By how much the calls may differ unremarked, in percent: they depend on how often who waits is woken, so on how fast the
/// machine is.
const MORE: u64 = 40;
const LESS: u64 = 50;

/// benches/syscalls.toml has what one volume of two paths and a map costs on sessions that are there.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_volume_keeps_its_budget_of_system_calls() {
    Lab::get();
    let (first, second) = (Lun::new("first", 1, "16M"), Lun::new("second", 2, "16M"));
    let story = Story::begin();
    add("first", &first.source(), &[]).ok();
    // What a first volume leaves to be learnt is learnt then.
    add("second", &second.source(), &[]).ok();
    remove("second", &[]).ok();
    let counted = [
        ("add", system_calls(|| drop(add("second", &second.source(), &[]).ok()))),
        ("remove", system_calls(|| drop(remove("second", &[]).ok()))),
    ];
    println!("{counted:?}");
    let budget: BTreeMap<String, u64> =
        toml::from_str(include_str!("../../benches/syscalls.toml")).expect("a budget");
    for (what, calls) in counted {
        let may = budget[what];
        assert!(
            calls * 100 <= may * (100 + MORE),
            "{what}: {calls} system calls, and {may} are budgeted"
        );
        assert!(
            calls * 100 >= may * (100 - LESS),
            "{what}: {calls} system calls, down from {may}: write that in"
        );
    }
    remove("first", &[]).ok();
    story.nothing_left();
}
