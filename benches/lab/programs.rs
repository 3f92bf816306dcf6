//! What a process makes the kernel do: the programs that it and its descendants execute, and its system calls.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const TRACING: &str = "/sys/kernel/tracing";

/// Counts until it is dropped. Slows down what is counted, so nothing is timed meanwhile.
pub struct Programs(PathBuf);

impl Programs {
    pub fn of(pid: u32) -> Self {
        let root = Path::new(TRACING).to_owned();
        crate::node::sh(&format!("mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}"));
        // Every thread may be the one that forks.
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let tasks = tasks.map(|t| t.unwrap().file_name().into_string().unwrap());
        let programs = Self(root);
        programs.set("options/event-fork", "1");
        programs.set("set_event_pid", &tasks.collect::<Vec<_>>().join(" "));
        programs.set("trace", "");
        programs.set("events/sched/sched_process_exec/enable", "1");
        programs
    }

    pub fn so_far(&self) -> usize {
        let trace = fs::read_to_string(self.0.join("trace")).unwrap();
        trace.lines().filter(|l| !l.starts_with('#') && l.contains("filename=")).count()
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap();
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        self.set("events/sched/sched_process_exec/enable", "0");
        self.set("options/event-fork", "0");
        self.set("set_event_pid", "");
    }
}

/// Counts a process's system calls. Slows it down many times.
pub struct Syscalls(Child);

impl Syscalls {
    pub fn of(pid: u32) -> Self {
        let arguments = ["-f", "-c", "-p", &pid.to_string()];
        let mut strace =
            Command::new("strace").args(arguments).stderr(Stdio::piped()).spawn().unwrap();
        // Its first line says that it has attached.
        let stderr = strace.stderr.as_mut().unwrap();
        let mut first = [0];
        std::io::Read::read_exact(stderr, &mut first).unwrap();
        Self(strace)
    }

    /// So many, all kinds together.
    pub fn end(mut self) -> u64 {
        crate::node::sh(&format!("kill -INT {}", self.0.id()));
        let lines = BufReader::new(self.0.stderr.take().unwrap()).lines();
        let table: Vec<String> = lines.map(|line| line.unwrap()).collect();
        self.0.wait().unwrap();
        let total = table.iter().find(|line| line.ends_with(" total")).expect("strace's table");
        total.split_whitespace().nth(3).unwrap().parse().unwrap()
    }
}
