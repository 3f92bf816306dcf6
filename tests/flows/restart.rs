//! The daemon ends by `kill -9`, or the node reboots, and what was asked for comes about.

use std::time::Duration;

use lunplug::host::sim::domain::{SimDomain, Unplug};
use lunplug::host::sim::{Fault, FaultAction, SimLun};
use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::types::Bus;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, domain, lun, node, portal, single, target, uid, vm, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

#[test]
fn volumes_stay_and_the_store_is_read_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/lunplug.db");
    let mut world = World::over(node(), Desired::open(&path).unwrap());
    world.life(async |daemon| {
        for (name, lun) in [("a", 1), ("b", 2)] {
            assert_eq!(daemon.add(1, &volume(name, lun)).await.phase, Phase::Ready);
        }
        daemon.add(2, &single("a", 3)).await;
        daemon.quiet().await;
    });
    let before = world.picture();
    for _ in 0..2 {
        world.desired = Desired::open(&path).unwrap();
        world.life(async |daemon| {
            for (number, name) in [(1, "a"), (1, "b"), (2, "a")] {
                let status = daemon.ready(number, name).await;
                assert!(status.target.is_some() && status.device.is_some(), "{status:?}");
            }
            assert_eq!(daemon.registry.list_volumes(Some(&vm(1))).await.len(), 2);
            daemon.quiet().await;
        });
        assert_eq!(world.picture(), before, "nothing was made anew");
    }
    world.desired = Desired::open(&path).unwrap();
    world.life(async |daemon| {
        // At once, before they were looked at again.
        for (number, name) in [(1, "a"), (1, "b"), (2, "a")] {
            daemon.drop_volume(number, name, PLAIN).await.unwrap();
        }
        for (number, name) in [(1, "a"), (1, "b"), (2, "a")] {
            daemon.gone(number, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("restarted");
        assert!(world.desired.volumes(&vm(1)).await.unwrap().is_empty());
    });
}

#[test]
fn a_second_volume_comes_although_the_first_was_attached_by_another_life() {
    let world = World::new();
    world.life(async |daemon| drop(daemon.add(1, &volume("a", 1)).await));
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &volume("b", 2)).await.phase, Phase::Ready);
        daemon.remove(1, "a").await;
        assert_eq!(daemon.ready(1, "b").await.device.unwrap().paths, 2);
        daemon.remove(1, "b").await;
        daemon.quiet().await;
        world.assert_clean("two lives");
    });
}

#[test]
fn a_domain_that_ended_meanwhile() {
    let world = World::new();
    world.life(async |daemon| drop(daemon.add(1, &volume("data", 1)).await));
    world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
    world.life(async |daemon| {
        let status = daemon.comes_to(1, "data").await;
        assert_eq!(status.phase, Phase::Pending, "{status:?}");
        assert_eq!(status.reason, Some(Reason::VmNotRunning), "{status:?}");
        assert!(!world.picture().contains("session "), "nobody needs the LUN here now");
        // Wanted all the same: it is there when the VM is.
        daemon.quiet().await;
        world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
        daemon.ready(1, "data").await;
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("stopped meanwhile");
    });
}

#[test]
fn after_a_reboot_what_was_wanted_comes_back() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.add(1, &single("b", 2)).await;
    });
    world.shut_down();
    world.life(async |daemon| {
        for name in ["a", "b"] {
            let status = daemon.comes_to(1, name).await;
            assert_eq!(status.phase, Phase::Pending, "{status:?}");
            assert!(status.retry_at.is_some());
        }
        daemon.quiet().await;
        world.boot();
        assert_eq!(daemon.ready(1, "a").await.device.unwrap().paths, 2);
        daemon.ready(1, "b").await;
        for name in ["a", "b"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("rebooted");
    });
}

#[test]
fn after_a_reboot_what_is_wanted_no_more_goes() {
    for start in [false, true] {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &volume("a", 1)).await;
            daemon.add(1, &single("b", 2)).await;
        });
        world.shut_down();
        if start {
            world.boot();
        }
        world.life(async |daemon| {
            for name in ["a", "b"] {
                daemon.drop_volume(1, name, PLAIN).await.unwrap();
            }
            for name in ["a", "b"] {
                daemon.gone(1, name).await;
            }
            daemon.quiet().await;
            if !start {
                world.boot();
            }
            world.assert_clean("removed after a reboot");
        });
    }
}

#[test]
fn a_removal_that_was_taken_on_survives_the_reboot() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.drop_volume(1, "a", PLAIN).await.unwrap();
    });
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        daemon.quiet().await;
        assert_eq!(daemon.get(1, "a").await, None);
        world.assert_clean("wanted no more before the reboot");
    });
}

/// A removal's end is not waited for to be on the disk: where the power goes before, the volume is in the store again,
/// wanted no more.
#[test]
fn a_removal_whose_end_was_lost_with_the_power_finds_nothing_to_do() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        let wanted = world.desired.volumes(&vm(1)).await.unwrap();
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        world.assert_clean("removed");
        assert!(world.desired.volumes(&vm(1)).await.unwrap().is_empty());
        world.desired.put_volumes(&vm(1), &wanted, false).await.unwrap();
        let removal = (wanted[0].spec.name.clone(), PLAIN);
        world.desired.put_removals(&vm(1), &[removal]).await.unwrap();
    });
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        daemon.gone(1, "a").await;
        daemon.quiet().await;
        world.assert_clean("removed once more");
        assert!(world.desired.volumes(&vm(1)).await.unwrap().is_empty());
        // Its name and its LUN can be had again.
        daemon.add(1, &volume("a", 1)).await;
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        world.assert_clean("and added again");
    });
}

#[test]
fn a_removal_that_the_guest_never_answered_survives_the_reboot() {
    let world = World::new();
    let spec = VolumeSpec { bus: Bus::Virtio, ..volume("a", 1) };
    world.life(async |daemon| {
        daemon.add(1, &spec).await;
        let silent = |d: &mut SimDomain| d.unplug = Unplug::Silent;
        world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), silent);
        daemon.drop_volume(1, "a", PLAIN).await.unwrap();
        daemon.until(1, "a", |s| s.reason.is_some()).await;
    });
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        daemon.gone(1, "a").await;
        daemon.quiet().await;
        world.assert_clean("never answered");
    });
}

#[test]
fn a_vm_that_stops_and_starts_under_a_running_daemon() {
    let world = World::new();
    world.life(async |daemon| {
        for (name, lun) in [("a", 1), ("b", 2)] {
            daemon.add(1, &volume(name, lun)).await;
        }
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        for name in ["a", "b"] {
            let away = |s: &VolumeStatus| s.reason == Some(Reason::VmNotRunning);
            assert_eq!(daemon.until(1, name, away).await.phase, Phase::Pending);
        }
        daemon.quiet().await;
        assert!(!world.picture().contains("session "), "nobody needs the LUNs here now");
        world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
        for name in ["a", "b"] {
            daemon.ready(1, name).await;
        }
        for name in ["a", "b"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("stopped and started");
    });
}

#[test]
fn a_libvirt_that_restarts_changes_nothing() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        let before = world.picture();
        let mut watch = daemon.registry.watch();
        world.host.hypervisor.restart(&World::endpoint(1));
        daemon.quiet().await;
        assert_eq!(world.picture(), before);
        while let Ok(status) = watch.try_recv() {
            assert_eq!(status.phase, Phase::Ready, "{status:?}");
        }
        daemon.remove(1, "data").await;
    });
}

#[test]
fn a_pod_that_is_deleted_takes_its_volumes_from_the_host() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        world.host.pods.remove_pod(&uid(1));
        world.host.hypervisor.remove(&World::endpoint(1));
        let gone = |s: &VolumeStatus| s.reason == Some(Reason::PodGone);
        assert_eq!(daemon.until(1, "data", gone).await.phase, Phase::Pending);
        daemon.quiet().await;
        let left = world.picture();
        assert!(!left.contains("session ") && !left.contains("grant "), "{left}");
    });
}

/// However long each takes on its way, and also after a restart of the whole node.
#[test]
fn volumes_come_back_in_the_order_in_which_they_were_asked_for() {
    let names = ["c", "a", "b"];
    let world = World::new();
    let targets = async |daemon: &Daemon| {
        let mut targets = Vec::new();
        for name in names {
            targets.push(daemon.ready(1, name).await.target.unwrap());
        }
        targets
    };
    let slow = |name: &str| Fault {
        detail: format!("effects/default/vm-1/{name}.json"),
        ..world.fault("rundir.store", 1, FaultAction::Stall)
    };
    let slowly = async |daemon: &Daemon| {
        world.host.faults.meeting().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.host.faults.clear();
        assert_eq!(targets(daemon).await, ["sda", "sdb", "sdc"]);
        daemon.quiet().await;
    };
    world.life(async |daemon| {
        for (name, lun) in names.into_iter().zip(1..) {
            assert_eq!(daemon.add(1, &volume(name, lun)).await.phase, Phase::Ready);
        }
        daemon.quiet().await;
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        daemon.until(1, "c", |s| s.reason == Some(Reason::VmNotRunning)).await;
        daemon.quiet().await;
        world.host.faults.inject(slow("c"));
        world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
        slowly(&daemon).await;
    });
    world.shut_down();
    world.boot();
    world.host.faults.inject(slow("c"));
    world.life(async |daemon| slowly(&daemon).await);
}

#[test]
fn the_grant_of_a_container_that_was_made_anew_is_not_forgotten() {
    let world = World::new();
    world.life(async |daemon| drop(daemon.add(1, &volume("data", 1)).await));
    // While nobody looks: the container and the guest in it restart, in the same pod.
    world.host.pods.edit(&uid(1), |pod| {
        pod.cgroup.path.set_file_name("compute-again");
        pod.cgroup.id += 1000;
        pod.processes.clear();
    });
    world.host.pods.start_qemu(&uid(1), &domain(1));
    world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
    world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
    // Neither the collection at the start can revoke it, nor the first look at the volume.
    let fails = FaultAction::Fail("ordered to fail".into());
    world.host.faults.inject(Fault { times: Some(2), ..world.fault("grants.revoke", 0, fails) });
    world.life(async |daemon| {
        daemon.ready(1, "data").await;
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("another container");
    });
}

#[test]
fn what_is_as_it_was_made_is_found_by_a_look_alone() {
    let world = World::new();
    world.life(async |daemon| {
        for spec in [volume("a", 1), single("b", 2)] {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
        }
        daemon.quiet().await;
    });
    // Every attach that is walked takes its LUN's lock.
    let failure = FaultAction::Fail("nothing should be walked".into());
    let fault =
        Fault { detail: "luns/".into(), times: None, ..world.fault("rundir.lock", 0, failure) };
    world.host.faults.inject(fault);
    world.life(async |daemon| {
        for name in ["a", "b"] {
            let status = daemon.comes_to(1, name).await;
            assert_eq!((status.phase, status.reason), (Phase::Ready, None), "{status:?}");
            assert!(status.target.is_some() && status.device.is_some(), "{status:?}");
        }
    });
}

#[test]
fn a_lun_that_was_swapped_meanwhile_is_not_taken_for_the_one_that_was_attached() {
    for spec in [volume("data", 1), single("data", 1)] {
        let world = World::new();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            daemon.quiet().await;
        });
        let wwid = "naa.60014050000000000000000000000001".parse().unwrap();
        world.host.storage.replace_lun(&target(), lun(1), SimLun::new(wwid, 1 << 30));
        for number in [1, 2] {
            world.host.storage.rescan_path(&target(), lun(1), portal(number));
        }
        world.life(async |daemon| {
            let status = daemon.comes_to(1, "data").await;
            assert!(status.reason.is_some(), "{status:?}");
        });
    }
}
