//! CHAP against the kernel's own target, and where the secrets can be seen.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;

use crate::node::{
    Configured, Lab, Ran, Story, VM, lunplug, refused, remove, run, sh, until, volume,
};
use crate::san::SOON;

/// A target that demands credentials, beside the lab's own.
const IQN: &str = "iqn.2026-01.org.lunplug:chap";
const SECRET: &str = "hush-node-secret-1";
const BACK: &str = "hush-array-secret-2";
const FILE: &str = "/run/lab-chap.yaml";
const SECRETS: &str = "/etc/lunplug/secrets";

/// The target, until the story ends.
struct Target;

impl Target {
    #[track_caller]
    fn up() -> Self {
        sh(&format!(
            "target up --iqn {IQN}; target lun rm chap1 2>/dev/null || true
             target lun rm chap2 2>/dev/null || true
             target lun add chap1 1 16M --iqn {IQN}; target lun add chap2 2 16M --iqn {IQN}"
        ))
        .ok();
        Self
    }

    /// Exchanges what it demands. Secrets go in by files, or this test's own would be seen in /proc.
    #[track_caller]
    fn demands(&self, mutual: bool) {
        let tpg = format!("/sys/kernel/config/target/iscsi/{IQN}/tpgt_1");
        let back = if mutual { ["array", BACK] } else { ["NULL", "NULL"] };
        let values = [
            ("userid", "node"),
            ("password", SECRET),
            ("userid_mutual", back[0]),
            ("password_mutual", back[1]),
        ];
        for (file, value) in values {
            write(&format!("{tpg}/auth/{file}"), value);
        }
        write(&format!("{tpg}/attrib/authentication"), "1");
    }

    /// Lets anybody in.
    #[track_caller]
    fn opens(&self) {
        sh(&format!("target auth off --iqn {IQN}")).ok();
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        sh(&format!("rm -rf {FILE} {SECRETS}; target down --iqn {IQN}"));
    }
}

#[track_caller]
pub fn write(path: &str, text: &str) {
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    // In one write, without a line's end: configfs takes each write for a value, with all that is in it.
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.unwrap_or_else(|e| panic!("{path}: {e}"));
}

fn source(number: u16) -> String {
    format!("iscsi://127.0.0.2,127.0.0.3/{IQN}/{number}")
}

/// Adds a volume with credentials out of a file.
#[track_caller]
fn add_with(name: &str, number: u16, credentials: &[(&str, &str)]) -> Ran {
    let lines: Vec<String> = credentials.iter().map(|(k, v)| format!("{k}: \"{v}\"")).collect();
    write(FILE, &lines.join("\n"));
    let source = source(number);
    let args = ["addvolume", VM, "--volume-name", name, "--source", &source, "--chap-file", FILE];
    lunplug(&[&args[..], &["--timeout", "60s"]].concat())
}

/// Looks at every process's arguments again and again while `work` is done; how many calls of iscsiadm
/// were seen.
pub fn watched<T>(work: impl FnOnce() -> T) -> (T, usize) {
    use std::sync::atomic::{AtomicBool, Ordering};
    static STOP: AtomicBool = AtomicBool::new(false);
    STOP.store(false, Ordering::Relaxed);
    let sampler = std::thread::spawn(|| {
        let mut iscsiadm = std::collections::BTreeSet::new();
        while !STOP.load(Ordering::Relaxed) {
            for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
                let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
                let line = String::from_utf8_lossy(&read("cmdline")).into_owned();
                assert!(!line.contains("hush-"), "{line:?}");
                if line.contains("iscsiadm") {
                    let environment = String::from_utf8_lossy(&read("environ")).into_owned();
                    assert!(!environment.contains("hush-"), "{environment:?}");
                    iscsiadm.insert((entry.file_name(), line));
                }
            }
            // A call of iscsiadm takes many times as long; without it, it would take even longer.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        iscsiadm.len()
    });
    let done = work();
    STOP.store(true, Ordering::Relaxed);
    (done, sampler.join().expect("no process shows a secret"))
}

/// No secret is in a log, store, metric or answer of lunplug's.
#[track_caller]
pub fn nowhere() {
    let places = "journalctl --since=-120s -o cat -u lunplugd -u iscsid | grep -a hush- && exit 1
        grep -ra hush- /var/lib/lunplug && exit 1
        grep -ra hush- /run/lunplug --exclude-dir=secrets && exit 1
        (lunplug list -o yaml; lunplug list -o json; lunplug journal dump -o json) | grep hush- && exit 1
        exec 3<>/dev/tcp/127.0.0.1/9464; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
        metrics=$(cat <&3); [[ $metrics = *lunplug_step_seconds* ]] || { echo \"$metrics\"; exit 1; }
        [[ $metrics != *hush-* ]] || { echo metrics; exit 1; }
        exit 0";
    let found = run("bash", &["-c", places]);
    assert_eq!(found.code, 0, "{}", found.stdout);
}

/// All that lunplugd can tell is told.
pub const SHOWN: [&str; 2] = ["metrics_listen=127.0.0.1:9464", "log.level=info,lunplug=trace"];

const RIGHT: [(&str, &str); 2] = [("username", "node"), ("password", SECRET)];

#[test]
#[ignore = "runs in the lab: hack/test"]
fn credentials_log_in_and_are_seen_nowhere() {
    Lab::get();
    let _talkative = Configured::with(&SHOWN);
    let target = Target::up();
    target.demands(true);
    let story = Story::begin();

    let mutual = [
        ("username", "node"),
        ("password", SECRET),
        ("username_in", "array"),
        ("password_in", BACK),
    ];
    let (added, calls) = watched(|| add_with("chap1", 1, &mutual));
    added.ok();
    assert!(calls > 0, "not one call of iscsiadm was seen");
    assert_eq!(volume("chap1")["device"]["paths"], 2);
    let records = format!("{{/etc,/var/lib}}/iscsi/nodes/{IQN}");
    let modes = format!("find {records} /run/lunplug/secrets -type f -printf '%m ' 2>/dev/null");
    assert_eq!(run("bash", &["-c", &modes]).stdout, "600 600 600 ");
    let files = sh("grep -rlae hush- /run/lunplug").ok();
    assert_eq!(files, "/run/lunplug/secrets/default/vm/chap1.json\n");
    nowhere();

    // Who has other credentials, or none, does not come in by this session; who has the same does.
    refused(add_with("chap2", 2, &RIGHT), "CHAP_DIFFERS");
    let bare = ["addvolume", VM, "--volume-name", "chap2", "--source", &source(2)];
    refused(lunplug(&bare), "CHAP_DIFFERS");
    for (key, value) in mutual {
        sh(&format!("mkdir -p {SECRETS}/san-1")).ok();
        write(&format!("{SECRETS}/san-1/node.session.auth.{key}"), value);
    }
    lunplug(&[&bare[..], &["--chap-secret", "san-1", "--timeout", "60s"]].concat()).ok();

    // A killed daemon goes on with them.
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    until("both are ready again", SOON, || {
        ["chap1", "chap2"].iter().all(|name| volume(name)["phase"] == "Ready")
    });
    remove("chap2", &[]).ok();
    remove("chap1", &[]).ok();
    nowhere();
    assert_eq!(
        run("bash", &["-c", "grep -rl hush- /run/lunplug /etc/iscsi /var/lib/iscsi"]).stdout,
        ""
    );
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn wrong_missing_and_surplus_credentials_have_reasons_of_their_own() {
    Lab::get();
    let _talkative = Configured::with(&SHOWN);
    let target = Target::up();
    target.demands(false);
    let story = Story::begin();
    let bare = ["addvolume", VM, "--volume-name", "chap1", "--source", &source(1)];
    let wrong = [("username", "node"), ("password", "hush-something-else")];
    let mutual = [
        ("username", "node"),
        ("password", SECRET),
        ("username_in", "array"),
        ("password_in", BACK),
    ];
    let ((), _) = watched(|| {
        refused(add_with("chap1", 1, &wrong), "CHAP_REJECTED");
        refused(add_with("chap1", 1, &[("username", "nobody"), RIGHT[1]]), "CHAP_REJECTED");
        refused(add_with("chap1", 1, &mutual), "CHAP_TARGET_UNPROVEN");
        refused(lunplug(&bare), "LOGIN_REFUSED");
    });
    let none = lunplug(&[&bare[..], &["--chap-secret", "no-such"]].concat());
    refused(none, "SECRET_UNAVAILABLE");
    story.nothing_left();
    nowhere();
    target.opens();
    refused(add_with("chap1", 1, &RIGHT), "CHAP_NOT_WANTED");
    lunplug(&[&bare[..], &["--timeout", "60s"]].concat()).ok();
    // A session that was made with none is not for one that has some.
    refused(add_with("chap2", 2, &RIGHT), "CHAP_DIFFERS");
    remove("chap1", &[]).ok();
    story.nothing_left();
}
