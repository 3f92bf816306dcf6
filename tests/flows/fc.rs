//! Volumes by Fibre Channel.

use std::time::Duration;

use lunplug::host::sim::{Appears, SimStorage};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, VolumeSpec};
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, fibre, hba, lun, port, target, volume};

fn world() -> World {
    let mut world = World::new();
    world.config.reconcile.interval = Duration::from_secs(60);
    world
}

async fn has_paths(daemon: &Daemon, name: &str, paths: u32) {
    let has = |status: &lunplug::spec::VolumeStatus| {
        status.device.as_ref().is_some_and(|device| device.paths == paths)
    };
    daemon.until(1, name, has).await;
}

#[test]
fn a_volume_comes_and_goes_beside_others_and_the_fabric_stays() {
    let world = world();
    world.life(async |daemon| {
        let status = daemon.add(1, &fibre("data", 1)).await;
        assert_eq!(
            (status.phase, status.device.unwrap().paths),
            (Phase::Ready, 2),
            "{}",
            status.message
        );
        assert_eq!(daemon.add(1, &fibre("more", 2)).await.phase, Phase::Ready);
        assert_eq!(daemon.add(1, &volume("old", 3)).await.phase, Phase::Ready);
        assert_eq!(daemon.add_fails(1, &fibre("same", 1)).await, Reason::SourceInUse);
        // The same LUN by the other transport: only its identity tells.
        assert_eq!(daemon.add_fails(1, &volume("twin", 2)).await, Reason::SourceInUse);
        daemon.registry.remove_volume(&crate::world::key(1, "twin"), Default::default()).await.ok();
        for name in ["data", "more", "old"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

#[test]
fn the_node_tells_its_hbas() {
    world().life(async |daemon| {
        let node = daemon.registry.node().await;
        let hbas: Vec<String> =
            node.hbas.iter().map(|hba| format!("{} {}", hba.wwpn, hba.state)).collect();
        assert_eq!(hbas, ["21000024ff3d2e01 Online", "21000024ff3d2e02 Online"]);
    });
}

#[test]
fn volumes_survive_the_daemon_and_the_node() {
    for scans in [false, true] {
        let world = world();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &fibre("data", 1)).await.phase, Phase::Ready);
            daemon.quiet().await;
        });
        let before = world.picture();
        world.life(async |daemon| {
            assert_eq!(daemon.ready(1, "data").await.device.unwrap().paths, 2);
            daemon.quiet().await;
        });
        assert_eq!(world.picture(), before, "nothing was made anew");
        world.host.storage.set_fc_scan(scans);
        world.shut_down();
        world.boot();
        world.life(async |daemon| {
            assert_eq!(daemon.ready(1, "data").await.device.unwrap().paths, 2);
            daemon.remove(1, "data").await;
            daemon.quiet().await;
        });
        let left = world.picture();
        assert!(!left.lines().any(|line| line.starts_with("run ")), "{left}");
        // With a scan of the kernel's the other 15 LUNs are there.
        let disks = left.lines().filter(|line| line.starts_with("disk ")).count();
        assert_eq!(disks, if scans { 30 } else { 0 }, "{left}");
        if !scans {
            world.assert_clean("rebooted");
        }
    }
}

#[test]
fn a_volume_whose_port_logs_in_late_does_not_wait_for_its_time() {
    let world = world();
    world.host.storage.export_lun(&target(), lun(4), &SimStorage::fc_target(port(9)), lun(4));
    world.life(async |daemon| {
        let source = format!("fc://{}/4", port(9)).parse().unwrap();
        let spec = VolumeSpec { source, ..volume("data", 4) };
        let status = daemon.add(1, &spec).await;
        assert_eq!(status.reason, Some(Reason::FcPortNotFound));
        assert_eq!(status.phase, Phase::Pending);
        // The waits between its tries have grown to a minute.
        tokio::time::sleep(Duration::from_secs(600)).await;
        let begin = tokio::time::Instant::now();
        world.host.storage.zone(hba(1), port(9), Appears::AtOnce);
        daemon.until(1, "data", |s| s.phase == Phase::Ready).await;
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    });
}

#[test]
fn a_port_that_is_lost_and_back_has_its_path_again() {
    let world = world();
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &fibre("data", 1)).await.phase, Phase::Ready);
        world.host.storage.lose_port(hba(2), port(2));
        has_paths(&daemon, "data", 1).await;
        let status = daemon.get(1, "data").await.unwrap();
        assert_eq!((status.phase, status.reason), (Phase::Ready, Some(Reason::PathsDegraded)));
        world.host.storage.zone(hba(2), port(2), Appears::AtOnce);
        has_paths(&daemon, "data", 2).await;
        world.host.storage.lose_port(hba(2), port(2));
        world.host.storage.end_dev_loss(hba(2), port(2));
        has_paths(&daemon, "data", 1).await;
        world.host.storage.zone(hba(2), port(2), Appears::AtOnce);
        has_paths(&daemon, "data", 2).await;
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("lost and back");
    });
}

#[test]
fn a_volume_grows_while_the_guest_has_it() {
    let world = world();
    world.life(async |daemon| {
        let before = daemon.add(1, &fibre("data", 1)).await.device.unwrap().size;
        for number in [1, 2] {
            let by = SimStorage::fc_target(port(number));
            world.host.storage.resize_lun(&by, lun(201), 2 * before);
        }
        let grown = daemon.registry.expand_volume(&crate::world::key(1, "data"), None).await;
        grown.unwrap_or_else(|refusal| panic!("{refusal}"));
        assert_eq!(daemon.get(1, "data").await.unwrap().device.unwrap().size, 2 * before);
        daemon.remove(1, "data").await;
    });
}
