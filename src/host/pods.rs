//! All doors between the host and its pods, as one bundle.

use std::path::Path;
use std::sync::Arc;

use super::bpf::BpfOverrides;
use super::devlist::CgroupV1Devices;
use super::grants::{DeviceLists, Overrides};
use super::nodes::{HostNodes, Nodes};
use super::poddir::{HostPodDirs, PodDirs};
use super::podfiles::{HostPodFiles, PodFiles};
use super::procs::{HostProcs, Procs};

/// The doors to pods' directories, nodes, grants and processes.
#[derive(Clone)]
pub struct PodDoors {
    /// Pods' directories and libvirt sockets.
    pub dirs: Arc<dyn PodDirs>,
    /// Device nodes.
    pub nodes: Arc<dyn Nodes>,
    /// Files of the host's in pods.
    pub files: Arc<dyn PodFiles>,
    /// Grants of cgroup v2.
    pub overrides: Arc<dyn Overrides>,
    /// Grants of cgroup v1.
    pub lists: Arc<dyn DeviceLists>,
    /// Processes and cgroups.
    pub procs: Arc<dyn Procs>,
}

impl PodDoors {
    /// This host's, with procfs at `proc`. Changes nothing on the host.
    pub fn real(proc: &Path) -> Self {
        let procs = HostProcs::new(proc);
        Self {
            dirs: Arc::new(HostPodDirs),
            nodes: Arc::new(HostNodes),
            files: Arc::new(HostPodFiles::new(procs.clone())),
            overrides: Arc::new(BpfOverrides::new()),
            lists: Arc::new(CgroupV1Devices::new()),
            procs: Arc::new(procs),
        }
    }
}
