//! `kill -9` right before and right after every step, and each time what was asked for comes about.

use std::fs;
use std::time::Duration;

use lunplug::step::{KillPoint, Way};

use crate::node::{
    Lab, Lun, Story, VM, add, guest_disk, guest_has, in_guest, lunplug, nightly, remove, sh, until,
    volume,
};

const LONG: Duration = Duration::from_secs(60);

/// Where the daemon of this build looks for the point at which it is to kill itself.
const KILL_AT: &str = "/run/lunplugd-kill-at";
const DROP_IN: &str = "/run/systemd/system/lunplugd.service.d/kill.conf";

/// A daemon that can be killed at points, until the test ends.
pub struct Killable {
    comes_back: bool,
}

impl Killable {
    /// It is started again at once.
    pub fn begin() -> Self {
        Self::with("RestartSec=100ms", true)
    }

    /// It stays dead.
    pub fn for_good() -> Self {
        Self::with("Restart=no", false)
    }

    fn with(restart: &str, comes_back: bool) -> Self {
        let unit = format!(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nEnvironment=LUNPLUGD_KILL_AT={KILL_AT}\n{restart}\n"
        );
        fs::create_dir_all(DROP_IN.trim_end_matches("/kill.conf")).expect("/run is writable");
        fs::write(DROP_IN, unit).expect("/run is writable");
        sh("systemctl daemon-reload; systemctl restart lunplugd").ok();
        Self { comes_back }
    }

    /// Makes a request of which the daemon dies at `point`; returns when its successor, if there is
    /// to be one, serves.
    pub fn dies_at(&self, point: KillPoint, request: &[&str]) {
        fs::write(KILL_AT, point.to_string()).expect("/run is writable");
        lunplug(request);
        // The point is struck from the file before the end.
        until(&format!("killed {point}"), LONG, || fs::metadata(KILL_AT).is_err());
        if self.comes_back {
            until("its successor serves", LONG, || lunplug(&["list"]).code == 0);
        }
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        let _ = fs::remove_file(KILL_AT);
        let _ = fs::remove_file(DROP_IN);
        sh("systemctl daemon-reload; systemctl restart lunplugd");
    }
}

/// Whether the daemon knows the volume.
fn is_known(name: &str) -> bool {
    lunplug(&["describe", VM, name]).code == 0
}

/// Every point in the nightly run, every fifth one else: all of them are tried on the simulated host
/// each time.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_kill_on_either_side_of_every_step_is_survived() {
    Lab::get();
    let (lun, other) = (Lun::new("data", 1, "16M"), Lun::new("beside", 9, "16M"));
    let daemon = Killable::begin();
    let clean = Story::begin();
    // By one portal, so that the other's record, login and logout belong to the volume.
    let beside = other.source().replace(",127.0.0.3:3260", "");
    add("beside", &beside, &[]).ok();
    let reads = format!(
        "dd if=/dev/{} of=/dev/null bs=64k count=1 iflag=direct",
        guest_disk("beside").name
    );
    let story = Story::begin();
    // An identity that is known is not remembered anew, unless another would be taken.
    let source = lun.source();
    let named = ["addvolume", VM, "--volume-name", "data", "--source", &source];
    let wanted = [&named[..], &["--accept-new-identity", "--no-wait"]].concat();
    let unwanted = ["removevolume", VM, "--volume-name", "data", "--no-wait"];
    let every = if nightly() { 1 } else { 5 };
    let mut detach = KillPoint::of(Way::Detach).step_by(every);
    let mut attach = KillPoint::of(Way::Attach).step_by(every);
    loop {
        let (to, back) = (attach.next(), detach.next());
        if to.is_none() && back.is_none() {
            break;
        }
        match to {
            None => drop(add("data", &lun.source(), &[]).ok()),
            Some(point) => {
                daemon.dies_at(point, &wanted);
                if !is_known("data") {
                    assert_eq!(point.to_string(), "before intent");
                    lunplug(&wanted).ok();
                }
                until(&format!("ready, killed {point}"), LONG, || {
                    volume("data")["phase"] == "Ready"
                });
            }
        }
        assert_eq!(guest_disk("data").bytes, 16 << 20, "killed {to:?}");
        match back {
            None => drop(remove("data", &[]).ok()),
            Some(point) => {
                daemon.dies_at(point, &unwanted);
                if point.to_string() == "before removal" {
                    lunplug(&unwanted).ok();
                }
                until(&format!("gone, killed {point}"), LONG, || !is_known("data"));
            }
        }
        story.nothing_left();
        in_guest(&reads).ok();
    }
    remove("beside", &[]).ok();
    guest_has(0);
    clean.nothing_left();
}
