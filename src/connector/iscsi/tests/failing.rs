//! What fails, hangs or is killed, and what is left of it: nothing.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_failed_flush_stops_the_detach_unless_forced() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.attach(&request("a", 1, &[2, 3])).await;
    let attached = san.sim.snapshot();
    san.sim.faults().inject(fault("blocks.flush", "", FaultAction::Fail("EIO".into())));
    let error = san.detach("a", 1, &[2, 3]).await.expect_err("stopped");
    assert_eq!(error.reason(), Reason::FlushFailed);
    assert_eq!(san.sim.snapshot(), attached);
    san.sim.faults().clear();
    san.sim.set_portal(portal(2), PortalState::Dead);
    san.sim.set_portal(portal(3), PortalState::Dead);
    assert_eq!(san.detach("a", 1, &[2, 3]).await.expect_err("dead").reason(), Reason::FlushFailed);
    let force = DetachOptions { force: true, ..DetachOptions::default() };
    let r = request("a", 1, &[2, 3]);
    san.connector.detach(&r.owner, &r.source, force).await.expect("forced");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_map_that_is_held_open_after_its_revoke_only_gives_errors() {
    let san = San::new();
    let before = san.sim.snapshot();
    let dev = san.attach(&request("a", 1, &[2, 3])).await.device.dev;
    san.sim.open(dev, "dd[7]");
    for _ in 0..2 {
        let error = san.detach("a", 1, &[2, 3]).await.expect_err("held");
        assert_eq!(error.reason(), Reason::DeviceHeld);
        assert!(error.to_string().contains("dd[7]"), "{error}");
        let now = san.sim.snapshot();
        assert!(now.contains("[] error"), "the map has no path and only gives errors: {now}");
        assert!(!now.contains(":0:0:1 "), "the paths are gone: {now}");
        assert_eq!(san.connector.owners().await.expect("read"), [owner("a")], "not forgotten");
    }
    san.sim.release(dev);
    san.detach("a", 1, &[2, 3]).await.expect("let go of");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn what_the_host_stacked_on_a_map_is_not_broken() {
    let san = San::new();
    let dev = san.attach(&request("a", 1, &[2, 3])).await.device.dev;
    let attached = san.sim.snapshot();
    let stacked = san.sim.stack_dm(dev, "vg-root", "LVM-x");
    let error = san.detach("a", 1, &[2, 3]).await.expect_err("held");
    assert_eq!(error.reason(), Reason::DeviceHeld);
    assert!(san.sim.unstack_dm(stacked));
    assert_eq!(san.sim.snapshot(), attached);
}

#[tokio::test(start_paused = true)]
async fn calls_that_never_return_meet_their_deadline() {
    for (point, detail, reason) in [
        ("sysfs.write", "scan", Reason::DeadlineExceeded),
        ("cmd.run", "--login", Reason::DeadlineExceeded),
        ("iscsid", "login", Reason::DeadlineExceeded),
        ("multipathd.ask", "show daemon", Reason::MapFailed),
        ("cmd.run", "-o new", Reason::DeadlineExceeded),
        ("iscsidb.records", "", Reason::DeadlineExceeded),
        ("blocks.openers", "", Reason::DeadlineExceeded),
        ("rundir.lock", "targets/", Reason::DeadlineExceeded),
        ("sysfs.read", "vpd_pg83", Reason::DeadlineExceeded),
    ] {
        let san = San::new();
        let before = san.sim.snapshot();
        san.sim.faults().inject(fault(point, detail, FaultAction::Hang));
        let r = request("a", 1, &[2, 3]);
        let error = san.connector.attach(&r).await.expect_err("no end");
        assert_eq!(error.reason(), reason, "{point} {detail}: {error}");
        san.connector.settled().await;
        san.sim.faults().clear();
        san.detach("a", 1, &[2, 3]).await.expect("cleaned up");
        assert_eq!(san.sim.snapshot(), before, "{point} {detail}");
    }
}

#[tokio::test(start_paused = true)]
async fn one_hanging_scan_does_not_hold_up_the_other_path() {
    let san = San::new();
    san.sim.faults().inject(fault("sysfs.write", "host3/scan", FaultAction::Hang));
    let begin = tokio::time::Instant::now();
    let got = san.attach(&request("a", 1, &[2, 3])).await;
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert_eq!(got.device.paths, 1);
}

/// Fails each effect in turn, at every door, and looks that nothing is left.
#[tokio::test(start_paused = true)]
async fn whatever_fails_nothing_is_left() {
    for (point, detail) in [
        ("cmd.run", "-o new"),
        ("iscsidb.set", ""),
        ("cmd.run", "--login"),
        ("sysfs.write", "scan"),
        ("sysfs.read", "vpd_pg83"),
        ("rundir.store", "claims/"),
        ("rundir.store", "leases/"),
        ("multipathd.ask", "add path"),
        ("blocks.openers", ""),
    ] {
        for skip in 0..6 {
            let san = San::new();
            let before = san.sim.snapshot();
            let fail = FaultAction::Fail("exit 6".into());
            san.sim.faults().inject(Fault { skip, times: Some(1), ..fault(point, detail, fail) });
            let r = request("a", 1, &[2, 3]);
            let got = san.connector.attach(&r).await;
            san.connector.settled().await;
            san.sim.faults().clear();
            if got.is_ok() || matches!(got, Err(Error::Undo { .. })) {
                san.detach("a", 1, &[2, 3]).await.expect("detached");
            }
            assert_eq!(san.sim.snapshot(), before, "{point} {detail} {skip}: {got:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_a_scan_brings_long_after_it_was_given_up_is_removed() {
    let san = San::new();
    san.attach(&request("keeper", 2, &[2, 3])).await;
    let before = san.sim.snapshot();
    san.sim.faults().inject(fault("sysfs.write", "host3/scan", FaultAction::Stall));
    assert_eq!(san.attach(&request("a", 1, &[2, 3])).await.device.paths, 1);
    tokio::time::sleep(Duration::from_secs(30)).await;
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
    san.sim.faults().clear();
    san.connector.settled().await;
    assert_eq!(san.sim.snapshot(), before);
}

/// Ends the attach at each step as a kill does, and looks that a new daemon's detach cleans up.
#[tokio::test(start_paused = true)]
async fn after_a_kill_at_any_step_a_detach_leaves_nothing() {
    for point in
        ["cmd.run", "sysfs.write", "sysfs.read", "rundir.store", "multipathd.ask", "blocks.openers"]
    {
        for skip in 0..40 {
            let san = San::new();
            let before = san.sim.snapshot();
            let stop = Fault { skip, times: Some(1), ..fault(point, "", FaultAction::Hang) };
            san.sim.faults().inject(stop);
            let r = request("a", 1, &[2, 3]);
            // Shorter than any deadline: the call hangs, and the daemon is killed meanwhile.
            let attach = san.connector.attach(&r);
            let ended = tokio::time::timeout(Duration::from_millis(900), attach).await;
            san.connector.settled().await;
            san.sim.faults().clear();
            let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
            let san = San { sim: san.sim, connector };
            san.connector.sweep().await.expect("swept");
            san.detach("a", 1, &[2, 3]).await.expect("detached");
            assert_eq!(san.sim.snapshot(), before, "{point} {skip} {ended:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_detach_that_was_killed_at_any_step_is_finished_by_the_next() {
    for point in [
        "cmd.run",
        "sysfs.write",
        "sysfs.read",
        "rundir.store",
        "rundir.remove",
        "multipathd.ask",
        "multipathd.forget",
        "blocks.flush",
    ] {
        for skip in 0..40 {
            let san = San::new();
            let before = san.sim.snapshot();
            san.attach(&request("a", 1, &[2, 3])).await;
            let stop = Fault { skip, times: Some(1), ..fault(point, "", FaultAction::Hang) };
            san.sim.faults().inject(stop);
            let ended =
                tokio::time::timeout(Duration::from_millis(900), san.detach("a", 1, &[2, 3])).await;
            san.connector.settled().await;
            san.sim.faults().clear();
            let connector = Arc::new(Luns::new(StorageDoors::sim(&san.sim), Settings::default()));
            let san = San { sim: san.sim, connector };
            san.detach("a", 1, &[2, 3]).await.expect("detached");
            assert_eq!(san.sim.snapshot(), before, "{point} {skip} {ended:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lun_that_the_array_took_away_or_swapped_needs_force_to_go() {
    for swapped in [false, true] {
        let san = San::new();
        let before = san.sim.snapshot();
        let got = san.attach(&request("a", 1, &[2, 3])).await;
        if swapped {
            san.sim.replace_lun(&target(), lun(1), SimLun::new(wwid(99), GIB));
            let doors = &san.connector.doors;
            for path in &got.paths {
                let rescan = format!("bus/scsi/devices/{}/rescan", path.hctl);
                doors.sysfs.write(&rescan, "1").await.expect("rescanned");
            }
            let error = san.detach("a", 1, &[2, 3]).await.expect_err("swapped");
            assert_eq!(error.reason(), Reason::IdentityChanged, "{error}");
        } else {
            san.sim.remove_lun(&target(), lun(1));
        }
        let r = request("a", 1, &[2, 3]);
        let force = DetachOptions { force: true, ..DetachOptions::default() };
        san.connector.detach(&r.owner, &r.source, force).await.expect("forced");
        assert_eq!(san.sim.snapshot(), before);
    }
}

/// Neither on the host nor in a container: what needs no session to come or go does not notice.
#[tokio::test(start_paused = true)]
async fn without_anybody_who_serves_as_iscsid_only_sessions_cannot_come_and_go() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.faults().inject(fault("iscsid", "", FaultAction::Fail("nobody".into())));
    let error = san.connector.attach(&request("a", 1, &[2, 3])).await.expect_err("nobody");
    assert_eq!(error.reason(), Reason::IscsidUnavailable, "{error}");
    san.connector.settled().await;
    assert_eq!(san.sim.snapshot(), before, "its records are gone again");
    san.sim.faults().clear();

    san.attach(&request("a", 1, &[2, 3])).await;
    let attached = san.sim.snapshot();
    san.sim.faults().inject(fault("iscsid", "", FaultAction::Fail("nobody".into())));
    san.attach(&request("b", 4, &[2, 3])).await;
    san.detach("b", 4, &[2, 3]).await.expect("the sessions stay");
    assert_eq!(san.sim.snapshot(), attached);
    let error = san.detach("a", 1, &[2, 3]).await.expect_err("they cannot go");
    assert_eq!(error.reason(), Reason::IscsidUnavailable, "{error}");
    assert!(san.sim.snapshot().contains("session"), "not forgotten");
    san.sim.faults().clear();
    san.detach("a", 1, &[2, 3]).await.expect("somebody serves");
    assert_eq!(san.sim.snapshot(), before);
}

/// The container that iscsid ran in has ended: its programs and records cannot be reached either.
#[tokio::test(start_paused = true)]
async fn an_iscsid_whose_container_has_ended_is_missed_by_logins_and_logouts_alone() {
    let san = San::new();
    let before = san.sim.snapshot();
    let single = |name, lun| AttachRequest {
        multipath: MultipathPolicy::Off,
        ..request(name, lun, &[2, 3])
    };
    san.attach(&request("a", 1, &[2, 3])).await;
    let attached = san.sim.snapshot();
    san.sim.set_iscsid_gone(true);
    san.attach(&request("b", 4, &[2, 3])).await;
    san.attach(&request("b", 4, &[2, 3])).await;
    san.attach(&single("c", 5)).await;
    san.detach("b", 4, &[2, 3]).await.expect("the sessions stay");
    san.detach("c", 5, &[2, 3]).await.expect("the sessions stay");
    assert_eq!(san.sim.snapshot(), attached);
    let error = san.detach("a", 1, &[2, 3]).await.expect_err("they cannot go");
    assert_eq!(error.reason(), Reason::IscsidUnavailable, "{error}");
    let error = san.connector.attach(&request("d", 1, &[9])).await.expect_err("none can come");
    assert_eq!(error.reason(), Reason::IscsidUnavailable, "{error}");
    san.sim.set_iscsid_gone(false);
    san.detach("d", 1, &[9]).await.expect("nothing of it");
    san.detach("a", 1, &[2, 3]).await.expect("it is back");
    assert_eq!(san.sim.snapshot(), before);
}

/// With one path, what was made at a portal that is not needed is given back at the attach, if that can be.
#[tokio::test(start_paused = true)]
async fn a_single_path_comes_and_goes_on_a_session_also_where_iscsid_is_gone() {
    let san = San::new();
    let before = san.sim.snapshot();
    let single = |name, lun| AttachRequest {
        multipath: MultipathPolicy::Off,
        ..request(name, lun, &[2, 3])
    };
    san.attach(&single("a", 1)).await;
    let attached = san.sim.snapshot();
    san.sim.set_iscsid_gone(true);
    san.attach(&single("b", 4)).await;
    san.detach("b", 4, &[2, 3]).await.expect("nothing was made at the other portal");
    assert_eq!(san.sim.snapshot(), attached);
    san.sim.set_iscsid_gone(false);
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

/// The host's iscsid ended, and a container's serves with records of its own, or the other way round.
#[tokio::test(start_paused = true)]
async fn sessions_outlive_a_move_of_iscsid_to_another_database() {
    let san = San::new();
    let before = san.sim.snapshot();
    let r = request("a", 1, &[2, 3]);
    san.attach(&r).await;
    san.sim.replace_iscsid();
    assert_eq!(san.attach(&r).await.device.paths, 2);
    san.attach(&request("b", 4, &[2, 3])).await;
    san.detach("b", 4, &[2, 3]).await.expect("detached");
    san.detach("a", 1, &[2, 3]).await.expect("the session tells enough for a logout");
    assert_eq!(san.sim.snapshot(), before);
}

/// iscsid is stopped while it is asked for a login, and goes on when all of it was given up.
#[tokio::test(start_paused = true)]
async fn a_session_that_iscsid_makes_long_after_it_was_given_up_is_ended() {
    for restarted in [false, true] {
        let san = San::new();
        let before = san.sim.snapshot();
        san.sim.faults().inject(fault("iscsid", "login", FaultAction::Stall));
        let error = san.connector.attach(&request("a", 1, &[2, 3])).await.expect_err("silent");
        assert!(error.to_string().contains("no session"), "{error}");
        assert!(crate::connector::error::chain(&error).contains("iscsid"), "{error:?}");
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(san.sim.snapshot(), before, "all is undone, as far as can be seen");
        if restarted {
            // The daemon that was watching is gone by the time the sessions come.
            san.connector.settled().await;
        }
        san.sim.faults().clear();
        tokio::time::sleep(Duration::from_secs(5)).await;
        if restarted {
            assert_ne!(san.count("session"), 0, "iscsid came back to it");
            san.connector.sweep().await.expect("swept");
        }
        san.connector.settled().await;
        assert_eq!(san.sim.snapshot(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_session_of_a_wanted_portal_stays_and_goes_with_the_volume() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.set_portal(portal(3), PortalState::Refusing);
    let r = request("a", 1, &[2, 3]);
    assert_eq!(san.attach(&r).await.device.paths, 1);
    san.connector.settled().await;
    san.sim.set_portal(portal(3), PortalState::Alive);
    san.sim.faults().inject(fault("iscsid", "login", FaultAction::Stall));
    assert_eq!(san.attach(&r).await.device.paths, 1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    san.sim.faults().clear();
    san.connector.settled().await;
    assert_eq!(san.count("session"), 2);
    san.attach(&r).await;
    san.connector.settled().await;
    assert_eq!(san.attach(&r).await.device.paths, 2);
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_foreign_session_without_a_record_is_left() {
    let san = San::new();
    san.sim.add_session(&target(), portal(2), "default");
    let before = san.sim.snapshot();
    san.attach(&request("a", 1, &[2])).await;
    san.detach("a", 1, &[2]).await.expect("detached");
    san.connector.sweep().await.expect("swept");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_logout_that_iscsid_cannot_make_yet_is_asked_for_again() {
    for code in [2, 21, 32] {
        let san = San::new();
        let before = san.sim.snapshot();
        san.attach(&request("a", 1, &[2, 3])).await;
        let not_yet = FaultAction::Fail(format!("exit {code}"));
        san.sim.faults().inject(Fault { times: Some(2), ..fault("cmd.run", "--logout", not_yet) });
        san.detach("a", 1, &[2, 3]).await.expect("detached");
        assert_eq!(san.sim.snapshot(), before, "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_a_killed_iscsiadm_left_is_removed_and_a_living_ones_waited_for() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.sim.lock_records(&[]);
    san.sim.corrupt_record(&target(), portal(2), "default");
    let began = tokio::time::Instant::now();
    san.attach(&request("a", 1, &[2, 3])).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    san.detach("a", 1, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);

    san.sim.lock_records(&["iscsiadm[7], which is stopped"]);
    let error = san.connector.attach(&request("a", 1, &[2, 3])).await.expect_err("locked");
    assert_eq!(error.reason(), Reason::ToolFailed);
    let told = crate::connector::error::chain(&error);
    assert!(told.contains("iscsiadm[7], which is stopped"), "{told}");
    san.sim.unlock_records();
    san.connector.settled().await;
    san.attach(&request("a", 1, &[2, 3])).await;
    san.sim.lock_records(&["iscsiadm[8]"]);
    let unlock = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        san.sim.unlock_records();
    };
    let (detached, ()) = tokio::join!(san.detach("a", 1, &[2, 3]), unlock);
    detached.expect("it waited");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_silent_multipathd_is_waited_for_rather_than_gone_around() {
    use MultipathPolicy::{Off, Preferred, Required};
    let cases: [(_, &[u8], u32); 4] =
        [(Required, &[2, 3], 2), (Preferred, &[2, 3], 2), (Preferred, &[2], 1), (Off, &[2, 3], 1)];
    for (policy, portals, paths) in cases {
        let san = San::new();
        let before = san.sim.snapshot();
        san.sim.faults().inject(fault("multipathd.ask", "", FaultAction::Hang));
        let r = AttachRequest { multipath: policy, ..request("a", 1, portals) };
        let error = san.connector.attach(&r).await.expect_err("silent");
        assert_eq!(error.reason(), Reason::MapFailed, "it passes: {error}");
        san.connector.settled().await;
        assert_eq!(san.sim.snapshot(), before);
        san.sim.faults().clear();
        assert_eq!(san.attach(&r).await.device.paths, paths);
        if policy != Off {
            san.sim.faults().inject(fault("multipathd.ask", "", FaultAction::Hang));
            let error = san.detach("a", 1, portals).await.expect_err("silent");
            assert_eq!(error.reason(), Reason::MapFailed);
            san.sim.faults().clear();
        }
        san.detach("a", 1, portals).await.expect("detached");
        assert_eq!(san.sim.snapshot(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_multipathd_puts_off_is_not_taken_for_done() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.attach(&request("other", 2, &[2, 3])).await;
    let beside = san.sim.snapshot();
    san.attach(&request("a", 1, &[2, 3])).await;
    let attached = san.sim.snapshot();
    san.sim.set_multipathd_delays(true);
    let error = san.detach("a", 1, &[2, 3]).await.expect_err("put off");
    assert_eq!(error.reason(), Reason::DeviceHeld, "{error}");
    assert_eq!(san.sim.snapshot(), attached, "the map and its paths are there");
    let later = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        san.sim.set_multipathd_delays(false);
    };
    let (detached, ()) = tokio::join!(san.detach("a", 1, &[2, 3]), later);
    detached.expect("done late");
    assert_eq!(san.sim.snapshot(), beside);
    san.detach("other", 2, &[2, 3]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_map_that_multipathd_finds_busy_is_told_and_kept() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.attach(&request("a", 1, &[2, 3])).await;
    let attached = san.sim.snapshot();
    let busy = FaultAction::Fail("fail\n".into());
    san.sim.faults().inject(fault("multipathd.ask", "del map", busy));
    let error = san.detach("a", 1, &[2, 3]).await.expect_err("busy");
    assert_eq!(error.reason(), Reason::DeviceHeld);
    assert_eq!(san.sim.snapshot(), attached);
    san.sim.faults().clear();
    san.detach("a", 1, &[2, 3]).await.expect("free");
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn what_looks_after_a_device_is_no_holder_of_it() {
    let san = San::new();
    let dev = san.attach(&request("a", 1, &[2])).await.device.dev;
    for keeper in ["multipathd[1]", "multipath[2968]", "partx[2970]", "(udev-worker)[3]"] {
        san.sim.open(dev, keeper);
    }
    let holders =
        async || scsi::openers(&san.connector.doors, &[dev]).await.expect("read").concat();
    assert!(holders().await.is_empty());
    san.sim.open(dev, "dd[7]");
    assert_eq!(holders().await, ["dd[7]"]);
}

#[tokio::test(start_paused = true)]
async fn a_device_whose_reads_hang_is_no_other_volumes_trouble() {
    let san = San::new();
    san.sim.set_multipathd(false);
    let mut attached = Vec::new();
    for (volume, n) in [("a", 1), ("b", 2), ("c", 3)] {
        attached.push(san.attach(&request(volume, n, &[2])).await);
    }
    let volumes = [("a", 1), ("b", 2), ("c", 3)].map(|(v, n)| (owner(v), source(n, &[2])));
    let seen = async || {
        let found = san.connector.inspect(&volumes).await;
        found.iter().map(|f| matches!(f, Ok(Health::Right { .. }))).collect::<Vec<_>>()
    };
    assert_eq!(seen().await, [true, true, true]);
    let state = format!("{}/state", hctls(&attached[1])[0]);
    san.sim.faults().inject(fault("sysfs.read", &state, FaultAction::Hang));
    assert_eq!(seen().await, [true, false, true]);
    san.sim.faults().clear();
    assert_eq!(seen().await, [true, true, true]);
}

#[tokio::test(start_paused = true)]
async fn which_paths_have_failed_is_the_kernels_word_not_multipathds() {
    let san = San::new();
    san.attach(&request("a", 1, &[2, 3])).await;
    let volumes = [(owner("a"), source(1, &[2, 3]))];
    let seen = async || match san.connector.inspect(&volumes).await.remove(0) {
        Ok(Health::Right { paths, .. }) => (paths.living, paths.dead),
        other => panic!("{other:?}"),
    };
    // It tells of what it saw when it last looked, or nothing.
    san.sim.set_multipathd(false);
    assert_eq!(seen().await, (2, vec![]));
    san.sim.remove_lun(&target(), lun(1));
    let (living, dead) = seen().await;
    assert_eq!((living, dead.len()), (0, 2));
    assert!(dead.iter().all(|path| path.ends_with(" has failed")), "{dead:?}");
    san.sim.add_lun(&target(), lun(1), SimLun::new(wwid(1), GIB));
    assert_eq!(seen().await, (2, vec![]));
    // Where it cannot be read, /sys alone counts.
    san.sim.remove_lun(&target(), lun(1));
    san.sim.faults().inject(fault("blocks.failed_paths", "", FaultAction::Fail("EACCES".into())));
    assert_eq!(seen().await, (2, vec![]));
}
