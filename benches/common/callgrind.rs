//! Instructions that a run of this program takes, as callgrind counts them.

use std::collections::HashMap;
use std::process::{Command, Stdio};

/// What callgrind wrote: each function's calls of others, with what these cost.
pub struct Profile {
    /// Caller, callee, instructions of the callee with all that it called.
    calls: Vec<(String, String, u64)>,
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
        let (mut calls, mut is_call) = (Vec::new(), false);
        for line in text.lines() {
            if let Some(entry) = line.strip_prefix("fn=") {
                caller = name(entry);
            } else if let Some(entry) = line.strip_prefix("cfn=") {
                callee = name(entry);
            } else if line.starts_with("calls=") {
                is_call = true;
            } else if std::mem::take(&mut is_call) {
                let cost = line.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
                calls.push((caller.clone(), callee.clone(), cost));
            }
        }
        Self { calls }
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
        self.entered_but_from(name, None)
    }

    /// The same, without calls from functions whose name contains `but`.
    pub fn entered_but_from(&self, name: &str, but: Option<&str>) -> u64 {
        let from =
            |caller: &str| !caller.contains(name) && but.is_none_or(|but| !caller.contains(but));
        let enters = |call: &&(String, String, u64)| from(&call.0) && call.1.contains(name);
        self.calls.iter().filter(enters).map(|call| call.2).sum()
    }
}
