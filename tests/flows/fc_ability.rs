//! VMs that were registered without support for Fibre Channel.

use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, FcSupport, Phase, VmPlace, VmSpec};
use lunplug::types::Outcome;
use lunplug::vm::facade::{Volumes, Wish};
use lunplug::vm::plan::fc::AfterLast;

use crate::world::{Daemon, World, domain, fibre, node, uid, vm, vm_spec, volume};

fn unsupported() -> VmSpec {
    VmSpec { fc: FcSupport::Unsupported, ..vm_spec(1) }
}

fn off() -> World {
    let host = node();
    host.add_pod(&uid(1));
    host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
    World::over(host, Desired::in_memory().unwrap())
}

fn power_on(world: &World) {
    world.host.pods.start_qemu(&uid(1), &domain(1));
    world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
}

impl Daemon {
    async fn marked(&self) -> bool {
        let vms = self.registry.list_vms().await;
        vms.iter().find(|info| info.spec.id == vm(1)).unwrap().fc_marked
    }
}

#[test]
fn a_running_vm_is_to_be_powered_off_first() {
    let world = World::new();
    world.life(async |daemon| {
        let before = world.picture();
        daemon.registry.register_vm(unsupported()).await.unwrap();
        let options = AddOptions::default();
        let refused = daemon
            .registry
            .add_volume(&vm(1), fibre("data", 1), options.clone())
            .await
            .unwrap_err();
        assert_eq!(refused.reason, Reason::FcNotSupported);
        assert_eq!(refused.field.as_deref(), Some("volume.source"));
        assert!(refused.message.contains("power the VM off first"), "{}", refused.message);
        assert!(!daemon.marked().await);
        assert_eq!(world.picture(), before);

        // What comes another way does not mind, in one request either.
        let wish = |spec| Wish::Add { spec: Box::new(spec), options: options.clone() };
        let wishes = vec![wish(fibre("data", 1)), wish(volume("other", 2))];
        let answers = daemon.registry.change_volumes(&vm(1), wishes).await.unwrap();
        assert_eq!(answers[0].as_ref().unwrap_err().reason, Reason::FcNotSupported);
        assert!(answers[1].is_ok());
        daemon.ready(1, "other").await;

        // Whoever scheduled it says that it has an HBA now; what it has is not touched.
        let supported = VmSpec { fc: FcSupport::Supported, ..vm_spec(1) };
        let registered = daemon.registry.register_vm(supported).await.unwrap();
        assert!(matches!(registered, Outcome::Done(_)));
        let status = daemon.add(1, &fibre("data", 1)).await;
        assert_eq!((status.phase, status.vm_needs_hba), (Phase::Ready, false));

        // It can always give such a volume back.
        daemon.registry.register_vm(unsupported()).await.unwrap();
        daemon.ready(1, "data").await;
        for name in ["data", "other"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

#[test]
fn a_vm_that_is_off_is_marked_and_the_answer_says_so() {
    let world = off();
    world.life(async |daemon| {
        daemon.registry.register_vm(unsupported()).await.unwrap();
        let dry_run = AddOptions { dry_run: true, ..AddOptions::default() };
        let would = daemon.registry.add_volume(&vm(1), fibre("data", 1), dry_run).await.unwrap();
        assert!(would.into_inner().vm_needs_hba);
        assert!(!daemon.marked().await, "nothing was changed");
        let options = AddOptions::default();
        let answer = daemon.registry.add_volume(&vm(1), fibre("data", 1), options).await.unwrap();
        assert!(answer.into_inner().vm_needs_hba);
        assert!(!daemon.add(1, &volume("other", 2)).await.vm_needs_hba);
        assert!(daemon.marked().await);
    });
    power_on(&world);
    world.life(async |daemon| {
        assert!(daemon.marked().await, "that outlives the daemon");
        assert!(daemon.ready(1, "data").await.vm_needs_hba);
        assert_eq!(daemon.add(1, &fibre("more", 3)).await.phase, Phase::Ready);
        for name in ["data", "more", "other"] {
            daemon.remove(1, name).await;
        }
        assert!(daemon.marked().await, "as it is set to");
    });
}

#[test]
fn a_mark_goes_with_the_last_volume_where_that_is_set() {
    let mut world = off();
    world.config.fc_mark_after_last = AfterLast::Drop;
    world.life(async |daemon| {
        daemon.registry.register_vm(unsupported()).await.unwrap();
        for (name, lun) in [("a", 1), ("b", 2)] {
            daemon.add(1, &fibre(name, lun)).await;
        }
        daemon.add(1, &volume("other", 3)).await;
        daemon.remove(1, "other").await;
        daemon.remove(1, "a").await;
        assert!(daemon.marked().await);
        daemon.remove(1, "b").await;
        assert!(!daemon.marked().await);
    });
    power_on(&world);
    world.life(async |daemon| {
        let refused =
            daemon.registry.add_volume(&vm(1), fibre("a", 1), AddOptions::default()).await;
        assert_eq!(refused.unwrap_err().reason, Reason::FcNotSupported);
        assert!(!daemon.marked().await);
    });
}

/// A VM that is off has no pod, mostly: the volume waits for the pod that it is scheduled with.
#[test]
fn a_vm_without_a_pod_is_scheduled_anew_and_has_its_volume() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.registry.register_vm(unsupported()).await.unwrap();
        world.host.pods.remove_pod(&uid(1));
        world.host.hypervisor.remove(&World::endpoint(1));
        let status = daemon.add(1, &fibre("data", 1)).await;
        assert_eq!((status.phase, status.vm_needs_hba), (Phase::Pending, true));

        let second = uid(9);
        world.host.add_vm(&second, &domain(1));
        let mut spec = vm_spec(1);
        let VmPlace::Pod { uid: place, .. } = &mut spec.place else { unreachable!("it has a pod") };
        second.clone_into(place);
        spec.fc = FcSupport::Supported;
        daemon.registry.register_vm(spec).await.unwrap();
        assert!(!daemon.ready(1, "data").await.vm_needs_hba);
        daemon.remove(1, "data").await;
    });
}
