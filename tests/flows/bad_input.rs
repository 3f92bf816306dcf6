//! Bad input: each has a reason of its own, and leaves nothing behind.

use std::path::PathBuf;

use lunplug::host::nodes::Seen;
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::pods::{SimEntry, SimPod};
use lunplug::host::sim::{PortalState, SimHost};
use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{MultipathPolicy, RemoveOptions, Source, VmPlace, VmSpec, VolumeSpec};
use lunplug::types::Bus;
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, domain, key, node, portal, single, uid, vm, vm_spec, volume};

/// An add that fails for this reason and leaves nothing, whether it is given up or asked to go.
async fn refused(world: &World, daemon: &Daemon, spec: &VolumeSpec, reason: Reason) {
    let before = world.picture();
    let name = spec.name.as_str();
    assert_eq!(daemon.add_fails(1, spec).await, reason, "{:?}", daemon.get(1, name).await);
    let _ = daemon.drop_volume(1, name, RemoveOptions::default()).await;
    daemon.gone(1, name).await;
    daemon.quiet().await;
    assert_eq!(world.picture(), before, "{reason}");
    let stored = world.desired.volumes(&vm(1)).await.unwrap();
    assert!(stored.iter().all(|v| v.spec.name != spec.name), "{reason}");
}

#[test]
fn unknown_vms_and_volumes() {
    let world = World::new();
    world.life(async |daemon| {
        let none = RemoveOptions::default();
        let reason = daemon.want(3, &volume("data", 1)).await.unwrap_err().reason;
        assert_eq!(reason, Reason::VmNotFound);
        let reason = daemon.drop_volume(3, "data", none).await.unwrap_err().reason;
        assert_eq!(reason, Reason::VmNotFound);
        let reason = daemon.drop_volume(1, "data", none).await.unwrap_err().reason;
        assert_eq!(reason, Reason::VolumeNotFound);
        let reason = daemon.registry.get_volume(&key(1, "data")).await.unwrap_err().reason;
        assert_eq!(reason, Reason::VolumeNotFound);
        // A disk of somebody else's that goes by this name.
        let reason = daemon.drop_volume(1, "boot", none).await.unwrap_err().reason;
        assert_eq!(reason, Reason::NotHotplugged);
        world.assert_clean("unknown names");
    });
}

#[test]
fn what_the_san_does_not_give() {
    let with = |change: &dyn Fn(&SimHost), spec: VolumeSpec, reason| {
        let world = World::new();
        change(&world.host);
        world.life(async |daemon| refused(&world, &daemon, &spec, reason).await);
    };
    let portals = |state| {
        move |host: &SimHost| [1, 2].iter().for_each(|n| host.storage.set_portal(portal(*n), state))
    };
    with(&|_| {}, volume("data", 999), Reason::LunNotFound);
    with(&|_| {}, single("data", 999), Reason::LunNotFound);
    with(&portals(PortalState::Refusing), volume("data", 1), Reason::PortalUnreachable);
    with(&portals(PortalState::Dead), volume("data", 1), Reason::PortalUnreachable);
    with(&portals(PortalState::Dead), single("data", 1), Reason::PortalUnreachable);
    with(&portals(PortalState::Denied), volume("data", 1), Reason::LoginRefused);
    with(&portals(PortalState::Denied), single("data", 1), Reason::LoginRefused);
    let mut unknown = volume("data", 1);
    let Source::Iscsi(source) = &mut unknown.source else { panic!("of iSCSI") };
    source.target = "iqn.2026-01.org.lunplug:unknown".parse().unwrap();
    with(&|_| {}, unknown, Reason::TargetNotFound);
    let mut required = volume("data", 1);
    required.multipath = MultipathPolicy::Required;
    with(&|h| h.storage.set_multipathd(false), required, Reason::MultipathUnavailable);
}

#[test]
fn one_good_portal_is_enough() {
    for state in [PortalState::Dead, PortalState::Refusing, PortalState::Denied] {
        let world = World::new();
        world.host.storage.set_portal(portal(1), state);
        world.life(async |daemon| {
            let status = daemon.add(1, &volume("data", 1)).await;
            assert_eq!(status.reason, None, "{state:?}: {}", status.message);
            assert_eq!(status.device.unwrap().paths, 1);
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("one portal");
        });
    }
}

#[test]
fn clashes_of_name_source_and_serial() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        let before = world.picture();
        let want = async |number, spec: &VolumeSpec| {
            let reason = daemon.add_fails(number, spec).await;
            let _ = daemon.drop_volume(number, spec.name.as_str(), RemoveOptions::default()).await;
            daemon.quiet().await;
            reason
        };
        assert_eq!(
            daemon.want(1, &volume("data", 2)).await.unwrap_err().reason,
            Reason::VolumeExists
        );
        assert_eq!(want(1, &volume("other", 1)).await, Reason::SourceInUse);
        assert_eq!(want(2, &volume("data", 1)).await, Reason::SourceInUse);
        let mut shared = volume("data", 1);
        shared.shareable = true;
        assert_eq!(want(2, &shared).await, Reason::SourceInUse);
        let mut serial = volume("other", 2);
        serial.serial = Some("data".parse().unwrap());
        assert_eq!(want(1, &serial).await, Reason::SerialInUse);
        // That of the boot disk, which is not lunplug's.
        serial.serial = Some("boot".parse().unwrap());
        assert_eq!(want(1, &serial).await, Reason::SerialInUse);
        assert_eq!(world.picture(), before);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("clashes");
    });
}

#[test]
fn serials_too_long_for_their_bus() {
    let world = World::new();
    world.life(async |daemon| {
        let mut spec = volume("data", 1);
        for (bus, most) in [(Bus::Scsi, 36), (Bus::Virtio, 20)] {
            spec.bus = bus;
            // What is too long for both is no serial at all.
            if let Ok(serial) = "x".repeat(most + 1).parse() {
                spec.serial = Some(serial);
                let refusal = daemon.want(1, &spec).await.unwrap_err();
                assert_eq!(refusal.reason, Reason::InvalidSerial);
            }
            spec.serial = Some("x".repeat(most).parse().unwrap());
            assert_eq!(daemon.add(1, &spec).await.reason, None);
            daemon.remove(1, "data").await;
        }
        daemon.quiet().await;
        world.assert_clean("serials");
    });
}

#[test]
fn a_domain_that_cannot_take_a_disk() {
    let with = |domain: SimDomain, spec: VolumeSpec, reason| {
        let world = World::new();
        world.host.hypervisor.add_domain(&World::endpoint(1), domain);
        world.life(async |daemon| refused(&world, &daemon, &spec, reason).await);
    };
    let from = |xml: &str| SimDomain::from_xml(&domain(1), xml, true);
    let mut virtio = volume("data", 1);
    virtio.bus = Bus::Virtio;
    let no_ports = "<domain><name>x</name><os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os><devices>
        <controller type='pci' index='0' model='pcie-root'/></devices></domain>";
    with(from("<domain><devices>"), volume("data", 1), Reason::DomainXmlUnsupported);
    with(from("this is not XML"), volume("data", 1), Reason::DomainXmlUnsupported);
    with(from(no_ports), virtio, Reason::NoFreeAddress);
    with(from(no_ports), volume("data", 1), Reason::NoFreeAddress);
}

fn pod_place(change: impl FnOnce(&mut Option<PathBuf>, &mut Option<PathBuf>)) -> VmSpec {
    let mut spec = vm_spec(3);
    let VmPlace::Pod { hotplug_dir, libvirt_socket, .. } = &mut spec.place else { unreachable!() };
    change(hotplug_dir, libvirt_socket);
    spec
}

#[test]
fn paths_that_leave_the_pod_are_refused_at_registration() {
    let world = World::new();
    world.life(async |daemon| {
        for (spec, reason) in [
            (pod_place(|dir, _| *dir = Some("../other/disks".into())), Reason::PathNotAllowed),
            (pod_place(|dir, _| *dir = Some("/etc".into())), Reason::PathNotAllowed),
            (pod_place(|dir, _| *dir = Some("missing".into())), Reason::HotplugDirUnsafe),
            (pod_place(|_, s| *s = Some("../../libvirt-sock".into())), Reason::PathNotAllowed),
            (
                pod_place(|_, s| {
                    *s = Some("volumes/kubernetes.io~empty-dir/hotplug-disks".into());
                }),
                Reason::SocketUntrusted,
            ),
        ] {
            let refusal = daemon.registry.register_vm(spec.clone()).await.unwrap_err();
            assert_eq!(refusal.reason, reason, "{:?}: {}", spec.place, refusal.message);
            assert_eq!(daemon.registry.list_vms().await.len(), 2);
        }
        let mut gone = vm_spec(3);
        let VmPlace::Pod { uid, .. } = &mut gone.place else { unreachable!() };
        *uid = "00000000-0000-4000-8000-00000000ffff".into();
        let refusal = daemon.registry.register_vm(gone).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::PodGone);
        assert_eq!(world.desired.vms().await.unwrap().len(), 2);
        world.assert_clean("registration");
    });
}

fn hotplug(pod: &SimPod) -> PathBuf {
    pod.hotplug.clone()
}

fn socket(_: &SimPod) -> PathBuf {
    "volumes/kubernetes.io~empty-dir/libvirt-runtime/libvirt-sock".into()
}

#[test]
fn what_a_hostile_pod_plants() {
    let plant = |at: fn(&SimPod) -> PathBuf, what: SimEntry| {
        move |pod: &mut SimPod| {
            pod.entries.insert(at(pod), what);
        }
    };
    let with = |change: &dyn Fn(&mut SimPod), reason| {
        let world = World::new();
        world.host.pods.edit(&uid(1), |pod| change(pod));
        world.life(async |daemon| refused(&world, &daemon, &volume("data", 1), reason).await);
    };
    with(&plant(hotplug, SimEntry::Symlink), Reason::HotplugDirUnsafe);
    with(&plant(hotplug, SimEntry::File), Reason::HotplugDirUnsafe);
    with(&plant(socket, SimEntry::Symlink), Reason::SocketUntrusted);
    with(&plant(socket, SimEntry::File), Reason::SocketUntrusted);
    with(&|pod| pod.nodev = true, Reason::NodevMount);
    with(&|pod| pod.another_dir = true, Reason::HotplugDirUnsafe);
    with(
        &|pod| {
            pod.hidden = true;
            pod.processes.clear();
        },
        Reason::QemuNotFound,
    );
    with(&|pod| pod.restarts = true, Reason::QemuNotFound);
    with(&|pod| pod.processes.clear(), Reason::QemuNotFound);
    let directory = |pod: &mut SimPod| {
        pod.nodes.insert("data".parse().unwrap(), Seen::Directory);
    };
    with(&directory, Reason::NodeRefused);
}

#[test]
fn a_pod_that_vanished() {
    let world = World::new();
    let host = world.host.clone();
    world.life(async |daemon| {
        host.pods.remove_pod(&uid(1));
        host.hypervisor.remove(&World::endpoint(1));
        let before = world.picture();
        assert_eq!(daemon.add_fails(1, &volume("data", 1)).await, Reason::PodGone);
        assert_eq!(world.picture(), before);
    });
}

#[test]
fn a_pod_that_vanishes_takes_its_volumes_and_leaves_the_host_clean() {
    let host = node();
    host.pods.remove_pod(&uid(1));
    host.hypervisor.remove(&World::endpoint(1));
    let after = host.snapshot();

    let world = World::over(node(), Desired::in_memory().unwrap());
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        world.host.pods.remove_pod(&uid(1));
        world.host.hypervisor.remove(&World::endpoint(1));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        assert_eq!(world.picture(), after);
    });
}
