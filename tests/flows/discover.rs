//! Discovery: what a portal lists, and that nothing of the asking stays.

use std::time::Duration;

use lunplug::connector::{Connectors, Settings};
use lunplug::host::sim::{FaultAction, PortalState};
use lunplug::host::storage::StorageDoors;
use lunplug::reason::Reason;
use lunplug::types::{Chap, SecretText};
use lunplug::vm::facade::{DiscoverWith, Volumes};

use crate::world::{Daemon, World, portal, target};

fn chap(secret: &str, back: &str) -> Chap {
    let text = |t: &str| SecretText::from(t.to_owned());
    let array = if back.is_empty() { "" } else { "array" };
    Chap::new("disco".into(), text(secret), array.into(), text(back)).unwrap()
}

async fn refused(daemon: &Daemon, with: Option<DiscoverWith>) -> (Reason, String) {
    let refusal = daemon.registry.discover(portal(1), with).await.unwrap_err();
    assert!(!refusal.message.contains("hush"), "{refusal}");
    (refusal.reason, refusal.message)
}

#[test]
fn a_portal_lists_its_targets_and_no_record_is_made() {
    let world = World::new();
    let sim = &world.host.storage;
    sim.add_target(&"iqn.2026-01.org.lunplug:other".parse().unwrap(), &[portal(2)]);
    world.life(async |daemon| {
        let found = daemon.registry.discover(portal(1), None).await.unwrap();
        assert_eq!((found.len(), &found[0].target), (1, &target()));
        assert_eq!(found[0].portals, [portal(1), portal(2)]);
        assert_eq!(daemon.registry.discover(portal(2), None).await.unwrap().len(), 2);
        for state in [PortalState::Dead, PortalState::Refusing] {
            sim.set_portal(portal(1), state);
            assert_eq!(refused(&daemon, None).await.0, Reason::PortalUnreachable);
        }
        world.assert_clean("discovered");
    });
}

#[test]
fn credentials_for_discovery_of_either_kind() {
    let world = World::new();
    let sim = &world.host.storage;
    sim.set_discovery_chap(Some(chap("hush-1", "hush-2")));
    let name = "disco".parse().unwrap();
    let secret = || Some(DiscoverWith::Secret("disco".parse().unwrap()));
    let given = |secret, back| Some(DiscoverWith::Chap(chap(secret, back)));
    world.life(async |daemon| {
        assert_eq!(refused(&daemon, None).await.0, Reason::LoginRefused);
        assert_eq!(refused(&daemon, given("hush-x", "")).await.0, Reason::ChapRejected);
        assert_eq!(refused(&daemon, given("hush-1", "hush-x")).await.0, Reason::ChapTargetUnproven);
        assert_eq!(refused(&daemon, secret()).await.0, Reason::SecretUnavailable);
        // Those for sessions are no credentials for discovery.
        sim.set_secret(&name, Some(&[("node.session.auth.username", "disco")]));
        let (reason, message) = refused(&daemon, secret()).await;
        assert_eq!(reason, Reason::SecretUnavailable);
        assert!(message.contains("discovery.sendtargets.auth.username"), "{message}");
        sim.set_secret(
            &name,
            Some(&[
                ("discovery.sendtargets.auth.username", "disco"),
                ("discovery.sendtargets.auth.password", "hush-1"),
            ]),
        );
        for with in [secret(), given("hush-1", ""), given("hush-1", "hush-2")] {
            assert_eq!(daemon.registry.discover(portal(1), with).await.unwrap().len(), 1);
        }
        sim.set_discovery_chap(None);
        assert_eq!(refused(&daemon, secret()).await.0, Reason::ChapNotWanted);
        world.assert_clean("discovered");
        sim.add_discovery(portal(1));
        let before = world.picture();
        assert_eq!(refused(&daemon, secret()).await.0, Reason::Unsupported);
        assert_eq!(daemon.registry.discover(portal(1), None).await.unwrap().len(), 1);
        assert_eq!(world.picture(), before);
    });
}

#[test]
fn a_daemon_killed_in_a_discovery_leaves_no_credentials() {
    for step in 0.. {
        let world = World::new();
        world.host.storage.set_discovery_chap(Some(chap("hush-1", "")));
        let met = world.life(async |daemon| {
            world.inject("", step, FaultAction::Hang);
            let with = Some(DiscoverWith::Chap(chap("hush-1", "")));
            let asked = daemon.registry.discover(portal(1), with);
            tokio::time::timeout(Duration::from_millis(200), asked).await.is_err()
        });
        world.host.faults.clear();
        world.life(async |_| world.assert_clean(&format!("killed at call {step}")));
        if !met {
            break;
        }
    }
}

/// Another lunplugd of the node starts, and sweeps what killed ones left, while this one asks.
#[test]
fn a_discovery_keeps_its_record_while_another_daemon_starts() {
    let world = World::new();
    let sim = &world.host.storage;
    sim.set_discovery_chap(Some(chap("hush-1", "")));
    world.life(async |daemon| {
        world.inject("cmd.run", 0, FaultAction::Stall);
        let with = Some(DiscoverWith::Chap(chap("hush-1", "")));
        let starts = async {
            world.host.faults.meeting().await;
            let doors = StorageDoors::sim(sim);
            Connectors::new(doors, Settings::default()).sweep().await.unwrap();
            world.host.faults.clear();
        };
        let (found, ()) = tokio::join!(daemon.registry.discover(portal(1), with), starts);
        assert_eq!(found.unwrap().len(), 1);
        world.assert_clean("discovered");
    });
}

/// Whoever asked may go away: what was begun for it is ended all the same.
#[test]
fn a_discovery_that_is_given_up_removes_its_record() {
    let world = World::new();
    world.host.storage.set_discovery_chap(Some(chap("hush-1", "")));
    world.life(async |daemon| {
        world.inject("cmd.run", 0, FaultAction::Hang);
        let with = Some(DiscoverWith::Chap(chap("hush-1", "")));
        let asked = daemon.registry.discover(portal(1), with);
        assert!(tokio::time::timeout(Duration::from_secs(1), asked).await.is_err());
        daemon.quiet().await;
        world.assert_clean("given up");
    });
}
