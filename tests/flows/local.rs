//! Volumes that are on the host already.

use std::time::Duration;

use lunplug::host::sim::SimBlock;
use lunplug::reason::Reason;
use lunplug::spec::{MultipathPolicy, Phase, VolumeSpec, VolumeStatus};
use lunplug::types::DiskType;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, block, file, key, lv, volume};

const GIB: u64 = 1 << 30;

fn world() -> World {
    let mut world = World::new();
    world.config.reconcile.interval = Duration::from_secs(60);
    world
}

/// Wants a volume in vain; says why, and about which field.
async fn refused(daemon: &Daemon, spec: &VolumeSpec) -> (Reason, Option<String>) {
    let refusal = daemon.want(1, spec).await.unwrap_err();
    (refusal.reason, refusal.field)
}

fn size(status: &VolumeStatus) -> Option<u64> {
    status.device.as_ref().map(|device| device.size)
}

#[test]
fn a_block_device_comes_and_goes_beside_luns_and_stays_on_the_host() {
    let world = world();
    world.life(async |daemon| {
        let status = daemon.add(1, &block("data", 1)).await;
        assert_eq!(status.phase, Phase::Ready, "{}", status.message);
        let device = status.device.unwrap();
        assert_eq!((device.wwid.as_str(), device.size), ("dm.LVM-data1", GIB));
        assert_eq!(daemon.add(1, &volume("lun", 1)).await.phase, Phase::Ready);
        assert_eq!(daemon.add(2, &block("more", 2)).await.phase, Phase::Ready);
        assert_eq!(daemon.add_fails(1, &block("same", 1)).await, Reason::SourceInUse);
        // Only the claim tells that another VM has it.
        assert_eq!(daemon.add_fails(2, &block("same", 1)).await, Reason::SourceInUse);
        for (vm, name) in [(1, "data"), (1, "lun"), (2, "more")] {
            daemon.remove(vm, name).await;
        }
        daemon.remove(2, "same").await;
        daemon.quiet().await;
        world.assert_clean("removed");
        assert_eq!(daemon.add(2, &block("again", 1)).await.phase, Phase::Ready);
    });
}

#[test]
fn what_may_not_be_had_is_refused_before_anything_is_touched() {
    let world = world();
    world.life(async |daemon| {
        let field = |name: &str| Some(format!("volume.{name}"));
        let source = "block:///dev/sda".parse().unwrap();
        let outside = VolumeSpec { source, ..block("data", 1) };
        let path = field("source.block.path");
        assert_eq!(refused(&daemon, &outside).await, (Reason::SourceNotAllowed, path));
        let required = VolumeSpec { multipath: MultipathPolicy::Required, ..block("data", 1) };
        let multipath = (Reason::InvalidOption, field("multipath"));
        assert_eq!(refused(&daemon, &required).await, multipath);
        let lun = VolumeSpec { device: DiskType::Lun, serial: None, ..block("data", 1) };
        assert_eq!(refused(&daemon, &lun).await, (Reason::InvalidOption, field("disk_type")));
        let source = format!("block://{}", lv(9)).parse().unwrap();
        let absent = VolumeSpec { source, ..block("data", 1) };
        assert_eq!(daemon.add_fails(1, &absent).await, Reason::SourceNotFound);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("refused");
    });
    let mut world = world;
    world.config.local.block_roots.clear();
    world.life(async |daemon| {
        let refusal = daemon.want(1, &block("data", 1)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::SourceNotAllowed, "nothing is allowed unless set");
        assert!(refusal.message.contains("local.block_roots"), "{}", refusal.message);
    });
}

/// Nothing is made anew for another daemon, and all of it after a reboot.
fn survives(spec: &VolumeSpec) {
    let world = world();
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
        daemon.quiet().await;
    });
    let before = world.picture();
    world.life(async |daemon| {
        daemon.ready(1, "data").await;
        daemon.quiet().await;
    });
    assert_eq!(world.picture(), before, "nothing was made anew");
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        daemon.ready(1, "data").await;
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("rebooted");
    });
}

#[test]
fn what_is_on_the_node_survives_the_daemon_and_the_node() {
    survives(&block("data", 1));
    survives(&file("data", 1));
}

#[test]
fn another_device_at_the_same_path_is_not_given() {
    let world = world();
    let dev = world.life(async |daemon| {
        let status = daemon.add(1, &block("data", 1)).await;
        daemon.quiet().await;
        status.device.unwrap().dev
    });
    world.shut_down();
    world.host.storage.replace_local(dev, Some(SimBlock::Lvm("LVM-another".into())));
    world.boot();
    world.life(async |daemon| {
        let trouble = |s: &VolumeStatus| s.reason == Some(Reason::IdentityChanged);
        assert_ne!(daemon.until(1, "data", trouble).await.phase, Phase::Ready);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("changed");
    });
}

#[test]
fn a_block_device_grows_while_the_guest_has_it() {
    let mut world = world();
    world.config.expand.auto = true;
    world.life(async |daemon| {
        let device = daemon.add(1, &block("data", 1)).await.device.unwrap();
        world.host.storage.resize_local(device.dev, 2 * device.size);
        daemon.until(1, "data", |s| size(s) == Some(2 * GIB)).await;
        world.host.storage.resize_local(device.dev, 3 * device.size);
        let grown = daemon.registry.expand_volume(&key(1, "data"), Some(3 * GIB)).await;
        grown.unwrap_or_else(|refusal| panic!("{refusal}"));
        assert_eq!(size(&daemon.get(1, "data").await.unwrap()), Some(3 * GIB));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("grown");
    });
}

#[test]
fn a_device_that_was_exchanged_under_a_guest_is_told_and_the_guest_keeps_its_own() {
    let world = world();
    world.life(async |daemon| {
        let device = daemon.add(1, &block("data", 1)).await.device.unwrap();
        world.host.storage.replace_local(device.dev, None);
        let told = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!(told.reason, Some(Reason::DeviceHeld), "{}", told.message);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("exchanged");
    });
}
