//! The whole simulated node: its parts wired to each other, and a small world to begin with.

use std::path::Path;
use std::sync::Arc;

use super::domain::{SimDevice, SimDomain};
use super::hypervisor::SimHypervisor;
use super::pods::{SimOpened, SimPods};
use super::{Faults, SimBlock, SimLun, SimStorage};
use crate::host::grants::{Access, Hierarchy};
use crate::types::{Iqn, Lun, Portal, Wwid};

/// Where kubelet's directory is on the simulated node.
const KUBELET_ROOT: &str = "/var/lib/kubelet";

/// A simulated node. Clones share it.
#[derive(Clone)]
pub struct SimHost {
    /// SAN and SCSI layer.
    pub storage: SimStorage,
    /// Pods.
    pub pods: Arc<SimPods>,
    /// libvirt, QEMU and guests.
    pub hypervisor: SimHypervisor,
    /// What is to go wrong.
    pub faults: Arc<Faults>,
}

impl Default for SimHost {
    fn default() -> Self {
        let faults = Arc::new(Faults::default());
        let storage = SimStorage::new(faults.clone());
        let pods = SimPods::with_files(faults.clone(), storage.files().clone());
        let hypervisor = SimHypervisor::new(faults.clone());
        let kernel = pods.clone();
        // QEMU opens a disk as the kernel lets it: the node must be there, its own, and granted.
        hypervisor.set_open_check(Arc::new(move |endpoint, path, read_only| {
            let access = if read_only { Access::READ } else { Access::READ_WRITE };
            let opened = kernel.open_as(pod_of(endpoint), Path::new(path), access);
            opened.map(drop).map_err(|error| error.to_string())
        }));
        let (kernel, disks) = (pods.clone(), storage.clone());
        hypervisor.set_device_check(Arc::new(move |endpoint, path| {
            match kernel.open_as(pod_of(endpoint), Path::new(path), Access::READ).ok()? {
                SimOpened::Device(dev) => {
                    Some(SimDevice { size: disks.size_of(dev)?, identity: disks.identity_of(dev) })
                }
                SimOpened::File(inode) => {
                    Some(SimDevice { size: disks.files().size_of(inode)?, identity: None })
                }
            }
        }));
        Self { storage, pods, hypervisor, faults }
    }
}

/// The pod whose libvirt an endpoint names; `None` for the host's own.
fn pod_of(endpoint: &str) -> Option<&str> {
    endpoint.strip_prefix(KUBELET_ROOT)?.strip_prefix("/pods/")?.split('/').next()
}

impl SimHost {
    /// The name by which the hypervisor knows a pod's libvirt.
    pub fn endpoint(uid: &str) -> String {
        format!(
            "{KUBELET_ROOT}/pods/{uid}/volumes/kubernetes.io~empty-dir/libvirt-runtime/libvirt-sock"
        )
    }

    /// Adds a pod with a running domain.
    pub fn add_vm(&self, uid: &str, domain: &str) {
        self.pods.add_vm(uid, domain, Hierarchy::V2);
        self.hypervisor.add_domain(&Self::endpoint(uid), SimDomain::q35(domain, true));
    }

    /// Adds a target with `luns` LUNs, numbered from 0, of 1 GiB each.
    pub fn add_target(&self, target: &Iqn, portals: &[Portal], luns: u16) {
        self.storage.add_target(target, portals);
        for number in 0..luns {
            self.storage.add_lun(target, lun(number), SimLun::new(wwid(target, number), 1 << 30));
        }
    }

    /// The world that `lunplugd --sim` begins with: target `iqn.2026-01.org.lunplug:sim` at
    /// 192.0.2.1 and 192.0.2.2 with LUNs 0 to 255, and eight pods with the UIDs
    /// `00000000-0000-4000-8000-000000000001` and so on, each with a running domain, `default_vm-1`
    /// and so on; and logical volumes `/dev/sim/lv-1` to `/dev/sim/lv-8`, for whoever sets
    /// `local.block_roots`.
    pub fn demo() -> Self {
        let host = Self::default();
        let target = "iqn.2026-01.org.lunplug:sim".parse().expect("a well-formed IQN");
        let portals = ["192.0.2.1", "192.0.2.2"].map(|p| p.parse().expect("a well-formed portal"));
        host.add_target(&target, &portals, 256);
        for number in 1..=8 {
            let uid = format!("00000000-0000-4000-8000-{number:012}");
            host.add_vm(&uid, &format!("default_vm-{number}"));
            let volume = SimBlock::Lvm(format!("LVM-sim{number}"));
            host.storage.add_local(&format!("/dev/sim/lv-{number}"), volume, 1 << 30);
        }
        host
    }

    /// All of the node's state as text, the same for the same state.
    pub fn snapshot(&self) -> String {
        [self.storage.snapshot(), self.pods.snapshot(), self.hypervisor.snapshot()].join("\n")
    }
}

fn lun(number: u16) -> Lun {
    Lun::try_from(u64::from(number)).expect("a small number")
}

/// An identity that differs for each target and LUN.
fn wwid(target: &Iqn, number: u16) -> Wwid {
    let hash = target.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("naa.6001405{hash:016x}{number:09x}").parse().expect("32 hex digits")
}
