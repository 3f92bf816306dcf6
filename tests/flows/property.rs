//! Whatever is asked for, in whatever order, with faults and kills in between: it comes about, and
//! what is not asked for leaves no trace.

use std::collections::BTreeMap;

use lunplug::host::sim::{FaultAction, PortalState};
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::vm::facade::Volumes;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use crate::world::{Daemon, World, portal, single, volume};

#[derive(Debug, Clone)]
enum Step {
    /// Wants the n-th volume.
    Add(usize),
    /// Wants it no more.
    Remove(usize),
    /// Some call from now on fails, or never returns.
    Fault { skip: usize, hangs: bool },
    /// Time goes by.
    Wait(u64),
    /// `kill -9` after so many more calls, and the next life.
    Kill { calls: usize },
    /// The same for the whole node.
    Reboot { calls: usize },
    /// The n-th portal answers, or not.
    Portal { number: u8, alive: bool },
}

fn specs() -> [VolumeSpec; 4] {
    [volume("a", 1), single("b", 2), volume("c", 3), VolumeSpec { persist: true, ..volume("d", 4) }]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4usize).prop_map(Step::Add),
        3 => (0..4usize).prop_map(Step::Remove),
        3 => (0..300usize, any::<bool>()).prop_map(|(skip, hangs)| Step::Fault { skip, hangs }),
        2 => (0..40_000u64).prop_map(Step::Wait),
        2 => (0..300usize).prop_map(|calls| Step::Kill { calls }),
        1 => (0..300usize).prop_map(|calls| Step::Reboot { calls }),
        1 => (1..=2u8, any::<bool>()).prop_map(|(number, alive)| Step::Portal { number, alive }),
    ];
    prop::collection::vec(step, 1..24)
}

/// What was taken on last, by the volume's number.
type Wanted = BTreeMap<usize, bool>;

/// Takes the steps up to the next kill.
fn live(world: &World, steps: &mut std::vec::IntoIter<Step>, wanted: &mut Wanted) {
    let specs = specs();
    world.life(async |daemon| {
        let mut changes = daemon.registry.watch();
        // An add that a fault ended for good is wanted no more.
        let mut note_failed = |wanted: &mut Wanted| {
            while let Ok(change) = changes.try_recv() {
                if change.phase == Phase::Failed {
                    wanted.remove(&number(&change));
                }
            }
        };
        for step in steps.by_ref() {
            note_failed(wanted);
            match step {
                Step::Add(n) => {
                    if daemon.want(1, &specs[n]).await.is_ok() {
                        wanted.insert(n, true);
                    }
                }
                Step::Remove(n) => {
                    let name = specs[n].name.as_str();
                    if daemon.drop_volume(1, name, RemoveOptions::default()).await.is_ok() {
                        wanted.insert(n, false);
                    }
                }
                Step::Fault { skip, hangs } => {
                    let fails = FaultAction::Fail("ordered to fail".into());
                    world.inject("", skip, if hangs { FaultAction::Hang } else { fails });
                }
                Step::Wait(ms) => tokio::time::sleep(std::time::Duration::from_millis(ms)).await,
                Step::Portal { number, alive } => {
                    let state = if alive { PortalState::Alive } else { PortalState::Dead };
                    world.host.storage.set_portal(portal(number), state);
                }
                Step::Kill { calls } => {
                    some_calls(world, calls).await;
                    note_failed(wanted);
                    return unsettle(world, &daemon, wanted).await;
                }
                Step::Reboot { calls } => {
                    some_calls(world, calls).await;
                    note_failed(wanted);
                    unsettle(world, &daemon, wanted).await;
                    world.shut_down();
                    return world.boot();
                }
            }
        }
        daemon.quiet().await;
        note_failed(wanted);
    });
}

/// An add on its way that met a fault may have been ended in the moment of the kill, with nobody left
/// to tell.
async fn unsettle(world: &World, daemon: &Daemon, wanted: &mut Wanted) {
    if world.host.faults.met().is_none() {
        return;
    }
    for status in daemon.registry.list_volumes(None).await {
        let n = number(&status);
        if status.phase != Phase::Ready && wanted.get(&n) == Some(&true) {
            wanted.remove(&n);
        }
    }
}

fn number(status: &VolumeStatus) -> usize {
    specs().iter().position(|s| s.name == status.spec.name).unwrap()
}

/// Lets the daemon make so many calls, if it makes any.
async fn some_calls(world: &World, calls: usize) {
    let end = world.host.faults.calls() + calls;
    for _ in 0..20 * calls {
        if world.host.faults.calls() >= end {
            return;
        }
        tokio::task::yield_now().await;
    }
}

fn converges(steps: Vec<Step>) {
    let world = World::new();
    let rebooted = steps.iter().any(|s| matches!(s, Step::Reboot { .. }));
    let mut wanted = Wanted::new();
    let mut steps = steps.into_iter();
    while !steps.as_slice().is_empty() {
        // What is still to fail must not keep the next life from starting.
        world.host.faults.clear();
        live(&world, &mut steps, &mut wanted);
    }
    world.host.faults.clear();
    [1, 2].iter().for_each(|n| world.host.storage.set_portal(portal(*n), PortalState::Alive));
    world.life(async |daemon| {
        daemon.quiet().await;
        let there = daemon.registry.list_volumes(None).await;
        for status in &there {
            assert_eq!((status.phase, status.reason), (Phase::Ready, None), "{status:?}");
            assert_ne!(wanted.get(&number(status)), Some(&false), "{} was removed", status.key);
        }
        for (n, _) in wanted.iter().filter(|(_, wanted)| **wanted) {
            assert!(there.iter().any(|s| number(s) == *n), "{} was added", specs()[*n].name);
        }
        for status in &there {
            daemon.remove(1, status.spec.name.as_str()).await;
        }
        daemon.quiet().await;
        // multipath remembers what it saw across boots. A LUN whose add was cut short by a power cut,
        // before its identity was durable, is not known to anybody else then.
        let but: &[&str] = if rebooted { &["wwid ", "binding "] } else { &[] };
        world.assert_clean_but("in the end", but);
    });
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_was_asked_for_comes_about(steps in steps()) {
        converges(steps);
    }
}
