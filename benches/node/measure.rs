//! The daemon as a process, and what the kernel says of it.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

pub const MIB: f64 = 1024.0 * 1024.0;

/// The daemon's process.
pub struct Daemon {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Daemon {
    /// Starts it; returns when it serves.
    pub fn start(dir: &Path, vms: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("--serve")
            .arg(dir)
            .args(["--vms", &vms.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut daemon = Self { child, input, output };
        daemon.numbers();
        daemon
    }

    fn numbers(&mut self) -> Vec<f64> {
        let line = self.output.next().expect("the daemon runs").unwrap();
        line.split_whitespace().map(|number| number.parse().unwrap()).collect()
    }

    /// Tells it something; returns its answer.
    pub fn tell(&mut self, what: &str) -> Vec<f64> {
        writeln!(self.input, "{what}").unwrap();
        self.numbers()
    }

    pub fn quit(mut self) {
        writeln!(self.input, "quit").unwrap();
        self.child.wait().unwrap();
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }

    fn status(&self, field: &str) -> f64 {
        let status = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap();
        let kib: f64 = line.trim_matches([':', ' ', '\t', 'k', 'B']).parse().unwrap();
        kib * 1024.0
    }

    /// Bytes of memory that it has now.
    pub fn rss(&self) -> f64 {
        self.status("VmRSS")
    }

    /// The most that it had since [`Self::forget_peak`].
    pub fn peak_rss(&self) -> f64 {
        self.status("VmHWM")
    }

    /// proc_pid_clear_refs(5): 5 resets the peak.
    pub fn forget_peak(&self) {
        std::fs::write(self.proc("clear_refs"), "5").unwrap();
    }

    /// CPU time that it has used, of all its threads, ended ones too (proc_pid_stat(5), fields 14 and 15).
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(self.proc("stat")).unwrap();
        let (_, after_name) = stat.rsplit_once(") ").unwrap();
        let ticks = after_name.split(' ').skip(11).take(2).map(|n| n.parse::<u32>().unwrap());
        let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).unwrap().unwrap();
        Duration::from_secs(ticks.sum::<u32>().into()) / u32::try_from(a_second).unwrap()
    }
}
