//! The main job: volumes come, are what was asked for, and go without a trace.

use lunplug::host::grants::{Access, Hierarchy};
use lunplug::host::libvirt::Definition;
use lunplug::host::sim::domain::SimDomain;
use lunplug::journal::Desired;
use lunplug::spec::{AddOptions, FcSupport, Phase, RemoveOptions, VmPlace, VmSpec, VolumeSpec};
use lunplug::types::{Bus, Outcome};
use lunplug::vm::facade::Volumes;

use crate::world::{
    Daemon, World, domain, key, lun, node, single, target, uid, vm, vm_spec, volume,
};

/// What the guest of the n-th VM has by this alias, as XML.
fn disk_xml(world: &World, number: u8, name: &str) -> String {
    let xml = world
        .host
        .hypervisor
        .with_domain(&World::endpoint(number), &domain(number), |d| d.xml(Definition::Live));
    let xml = xml.unwrap();
    let alias = format!("<alias name='ua-lunplug-{name}'/>");
    let disk = xml.split("<disk ").find(|d| d.contains(&alias));
    disk.unwrap_or_else(|| panic!("no {alias} in {xml}")).to_owned()
}

/// Comes, works, goes.
async fn round(world: &World, daemon: &Daemon, spec: &VolumeSpec) {
    let name = spec.name.as_str();
    let status = daemon.add(1, spec).await;
    assert_eq!((status.phase, status.reason), (Phase::Ready, None), "{}", status.message);
    let device = status.device.unwrap();
    assert_eq!(world.host.storage.lun_of(device.dev).unwrap().0, target());
    let access = if spec.read_only { Access::READ } else { Access::READ_WRITE };
    assert!(world.host.pods.may_open(&uid(1), device.dev, access));
    assert!(!world.host.pods.may_open(&uid(2), device.dev, Access::READ));
    let xml = disk_xml(world, 1, name);
    assert!(xml.contains(&format!("<serial>{}</serial>", spec.serial.as_ref().unwrap())), "{xml}");
    assert!(xml.contains(&format!("bus='{}'", spec.bus.as_str())), "{xml}");
    assert_eq!(xml.contains("<readonly/>"), spec.read_only, "{xml}");
    daemon.remove(1, name).await;
    assert!(!world.host.pods.may_open(&uid(1), device.dev, Access::READ));
    daemon.quiet().await;
    world.assert_clean(name);
}

#[test]
fn volumes_of_each_kind_come_and_go() {
    let world = World::new();
    world.life(async |daemon| {
        for (paths, mut spec) in [(2, volume("data", 1)), (1, single("data", 1))] {
            for bus in [Bus::Scsi, Bus::Virtio] {
                for read_only in [false, true] {
                    (spec.bus, spec.read_only) = (bus, read_only);
                    round(&world, &daemon, &spec).await;
                }
            }
            let status = daemon.add(1, &spec).await;
            assert_eq!(status.device.unwrap().paths, paths);
            daemon.remove(1, "data").await;
        }
    });
}

#[test]
fn the_serial_is_the_one_asked_for_in_its_case() {
    let world = World::new();
    world.life(async |daemon| {
        let mut spec = volume("data", 1);
        spec.serial = Some("Keep-This_CASE.01".parse().unwrap());
        round(&world, &daemon, &spec).await;
    });
}

#[test]
fn five_volumes_one_after_the_other_and_at_once() {
    let world = World::new();
    let names = ["v1", "v2", "v3", "v4", "v5"];
    world.life(async |daemon| {
        for _ in 0..2 {
            for (name, lun) in names.iter().zip(1..) {
                let status = daemon.add(1, &volume(name, lun)).await;
                assert_eq!(status.phase, Phase::Ready, "{status:?}");
            }
            let mut targets: Vec<_> = daemon
                .registry
                .list_volumes(None)
                .await
                .into_iter()
                .map(|v| v.target.clone())
                .collect();
            targets.sort();
            targets.dedup();
            assert_eq!(targets.len(), 5, "each has a target name of its own: {targets:?}");
            for name in names {
                daemon.remove(1, name).await;
            }
            daemon.quiet().await;
            world.assert_clean("one after the other");
        }
        for round in ["at once", "and again"] {
            for (name, lun) in names.iter().zip(1..) {
                daemon.want(1, &volume(name, lun)).await.unwrap();
            }
            for name in names {
                daemon.ready(1, name).await;
            }
            for name in names {
                daemon.drop_volume(1, name, RemoveOptions::default()).await.unwrap();
            }
            for name in names {
                daemon.gone(1, name).await;
            }
            daemon.quiet().await;
            world.assert_clean(round);
        }
    });
}

#[test]
fn one_lun_is_shared_by_two_vms_and_goes_with_the_last() {
    let world = World::new();
    let mut spec = volume("shared", 3);
    spec.shareable = true;
    for first in [1, 2] {
        world.life(async |daemon| {
            for number in [1, 2] {
                let status = daemon.add(number, &spec).await;
                assert_eq!((status.phase, status.reason), (Phase::Ready, None));
            }
            let dev = |status: lunplug::spec::VolumeStatus| status.device.unwrap().dev;
            let get = async |n| daemon.registry.get_volume(&key(n, "shared")).await.unwrap();
            let shared = dev(get(1).await);
            assert_eq!(shared, dev(get(2).await));
            let last = 3 - first;
            daemon.remove(first, "shared").await;
            assert!(!world.host.pods.may_open(&uid(first), shared, Access::READ));
            assert!(world.host.pods.may_open(&uid(last), shared, Access::READ_WRITE));
            assert_eq!(world.host.storage.lun_of(shared), Some((target(), lun(3))));
            daemon.remove(last, "shared").await;
            daemon.quiet().await;
            world.assert_clean("shared");
        });
    }
}

#[test]
fn a_pod_on_cgroup_v1_is_served_too() {
    let host = node();
    host.pods.add_vm(&uid(1), &domain(1), Hierarchy::V1);
    let world = World::over(host, Desired::in_memory().unwrap());
    world.life(async |daemon| {
        for spec in [volume("data", 1), single("data", 1)] {
            round(&world, &daemon, &spec).await;
        }
    });
}

#[test]
fn a_vm_straight_on_a_libvirt_host_has_its_node_beneath_dev_and_needs_no_grant() {
    let host = node();
    host.hypervisor.add_domain("/run/libvirt/libvirt-sock", SimDomain::q35("plain", true));
    let world = World::over(host, Desired::in_memory().unwrap());
    world.life(async |daemon| {
        let id: lunplug::types::VmId = "default/plain".parse().unwrap();
        let place = VmPlace::Host { libvirt_socket: None };
        let spec =
            VmSpec { id: id.clone(), domain: "plain".into(), place, fc: FcSupport::default() };
        daemon.registry.register_vm(spec).await.unwrap();
        let mut changes = daemon.registry.watch();
        let spec = volume("data", 1);
        daemon.registry.add_volume(&id, spec.clone(), AddOptions::default()).await.unwrap();
        let mut dev = None;
        while dev.is_none() {
            let status = changes.recv().await.unwrap();
            assert_eq!(status.reason, None, "{}", status.message);
            dev = (status.phase == Phase::Ready).then(|| status.device.as_ref().unwrap().dev);
        }
        let picture = world.picture();
        assert!(picture.contains("source=/dev/lunplug/default_plain/data"), "{picture}");
        let node = format!("host default_plain\n  node data {} 0:0 600", dev.unwrap());
        assert!(picture.contains(&node), "{picture}");
        assert!(!picture.contains("grant "), "{picture}");
        let key = lunplug::types::VolumeKey { vm: id, volume: spec.name };
        daemon.registry.remove_volume(&key, RemoveOptions::default()).await.unwrap();
        while changes.recv().await.unwrap().phase != Phase::Gone {}
        daemon.quiet().await;
        world.assert_clean("a plain host");
    });
}

#[test]
fn asking_for_what_is_there_changes_nothing() {
    let world = World::new();
    world.life(async |daemon| {
        let spec = volume("data", 1);
        daemon.add(1, &spec).await;
        daemon.quiet().await;
        let before = world.picture();
        let again = daemon.registry.add_volume(&vm(1), spec, AddOptions::default()).await;
        assert!(matches!(again, Ok(Outcome::Already(s)) if s.phase == Phase::Ready));
        let again = daemon.registry.register_vm(vm_spec(1)).await;
        assert!(matches!(again, Ok(Outcome::Already(_))));
        daemon.quiet().await;
        assert_eq!(world.picture(), before);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("asked twice");
    });
}

#[test]
fn a_persistent_volume_is_in_both_definitions_and_leaves_both() {
    let world = World::new();
    world.life(async |daemon| {
        let mut spec = volume("data", 1);
        spec.persist = true;
        assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
        for definition in ["live", "config"] {
            let disk = format!("{definition} sda ua-lunplug-data serial=data");
            assert!(world.picture().contains(&disk), "{definition}");
        }
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a persistent volume");
    });
}

#[test]
fn without_multipathd_two_portals_give_one_path() {
    let world = World::new();
    world.host.storage.set_multipathd(false);
    world.life(async |daemon| {
        let status = daemon.add(1, &volume("data", 1)).await;
        let device = status.device.unwrap();
        assert_eq!((device.map, device.paths), (None, 1));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a single path");
    });
}
