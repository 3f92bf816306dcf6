//! `kill -9` at every call to every door.

use std::cell::Cell;

use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions};

use crate::faults::{Sweep, each, fail, kinds};
use crate::world::{Daemon, World, domain, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

/// The kill at the call that comes after so many others.
fn at_call(world: &World, at: usize) -> Fault {
    world.fault("", at, FaultAction::Hang)
}

/// One life that ends by `kill -9`, or else when all is done and quiet. Says where it was.
async fn until_killed(world: &World, kill: Fault, request: impl Future<Output = ()>) -> String {
    let at = format!("{} {:?} and {} more", kill.point, kill.detail, kill.skip);
    world.host.faults.inject(kill);
    tokio::select! {
        () = world.host.faults.meeting() => {}
        () = request => {}
    }
    let met = world.host.faults.met();
    world.host.faults.clear();
    format!("killed at {at}: {met:?}")
}

fn failing_claim(world: &World) -> Fault {
    Fault { detail: "locks/wwid-".into(), ..world.fault("rundir.lock", 0, fail()) }
}

impl Sweep {
    /// An add that is killed at a call; whether it was taken on.
    fn killed_add(&self, world: &World, kill: Fault) -> (bool, String) {
        let taken = Cell::new(false);
        let what = world.life(async |daemon| {
            daemon.quiet().await;
            let add = async {
                taken.set(daemon.want(1, &self.spec).await.is_ok());
                daemon.comes_to(1, self.name()).await;
                daemon.quiet().await;
            };
            until_killed(world, kill, add).await
        });
        (taken.get(), what)
    }

    /// What was taken on comes about, without being asked for again.
    pub(crate) fn add_goes_on(&self, world: &World, kill: Fault) {
        let (taken, what) = self.killed_add(world, kill);
        world.life(async |daemon| {
            if !taken {
                // Perhaps only its answer was lost.
                daemon.want(1, &self.spec).await.unwrap();
            }
            let status = daemon.comes_to(1, self.name()).await;
            assert_eq!((status.phase, status.reason), (Phase::Ready, None), "{what}: {status:?}");
            daemon.quiet().await;
            let device = daemon.ready(1, self.name()).await.device;
            assert_eq!(device.map(|d| d.paths), Some(self.paths()), "{what}");
            daemon.remove(1, self.name()).await;
            self.end(world, &daemon, &what).await;
        });
    }

    /// Whoever asked does not want it any more.
    pub(crate) fn add_is_given_up(&self, world: &World, kill: Fault) {
        let (_, what) = self.killed_add(world, kill);
        world.life(async |daemon| {
            let _ = daemon.drop_volume(1, self.name(), PLAIN).await;
            daemon.gone(1, self.name()).await;
            self.end(world, &daemon, &what).await;
        });
    }

    /// An add fails when the LUN's identity is to be claimed (its map is there by then, but not in the
    /// lease yet), is wanted no more, and is killed at a call; what its undoing left is known to the
    /// next life.
    fn undoing_goes_on(&self, at: usize) {
        let world = self.world();
        let what = world.life(async |daemon| {
            daemon.quiet().await;
            world.host.faults.inject(failing_claim(&world));
            let add = async {
                daemon.want(1, &self.spec).await.unwrap();
                let _ = daemon.drop_volume(1, self.name(), PLAIN).await;
                daemon.gone(1, self.name()).await;
                daemon.quiet().await;
            };
            until_killed(&world, at_call(&world, at), add).await
        });
        world.life(async |daemon| {
            let _ = daemon.drop_volume(1, self.name(), PLAIN).await;
            daemon.gone(1, self.name()).await;
            self.end(&world, &daemon, &what).await;
        });
    }

    /// How many calls such an add makes until it has failed.
    fn calls_of_undoing(&self) -> usize {
        let world = self.world();
        world.life(async |daemon| {
            daemon.quiet().await;
            let begin = world.host.faults.calls();
            world.host.faults.inject(failing_claim(&world));
            daemon.add(1, &self.spec).await;
            world.host.faults.calls() - begin
        })
    }

    /// A removal that was taken on is carried through.
    pub(crate) fn removal_goes_on(&self, world: &World, kill: Fault) {
        let taken = Cell::new(false);
        let what = world.life(async |daemon: Daemon| {
            assert_eq!(daemon.add(1, &self.spec).await.phase, Phase::Ready);
            daemon.quiet().await;
            let remove = async {
                taken.set(daemon.drop_volume(1, self.name(), PLAIN).await.is_ok());
                daemon.gone(1, self.name()).await;
                daemon.quiet().await;
            };
            until_killed(world, kill, remove).await
        });
        world.life(async |daemon| {
            if !taken.get() {
                let _ = daemon.drop_volume(1, self.name(), PLAIN).await;
            }
            daemon.gone(1, self.name()).await;
            self.end(world, &daemon, &what).await;
        });
    }
}

#[test]
fn an_add_goes_on_after_a_kill_at_any_call() {
    for sweep in kinds() {
        each(sweep.calls().0, |at| {
            let world = sweep.world();
            sweep.add_goes_on(&world, at_call(&world, at));
        });
    }
}

#[test]
fn an_add_that_was_killed_at_any_call_can_be_given_up() {
    let [plain, ..] = kinds();
    each(plain.calls().0, |at| {
        let world = plain.world();
        plain.add_is_given_up(&world, at_call(&world, at));
    });
}

#[test]
fn a_removal_goes_on_after_a_kill_at_any_call() {
    for sweep in kinds() {
        each(sweep.calls().1, |at| {
            let world = sweep.world();
            sweep.removal_goes_on(&world, at_call(&world, at));
        });
    }
}

#[test]
fn an_undoing_goes_on_after_a_kill_at_any_call() {
    let [plain, ..] = kinds();
    each(plain.calls_of_undoing(), |at| plain.undoing_goes_on(at));
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
