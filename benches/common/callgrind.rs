//! Instructions that a run of this program takes, as callgrind counts them.

use std::collections::HashMap;
use std::process::{Command, Stdio};

/// What callgrind wrote.
pub struct Profile {
    /// Function, and instructions of its own.
    alone: HashMap<String, u64>,
    /// Caller, callee, instructions of the callee with all that it called.
    calls: HashMap<(String, String), u64>,
}

impl Profile {
    /// Runs this program under callgrind, which counts only what is done within a function whose name
    /// contains `within`, on the thread that calls it. `None` where valgrind is not installed.
    pub fn of(arguments: &[&str], environment: &[(&str, &str)], within: &str) -> Option<Self> {
        let out = tempfile::NamedTempFile::new().unwrap();
        let ran = Command::new("valgrind")
            .args(["--tool=callgrind", "--instr-atstart=no"])
            .arg(format!("--callgrind-out-file={}", out.path().display()))
            .arg(format!("--toggle-collect=*{within}*"))
            .arg(std::env::current_exe().unwrap())
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .output();
        let ran = match ran {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            ran => ran.unwrap(),
        };
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        Some(Self::read(&std::fs::read_to_string(out.path()).unwrap()))
    }

    /// Reads the file's format (valgrind's manual, "Callgrind Format Specification"): a name comes with a
    /// number once, and is the number from then on.
    fn read(text: &str) -> Self {
        let mut names: HashMap<String, String> = HashMap::new();
        let mut name = |entry: &str| -> String {
            match entry.split_once(' ') {
                Some((number, name)) => {
                    names.insert(number.into(), name.into());
                    name.into()
                }
                None => names[entry].clone(),
            }
        };
        let (mut caller, mut callee) = (String::new(), String::new());
        let (mut alone, mut calls) = (HashMap::new(), HashMap::new());
        let mut is_call = false;
        for line in text.lines() {
            if let Some(entry) = line.strip_prefix("fn=") {
                caller = name(entry);
            } else if let Some(entry) = line.strip_prefix("cfn=") {
                callee = name(entry);
            } else if line.starts_with("calls=") {
                is_call = true;
            } else if line.starts_with(|c: char| c.is_ascii_digit() || "+-*".contains(c)) {
                // The position, which may be relative to the one before, and the cost.
                let cost = line.rsplit_once(' ').and_then(|(_, n)| n.parse().ok()).unwrap_or(0);
                if std::mem::take(&mut is_call) {
                    *calls.entry((caller.clone(), callee.clone())).or_default() += cost;
                } else {
                    *alone.entry(caller.clone()).or_default() += cost;
                }
            }
        }
        Self { alone, calls }
    }

    /// From here on the process that calls this is counted, if it runs under callgrind: what it has prepared
    /// before is run at a tenth of the cost.
    pub fn begin() {
        let control = Command::new("callgrind_control")
            .args(["--instr=on", &std::process::id().to_string()])
            .stdout(Stdio::null())
            .status();
        assert!(control.is_ok_and(|status| status.success()), "callgrind_control failed");
    }

    /// Instructions within functions whose name contains `name`, called from others.
    pub fn entered(&self, name: &str) -> u64 {
        let enters = |((caller, callee), _): &(&(String, String), &u64)| {
            !caller.contains(name) && callee.contains(name)
        };
        self.calls.iter().filter(enters).map(|(_, cost)| cost).sum()
    }

    /// All instructions but those of functions whose name contains `foreign`, and of what these call; what they
    /// call whose name contains `back` counts again. A function that several call is shared out by what
    /// their calls cost, as gprof does it.
    pub fn without(&self, foreign: &str, back: &str) -> u64 {
        let mut callers: HashMap<&str, Vec<(&str, u64)>> = HashMap::new();
        for ((caller, callee), cost) in self.calls.iter().filter(|(call, _)| call.0 != call.1) {
            callers.entry(callee).or_default().push((caller, *cost));
        }
        // The share of each function that is foreign; recursion makes this an equation to be approached.
        let mut shares: HashMap<&str, f64> = HashMap::new();
        let mut moved = 1.0;
        while moved > 1e-9 {
            moved = 0.0_f64;
            for (callee, calls) in &callers {
                let all: u64 = calls.iter().map(|(_, cost)| cost).sum();
                let part = |(caller, cost): &(&str, u64)| {
                    let share = match caller.contains(foreign) {
                        true if callee.contains(back) => 0.0,
                        true => 1.0,
                        false => shares.get(caller).copied().unwrap_or_default(),
                    };
                    share * *cost as f64
                };
                let share = match callee.contains(foreign) {
                    true => 1.0,
                    false if all == 0 => 0.0,
                    false => calls.iter().map(part).sum::<f64>() / all as f64,
                };
                let before = shares.insert(callee, share).unwrap_or_default();
                moved = moved.max((share - before).abs());
            }
        }
        let own = |(function, cost): (&String, &u64)| {
            let share = shares.get(function.as_str()).copied().unwrap_or_default();
            *cost as f64 * (1.0 - share)
        };
        self.alone.iter().map(own).sum::<f64>().round() as u64
    }
}
