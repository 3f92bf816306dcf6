//! A LUN that its target exports write-protected.

use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec};

use crate::expand::{kinds, seen};
use crate::world::{World, lun, portal, target, volume};

#[test]
fn a_write_protected_lun_is_given_to_who_only_reads_and_refused_to_others() {
    for spec in kinds() {
        let world = World::new();
        world.host.storage.protect_lun(&target(), lun(1), true);
        world.life(async |daemon| {
            let before = world.picture();
            assert_eq!(daemon.add_fails(1, &spec).await, Reason::LunReadOnly);
            let message = daemon.get(1, "data").await.unwrap().message;
            assert!(message.contains("2:0:0:1 (sda)"), "{message}");
            daemon.quiet().await;
            assert_eq!(world.picture(), before, "{message}");
            daemon.drop_volume(1, "data", RemoveOptions::default()).await.unwrap();
            let reading = VolumeSpec { read_only: true, ..spec.clone() };
            assert_eq!(daemon.add(1, &reading).await.reason, None);
            daemon.remove(1, "data").await;
            // It becomes writable: the next attach sees that.
            world.host.storage.protect_lun(&target(), lun(1), false);
            assert_eq!(daemon.add(1, &spec).await.reason, None);
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("protected");
        });
    }
}

/// A path that is there already (of a shared LUN that another VM only reads) is read anew, and the map
/// above it, made for reading only, is made writable.
#[test]
fn a_map_that_was_made_for_reading_becomes_writable_with_its_paths() {
    for multipathd_sees_it in [true, false] {
        let world = World::new();
        world.host.storage.protect_lun(&target(), lun(1), true);
        let shared = VolumeSpec { shareable: true, ..volume("data", 1) };
        let reading = VolumeSpec { read_only: true, ..shared.clone() };
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &reading).await.reason, None);
            assert_eq!(daemon.add_fails(2, &shared).await, Reason::LunReadOnly);
            daemon.drop_volume(2, "data", RemoveOptions::default()).await.unwrap();
            daemon.quiet().await;
            world.host.storage.set_multipathd_auto(multipathd_sees_it);
            world.host.storage.protect_lun(&target(), lun(1), false);
            assert_eq!(daemon.add(2, &shared).await.reason, None);
            daemon.remove(1, "data").await;
            daemon.remove(2, "data").await;
            daemon.quiet().await;
            world.assert_clean("shared and protected");
        });
    }
}

#[test]
fn a_lun_that_becomes_write_protected_under_a_guest_is_told() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        let protect = |read_only| {
            world.host.storage.protect_lun(&target(), lun(1), read_only);
            for number in [1, 2] {
                world.host.storage.rescan_path(&target(), lun(1), portal(number));
            }
        };
        protect(true);
        let told = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!((told.phase, told.reason), (Phase::Ready, Some(Reason::LunReadOnly)));
        assert!(seen(&world, 1, "data").is_some(), "the guest keeps it");
        protect(false);
        daemon.ready(1, "data").await;
    });
}
