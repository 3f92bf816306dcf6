//! `kill -9` before every call to every door.

use lunplug::host::sim::FaultAction;
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec};

use crate::faults::{calls, each};
use crate::world::{World, single, volume};

/// The daemon is killed at a call of the add; the next one makes the volume, or never heard of it.
fn killed_in_add(spec: &VolumeSpec, at: usize) {
    let world = World::new();
    let name = spec.name.as_str();
    world.life(async |daemon| {
        world.inject("", at, FaultAction::Hang);
        tokio::select! {
            () = world.host.faults.meeting() => {}
            () = async { daemon.add(1, spec).await; daemon.quiet().await; } => {}
        }
    });
    let met = world.host.faults.met();
    world.host.faults.clear();
    world.life(async |daemon| {
        daemon.want(1, spec).await.unwrap();
        daemon.ready(1, name).await;
        daemon.remove(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&format!("killed at call {at}, {met:?}"));
    });
}

/// The daemon is killed at a call of the removal; the next one carries it through.
fn killed_in_removal(spec: &VolumeSpec, at: usize) {
    let world = World::new();
    let name = spec.name.as_str();
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
        daemon.quiet().await;
        world.inject("", at, FaultAction::Hang);
        tokio::select! {
            () = world.host.faults.meeting() => {}
            () = async { daemon.remove(1, name).await; daemon.quiet().await; } => {}
        }
    });
    let met = world.host.faults.met();
    world.host.faults.clear();
    world.life(async |daemon| {
        // Killed before it was taken on, or not: asked again, it goes.
        let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        daemon.gone(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&format!("killed at call {at}, {met:?}"));
    });
}

/// Killed at a call of the add; the one who asked does not want it any more.
fn killed_and_removed(spec: &VolumeSpec, at: usize) {
    let world = World::new();
    let name = spec.name.as_str();
    world.life(async |daemon| {
        world.inject("", at, FaultAction::Hang);
        tokio::select! {
            () = world.host.faults.meeting() => {}
            () = async { daemon.add(1, spec).await; daemon.quiet().await; } => {}
        }
    });
    let met = world.host.faults.met();
    world.host.faults.clear();
    world.life(async |daemon| {
        let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        daemon.gone(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&format!("killed at call {at}, {met:?}"));
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

#[test]
fn a_removal_goes_on_after_a_kill_at_each_call() {
    let spec = volume("data", 1);
    each(calls(&spec).1, |at| killed_in_removal(&spec, at));
}
