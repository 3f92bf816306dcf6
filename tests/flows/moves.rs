//! VMs that start with volumes made ready for them, and VMs that move to another pod, or another node.

use std::time::Duration;

use lunplug::host::grants::Access;
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, Phase, VmPlace, VmSpec, VolumeStatus};
use lunplug::types::{Outcome, VolumeName};
use lunplug::vm::facade::{Answer, Refusal, VmState, Volumes};

use crate::faults::each;
use crate::world::{
    Daemon, World, domain, initiator, medium, node, single, uid, vm, vm_spec, volume,
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

/// The first VM does not run; its pod and libvirt are there.
fn powered_off() -> World {
    let host = node();
    host.add_pod(&uid(1));
    host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
    World::over(host, lunplug::journal::Desired::in_memory().unwrap())
}

fn power_on(world: &World) {
    world.host.pods.start_qemu(&uid(1), &domain(1));
    world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
}

/// SAN, SCSI layer and whatever of lunplug's is about the host's side.
fn hosts_side(world: &World) -> Vec<String> {
    let in_pods = ["incoming/", "migrations/", "starts/", "effects/"];
    let snapshot = world.host.storage.snapshot();
    let lines = snapshot.lines().filter(|line| !in_pods.iter().any(|dir| line.contains(dir)));
    lines.map(str::to_owned).collect()
}

/// Nothing of any volume is on the node, wherever the VM may be.
fn nothing_left(world: &World, what: &str) {
    world.assert_clean_but(what, &["pod ", "/var/lib/kubelet/pods/"]);
    let left = world.host.hypervisor.snapshot();
    assert!(!left.contains("ua-lunplug"), "{what}: {left}");
}

type Parts = Result<Vec<(VolumeName, Answer)>, Refusal>;

/// What became of each volume: nothing where all is well, otherwise why not.
fn reasons(parts: Parts) -> Vec<(String, Option<Reason>)> {
    let reason = |answer: Answer| answer.err().map(|refusal| refusal.reason);
    let parts = parts.unwrap().into_iter();
    parts.map(|(name, answer)| (name.to_string(), reason(answer))).collect()
}

fn refused(parts: Parts) -> Reason {
    parts.expect_err("it is refused").reason
}

impl Daemon {
    async fn prepare_start(&self) -> Parts {
        self.registry.prepare_start(&vm(1), None).await
    }

    async fn prepare_move(&self) -> Parts {
        self.registry.prepare_migration_target(&vm(1), place(&other()), None).await
    }

    async fn finish(&self) -> Parts {
        self.registry.finish_migration(&vm(1)).await
    }

    async fn cancel(&self) -> Result<Outcome, Refusal> {
        self.registry.cancel_migration(&vm(1)).await
    }
}

fn waits(status: &VolumeStatus) -> bool {
    (status.phase, status.reason) == (Phase::MountedToPod, Some(Reason::VmNotRunning))
}

/// Whether a pod could open the volume's device by its path, as QEMU would.
fn opens(world: &World, uid: &str, name: &str) -> bool {
    let path = format!("/var/run/kubevirt/hotplug-disks/{name}");
    world.host.pods.open(uid, path.as_ref(), Access::READ_WRITE).is_ok()
}

#[test]
fn volumes_are_ready_for_a_vm_before_it_starts() {
    let world = powered_off();
    world.life(async |daemon| {
        for spec in [volume("a", 1), single("b", 2)] {
            let status = daemon.add(1, &spec).await;
            assert_eq!((status.phase, status.reason), (Phase::Pending, Some(Reason::VmNotRunning)));
        }
        assert!(!opens(&world, &uid(1), "a"));
        assert_eq!(reasons(daemon.prepare_start().await), [("a".into(), None), ("b".into(), None)]);
        for name in ["a", "b"] {
            assert!(waits(&daemon.get(1, name).await.unwrap()));
            assert!(
                opens(&world, &uid(1), name),
                "{name}: a disk of the definition could be opened"
            );
        }
        let again = daemon.prepare_start().await.unwrap();
        assert!(again.iter().all(|(_, answer)| matches!(answer, Ok(Outcome::Already(_)))));

        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.ready(1, "b").await;
        let again = daemon.prepare_start().await.unwrap();
        assert!(again.iter().all(|(_, answer)| matches!(answer, Ok(Outcome::Already(_)))));
        daemon.remove(1, "a").await;
        daemon.remove(1, "b").await;
        daemon.quiet().await;
        nothing_left(&world, "started");
    });
}

/// The start is announced while what the VM had before is still being taken from the host.
#[test]
fn a_start_that_is_announced_right_after_the_end_is_prepared() {
    let world = powered_off();
    power_on(&world);
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.quiet().await;
        world.inject("nodes.remove", 0, FaultAction::Stall);
        world.host.pods.kill_qemu(&uid(1));
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        while world.host.faults.met().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let goes_on = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            world.host.faults.clear();
        };
        let (told, ()) = tokio::join!(daemon.prepare_start(), goes_on);
        assert_eq!(reasons(told), [("a".into(), None)]);
        assert!(waits(&daemon.get(1, "a").await.unwrap()));
        assert!(opens(&world, &uid(1), "a"));
    });
}

/// The domain with the volume's disk in its definition, as a controller writes it.
fn defined_with(name: &str) -> SimDomain {
    let plain = SimDomain::q35(&domain(1), true);
    let disk = format!(
        "<disk type='block' device='disk'>
           <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
           <source dev='/var/run/kubevirt/hotplug-disks/{name}'/>
           <target dev='sda' bus='scsi'/><serial>{name}</serial><alias name='ua-lunplug-{name}'/>
           <address type='drive' controller='0' bus='0' target='0' unit='1'/>
         </disk></devices>"
    );
    let xml = plain.live().unwrap().replace("</devices>", &disk);
    SimDomain::from_xml(&domain(1), &xml, true)
}

/// A guest that has started with its disk keeps it, whatever keeps lunplug from seeing that.
#[test]
fn a_disk_that_a_guest_has_started_with_is_not_taken_from_it() {
    let world = powered_off();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.prepare_start().await.unwrap();
        let host = hosts_side(&world);
        world.inject_all("libvirt.info");
        world.host.hypervisor.add_domain(&World::endpoint(1), defined_with("a"));
        power_on(&world);
        daemon.quiet().await;
        assert!(opens(&world, &uid(1), "a"), "the guest has it open");
        assert_eq!(hosts_side(&world), host);
        world.host.faults.clear();
        daemon.ready(1, "a").await;

        // It ends, and is to start again: its definition is its owner's.
        world.host.pods.kill_qemu(&uid(1));
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        daemon.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert!(world.host.hypervisor.snapshot().contains("config sda ua-lunplug-a"));
        daemon.prepare_start().await.unwrap();
        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "started with its disk");
    });
}

#[test]
fn a_vm_that_does_not_start_in_time_gives_its_volumes_back() {
    let world = powered_off();
    let before = world.picture();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        let soon = Some(Duration::from_secs(20));
        daemon.registry.prepare_start(&vm(1), soon).await.unwrap();
        assert!(opens(&world, &uid(1), "a"));
        daemon.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert!(!opens(&world, &uid(1), "a"));
        assert_eq!(world.picture(), before, "nobody needs the LUN here now");
        // It is wanted still, and comes with the VM however late that is.
        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "late");
    });
}

#[test]
fn a_start_that_was_announced_is_remembered_after_a_kill() {
    let world = powered_off();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.prepare_start().await.unwrap();
    });
    world.life(async |daemon| {
        daemon.until(1, "a", waits).await;
        assert!(opens(&world, &uid(1), "a"));
        // Called off: the host has nothing of it, and it stays wanted.
        assert!(daemon.cancel().await.unwrap().changed());
        daemon.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert!(!opens(&world, &uid(1), "a"));
    });
    world.life(async |daemon| {
        daemon.quiet().await;
        assert!(!opens(&world, &uid(1), "a"), "nothing is announced any more");
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "called off");
    });
}

/// One volume's trouble is told, keeps no other, and is tried on.
#[test]
fn what_cannot_be_made_ready_is_told_and_comes_later() {
    let world = powered_off();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.add(1, &volume("lost", 99)).await;
        let told = reasons(daemon.prepare_start().await);
        assert_eq!(told, [("a".into(), None), ("lost".into(), Some(Reason::LunNotFound))]);
        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
    });
}

#[test]
fn a_guest_moves_to_another_pod_with_its_volumes() {
    let world = two_pods();
    world.life(async |daemon| {
        for spec in [volume("a", 1), single("b", 2), initiator("c", 3, 7)] {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
        }
        daemon.quiet().await;
        let host = hosts_side(&world);
        let all = ["a", "b", "c"].map(|name| (name.to_owned(), None));
        assert_eq!(reasons(daemon.prepare_move().await), all);
        assert_eq!(reasons(daemon.prepare_move().await), all, "asked again");
        assert_eq!(hosts_side(&world), host, "one device, one owner");
        for name in ["a", "b", "c"] {
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
        for name in ["a", "b", "c"] {
            daemon.ready(1, name).await;
            assert!(!opens(&world, &uid(1), name) && opens(&world, &other(), name), "{name}");
        }
        assert_eq!(hosts_side(&world), host);
        let vms = daemon.registry.list_vms().await;
        assert_eq!((&vms[0].spec.place, vms[0].state), (&place(&other()), VmState::Running));
        assert_eq!(daemon.add(1, &volume("d", 4)).await.phase, Phase::Ready);
        for name in ["a", "b", "c", "d"] {
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

/// A volume of a VM that is off can be had and given up without the VM ever running.
#[test]
fn a_vm_that_is_off_can_be_changed() {
    let world = powered_off();
    world.life(async |daemon| {
        let dry_run = AddOptions { dry_run: true, ..AddOptions::default() };
        daemon.registry.add_volume(&vm(1), volume("a", 1), dry_run).await.unwrap();
        assert!(daemon.get(1, "a").await.is_none());
        daemon.add(1, &volume("a", 1)).await;
        daemon.add(1, &volume("b", 2)).await;
        daemon.remove(1, "a").await;
    });
    power_on(&world);
    world.life(async |daemon| {
        daemon.ready(1, "b").await;
        assert!(daemon.get(1, "a").await.is_none());
        daemon.remove(1, "b").await;
        daemon.quiet().await;
        nothing_left(&world, "off and on");
    });
}
