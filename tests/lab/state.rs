//! Stores that cannot be written or are damaged, two sidecars on one target, a device that somebody does
//! not let go of, and a clock that jumps.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::agent;
use crate::node::{
    DOMAIN, Lab, Lun, Ran, Story, VM, add, guest_disk, guest_has, in_guest, lunplug, refused,
    remove, run, sh, until, volume,
};

const DB: &str = "/var/lib/lunplug/lunplug.db";

/// The state on a small filesystem of its own, in the place of the real one; the daemon is down while
/// it is put there and taken away.
struct SmallState;

impl SmallState {
    fn mount() -> Self {
        let state = Self;
        sh("daemon stop; cp -a /var/lib/lunplug /tmp/state-kept").ok();
        sh("mount -t tmpfs -o size=512k,mode=0700 state /var/lib/lunplug").ok();
        sh("cp -a /tmp/state-kept/. /var/lib/lunplug/ && systemctl start lunplugd").ok();
        state
    }
}

impl Drop for SmallState {
    fn drop(&mut self) {
        sh("systemctl stop lunplugd");
        sh("mount -o remount,rw /var/lib/lunplug; rm -f /var/lib/lunplug/filler");
        sh("rm -rf /tmp/state-kept; cp -a /var/lib/lunplug /tmp/state-kept");
        sh("umount -l /var/lib/lunplug; cp -a /tmp/state-kept/. /var/lib/lunplug/");
        sh("rm -rf /tmp/state-kept; systemctl start lunplugd");
    }
}

fn told(args: &[&str]) -> Value {
    let json = lunplug(args).ok();
    serde_json::from_str(&json).unwrap_or_else(|e| panic!("{args:?} printed no JSON ({e}): {json}"))
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_state_without_room_is_served_and_becomes_whole() {
    Lab::get();
    let luns = [Lun::new("room1", 1, "16M"), Lun::new("room2", 2, "16M")];
    let story = Story::begin();
    add("kept", &luns[0].source(), &[]).ok();
    let state = SmallState::mount();
    sh("head -c 1M /dev/zero >/var/lib/lunplug/filler").fails();
    let more = ["addvolume", VM, "--volume-name", "room2", "--source", &luns[1].source()];
    // First full, as it runs; then it has to start so.
    refused(lunplug(&more), "STATE_STORE_FAILED");
    // What a stop may have left free is filled too.
    sh("systemctl stop lunplugd").ok();
    sh("head -c 1M /dev/zero >>/var/lib/lunplug/filler").fails();
    sh("systemctl start lunplugd").ok();
    until("the volume is ready", Duration::from_secs(60), || volume("kept")["phase"] == "Ready");
    sh("head -c 1M /dev/zero >>/var/lib/lunplug/filler").fails();
    refused(lunplug(&more), "STATE_STORE_FAILED");
    let trouble = told(&["node", "-o", "json"])["state_trouble"].to_string();
    println!("the node says: {trouble}");
    assert!(trouble.contains("cannot be written"), "{trouble}");
    refused(remove("kept", &["--timeout", "30s"]), "STATE_STORE_FAILED");
    guest_has(0);
    story.nothing_left();

    sh("rm /var/lib/lunplug/filler").ok();
    lunplug(&more).ok();
    until("the removal is struck out", Duration::from_secs(90), || {
        !lunplug(&["list"]).stdout.contains("kept")
    });
    assert_eq!(told(&["node", "-o", "json"])["state_trouble"], "");

    // And read-only from the start.
    sh("systemctl stop lunplugd; mount -o remount,ro /var/lib/lunplug; systemctl start lunplugd")
        .ok();
    let again = ["addvolume", VM, "--volume-name", "again", "--source", &luns[0].source()];
    refused(lunplug(&again), "STATE_STORE_FAILED");
    refused(remove("room2", &["--timeout", "20s"]), "STATE_STORE_FAILED");
    story.nothing_left();
    let dump = lunplug(&["journal", "dump"]).ok();
    assert!(dump.contains("removals/default/vm/room2.json"), "{dump}");
    println!("{dump}{}", lunplug(&["journal", "verify"]).ok());
    // The unit has its own mount namespace, in which a mount that was read-only stays so.
    sh("mount -o remount,rw /var/lib/lunplug; systemctl restart lunplugd").ok();
    until("the removal is struck out", Duration::from_secs(90), || {
        !lunplug(&["list"]).stdout.contains("room2")
    });
    drop(state);
    assert_eq!(lunplug(&["journal", "verify"]).ok().trim(), "no problems found");
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_damaged_or_newer_database_is_refused_by_name_and_left() {
    Lab::get();
    sh(&format!("daemon stop; ! test -e {DB}-wal && cp -a {DB} /tmp/db-kept")).ok();
    let ran: Vec<(&str, Ran, Ran, bool)> = [
        (": >", "damaged"),
        ("head -c 5000 /tmp/db-kept >", "damaged"),
        ("head -c 20000 /dev/urandom >", "damaged"),
        // The schema's number lies at byte 60 (SQLite's file format, user_version).
        ("printf '\\0\\0\\0\\143' | dd conv=notrunc bs=1 seek=60 status=none of=", "schema 99"),
    ]
    .into_iter()
    .map(|(damage, words)| {
        sh(&format!("cp -a /tmp/db-kept {DB}; {damage}{DB}; cp {DB} /tmp/db-before")).ok();
        let daemon = sh("timeout 30 lunplugd");
        let verify = lunplug(&["journal", "verify"]);
        (words, daemon, verify, sh(&format!("cmp {DB} /tmp/db-before")).code == 0)
    })
    .collect();
    sh(&format!(
        "cp -a /tmp/db-kept {DB}; rm /tmp/db-kept /tmp/db-before; systemctl start lunplugd"
    ))
    .ok();
    for (words, daemon, verify, same) in ran {
        assert!(daemon.code == 1 && daemon.stderr.contains(DB), "{daemon:?}");
        assert!(daemon.stderr.contains(words), "{words}: {daemon:?}");
        assert!(verify.code == 9 && verify.stdout.contains(DB), "{verify:?}");
        assert!(same, "{words}: the database was changed");
    }
}

/// A sidecar's lunplugd, and its CLI.
struct Sidecar {
    vm: &'static str,
}

impl Sidecar {
    fn start(vm: &'static str, uid: &str, domain: &str) -> Self {
        let sidecar = Self { vm };
        // The agent's deadline is that of the node's daemon (hack/lab/in-node/daemon).
        sh(&format!(
            "systemd-run --quiet --collect --unit=sidecar-{vm} -p Type=notify -p KillMode=process \
             -E LUNPLUG_DEADLINES_AGENT=30s lunplugd --vm default/{vm}"
        ))
        .ok();
        sidecar.ask(&["vm", "register", vm, "--pod-uid", uid, "--domain", domain]).ok();
        sidecar
    }

    fn ask(&self, args: &[&str]) -> Ran {
        let socket = format!("/run/lunplug/default_{}.sock", self.vm);
        run("lunplug", &[&["--socket", &socket], args].concat())
    }

    fn add(&self, name: &str, source: &str) {
        let add = ["addvolume", self.vm, "--volume-name", name, "--source", source];
        self.ask(&[&add[..], &["--timeout", "120s"]].concat()).ok();
    }

    fn remove(&self, name: &str) {
        let remove = ["removevolume", self.vm, "--volume-name", name, "--timeout", "120s"];
        self.ask(&remove).ok();
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let vm = self.vm;
        if std::thread::panicking() {
            println!("{}", sh(&format!("journalctl -u sidecar-{vm} -n 15 -o cat")).stdout);
            // The guest tells when its agent ends.
            println!("{}", run("guest", &["console", vm, &format!("default_{vm}")]).stdout);
            let listed = self.ask(&["list", "-o", "json"]).stdout;
            let volumes: Vec<Value> = serde_json::from_str(&listed).unwrap_or_default();
            for name in volumes.iter().filter_map(|v| v["name"].as_str()) {
                self.ask(&["removevolume", vm, "--volume-name", name, "--force"]);
            }
        }
        sh(&format!("systemctl stop sidecar-{vm}; rm -f /var/lib/lunplug/default_{vm}.db*"));
    }
}

fn sessions() -> usize {
    sh("iscsiadm -m session 2>/dev/null || true").stdout.lines().count()
}

/// Starts the daemon again whatever becomes of the story.
struct DaemonDown;

impl DaemonDown {
    fn now() -> Self {
        sh("daemon stop").ok();
        Self
    }
}

impl Drop for DaemonDown {
    fn drop(&mut self) {
        sh("pod down second");
        sh("systemctl start lunplugd");
    }
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn two_sidecars_share_one_target() {
    let lab = Lab::get();
    let luns: Vec<_> = (1..=4).map(|n| Lun::new(&format!("shared{n}"), n, "16M")).collect();
    let story = Story::begin();
    sh("pod up second && guest up second default_second").ok();
    let down = DaemonDown::now();
    let uid = sh("pod info second | jq -r .uid").ok();
    let one = Sidecar::start(VM, lab.uid(), DOMAIN);
    let two = Sidecar::start("second", uid.trim(), "default_second");
    let work = |sidecar: &Sidecar, luns: &[Lun]| {
        for _ in 0..2 {
            sidecar.add("a", &luns[0].source());
            sidecar.add("b", &luns[1].source());
            sidecar.remove("a");
            sidecar.remove("b");
        }
        sidecar.add("last", &luns[0].source());
    };
    std::thread::scope(|scope| {
        scope.spawn(|| work(&one, &luns[..2]));
        scope.spawn(|| work(&two, &luns[2..]));
    });
    assert_eq!(sessions(), 2, "one a portal");
    let verify = |vm: &str| lunplug(&["journal", "verify", "--vm", &format!("default/{vm}")]).ok();
    println!("{}{}", verify(VM), verify("second"));
    // The same LUN is not given away twice, whoever asks.
    let same = ["addvolume", "second", "--volume-name", "same", "--source", &luns[0].source()];
    refused(two.ask(&same), "SOURCE_IN_USE");
    one.remove("last");
    assert_eq!(sessions(), 2, "the other sidecar needs them");
    let dead = ["dd", "if=/dev/sda", "of=/dev/null", "bs=64k", "count=1", "iflag=direct"];
    agent::exec("second", "default_second", &dead.join(" ")).ok();
    two.remove("last");
    assert_eq!(sessions(), 0);
    drop((one, two));
    drop(down);
    story.nothing_left();
}

/// Somebody who has a device open, and reads from it when told to.
struct Holder(Child);

impl Holder {
    fn open(dev: &str) -> Self {
        sh("rm -f /tmp/held.*").ok();
        let script = format!(
            "exec 7</dev/block/{dev}; touch /tmp/held.open
             until [ -e /tmp/held.read ]; do sleep 0.1; done
             dd bs=4k count=1 iflag=direct <&7 >/dev/null 2>&1; echo $? >/tmp/held.code; sleep 1000"
        );
        let mut bash = Command::new("bash");
        let child = bash.args(["-c", &script]).stdin(Stdio::null()).spawn().expect("bash runs");
        until("the device is open", Duration::from_secs(10), || {
            sh("test -e /tmp/held.open").code == 0
        });
        Self(child)
    }

    /// The exit code of its read.
    fn read(&self) -> String {
        sh("touch /tmp/held.read").ok();
        until("it has read", Duration::from_secs(60), || sh("test -s /tmp/held.code").code == 0);
        sh("cat /tmp/held.code").ok().trim().to_owned()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Its sleep has the device open too.
        sh(&format!("pkill -P {}", self.0.id()));
        let _ = self.0.kill();
        let _ = self.0.wait();
        sh("rm -f /tmp/held.*");
    }
}

/// The wall clock, put right again in the end. What goes by it is kept from noticing.
struct Clock(SystemTime, Instant);

impl Clock {
    fn begin() -> Self {
        sh("systemctl stop '*.timer'").ok();
        Self(SystemTime::now(), Instant::now())
    }

    fn jump(&self, years: &str) {
        sh(&format!("date -s '{years} years'")).ok();
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let right = self.0 + self.1.elapsed();
        let since = right.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        sh(&format!("date -s @{:.3}; systemctl start timers.target", since.as_secs_f64()));
    }
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_single_path_that_is_held_is_silenced_whatever_the_clock_does() {
    Lab::get();
    let (lun, other) = (Lun::new("held", 5, "16M"), Lun::new("other", 6, "16M"));
    let story = Story::begin();
    add("held", &lun.source(), &["--multipath", "off"]).ok();
    add("other", &other.source(), &["--multipath", "off"]).ok();
    let dev = volume("held")["device"]["dev"].as_str().expect("a device").to_owned();
    let holder = Holder::open(&dev);
    refused(remove("held", &["--force", "--timeout", "60s"]), "DEVICE_HELD");
    let told = volume("held");
    assert!(told["trouble"]["message"].to_string().contains("bash["), "{told}");
    let state = format!("/sys/dev/block/{dev}/device/state");
    assert_eq!(sh(&format!("cat {state}")).ok().trim(), "offline");
    assert_eq!(holder.read(), "1", "the holder still reads the LUN");
    let disk = guest_disk("other");
    let read = format!("dd if=/dev/{} of=/dev/null bs=64k count=1 iflag=direct", disk.name);
    in_guest(&read).ok();

    let clock = Clock::begin();
    for years in ["-5", "+15"] {
        clock.jump(years);
        assert_eq!(volume("held")["trouble"]["reason"], "DEVICE_HELD");
        println!("the clock {years} years: next try {}", volume("held")["trouble"]["retry_at"]);
    }
    drop(holder);
    until("it is gone", Duration::from_secs(90), || !lunplug(&["list"]).stdout.contains(" held "));
    drop(clock);
    in_guest(&read).ok();
    remove("other", &[]).ok();
    story.nothing_left();
}
