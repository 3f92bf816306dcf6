//! One LUN at several targets.

use super::*;

/// The second target; it exports LUN n of the first as n + 100, by portal .3, which the first one has
/// too, and .4.
fn second() -> Iqn {
    "iqn.2026-01.example.san:t2".parse().expect("iqn")
}

fn san() -> San {
    let san = San::new();
    san.sim.add_target(&second(), &[portal(3), portal(4)]);
    for n in 0..=10 {
        san.sim.export_lun(&target(), lun(n), &second(), lun(n + 100));
    }
    san
}

/// LUN `n` at both targets, the second one first where `turned`.
fn both(n: u64, turned: bool) -> Source {
    let one = format!("127.0.0.2,127.0.0.3/{}/{n}", target());
    let two = format!("127.0.0.3,127.0.0.4/{}/{}", second(), n + 100);
    let (one, two) = if turned { (two, one) } else { (one, two) };
    format!("iscsi://{one}+{two}").parse().expect("source")
}

fn at_second(n: u64) -> Source {
    format!("iscsi://127.0.0.4/{}/{}", second(), n + 100).parse().expect("source")
}

fn wants(volume: &str, source: Source) -> AttachRequest {
    AttachRequest { source, ..request(volume, 1, &[2]) }
}

fn set(san: &San, portals: &[u8], state: PortalState) {
    portals.iter().for_each(|n| san.sim.set_portal(portal(*n), state));
}

async fn leave(san: &San, r: &AttachRequest) {
    let options = DetachOptions::default();
    san.connector.detach(&r.owner, &r.source, options).await.expect("detached");
    san.connector.settled().await;
}

#[tokio::test(start_paused = true)]
async fn one_map_is_above_the_paths_of_all_targets() {
    let san = san();
    let before = san.sim.snapshot();
    let r = wants("a", both(1, false));
    let got = san.attach(&r).await;
    assert_eq!((got.device.paths, got.device.wwid.clone(), san.count("dm")), (4, wwid(1), 1));
    assert_eq!((san.count("session"), san.count("record")), (4, 4));
    assert_eq!(san.connector.owners().await.expect("read"), [owner("a")]);
    assert!(!san.connector.attach(&r).await.expect("attached").changed());
    assert_eq!(san.connector.observe(&r.owner, &r.source).await.expect("read"), Some(got));
    let health = san.connector.inspect(&[(r.owner.clone(), r.source.clone())]).await.remove(0);
    let Ok(Health::Right { paths, .. }) = health else { panic!("{health:?}") };
    assert_eq!((paths.wanted, paths.living), (4, 4));
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_dead_or_refusing_target_costs_only_its_paths() {
    for state in [PortalState::Dead, PortalState::Refusing, PortalState::Denied] {
        for turned in [false, true] {
            let san = san();
            let before = san.sim.snapshot();
            // Portal .3 is of both.
            set(&san, &[3, 4], state);
            let r = wants("a", both(1, turned));
            let begin = tokio::time::Instant::now();
            assert_eq!(san.attach(&r).await.device.paths, 1, "{state:?}");
            assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
            san.connector.settled().await;
            set(&san, &[3, 4], PortalState::Alive);
            assert!(!san.connector.attach(&r).await.expect("attached").changed());
            san.connector.settled().await;
            assert_eq!(san.attach(&r).await.device.paths, 4, "{state:?}");
            leave(&san, &r).await;
            assert_eq!(san.sim.snapshot(), before, "{state:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_has_no_such_lun_costs_only_its_paths() {
    let san = san();
    san.sim.remove_lun(&second(), lun(101));
    for turned in [false, true] {
        let r = wants("a", both(1, turned));
        assert_eq!(san.attach(&r).await.device.paths, 2);
        leave(&san, &r).await;
        assert_eq!((san.count("session"), san.count("record"), san.count("run")), (0, 0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn when_no_target_lets_us_in_the_one_that_says_most_is_named() {
    let san = san();
    set(&san, &[2, 3], PortalState::Dead);
    san.sim.set_portal(portal(4), PortalState::Denied);
    let error = san.refused(&wants("a", both(1, false))).await;
    assert_eq!(error.reason(), Reason::LoginRefused, "{error}");
    assert!(error.to_string().contains(second().as_str()), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_single_path_is_the_first_that_answers_of_any_target() {
    let san = san();
    let before = san.sim.snapshot();
    san.sim.set_multipathd(false);
    set(&san, &[2, 3], PortalState::Dead);
    let r = wants("a", both(1, false));
    let got = san.attach(&r).await;
    assert_eq!((got.device.paths, got.device.map.clone()), (1, None));
    san.connector.settled().await;
    assert_eq!((san.count("session"), san.count("record")), (1, 1), "the other logins were undone");
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn the_same_lun_by_either_target_is_in_use() {
    let san = san();
    let r = wants("a", both(1, false));
    san.attach(&r).await;
    for other in [both(1, true), source(1, &[2]), at_second(1)] {
        let error = san.refused(&wants("b", other)).await;
        assert_eq!(error.reason(), Reason::SourceInUse, "{error}");
    }
    leave(&san, &r).await;
    san.attach(&wants("b", at_second(1))).await;
    let error = san.refused(&r).await;
    assert_eq!(error.reason(), Reason::SourceInUse, "{error}");
}

/// One WWID, two LUNs: two arrays that were cloned from each other, say.
#[tokio::test(start_paused = true)]
async fn two_targets_with_one_wwid_that_differ_elsewhere_are_refused() {
    let plain = || SimLun::new(wwid(1), GIB);
    for (what, words) in [
        (SimLun { size: 2 * GIB, ..plain() }, "2147483648 bytes"),
        (SimLun { serial: Some("another".into()), ..plain() }, "serial another"),
        (SimLun { model: "another".into(), ..plain() }, "LIO-ORG another"),
    ] {
        let san = san();
        san.sim.add_lun(&second(), lun(101), what.clone());
        for turned in [false, true] {
            let error = san.refused(&wants("a", both(1, turned))).await;
            assert_eq!(error.reason(), Reason::PathsDisagree, "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
        // The one that comes late changes nothing for the volume.
        set(&san, &[3, 4], PortalState::Dead);
        let before = san.sim.snapshot();
        let r = wants("a", both(1, false));
        assert_eq!(san.attach(&r).await.device.paths, 1);
        set(&san, &[3, 4], PortalState::Alive);
        san.connector.settled().await;
        assert_eq!(san.attach(&r).await.device.paths, 2, "{words}: the first target's second one");
        san.connector.settled().await;
        assert!(!san.sim.snapshot().contains(":0:0:101 "), "{}", san.sim.snapshot());
        leave(&san, &r).await;
        assert_eq!(san.sim.snapshot(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn who_shares_a_lun_keeps_it_whatever_targets_the_others_leave() {
    let sources = || [both(1, false), both(1, true), source(1, &[2, 3]), at_second(1)];
    for first in sources() {
        for second in sources() {
            let san = san();
            let before = san.sim.snapshot();
            let share = |volume: &str, source: &Source| AttachRequest {
                shareable: true,
                multipath: MultipathPolicy::Required,
                ..wants(volume, source.clone())
            };
            let (a, b) = (share("a", &first), share("b", &second));
            let what = format!("{first} left before {second}");
            let given = san.attach(&a).await.device;
            // Its guest has it.
            san.sim.open(given.dev, "qemu[1]");
            let got = san.attach(&b).await;
            assert_eq!(got.device.dev, given.dev, "{what}");
            leave(&san, &a).await;
            let now = san.connector.observe(&b.owner, &b.source).await.expect("read");
            assert_eq!(now.expect("there").device.paths, got.device.paths, "{what}");
            assert!(!san.sim.snapshot().contains("error"), "{what}");
            san.sim.release(given.dev);
            leave(&san, &b).await;
            assert_eq!(san.sim.snapshot(), before, "{what}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lun_with_two_numbers_at_one_target_is_one() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.export_lun(&target(), lun(1), &target(), lun(200));
    let source = format!("iscsi://127.0.0.2/{0}/1+127.0.0.3/{0}/200", target());
    let r = wants("a", source.parse().expect("source"));
    let got = san.attach(&r).await;
    assert_eq!((got.device.paths, san.count("session"), san.count("dm")), (2, 2, 1));
    let mut addresses = hctls(&got);
    addresses.sort();
    assert!(addresses[0].ends_with(":1") && addresses[1].ends_with(":200"), "{addresses:?}");
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_target_that_cannot_be_left_keeps_no_other() {
    let san = san();
    let before = san.sim.snapshot();
    let r = wants("a", both(1, false));
    san.attach(&r).await;
    let out = fault("cmd.run", target().as_str(), FaultAction::Fail("it hangs".into()));
    san.sim.faults().inject(out);
    let options = DetachOptions::default();
    san.connector.detach(&r.owner, &r.source, options).await.expect_err("one stays");
    let left = san.sim.snapshot();
    assert!(!left.contains(second().as_str()) && left.contains(target().as_str()), "{left}");
    san.sim.faults().clear();
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn every_path_of_every_target_is_measured() {
    let san = san();
    let r = wants("a", both(1, false));
    san.attach(&r).await;
    san.sim.resize_lun(&target(), lun(1), 2 * GIB);
    let error = san.connector.measure(&r.owner, &r.source, None).await.expect_err("not both");
    assert_eq!(error.reason(), Reason::SizesDisagree, "{error}");
    san.sim.resize_lun(&second(), lun(101), 2 * GIB);
    let now = san.connector.measure(&r.owner, &r.source, None).await.expect("measured");
    assert_eq!((now.before, now.now), (GIB, 2 * GIB));
    let grown = san.connector.grow(&r.owner, &r.source, now.now).await.expect("grown");
    assert!(grown.changed());
    assert_eq!(grown.into_inner().device.size, 2 * GIB);
    assert_eq!(san.attach(&r).await.device.paths, 4);
}

#[tokio::test(start_paused = true)]
async fn records_of_all_targets_that_outlive_a_boot_are_known_again() {
    let san = san();
    let r = wants("a", both(1, false));
    san.attach(&r).await;
    san.sim.reboot();
    assert_eq!(san.count("record"), 4);
    let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
    let san = San { sim: san.sim, connector };
    let options = DetachOptions::default();
    assert!(san.connector.detach(&r.owner, &r.source, options).await.expect("detached").changed());
    assert_eq!((san.count("record"), san.count("run")), (0, 0));
}

/// What was begun of a volume is known by each of its targets, whichever was the last to be noted.
#[tokio::test(start_paused = true)]
async fn a_detach_that_was_cut_off_between_two_leases_goes_on() {
    for skip in 0..3 {
        let san = san();
        let before = san.sim.snapshot();
        let r = wants("a", both(1, false));
        san.attach(&r).await;
        // The claim is taken back first; then a lease is left.
        let cut = Fault {
            skip,
            times: Some(1),
            ..fault("rundir.lock", "lease-iscsi", FaultAction::Fail("cut off".into()))
        };
        san.sim.faults().inject(cut);
        let options = DetachOptions::default();
        san.connector.detach(&r.owner, &r.source, options).await.expect_err("cut off");
        san.sim.faults().clear();
        leave(&san, &r).await;
        assert_eq!(san.sim.snapshot(), before, "cut off at {skip}");
    }
}
