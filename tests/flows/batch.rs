//! Many volumes in one request, and the whole set of a VM's volumes.

use std::collections::BTreeMap;

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, Phase, RemoveOptions, Revision, VolumeSpec};
use lunplug::types::VolumeName;
use lunplug::vm::facade::{Answer, Refusal, Set, Synced, Volumes, Wish};

use crate::faults::each;
use crate::world::{Daemon, World, mirror, node, vm, volume};

fn add(spec: VolumeSpec) -> Wish {
    Wish::Add { spec: spec.into(), options: AddOptions::default() }
}

fn remove(name: &str) -> Wish {
    Wish::Remove { name: name.parse().unwrap(), options: RemoveOptions::default() }
}

/// A set of volumes, each of which is named after its LUN.
fn set(number: i64, luns: &[u64]) -> Set {
    let name = |lun: &u64| format!("v{lun}");
    let asked = luns.iter().map(name).collect::<Vec<_>>().join(",").into();
    let volume = |lun: &u64| (volume(&name(lun), *lun), AddOptions::default());
    Set {
        revision: Revision { number, asked },
        volumes: luns.iter().map(volume).collect(),
        others: std::collections::BTreeSet::new(),
        removals: RemoveOptions::default(),
    }
}

impl Daemon {
    async fn sync(&self, set: Set) -> Result<Synced, Refusal> {
        self.registry.sync_volumes(&vm(1), set).await
    }

    /// Waits until a set is there as it was asked for, and nothing else.
    async fn has(&self, luns: &[u64]) {
        for lun in luns {
            self.ready(1, &format!("v{lun}")).await;
        }
        for status in self.registry.list_volumes(Some(&vm(1))).await {
            let name = status.key.volume.as_str();
            if !luns.iter().any(|lun| name == format!("v{lun}")) {
                self.gone(1, name).await;
            }
        }
    }
}

fn changed(answers: &[Answer]) -> Vec<bool> {
    answers.iter().map(|answer| answer.as_ref().unwrap().changed()).collect()
}

#[test]
fn many_volumes_come_and_go_together() {
    let world = World::new();
    world.life(async |daemon| {
        let wishes = |names: std::ops::Range<u64>| {
            names.map(|n| add(volume(&format!("v{n}"), n))).collect::<Vec<_>>()
        };
        let answers = daemon.registry.change_volumes(&vm(1), wishes(0..12)).await.unwrap();
        assert_eq!(changed(&answers), [true; 12]);
        daemon.has(&(0..12).collect::<Vec<_>>()).await;
        let answers = daemon.registry.change_volumes(&vm(1), wishes(10..14)).await.unwrap();
        assert_eq!(changed(&answers), [false, false, true, true]);
        let all = (0..14).map(|n| remove(&format!("v{n}"))).collect();
        let answers = daemon.registry.change_volumes(&vm(1), all).await.unwrap();
        assert_eq!(changed(&answers), [true; 14]);
        daemon.has(&[]).await;
        daemon.quiet().await;
        world.assert_clean("after many volumes");
    });
}

/// One volume's portals hang in login until the fault is cleared; the others are ready long before.
#[test]
fn a_portal_that_hangs_holds_up_its_volume_alone() {
    let world = World::new();
    world.life(async |daemon| {
        let source = format!("iscsi://192.0.2.3,192.0.2.4/{}/105", mirror());
        let hung = VolumeSpec { source: source.parse().unwrap(), ..volume("hung", 5) };
        let stall = world.fault("cmd.run", 0, FaultAction::Stall);
        let detail = mirror().to_string();
        world.host.faults.inject(Fault { detail, times: None, ..stall });
        let wishes = vec![add(hung), add(volume("v1", 1)), add(volume("v2", 2))];
        let answers = daemon.registry.change_volumes(&vm(1), wishes).await.unwrap();
        assert_eq!(changed(&answers), [true; 3]);
        daemon.ready(1, "v1").await;
        daemon.ready(1, "v2").await;
        let met = world.host.faults.met().unwrap_or_default();
        assert!(met.contains(&mirror().to_string()), "{met}");
        let status = daemon.get(1, "hung").await.unwrap();
        assert_eq!((status.phase, status.reason), (Phase::Bound, None), "it still waits");
        // Nor does it hold up that the others go again.
        let answers =
            daemon.registry.change_volumes(&vm(1), vec![remove("v1"), remove("v2")]).await.unwrap();
        assert_eq!(changed(&answers), [true; 2]);
        daemon.gone(1, "v1").await;
        daemon.gone(1, "v2").await;
        world.host.faults.clear();
        daemon.ready(1, "hung").await;
        daemon.remove(1, "hung").await;
        daemon.quiet().await;
        world.assert_clean("after the portal came back");
    });
}

#[test]
fn a_volume_that_fails_fails_alone() {
    let world = World::new();
    world.life(async |daemon| {
        let beside = volume("beside", 1);
        let missing = VolumeSpec {
            source: format!("iscsi://192.0.2.1/{}/99", crate::world::target()).parse().unwrap(),
            ..volume("missing", 2)
        };
        let wishes = vec![add(beside), add(missing), add(volume("twin", 1)), remove("none")];
        let answers = daemon.registry.change_volumes(&vm(1), wishes).await.unwrap();
        let reason = |n: usize| answers[n].as_ref().map_err(|refusal| refusal.reason);
        assert!(reason(0).is_ok() && reason(1).is_ok());
        assert_eq!(reason(2).unwrap_err(), Reason::SourceInUse);
        assert_eq!(reason(3).unwrap_err(), Reason::VolumeNotFound);
        daemon.ready(1, "beside").await;
        assert_eq!(daemon.comes_to(1, "missing").await.reason, Some(Reason::LunNotFound));
    });
}

#[test]
fn a_set_is_made_so_and_replaces_nothing_silently() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.sync(set(1, &[1, 2, 3])).await.unwrap();
        daemon.has(&[1, 2, 3]).await;
        let before = daemon.get(1, "v2").await.unwrap();
        let mut next = set(2, &[2, 3, 4]);
        next.volumes[1].0.read_only = true;
        let synced = daemon.sync(next).await.unwrap();
        let refusal = synced.volumes[1].as_ref().unwrap_err();
        assert_eq!(refusal.reason, Reason::VolumeExists);
        assert_eq!(refusal.field.as_deref(), Some("volume.read_only"));
        let removed: BTreeMap<VolumeName, _> = synced.removed.into_iter().collect();
        assert_eq!(removed.keys().map(VolumeName::as_str).collect::<Vec<_>>(), ["v1"]);
        daemon.has(&[2, 3, 4]).await;
        assert_eq!(daemon.get(1, "v2").await.unwrap(), before, "it was left alone");
        assert!(!daemon.get(1, "v3").await.unwrap().spec.read_only);
        daemon.sync(set(3, &[])).await.unwrap();
        daemon.has(&[]).await;
        daemon.quiet().await;
        world.assert_clean("after the last set");
    });
}

#[test]
fn the_revision_goes_with_its_vm() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.sync(set(7, &[])).await.unwrap();
        let vms = daemon.registry.list_vms().await;
        assert_eq!((vms[0].revision, vms[1].revision), (Some(7), None));
        daemon.registry.unregister_vm(&vm(1)).await.unwrap();
        daemon.registry.register_vm(crate::world::vm_spec(1)).await.unwrap();
        daemon.sync(set(1, &[])).await.unwrap();
    });
}

/// A world with a set of two volumes, told further in a next life.
fn with_a_set() -> World {
    let world = World::new();
    world.life(async |daemon| {
        daemon.sync(set(1, &[1, 2])).await.unwrap();
        daemon.has(&[1, 2]).await;
        daemon.quiet().await;
    });
    world
}

/// A sync that is killed at one call. The older set is refused from then on, what was durable goes on by
/// itself, and asking again with the same revision completes it.
fn killed_sync(world: &World, kill: Fault) {
    let at = format!("{} {:?} and {} more", kill.point, kill.detail, kill.skip);
    world.life(async |daemon| {
        daemon.quiet().await;
        world.host.faults.inject(kill);
        let sync = async {
            let _ = daemon.sync(set(2, &[2, 3])).await;
            daemon.has(&[2, 3]).await;
        };
        tokio::select! {
            () = world.host.faults.meeting() => {}
            () = sync => {}
        }
    });
    let what = format!("killed at {at}: {:?}", world.host.faults.met());
    world.host.faults.clear();
    world.life(async |daemon| {
        let older = daemon.sync(set(1, &[1, 2])).await.unwrap_err();
        assert_eq!(older.reason, Reason::RevisionOutdated, "{what}");
        daemon.quiet().await;
        assert!(daemon.get(1, "v2").await.is_some(), "{what}");
        let again = daemon.sync(set(2, &[2, 3])).await.unwrap();
        assert!(again.volumes.iter().all(Result::is_ok), "{what}");
        daemon.has(&[2, 3]).await;
        daemon.sync(set(3, &[])).await.unwrap();
        daemon.has(&[]).await;
        daemon.quiet().await;
        world.assert_clean(&what);
    });
}

#[test]
fn a_sync_that_was_killed_before_its_answer_is_completed_and_never_undone_by_an_older_one() {
    let world = with_a_set();
    let calls = world.life(async |daemon| {
        daemon.quiet().await;
        let before = world.host.faults.calls();
        daemon.sync(set(2, &[2, 3])).await.unwrap();
        // From here on it is the way of any wish (crash.rs).
        world.host.faults.calls() - before
    });
    assert!(calls > 10, "{calls}");
    each(calls, |at| {
        let world = with_a_set();
        killed_sync(&world, world.fault("", at, FaultAction::Hang));
    });
}

#[test]
fn a_sync_that_was_killed_around_its_durable_steps_is_completed() {
    for point in ["before intent", "after intent", "before removal", "after removal"] {
        let world = with_a_set();
        let kill = world.fault("kill", 0, FaultAction::Hang);
        killed_sync(&world, Fault { detail: point.into(), ..kill });
    }
}

/// The same on a disk: the next process reads what the last one wrote.
#[test]
fn a_revision_is_on_the_disk_before_anything_is_done_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lunplug.db");
    let mut world = World::over(node(), Desired::open(&path).unwrap());
    let kill = world.fault("kill", 0, FaultAction::Hang);
    world.host.faults.inject(Fault { detail: "before intent".into(), ..kill });
    let before = world.picture();
    world.life(async |daemon| {
        tokio::select! {
            () = world.host.faults.meeting() => {}
            answer = daemon.sync(set(5, &[1])) => panic!("it was not killed: {answer:?}"),
        }
    });
    world.host.faults.clear();
    assert_eq!(world.picture(), before);
    let copy = dir.path().join("copy.db");
    for part in ["", "-wal"] {
        let part = |path: &std::path::Path| format!("{}{part}", path.display());
        std::fs::copy(part(&path), part(&copy)).unwrap();
    }
    world.desired = Desired::open(&copy).unwrap();
    world.life(async |daemon| {
        assert_eq!(daemon.sync(set(4, &[])).await.unwrap_err().reason, Reason::RevisionOutdated);
        daemon.sync(set(5, &[1])).await.unwrap();
        daemon.has(&[1]).await;
    });
}
