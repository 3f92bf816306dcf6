//! A VM as it is registered.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::types::VmId;

/// Where the VM's QEMU and its libvirt are to be found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmPlace {
    /// In a Kubernetes pod, found from the pod's UID in kubelet's directory layout.
    Pod {
        /// The pod's UID as kubelet writes it.
        uid: String,
        /// The container's cgroup directory, absolute; found by way of QEMU where `None`.
        cgroup: Option<PathBuf>,
        /// Directory of the hotplug volume relative to the pod's kubelet directory;
        /// `volumes/kubernetes.io~empty-dir/hotplug-disks` where `None`.
        hotplug_dir: Option<PathBuf>,
        /// The same directory as QEMU sees it; `/var/run/kubevirt/hotplug-disks` where `None`.
        hotplug_dir_in_pod: Option<PathBuf>,
        /// libvirt's socket relative to the pod's kubelet directory;
        /// `volumes/kubernetes.io~empty-dir/libvirt-runtime/libvirt-sock` where `None`.
        libvirt_socket: Option<PathBuf>,
    },
    /// Straight on a libvirt host: libvirt itself makes the node in QEMU's private `/dev` and sets
    /// its cgroup, so lunplug does neither.
    Host {
        /// libvirt's socket; `/run/libvirt/libvirt-sock` where `None`.
        libvirt_socket: Option<PathBuf>,
    },
}

/// A VM as it was registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Its name on this node.
    pub id: VmId,
    /// libvirt's name of the domain; `NAMESPACE_NAME` (as KubeVirt has it) unless given.
    pub domain: String,
    /// Where it runs.
    pub place: VmPlace,
    /// Whether it may have Fibre Channel volumes.
    #[serde(default, skip_serializing_if = "FcSupport::is_unspecified")]
    pub fc: FcSupport,
}

/// What whoever registers a VM says of Fibre Channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FcSupport {
    /// Nothing: what the node's HBAs see decides.
    #[default]
    Unspecified,
    /// Its pod is on a node with an HBA for it.
    Supported,
    /// It is not.
    Unsupported,
}

impl FcSupport {
    /// Whether it is the default.
    pub fn is_unspecified(&self) -> bool {
        *self == Self::Unspecified
    }
}
