//! The simulated pods: directories, processes, cgroups and grants.
//!
//! A small model of what the kernel and kubelet keep. [`SimPods::open`] is the kernel's answer to an
//! open(2) inside a pod: a device opens only where its node is in place, QEMU's own, not on a nodev
//! mount, and granted. The simulated hypervisor asks it at each attach.

mod doors;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::libc;

use super::files::write_mounts;
use super::{Faults, SimFiles, SimMount};
use crate::host::grants::{Access, CgroupRef, Hierarchy};
use crate::host::nodes::{NODE_MODE, NodeOwner, Seen};
use crate::host::poddir::{HOST_NODES, Inode};
use crate::host::pods::PodDoors;
use crate::host::procs::{Membership, ProcessId, ProcessInfo};
use crate::types::{DevNum, VolumeName};

/// Where the simulated hierarchies are mounted.
const V1_ROOT: &str = "/sys/fs/cgroup/devices";
const V2_ROOT: &str = "/sys/fs/cgroup";
/// The program that runs guests.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Something in a pod's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimEntry {
    /// A directory.
    Dir,
    /// A listening socket.
    Socket,
    /// A symlink, wherever it leads.
    Symlink,
    /// A plain file.
    File,
}

/// What an open(2) in a pod gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimOpened {
    /// A device.
    Device(DevNum),
    /// A file.
    File(Inode),
}

/// A pod with a VM in it. The public fields may be changed by [`SimPods::edit`].
#[derive(Debug, Clone)]
pub struct SimPod {
    /// The pod's UID.
    pub uid: String,
    /// What is in its directory, by path relative to that.
    pub entries: BTreeMap<PathBuf, SimEntry>,
    /// The hotplug directory, relative to the pod's.
    pub hotplug: PathBuf,
    /// The hotplug directory as QEMU sees it.
    pub hotplug_in_pod: PathBuf,
    /// Its directory is gone, but not what runs in it.
    pub dir_gone: bool,
    /// QEMU's mount of it has `nodev`.
    pub nodev: bool,
    /// QEMU sees another directory at that path.
    pub another_dir: bool,
    /// By how much QEMU's mount of it shifts uids and gids (an idmapped mount).
    pub idmap: u32,
    /// It also has processes that lunplug does not see (another PID namespace).
    pub hidden: bool,
    /// Its processes' numbers go to other processes as soon as they were looked at.
    pub restarts: bool,
    /// The pod's processes.
    pub processes: Vec<ProcessInfo>,
    /// The container's cgroup.
    pub cgroup: CgroupRef,
    /// The pod's own cgroup.
    pub pod_cgroup: CgroupRef,
    /// Nodes and whatever else is in the hotplug directory.
    pub nodes: BTreeMap<VolumeName, Seen>,
    /// Files that are mounted on names in it, as the container sees it.
    pub mounts: BTreeMap<VolumeName, SimMount>,
}

impl SimPod {
    /// The pod's QEMU processes and others, by number.
    fn process(&self, id: ProcessId) -> Option<&ProcessInfo> {
        self.processes.iter().find(|p| p.id == id)
    }
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, SimPod>,
    host_sockets: BTreeSet<PathBuf>,
    /// The nodes of VMs on the host's own libvirt, by directory.
    host_nodes: BTreeMap<PathBuf, BTreeMap<VolumeName, Seen>>,
    grants: BTreeMap<(u64, DevNum), Access>,
    lists: BTreeMap<(PathBuf, DevNum), Access>,
    installed: bool,
    last: u32,
}

/// The pods of one simulated host.
pub struct SimPods {
    faults: Arc<Faults>,
    files: SimFiles,
    state: Mutex<State>,
}

impl SimPods {
    /// A host without pods, with its own libvirt socket.
    pub fn new(faults: Arc<Faults>) -> Arc<Self> {
        Self::with_files(faults, SimFiles::default())
    }

    /// The same on a host with files.
    pub fn with_files(faults: Arc<Faults>, files: SimFiles) -> Arc<Self> {
        let mut state = State::default();
        state.host_sockets.insert("/run/libvirt/libvirt-sock".into());
        Arc::new(Self { faults, files, state: Mutex::new(state) })
    }

    pub(in crate::host::sim) fn files(&self) -> &SimFiles {
        &self.files
    }

    /// Its doors.
    pub fn doors(self: &Arc<Self>) -> PodDoors {
        PodDoors {
            dirs: self.clone(),
            nodes: self.clone(),
            files: self.clone(),
            overrides: self.clone(),
            lists: self.clone(),
            procs: self.clone(),
        }
    }

    /// Adds a pod in kubelet's layout with a QEMU that runs `domain`. One with that UID is replaced.
    pub fn add_vm(&self, uid: &str, domain: &str, hierarchy: Hierarchy) {
        self.new_pod(uid, hierarchy);
        self.start_qemu(uid, domain);
    }

    /// Adds a pod with libvirt's daemon, and no VM yet.
    pub fn add_pod(&self, uid: &str, hierarchy: Hierarchy) {
        self.new_pod(uid, hierarchy);
        self.start(uid, "/usr/sbin/virtqemud", &[]);
    }

    fn new_pod(&self, uid: &str, hierarchy: Hierarchy) {
        let mut state = self.lock();
        let pod = new_pod(uid, hierarchy, state.number());
        state.pods.insert(uid.into(), pod);
    }

    /// Starts a (or another) QEMU in a pod.
    pub fn start_qemu(&self, uid: &str, domain: &str) {
        self.start(uid, QEMU, &["-name", &format!("guest={domain},debug-threads=on")]);
    }

    fn start(&self, uid: &str, exe: &str, args: &[&str]) {
        let mut state = self.lock();
        let pid = 1000 + state.number();
        let Some(pod) = state.pods.get_mut(uid) else { return };
        let dir = pod.cgroup.path.clone();
        pod.processes.push(ProcessInfo {
            id: ProcessId { pid, start: u64::from(pid) * 100 },
            exe: exe.into(),
            args: std::iter::once(exe).chain(args.iter().copied()).map(str::to_owned).collect(),
            uid: 64055,
            gid: 107,
            cgroups: vec![Membership { hierarchy: pod.cgroup.hierarchy, dir }],
        });
    }

    /// Ends all QEMU processes of a pod. Where nothing else runs in it, its mounts go, too.
    pub fn kill_qemu(&self, uid: &str) {
        self.edit(uid, |pod| {
            pod.processes.retain(|process| process.exe != Path::new(QEMU));
            if pod.processes.is_empty() {
                pod.mounts.clear();
            }
        });
    }

    /// Removes a pod's directory alone; its processes go on.
    pub fn remove_dir(&self, uid: &str) {
        self.edit(uid, |pod| pod.dir_gone = true);
    }

    /// Removes a pod with all that is in it. Its grants become those of a dead cgroup.
    pub fn remove_pod(&self, uid: &str) {
        self.lock().pods.remove(uid);
    }

    /// The node restarts: processes and grants are gone. What is in the pods' directories stays, as
    /// in an emptyDir that is on a disk.
    pub fn reboot(&self) {
        let mut state = self.lock();
        state.grants.clear();
        state.lists.clear();
        state.host_nodes.clear();
        state.installed = false;
        for pod in state.pods.values_mut() {
            pod.processes.clear();
            pod.mounts.clear();
        }
    }

    /// Changes a pod.
    pub fn edit(&self, uid: &str, change: impl FnOnce(&mut SimPod)) {
        if let Some(pod) = self.lock().pods.get_mut(uid) {
            change(pod);
        }
    }

    /// Somebody takes a pod's grants away.
    pub fn drop_grants(&self, uid: &str) {
        let mut state = self.lock();
        let Some(id) = state.pods.get(uid).map(|pod| pod.cgroup.id) else { return };
        state.grants.retain(|(cgroup, _), _| *cgroup != id);
    }

    /// Whether a pod's container may open a device, nodes aside.
    pub fn may_open(&self, uid: &str, dev: DevNum, access: Access) -> bool {
        let state = self.lock();
        state.pods.get(uid).is_some_and(|pod| state.allowed(&pod.cgroup, dev).covers(access))
    }

    /// [`SimPods::open`] in the pod of that UID; without one by the host's own libvirt, which allows its QEMUs all that
    /// is there.
    pub fn open_as(&self, uid: Option<&str>, path: &Path, access: Access) -> io::Result<SimOpened> {
        if let Some(uid) = uid {
            return self.open(uid, path, access);
        }
        let state = self.lock();
        let node = state.host_nodes.iter().find_map(|(dir, nodes)| {
            let name = path.strip_prefix(Path::new(HOST_NODES).join(dir)).ok()?.to_str()?;
            nodes.get(&name.parse().ok()?)
        });
        match node {
            Some(Seen::Node { dev, .. }) => Ok(SimOpened::Device(*dev)),
            _ => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    /// What open(2) of `path` (as QEMU sees it) gives in that pod: the device or file, or the errno that the
    /// kernel would give.
    pub fn open(&self, uid: &str, path: &Path, access: Access) -> io::Result<SimOpened> {
        let fail = |errno| Err(io::Error::from_raw_os_error(errno));
        let state = self.lock();
        let Some(pod) = state.pods.get(uid) else { return fail(libc::ENOENT) };
        let name = path.strip_prefix(&pod.hotplug_in_pod).ok().and_then(Path::to_str);
        let Some(name) = name.and_then(|n| n.parse::<VolumeName>().ok()) else {
            return fail(libc::ENOENT);
        };
        let (dev, owner, mode) = match pod.nodes.get(&name) {
            Some(Seen::Node { dev, owner, mode }) => (*dev, *owner, *mode),
            Some(Seen::Other) => {
                // A placeholder without its mount can be opened by nobody.
                let Some(mount) = pod.mounts.get(&name) else { return fail(libc::EACCES) };
                if mount.read_only && access.covers(Access::READ_WRITE) {
                    return fail(libc::EROFS);
                }
                return Ok(SimOpened::File(mount.inode));
            }
            Some(Seen::Directory) | None => return fail(libc::ENOENT),
        };
        let shifted = NodeOwner { uid: owner.uid + pod.idmap, gid: owner.gid + pod.idmap };
        let mine = pod.processes.iter().any(|p| (p.uid, p.gid) == (shifted.uid, shifted.gid));
        if pod.nodev || !mine || mode != NODE_MODE {
            return fail(libc::EACCES);
        }
        if !state.allowed(&pod.cgroup, dev).covers(access) {
            return fail(libc::EPERM);
        }
        Ok(SimOpened::Device(dev))
    }

    /// All pods, nodes and grants as text, the same for the same state.
    pub fn snapshot(&self) -> String {
        let state = self.lock();
        let mut text = String::new();
        for (uid, pod) in &state.pods {
            let _ = writeln!(text, "pod {uid} processes={}", pod.processes.len());
            write_nodes(&mut text, &pod.nodes);
            write_mounts(&mut text, &pod.mounts);
        }
        for (dir, nodes) in state.host_nodes.iter().filter(|(_, nodes)| !nodes.is_empty()) {
            let _ = writeln!(text, "host {}", dir.display());
            write_nodes(&mut text, nodes);
        }
        for ((cgroup, dev), access) in &state.grants {
            let _ = writeln!(text, "grant {} {dev} {access}", state.cgroup_name(*cgroup));
        }
        for ((path, dev), access) in &state.lists {
            let _ = writeln!(text, "list {} {dev} {access}", path.display());
        }
        text
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked leaves a model that is still a model.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_nodes(text: &mut String, nodes: &BTreeMap<VolumeName, Seen>) {
    for (name, seen) in nodes {
        let _ = match seen {
            Seen::Node { dev, owner, mode } => {
                writeln!(text, "  node {name} {dev} {}:{} {mode:o}", owner.uid, owner.gid)
            }
            other => writeln!(text, "  entry {name} {other:?}"),
        };
    }
}

impl State {
    fn number(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    fn allowed(&self, cgroup: &CgroupRef, dev: DevNum) -> Access {
        let found = match cgroup.hierarchy {
            Hierarchy::V1 => self.lists.get(&(cgroup.path.clone(), dev)),
            Hierarchy::V2 => self.grants.get(&(cgroup.id, dev)).filter(|_| self.installed),
        };
        found.copied().unwrap_or(Access::NONE)
    }

    fn cgroups(&self) -> impl Iterator<Item = &CgroupRef> {
        self.pods.values().flat_map(|pod| [&pod.pod_cgroup, &pod.cgroup])
    }

    fn cgroup_path(&self, id: u64) -> Option<PathBuf> {
        self.cgroups().find(|c| c.id == id).map(|c| c.path.clone())
    }

    fn cgroup_name(&self, id: u64) -> String {
        self.cgroup_path(id).map_or("(dead)".into(), |p| p.display().to_string())
    }
}

fn new_pod(uid: &str, hierarchy: Hierarchy, number: u32) -> SimPod {
    let root = match hierarchy {
        Hierarchy::V1 => V1_ROOT,
        Hierarchy::V2 => V2_ROOT,
    };
    let path = PathBuf::from(format!("{root}/kubepods/burstable/pod{uid}"));
    let id = u64::from(number) * 10;
    let cgroup = CgroupRef { path: path.join("compute"), hierarchy, id: id + 1 };
    let hotplug = PathBuf::from("volumes/kubernetes.io~empty-dir/hotplug-disks");
    let socket = PathBuf::from("volumes/kubernetes.io~empty-dir/libvirt-runtime/libvirt-sock");
    SimPod {
        uid: uid.into(),
        entries: [(hotplug.clone(), SimEntry::Dir), (socket, SimEntry::Socket)].into(),
        hotplug,
        hotplug_in_pod: "/var/run/kubevirt/hotplug-disks".into(),
        dir_gone: false,
        nodev: false,
        another_dir: false,
        idmap: 0,
        hidden: false,
        restarts: false,
        processes: Vec::new(),
        cgroup,
        pod_cgroup: CgroupRef { path, hierarchy, id },
        nodes: BTreeMap::new(),
        mounts: BTreeMap::new(),
    }
}
