//! All doors between the host and its pods, as one bundle.

use std::path::Path;
use std::sync::Arc;

use super::bpf::BpfOverrides;
use super::devlist::CgroupV1Devices;
use super::grants::{DeviceLists, Overrides};
use super::nodes::{HostNodes, Nodes};
use super::poddir::{HostPodDirs, PodDirs};
use super::procs::{HostProcs, Procs};

/// The doors to pods' directories, nodes, grants and processes.
#[derive(Clone)]
pub struct PodDoors {
    /// Pods' directories and libvirt sockets.
    pub dirs: Arc<dyn PodDirs>,
    /// Device nodes.
    pub nodes: Arc<dyn Nodes>,
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
        Self {
            dirs: Arc::new(HostPodDirs),
            nodes: Arc::new(HostNodes),
            overrides: Arc::new(BpfOverrides::new()),
            lists: Arc::new(CgroupV1Devices::new()),
            procs: Arc::new(HostProcs::new(proc)),
        }
    }
}
