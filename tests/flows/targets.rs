//! A volume whose LUN is to be had at two targets.

use std::time::Duration;

use lunplug::host::sim::{Fault, FaultAction, PortalState, SimLun};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, Source, VolumeSpec};
use lunplug::types::Outcome;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, key, lun, mirror, mirrored, portal, target, volume};

const GIB: u64 = 1 << 30;

/// A volume by the mirror alone.
fn at_mirror(name: &str, lun: u64) -> VolumeSpec {
    let source = format!("iscsi://192.0.2.3/{}/{}", mirror(), lun + 100);
    VolumeSpec { source: source.parse().unwrap(), ..volume(name, lun) }
}

/// The same as another asks for it who has the targets in another order.
fn turned(spec: &VolumeSpec) -> VolumeSpec {
    let url = spec.source.to_string();
    let (one, two) = url.strip_prefix("iscsi://").unwrap().split_once('+').unwrap();
    VolumeSpec { source: format!("iscsi://{two}+{one}").parse().unwrap(), ..spec.clone() }
}

async fn paths(daemon: &Daemon, name: &str, many: u32) {
    let has = |s: &lunplug::spec::VolumeStatus| s.device.as_ref().is_some_and(|d| d.paths == many);
    daemon.until(1, name, |s| s.phase == Phase::Ready && has(s)).await;
}

#[test]
fn one_disk_by_all_paths_of_both_and_nothing_left() {
    let world = World::new();
    world.life(async |daemon| {
        for spec in [mirrored("data", 1), turned(&mirrored("data", 1))] {
            let status = daemon.add(1, &spec).await;
            assert_eq!((status.phase, status.reason), (Phase::Ready, None));
            assert_eq!(status.device.map(|d| d.paths), Some(4));
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("two targets");
        }
    });
}

/// The portals of the second target.
fn mirror_is(world: &World, state: PortalState) {
    for number in [3, 4] {
        world.host.storage.set_portal(portal(number), state);
    }
}

/// The volume goes on by the first target alone, and has all its paths when the second is back.
async fn comes_back_whole(world: &World, daemon: &Daemon) {
    paths(daemon, "data", 2).await;
    mirror_is(world, PortalState::Alive);
    paths(daemon, "data", 4).await;
    daemon.remove(1, "data").await;
    daemon.quiet().await;
    world.assert_clean("the second target was away");
}

#[test]
fn a_dead_target_is_told_of_and_costs_the_other_nothing() {
    let mut world = World::new();
    world.config.reconcile.interval = Duration::from_secs(60);
    world.life(async |daemon| {
        let status = daemon.add(1, &mirrored("data", 1)).await;
        assert_eq!(status.reason, None);
        mirror_is(&world, PortalState::Dead);
        comes_back_whole(&world, &daemon).await;
    });
}

#[test]
fn a_target_that_does_not_let_us_in_is_tried_again_and_joins() {
    let mut world = World::new();
    world.config.reconcile.interval = Duration::from_secs(60);
    mirror_is(&world, PortalState::Denied);
    world.life(async |daemon| {
        daemon.want(1, &mirrored("data", 1)).await.unwrap();
        comes_back_whole(&world, &daemon).await;
    });
}

#[test]
fn the_same_lun_is_one_whatever_target_it_is_asked_for_by() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &mirrored("data", 1)).await;
        for other in [volume("again", 1), at_mirror("again", 1), turned(&mirrored("again", 1))] {
            // Of this VM by its request, of another one by what the LUN proves to be.
            let refusal = daemon.want(1, &other).await.unwrap_err();
            assert_eq!(refusal.reason, Reason::SourceInUse, "{}", other.source);
            let reason = daemon.add_fails(2, &other).await;
            assert_eq!(reason, Reason::SourceInUse, "{}", other.source);
            let _ = daemon.drop_volume(2, "again", crate::world::FORCE).await;
            daemon.quiet().await;
        }
        assert_eq!(daemon.ready(1, "data").await.device.map(|d| d.paths), Some(4));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("asked for by every target");
    });
}

#[test]
fn two_targets_that_claim_one_identity_for_two_luns_are_refused() {
    let plain = || {
        let world = World::new();
        let wwid = world.life(async |daemon| {
            let wwid = daemon.add(1, &volume("data", 1)).await.device.unwrap().wwid;
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            wwid
        });
        (world, SimLun::new(wwid, GIB))
    };
    for change in [
        (|lun| SimLun { size: 2 * GIB, ..lun }) as fn(SimLun) -> SimLun,
        |lun| SimLun { serial: Some("S-2".into()), ..lun },
        |lun| SimLun { model: "other".into(), ..lun },
    ] {
        let (world, same) = plain();
        world.host.storage.add_lun(&mirror(), lun(101), change(same));
        world.life(async |daemon| {
            let status = daemon.want(1, &mirrored("data", 1)).await;
            assert!(status.is_ok());
            let status = daemon.comes_to(1, "data").await;
            assert_eq!(status.reason, Some(Reason::PathsDisagree), "{status:?}");
            daemon.quiet().await;
            world.assert_clean("two LUNs of one identity");
        });
    }
}

#[test]
fn an_expand_is_over_the_paths_of_both() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &mirrored("data", 1)).await;
        let expand = async || daemon.registry.expand_volume(&key(1, "data"), None).await;
        world.host.storage.resize_lun(&target(), lun(1), 2 * GIB);
        let refusal = expand().await.unwrap_err();
        assert_eq!(refusal.reason, Reason::SizesDisagree, "{}", refusal.message);
        world.host.storage.resize_lun(&mirror(), lun(101), 2 * GIB);
        let expanded = expand().await.unwrap();
        assert!(matches!(expanded, Outcome::Done(_)));
        assert_eq!(daemon.ready(1, "data").await.device.map(|d| d.size), Some(2 * GIB));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("expanded by both targets");
    });
}

/// A volume stored before there were several targets is read as it was.
#[test]
fn a_source_of_one_target_is_stored_as_it_ever_was() {
    let stored = r#"{"iscsi":{"target":"iqn.2026-01.org.lunplug:sim","portals":["192.0.2.1:3260"],"lun":1}}"#;
    let source: Source = serde_json::from_str(stored).unwrap();
    assert_eq!(source, "iscsi://192.0.2.1/iqn.2026-01.org.lunplug:sim/1".parse().unwrap());
    assert_eq!(serde_json::to_string(&source).unwrap(), stored);
    let two = mirrored("data", 1).source;
    assert_eq!(serde_json::from_str::<Source>(&serde_json::to_string(&two).unwrap()).unwrap(), two);
}

/// The daemon is killed between the leases of the two targets, and what it had begun is wanted no more.
#[test]
fn a_kill_between_the_leases_of_two_targets_leaves_nothing() {
    for detail in ["_3asim", "_3amirror"] {
        for skip in 0..4 {
            let world = World::new();
            let spec = mirrored("data", 1);
            world.life(async |daemon| {
                daemon.quiet().await;
                let kill = world.fault("rundir.store", skip, FaultAction::Hang);
                let detail = format!("leases/iscsi/iqn.2026-01.org.lunplug{detail}");
                world.host.faults.inject(Fault { detail, ..kill });
                daemon.want(1, &spec).await.unwrap();
                world.host.faults.meeting().await;
            });
            world.host.faults.clear();
            world.life(async |daemon| {
                daemon.remove(1, "data").await;
                daemon.quiet().await;
                world.assert_clean("killed between two leases");
            });
        }
    }
}
