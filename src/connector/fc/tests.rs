//! Flows on the simulated fabric.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::connector::error::Error;
use crate::connector::{
    AttachRequest, Attachment, Authentication, Connector, DetachOptions, Expect, Health, Settings,
};
use crate::host::sim::{Appears, Faults, SimLun, SimStorage};
use crate::host::storage::StorageDoors;
use crate::host::uevent::Notice;
use crate::reason::Reason;
use crate::spec::{FcSource, FcTarget, MultipathPolicy, Source};
use crate::types::{DevNum, Lun, Outcome, VolumeKey, Wwid, Wwpn};

const GIB: u64 = 1 << 30;

struct San {
    sim: SimStorage,
    connector: Arc<Inner>,
}

fn hba(n: u8) -> Wwpn {
    format!("21000024ff3d2e{n:02x}").parse().expect("WWPN")
}

fn port(n: u8) -> Wwpn {
    format!("500a098{n}991b8dc5").parse().expect("WWPN")
}

fn lun(n: u64) -> Lun {
    n.try_into().expect("lun")
}

fn wwid(n: u64) -> Wwid {
    format!("naa.6001405{n:025x}").parse().expect("wwid")
}

fn owner(volume: &str) -> VolumeKey {
    VolumeKey { vm: "ns/vm".parse().expect("vm"), volume: volume.parse().expect("volume") }
}

fn source(n: u64, ports: &[u8]) -> FcSource {
    let target = |p: &u8| FcTarget { wwpn: port(*p), lun: lun(n) };
    FcSource { targets: ports.iter().map(target).collect(), ..FcSource::default() }
}

fn request(volume: &str, source: FcSource) -> AttachRequest {
    AttachRequest {
        owner: owner(volume),
        source: Source::Fc(source),
        expect: Expect::default(),
        multipath: MultipathPolicy::Preferred,
        shareable: false,
        read_only: false,
        authentication: Authentication::None,
    }
}

impl San {
    /// HBAs 1 and 2, each zoned to the target port of its number; both ports get LUNs 0 to 10 and 256
    /// (`wwid(n)` each) after their login.
    fn new() -> Self {
        let san = Self::bare();
        for n in [1, 2] {
            san.sim.add_hba(hba(n));
            san.sim.zone(hba(n), port(n), Appears::AtOnce);
        }
        san.map_luns();
        san
    }

    fn bare() -> Self {
        let sim = SimStorage::new(Arc::new(Faults::default()));
        let connector = Arc::new(Luns::new(StorageDoors::sim(&sim), Settings::default()));
        Self { sim, connector }
    }

    /// With a daemon of the new boot.
    fn reboot(&mut self) {
        self.sim.reboot();
        let doors = StorageDoors::sim(&self.sim);
        self.connector = Arc::new(Luns::new(doors, Settings::default()));
    }

    fn map_luns(&self) {
        for n in (0..=10).chain([256]) {
            for p in [1, 2] {
                self.sim.add_lun(
                    &SimStorage::fc_target(port(p)),
                    lun(n),
                    SimLun::new(wwid(n), GIB),
                );
            }
        }
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

    async fn detach(&self, volume: &str, source: &FcSource) -> Result<Outcome, Error> {
        let options = DetachOptions::default();
        self.connector.detach(&owner(volume), &Source::Fc(source.clone()), options).await
    }

    async fn paths(&self, volume: &str, source: &FcSource) -> (u32, u32) {
        let volume = (owner(volume), Source::Fc(source.clone()));
        let health = self.connector.inspect(&[volume]).await.remove(0).expect("seen");
        let Health::Right { paths, .. } = health else { panic!("{health:?}") };
        (paths.living, paths.wanted)
    }

    /// Nothing of that LUN is left, nor of anybody's attach.
    fn assert_without(&self, n: u64) {
        let (all, wwid) = (self.sim.snapshot(), wwid(n));
        assert!(!all.contains(wwid.as_str()) && !all.contains(&wwid.multipath()), "{all}");
        assert_eq!(self.count("run"), 0, "{all}");
    }

    fn count(&self, kind: &str) -> usize {
        self.sim.snapshot().lines().filter(|l| l.starts_with(&format!("{kind} "))).count()
    }
}

fn hctls(found: &Attachment) -> Vec<&str> {
    let mut all: Vec<&str> = found.paths.iter().map(|p| p.hctl.as_str()).collect();
    all.sort_unstable();
    all
}

#[tokio::test(start_paused = true)]
async fn a_lun_comes_by_every_hba_that_sees_a_port_and_goes_without_a_trace() {
    let san = San::new();
    let empty = san.sim.snapshot();
    let source = source(1, &[1, 2]);
    let found = san.attach(&request("a", source.clone())).await;
    assert_eq!(found.device.wwid, wwid(1));
    assert_eq!(hctls(&found), ["100:0:0:1", "101:0:0:1"]);
    assert!(found.device.map.is_some());
    assert_eq!(san.count("disk"), 2, "no other LUN was scanned");
    assert_eq!(san.paths("a", &source).await, (2, 2));
    let again = san.connector.attach(&request("a", source.clone())).await.expect("again");
    assert!(matches!(again, Outcome::Already(_)));
    assert_eq!(san.connector.owners().await.expect("read"), [owner("a")]);
    san.detach("a", &source).await.expect("detached");
    // Remote ports and HBAs among it.
    assert_eq!(san.sim.snapshot(), empty);
    assert!(matches!(san.detach("a", &source).await, Ok(Outcome::Already(()))));
}

#[tokio::test(start_paused = true)]
async fn several_volumes_of_one_port_do_not_touch_each_other() {
    let san = San::new();
    let (one, ten) = (source(1, &[1, 2]), source(10, &[2, 1]));
    let first = san.attach(&request("a", one.clone())).await;
    let second = san.attach(&request("b", ten.clone())).await;
    assert_ne!(first.device.dev, second.device.dev);
    san.detach("b", &ten).await.expect("detached");
    assert_eq!(san.paths("a", &one).await, (2, 2));
    let error = san.refused(&request("c", one.clone())).await;
    assert_eq!(error.reason(), Reason::SourceInUse, "{error}");
}

#[tokio::test(start_paused = true)]
async fn one_hba_that_sees_nothing_is_no_obstacle_and_no_path_is_missed_of_it() {
    let san = San::bare();
    san.sim.add_hba(hba(1));
    san.sim.add_hba(hba(2));
    san.sim.zone(hba(1), port(1), Appears::AtOnce);
    san.sim.zone(hba(1), port(2), Appears::AtOnce);
    san.map_luns();
    let source = source(3, &[1, 2]);
    let found = san.attach(&request("a", source.clone())).await;
    assert_eq!(hctls(&found), ["100:0:0:3", "100:0:1:3"]);
    assert_eq!(san.paths("a", &source).await, (2, 2));
}

#[tokio::test(start_paused = true)]
async fn one_port_by_one_hba_is_a_single_path_and_by_two_a_map() {
    let san = San::new();
    san.sim.set_multipathd(false);
    let found = san.attach(&request("a", source(1, &[1]))).await;
    assert_eq!((found.device.map, found.device.paths), (None, 1));
    san.sim.set_multipathd(true);
    san.sim.zone(hba(2), port(1), Appears::AtOnce);
    let found = san.attach(&request("b", source(2, &[1]))).await;
    assert!(found.device.map.is_some() && found.device.paths == 2);
}

#[tokio::test(start_paused = true)]
async fn a_port_that_nobody_sees_is_named_with_what_the_hbas_are() {
    let san = San::new();
    let error = san.refused(&request("a", source(1, &[7]))).await;
    assert_eq!(error.reason(), Reason::FcPortNotFound);
    let text = error.to_string();
    assert!(text.contains("500a0987991b8dc5"), "{text}");
    assert!(text.contains("HBA 21000024ff3d2e01 is Online, speed 16 Gbit"), "{text}");
    assert_eq!(san.count("disk"), 0, "nothing else was scanned");
    san.sim.lose_port(hba(1), port(1));
    let error = san.refused(&request("a", source(1, &[1]))).await;
    assert!(error.to_string().contains("is Blocked to HBA 21000024ff3d2e01"), "{error}");
    let error = San::bare().refused(&request("a", source(1, &[1]))).await;
    assert_eq!(error.reason(), Reason::NoFcHba);
    let error = san.refused(&request("a", source(77, &[2]))).await;
    assert_eq!(error.reason(), Reason::LunNotFound);
}

#[tokio::test(start_paused = true)]
async fn all_is_scanned_only_if_allowed_and_only_where_no_port_is_seen() {
    let san = San::new();
    san.sim.zone(hba(1), port(5), Appears::ByScan);
    san.sim.add_lun(&SimStorage::fc_target(port(5)), lun(4), SimLun::new(wwid(45), GIB));
    let narrow = source(4, &[5]);
    let error = san.refused(&request("a", narrow.clone())).await;
    assert_eq!(error.reason(), Reason::FcPortNotFound);
    let seen = FcSource { wildcard_scan: true, ..source(3, &[1]) };
    san.attach(&request("b", seen)).await;
    assert_eq!(san.count("disk"), 1);
    let wide = FcSource { wildcard_scan: true, ..narrow };
    let found = san.attach(&request("a", wide.clone())).await;
    assert_eq!((found.device.wwid, found.device.paths), (wwid(45), 1));
    san.detach("a", &wide).await.expect("detached");
    assert_eq!(san.count("disk"), 3, "LUN 4 of the other ports was scanned too: it stays");
}

#[tokio::test(start_paused = true)]
async fn a_lip_is_issued_only_on_request_and_once() {
    let san = San::new();
    let quiet = source(4, &[5]);
    san.refused(&request("a", quiet.clone())).await;
    assert_eq!(san.sim.lips(), 0);
    let loud = FcSource { lip: true, ..quiet };
    for _ in 0..3 {
        san.refused(&request("a", loud.clone())).await;
        assert_eq!(san.sim.lips(), 2, "one for each HBA");
    }
    san.sim.zone(hba(1), port(5), Appears::ByLip);
    san.sim.add_lun(&SimStorage::fc_target(port(5)), lun(4), SimLun::new(wwid(45), GIB));
    let found = san.attach(&request("b", loud)).await;
    assert_eq!((found.device.wwid, san.sim.lips()), (wwid(45), 4));
    san.attach(&request("c", FcSource { lip: true, ..source(1, &[1]) })).await;
    assert_eq!(san.sim.lips(), 4, "its port is seen");
}

#[tokio::test(start_paused = true)]
async fn the_map_of_initiators_chooses_the_hbas() {
    let san = San::new();
    for n in [1, 2] {
        san.sim.zone(hba(n), port(3 - n), Appears::AtOnce);
    }
    let all = san.attach(&request("a", source(1, &[1, 2]))).await;
    assert_eq!(all.device.paths, 4);
    let map = |pairs: &[(u8, &[u8])]| {
        let entry = |(h, ports): &(u8, &[u8])| (hba(*h), ports.iter().map(|p| port(*p)).collect());
        pairs.iter().map(entry).collect()
    };
    // HBA 9 is another node's.
    let some = FcSource {
        initiator_targets: map(&[(1, &[1]), (2, &[2]), (9, &[1, 2])]),
        ..source(2, &[1, 2])
    };
    let found = san.attach(&request("b", some.clone())).await;
    assert_eq!(hctls(&found), ["100:0:0:2", "101:0:0:2"]);
    assert_eq!(san.paths("b", &some).await, (2, 2));
    let one = FcSource { initiator_targets: map(&[(1, &[1])]), ..source(3, &[1, 2]) };
    let found = san.attach(&request("c", one.clone())).await;
    assert_eq!(hctls(&found), ["100:0:0:3"]);
    san.detach("c", &one).await.expect("detached");
    let foreign = FcSource { initiator_targets: map(&[(9, &[1])]), ..source(4, &[1]) };
    let error = san.refused(&request("d", foreign)).await;
    assert_eq!(error.reason(), Reason::NoFcHba);
    let text = error.to_string();
    assert!(text.contains("21000024ff3d2e01, 21000024ff3d2e02"), "{text}");
    assert!(text.contains("21000024ff3d2e09"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_port_that_logs_in_late_joins_by_its_event() {
    let san = San::bare();
    san.sim.add_hba(hba(1));
    san.sim.add_hba(hba(2));
    san.map_luns();
    san.sim.zone(hba(1), port(1), Appears::AtOnce);
    let source = source(1, &[1, 2]);
    let mut changes = san.connector.changes();
    let found = san.attach(&request("a", source.clone())).await;
    assert_eq!(found.device.paths, 1);
    assert!(found.device.map.is_some(), "the second may come");
    assert_eq!(san.paths("a", &source).await, (1, 2));
    san.sim.zone(hba(2), port(2), Appears::AtOnce);
    san.connector.settled().await;
    assert_eq!(san.paths("a", &source).await, (2, 2), "while it is waited for");
    // Later than it was waited for: whoever looks after the volume is told, and attaches again.
    san.sim.zone(hba(2), port(1), Appears::AtOnce);
    let mut told = false;
    while let Ok(touched) = tokio::time::timeout(Duration::from_secs(2), changes.recv()).await {
        let touched = touched.expect("told");
        told |= touched.brings_paths(Some(&found)) && touched.concerns(&found);
    }
    assert!(told);
    san.attach(&request("a", source.clone())).await;
    san.connector.settled().await;
    assert_eq!(san.paths("a", &source).await, (3, 3));
    san.detach("a", &source).await.expect("detached");
    san.assert_without(1);
}

#[tokio::test(start_paused = true)]
async fn a_first_port_that_logs_in_during_the_attach_is_waited_for() {
    let san = San::new();
    san.sim.add_lun(&SimStorage::fc_target(port(5)), lun(4), SimLun::new(wwid(45), GIB));
    let sim = san.sim.clone();
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(6)).await;
        sim.zone(hba(1), port(5), Appears::AtOnce);
    });
    let started = tokio::time::Instant::now();
    san.attach(&request("a", source(4, &[5]))).await;
    assert!(started.elapsed() < Duration::from_secs(7), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_port_that_is_lost_and_back_has_its_path_again() {
    for scans in [true, false] {
        let san = San::new();
        san.sim.set_fc_scan(scans);
        let source = source(1, &[1, 2]);
        let found = san.attach(&request("a", source.clone())).await;
        // The guest has it.
        san.sim.open(found.device.dev, "qemu-system-x86[7]");
        san.sim.lose_port(hba(1), port(1));
        assert_eq!(san.paths("a", &source).await, (1, 2));
        san.sim.zone(hba(1), port(1), Appears::AtOnce);
        assert_eq!(san.paths("a", &source).await, (2, 2));
        san.sim.lose_port(hba(1), port(1));
        san.sim.end_dev_loss(hba(1), port(1));
        assert_eq!(san.paths("a", &source).await, (1, 2));
        san.sim.zone(hba(1), port(1), Appears::AtOnce);
        let again = san.connector.attach(&request("a", source.clone())).await.expect("again");
        assert_eq!(again.into_inner().device.dev, found.device.dev, "the map stays");
        san.connector.settled().await;
        assert_eq!(san.paths("a", &source).await, (2, 2), "scanned by the kernel: {scans}");
        san.sim.release(found.device.dev);
        san.detach("a", &source).await.expect("detached");
        san.assert_without(1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_scanned_is_the_volumes_from_when_it_is_attached() {
    let mut san = San::new();
    // At a boot with mapped LUNs there are all their devices and maps.
    san.reboot();
    let booted = (san.count("disk"), san.count("dm"));
    assert_eq!(booted, (24, 12));
    let source = source(1, &[1, 2]);
    let mut events = san.connector.doors.uevents.subscribe();
    san.attach(&request("a", source.clone())).await;
    assert_eq!((san.count("disk"), san.count("dm")), booted, "they are used as they are");
    let marks = san.sim.snapshot().lines().filter(|l| l.starts_with("run guest-luns/")).count();
    assert_eq!(marks, 2);
    let mut looked = 0;
    while let Ok(notice) = tokio::time::timeout(Duration::from_millis(1), events.event()).await {
        let Notice::Event(event) = notice else { continue };
        looked += usize::from(event.action == "change" && event.devpath.contains(":0:0:1/block/"));
    }
    assert_eq!(looked, 2, "udev looks again, now that they are marked");
    san.detach("a", &source).await.expect("detached");
    assert_eq!((san.count("disk"), san.count("dm")), (22, 11));
    san.assert_without(1);
    // A map that is not wanted is taken off.
    let off = AttachRequest {
        multipath: MultipathPolicy::Off,
        ..request("b", FcSource { targets: source.targets[..1].to_vec(), ..FcSource::default() })
    };
    san.attach(&off).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_host_uses_itself_is_left_as_it_is() {
    let mut san = San::new();
    san.reboot();
    let numbers = |kind: &str, wwid: &Wwid| -> Vec<DevNum> {
        let all = san.sim.snapshot();
        let of = all.lines().filter(|l| l.starts_with(kind) && l.contains(&wwid.multipath()));
        of.filter_map(|l| l.split(' ').nth(1)?.strip_prefix("dm-")?.parse().ok())
            .map(|minor| DevNum { major: 253, minor })
            .collect()
    };
    // The host boots from it.
    let root = numbers("dm ", &wwid(2));
    assert_eq!(root.len(), 1);
    san.sim.hold(root[0], "mount of /");
    let error = san.refused(&request("a", source(2, &[1, 2]))).await;
    assert_eq!(error.reason(), Reason::DeviceHeld, "{error}");
}

#[tokio::test(start_paused = true)]
async fn another_lun_at_a_number_that_is_known_is_never_taken_for_the_old_one() {
    let mut san = San::new();
    san.reboot();
    for p in [1, 2] {
        san.sim.replace_lun(&SimStorage::fc_target(port(p)), lun(5), SimLun::new(wwid(55), GIB));
    }
    let source = source(5, &[1, 2]);
    let expecting = |n: u64| AttachRequest {
        expect: Expect { wwid: Some(wwid(n)), ..Expect::default() },
        ..request("a", source.clone())
    };
    let found = san.attach(&expecting(55)).await;
    assert_eq!((found.device.wwid, found.device.paths), (wwid(55), 2));
    assert!(!san.sim.snapshot().contains(&wwid(5).multipath()), "{}", san.sim.snapshot());
    san.detach("a", &source).await.expect("detached");
    let error = san.connector.attach(&expecting(5)).await.expect_err("refused");
    assert_eq!(error.reason(), Reason::IdentityMismatch, "{error}");
}

#[tokio::test(start_paused = true)]
async fn luns_above_255_are_addressed_flat() {
    let san = San::new();
    let source = source(256, &[1, 2]);
    let found = san.attach(&request("a", source.clone())).await;
    assert_eq!(hctls(&found), ["100:0:0:16640", "101:0:0:16640"]);
    san.detach("a", &source).await.expect("detached");
}

#[tokio::test(start_paused = true)]
async fn a_lun_that_grows_is_measured_and_its_map_grown() {
    let san = San::new();
    let source = source(1, &[1, 2]);
    san.attach(&request("a", source.clone())).await;
    for p in [1, 2] {
        san.sim.resize_lun(&SimStorage::fc_target(port(p)), lun(1), 2 * GIB);
    }
    let whole = Source::Fc(source);
    let measured = san.connector.measure(&owner("a"), &whole, None).await.expect("measured");
    assert_eq!((measured.before, measured.now), (GIB, 2 * GIB));
    let grown = san.connector.grow(&owner("a"), &whole, 2 * GIB).await.expect("grown");
    assert_eq!(grown.into_inner().device.size, 2 * GIB);
}

#[tokio::test(start_paused = true)]
async fn hbas_are_told_with_all_that_the_kernel_shows() {
    let san = San::new();
    let found = hbas(&san.sim).await.expect("read");
    let all: Vec<String> =
        found.iter().map(|h| format!("{} {} {}", h.host, h.wwpn, h.state)).collect();
    assert_eq!(all, ["100 21000024ff3d2e01 Online", "101 21000024ff3d2e02 Online"]);
    assert_eq!(found[0].speed, "16 Gbit");
    assert_eq!(found[0].wwnn.map(|n| n.to_string()).as_deref(), Some("11000024ff3d2e01"));
    assert_eq!(found[0].fabric.map(|n| n.to_string()).as_deref(), Some("100000051e0a1234"));
}
