//! `removevolume --force`: what it gives up is told, and nothing else is touched.

use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::storage::{PortalState, SimLun};
use lunplug::host::storage::StorageDoors;
use lunplug::reason::Reason;
use lunplug::spec::{MultipathPolicy, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, FORCE, World, domain, key, lun, portal, single, target, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

fn change(world: &World, change: impl FnOnce(&mut SimDomain)) {
    let endpoint = World::endpoint(1);
    world.host.hypervisor.with_domain(&endpoint, &domain(1), change).unwrap();
}

/// One path, and no map above it.
fn bare(name: &str, lun: u64) -> VolumeSpec {
    VolumeSpec { multipath: MultipathPolicy::Off, ..single(name, lun) }
}

/// What of the node is not of the volume `data`.
fn others(world: &World) -> Vec<String> {
    let picture = world.picture();
    // Files of the run directory are a target's or a volume's.
    let counts = |l: &&str| l.contains("other") && !l.starts_with("run leases/");
    picture.lines().filter(counts).map(str::to_owned).collect()
}

/// Removes `data` by force; its last status, as a watcher sees it.
async fn forced(daemon: &Daemon) -> VolumeStatus {
    let mut watch = daemon.registry.watch();
    daemon.drop_volume(1, "data", FORCE).await.unwrap();
    loop {
        let status = watch.recv().await.unwrap();
        if status.key == key(1, "data") && status.phase == Phase::Gone {
            return (*status).clone();
        }
    }
}

#[track_caller]
fn told(status: &VolumeStatus, words: &[&str]) {
    for words in words {
        assert!(status.gave_up.iter().any(|g| g.contains(words)), "{words}: {:?}", status.gave_up);
    }
    assert_eq!(status.gave_up.len(), words.len(), "{:?}", status.gave_up);
}

#[test]
fn what_a_plain_removal_would_be_refused_for_is_told() {
    type Trouble = fn(&mut SimDomain);
    let cases: [(Trouble, &[&str]); 3] = [
        (|d| drop(d.agent.mounted.insert("data".into(), "/srv".into())), &["/srv"]),
        (|d| d.agent.connected = false, &["nobody can say whether the guest uses volume data"]),
        (|_| {}, &[]),
    ];
    for (trouble, words) in cases {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &volume("data", 1)).await;
            daemon.add(2, &volume("other", 2)).await;
            daemon.quiet().await;
            let before = others(&world);
            change(&world, trouble);
            let dry = RemoveOptions { dry_run: true, ..FORCE };
            let would = daemon.drop_volume(1, "data", dry).await.unwrap();
            told(&would, words);
            assert_eq!(
                daemon.get(1, "data").await.unwrap().gave_up,
                [""; 0],
                "nothing is given up yet"
            );
            told(&forced(&daemon).await, words);
            daemon.quiet().await;
            assert_eq!(others(&world), before);
            // Another volume of that name begins with a clean sheet.
            change(&world, |d| {
                d.agent.mounted.clear();
                d.agent.connected = true;
            });
            assert_eq!(daemon.add(1, &volume("data", 1)).await.gave_up, [""; 0]);
            daemon.remove(1, "data").await;
            daemon.remove(2, "other").await;
            daemon.quiet().await;
            world.assert_clean("forced");
        });
    }
}

#[test]
fn a_device_that_is_lost_for_good_goes_and_what_is_lost_with_it_is_told() {
    let cases: [(VolumeSpec, &[&str]); 2] = [
        (volume("data", 1), &["has no path left", "flush of 253:0 failed"]),
        (bare("data", 1), &["flush of 8:0 failed"]),
    ];
    for (spec, words) in cases {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &spec).await;
            daemon.quiet().await;
            for number in [1, 2] {
                world.host.storage.set_portal(portal(number), PortalState::Dead);
            }
            told(&forced(&daemon).await, words);
            daemon.quiet().await;
            world.assert_clean("lost");
        });
    }
}

#[test]
fn what_was_given_up_is_known_after_a_restart() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        change(&world, |d| drop(d.agent.mounted.insert("data".into(), "/srv".into())));
        world.inject("libvirt.detach", 0, lunplug::host::sim::FaultAction::Hang);
        daemon.drop_volume(1, "data", FORCE).await.unwrap();
        world.host.faults.meeting().await;
    });
    world.host.faults.clear();
    // It goes on by itself, and could be gone before anybody has looked.
    world.inject("libvirt.detach", 0, lunplug::host::sim::FaultAction::Stall);
    world.life(async |daemon| {
        let mut watch = daemon.registry.watch();
        told(&daemon.get(1, "data").await.unwrap(), &["/srv"]);
        world.host.faults.clear();
        let gone = loop {
            let status = watch.recv().await.unwrap();
            if status.phase == Phase::Gone {
                break status;
            }
        };
        told(&gone, &["/srv"]);
        daemon.quiet().await;
        world.assert_clean("given up before the restart");
    });
}

#[test]
fn another_lun_on_the_path_is_not_flushed_and_that_is_told() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &bare("data", 1)).await;
        daemon.quiet().await;
        let wwid = "naa.6001405000000000000000000000ffff".parse().unwrap();
        world.host.storage.replace_lun(&target(), lun(1), SimLun::new(wwid, 1 << 30));
        let doors = StorageDoors::sim(&world.host.storage);
        let disk = &doors.sysfs.list("class/scsi_device").await.unwrap()[0];
        doors.sysfs.write(&format!("class/scsi_device/{disk}/device/rescan"), "1").await.unwrap();
        let status = forced(&daemon).await;
        assert!(status.gave_up[0].ends_with("it was not flushed"), "{:?}", status.gave_up);
        daemon.quiet().await;
        world.assert_clean("another LUN");
    });
}

#[test]
fn a_single_path_held_open_is_silenced_and_goes_when_it_is_let_go() {
    for options in [PLAIN, FORCE] {
        let world = World::new();
        world.life(async |daemon| {
            let device = daemon.add(1, &bare("data", 1)).await.device.unwrap();
            daemon.add(2, &bare("other", 2)).await;
            daemon.quiet().await;
            world.host.storage.open(device.dev, "qemu-kvm[77]");
            daemon.drop_volume(1, "data", options).await.unwrap();
            let held = daemon.until(1, "data", |s| s.reason.is_some()).await;
            assert_eq!(held.reason, Some(Reason::DeviceHeld), "{held:?}");
            assert!(held.message.contains("qemu-kvm[77]"), "{}", held.message);
            let doors = StorageDoors::sim(&world.host.storage);
            let state = async || {
                let path = format!("dev/block/{}/device/state", device.dev);
                doors.sysfs.text(&path).await.unwrap()
            };
            assert_eq!(state().await.as_deref(), Some("offline"));
            // The session failed and came back, and iscsid has set its devices running.
            let path = format!("dev/block/{}/device/state", device.dev);
            doors.sysfs.write(&path, "running\n").await.unwrap();
            daemon.quiet().await;
            assert_eq!(state().await.as_deref(), Some("offline"));
            // Nobody else gets the LUN, and the other volume works.
            assert_eq!(daemon.add_fails(2, &bare("again", 1)).await, Reason::SourceInUse);
            assert_eq!(daemon.ready(2, "other").await.reason, None);
            world.host.storage.release(device.dev);
            daemon.gone(1, "data").await;
            daemon.drop_volume(2, "again", PLAIN).await.unwrap();
            daemon.remove(2, "other").await;
            daemon.quiet().await;
            world.assert_clean("held");
        });
    }
}

#[test]
fn a_path_that_is_mounted_on_the_host_is_left_as_it_is() {
    let world = World::new();
    world.life(async |daemon| {
        let device = daemon.add(1, &bare("data", 1)).await.device.unwrap();
        daemon.quiet().await;
        world.host.storage.hold(device.dev, "mount[1]");
        daemon.drop_volume(1, "data", FORCE).await.unwrap();
        let held = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!(held.reason, Some(Reason::DeviceHeld));
        daemon.quiet().await;
        let doors = StorageDoors::sim(&world.host.storage);
        let path = format!("dev/block/{}/device/state", device.dev);
        assert_eq!(doors.sysfs.text(&path).await.unwrap().as_deref(), Some("running"));
        world.host.storage.release(device.dev);
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("mounted");
    });
}
