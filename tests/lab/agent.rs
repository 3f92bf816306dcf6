//! The guest, by way of its agent: commands in it, and the disks that it sees.
//!
//! What `guest exec` and `guest disks` do, without the dozen programs that these start: under emulation
//! each of them counts.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use virt::connect::Connect;
use virt::domain::Domain;

use crate::node::{Ran, run, until};

/// How long a command in the guest may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// How long an agent that is away may take to come back: the guest's init starts it again.
const BACK: Duration = Duration::from_secs(30);

/// How long libvirt itself waits for one answer of the agent, in seconds.
const ANSWER: i32 = 10;

/// One line a disk: name, size in bytes, and the serial as the guest's kernel has it: for sdX from the
/// unit serial number page (0x80), which is 4 bytes of header and then the serial. A disk that goes in
/// this very moment has no size any more.
const DISKS: &str = r#"for disk in /sys/block/sd* /sys/block/vd*; do
    [ -e "$disk" ] || continue
    case ${disk##*/} in
      sd*) serial=$(tail -c +5 "$disk/device/vpd_pg80" 2>/dev/null | tr -d "\0") ;;
      vd*) serial=$(cat "$disk/serial" 2>/dev/null) ;;
    esac
    size=$(cat "$disk/size" 2>/dev/null) || continue
    echo "${disk##*/} $((size * 512)) $serial"
  done"#;

/// Runs a line of shell in a pod's guest.
pub fn exec(pod: &str, domain: &str, line: &str) -> Ran {
    // A libvirt that hangs must not hang the story.
    let (done, answer) = mpsc::channel();
    let words = (pod.to_owned(), domain.to_owned(), line.to_owned());
    std::thread::spawn(move || done.send(talk(&words.0, &words.1, &words.2)));
    match answer.recv_timeout(DEADLINE * 2) {
        Ok(Ok(ran)) => ran,
        Ok(Err(why)) => Ran { code: 1, stdout: String::new(), stderr: why },
        Err(_) => Ran { code: 124, stdout: String::new(), stderr: "libvirt hangs".into() },
    }
}

/// The disks of a pod's guest: lines of name, size in bytes and serial.
#[track_caller]
pub fn disks(pod: &str, domain: &str) -> String {
    exec(pod, domain, DISKS).ok()
}

/// Waits until a pod's guest has a disk of that size and serial: its kernel comes to it some time after
/// QEMU.
#[track_caller]
pub fn has(pod: &str, domain: &str, disk: &str) {
    let what = format!("the guest {domain} has a disk {disk}");
    until(&what, Duration::from_secs(30), || disks(pod, domain).contains(disk));
}

fn talk(pod: &str, domain: &str, line: &str) -> Result<Ran, String> {
    let info = run("pod", &["info", pod]).stdout;
    let info: Value = serde_json::from_str(&info).map_err(|e| format!("pod info {pod}: {e}"))?;
    let uri = info["libvirt_uri"].as_str().ok_or("pod info has no libvirt_uri")?;
    // Errors are returned; libvirt would print them as well.
    virt::error::clear_error_callback();
    let connection = Connect::open(Some(uri)).map_err(|e| e.to_string())?;
    let found = connection.lookup_domain_by_name(domain).map_err(|e| e.to_string())?;
    in_guest(&found, line)
}

fn in_guest(domain: &Domain, line: &str) -> Result<Ran, String> {
    let began = Instant::now();
    let arguments = json!({"path": "/bin/sh", "arg": ["-c", line], "capture-output": true});
    let start = json!({"execute": "guest-exec", "arguments": arguments});
    let started = loop {
        match ask(domain, &start) {
            // Nothing was sent, so it can be asked again.
            Err(why) if why.contains("agent is not connected") && began.elapsed() < BACK => {
                std::thread::sleep(Duration::from_millis(100));
            }
            answer => break answer?,
        }
    };
    let status = json!({"execute": "guest-exec-status", "arguments": {"pid": started["pid"]}});
    loop {
        let told = ask(domain, &status)?;
        if told["exited"] == true {
            let code = told["exitcode"].as_i64().or(told["signal"].as_i64().map(|s| 128 + s));
            return Ok(Ran {
                code: code.and_then(|c| c.try_into().ok()).unwrap_or(-1),
                stdout: text(&told["out-data"]),
                stderr: text(&told["err-data"]),
            });
        }
        if began.elapsed() > DEADLINE {
            return Err(format!("not done within {DEADLINE:?}: {line}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One command of the agent; its `return`.
fn ask(domain: &Domain, request: &Value) -> Result<Value, String> {
    let answer = domain
        .qemu_agent_command(&request.to_string(), ANSWER, 0)
        .map_err(|e| format!("{}: {e}", request["execute"]))?;
    let mut answer: Value = serde_json::from_str(&answer).map_err(|e| format!("{e}: {answer}"))?;
    match answer["error"].take() {
        Value::Null => Ok(answer["return"].take()),
        error => Err(format!("{}: {error}", request["execute"])),
    }
}

fn text(data: &Value) -> String {
    let bytes = BASE64_STANDARD.decode(data.as_str().unwrap_or_default()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}
