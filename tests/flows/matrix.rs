//! `kill -9` right before and right after every step, on each kind of source, beside other volumes.

use std::collections::BTreeMap;

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::spec::{MultipathPolicy, Phase, Source, VolumeSpec};
use lunplug::step::{KillPoint, Step, Way};

use crate::faults::{Sweep, each};
use crate::world::{World, block, fibre, file, single, split, volume};

/// The kinds of sources. multipathd makes a map of a single path as well, so that with policy `off`
/// one has to be taken off.
fn kinds() -> [VolumeSpec; 7] {
    let off = VolumeSpec { multipath: MultipathPolicy::Off, ..volume("data", 1) };
    let (one, two) = (volume("data", 1), single("data", 1));
    [one, two, off, split("data", 1), fibre("data", 1), block("data", 1), file("data", 1)]
}

/// The points that a clean add and a clean removal reach, in their order.
fn trace(spec: &VolumeSpec) -> (Vec<KillPoint>, Vec<KillPoint>) {
    let world = World::new();
    let faults = world.host.faults.clone();
    world.life(async |daemon| {
        daemon.quiet().await;
        faults.reached();
        assert_eq!(daemon.add(1, spec).await.phase, Phase::Ready);
        daemon.quiet().await;
        let added = faults.reached();
        daemon.remove(1, spec.name.as_str()).await;
        daemon.quiet().await;
        (added, faults.reached())
    })
}

/// Each point as a kill, those that are reached more than once (there are two paths) each time.
fn kills(reached: &[KillPoint]) -> Vec<Fault> {
    let mut before = BTreeMap::new();
    let mut kill = |point: &KillPoint| {
        let detail = point.to_string();
        let times: &mut u32 = before.entry(detail.clone()).or_default();
        let skip = *times;
        *times += 1;
        let (times, action) = (Some(1), FaultAction::Hang);
        Fault { point: "kill".into(), detail, skip, times, action }
    };
    reached.iter().map(&mut kill).collect()
}

#[test]
fn a_way_takes_all_its_steps_in_their_order() {
    for spec in kinds() {
        let (added, removed) = trace(&spec);
        for (way, reached) in [(Way::Attach, added), (Way::Detach, removed)] {
            let mut first = Vec::new();
            for point in reached.iter().filter(|p| p.step.way() == way) {
                if !first.contains(point) {
                    first.push(*point);
                }
            }
            // A port logs in by itself, and what is on the host is there.
            let of_sessions = [Step::Record, Step::Login, Step::Logout, Step::DeleteRecord];
            let of_paths = [Step::Scan, Step::Map, Step::Unmap, Step::DeletePath, Step::ForgetMap];
            // A file is no device.
            let of_devices = [Step::Grant, Step::Revoke];
            let is_without = |step: Step| match spec.source {
                Source::Iscsi(_) => false,
                Source::Fc(_) => of_sessions.contains(&step),
                Source::Block(_) => of_sessions.contains(&step) || of_paths.contains(&step),
                Source::File(_) => {
                    let without = [&of_sessions[..], &of_paths[..], &of_devices[..]];
                    without.iter().any(|all| all.contains(&step))
                }
            };
            let want: Vec<_> = KillPoint::of(way).filter(|p| !is_without(p.step)).collect();
            let names = |all: &[KillPoint]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
            assert_eq!(names(&first), names(&want));
        }
    }
}

/// Tells a story for each kill on the way of each kind, without and with other volumes beside it.
fn each_kill(way: Way, story: fn(&Sweep, &World, Fault)) {
    for spec in kinds() {
        let (added, removed) = trace(&spec);
        let kills = kills(if way == Way::Attach { &added } else { &removed });
        for beside in [false, true] {
            let sweep = Sweep { spec: spec.clone(), beside };
            each(kills.len(), |at| story(&sweep, &sweep.world(), kills[at].clone()));
        }
    }
}

#[test]
fn an_add_goes_on_after_a_kill_on_either_side_of_any_step() {
    each_kill(Way::Attach, Sweep::add_goes_on);
}

#[test]
fn an_add_that_was_killed_on_either_side_of_any_step_can_be_given_up() {
    each_kill(Way::Attach, Sweep::add_is_given_up);
}

#[test]
fn a_removal_goes_on_after_a_kill_on_either_side_of_any_step() {
    each_kill(Way::Detach, Sweep::removal_goes_on);
}
