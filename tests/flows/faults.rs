//! Every call to every door fails once, or never returns.

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec};

use crate::world::{Daemon, World, single, volume};

fn fail() -> FaultAction {
    FaultAction::Fail("ordered to fail".into())
}

/// How many calls a clean add, and a clean removal after it, make.
pub(crate) fn calls(spec: &VolumeSpec) -> (usize, usize) {
    let world = World::new();
    let faults = world.host.faults.clone();
    world.life(async |daemon| {
        let start = faults.calls();
        assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
        let added = faults.calls();
        daemon.remove(1, spec.name.as_str()).await;
        daemon.quiet().await;
        (added - start, faults.calls() - added)
    })
}

async fn remove_whatever(daemon: &Daemon, spec: &VolumeSpec) {
    let name = spec.name.as_str();
    let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
    daemon.gone(1, name).await;
    daemon.quiet().await;
}

/// One call of an add meets a fault; once the fault is over, the volume can be had and removed.
fn add_with(spec: &VolumeSpec, at: usize, action: &FaultAction) {
    let world = World::new();
    world.life(async |daemon| {
        world.inject("", at, action.clone());
        let mut end = None;
        if daemon.want(1, spec).await.is_ok() {
            let status = daemon.comes_to(1, spec.name.as_str()).await;
            let trouble = status.reason.is_some();
            let sound = match status.phase {
                Phase::Ready => true,
                Phase::Failed | Phase::Pending => trouble,
                _ => false,
            };
            assert!(sound, "call {at}: {:?} ends in {status:#?}", world.host.faults.met());
            end = Some(status);
        }
        let met = world.host.faults.met();
        world.host.faults.clear();
        let what = format!("call {at}, {met:?}, {:?}", end.map(|s| (s.phase, s.reason, s.message)));
        if end_is_failed(&daemon, spec).await {
            daemon.quiet().await;
            world.assert_clean(&what);
        }
        let wanted = daemon.want(1, spec).await;
        assert!(wanted.is_ok(), "{what}: added again: {wanted:?}");
        daemon.ready(1, spec.name.as_str()).await;
        remove_whatever(&daemon, spec).await;
        world.assert_clean(&what);
    });
}

async fn end_is_failed(daemon: &Daemon, spec: &VolumeSpec) -> bool {
    use lunplug::vm::facade::Volumes;
    let found = daemon.registry.get_volume(&crate::world::key(1, spec.name.as_str())).await;
    found.is_ok_and(|s| s.phase == Phase::Failed)
}

/// One call of a removal meets a fault; the removal is carried through nevertheless.
fn remove_with(spec: &VolumeSpec, at: usize, action: &FaultAction) {
    let world = World::new();
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
        daemon.quiet().await;
        world.inject("", at, action.clone());
        let name = spec.name.as_str();
        if daemon.drop_volume(1, name, RemoveOptions::default()).await.is_err() {
            // Refused: nothing has changed, and it can be asked for again.
            let status = daemon.ready(1, name).await;
            assert_eq!(status.phase, Phase::Ready);
        }
        let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        daemon.gone(1, name).await;
        let met = world.host.faults.met();
        world.host.faults.clear();
        daemon.quiet().await;
        world.assert_clean(&format!("call {at}, {met:?}"));
    });
}

pub(crate) fn each(count: usize, test: impl Fn(usize) + std::panic::RefUnwindSafe) {
    let failed: Vec<usize> =
        (0..count).filter(|&at| std::panic::catch_unwind(|| test(at)).is_err()).collect();
    assert!(failed.is_empty(), "calls {failed:?} of {count}");
}

#[test]
fn an_add_with_two_paths_survives_the_failure_of_each_call() {
    let spec = volume("data", 1);
    each(calls(&spec).0, |at| add_with(&spec, at, &fail()));
}

#[test]
fn an_add_with_one_path_survives_the_failure_of_each_call() {
    let spec = single("data", 1);
    each(calls(&spec).0, |at| add_with(&spec, at, &fail()));
}

#[test]
fn a_removal_of_two_paths_survives_the_failure_of_each_call() {
    let spec = volume("data", 1);
    each(calls(&spec).1, |at| remove_with(&spec, at, &fail()));
}

#[test]
fn a_removal_of_one_path_survives_the_failure_of_each_call() {
    let spec = single("data", 1);
    each(calls(&spec).1, |at| remove_with(&spec, at, &fail()));
}

fn hang() -> FaultAction {
    FaultAction::Hang
}

#[test]
fn an_add_survives_that_any_call_never_returns() {
    let spec = volume("data", 1);
    each(calls(&spec).0, |at| add_with(&spec, at, &hang()));
}

#[test]
fn a_removal_survives_that_any_call_never_returns() {
    let spec = volume("data", 1);
    each(calls(&spec).1, |at| remove_with(&spec, at, &hang()));
}

/// What fails goes on failing for a while, so that the undoing fails too.
#[test]
fn an_add_survives_that_its_undoing_fails_too() {
    let spec = volume("data", 1);
    for length in [2, 4, 40] {
        each(calls(&spec).0, |at| add_in_storm(&spec, at, length));
    }
}

fn add_in_storm(spec: &VolumeSpec, at: usize, length: u32) {
    let world = World::new();
    world.life(async |daemon| {
        world.inject("", at, fail());
        let storm = Fault { times: Some(length), ..world.fault("", at, fail()) };
        world.host.faults.inject(storm);
        let name = spec.name.as_str();
        if daemon.want(1, spec).await.is_err() {
            return;
        }
        let status = daemon.comes_to(1, name).await;
        let met = world.host.faults.met();
        world.host.faults.clear();
        let what = format!("call {at} and {length} more, {met:?}, {status:#?}");
        // Given up or not, it goes without a trace.
        let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
        daemon.gone(1, name).await;
        daemon.quiet().await;
        world.assert_clean(&what);
    });
}
