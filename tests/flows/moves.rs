//! VMs that move to another pod, or another node.

use std::time::Duration;

use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, VmPlace, VmSpec};
use lunplug::types::Outcome;
use lunplug::vm::facade::{Refusal, VmState, Volumes};

use crate::faults::each;
use crate::starts::{Parts, nothing_left, opens, power_on, powered_off, reasons};
use crate::world::{
    Daemon, World, domain, file, initiator, medium, node, single, uid, vm, vm_spec, volume,
};

/// The pod to which the first VM moves.
fn other() -> String {
    uid(9)
}

fn place(uid: &str) -> VmPlace {
    let uid = uid.to_owned();
    let mut place = vm_spec(1).place;
    let VmPlace::Pod { uid: of, .. } = &mut place else { unreachable!("it is in a pod") };
    *of = uid;
    place
}

/// A world in which the first VM has a second pod, with a libvirt and no domain.
fn two_pods() -> World {
    let host = node();
    host.add_pod(&other());
    World::over(host, lunplug::journal::Desired::in_memory().unwrap())
}

/// SAN, SCSI layer and whatever of lunplug's is about the host's side.
pub(crate) fn hosts_side(world: &World) -> Vec<String> {
    let in_pods = ["incoming/", "migrations/", "starts/", "effects/"];
    let snapshot = world.host.storage.snapshot();
    let lines = snapshot.lines().filter(|line| !in_pods.iter().any(|dir| line.contains(dir)));
    lines.map(str::to_owned).collect()
}

fn refused(parts: Parts) -> Reason {
    parts.expect_err("it is refused").reason
}

impl Daemon {
    async fn prepare_move(&self) -> Parts {
        self.registry.prepare_migration_target(&vm(1), place(&other()), None).await
    }

    async fn finish(&self) -> Parts {
        self.registry.finish_migration(&vm(1)).await
    }

    pub(crate) async fn cancel(&self) -> Result<Outcome, Refusal> {
        self.registry.cancel_migration(&vm(1)).await
    }
}

#[test]
fn a_guest_moves_to_another_pod_with_its_volumes() {
    let world = two_pods();
    world.life(async |daemon| {
        for spec in [volume("a", 1), single("b", 2), initiator("c", 3, 7), file("f", 1)] {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
        }
        daemon.quiet().await;
        let host = hosts_side(&world);
        let all = ["a", "b", "c", "f"].map(|name| (name.to_owned(), None));
        assert_eq!(reasons(daemon.prepare_move().await), all);
        assert_eq!(reasons(daemon.prepare_move().await), all, "asked again");
        assert_eq!(hosts_side(&world), host, "one device, one owner");
        for name in ["a", "b", "c", "f"] {
            assert!(opens(&world, &uid(1), name) && opens(&world, &other(), name), "{name}");
        }

        let add = daemon.want(1, &volume("d", 4)).await;
        assert_eq!(add.unwrap_err().reason, Reason::VmMigrating);
        let remove = daemon.drop_volume(1, "a", crate::world::FORCE).await;
        assert_eq!(remove.unwrap_err().reason, Reason::VmMigrating);
        assert_eq!(refused(daemon.finish().await), Reason::VmRunning, "it has not moved yet");

        world.host.migrate(&uid(1), &other(), &domain(1)).unwrap();
        daemon.quiet().await;
        assert_eq!(hosts_side(&world), host, "the LUNs are not let go of in between");
        assert_eq!(daemon.cancel().await.unwrap_err().reason, Reason::VmRunning);
        assert_eq!(reasons(daemon.finish().await), all);
        for name in ["a", "b", "c", "f"] {
            daemon.ready(1, name).await;
            assert!(!opens(&world, &uid(1), name) && opens(&world, &other(), name), "{name}");
        }
        assert_eq!(hosts_side(&world), host);
        let vms = daemon.registry.list_vms().await;
        assert_eq!((&vms[0].spec.place, vms[0].state), (&place(&other()), VmState::Running));
        assert_eq!(daemon.add(1, &volume("d", 4)).await.phase, Phase::Ready);
        for name in ["a", "b", "c", "d", "f"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        nothing_left(&world, "moved");
    });
}

#[test]
fn a_medium_moves_with_its_guest() {
    let host = node();
    host.add_pod(&other());
    host.hypervisor.with_domain(&World::endpoint(1), &domain(1), |d| d.add_drive("sda")).unwrap();
    let world = World::over(host, lunplug::journal::Desired::in_memory().unwrap());
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &medium("iso", 1)).await.phase, Phase::Ready);
        daemon.prepare_move().await.unwrap();
        world.host.migrate(&uid(1), &other(), &domain(1)).unwrap();
        assert_eq!(reasons(daemon.finish().await), [("iso".to_owned(), None)]);
        let status = daemon.ready(1, "iso").await;
        assert_eq!(status.target.as_deref(), Some("sda"));
        daemon.quiet().await;
        daemon.remove(1, "iso").await;
        daemon.quiet().await;
        nothing_left(&world, "moved");
    });
}

/// The guest that has moved is the one that is asked and detached from, also when that is the first thing
/// that is wanted after the move.
#[test]
fn a_volume_can_be_removed_right_after_the_move() {
    let world = two_pods();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.prepare_move().await.unwrap();
        world.host.migrate(&uid(1), &other(), &domain(1)).unwrap();
        daemon.finish().await.unwrap();
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "removed at once");
    });
}

#[test]
fn a_migration_that_fails_leaks_nothing() {
    let world = two_pods();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.quiet().await;
        let before = world.picture();
        daemon.prepare_move().await.unwrap();
        world.host.receive(&uid(1), &other(), &domain(1)).unwrap();
        // It comes up in the other pod and is given up on there.
        world.host.give_up(&other(), &domain(1));
        assert!(daemon.cancel().await.unwrap().changed());
        assert!(!daemon.cancel().await.unwrap().changed(), "once is enough");
        daemon.quiet().await;
        assert_eq!(world.picture(), before);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        world.assert_clean("cancelled");
    });
}

#[test]
fn without_its_grant_the_other_pod_cannot_take_the_guest() {
    let world = two_pods();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        let why = world.host.migrate(&uid(1), &other(), &domain(1)).unwrap_err();
        assert!(why.contains("cannot access"), "{why}");
        assert_eq!(daemon.get(1, "a").await.unwrap().phase, Phase::Ready);
        daemon.remove(1, "a").await;
    });
}

#[test]
fn what_cannot_move_is_refused_by_name() {
    let world = two_pods();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        let to = async |place| daemon.registry.prepare_migration_target(&vm(1), place, None).await;
        let host = VmPlace::Host { libvirt_socket: None };
        assert_eq!(refused(to(host).await), Reason::Unsupported);
        assert_eq!(refused(to(place(&uid(8))).await), Reason::PodGone);
        let mut same = place(&uid(1));
        let VmPlace::Pod { hotplug_dir, .. } = &mut same else { unreachable!("it is in a pod") };
        *hotplug_dir = Some("elsewhere".into());
        assert_eq!(refused(to(same).await), Reason::VmExists);
        daemon.prepare_move().await.unwrap();
        assert_eq!(refused(to(place(&uid(2))).await), Reason::VmMigrating, "to one pod at a time");
        let registered =
            daemon.registry.register_vm(VmSpec { place: place(&uid(2)), ..vm_spec(1) }).await;
        assert_eq!(registered.unwrap_err().reason, Reason::VmMigrating);
        let gone = daemon.registry.unregister_vm(&vm(1)).await;
        assert_eq!(gone.unwrap_err().reason, Reason::VmMigrating);
        assert_eq!(refused(daemon.prepare_start().await), Reason::VmMigrating);
        daemon.cancel().await.unwrap();
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        assert_eq!(refused(daemon.prepare_move().await), Reason::VmNotRunning);
    });
}

/// A volume that the guest has not does not move with it; it comes afterwards.
#[test]
fn a_volume_in_trouble_does_not_keep_the_others() {
    let world = two_pods();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        world.inject_all("libvirt.attach");
        daemon.add(1, &volume("b", 2)).await;
        let told = reasons(daemon.prepare_move().await);
        assert_eq!(told, [("a".into(), None), ("b".into(), Some(Reason::VolumeNotReady))]);
        world.host.faults.clear();
        world.host.migrate(&uid(1), &other(), &domain(1)).unwrap();
        daemon.finish().await.unwrap();
        daemon.ready(1, "a").await;
        daemon.ready(1, "b").await;
        daemon.remove(1, "a").await;
        daemon.remove(1, "b").await;
        daemon.quiet().await;
        nothing_left(&world, "one in trouble");
    });
}

/// To another node: here the guest has gone, there it comes as one that starts.
#[test]
fn a_guest_moves_to_another_node() {
    let (source, target) = (two_pods(), powered_off());
    let before = target.picture();
    source.life(async |here| {
        here.add(1, &volume("a", 1)).await;
        assert_eq!(refused(here.finish().await), Reason::VmRunning, "it has not gone yet");
    });
    target.life(async |there| {
        there.add(1, &volume("a", 1)).await;
        let place = place(&uid(1));
        let told = there.registry.prepare_migration_target(&vm(1), place.clone(), None).await;
        assert_eq!(reasons(told), [("a".into(), None)]);
        // It does not come this time.
        there.cancel().await.unwrap();
        there.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert_eq!(target.picture(), before);
        there.registry.prepare_migration_target(&vm(1), place, None).await.unwrap();
        power_on(&target);
        there.ready(1, "a").await;
        there.remove(1, "a").await;
        there.quiet().await;
        nothing_left(&target, "there");
    });
    source.host.pods.kill_qemu(&uid(1));
    source.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
    source.life(async |here| {
        assert_eq!(reasons(here.finish().await), [("a".into(), None)]);
        here.gone(1, "a").await;
        here.registry.unregister_vm(&vm(1)).await.unwrap();
        here.quiet().await;
        nothing_left(&source, "here");
    });
}

/// Asks for the whole of a move, again and again, as a controller does that has lost its answers. `comes` is
/// whether the guest moves.
async fn whole_move(world: &World, daemon: &Daemon, comes: bool) {
    let there = |uid: &str| {
        let endpoint = lunplug::host::sim::SimHost::endpoint(uid);
        let runs = world.host.hypervisor.with_domain(&endpoint, &domain(1), |d| d.live().is_some());
        runs == Some(true)
    };
    if there(&uid(1)) {
        let _ = daemon.prepare_move().await;
        if !comes {
            let _ = daemon.cancel().await;
            return;
        }
        if world.host.migrate(&uid(1), &other(), &domain(1)).is_err() {
            return;
        }
    }
    let registered = &daemon.registry.list_vms().await[0].spec.place;
    if *registered != place(&other()) {
        let _ = daemon.finish().await;
    }
}

/// The faults that a move may meet: a kill at each of its steps, and each of its calls failing.
fn faults(comes: bool) -> Vec<Fault> {
    let world = two_pods();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.quiet().await;
        world.host.faults.reached();
        let before = world.host.faults.calls();
        whole_move(&world, &daemon, comes).await;
        daemon.quiet().await;
        let calls = world.host.faults.calls() - before;
        let kills = world.host.faults.reached().into_iter().map(|point| {
            let kill = world.fault("kill", 0, FaultAction::Hang);
            Fault { detail: point.to_string(), ..kill }
        });
        let fail = |n| world.fault("", n, FaultAction::Fail("ordered to fail".into()));
        kills.chain((0..calls).map(fail)).collect()
    })
}

fn survives(comes: bool) {
    let faults = faults(comes);
    assert!(faults.len() > 30, "{}", faults.len());
    each(faults.len(), |at| {
        let world = two_pods();
        let what = format!("{:?}", faults[at]);
        world.life(async |daemon| {
            daemon.add(1, &volume("a", 1)).await;
            daemon.quiet().await;
            world.host.faults.inject(faults[at].clone());
            let moving = whole_move(&world, &daemon, comes);
            // A killed daemon does not answer; its successor is asked.
            let _ = tokio::time::timeout(Duration::from_secs(600), moving).await;
        });
        world.host.faults.clear();
        world.life(async |daemon| {
            // Where the first try failed before the guest moved, it is made once more.
            whole_move(&world, &daemon, comes).await;
            whole_move(&world, &daemon, comes).await;
            let status = daemon.ready(1, "a").await;
            let (has, has_not) = if comes { (other(), uid(1)) } else { (uid(1), other()) };
            assert!(
                opens(&world, &has, "a") && !opens(&world, &has_not, "a"),
                "{what}: {status:?}"
            );
            daemon.want(1, &volume("b", 2)).await.unwrap();
            daemon.ready(1, "b").await;
            daemon.remove(1, "a").await;
            daemon.remove(1, "b").await;
            daemon.quiet().await;
            nothing_left(&world, &what);
        });
    });
}

#[test]
fn a_move_survives_a_kill_at_any_step_and_that_any_call_fails() {
    survives(true);
}

#[test]
fn a_move_that_is_cancelled_survives_a_kill_at_any_step_and_that_any_call_fails() {
    survives(false);
}
