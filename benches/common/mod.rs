//! The simulated node that the benches and the budget run on.
#![allow(dead_code, unreachable_pub, missing_docs)] // each uses its own part

pub mod callgrind;
pub mod domain;
pub mod heap;
pub mod table;

use std::path::Path;
use std::sync::Arc;

use lunplug::config::Config;
use lunplug::daemon::{self, Doors, Form};
use lunplug::host::lock::RealRunDir;
use lunplug::host::sim::SimHost;
use lunplug::journal::Desired;
use lunplug::spec::{
    AddOptions, FcSupport, Phase, RemoveOptions, Source, VmPlace, VmSpec, VolumeSpec,
};
use lunplug::types::{Iqn, VmId, VolumeKey};
use lunplug::vm::facade::Volumes;
use lunplug::vm::registry::Registry;

/// How many VMs have their LUNs at one target.
const VMS_A_TARGET: u32 = 25;
/// A target's LUNs are numbered from 0.
const LUNS_A_TARGET: u16 = 320;

fn target(number: u32) -> Iqn {
    format!("iqn.2026-01.org.lunplug:bench-{number}").parse().unwrap()
}

/// The n-th VM, from 0.
pub fn vm(number: u32) -> VmId {
    format!("default/vm-{number}").parse().unwrap()
}

fn uid(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

fn domain(number: u32) -> String {
    format!("default_vm-{number}")
}

/// The registration of the n-th VM.
pub fn vm_spec(number: u32) -> VmSpec {
    let place = VmPlace::Pod {
        uid: uid(number),
        cgroup: None,
        hotplug_dir: None,
        hotplug_dir_in_pod: None,
        libvirt_socket: None,
    };
    VmSpec { id: vm(number), domain: domain(number), place, fc: FcSupport::default() }
}

/// A node with so many pods, each with a running domain, and targets with two portals each.
pub fn node(vms: u32) -> SimHost {
    let host = SimHost::default();
    let portals = ["192.0.2.1", "192.0.2.2"].map(|p| p.parse().unwrap());
    for number in 0..vms.div_ceil(VMS_A_TARGET) {
        host.add_target(&target(number), &portals, LUNS_A_TARGET);
    }
    (0..vms).for_each(|n| host.add_vm(&uid(n), &domain(n)));
    host
}

/// The n-th volume of a VM that may have ten: two paths, on bus scsi.
pub fn volume(vm: u32, number: u32) -> VolumeSpec {
    assert!(number < 10, "LUNs for ten volumes a VM");
    lun(vm / VMS_A_TARGET, vm % VMS_A_TARGET * 10 + number)
}

/// The volume that is a LUN of a target.
pub fn lun(of: u32, number: u32) -> VolumeSpec {
    let source = format!("iscsi://192.0.2.1,192.0.2.2/{}/{number}", target(of));
    let source: Source = source.parse().unwrap();
    let name = format!("v{number}");
    serde_json::from_value(serde_json::json!({
        "name": name, "disk": name, "serial": name,
        "source": serde_json::to_value(source).unwrap(),
        "bus": "scsi", "cache": "none", "read_only": false, "shareable": false, "persist": false,
        "multipath": "preferred", "expect_wwid": null, "expect_size": null,
    }))
    .unwrap()
}

/// A daemon's configuration that has everything below `dir`, for so many VMs.
pub fn config(dir: &Path, vms: u32) -> Config {
    let mut config = Config {
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        socket: dir.join("lunplugd.sock"),
        ..Config::default()
    };
    config.limits.max_vms = vms;
    config.resolve(None, "node-1");
    config
}

/// Where the daemon's stores are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stores {
    /// As on a real host: SQLite in a file, effects in files.
    Files,
    /// Both simulated.
    Memory,
}

/// A daemon on a simulated host.
pub async fn start(host: &SimHost, config: &Config, stores: Stores) -> Arc<Registry> {
    let mut doors = Doors::sim(host);
    let desired = match stores {
        Stores::Memory => Desired::in_memory(),
        Stores::Files => {
            doors.storage.rundir = Arc::new(RealRunDir::open(&config.run_dir).unwrap());
            Desired::open_beside(&config.state_dir.join("lunplug.db"), &config.run_dir)
        }
    };
    let form = Form { simulated: true, ..Form::default() };
    daemon::compose(config, &form, doors, desired.unwrap()).await.unwrap()
}

/// Adds a volume, and waits until the guest has it.
pub async fn add(registry: &Registry, vm: &VmId, spec: VolumeSpec) {
    let added = registry.add_volume(vm, spec.clone(), AddOptions::default()).await;
    assert!(added.unwrap().changed());
    ready(registry, vm, &spec).await;
}

/// Waits until the guest has a volume.
pub async fn ready(registry: &Registry, vm: &VmId, spec: &VolumeSpec) {
    let key = VolumeKey { vm: vm.clone(), volume: spec.name.clone() };
    let mut changes = registry.watch();
    loop {
        let status = registry.get_volume(&key).await.unwrap();
        assert_eq!(status.reason, None, "{status:?}");
        if status.phase == Phase::Ready {
            return;
        }
        // Whether it came or some were missed: it is looked again.
        let _ = changes.recv().await;
    }
}

/// Removes a volume, and waits until nothing of it is left.
pub async fn remove(registry: &Registry, vm: &VmId, spec: &VolumeSpec) {
    let key = VolumeKey { vm: vm.clone(), volume: spec.name.clone() };
    let mut changes = registry.watch();
    assert!(registry.remove_volume(&key, RemoveOptions::default()).await.unwrap().changed());
    while registry.get_volume(&key).await.is_ok() {
        let _ = changes.recv().await;
    }
}
