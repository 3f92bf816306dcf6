//! os-brick, in a process of its own that imports it once (peer.py).

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::cases::{Case, Contender, Took};
use crate::node::{Lun, PORTALS};

/// The process, and the pipes to it.
pub struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    iqn: String,
    luns: Vec<Lun>,
}

impl Peer {
    pub fn start(iqn: &str, luns: Vec<Lun>) -> Self {
        let mut child = Command::new("python3")
            .arg("/opt/lunplug/peer/peer.py")
            .env("PYTHONPATH", "/opt/lunplug/peer/lib")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (requests, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let answers = BufReader::new(answers);
        let mut peer = Self { child, requests, answers, iqn: iqn.into(), luns };
        let hello = peer.answer();
        eprintln!("os-brick {}", hello["version"]);
        peer
    }

    /// All at once, each by a thread of its own.
    fn ask(&mut self, what: &str, case: &Case) -> Took {
        let luns = &self.luns[..case.at_once.into()];
        let numbers: Vec<u16> = luns.iter().map(|lun| lun.number).collect();
        let request = json!({
            "do": what, "iqn": self.iqn, "portals": PORTALS[..case.portals], "luns": numbers,
        });
        writeln!(self.requests, "{request}").unwrap();
        let took = Duration::from_secs_f64(self.answer()["seconds"].as_f64().unwrap());
        Took { host: took, whole: took }
    }

    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("peer.py said {line:?}"))
    }
}

impl Contender for Peer {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn attach(&mut self, case: &Case) -> Took {
        self.ask("attach", case)
    }

    fn detach(&mut self, case: &Case) -> Took {
        self.ask("detach", case)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
