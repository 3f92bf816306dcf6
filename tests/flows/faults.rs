//! Every call to every door fails once, or never returns.

use std::time::Duration;

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::spec::{AddOptions, MultipathPolicy, Phase, RemoveOptions, Source, VolumeSpec};
use lunplug::types::Bus;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, block, fibre, file, key, single, split, vm, vm_spec, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

pub(crate) fn fail() -> FaultAction {
    FaultAction::Fail("ordered to fail".into())
}

fn hang() -> FaultAction {
    FaultAction::Hang
}

/// The kinds of volumes whose calls differ.
pub(crate) fn kinds() -> [Sweep; 8] {
    let alone = |spec| Sweep { spec, beside: false };
    let virtio = VolumeSpec {
        bus: Bus::Virtio,
        persist: true,
        dedicated_io_thread: true,
        ..volume("data", 1)
    };
    [
        alone(volume("data", 1)),
        alone(single("data", 1)),
        alone(virtio),
        Sweep { spec: volume("data", 1), beside: true },
        alone(split("data", 1)),
        alone(fibre("data", 1)),
        alone(block("data", 1)),
        alone(file("data", 1)),
    ]
}

/// What is done once for each call that it makes.
pub(crate) struct Sweep {
    pub(crate) spec: VolumeSpec,
    /// Other volumes of the same target are attached, to this VM and another, and are not to notice.
    pub(crate) beside: bool,
}

impl Sweep {
    pub(crate) fn name(&self) -> &str {
        self.spec.name.as_str()
    }

    /// How many paths it is to have.
    pub(crate) fn paths(&self) -> u32 {
        let routes = match &self.spec.source {
            _ if self.spec.multipath == MultipathPolicy::Off => 1,
            Source::Iscsi(source) => source.targets().iter().map(|t| t.portals.len()).sum(),
            // Each port is seen by one HBA.
            Source::Fc(source) => source.targets.len(),
            Source::Block(_) | Source::File(_) => 1,
        };
        u32::try_from(routes).unwrap()
    }

    pub(crate) fn world(&self) -> World {
        let media = self.spec.device.is_cdrom();
        let world = if media { World::with_drives(&["sda"]) } else { World::new() };
        if self.beside {
            world.life(async |daemon| {
                assert_eq!(daemon.add(1, &volume("beside", 7)).await.phase, Phase::Ready);
                assert_eq!(daemon.add(2, &volume("another", 8)).await.phase, Phase::Ready);
                daemon.quiet().await;
            });
        }
        world
    }

    /// Nothing of the volume is left, and all of the other one.
    pub(crate) async fn end(&self, world: &World, daemon: &Daemon, what: &str) {
        daemon.quiet().await;
        if self.beside {
            for (vm, name) in [(1, "beside"), (2, "another")] {
                let status = daemon.ready(vm, name).await;
                assert_eq!(status.device.map(|d| d.paths), Some(2), "{what}");
                daemon.remove(vm, name).await;
            }
            daemon.quiet().await;
        }
        world.assert_clean(what);
    }

    /// How many calls a clean add, and a clean removal after it, make.
    pub(crate) fn calls(&self) -> (usize, usize) {
        let world = self.world();
        let faults = world.host.faults.clone();
        world.life(async |daemon| {
            daemon.quiet().await;
            let start = faults.calls();
            assert_eq!(daemon.add(1, &self.spec).await.phase, Phase::Ready);
            let added = faults.calls();
            daemon.remove(1, self.name()).await;
            daemon.quiet().await;
            (added - start, faults.calls() - added)
        })
    }

    /// One call of an add meets a fault; once that is over, the volume can be had and removed.
    fn add(&self, at: usize, action: &FaultAction) {
        let world = self.world();
        world.life(async |daemon| {
            daemon.quiet().await;
            let before = world.picture();
            world.inject("", at, action.clone());
            let mut what = format!("call {at}");
            if daemon.want(1, &self.spec).await.is_ok() {
                let status = daemon.comes_to(1, self.name()).await;
                let met = world.host.faults.met();
                what = format!("{what}, {met:?}: {:?}, {:?}", status.phase, status.reason);
                match status.phase {
                    Phase::Ready => assert_eq!(status.reason, None, "{what}"),
                    Phase::Pending => assert!(status.retry_at.is_some(), "{what}"),
                    Phase::Failed => {
                        world.host.faults.clear();
                        daemon.quiet().await;
                        assert_eq!(world.picture(), before, "{what}");
                    }
                    _ => panic!("{what}"),
                }
            }
            world.host.faults.clear();
            daemon.want(1, &self.spec).await.unwrap();
            daemon.ready(1, self.name()).await;
            daemon.remove(1, self.name()).await;
            self.end(&world, &daemon, &what).await;
        });
    }

    /// What fails goes on failing for a while, so that the undoing fails too; then whoever asked
    /// gives it up, and it goes without a trace.
    fn add_in_storm(&self, at: usize, length: u32) {
        let world = self.world();
        world.life(async |daemon| {
            daemon.quiet().await;
            world.host.faults.inject(Fault { times: Some(length), ..world.fault("", at, fail()) });
            if daemon.want(1, &self.spec).await.is_err() {
                return;
            }
            let status = daemon.comes_to(1, self.name()).await;
            let met = world.host.faults.met();
            world.host.faults.clear();
            let _ = daemon.drop_volume(1, self.name(), PLAIN).await;
            daemon.gone(1, self.name()).await;
            let what = format!("call {at} and {length} more, {met:?}, {:?}", status.reason);
            self.end(&world, &daemon, &what).await;
        });
    }

    /// One call of a removal meets a fault; the removal is refused, or carried through.
    fn remove(&self, at: usize, action: &FaultAction) {
        let world = self.world();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &self.spec).await.phase, Phase::Ready);
            daemon.quiet().await;
            world.inject("", at, action.clone());
            if daemon.drop_volume(1, self.name(), PLAIN).await.is_err() {
                let status = daemon.get(1, self.name()).await.unwrap();
                assert_eq!((status.phase, status.reason), (Phase::Ready, None));
                let _ = daemon.drop_volume(1, self.name(), PLAIN).await;
            }
            daemon.gone(1, self.name()).await;
            let met = world.host.faults.met();
            world.host.faults.clear();
            self.end(&world, &daemon, &format!("call {at}, {met:?}")).await;
        });
    }
}

/// Tells all the calls at which a test fails, not only the first.
pub(crate) fn each(count: usize, test: impl Fn(usize) + std::panic::RefUnwindSafe) {
    let failed: Vec<usize> =
        (0..count).filter(|&at| std::panic::catch_unwind(|| test(at)).is_err()).collect();
    assert!(failed.is_empty(), "calls {failed:?} of {count}");
}

#[test]
fn an_add_survives_that_any_call_fails() {
    for sweep in kinds() {
        each(sweep.calls().0, |at| sweep.add(at, &fail()));
    }
}

#[test]
fn an_add_survives_that_any_call_never_returns() {
    for sweep in kinds() {
        each(sweep.calls().0, |at| sweep.add(at, &hang()));
    }
}

#[test]
fn an_add_survives_that_its_undoing_fails_too() {
    let [plain, ..] = kinds();
    for length in [2, 4, 40] {
        each(plain.calls().0, |at| plain.add_in_storm(at, length));
    }
}

#[test]
fn a_removal_survives_that_any_call_fails() {
    for sweep in kinds() {
        each(sweep.calls().1, |at| sweep.remove(at, &fail()));
    }
}

#[test]
fn a_removal_survives_that_any_call_never_returns() {
    for sweep in kinds() {
        each(sweep.calls().1, |at| sweep.remove(at, &hang()));
    }
}

/// Questions, and checks that change nothing, end as well.
#[test]
fn a_question_ends_although_any_call_never_returns() {
    let ask = async |daemon: &Daemon| {
        let dry_run = AddOptions { dry_run: true, ..AddOptions::default() };
        let _ = daemon.registry.add_volume(&vm(1), volume("other", 2), dry_run).await;
        let _ = daemon
            .registry
            .remove_volume(&key(1, "data"), RemoveOptions { dry_run: true, ..PLAIN })
            .await;
        let _ = daemon.registry.register_vm(vm_spec(3)).await;
        let _ = daemon.registry.unregister_vm(&vm(3)).await;
        daemon.registry.list_vms().await;
        daemon.registry.node().await;
    };
    let count = {
        let world = World::new();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &volume("data", 1)).await.phase, Phase::Ready);
            daemon.quiet().await;
            let before = world.host.faults.calls();
            ask(&daemon).await;
            world.host.faults.calls() - before
        })
    };
    assert!(count > 20, "{count}");
    each(count, |at| {
        let world = World::new();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &volume("data", 1)).await.phase, Phase::Ready);
            daemon.quiet().await;
            world.inject("", at, hang());
            let asked = tokio::time::timeout(Duration::from_secs(300), ask(&daemon)).await;
            assert!(asked.is_ok(), "call {at}, {:?} hangs for ever", world.host.faults.met());
        });
    });
}
