//! Who is served, by whom, how many, and what is told of it.

use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, Phase, RemoveOptions, VmPlace, VolumeStatus};
use lunplug::vm::facade::{VmState, Volumes};

use crate::world::{World, domain, key, single, vm, vm_spec, volume};

#[test]
fn a_vm_is_served_by_one_process_alone() {
    let world = World::new();
    world.life(async |daemon| {
        let other = world.start_over(Desired::in_memory().unwrap()).await.unwrap();
        let refusal = other.registry.register_vm(vm_spec(1)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::VmServedElsewhere);
        assert!(other.registry.list_vms().await.is_empty());
        // Another one over the same store serves none of them, says why, and starts nevertheless.
        let same = world.start().await.unwrap();
        let vms = same.registry.list_vms().await;
        assert!(!vms.is_empty());
        assert!(vms.iter().all(|vm| vm.reason == Some(Reason::VmServedElsewhere)), "{vms:?}");
        let refusal = same.registry.get_volume(&key(1, "data")).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::VmServedElsewhere);
        // They share the node with the first.
        other.registry.register_vm(vm_spec(3)).await.unwrap();
        daemon.add(1, &volume("data", 1)).await;
        other.add(3, &volume("data", 2)).await;
        daemon.remove(1, "data").await;
        assert_eq!(other.get(3, "data").await.unwrap().phase, Phase::Ready);
        assert!(world.picture().contains("session "));
        other.remove(3, "data").await;
        daemon.quiet().await;
        world.assert_clean("two daemons");
    });
}

#[test]
fn a_sidecar_serves_its_vm_alone() {
    let mut world = World::new();
    world.form.only_vm = Some(vm(3));
    world.desired = Desired::in_memory().unwrap();
    world.life(async |sidecar| {
        let refusal = sidecar.registry.register_vm(vm_spec(1)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported);
        sidecar.registry.register_vm(vm_spec(3)).await.unwrap();
        assert_eq!(sidecar.add(3, &volume("data", 1)).await.phase, Phase::Ready);
        sidecar.remove(3, "data").await;
        sidecar.quiet().await;
        world.assert_clean("a sidecar");
    });
}

#[test]
fn a_vm_with_volumes_is_not_forgotten() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        let unregister = async || daemon.registry.unregister_vm(&vm(1)).await;
        assert_eq!(unregister().await.unwrap_err().reason, Reason::VmHasVolumes);
        let mut other = vm_spec(1);
        other.place = VmPlace::Host { libvirt_socket: None };
        let refusal = daemon.registry.register_vm(other).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::VmExists);
        daemon.remove(1, "data").await;
        assert!(unregister().await.unwrap().changed());
        assert!(!unregister().await.unwrap().changed());
        assert_eq!(
            daemon.want(1, &volume("data", 1)).await.unwrap_err().reason,
            Reason::VmNotFound
        );
        assert_eq!(world.desired.vms().await.unwrap().len(), 1);
        daemon.registry.register_vm(vm_spec(1)).await.unwrap();
        daemon.quiet().await;
        world.assert_clean("unregistered");
    });
}

#[test]
fn no_more_than_the_limits_allow() {
    let mut world = World::new();
    world.config.limits.max_vms = 2;
    world.config.limits.max_volumes_per_vm = 2;
    world.life(async |daemon| {
        let refusal = daemon.registry.register_vm(vm_spec(3)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::LimitReached);
        // At once: what was only checked yet counts by the time that it is taken.
        let specs = [volume("a", 1), volume("b", 2), volume("c", 3)];
        let (a, b, c) = tokio::join!(
            daemon.want(1, &specs[0]),
            daemon.want(1, &specs[1]),
            daemon.want(1, &specs[2])
        );
        let refused: Vec<_> = [a, b, c].into_iter().filter_map(Result::err).collect();
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].reason, Reason::LimitReached);
        for status in daemon.registry.list_volumes(None).await {
            daemon.ready(1, status.key.volume.as_str()).await;
            daemon.remove(1, status.key.volume.as_str()).await;
        }
        daemon.quiet().await;
        world.assert_clean("limits");
    });
}

#[test]
fn a_dry_run_changes_nothing() {
    let world = World::new();
    world.life(async |daemon| {
        let dry = AddOptions { dry_run: true, ..AddOptions::default() };
        let add = async |spec| daemon.registry.add_volume(&vm(1), spec, dry.clone()).await;
        assert!(!add(volume("data", 1)).await.unwrap().changed());
        let mut clash = volume("data", 1);
        clash.serial = Some("boot".parse().unwrap());
        assert_eq!(add(clash).await.unwrap_err().reason, Reason::SerialInUse);
        daemon.quiet().await;
        assert_eq!(daemon.get(1, "data").await, None);
        assert!(world.desired.volumes(&vm(1)).await.unwrap().is_empty());
        world.assert_clean("a dry add");

        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        let before = (world.picture(), daemon.get(1, "data").await);
        let dry = RemoveOptions { dry_run: true, force: false };
        daemon.drop_volume(1, "data", dry).await.unwrap();
        daemon.quiet().await;
        assert_eq!((world.picture(), daemon.get(1, "data").await), before);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a dry removal");
    });
}

#[test]
fn a_remove_during_an_add_ends_it() {
    let world = World::new();
    let reached = [Phase::Pending, Phase::Bound, Phase::AttachedToNode, Phase::MountedToPod];
    for spec in [volume("data", 1), single("data", 1)] {
        for phase in reached {
            world.life(async |daemon| {
                daemon.want(1, &spec).await.unwrap();
                let there = |s: &VolumeStatus| s.phase == phase || s.phase == Phase::Ready;
                daemon.until(1, "data", there).await;
                daemon.remove(1, "data").await;
                daemon.quiet().await;
                world.assert_clean(phase.as_str());
            });
        }
    }
}

#[test]
fn a_watch_sees_every_phase_in_order() {
    let world = World::new();
    world.life(async |daemon| {
        let mut changes = daemon.registry.watch();
        daemon.add(1, &volume("data", 1)).await;
        daemon.remove(1, "data").await;
        let mut seen: Vec<VolumeStatus> = Vec::new();
        while let Ok(change) = changes.try_recv() {
            seen.push((*change).clone());
        }
        assert!(seen.iter().all(|s| s.key == key(1, "data") && s.reason.is_none()), "{seen:#?}");
        assert!(seen.windows(2).all(|w| w[0].generation < w[1].generation));
        let mut phases: Vec<Phase> = seen.iter().map(|s| s.phase).collect();
        phases.dedup();
        assert_eq!(
            phases,
            [
                Phase::Pending,
                Phase::Bound,
                Phase::AttachedToNode,
                Phase::MountedToPod,
                Phase::Ready,
                Phase::Detaching,
                Phase::UnmountedFromPod,
                Phase::Gone,
            ]
        );
    });
}

#[test]
fn a_vm_is_told_as_it_is() {
    let world = World::new();
    world.life(async |daemon| {
        let state = async |number| {
            let all = daemon.registry.list_vms().await;
            let found = all.into_iter().find(|v| v.spec.id == vm(number)).unwrap();
            (found.state, found.reason)
        };
        assert_eq!(state(1).await, (VmState::Running, None));
        let (endpoint, domain) = (World::endpoint(1), domain(1));
        world.host.hypervisor.stop_domain(&endpoint, &domain);
        assert_eq!(state(1).await, (VmState::Stopped, None));
        world.host.hypervisor.start_domain(&endpoint, &domain);
        world.host.hypervisor.restart(&endpoint);
        assert_eq!(state(1).await, (VmState::Running, None), "it connects anew");
        world.host.pods.remove_pod(&crate::world::uid(2));
        assert_eq!(state(2).await, (VmState::Unreachable, Some(Reason::PodGone)));
        let node = daemon.registry.node().await;
        assert!(node.multipathd && node.simulated);
    });
}

#[test]
fn one_volume_that_hangs_holds_up_no_other() {
    let world = World::new();
    world.life(async |daemon| {
        let mut hang = world.fault("sysfs.write", 0, lunplug::host::sim::FaultAction::Hang);
        (hang.detail, hang.times) = ("scan".into(), Some(2));
        world.host.faults.inject(hang);
        daemon.want(1, &volume("hung", 1)).await.unwrap();
        daemon.until(1, "hung", |s| s.phase == Phase::Bound).await;
        world.host.faults.meeting().await;
        assert_eq!(daemon.add(2, &volume("fine", 2)).await.phase, Phase::Ready);
        assert_eq!(daemon.add(1, &volume("fine", 3)).await.phase, Phase::Ready);
        assert_eq!(daemon.get(1, "hung").await.unwrap().phase, Phase::Bound, "it still hangs");
        world.host.faults.clear();
        daemon.ready(1, "hung").await;
        for (number, name) in [(1, "hung"), (1, "fine"), (2, "fine")] {
            daemon.remove(number, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("one hangs");
    });
}
