//! Nothing is taken from under a guest unasked.

use std::time::Duration;

use lunplug::config::GuestUnproven;
use lunplug::host::sim::domain::{SimDomain, Unplug};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec};
use lunplug::types::Bus;

use crate::world::{Daemon, FORCE, World, domain, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

fn change(world: &World, change: impl FnOnce(&mut SimDomain)) {
    let endpoint = World::endpoint(1);
    world.host.hypervisor.with_domain(&endpoint, &domain(1), change).unwrap();
}

fn virtio() -> VolumeSpec {
    VolumeSpec { bus: Bus::Virtio, ..volume("data", 1) }
}

/// A removal that is refused, and changes nothing.
async fn refused(world: &World, daemon: &Daemon, reason: Reason) {
    let before = world.picture();
    let refusal = daemon.drop_volume(1, "data", PLAIN).await.unwrap_err();
    assert_eq!(refusal.reason, reason, "{}", refusal.message);
    daemon.quiet().await;
    assert_eq!(world.picture(), before);
    let status = daemon.get(1, "data").await.unwrap();
    assert_eq!((status.phase, status.reason), (Phase::Ready, None));
}

#[test]
fn a_disk_in_use_stays_unless_forced() {
    for spec in [volume("data", 1), virtio()] {
        for use_it in [
            (|d| drop(d.agent.mounted.insert("data".into(), "/srv".into()))) as fn(&mut SimDomain),
            |d| drop(d.agent.holders.insert("data".into(), "vg-lv".into())),
        ] {
            let world = World::new();
            world.life(async |daemon| {
                daemon.add(1, &spec).await;
                daemon.quiet().await;
                change(&world, use_it);
                refused(&world, &daemon, Reason::InUseByGuest).await;
                daemon.drop_volume(1, "data", FORCE).await.unwrap();
                daemon.gone(1, "data").await;
                daemon.quiet().await;
                world.assert_clean("in use");
            });
        }
    }
}

#[test]
fn without_an_agent_a_setting_decides() {
    for (allowed, forced) in [(false, false), (false, true), (true, false)] {
        let mut world = World::new();
        world.config.guest_unproven =
            if allowed { GuestUnproven::Allow } else { GuestUnproven::Refuse };
        world.life(async |daemon| {
            daemon.add(1, &volume("data", 1)).await;
            daemon.quiet().await;
            change(&world, |d| d.agent.connected = false);
            if !allowed {
                refused(&world, &daemon, Reason::GuestUnproven).await;
            }
            if allowed || forced {
                daemon
                    .drop_volume(1, "data", RemoveOptions { force: forced, ..PLAIN })
                    .await
                    .unwrap();
                daemon.gone(1, "data").await;
                daemon.quiet().await;
                world.assert_clean("no agent");
            }
        });
    }
}

/// As while its package is upgraded, or the guest boots.
#[test]
fn an_agent_that_starts_again_is_waited_for() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        change(&world, |d| d.agent.connected = false);
        let back = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            change(&world, |d| d.agent.connected = true);
        };
        let (removed, ()) = tokio::join!(daemon.drop_volume(1, "data", PLAIN), back);
        removed.unwrap();
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("the agent is back");
    });
}

/// The guest still has a working disk.
fn assert_works(world: &World) {
    let picture = world.picture();
    for part in ["live ", "  node data ", "grant ", "dm ", "session "] {
        assert!(picture.contains(part), "{part:?} is not in {picture}");
    }
}

#[test]
fn a_silent_virtio_guest_keeps_its_disk_until_it_acknowledges() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &virtio()).await;
        change(&world, |d| d.unplug = Unplug::Silent);
        daemon.drop_volume(1, "data", PLAIN).await.unwrap();
        for _ in 0..3 {
            let silent =
                |s: &lunplug::spec::VolumeStatus| s.reason == Some(Reason::DetachUnacknowledged);
            assert_eq!(daemon.until(1, "data", silent).await.phase, Phase::Detaching);
            assert_works(&world);
            let refusal = daemon.want(1, &virtio()).await.unwrap_err();
            assert_eq!(refusal.reason, Reason::VolumeExists);
            daemon.quiet().await;
        }
        world.host.hypervisor.acknowledge(&World::endpoint(1), &domain(1), "ua-lunplug-data");
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("silent");
    });
}

#[test]
fn what_a_silent_guest_acknowledged_to_nobody_is_noticed_after_a_restart() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &virtio()).await;
        change(&world, |d| d.unplug = Unplug::Silent);
        daemon.drop_volume(1, "data", PLAIN).await.unwrap();
        daemon.until(1, "data", |s| s.reason.is_some()).await;
    });
    world.host.hypervisor.acknowledge(&World::endpoint(1), &domain(1), "ua-lunplug-data");
    world.life(async |daemon| {
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("acknowledged to nobody");
    });
}

#[test]
fn a_refusing_virtio_guest_keeps_its_disk() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &virtio()).await;
        change(&world, |d| d.unplug = Unplug::Refuse);
        daemon.drop_volume(1, "data", PLAIN).await.unwrap();
        let status = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!(status.phase, Phase::Detaching);
        assert_eq!(status.reason, Some(Reason::GuestRefusedUnplug));
        assert_works(&world);
        change(&world, |d| d.unplug = Unplug::Acknowledge);
        daemon.drop_volume(1, "data", PLAIN).await.unwrap();
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("refusing");
    });
}

#[test]
fn a_guest_that_ends_lets_go() {
    for spec in [volume("data", 1), virtio()] {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &spec).await;
            change(&world, |d| d.unplug = Unplug::Silent);
            if spec.bus == Bus::Virtio {
                daemon.drop_volume(1, "data", PLAIN).await.unwrap();
                daemon.until(1, "data", |s| s.reason.is_some()).await;
            }
            world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
            let _ = daemon.drop_volume(1, "data", PLAIN).await;
            daemon.gone(1, "data").await;
            daemon.quiet().await;
            world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
            world.assert_clean("ended");
        });
    }
}
