//! Whatever is asked for, in whatever order, with faults and kills in between: it comes about, and
//! what is not asked for leaves no trace.

use std::collections::BTreeMap;
use std::time::Duration;

use lunplug::host::sim::domain::{SimDomain, Unplug};
use lunplug::host::sim::{Fault, FaultAction, PortalState};
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::step::{Edge, KillPoint, Step as Made};
use lunplug::types::Bus;
use lunplug::vm::facade::Volumes;
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, RngSeed, TestError, TestRunner};

use crate::world::{Daemon, World, domain, initiator, portal, single, target, vm, volume};

/// How many walks, of 40 steps on average each; `LUNPLUG_WALKS` sets it.
const WALKS: u32 = 64;

#[derive(Debug, Clone)]
enum Step {
    /// Wants the n-th volume.
    Add(usize),
    /// Wants it no more.
    Remove { volume: usize, force: bool },
    /// Some call from now on fails, or never returns.
    Fault { skip: usize, hangs: bool },
    /// Time goes by.
    Wait(u64),
    /// `kill -9` after so many more calls, and the next life.
    Kill { calls: usize },
    /// `kill -9` when a step is come to next, if it is.
    KillAt(KillPoint),
    /// The node loses its power after so many more calls.
    Reset { calls: usize },
    /// The n-th portal answers, or not.
    Portal { number: u8, alive: bool },
    /// The n-th VM's domain runs, or not.
    Domain { vm: u8, runs: bool },
    /// The n-th VM's libvirt restarts.
    Libvirt { vm: u8 },
    /// The guest of the n-th VM uses its disks and ignores removals, or not.
    Guest { vm: u8, clings: bool },
}

/// The volumes, and whose they are. All are of one target; one has an initiator name of its own.
fn specs() -> [(u8, VolumeSpec); 6] {
    [
        (1, volume("a", 1)),
        (1, single("b", 2)),
        (1, VolumeSpec { bus: Bus::Virtio, ..volume("c", 3) }),
        (1, VolumeSpec { persist: true, ..volume("d", 4) }),
        (2, initiator("e", 5, 1)),
        (2, single("f", 6)),
    ]
}

fn kill_point() -> impl Strategy<Value = KillPoint> {
    let edge = prop_oneof![Just(Edge::Before), Just(Edge::After)];
    (prop::sample::select(Made::ALL), edge).prop_map(|(step, edge)| KillPoint { step, edge })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = 0..specs().len();
    let vms = 1..=2u8;
    let step = prop_oneof![
        8 => which.clone().prop_map(Step::Add),
        6 => (which, any::<bool>()).prop_map(|(volume, force)| Step::Remove { volume, force }),
        5 => (0..300usize, any::<bool>()).prop_map(|(skip, hangs)| Step::Fault { skip, hangs }),
        5 => (0..40_000u64).prop_map(Step::Wait),
        2 => (0..300usize).prop_map(|calls| Step::Kill { calls }),
        3 => kill_point().prop_map(Step::KillAt),
        1 => (0..300usize).prop_map(|calls| Step::Reset { calls }),
        2 => (vms.clone(), any::<bool>()).prop_map(|(number, alive)| Step::Portal { number, alive }),
        2 => (vms.clone(), any::<bool>()).prop_map(|(vm, runs)| Step::Domain { vm, runs }),
        1 => vms.clone().prop_map(|vm| Step::Libvirt { vm }),
        2 => (vms, any::<bool>()).prop_map(|(vm, clings)| Step::Guest { vm, clings }),
    ];
    prop::collection::vec(step, 1..80)
}

/// What was taken on last, by the volume's number.
type Wanted = BTreeMap<usize, bool>;

fn set_domain(world: &World, vm: u8, runs: bool) {
    let (endpoint, name) = (World::endpoint(vm), domain(vm));
    if runs {
        world.host.hypervisor.start_domain(&endpoint, &name);
    } else {
        world.host.hypervisor.stop_domain(&endpoint, &name);
    }
}

fn set_guest(world: &World, vm: u8, clings: bool) {
    let change = |d: &mut SimDomain| {
        d.unplug = if clings { Unplug::Silent } else { Unplug::Acknowledge };
        d.agent.mounted.clear();
        for (_, spec) in specs().iter().filter(|(owner, _)| clings && *owner == vm) {
            d.agent.mounted.insert(spec.serial.clone().unwrap().to_string(), "/mnt".into());
        }
    };
    world.host.hypervisor.with_domain(&World::endpoint(vm), &domain(vm), change);
}

fn set_portal(world: &World, number: u8, alive: bool) {
    let state = if alive { PortalState::Alive } else { PortalState::Dead };
    world.host.storage.set_portal(portal(number), state);
}

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
                    let (vm, spec) = &specs[n];
                    if daemon.want(*vm, spec).await.is_ok() {
                        wanted.insert(n, true);
                    }
                }
                Step::Remove { volume, force } => {
                    let (vm, spec) = &specs[volume];
                    let options = RemoveOptions { force, dry_run: false };
                    if daemon.drop_volume(*vm, spec.name.as_str(), options).await.is_ok() {
                        wanted.insert(volume, false);
                    }
                }
                Step::Fault { skip, hangs } => {
                    let fails = FaultAction::Fail("ordered to fail".into());
                    world.inject("", skip, if hangs { FaultAction::Hang } else { fails });
                }
                Step::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
                Step::Portal { number, alive } => set_portal(world, number, alive),
                Step::Domain { vm, runs } => set_domain(world, vm, runs),
                Step::Guest { vm, clings } => set_guest(world, vm, clings),
                Step::Libvirt { vm } => world.host.hypervisor.restart(&World::endpoint(vm)),
                Step::Kill { calls } => {
                    some_calls(world, calls).await;
                    note_failed(wanted);
                    return unsettle(world, &daemon, wanted).await;
                }
                Step::KillAt(point) => {
                    let detail = point.to_string();
                    world
                        .host
                        .faults
                        .inject(Fault { detail, ..world.fault("kill", 0, FaultAction::Hang) });
                    some_calls(world, 300).await;
                    note_failed(wanted);
                    return unsettle(world, &daemon, wanted).await;
                }
                Step::Reset { calls } => {
                    some_calls(world, calls).await;
                    note_failed(wanted);
                    unsettle(world, &daemon, wanted).await;
                    lose_new_records(world);
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

/// iscsiadm writes records without fsync: of one that it has only just made, and that has no settings of
/// lunplug's yet, a power cut leaves an empty file. (One that was kept as it is would be taken for
/// somebody else's: nothing tells whose it is.)
fn lose_new_records(world: &World) {
    for at in [portal(1), portal(2)] {
        let scan = world.host.storage.record_setting(&target(), at, "node.session.scan");
        if scan.as_deref() == Some("auto") {
            world.host.storage.corrupt_record(&target(), at, "default");
        }
    }
}

fn number(status: &VolumeStatus) -> usize {
    specs().iter().position(|(_, s)| s.name == status.spec.name).unwrap()
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
    let mut world = World::new();
    // What is wrong is found by looks as well as by events.
    world.config.reconcile.interval = Duration::from_secs(60);
    let was_reset = steps.iter().any(|s| matches!(s, Step::Reset { .. }));
    let mut wanted = Wanted::new();
    let mut steps = steps.into_iter();
    while !steps.as_slice().is_empty() {
        // What is still to fail must not keep the next life from starting.
        world.host.faults.clear();
        live(&world, &mut steps, &mut wanted);
    }
    world.host.faults.clear();
    for n in [1, 2] {
        set_portal(&world, n, true);
        set_domain(&world, n, true);
        set_guest(&world, n, false);
    }
    world.life(async |daemon| {
        daemon.quiet().await;
        let there = daemon.registry.list_volumes(None).await;
        for status in &there {
            assert_eq!((status.phase, status.reason), (Phase::Ready, None), "{status:?}");
            assert_ne!(wanted.get(&number(status)), Some(&false), "{} was removed", status.key);
            shown_to_its_guest_alone(&world, status);
        }
        for (n, _) in wanted.iter().filter(|(_, wanted)| **wanted) {
            assert!(there.iter().any(|s| number(s) == *n), "{} was added", specs()[*n].1.name);
        }
        for status in &there {
            let (owner, spec) = &specs()[number(status)];
            daemon.remove(*owner, spec.name.as_str()).await;
        }
        daemon.quiet().await;
        // multipath remembers what it saw across boots. A LUN whose add was cut short by a power cut,
        // before its identity was durable, is not known to anybody else then.
        let but: &[&str] = if was_reset { &["wwid ", "binding "] } else { &[] };
        world.assert_clean_but("in the end", but);
    });
}

/// Its disk is in its own domain, and in no other.
fn shown_to_its_guest_alone(world: &World, status: &VolumeStatus) {
    let alias = format!("ua-lunplug-{}", status.spec.disk);
    for n in [1, 2] {
        let xml = |d: &mut SimDomain| d.xml(lunplug::host::libvirt::Definition::Live);
        let shown = world.host.hypervisor.with_domain(&World::endpoint(n), &domain(n), xml);
        let shown = shown.unwrap().contains(&alias);
        assert_eq!(shown, vm(n) == status.key.vm, "{alias} in {}", domain(n));
    }
}

/// A number from the environment.
fn ordered<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// `LUNPLUG_WALK_SEED` takes other walks; a failure prints the seed, and the shortest walk to it.
#[test]
fn whatever_happens_what_was_asked_for_comes_about() {
    let seed = ordered("LUNPLUG_WALK_SEED", 1);
    let mut runner = TestRunner::new(ProptestConfig {
        cases: ordered("LUNPLUG_WALKS", WALKS),
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    });
    let walked = runner.run(&steps(), |steps| {
        converges(steps);
        Ok(())
    });
    match walked {
        Ok(()) => {}
        Err(TestError::Fail(why, steps)) => panic!("seed {seed}: {why}\n{steps:#?}"),
        Err(TestError::Abort(why)) => panic!("seed {seed}: {why}"),
    }
}
