//! Portals by the names of their hosts.

use std::net::IpAddr;

use lunplug::host::sim::FaultAction;
use lunplug::reason::Reason;
use lunplug::spec::{Source, VolumeSpec};
use lunplug::types::Portal;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, key, portal, volume};

fn ip(n: u8) -> IpAddr {
    portal(n).ip()
}

/// A volume by the portal `san`, as the API makes it: resolved.
async fn by_name(daemon: &Daemon, name: &str, lun: u64) -> (VolumeSpec, Portal) {
    let host = "san".parse().unwrap();
    let wanted = [host].into();
    let names = daemon.registry.resolve(Some(&key(1, name)), &wanted).await.unwrap();
    let address = *names.values().next().unwrap();
    let mut spec = VolumeSpec { names, ..volume(name, lun) };
    let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
    source.portals = vec![address];
    (spec, address)
}

#[test]
fn a_volume_stays_at_the_address_that_its_portals_name_had() {
    let world = World::new();
    let sim = &world.host.storage;
    sim.set_host("san", ip(1));
    world.life(async |daemon| {
        let (spec, address) = by_name(&daemon, "a", 1).await;
        assert_eq!(address, portal(1));
        daemon.add(1, &spec).await;
        sim.set_host("san", ip(2));
        // Asked for again it is the same volume; another one goes where the name leads now.
        assert_eq!(by_name(&daemon, "a", 1).await, (spec.clone(), portal(1)));
        daemon.want(1, &spec).await.unwrap();
        let (other, address) = by_name(&daemon, "b", 2).await;
        assert_eq!(address, portal(2));
        daemon.add(1, &other).await;
    });
    world.life(async |daemon| {
        daemon.ready(1, "a").await;
        assert_eq!(by_name(&daemon, "a", 1).await.1, portal(1), "after a restart too");
        daemon.remove(1, "a").await;
        assert_eq!(by_name(&daemon, "a", 1).await.1, portal(2), "it is another volume now");
        daemon.remove(1, "b").await;
        world.assert_clean("removed");
    });
}

#[test]
fn a_name_that_is_unknown_or_not_answered_is_told() {
    let world = World::new();
    world.life(async |daemon| {
        let refused = async || {
            let wanted = ["san".parse().unwrap()].into();
            let refusal = daemon.registry.resolve(None, &wanted).await.unwrap_err();
            assert_eq!(refusal.reason, Reason::PortalNotResolved);
            refusal.message
        };
        assert!(refused().await.contains("san:3260"));
        world.inject("resolver.resolve", 0, FaultAction::Hang);
        let late = refused().await;
        assert!(late.contains("timed out"), "{late}");
    });
}
