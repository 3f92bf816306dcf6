//! What was made is damaged behind lunplug's back, and is as it was again without being asked for.

use std::time::Duration;

use lunplug::host::libvirt::Affect;
use lunplug::host::nodes::Seen;
use lunplug::host::sim::PortalState;
use lunplug::host::sim::domain::SimDomain;
use lunplug::reason::Reason;
use lunplug::spec::{MultipathPolicy, Phase, VmPlace, VmSpec, VolumeSpec, VolumeStatus};
use lunplug::types::Bus;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, domain, portal, single, target, uid, vm_spec, volume};

/// A world in which volumes are looked at every minute.
fn world() -> World {
    let mut world = World::new();
    world.config.reconcile.interval = Duration::from_secs(60);
    world
}

/// Long enough for a look and what it brings about.
async fn some_minutes() {
    tokio::time::sleep(Duration::from_secs(300)).await;
}

/// One volume of VM 1 that is steady.
async fn steady(daemon: &Daemon, spec: &VolumeSpec) {
    assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
    some_minutes().await;
}

/// Damage is repaired within some minutes, watchers see nothing of it, and in the end all can go.
fn repaired(what: &str, damage: impl Fn(&World)) {
    let world = world();
    world.life(async |daemon| {
        steady(&daemon, &volume("data", 1)).await;
        let before = world.picture();
        let mut watch = daemon.registry.watch();
        damage(&world);
        assert_ne!(world.picture(), before, "{what}: it does nothing");
        some_minutes().await;
        assert_eq!(world.picture(), before, "{what}");
        while let Ok(status) = watch.try_recv() {
            assert_eq!((status.phase, status.reason), (Phase::Ready, None), "{what}: {status:?}");
        }
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean(what);
    });
}

#[test]
fn a_node_that_was_deleted_or_replaced_in_the_pod() {
    let name = || "data".parse().unwrap();
    repaired("deleted", |w| w.host.pods.edit(&uid(1), |pod| pod.nodes.clear()));
    repaired("a file", |w| {
        w.host.pods.edit(&uid(1), |pod| {
            pod.nodes.insert(name(), Seen::Other);
        });
    });
    repaired("another device", |w| {
        w.host.pods.edit(&uid(1), |pod| {
            if let Some(Seen::Node { dev, .. }) = pod.nodes.get_mut(&name()) {
                dev.minor += 1;
            }
        });
    });
    repaired("another's", |w| {
        w.host.pods.edit(&uid(1), |pod| {
            if let Some(Seen::Node { owner, .. }) = pod.nodes.get_mut(&name()) {
                owner.uid = 0;
            }
        });
    });
}

#[test]
fn a_grant_that_was_taken_away() {
    repaired("grant", |w| w.host.pods.drop_grants(&uid(1)));
}

#[test]
fn a_disk_that_was_detached_by_somebody_else() {
    repaired("disk", |w| {
        let detach = |d: &mut SimDomain| d.detach("ua-lunplug-data", Affect::LIVE).unwrap();
        w.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), detach);
    });
}

#[test]
fn a_disk_that_was_detached_is_back_as_soon_as_libvirt_tells() {
    let world = World::new();
    world.life(async |daemon| {
        steady(&daemon, &volume("data", 1)).await;
        let before = world.picture();
        world.host.hypervisor.detach_by_hand(&World::endpoint(1), &domain(1), "ua-lunplug-data");
        assert_ne!(world.picture(), before);
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(world.picture(), before);
    });
}

#[test]
fn a_path_that_was_deleted_joins_the_map_again() {
    let world = World::new();
    world.life(async |daemon| {
        steady(&daemon, &volume("data", 1)).await;
        let dev = daemon.get(1, "data").await.unwrap().device.unwrap().dev;
        world.host.storage.delete_path(&target(), portal(2));
        let degraded = |s: &VolumeStatus| s.reason == Some(Reason::PathsDegraded);
        let status = daemon.until(1, "data", degraded).await;
        assert_eq!(status.phase, Phase::Ready);
        assert_eq!(status.device.as_ref().map(|d| d.paths), Some(1), "{status:?}");
        let status = daemon.ready(1, "data").await;
        assert_eq!(status.device.map(|d| (d.dev, d.paths)), Some((dev, 2)));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a path was deleted");
    });
}

#[test]
fn a_session_that_somebody_ended_is_made_again() {
    let world = World::new();
    world.life(async |daemon| {
        steady(&daemon, &volume("data", 1)).await;
        world.host.storage.end_session(&target(), portal(1));
        daemon.until(1, "data", |s| s.reason == Some(Reason::PathsDegraded)).await;
        let status = daemon.ready(1, "data").await;
        assert_eq!((status.phase, status.device.map(|d| d.paths)), (Phase::Ready, Some(2)));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a session was ended");
    });
}

#[test]
fn dead_paths_are_told_and_come_back() {
    let world = world();
    world.life(async |daemon| {
        steady(&daemon, &volume("data", 1)).await;
        let storage = &world.host.storage;
        for (number, reason, living) in [(1, Reason::PathsDegraded, 1), (2, Reason::NoPaths, 0)] {
            storage.set_portal(portal(number), PortalState::Dead);
            let status = daemon.until(1, "data", |s| s.reason == Some(reason)).await;
            assert_eq!((status.phase, status.retry_at), (Phase::Ready, None));
            assert_eq!(status.device.as_ref().map(|d| d.paths), Some(living), "{status:?}");
            assert!(status.message.contains("transport-offline"), "{}", status.message);
        }
        for number in [1, 2] {
            storage.set_portal(portal(number), PortalState::Alive);
        }
        let status = daemon.ready(1, "data").await;
        assert_eq!(status.device.map(|d| d.paths), Some(2));
        assert_eq!(status.message, "");
    });
}

#[test]
fn a_portal_that_was_dead_when_the_volume_came_joins_later() {
    let world = world();
    world.life(async |daemon| {
        world.host.storage.set_portal(portal(2), PortalState::Dead);
        assert_eq!(daemon.add(1, &volume("data", 1)).await.phase, Phase::Ready);
        let degraded = |s: &VolumeStatus| s.reason == Some(Reason::PathsDegraded);
        assert_eq!(daemon.until(1, "data", degraded).await.device.unwrap().paths, 1);
        some_minutes().await;
        world.host.storage.set_portal(portal(2), PortalState::Alive);
        assert_eq!(daemon.ready(1, "data").await.device.unwrap().paths, 2);
    });
}

#[test]
fn a_single_path_that_was_made_anew_cannot_be_put_under_a_guest() {
    let world = world();
    world.life(async |daemon| {
        let spec = VolumeSpec { multipath: MultipathPolicy::Off, ..single("data", 1) };
        steady(&daemon, &spec).await;
        world.host.storage.delete_path(&target(), portal(1));
        let status = daemon.until(1, "data", |s| s.reason == Some(Reason::DeviceHeld)).await;
        assert_eq!(status.phase, Phase::Ready);
        assert!(status.message.contains("remove the volume and add it again"), "{status:?}");
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("made anew");
    });
}

#[test]
fn a_libvirt_that_is_down_is_told_by_each_volume() {
    let world = world();
    world.life(async |daemon| {
        for (name, lun) in [("a", 1), ("b", 2)] {
            steady(&daemon, &volume(name, lun)).await;
        }
        let before = world.picture();
        let mut watch = daemon.registry.watch();
        world.inject_all("libvirt.connect");
        world.host.hypervisor.restart(&World::endpoint(1));
        for name in ["a", "b"] {
            let down = |s: &VolumeStatus| s.reason == Some(Reason::LibvirtUnreachable);
            assert!(daemon.until(1, name, down).await.retry_at.is_some());
        }
        some_minutes().await;
        world.host.faults.clear();
        for name in ["a", "b"] {
            daemon.ready(1, name).await;
        }
        assert_eq!(world.picture(), before);
        while let Ok(status) = watch.try_recv() {
            assert_eq!(status.phase, Phase::Ready, "{status:?}");
        }
    });
}

#[test]
fn volumes_come_back_in_the_order_in_which_they_were_added() {
    for bus in [Bus::Scsi, Bus::Virtio] {
        let world = World::new();
        world.life(async |daemon| {
            for (name, lun) in [("zeta", 1), ("alpha", 2), ("mu", 3)] {
                let spec = VolumeSpec { bus, ..volume(name, lun) };
                daemon.want(1, &spec).await.unwrap();
            }
            for name in ["zeta", "alpha", "mu"] {
                daemon.ready(1, name).await;
            }
            let before = world.host.hypervisor.snapshot();
            for slow in [1, 2, 3] {
                world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
                daemon.quiet().await;
                // Whichever of them is the last to come.
                world.delay_scan(slow);
                world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
                tokio::time::sleep(Duration::from_secs(5)).await;
                world.host.faults.clear();
                for name in ["zeta", "alpha", "mu"] {
                    daemon.ready(1, name).await;
                }
                assert_eq!(sorted(&world.host.hypervisor.snapshot()), sorted(&before), "{slow}");
            }
        });
    }
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn a_quiet_node_is_left_in_peace() {
    let world = world();
    world.life(async |daemon| {
        for (name, lun) in [("a", 1), ("b", 2), ("c", 3)] {
            steady(&daemon, &volume(name, lun)).await;
        }
        let programs = lunplug::host::cmd::Commands::started(&world.host.storage);
        let mut watch = daemon.registry.watch();
        let before = world.host.faults.calls();
        daemon.quiet().await;
        let calls = world.host.faults.calls() - before;
        assert!(calls < 15 * 100, "{calls} calls in some ten looks at three volumes");
        assert_eq!(lunplug::host::cmd::Commands::started(&world.host.storage), programs);
        assert!(watch.try_recv().is_err(), "and nobody is told anything");
    });
}

/// The n-th VM's registration with another pod.
fn with_pod(uid: &str) -> VmSpec {
    let mut spec = vm_spec(1);
    let VmPlace::Pod { uid: place, .. } = &mut spec.place else { unreachable!() };
    uid.clone_into(place);
    spec
}

const SECOND: &str = "00000000-0000-4000-8000-0000000000aa";

#[test]
fn a_new_pod_of_the_same_name_gets_the_volumes_and_inherits_nothing() {
    for gone in [true, false] {
        let world = world();
        let ended = world.life(async |daemon| {
            steady(&daemon, &volume("data", 1)).await;
            world.host.add_vm(SECOND, &domain(1));
            let second = with_pod(SECOND);
            let refused = daemon.registry.register_vm(second.clone()).await.unwrap_err();
            assert_eq!(refused.reason, Reason::VmExists, "the first one runs");
            assert!(refused.message.contains("still runs"), "{}", refused.message);
            assert_eq!(daemon.ready(1, "data").await.reason, None);
            if gone {
                world.host.pods.remove_pod(&uid(1));
                world.host.hypervisor.remove(&World::endpoint(1));
            } else {
                // Its directory is still there, and no process of its.
                world.host.pods.kill_qemu(&uid(1));
                world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
            }
            daemon.registry.register_vm(second).await.unwrap();
            let status = daemon.ready(1, "data").await;
            some_minutes().await;
            let picture = world.picture();
            let dev = status.device.unwrap().dev;
            let access = lunplug::cgroup::Access::READ;
            assert!(world.host.pods.may_open(SECOND, dev, access), "{picture}");
            assert!(!world.host.pods.may_open(&uid(1), dev, access), "{picture}");
            assert_eq!(picture.matches("node data").count(), 1, "{picture}");
            assert_eq!(picture.matches("grant ").count(), 1, "{picture}");
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.picture()
        });
        for left in ["session ", "node ", "grant ", "dm ", "record ", "ua-lunplug-"] {
            assert!(!ended.contains(left), "{ended}");
        }
    }
}

#[test]
fn a_volume_whose_record_is_damaged_keeps_no_other_from_being_repaired() {
    let world = world();
    world.life(async |daemon| {
        daemon.add(1, &volume("damaged", 1)).await;
        steady(&daemon, &volume("data", 2)).await;
        let record = "effects/default/vm-1/damaged.json";
        crate::stores::damage(&world, record).await;
        world.host.pods.edit(&uid(1), |pod| {
            pod.nodes.remove(&"data".parse().unwrap());
        });
        some_minutes().await;
        let nodes = |pod: &mut lunplug::host::sim::pods::SimPod| {
            assert!(pod.nodes.contains_key(&"data".parse().unwrap()), "it was not repaired");
        };
        world.host.pods.edit(&uid(1), nodes);
        let status = daemon.ready(1, "data").await;
        assert_eq!(status.reason, None, "{status:?}");
        let status = daemon.get(1, "damaged").await.unwrap();
        assert_eq!((status.phase, status.reason), (Phase::Ready, Some(Reason::RecordCorrupt)));
        assert!(status.message.contains(record), "{status:?}");
    });
}
