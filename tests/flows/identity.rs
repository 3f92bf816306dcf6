//! Right device or none.

use lunplug::host::sim::{FaultAction, SimLun};
use lunplug::host::sysfs::Sysfs;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, Phase, RemoveOptions, VolumeSpec};
use lunplug::types::Wwid;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, lun, portal, single, target, vm, volume};

fn wwid(number: u32) -> Wwid {
    format!("naa.6001405{number:025x}").parse().unwrap()
}

/// Another LUN at the number 1, of the same size.
fn swap(world: &World) {
    world.host.storage.replace_lun(&target(), lun(1), SimLun::new(wwid(1), 1 << 30));
}

async fn fails(world: &World, daemon: &Daemon, spec: &VolumeSpec, reason: Reason) {
    let before = world.picture();
    assert_eq!(daemon.add_fails(1, spec).await, reason);
    let name = spec.name.as_str();
    assert_eq!(daemon.get(1, name).await.map(|s| s.phase), Some(Phase::Failed));
    daemon.quiet().await;
    assert_eq!(world.picture(), before, "{reason}");
    let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
}

#[test]
fn a_lun_swapped_between_two_attaches_is_refused_until_it_is_accepted() {
    for spec in [volume("data", 1), single("data", 1)] {
        let world = World::new();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            daemon.remove(1, "data").await;
        });
        swap(&world);
        world.life(async |daemon| {
            fails(&world, &daemon, &spec, Reason::IdentityChanged).await;
            let accept = AddOptions { accept_new_identity: true, ..AddOptions::default() };
            daemon.registry.add_volume(&vm(1), spec.clone(), accept).await.unwrap();
            let status = daemon.ready(1, "data").await;
            assert_eq!(status.device.unwrap().wwid, wwid(1));
            daemon.remove(1, "data").await;
            // From now on that is the one.
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("swapped");
        });
    }
}

#[test]
fn an_expectation_that_is_not_met() {
    let world = World::new();
    world.life(async |daemon| {
        let wrong_wwid = VolumeSpec { expect_wwid: Some(wwid(9)), ..volume("data", 1) };
        fails(&world, &daemon, &wrong_wwid, Reason::IdentityMismatch).await;
        let wrong_size = VolumeSpec { expect_size: Some(1 << 31), ..volume("data", 1) };
        fails(&world, &daemon, &wrong_size, Reason::IdentityMismatch).await;
        let other = Some("another".parse().unwrap());
        let wrong_serial = VolumeSpec { expect_unit_serial: other, ..volume("data", 1) };
        fails(&world, &daemon, &wrong_serial, Reason::IdentityMismatch).await;
        swap(&world);
        let serial = wwid(1).as_str().replace("naa.", "");
        let right = VolumeSpec {
            expect_wwid: Some(wwid(1)),
            expect_unit_serial: Some(serial.parse().unwrap()),
            expect_size: Some(1 << 30),
            ..volume("data", 1)
        };
        assert_eq!(daemon.add(1, &right).await.reason, None);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("expectations");
    });
}

#[test]
fn a_lun_without_a_unique_designator() {
    let world = World::new();
    let nameless = SimLun::new(wwid(1), 1 << 30).nameless();
    world.host.storage.replace_lun(&target(), lun(1), nameless);
    world.life(async |daemon| {
        fails(&world, &daemon, &volume("data", 1), Reason::NoUniqueIdentity).await;
        fails(&world, &daemon, &single("data", 1), Reason::NoUniqueIdentity).await;
        world.assert_clean("nameless");
    });
}

#[test]
fn two_portals_with_different_luns() {
    let world = World::new();
    world.life(async |daemon| {
        // The second path is scanned for when the array has another LUN there already.
        let mut stall = world.fault("sysfs.write", 0, FaultAction::Stall);
        stall.detail = "host3/scan".into();
        world.host.faults.inject(stall);
        daemon.want(1, &volume("data", 1)).await.unwrap();
        world.host.faults.meeting().await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        swap(&world);
        world.host.faults.clear();
        let status = daemon.comes_to(1, "data").await;
        assert_eq!(status.reason, Some(Reason::PathsDisagree), "{status:?}");
        daemon.quiet().await;
        world.assert_clean("two LUNs");
    });
}

/// Somebody else's session, with a device of theirs at our LUN's number that the array has since
/// given to another LUN.
async fn stale(world: &World) -> lunplug::types::DevNum {
    let storage = &world.host.storage;
    storage.add_session(&target(), portal(1), "default");
    let host = storage.list("class/iscsi_host").await.unwrap()[0].clone();
    storage.write(&format!("class/scsi_host/{host}/scan"), "0 0 1").await.unwrap();
    let number = host.trim_start_matches("host");
    let disks = format!("bus/scsi/devices/{number}:0:0:1/block");
    let name = storage.list(&disks).await.unwrap()[0].clone();
    let dev = storage.read(&format!("{disks}/{name}/dev")).await.unwrap();
    swap(world);
    String::from_utf8(dev).unwrap().trim().parse().unwrap()
}

#[test]
fn a_stale_device_is_removed_only_when_nobody_holds_it() {
    let world = World::new();
    world.host.storage.set_multipathd(false);
    world.life(async |daemon| {
        let dev = stale(&world).await;
        let before = world.picture();
        world.host.storage.hold(dev, "mount[77]");
        assert_eq!(daemon.add_fails(1, &single("data", 1)).await, Reason::StaleDeviceHeld);
        daemon.quiet().await;
        assert!(before.lines().all(|l| world.picture().contains(l) || l.starts_with("disk ")));
        world.host.storage.release(dev);
        let status = daemon.add(1, &single("data", 1)).await;
        assert_eq!(status.reason, None, "{}", status.message);
        assert_eq!(status.device.unwrap().wwid, wwid(1));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        // Their session stays; their stale device is gone.
        let kept = |picture: &str| {
            let lines = picture.lines().filter(|l| !l.starts_with("disk "));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(kept(&world.picture()), kept(&before));
        assert!(!world.picture().contains("\ndisk "));
    });
}

#[test]
fn a_node_can_take_only_volumes_whose_identity_is_given() {
    let mut world = World::new();
    world.config.require_wwid = true;
    world.host.storage.replace_lun(&target(), lun(1), SimLun::new(wwid(1), 1 << 30));
    world.life(async |daemon| {
        assert!(daemon.registry.node().await.require_wwid);
        let refusal = daemon.want(1, &volume("a", 1)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::WwidRequired);
        assert_eq!(refusal.field.as_deref(), Some("volume.wwid"));
        let mut given = volume("a", 1);
        given.expect_wwid = Some(wwid(1));
        daemon.want(1, &given).await.unwrap();
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
    });
}
