//! Whose map it is, and how it comes about.

use super::*;
use crate::host::sim::FindMultipaths;
use crate::host::storage::RealOptions;

#[tokio::test(start_paused = true)]
async fn a_slow_multipathd_is_nudged() {
    let san = San::new();
    san.sim.set_multipathd_auto(false);
    let got = san.attach(&request("a", 1, &[2, 3])).await;
    assert_eq!((got.device.map.is_some(), got.device.paths), (true, 2));
}

#[tokio::test(start_paused = true)]
async fn without_a_map_in_time_everything_is_undone() {
    let san = San::new();
    san.sim.set_multipathd_auto(false);
    san.sim.faults().inject(fault("multipathd.ask", "add path", FaultAction::Fail("fail".into())));
    assert_eq!(san.refused(&request("a", 1, &[2, 3])).await.reason(), Reason::MapFailed);
}

#[tokio::test(start_paused = true)]
async fn a_map_comes_about_however_multipathd_finds_its_paths_and_names_its_maps() {
    for mode in [FindMultipaths::No, FindMultipaths::Yes, FindMultipaths::Strict] {
        for friendly in [true, false] {
            let san = San::new();
            san.sim.set_multipath_conf(mode, friendly);
            let before = san.sim.snapshot();
            let got = san.attach(&request("a", 1, &[2, 3])).await;
            let name = if friendly { "mpatha".to_owned() } else { wwid(1).multipath() };
            assert_eq!((got.device.map, got.device.paths), (Some(name), 2), "{mode:?}");
            san.detach("a", 1, &[2, 3]).await.expect("detached");
            assert_eq!(san.sim.snapshot(), before, "{mode:?}, friendly names: {friendly}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn one_living_portal_of_two_has_a_map_however_multipathd_finds_its_paths() {
    for mode in [FindMultipaths::No, FindMultipaths::Yes, FindMultipaths::Strict] {
        let san = San::new();
        san.sim.set_multipath_conf(mode, true);
        let before = san.sim.snapshot();
        san.sim.set_portal(portal(3), PortalState::Dead);
        let r = request("a", 1, &[2, 3]);
        let got = san.attach(&r).await;
        assert_eq!((got.device.map.is_some(), got.device.paths), (true, 1), "{mode:?}");
        san.sim.set_portal(portal(3), PortalState::Alive);
        san.connector.settled().await;
        let now = san.connector.observe(&r.owner, &r.source).await.expect("read").expect("there");
        assert_eq!(now.device.paths, 2, "{mode:?}");
        san.detach("a", 1, &[2, 3]).await.expect("detached");
        assert_eq!(san.sim.snapshot(), before, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_map_that_comes_and_goes_unseen_leaves_nothing_behind() {
    for takes_off in [true, false] {
        let san = San::new();
        san.sim.set_multipathd_auto(false);
        san.sim.set_multipathd_late(takes_off);
        let mut r = request("a", 1, &[2, 3]);
        r.expect.wwid = Some(wwid(9));
        assert_eq!(san.refused(&r).await.reason(), Reason::IdentityMismatch);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hung_multipathd_is_asked_once_when_a_path_without_a_map_goes() {
    let san = San::new();
    san.sim.set_multipathd_auto(false);
    let r = AttachRequest { multipath: MultipathPolicy::Off, ..request("a", 1, &[2]) };
    let before = san.sim.snapshot();
    san.attach(&r).await;
    let hang = fault("multipathd.ask", "", FaultAction::Hang);
    san.sim.faults().inject(Fault { times: None, ..hang });
    let begin = tokio::time::Instant::now();
    san.detach("a", 1, &[2]).await.expect("it has no map");
    let once = RealOptions::default().multipathd_deadline;
    assert!(begin.elapsed() < 2 * once, "{:?}", begin.elapsed());
    assert_eq!(san.sim.snapshot(), before);
}
