//! Leases of a lunplugd of before, which an upgrade finds.

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::host::storage::StorageDoors;
use lunplug::spec::{Phase, RemoveOptions};
use serde_json::Value;

use crate::world::{World, mirrored, volume};

/// Brings all leases to the form of before: a target's file has its users in it.
async fn age(world: &World) {
    let rundir = StorageDoors::sim(&world.host.storage).rundir;
    let read = async |name: &str| -> Value {
        serde_json::from_slice(&rundir.load(name).await.unwrap().unwrap()).unwrap()
    };
    for name in rundir.list("leases/iscsi").await.unwrap() {
        let file = format!("leases/iscsi/{name}");
        let (mut lease, mut users) = (read(&file).await, Vec::new());
        for user in rundir.list(&format!("{file}:users")).await.unwrap() {
            let user = format!("{file}:users/{user}");
            users.push(read(&user).await["user"].take());
            rundir.remove(&user).await.unwrap();
        }
        assert!(!users.is_empty(), "nobody uses {file}");
        lease["users"] = users.into();
        rundir.store(&file, &serde_json::to_vec(&lease).unwrap()).await.unwrap();
    }
}

/// An upgrade within a boot, killed before each change of a lease while a volume comes and one goes.
#[test]
fn leases_of_before_are_taken_over_wherever_the_daemon_is_killed() {
    for point in ["rundir.store", "rundir.remove"] {
        let mut skip = 0;
        while is_killed(point, skip) {
            skip += 1;
        }
        assert!(skip > 2, "{point} {skip}");
    }
}

/// Whether there was such a change.
fn is_killed(point: &str, skip: usize) -> bool {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &mirrored("a", 1)).await;
        daemon.add(2, &volume("b", 2)).await;
        daemon.quiet().await;
        age(&world).await;
    });
    let met = world.life(async |daemon| {
        let kill = world.fault(point, skip, FaultAction::Hang);
        world.host.faults.inject(Fault { detail: "leases/".into(), ..kill });
        let work = async {
            daemon.want(2, &volume("c", 3)).await.unwrap();
            daemon.comes_to(2, "c").await;
            daemon.remove(1, "a").await;
            daemon.quiet().await;
        };
        tokio::select! {
            () = world.host.faults.meeting() => true,
            () = work => false,
        }
    });
    world.host.faults.clear();
    world.life(async |daemon| {
        // Perhaps it was not asked for yet, or only the answer was lost.
        let _ = daemon.want(2, &volume("c", 3)).await;
        for name in ["b", "c"] {
            assert_eq!(daemon.ready(2, name).await.phase, Phase::Ready, "{point} {skip}");
        }
        let _ = daemon.drop_volume(1, "a", RemoveOptions::default()).await;
        daemon.gone(1, "a").await;
        for name in ["b", "c"] {
            daemon.remove(2, name).await;
        }
        daemon.quiet().await;
        world.assert_clean(&format!("killed at {point} {skip}"));
    });
    met
}
