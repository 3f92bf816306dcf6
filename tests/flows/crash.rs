//! `kill -9` before every call to every door.

use std::cell::Cell;

use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec};

use crate::faults::{calls, each};
use crate::world::{Daemon, World, domain, single, volume};

/// One life that ends by `kill -9` when it makes the call that is injected to hang, or else when all
/// is done and quiet. Says whether the request was taken on, and which call it was.
fn killed(
    world: &World,
    at: usize,
    request: impl AsyncFnOnce(&Daemon, &Cell<bool>),
) -> (bool, String) {
    let taken = Cell::new(false);
    world.life(async |daemon| {
        world.inject("", at, FaultAction::Hang);
        tokio::select! {
            () = world.host.faults.meeting() => {}
            () = async { request(&daemon, &taken).await; daemon.quiet().await; } => {}
        }
    });
    let met = world.host.faults.met();
    world.host.faults.clear();
    (taken.get(), format!("killed at call {at}, {met:?}"))
}

/// About as many calls as a start with one volume makes.
const AT_START: usize = 100;

async fn add(daemon: &Daemon, taken: &Cell<bool>, spec: &VolumeSpec) {
    taken.set(daemon.want(1, spec).await.is_ok());
    daemon.comes_to(1, spec.name.as_str()).await;
}

/// The daemon is killed at a call of the add: what was taken on comes about, without being asked for
/// again.
fn killed_in_add(spec: &VolumeSpec, at: usize) {
    let world = World::new();
    let name = spec.name.as_str();
    let (taken, what) = killed(&world, at, async |d, taken| add(d, taken, spec).await);
    world.life(async |daemon| {
        if !taken {
            let _ = daemon.want(1, spec).await;
        }
        daemon.ready(1, name).await;
        daemon.remove(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&what);
    });
}

/// Killed at a call of the add; whoever asked does not want it any more.
fn killed_and_removed(spec: &VolumeSpec, at: usize) {
    let world = World::new();
    let name = spec.name.as_str();
    let (_, what) = killed(&world, at, async |d, taken| add(d, taken, spec).await);
    world.life(async |daemon| {
        let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        daemon.gone(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&what);
    });
}

/// The daemon is killed at a call of the removal: what was taken on is carried through.
fn killed_in_removal(spec: &VolumeSpec, at: usize) {
    let world = World::new();
    let name = spec.name.as_str();
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
        daemon.quiet().await;
    });
    let (taken, what) = killed(&world, at, async |daemon, taken| {
        let removed = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        taken.set(removed.is_ok());
        daemon.gone(1, name).await;
    });
    world.life(async |daemon| {
        if !taken {
            let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        }
        daemon.gone(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&what);
    });
}

#[test]
fn an_add_goes_on_after_a_kill_at_each_call() {
    let spec = volume("data", 1);
    each(calls(&spec).0, |at| killed_in_add(&spec, at));
}

#[test]
fn an_add_with_one_path_goes_on_after_a_kill_at_each_call() {
    let spec = single("data", 1);
    each(calls(&spec).0, |at| killed_in_add(&spec, at));
}

#[test]
fn an_add_killed_at_each_call_can_be_removed() {
    let spec = volume("data", 1);
    each(calls(&spec).0, |at| killed_and_removed(&spec, at));
}

/// The start looks at the volume again before the removal is asked for: its calls come first.
#[test]
fn a_removal_goes_on_after_a_kill_at_each_call() {
    let spec = volume("data", 1);
    each(calls(&spec).1 + AT_START, |at| killed_in_removal(&spec, at));
}

/// The daemon is killed after libvirt gave the guest the disk, before it could note that.
#[test]
fn a_disk_that_only_the_domain_knows_of_is_not_taken_unasked() {
    let world = World::new();
    let spec = volume("data", 1);
    world.life(async |daemon| {
        // Noted before: host, device, node, grant, disk. The sixth says that the guest has it.
        let note = Fault {
            detail: "effects/".into(),
            ..world.fault("rundir.store", 5, FaultAction::Hang)
        };
        world.host.faults.inject(note);
        daemon.want(1, &spec).await.unwrap();
        world.host.faults.meeting().await;
    });
    world.host.faults.clear();
    let disks = world.host.hypervisor.snapshot();
    assert!(disks.contains("ua-lunplug-data"), "{disks}");
    // The successor cannot go the whole way again: the guest keeps its disk.
    world.host.faults.inject(Fault {
        times: None,
        ..world.fault("nodes.create", 0, FaultAction::Fail("no".into()))
    });
    world.life(async |daemon| {
        let status = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!((status.phase, status.reason), (Phase::Ready, Some(Reason::NodeRefused)));
        assert_eq!(world.host.hypervisor.snapshot(), disks);
        let mounted = |d: &mut SimDomain| d.agent.mounted.insert("data".into(), "/mnt".into());
        world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), mounted);
        let refusal = daemon.drop_volume(1, "data", RemoveOptions::default()).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::InUseByGuest);
        let unmounted = |d: &mut SimDomain| d.agent.mounted.clear();
        world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), unmounted);
        world.host.faults.clear();
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("after the note was lost");
    });
}
