//! Initiator names and ifaces of a volume's own.

use lunplug::reason::Reason;
use lunplug::spec::{Phase, Source, VolumeSpec};

use crate::world::{World, initiator, initiator_name, target, volume};

#[test]
fn volumes_of_several_initiators_come_and_go() {
    let world = World::new();
    world.life(async |daemon| {
        // The target may show LUN 1 of the one and of the other as two LUNs, so they are two sources.
        daemon.add(1, &volume("node", 1)).await;
        daemon.add(1, &initiator("own", 2, 1)).await;
        daemon.add(2, &initiator("other", 3, 2)).await;
        daemon.want(2, &initiator("again", 2, 2)).await.unwrap();
        let taken = daemon.until(2, "again", |s| s.phase == Phase::Failed).await;
        assert_eq!(taken.reason, Some(Reason::SourceInUse), "{}", taken.message);
        let storage = world.host.storage.snapshot();
        assert_eq!(storage.lines().filter(|l| l.starts_with("iface lunplug-")).count(), 2);
    });
    world.life(async |daemon| {
        daemon.ready(1, "own").await;
        daemon.ready(2, "other").await;
        daemon.remove(1, "node").await;
        daemon.remove(1, "own").await;
        daemon.remove(2, "other").await;
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

#[test]
fn a_target_that_admits_no_such_initiator_is_told() {
    let world = World::new();
    world.host.storage.set_initiators(&target(), &[initiator_name(1)]);
    world.life(async |daemon| {
        daemon.want(1, &initiator("other", 1, 2)).await.unwrap();
        let refused = daemon.until(1, "other", |s| s.phase == Phase::Failed).await;
        assert_eq!(refused.reason, Some(Reason::LoginRefused), "{}", refused.message);
        daemon.add(1, &initiator("own", 1, 1)).await;
        daemon.remove(1, "own").await;
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

#[test]
fn an_iface_that_the_node_has_not_is_named() {
    let world = World::new();
    world.life(async |daemon| {
        let mut spec: VolumeSpec = volume("data", 1);
        let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
        source.iface.name = "eth7".parse().unwrap();
        daemon.want(1, &spec).await.unwrap();
        let refused = daemon.until(1, "data", |s| s.phase == Phase::Failed).await;
        assert_eq!(refused.reason, Some(Reason::IfaceNotFound));
        assert!(refused.message.contains("eth7"), "{}", refused.message);
        daemon.quiet().await;
        world.assert_clean("refused");
    });
}
