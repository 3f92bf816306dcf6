//! Flows on the simulated SAN.

mod cost;
mod failing;
mod ifaces;
mod luns;
mod maps;
mod released;
mod targets;

mod many;

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::connector::{
    AttachRequest, Attachment, Connector, DetachOptions, Expect, Health, Settings, settings::ms,
};
use crate::connector::{Authentication, PathStatus, scsi};
use crate::host::cmd::Tool;
use crate::host::sim::{Fault, FaultAction, Faults, PortalState, SimLun, SimStorage};
use crate::host::storage::StorageDoors;
use crate::reason::Reason;
use crate::spec::IscsiSource;
use crate::spec::{MultipathPolicy, Source};
use crate::types::{Chap, Iface, Outcome, VolumeKey};
use crate::types::{Iqn, Lun, Wwid};

const GIB: u64 = 1 << 30;

struct San {
    sim: SimStorage,
    connector: Arc<Inner>,
}

fn target() -> Iqn {
    "iqn.2026-01.example.san:t1".parse().expect("iqn")
}

fn portal(n: u8) -> Portal {
    format!("127.0.0.{n}:3260").parse().expect("portal")
}

fn lun(n: u64) -> Lun {
    n.try_into().expect("lun")
}

fn wwid(n: u32) -> Wwid {
    format!("naa.6001405{n:025x}").parse().expect("wwid")
}

fn owner(volume: &str) -> VolumeKey {
    VolumeKey { vm: "ns/vm".parse().expect("vm"), volume: volume.parse().expect("volume") }
}

fn source(n: u64, portals: &[u8]) -> Source {
    let portals = portals.iter().map(|p| portal(*p)).collect();
    let (target, lun) = (target(), lun(n));
    let (more_targets, iface) = (Vec::new(), Iface::default());
    Source::Iscsi(IscsiSource { target, portals, lun, chap: None, more_targets, iface })
}

fn request(volume: &str, n: u64, portals: &[u8]) -> AttachRequest {
    AttachRequest {
        owner: owner(volume),
        source: source(n, portals),
        expect: Expect::default(),
        multipath: MultipathPolicy::Preferred,
        shareable: false,
        read_only: false,
        authentication: Authentication::None,
    }
}

fn fault(point: &str, detail: &str, action: FaultAction) -> Fault {
    Fault { point: point.into(), detail: detail.into(), skip: 0, times: None, action }
}

impl San {
    /// A target with portals .2 and .3 and LUNs 0 to 10 and 256 (`wwid(n)` each).
    fn new() -> Self {
        let sim = SimStorage::new(Arc::new(Faults::default()));
        sim.add_target(&target(), &[portal(2), portal(3)]);
        for n in (0..=10).chain([256]) {
            let what = SimLun::new(wwid(u32::try_from(n).expect("small")), GIB);
            sim.add_lun(&target(), lun(n), what);
        }
        let connector = Arc::new(Luns::new(StorageDoors::sim(&sim), Settings::default()));
        Self { sim, connector }
    }

    async fn attach(&self, request: &AttachRequest) -> Attachment {
        self.connector.attach(request).await.expect("attached").into_inner()
    }

    /// Attaches in vain: nothing may be left of it.
    async fn refused(&self, request: &AttachRequest) -> Error {
        let before = self.sim.snapshot();
        let error = self.connector.attach(request).await.expect_err("refused");
        self.connector.settled().await;
        assert_eq!(self.sim.snapshot(), before, "{error}");
        error
    }

    async fn detach(&self, volume: &str, n: u64, portals: &[u8]) -> Result<Outcome, Error> {
        let options = DetachOptions::default();
        self.connector.detach(&owner(volume), &source(n, portals), options).await
    }

    fn count(&self, kind: &str) -> usize {
        self.sim.snapshot().lines().filter(|l| l.starts_with(&format!("{kind} "))).count()
    }
}

fn chap(secret: &str) -> Chap {
    Chap::new("node".into(), secret.to_owned().into(), String::new(), String::new().into())
        .expect("credentials")
}

#[tokio::test(start_paused = true)]
async fn credentials_left_in_a_record_of_ours_are_not_used_by_who_gives_none() {
    let san = San::new();
    let one = AttachRequest {
        authentication: Authentication::Chap(chap("a secret")),
        ..request("a", 1, &[2])
    };
    san.sim.set_chap(&target(), Some(chap("a secret")));
    san.attach(&one).await;
    san.sim.set_chap(&target(), None);
    // The session goes behind lunplug's back, its record stays.
    san.sim.end_session(&target(), portal(2));
    let setting = |name| san.sim.record_setting(&target(), portal(2), name);
    assert!(setting("node.session.auth.password").is_some());
    san.attach(&request("b", 2, &[2])).await;
    assert_eq!(setting("node.session.auth.password"), None);
    assert_eq!(setting("node.session.scan").as_deref(), Some("manual"));
    san.detach("b", 2, &[2]).await.expect("detached");
    san.detach("a", 1, &[2]).await.expect("detached");
    assert_eq!((san.count("session"), san.count("record"), san.count("run leases")), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn lost_credentials_matter_only_where_a_login_is_needed() {
    let san = San::new();
    let with = |authentication| AttachRequest { authentication, ..request("a", 1, &[2, 3]) };
    let lost = with(Authentication::Lost("gone".into()));
    let error = san.refused(&lost).await;
    assert_eq!(error.reason(), Reason::SecretUnavailable);
    san.sim.set_chap(&target(), Some(chap("a secret")));
    san.attach(&with(Authentication::Chap(chap("a secret")))).await;
    assert!(!san.connector.attach(&lost).await.expect("attached").changed());
    let before = san.sim.snapshot();
    assert!(before.contains("\"chap\":[\"127.0.0.2:3260\",\"127.0.0.3:3260\"]"), "{before}");
}

fn hctls(attachment: &Attachment) -> Vec<&str> {
    attachment.paths.iter().map(|p: &PathStatus| p.hctl.as_str()).collect()
}

#[tokio::test(start_paused = true)]
async fn one_portal_without_multipathd_is_a_single_path() {
    let san = San::new();
    san.sim.set_multipathd(false);
    let before = san.sim.snapshot();
    let got = san.attach(&request("a", 1, &[2])).await;
    assert_eq!(got.device.wwid, wwid(1));
    assert_eq!(got.device.size, GIB);
    assert_eq!(got.device.map, None);
    assert_eq!(san.sim.lun_of(got.device.dev), Some((target(), lun(1))));
    let Source::Iscsi(s) = source(1, &[2]) else { panic!("of iSCSI") };
    let setting = |name| san.sim.record_setting(&s.target, portal(2), name);
    assert_eq!(setting("node.session.scan").as_deref(), Some("manual"));
    assert_eq!(setting("node.session.timeo.replacement_timeout").as_deref(), Some("120"));
    assert!(san.detach("a", 1, &[2]).await.expect("detached").changed());
    assert_eq!(san.sim.snapshot(), before);
    assert!(!san.detach("a", 1, &[2]).await.expect("again").changed());
}

#[tokio::test(start_paused = true)]
async fn two_portals_are_one_map_of_two_paths() {
    let san = San::new();
    let before = san.sim.snapshot();
    let r = request("a", 1, &[2, 3]);
    let got = san.attach(&r).await;
    assert!(got.device.map.is_some());
    assert_eq!(got.device.paths, 2);
    assert_eq!(san.sim.lun_of(got.device.dev), Some((target(), lun(1))));
    assert_eq!(san.connector.doors.commands.started(), 3, "two records, one login");
    let timeout =
        san.sim.record_setting(&target(), portal(3), "node.session.timeo.replacement_timeout");
    assert_eq!(timeout.as_deref(), Some("5"));
    // Again: the same, nothing done.
    let again = san.connector.attach(&r).await.expect("attached");
    assert!(!again.changed());
    assert_eq!(again.into_inner(), got);
    assert_eq!(san.connector.observe(&r.owner, &r.source).await.expect("read"), Some(got));
    assert_eq!(san.connector.owners().await.expect("read"), [owner("a")]);
    assert!(san.detach("a", 1, &[2, 3]).await.expect("detached").changed());
    assert_eq!(san.sim.snapshot(), before);
    assert_eq!(san.connector.observe(&r.owner, &r.source).await.expect("read"), None);
}

#[tokio::test(start_paused = true)]
async fn five_luns_at_once_share_the_sessions_and_the_last_one_logs_out() {
    let san = San::new();
    let before = san.sim.snapshot();
    let mut all = tokio::task::JoinSet::new();
    for n in 0..5 {
        let connector = san.connector.clone();
        all.spawn(async move { connector.attach(&request(&format!("v{n}"), n, &[2, 3])).await });
    }
    let got: Vec<_> = all.join_all().await.into_iter().map(|r| r.expect("attached")).collect();
    assert!(got.iter().all(Outcome::changed));
    assert_eq!(san.count("session"), 2);
    assert_eq!(san.count("dm"), 5);
    let started = san.connector.doors.commands.started();
    assert_eq!(started, 3);
    let got = san.attach(&request("v5", 256, &[2, 3])).await;
    assert_eq!(
        san.connector.doors.commands.started(),
        started,
        "no process for a session that is there"
    );
    assert!(hctls(&got).iter().all(|h| h.ends_with(":0:0:16640")), "{got:?}");
    for n in 0..5 {
        san.detach(&format!("v{n}"), n, &[2, 3]).await.expect("detached");
        assert_eq!(san.count("session"), 2, "LUN 256 still uses them");
    }
    san.detach("v5", 256, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_dead_portal_holds_up_nothing_and_joins_when_it_comes_back() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.set_portal(portal(3), PortalState::Dead);
    let begin = tokio::time::Instant::now();
    let r = request("a", 1, &[2, 3]);
    let got = san.attach(&r).await;
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert_eq!(got.device.paths, 1);
    assert!(got.device.map.is_some());
    san.sim.set_portal(portal(3), PortalState::Alive);
    san.connector.settled().await;
    let now = san.connector.observe(&r.owner, &r.source).await.expect("read").expect("there");
    assert_eq!(now.device.paths, 2);
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_comes_after_the_detach_is_undone() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.set_portal(portal(3), PortalState::Dead);
    san.attach(&request("a", 1, &[2, 3])).await;
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    san.sim.set_portal(portal(3), PortalState::Alive);
    san.connector.settled().await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_portal_that_does_not_let_us_in_says_why() {
    for (state, reason) in [
        (PortalState::Dead, Reason::PortalUnreachable),
        (PortalState::Refusing, Reason::PortalUnreachable),
        (PortalState::Denied, Reason::LoginRefused),
    ] {
        let san = San::new();
        san.sim.set_portal(portal(2), state);
        san.sim.set_portal(portal(3), state);
        for portals in [&[2][..], &[2, 3]] {
            let error = san.refused(&request("a", 1, portals)).await;
            assert_eq!(error.reason(), reason, "{error}");
        }
    }
    let san = San::new();
    let mut r = request("a", 1, &[2]);
    let Source::Iscsi(s) = &mut r.source else { panic!("of iSCSI") };
    s.target = "iqn.2026-01.example.san:other".parse().expect("iqn");
    assert_eq!(san.refused(&r).await.reason(), Reason::TargetNotFound);
    san.sim.set_tool_missing(Tool::Iscsiadm, true);
    assert_eq!(san.refused(&request("a", 1, &[2])).await.reason(), Reason::ToolMissing);
}

#[tokio::test(start_paused = true)]
async fn a_single_path_takes_the_next_portal_when_one_does_not_answer() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.set_multipathd(false);
    san.sim.set_portal(portal(2), PortalState::Dead);
    let begin = tokio::time::Instant::now();
    let got = san.attach(&request("a", 1, &[2, 3])).await;
    assert!(begin.elapsed() < Duration::from_secs(4));
    assert_eq!((got.device.paths, got.device.map), (1, None));
    san.connector.settled().await;
    assert_eq!((san.count("session"), san.count("record")), (1, 1), "the other login was undone");
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_lun_that_is_not_there_is_not_found() {
    let san = San::new();
    assert_eq!(san.refused(&request("a", 77, &[2, 3])).await.reason(), Reason::LunNotFound);
    let nothing = SimLun::new(wwid(77), 0);
    san.sim.add_lun(&target(), lun(77), nothing);
    let error = san.refused(&request("a", 77, &[2, 3])).await;
    assert!(matches!(error, Error::NoMedium { .. }), "{error}");
    let nobody = SimLun::new(wwid(78), GIB).nameless();
    san.sim.add_lun(&target(), lun(78), nobody);
    assert_eq!(san.refused(&request("a", 78, &[2, 3])).await.reason(), Reason::NoUniqueIdentity);
}

#[tokio::test(start_paused = true)]
async fn another_lun_than_before_is_refused_unless_accepted() {
    let san = San::new();
    let mut r = request("a", 1, &[2, 3]);
    r.expect.recorded = Some(wwid(1));
    san.attach(&r).await;
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    san.sim.replace_lun(&target(), lun(1), SimLun::new(wwid(99), GIB));
    let error = san.refused(&r).await;
    assert_eq!(error.reason(), Reason::IdentityChanged, "{error}");
    r.expect.accept_new_identity = true;
    assert_eq!(san.attach(&r).await.device.wwid, wwid(99));
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    r.expect.wwid = Some(wwid(1));
    assert_eq!(san.refused(&r).await.reason(), Reason::IdentityMismatch);
    r.expect = Expect { size: Some(GIB + 512), ..Expect::default() };
    assert_eq!(san.refused(&r).await.reason(), Reason::IdentityMismatch);
}

/// Leaves a device of LUN 1 behind under a session that a volume on LUN 2 keeps.
async fn leave_stale(san: &San) -> String {
    san.attach(&request("keeper", 2, &[2])).await;
    let doors = &san.connector.doors;
    let session = session::of_target(&*doors.sysfs, &target()).await.expect("read").remove(0);
    let scan = format!("class/scsi_host/host{}/scan", session.host);
    doors.sysfs.write(&scan, "0 0 1").await.expect("scanned");
    san.sim.replace_lun(&target(), lun(1), SimLun::new(wwid(99), 2 * GIB));
    session.device_dir(session.hctl(1))
}

#[tokio::test(start_paused = true)]
async fn a_stale_device_that_nobody_holds_makes_way() {
    let san = San::new();
    san.sim.set_multipathd(false);
    leave_stale(&san).await;
    let got = san.attach(&request("a", 1, &[2])).await;
    assert_eq!((got.device.wwid, got.device.size), (wwid(99), 2 * GIB));
}

#[tokio::test(start_paused = true)]
async fn a_stale_device_in_an_idle_map_makes_way_too() {
    let san = San::new();
    leave_stale(&san).await;
    let got = san.attach(&request("a", 1, &[2])).await;
    assert_eq!((got.device.wwid, got.device.size), (wwid(99), 2 * GIB));
}

#[tokio::test(start_paused = true)]
async fn the_idle_map_of_a_stale_device_goes_also_when_its_removal_was_cut_off() {
    for what in ["dmsetup remove", "del map"] {
        let san = San::new();
        leave_stale(&san).await;
        let fault = |point| fault(point, what, FaultAction::Fail("cut off".into()));
        san.sim.faults().inject(fault("cmd.run"));
        san.sim.faults().inject(fault("multipathd.ask"));
        let _ = san.connector.attach(&request("a", 1, &[2])).await;
        san.sim.faults().clear();
        san.detach("a", 1, &[2]).await.expect("detached");
        // The device itself was there before, and is nobody's.
        san.detach("keeper", 2, &[2]).await.expect("detached");
        let left = san.sim.snapshot();
        assert_eq!((san.count("dm"), san.count("wwid"), san.count("binding")), (0, 0, 0), "{left}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stale_device_that_is_held_is_named_and_stays() {
    for multipathd in [false, true] {
        let san = San::new();
        san.sim.set_multipathd(multipathd);
        let dir = leave_stale(&san).await;
        let disk = scsi::disk(&*san.connector.doors.sysfs, &dir).await.expect("read");
        let dev = disk.expect("there").dev;
        san.sim.open(dev, "dd[4711]");
        let error = san.connector.attach(&request("a", 1, &[2])).await.expect_err("held");
        assert_eq!(error.reason(), Reason::StaleDeviceHeld, "{error}");
        assert!(error.to_string().contains("dd[4711]"), "{error}");
        assert!(san.sim.snapshot().contains(":0:0:1 "), "it stays");
        san.sim.release(dev);
        assert_eq!(san.attach(&request("a", 1, &[2])).await.device.wwid, wwid(99), "let go of");
        san.detach("a", 1, &[2]).await.expect("detached");
        assert_eq!(san.connector.owners().await.expect("read"), [owner("keeper")]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_same_lun_twice_is_refused_unless_both_share_it() {
    let san = San::new();
    let mut first = request("a", 1, &[2, 3]);
    first.shareable = true;
    let got = san.attach(&first).await;
    let error = san.refused(&request("b", 1, &[2, 3])).await;
    assert_eq!(error.reason(), Reason::SourceInUse);
    assert!(error.to_string().contains("ns/vm/a"), "{error}");
    // The same LUN by another number.
    san.sim.add_lun(&target(), lun(9), SimLun::new(wwid(1), GIB));
    assert_eq!(
        san.connector.attach(&request("b", 9, &[2, 3])).await.expect_err("same").reason(),
        Reason::SourceInUse
    );
    let mut second = request("b", 1, &[2, 3]);
    second.shareable = true;
    assert_eq!(san.attach(&second).await.device.dev, got.device.dev);
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    let left = san.connector.observe(&owner("b"), &second.source).await.expect("read");
    assert_eq!(left.expect("still there").device.dev, got.device.dev);
    san.detach("b", 1, &[2, 3]).await.expect("detached");
    assert_eq!(
        (san.count("session"), san.count("disk"), san.count("dm"), san.count("run")),
        (0, 0, 0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn foreign_sessions_and_records_are_used_and_left() {
    let san = San::new();
    san.sim.add_record(&target(), portal(2), "default");
    san.sim.add_session(&target(), portal(2), "default");
    san.sim.add_record(&target(), portal(3), "other");
    let before = san.sim.snapshot();
    san.attach(&request("a", 1, &[2, 3])).await;
    assert_eq!(san.count("session"), 2);
    let scan = san.sim.record_setting(&target(), portal(2), "node.session.scan");
    assert_eq!(scan.as_deref(), Some("auto"), "not ours to change");
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_record_is_not_changed_by_another_volume() {
    let san = San::new();
    san.attach(&request("a", 1, &[2])).await;
    san.attach(&request("b", 2, &[2, 3])).await;
    let timeout = |n| {
        let name = "node.session.timeo.replacement_timeout";
        san.sim.record_setting(&target(), portal(n), name)
    };
    assert_eq!(timeout(2).as_deref(), Some("120"), "as the single path wanted it");
    assert_eq!(timeout(3).as_deref(), Some("5"));
}

#[tokio::test(start_paused = true)]
async fn a_damaged_record_is_replaced() {
    let san = San::new();
    san.sim.corrupt_record(&target(), portal(2), "default");
    san.attach(&request("a", 1, &[2])).await;
    san.detach("a", 1, &[2]).await.expect("detached");
    assert_eq!(san.count("record"), 0);
}

#[tokio::test(start_paused = true)]
async fn records_that_outlive_a_boot_are_known_again() {
    let san = San::new();
    san.attach(&request("a", 1, &[2, 3])).await;
    san.sim.reboot();
    assert_eq!(san.count("record"), 2);
    let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
    let san = San { sim: san.sim, connector };
    assert_eq!(san.connector.owners().await.expect("read"), []);
    san.attach(&request("a", 1, &[2, 3])).await;
    san.sim.reboot();
    let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
    let san = San { sim: san.sim, connector };
    assert!(san.detach("a", 1, &[2, 3]).await.expect("detached").changed());
    assert_eq!((san.count("record"), san.count("run")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn multipath_required_needs_multipathd() {
    let san = San::new();
    san.sim.set_multipathd(false);
    let mut r = request("a", 1, &[2, 3]);
    r.multipath = MultipathPolicy::Required;
    assert_eq!(san.refused(&r).await.reason(), Reason::MultipathUnavailable);
    r.multipath = MultipathPolicy::Preferred;
    let got = san.attach(&r).await;
    assert_eq!((got.device.map, got.device.paths), (None, 1));
}

#[tokio::test(start_paused = true)]
async fn multipath_off_takes_multipathds_map_off_again() {
    let san = San::new();
    let before = san.sim.snapshot();
    let mut r = request("a", 1, &[2, 3]);
    r.multipath = MultipathPolicy::Off;
    let got = san.attach(&r).await;
    assert_eq!((got.device.map, got.device.paths, san.count("dm")), (None, 1, 0));
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    san.connector.settled().await;
    assert_eq!(san.sim.snapshot(), before);
}

/// It would make the map right after the path was given away.
#[tokio::test(start_paused = true)]
async fn multipath_off_waits_until_multipathd_knows_the_path() {
    let san = San::new();
    san.sim.set_multipathd_auto(false);
    san.sim.set_udev_behind(4);
    let mut r = request("a", 1, &[2, 3]);
    r.multipath = MultipathPolicy::Off;
    let got = san.attach(&r).await;
    assert_eq!((got.device.map, san.count("dm")), (None, 0));
    san.sim.set_multipathd_auto(true);
    san.sim.settle_multipathd();
    assert_eq!(san.count("dm"), 0, "it was made, and taken off");
}

#[tokio::test(start_paused = true)]
async fn a_device_that_the_host_uses_is_not_given_away() {
    let san = San::new();
    let keeper = san.attach(&request("keeper", 2, &[2])).await;
    // LVM is on LUN 1, which somebody scanned before.
    let doors = &san.connector.doors;
    san.sim.set_multipathd(false);
    let session = session::of_target(&*doors.sysfs, &target()).await.expect("read").remove(0);
    let scan = format!("class/scsi_host/host{}/scan", session.host);
    doors.sysfs.write(&scan, "0 0 1").await.expect("scanned");
    let dir = session.device_dir(session.hctl(1));
    let disk = scsi::disk(&*doors.sysfs, &dir).await.expect("read").expect("there");
    san.sim.stack_dm(disk.dev, "vg-root", "LVM-x");
    let error = san.connector.attach(&request("a", 1, &[2])).await.expect_err("held");
    assert_eq!(error.reason(), Reason::DeviceHeld, "{error}");
    assert!(error.to_string().contains("vg-root"), "{error}");
    drop(keeper);
}

#[tokio::test(start_paused = true)]
async fn asking_again_tries_the_missing_portal_again() {
    let san = San::new();
    san.sim.set_portal(portal(3), PortalState::Dead);
    let r = request("a", 1, &[2, 3]);
    assert_eq!(san.attach(&r).await.device.paths, 1);
    san.connector.settled().await;
    san.sim.set_portal(portal(3), PortalState::Alive);
    assert!(!san.connector.attach(&r).await.expect("attached").changed());
    san.connector.settled().await;
    assert_eq!(san.attach(&r).await.device.paths, 2);
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!((san.count("session"), san.count("record"), san.count("run")), (0, 0, 0));
}
