//! Initiator names and iface records of a volume's own.

use super::*;
use crate::types::Iface;

fn vm_name(n: u8) -> Iqn {
    format!("iqn.2026-01.example.vm:{n}").parse().expect("iqn")
}

/// LUN `n` as the initiator `name` sees it.
fn by(volume: &str, n: u64, name: &Iqn) -> AttachRequest {
    by_iface(volume, n, Iface { initiator: Some(name.clone()), ..Iface::default() })
}

fn by_iface(volume: &str, n: u64, iface: Iface) -> AttachRequest {
    let mut r = request(volume, n, &[2, 3]);
    let Source::Iscsi(source) = &mut r.source else { panic!("of iSCSI") };
    source.iface = iface;
    r
}

async fn leave(san: &San, r: &AttachRequest) {
    let options = DetachOptions::default();
    san.connector.detach(&r.owner, &r.source, options).await.expect("detached");
    san.connector.settled().await;
}

fn initiators(san: &San) -> Vec<String> {
    let lines = san.sim.snapshot();
    let own = lines.lines().filter_map(|l| l.strip_prefix("iface lunplug-"));
    own.filter_map(|l| l.split(' ').nth(1).map(str::to_owned)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_target_that_admits_one_initiator_alone_is_logged_in_to_by_its_name() {
    let san = San::new();
    san.sim.set_initiators(&target(), &[vm_name(1)]);
    let before = san.sim.snapshot();
    let refused = san.refused(&request("a", 1, &[2, 3])).await;
    assert_eq!(refused.reason(), Reason::LoginRefused);
    assert_eq!(san.refused(&by("a", 1, &vm_name(2))).await.reason(), Reason::LoginRefused);
    let r = by("a", 1, &vm_name(1));
    let got = san.attach(&r).await;
    assert_eq!((got.device.paths, got.device.wwid.clone()), (2, wwid(1)));
    assert_eq!(initiators(&san), [vm_name(1).to_string()]);
    assert!(!san.connector.attach(&r).await.expect("attached").changed());
    assert_eq!(san.connector.observe(&r.owner, &r.source).await.expect("read"), Some(got));
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn each_initiator_has_sessions_of_its_own_and_volumes_of_one_share_them() {
    let san = San::new();
    let before = san.sim.snapshot();
    let (a, b) = (by("a", 1, &vm_name(1)), by("b", 2, &vm_name(1)));
    let c = by("c", 3, &vm_name(2));
    for r in [&a, &b, &c] {
        san.attach(r).await;
    }
    san.attach(&request("d", 4, &[2, 3])).await;
    assert_eq!((san.count("session"), san.count("record"), initiators(&san).len()), (6, 6, 2));
    // The same LUN by another name is still the same LUN.
    let again = san.connector.attach(&by("e", 1, &vm_name(2))).await.expect_err("held");
    assert_eq!(again.reason(), Reason::SourceInUse);
    san.connector.settled().await;
    leave(&san, &a).await;
    assert_eq!((san.count("session"), initiators(&san).len()), (6, 2));
    san.detach("d", 4, &[2, 3]).await.expect("detached");
    assert_eq!((san.count("session"), san.count("disk")), (4, 4));
    leave(&san, &c).await;
    assert_eq!(initiators(&san), [vm_name(1).to_string()]);
    leave(&san, &b).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn two_initiators_have_records_beside_each_other_whoever_comes_first() {
    for own_first in [true, false] {
        let san = San::new();
        let before = san.sim.snapshot();
        let (own, node) = (by("own", 1, &vm_name(1)), request("node", 2, &[2, 3]));
        let (first, second) = if own_first { (&own, &node) } else { (&node, &own) };
        san.attach(first).await;
        let since = san.connector.doors.commands.started();
        san.attach(second).await;
        // As beside another's records: three a portal, and the tag is known.
        assert!(san.connector.doors.commands.started() - since <= 6);
        assert_eq!((san.count("session"), san.count("record")), (4, 4));
        assert!(
            san.sim.snapshot().lines().all(|l| !l.starts_with("record ") || l.contains("group"))
        );
        leave(&san, first).await;
        assert_eq!((san.count("session"), san.count("record")), (2, 2));
        leave(&san, second).await;
        assert_eq!(san.sim.snapshot(), before);
    }
}

/// open-iscsi has room for one record without a portal group tag, and loses it to the next.
#[tokio::test(start_paused = true)]
async fn anothers_record_without_a_tag_is_left_and_its_portal_not_used() {
    let san = San::new();
    san.sim.add_untagged_record(&target(), portal(2), "eth7");
    let before = san.sim.snapshot();
    for r in [request("a", 1, &[2, 3]), by("a", 1, &vm_name(1))] {
        assert_eq!(san.attach(&r).await.device.paths, 1, "by the other portal");
        leave(&san, &r).await;
        assert_eq!(san.sim.snapshot(), before);
    }
    let error = san.refused(&request("a", 1, &[2])).await;
    assert_eq!(error.reason(), Reason::Unsupported);
    assert!(error.to_string().contains("by iface eth7, without a portal group tag"), "{error}");
    // Where the target tells nobody its tags there is still room for one.
    let silent = FaultAction::Fail("exit 8".into());
    san.sim.faults().inject(fault("cmd.run", "discovery", silent));
    let r = AttachRequest { ..by("a", 1, &vm_name(1)) };
    assert_eq!(san.attach(&r).await.device.paths, 1);
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn an_iface_of_the_nodes_is_used_and_left() {
    let san = San::new();
    let eth1 = Iface { name: "eth1".parse().expect("iface"), initiator: None };
    let r = by_iface("a", 1, eth1.clone());
    let error = san.refused(&r).await;
    assert_eq!(error.reason(), Reason::IfaceNotFound);
    assert!(crate::connector::error::chain(&error).contains("eth1"), "{error}");
    san.sim.add_iface(&eth1.name);
    // Somebody's session through another iface is not taken for it.
    san.sim.add_session(&target(), portal(2), "default");
    let before = san.sim.snapshot();
    assert_eq!(san.attach(&r).await.device.paths, 2);
    assert_eq!(san.count("session"), 3);
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn credentials_are_written_into_the_record_of_that_initiator() {
    let san = San::new();
    san.sim.set_chap(&target(), Some(chap("a secret")));
    san.sim.add_record(&target(), portal(2), "default");
    let before = san.sim.snapshot();
    let authentication = Authentication::Chap(chap("a secret"));
    let r = AttachRequest { authentication, ..by("a", 1, &vm_name(1)) };
    assert_eq!(san.attach(&r).await.device.paths, 2);
    let theirs = san.sim.record_setting(&target(), portal(2), "node.session.auth.password");
    assert_eq!(theirs, None);
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn it_costs_one_program_more() {
    let san = San::new();
    let started = || san.connector.doors.commands.started();
    let since = started();
    let r = by("a", 1, &vm_name(1));
    san.attach(&r).await;
    // The portal group's tag has to be asked for.
    assert!(started() - since <= 5);
    let since = started();
    leave(&san, &r).await;
    assert!(started() - since <= 2);
}

#[tokio::test(start_paused = true)]
async fn after_a_kill_at_any_step_nothing_is_left_of_the_record() {
    for point in ["cmd.run", "rundir.store", "rundir.remove", "iscsidb.iface", "iscsidb.records"] {
        for (skip, attached) in (0..16).flat_map(|skip| [(skip, false), (skip, true)]) {
            let san = San::new();
            let before = san.sim.snapshot();
            let r = by("a", 1, &vm_name(1));
            if attached {
                san.attach(&r).await;
            }
            let stop = Fault { skip, times: Some(1), ..fault(point, "", FaultAction::Hang) };
            san.sim.faults().inject(stop);
            // Shorter than any deadline: the call hangs, and the daemon is killed meanwhile.
            let short = Duration::from_millis(900);
            if attached {
                let options = DetachOptions::default();
                let detach = san.connector.detach(&r.owner, &r.source, options);
                let _ = tokio::time::timeout(short, detach).await;
            } else {
                let _ = tokio::time::timeout(short, san.connector.attach(&r)).await;
            }
            san.connector.settled().await;
            san.sim.faults().clear();
            let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
            let san = San { sim: san.sim, connector };
            san.connector.sweep().await.expect("swept");
            leave(&san, &r).await;
            assert_eq!(san.sim.snapshot(), before, "{point} {skip} {attached}");
        }
    }
}

/// Found by the random walk: the node loses its power between the making of a record and its settings.
#[tokio::test(start_paused = true)]
async fn a_record_that_a_power_cut_left_without_its_mark_is_ours_by_its_iface() {
    for skip in 0..8 {
        let san = San::new();
        let before = san.sim.snapshot();
        let r = by("a", 1, &vm_name(1));
        let stop = Fault { skip, times: Some(1), ..fault("cmd.run", "", FaultAction::Hang) };
        san.sim.faults().inject(stop);
        let attach = san.connector.attach(&r);
        let _ = tokio::time::timeout(Duration::from_millis(900), attach).await;
        san.sim.reboot();
        san.sim.faults().clear();
        let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
        let san = San { sim: san.sim, connector };
        san.connector.sweep().await.expect("swept");
        san.attach(&r).await;
        // Nothing but the one LUN was scanned for.
        assert_eq!(san.count("disk"), 2, "{skip}");
        leave(&san, &r).await;
        let left: Vec<String> = san.sim.snapshot().lines().map(str::to_owned).collect();
        // multipath remembers across boots what it saw.
        let left: Vec<&String> =
            left.iter().filter(|l| !l.starts_with("wwid ") && !l.starts_with("binding ")).collect();
        assert_eq!(left, before.lines().collect::<Vec<_>>(), "{skip}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_nobody_knows_of_any_more_is_swept() {
    let san = San::new();
    let before = san.sim.snapshot();
    let r = by("a", 1, &vm_name(1));
    san.attach(&r).await;
    san.sim.reboot();
    let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
    let san = San { sim: san.sim, connector };
    // Its node records still go by it.
    san.connector.sweep().await.expect("swept");
    assert_eq!(initiators(&san).len(), 1);
    san.attach(&r).await;
    leave(&san, &r).await;
    assert_eq!(san.sim.snapshot(), before);
    let Source::Iscsi(source) = &r.source else { panic!("of iSCSI") };
    let put = san.connector.doors.iscsidb.put_iface(&source.iface).await.expect("put");
    assert!(put.changed());
    san.connector.sweep().await.expect("swept");
    assert_eq!(san.sim.snapshot(), before);
}
