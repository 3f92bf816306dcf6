//! An add that is wanted no more while it is under way: it stops where it is and is undone, also what
//! its calls do after that.

use std::time::Duration;

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::spec::RemoveOptions;
use lunplug::types::Outcome;
use lunplug::vm::facade::Volumes;

use crate::faults::{Sweep, each, kinds};
use crate::world::{World, vm, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

impl Sweep {
    /// The call of an add that comes after `at` others stalls; the add is called off, and the call goes
    /// on `later`.
    fn called_off(&self, at: usize, later: Duration) {
        let world = self.world();
        world.life(async |daemon| {
            daemon.quiet().await;
            world.inject("", at, FaultAction::Stall);
            let registry = daemon.registry.clone();
            let spec = self.spec.clone();
            let add = tokio::spawn(async move {
                registry.add_volume(&vm(1), spec, Default::default()).await.map(Outcome::into_inner)
            });
            world.host.faults.meeting().await;
            let met = world.host.faults.met();
            let what = format!("call {at}, {met:?}");
            if daemon.drop_volume(1, self.name(), PLAIN).await.is_err() {
                // The request itself was still being checked or written down.
                world.host.faults.clear();
                if add.await.unwrap().is_err() {
                    daemon.want(1, &self.spec).await.unwrap();
                }
                daemon.ready(1, self.name()).await;
                daemon.remove(1, self.name()).await;
                return self.end(&world, &daemon, &what).await;
            }
            tokio::time::sleep(later).await;
            world.host.faults.clear();
            daemon.gone(1, self.name()).await;
            self.end(&world, &daemon, &what).await;
        });
    }
}

#[test]
fn an_add_is_called_off_at_any_call_which_then_goes_on() {
    for sweep in kinds() {
        each(sweep.calls().0, |at| sweep.called_off(at, Duration::ZERO));
    }
}

#[test]
fn an_add_is_called_off_at_any_call_which_goes_on_late() {
    let [plain, single, ..] = kinds();
    for sweep in [plain, single] {
        each(sweep.calls().0, |at| sweep.called_off(at, Duration::from_secs(90)));
    }
}

/// A removal waits for none of the long deadlines of the add that it calls off.
#[test]
fn a_call_that_hangs_does_not_hold_up_the_removal() {
    for (point, detail) in [
        ("sysfs.write", "scan"),
        ("cmd.run", "--login"),
        ("multipathd.ask", "add path"),
        ("blocks.openers", ""),
        ("nodes.create", ""),
        ("grants.grant", ""),
    ] {
        let world = World::new();
        world.life(async |daemon| {
            world.host.storage.set_multipathd_auto(false);
            let stall = world.fault(point, 0, FaultAction::Stall);
            world.host.faults.inject(Fault { detail: detail.into(), times: None, ..stall });
            daemon.want(1, &volume("data", 1)).await.unwrap();
            world.host.faults.meeting().await;
            let begin = tokio::time::Instant::now();
            daemon.drop_volume(1, "data", PLAIN).await.unwrap();
            if point == "blocks.openers" {
                // The way back asks the same.
                world.host.faults.clear();
            }
            daemon.gone(1, "data").await;
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(15), "{point} {detail}: {took:?}");
            world.host.faults.clear();
            daemon.quiet().await;
            world.assert_clean(point);
        });
    }
}
