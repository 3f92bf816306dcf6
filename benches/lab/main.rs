//! What lunplug adds to the kernel's, iscsid's, multipathd's and libvirt's own cost, on the lab's node: the same
//! operations done bare (the floor), by lunplugd, and, asked for, by os-brick, in turn in each repetition.
//!
//! Runs in the node, as root: `hack/bench --only lab`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, unreachable_pub)]

mod cases;
mod floor;
mod node;
mod ours;
mod peer;
mod programs;
mod report;
mod stats;
mod uevents;

use std::path::Path;
use std::time::{Duration, Instant};

use cases::{Case, Contenders};

/// What is asked for on the command line.
struct Options {
    repetitions: usize,
    peer: bool,
    only: Option<String>,
    without: Option<String>,
    /// Whether system calls are counted: strace slows the daemon down so far that its deadlines may pass.
    syscalls: bool,
}

fn options() -> Options {
    let mut options =
        Options { repetitions: 8, peer: false, only: None, without: None, syscalls: false };
    // cargo's own `--bench` is among them.
    let mut words = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        match word.as_str() {
            "--repetitions" => options.repetitions = value().parse().expect("a number"),
            "--case" => options.only = Some(value()),
            "--without" => options.without = Some(value()),
            "--syscalls" => options.syscalls = true,
            "--peer" => {
                assert_eq!(value(), "os-brick", "the peer that is known");
                options.peer = true;
            }
            other => panic!("unknown: {other}"),
        }
    }
    options
}

fn main() {
    // It removes targets and pods of these names: nobody else's.
    if !Path::new("/opt/lab/target").exists() {
        eprintln!("this is not the lab's node: hack/bench --only lab runs it there");
        return;
    }
    let options = options();
    let mut contenders = Contenders::set_up(options.peer);
    let wanted = |case: &&Case| {
        options.only.as_ref().is_none_or(|only| case.name.contains(only))
            && !options.without.as_ref().is_some_and(|without| case.name.contains(without))
    };
    let cases: Vec<&Case> = cases::CASES.iter().filter(wanted).collect();
    let mut drift = vec![contenders.reference()];
    for (number, case) in cases.iter().enumerate() {
        let mut measured = contenders.measure(case, options.repetitions);
        if options.syscalls && case.at_once == 1 {
            contenders.count_syscalls(case, &mut measured);
        }
        report::tell(&measured);
        if number == cases.len() / 2 {
            drift.push(contenders.reference());
        }
    }
    drift.push(contenders.reference());
    report::tell_of_run(&drift, &Contenders::two_fsyncs());
}

fn timed<R>(work: impl FnOnce() -> R) -> (Duration, R) {
    let begin = Instant::now();
    let result = work();
    (begin.elapsed(), result)
}
