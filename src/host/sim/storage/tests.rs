//! What the simulated storage promises to those who run on it.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::host::block::{Blocks, Exclusive};
use crate::host::cmd::{CmdError, Commands, Output};
use crate::host::iscsidb::{IscsiDb, Record};
use crate::host::multipathd::{Multipathd, MultipathdError};
use crate::host::sim::{Fault, FaultAction};
use crate::host::sysfs::{Guard, Guarded, Sysfs};
use crate::host::uevent::{Notice, Uevents};
use crate::types::{Outcome, Wwid};

const IQN: &str = "iqn.2026-01.example.array:t1";
const A: &str = "127.0.0.2:3260";
const B: &str = "127.0.0.3:3260";

fn iqn() -> Iqn {
    IQN.parse().unwrap()
}

fn portal(text: &str) -> Portal {
    text.parse().unwrap()
}

fn lun(n: u64) -> Lun {
    Lun::try_from(n).unwrap()
}

fn wwid(n: u32) -> Wwid {
    format!("naa.6001405{n:025x}").parse().unwrap()
}

fn sim() -> SimStorage {
    let sim = SimStorage::new(Arc::default());
    sim.add_target(&iqn(), &[portal(A), portal(B)]);
    sim.add_lun(&iqn(), lun(1), SimLun::new(wwid(1), 1 << 30));
    sim
}

async fn iscsiadm(sim: &SimStorage, args: &str) -> Output {
    let args: Vec<&str> = args.split_whitespace().collect();
    sim.run(Tool::Iscsiadm, &args, Duration::from_secs(60)).await.unwrap()
}

async fn code(sim: &SimStorage, args: &str) -> i32 {
    iscsiadm(sim, args).await.code.unwrap()
}

/// Logs in at a portal with scan=manual and returns the host's number.
async fn login(sim: &SimStorage, portal: &str) -> u32 {
    assert_eq!(code(sim, &format!("-m node -T {IQN} -p {portal} -o new")).await, 0);
    let at = portal.parse().unwrap();
    let manual = [("node.session.scan", "manual".to_owned())];
    sim.set(&IQN.parse().unwrap(), at, &manual, None).await.unwrap();
    assert_eq!(code(sim, &format!("-m node -T {IQN} -p {portal} --login")).await, 0);
    sim.world().sessions.values().last().unwrap().host
}

async fn scan(sim: &SimStorage, host: u32, lun: u64) {
    sim.write(&format!("class/scsi_host/host{host}/scan"), &format!("0 0 {lun}")).await.unwrap();
}

async fn text(sim: &SimStorage, path: &str) -> String {
    sim.text(path).await.unwrap().unwrap_or_else(|| panic!("{path} is not there"))
}

async fn dev(sim: &SimStorage, name: &str) -> DevNum {
    text(sim, &format!("class/block/{name}/dev")).await.parse().unwrap()
}

#[tokio::test]
async fn a_login_and_a_scan_make_a_disk_shaped_as_the_kernels() {
    let sim = sim();
    let host = login(&sim, A).await;
    assert_eq!(text(&sim, "class/iscsi_session/session1/targetname").await, IQN);
    assert_eq!(text(&sim, "class/iscsi_session/session1/state").await, "LOGGED_IN");
    let conn = "class/iscsi_connection/connection1:0";
    assert_eq!(text(&sim, &format!("{conn}/persistent_address")).await, "127.0.0.2");
    assert_eq!(text(&sim, &format!("{conn}/persistent_port")).await, "3260");
    assert!(sim.list("class/scsi_device").await.unwrap().is_empty(), "scan is manual");

    scan(&sim, host, 1).await;
    assert_eq!(
        sim.resolve("class/block/sda").await.unwrap(),
        "devices/platform/host2/session1/target2:0:0/2:0:0:1/block/sda"
    );
    assert_eq!(
        sim.resolve("dev/block/8:0").await.unwrap(),
        sim.resolve("block/sda").await.unwrap()
    );
    assert_eq!(text(&sim, "class/scsi_device/2:0:0:1/device/wwid").await, wwid(1).as_str());
    assert_eq!(text(&sim, "class/block/sda/size").await, "2097152");
    assert_eq!(sim.list("class/scsi_device/2:0:0:1/device/block").await.unwrap(), ["sda"]);
    assert!(sim.read("class/scsi_device/2:0:0:1/device/delete").await.is_err());
}

#[tokio::test]
async fn events_come_in_the_kernels_order_to_those_who_subscribed() {
    let sim = sim();
    let host = login(&sim, A).await;
    let mut events = sim.subscribe();
    scan(&sim, host, 1).await;
    let mut seen = Vec::new();
    while seen.len() < 7 {
        let Notice::Event(e) = events.next().await else { panic!("nothing was lost") };
        seen.push(format!(
            "{} {} {}",
            e.action,
            e.subsystem,
            e.devpath.rsplit('/').next().unwrap()
        ));
    }
    assert_eq!(
        seen,
        [
            "add scsi target2:0:0",
            "add scsi 2:0:0:1",
            "add scsi_device 2:0:0:1",
            "add block sda",
            "bind scsi 2:0:0:1",
            "add block dm-0",
            "change block dm-0"
        ]
    );
}

#[tokio::test]
async fn names_and_numbers_are_reused_and_diskseq_is_not() {
    let sim = sim();
    sim.set_multipathd(false);
    sim.add_lun(&iqn(), lun(2), SimLun::new(wwid(2), 1 << 20));
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    scan(&sim, host, 2).await;
    let seq = text(&sim, "class/block/sda/diskseq").await;
    sim.write("class/scsi_device/2:0:0:1/device/delete", "1").await.unwrap();
    assert!(sim.text("class/block/sda/dev").await.unwrap().is_none());
    scan(&sim, host, 1).await;
    assert_eq!(dev(&sim, "sda").await.to_string(), "8:0");
    assert_ne!(text(&sim, "class/block/sda/diskseq").await, seq);
}

#[tokio::test]
async fn a_scan_does_not_look_anew_at_a_lun_that_is_known() {
    let sim = sim();
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    sim.replace_lun(&iqn(), lun(1), SimLun::new(wwid(9), 1 << 21));
    scan(&sim, host, 1).await;
    let wwid_path = "class/scsi_device/2:0:0:1/device/wwid";
    assert_eq!(text(&sim, wwid_path).await, wwid(1).as_str());
    sim.write("class/scsi_device/2:0:0:1/device/rescan", "1").await.unwrap();
    assert_eq!(text(&sim, wwid_path).await, wwid(9).as_str());
    assert_eq!(text(&sim, "class/block/sda/size").await, "4096");

    sim.remove_lun(&iqn(), lun(1));
    scan(&sim, host, 1).await;
    assert_eq!(text(&sim, wwid_path).await, wwid(9).as_str(), "the stale device stays");
    sim.write("class/scsi_device/2:0:0:1/device/rescan", "1").await.unwrap();
    assert_eq!(text(&sim, wwid_path).await, wwid(9).as_str(), "old pages are kept");
    assert_eq!(text(&sim, "class/block/sda/size").await, "0");
}

#[tokio::test]
async fn a_lun_that_is_not_exported_makes_no_disk_and_no_noise() {
    let sim = sim();
    let host = login(&sim, A).await;
    scan(&sim, host, 7).await;
    assert!(sim.list("class/scsi_device").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_lun_above_255_is_scanned_in_flat_addressing() {
    let sim = sim();
    sim.add_lun(&iqn(), lun(256), SimLun::new(wwid(3), 1 << 20));
    let host = login(&sim, A).await;
    scan(&sim, host, 16640).await;
    assert_eq!(sim.list("class/scsi_device").await.unwrap(), ["2:0:0:16640"]);
}

#[tokio::test]
async fn a_guarded_delete_touches_only_the_device_that_was_meant() {
    let sim = sim();
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    let guard = |expect: &str| Guard {
        path: "class/scsi_device/2:0:0:1/device/wwid".into(),
        expect: expect.into(),
    };
    let delete = "class/scsi_device/2:0:0:1/device/delete";
    let refused = sim.write_guarded(delete, "1", &[guard("naa.6001405f")]).await.unwrap();
    assert!(matches!(refused, Guarded::Refused { found: Some(w), .. } if w == wwid(1).as_str()));
    assert!(sim.text("class/block/sda/dev").await.unwrap().is_some());
    let done = sim.write_guarded(delete, "1", &[guard(wwid(1).as_str())]).await.unwrap();
    assert_eq!(done, Guarded::Written { gone: true });
    assert!(sim.text("class/block/sda/dev").await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn iscsiadm_ends_with_open_iscsis_codes() {
    let sim = sim();
    sim.set_multipathd(false);
    let node = format!("-m node -T {IQN} -p {A}");
    assert_eq!(code(&sim, &format!("{node} --login")).await, 21, "no record");
    assert_eq!(code(&sim, &format!("{node} -o delete")).await, 21);
    assert_eq!(code(&sim, &format!("{node} --logout")).await, 21);
    assert_eq!(code(&sim, "-m session").await, 21);
    assert_eq!(code(&sim, &format!("{node} -o new")).await, 0);
    for (state, expected) in [
        (PortalState::Dead, 8),
        (PortalState::Refusing, 4),
        (PortalState::Denied, 24),
        (PortalState::Alive, 0),
        (PortalState::Alive, 15),
    ] {
        sim.set_portal(portal(A), state);
        assert_eq!(code(&sim, &format!("{node} --login")).await, expected, "{state:?}");
    }
    assert_eq!(code(&sim, &format!("{node} -o delete")).await, 15, "a session uses it");
    let shown = iscsiadm(&sim, &format!("{node} -o show")).await.stdout;
    assert!(shown.contains(&format!("node.name = {IQN}\n")));
    assert_eq!(code(&sim, &format!("{node} --logout")).await, 0);
    assert_eq!(code(&sim, &format!("{node} -o delete")).await, 0);
    assert_eq!(sim.snapshot(), "");

    let other = format!("-m node -T iqn.2026-01.example.array:other -p {A}");
    assert_eq!(code(&sim, &format!("{other} -o new")).await, 0);
    assert_eq!(code(&sim, &format!("{other} --login")).await, 19, "the portal has no such target");
    sim.corrupt_record(&iqn(), portal(B), "default");
    assert_eq!(code(&sim, &format!("-m node -T {IQN} -p {B} -o new")).await, 6);
}

#[tokio::test(start_paused = true)]
async fn what_iscsid_does_late_is_done_although_the_caller_gave_up() {
    let sim = sim();
    sim.set_portal(portal(A), PortalState::Dead);
    assert_eq!(code(&sim, &format!("-m node -T {IQN} -p {A} -o new")).await, 0);
    let args = ["-m", "node", "-T", IQN, "-p", A, "--login"];
    let gave_up = sim.run(Tool::Iscsiadm, &args, Duration::from_secs(1)).await;
    assert!(matches!(gave_up, Err(CmdError::TimedOut { .. })));
    sim.set_portal(portal(A), PortalState::Alive);
    let mut events = sim.subscribe();
    while !matches!(events.next().await, Notice::Event(e) if e.subsystem == "iscsi_session") {}
    assert!(sim.snapshot().contains("LOGGED_IN"));
}

#[tokio::test]
async fn two_paths_are_one_map_that_only_del_map_removes() {
    let sim = sim();
    let before = sim.snapshot();
    for portal in [A, B] {
        let host = login(&sim, portal).await;
        scan(&sim, host, 1).await;
    }
    let uuid = format!("mpath-{}", wwid(1).multipath());
    assert_eq!(text(&sim, "class/block/dm-0/dm/uuid").await, uuid);
    assert_eq!(text(&sim, "class/block/dm-0/dm/name").await, "mpatha");
    assert_eq!(sim.list("class/block/dm-0/slaves").await.unwrap(), ["sda", "sdb"]);
    assert_eq!(sim.list("class/block/sda/holders").await.unwrap(), ["dm-0"]);
    let paths = sim.ask("show paths raw format \"%d %w %m\"").await.unwrap();
    assert_eq!(paths.lines().count(), 2);
    assert!(paths.starts_with(&format!("sda {} mpatha\n", wwid(1).multipath())));

    let map = dev(&sim, "dm-0").await;
    assert_eq!(sim.exclusive(map).await.unwrap(), Exclusive::Free);
    assert_eq!(sim.exclusive(dev(&sim, "sda").await).await.unwrap(), Exclusive::Held);
    sim.open(map, "qemu[42]");
    assert!(matches!(sim.ask("del map mpatha").await, Err(MultipathdError::Refused { .. })));
    assert_eq!(sim.openers(&[map]).await.unwrap(), [["qemu[42]"]]);
    sim.release(map);
    for hctl in ["2:0:0:1", "3:0:0:1"] {
        sim.write(&format!("class/scsi_device/{hctl}/device/delete"), "1").await.unwrap();
    }
    assert!(sim.list("class/block/dm-0/slaves").await.unwrap().is_empty(), "it outlives its paths");
    sim.ask(&format!("del map {}", wwid(1).multipath())).await.unwrap();
    assert_eq!(sim.forget(&wwid(1)).await.unwrap(), Outcome::Done(()));
    assert_eq!(sim.forget(&wwid(1)).await.unwrap(), Outcome::Already(()));
    assert_eq!(code(&sim, &format!("-m node -T {IQN} --logout")).await, 0);
    assert_eq!(code(&sim, &format!("-m node -T {IQN} -o delete")).await, 0);
    assert_eq!(sim.snapshot(), before);
}

#[tokio::test]
async fn multipathd_may_be_late_or_not_run() {
    let sim = sim();
    sim.set_multipathd_auto(false);
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    assert!(sim.text("class/block/dm-0/dev").await.unwrap().is_none());
    sim.ask("add path sda").await.unwrap();
    assert_eq!(sim.list("class/block/dm-0/slaves").await.unwrap(), ["sda"]);
    sim.set_multipathd(false);
    assert!(matches!(sim.ask("show daemon").await, Err(MultipathdError::NotRunning)));
}

#[tokio::test]
async fn a_dead_portal_fails_the_session_and_the_flush() {
    let sim = sim();
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    let map = dev(&sim, "dm-0").await;
    sim.flush(map).await.unwrap();
    sim.set_portal(portal(A), PortalState::Dead);
    assert_eq!(text(&sim, "class/iscsi_session/session1/state").await, "FAILED");
    assert_eq!(text(&sim, "class/block/sda/device/state").await, "transport-offline");
    assert!(sim.flush(map).await.is_err());
    sim.set_portal(portal(A), PortalState::Alive);
    sim.flush(map).await.unwrap();
}

#[tokio::test]
async fn a_stacked_device_is_a_holder() {
    let sim = sim();
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    let map = dev(&sim, "dm-0").await;
    let lvm = sim.stack_dm(map, "vg-lv", "LVM-abc");
    assert_eq!(sim.list("class/block/dm-0/holders").await.unwrap(), ["dm-1"]);
    assert_eq!(sim.exclusive(map).await.unwrap(), Exclusive::Held);
    assert!(sim.unstack_dm(lvm));
    assert_eq!(sim.exclusive(map).await.unwrap(), Exclusive::Free);
}

#[tokio::test]
async fn a_device_leads_to_its_lun() {
    let sim = sim();
    let host = login(&sim, A).await;
    scan(&sim, host, 1).await;
    let map = dev(&sim, "dm-0").await;
    assert_eq!(sim.lun_of(map), Some((iqn(), lun(1))));
    sim.write_data(&iqn(), lun(1), b"pattern");
    assert_eq!(sim.data(&iqn(), lun(1)), b"pattern");
}

#[tokio::test(start_paused = true)]
async fn the_run_directory_is_shared_and_void_after_a_reboot() {
    let sim = sim();
    let (one, two) = (sim.rundir(), sim.clone().rundir());
    let held = one.lock("locks/t1", Duration::ZERO).await.unwrap();
    assert!(two.lock("locks/t1", Duration::from_secs(1)).await.is_err());
    drop(held);
    two.lock("locks/t1", Duration::from_secs(1)).await.unwrap();
    one.store("lease/a", b"1").await.unwrap();
    assert_eq!(two.list("lease").await.unwrap(), ["a"]);
    assert!(one.store("../x", b"").await.is_err());
    sim.add_untagged_record(&iqn(), portal(A), "default");
    sim.add_session(&iqn(), portal(A), "default");
    sim.reboot();
    assert_eq!(sim.snapshot(), format!("record {IQN} {A} default\n"));
    assert_ne!(sim.rundir().boot_id(), one.boot_id());
    assert_eq!(sim.rundir().load("lease/a").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_write_that_hangs_times_out_and_one_that_stalls_is_done_late() {
    let sim = sim();
    let host = login(&sim, A).await;
    sim.faults().inject(Fault {
        point: "sysfs.write".into(),
        detail: "scan".into(),
        skip: 0,
        times: Some(1),
        action: FaultAction::Stall,
    });
    let scan = format!("class/scsi_host/host{host}/scan");
    let late = sim.write(&scan, "0 0 1").await.unwrap_err();
    assert_eq!(late.kind(), std::io::ErrorKind::TimedOut);
    let mut events = sim.subscribe();
    sim.faults().clear();
    while !matches!(events.next().await, Notice::Event(e) if e.subsystem == "block") {}
    assert!(sim.text("class/block/sda/dev").await.unwrap().is_some());
}

#[tokio::test]
async fn records_are_read_and_removed_as_they_were_seen() {
    let sim = sim();
    sim.add_record(&iqn(), portal(A), "default");
    sim.corrupt_record(&iqn(), portal(B), "default");
    let records = sim.records(&iqn()).await.unwrap();
    assert_eq!(records.iter().map(|r| r.corrupt).collect::<Vec<_>>(), [false, true]);
    let lie = Record { corrupt: true, ..records[0].clone() };
    assert!(IscsiDb::remove(&sim, &iqn(), &lie).await.is_err());
    assert_eq!(sim.records(&iqn()).await.unwrap().len(), 2);
    for record in &records {
        IscsiDb::remove(&sim, &iqn(), record).await.unwrap();
    }
    assert!(sim.records(&iqn()).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_look_is_kept_by_a_read_that_is_and_sees_what_is_there_afterwards() {
    let sim = sim();
    let kept = |action| Fault {
        point: "sysfs.read".into(),
        detail: "persistent_port".into(),
        skip: 0,
        times: Some(1),
        action,
    };
    let sysfs: &dyn Sysfs = &sim;
    let sessions = || {
        sysfs.look("class/iscsi_session", |view| {
            let names = view.entries("class/iscsi_session")?;
            let port = |name: &String| {
                let number = name.trim_start_matches("session");
                view.text(&format!("class/iscsi_connection/connection{number}:0/persistent_port"))
            };
            names.iter().map(port).collect::<Result<Vec<_>, _>>()
        })
    };
    login(&sim, A).await;
    sim.faults().inject(kept(FaultAction::Hang));
    let late = sessions().await.unwrap_err();
    assert_eq!(late.source.kind(), std::io::ErrorKind::TimedOut);
    sim.faults().inject(kept(FaultAction::Stall));
    let cleared = async {
        sim.faults().meeting().await;
        login(&sim, B).await;
        sim.faults().clear();
    };
    let (seen, ()) = tokio::join!(sessions(), cleared);
    assert_eq!(seen.unwrap(), [Some("3260".to_owned()), Some("3260".to_owned())]);
    sim.faults().inject(kept(FaultAction::Fail("no".into())));
    let failed = sessions().await.unwrap_err();
    assert!(failed.path.ends_with("persistent_port"), "{failed}: {}", failed.source);
}
