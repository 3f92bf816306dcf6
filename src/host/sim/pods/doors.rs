//! The doors to the simulated pods. Fault points: `pods.dir`, `pods.socket`, `nodes.create`,
//! `nodes.remove`, `nodes.observe`, `grants.install`, `grants.grant`, `grants.revoke`, `grants.list`,
//! `procs.list`, `procs.inspect`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use nix::libc;

use super::{SimEntry, SimPod, SimPods, State, V1_ROOT, V2_ROOT};
use crate::host::grants::{
    Access, CgroupRef, DeviceLists, Entry, GrantStoreError, Hierarchy, ListChange, OverrideStatus,
    Overrides,
};
use crate::host::libvirt::{Endpoint, Instance};
use crate::host::nodes::{NODE_MODE, NodeError, NodeOwner, Nodes, Seen};
use crate::host::poddir::{
    EndpointPlace, HOST_NODES, HotplugDir, Inode, LibvirtEndpoint, PathError, PodDir, PodDirs,
    check_uid, host_dir, plain,
};
use crate::host::podfiles::FileError;
use crate::host::procs::{DirView, Membership, ProcessId, ProcessInfo, Procs};
use crate::types::{DevNum, Outcome, VmId, VolumeName};

/// A call that hangs ends after this, as on the real host.
const DEADLINE: Duration = Duration::from_secs(10);

impl SimPods {
    /// Works in a pod, if its hotplug directory is still the one that was found.
    pub(in crate::host::sim) fn with_hotplug<T>(
        &self,
        dir: &HotplugDir,
        work: impl FnOnce(&mut SimPod) -> T,
    ) -> Result<T, FileError> {
        Ok(work(self.lock().hotplug(dir).map_err(FileError::Place)?))
    }

    pub(in crate::host::sim) async fn pass(&self, point: &str, detail: &str) -> io::Result<()> {
        tokio::time::timeout(DEADLINE, self.faults.pass(point, detail))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

fn outcome(changed: bool) -> Outcome {
    if changed { Outcome::Done(()) } else { Outcome::Already(()) }
}

/// A simulated pod's UID is the last part of its directory.
fn uid(pod: &PodDir) -> String {
    pod.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

impl State {
    fn pod(&self, dir: &PodDir) -> Result<&SimPod, PathError> {
        let there = self.pods.get(&uid(dir)).filter(|pod| !pod.dir_gone);
        there.ok_or_else(|| PathError::PodGone(dir.path.clone()))
    }

    /// What openat2 finds beneath the pod's directory.
    fn entry(&self, dir: &PodDir, rel: &Path) -> Result<SimEntry, PathError> {
        plain(rel)?;
        let pod = self.pod(dir)?;
        let path = dir.path.join(rel);
        let symlink = |p: &&Path| pod.entries.get(*p) == Some(&SimEntry::Symlink);
        if rel.ancestors().any(|p| symlink(&p)) {
            return Err(PathError::Unsafe { path, why: "there is a symlink in it" });
        }
        pod.entries.get(rel).copied().ok_or(PathError::Missing(path))
    }

    /// The pod of a hotplug directory, if that is still the one that was found.
    fn hotplug(&mut self, dir: &HotplugDir) -> Result<&mut SimPod, NodeError> {
        match self.entry(&dir.pod, &dir.rel) {
            Ok(SimEntry::Dir) => {}
            Ok(_) => {
                let path = dir.pod.path.join(&dir.rel);
                return Err(NodeError::Dir(PathError::Unsafe { path, why: "not a directory" }));
            }
            Err(e) => return Err(NodeError::Dir(e)),
        }
        let gone = || NodeError::Dir(PathError::PodGone(dir.pod.path.clone()));
        self.pods.get_mut(&uid(&dir.pod)).filter(|pod| !pod.dir_gone).ok_or_else(gone)
    }

    /// The nodes of a pod, or of a VM on the host's own libvirt.
    fn nodes(&mut self, dir: &HotplugDir) -> Result<&mut BTreeMap<VolumeName, Seen>, NodeError> {
        if dir.pod.path == Path::new(HOST_NODES) {
            let missing = || NodeError::Dir(PathError::Missing(dir.pod.path.join(&dir.rel)));
            return self.host_nodes.get_mut(&dir.rel).ok_or_else(missing);
        }
        Ok(&mut self.hotplug(dir)?.nodes)
    }

    fn process(&self, id: ProcessId) -> Option<(&SimPod, &ProcessInfo)> {
        self.pods.values().find_map(|pod| Some((pod, pod.process(id)?)))
    }
}

/// Each pod's hotplug directory is its own inode.
fn inode(pod: &SimPod) -> Inode {
    Inode { dev: 0, ino: pod.pod_cgroup.id }
}

#[async_trait]
impl PodDirs for SimPods {
    async fn pod(&self, kubelet_root: &Path, uid: &str) -> Result<PodDir, PathError> {
        self.pass("pods.dir", uid).await?;
        check_uid(uid)?;
        let dir = PodDir { path: kubelet_root.join("pods").join(uid) };
        self.lock().pod(&dir)?;
        Ok(dir)
    }

    async fn hotplug(&self, pod: &PodDir, path: &Path) -> Result<HotplugDir, PathError> {
        self.pass("pods.dir", &path.to_string_lossy()).await?;
        let state = self.lock();
        match state.entry(pod, path)? {
            SimEntry::Dir => {
                let inode = inode(state.pod(pod)?);
                let (pod, rel) = (pod.clone(), path.to_owned());
                Ok(HotplugDir { pod, rel, inode, owner: (0, 0) })
            }
            _ => Err(PathError::Unsafe { path: pod.path.join(path), why: "not a directory" }),
        }
    }

    async fn host_nodes(&self, vm: &VmId, make: bool) -> Result<HotplugDir, PathError> {
        let rel = PathBuf::from(host_dir(vm));
        self.pass("pods.dir", &rel.to_string_lossy()).await?;
        let mut state = self.lock();
        let there = state.host_nodes.contains_key(&rel);
        if !there && !make {
            return Err(PathError::Missing(Path::new(HOST_NODES).join(rel)));
        }
        state.host_nodes.entry(rel.clone()).or_default();
        let pod = PodDir { path: HOST_NODES.into() };
        Ok(HotplugDir { pod, rel, inode: Inode { dev: 1, ino: 1 }, owner: (0, 0) })
    }

    async fn drop_host_nodes(&self, vm: &VmId) {
        let rel = PathBuf::from(host_dir(vm));
        let mut state = self.lock();
        if state.host_nodes.get(&rel).is_some_and(BTreeMap::is_empty) {
            state.host_nodes.remove(&rel);
        }
    }

    async fn socket(&self, pod: &PodDir, path: &Path) -> Result<LibvirtEndpoint, PathError> {
        self.pass("pods.socket", &path.to_string_lossy()).await?;
        match self.lock().entry(pod, path)? {
            SimEntry::Socket => Ok(LibvirtEndpoint {
                place: EndpointPlace::Pod { pod: pod.clone(), rel: path.to_owned() },
            }),
            _ => Err(PathError::Unsafe { path: pod.path.join(path), why: "it is not a socket" }),
        }
    }

    async fn host_socket(&self, path: &Path) -> Result<LibvirtEndpoint, PathError> {
        self.pass("pods.socket", &path.to_string_lossy()).await?;
        if !self.lock().host_sockets.contains(path) {
            return Err(PathError::Missing(path.to_owned()));
        }
        Ok(LibvirtEndpoint { place: EndpointPlace::Host { path: path.to_owned() } })
    }

    async fn pin(&self, endpoint: &LibvirtEndpoint) -> Result<Endpoint, PathError> {
        let found = match &endpoint.place {
            EndpointPlace::Pod { pod, rel } => self.socket(pod, rel).await?,
            EndpointPlace::Host { path } => self.host_socket(path).await?,
        };
        // The simulated hypervisor knows its libvirts by name.
        Ok(Endpoint::path(found.to_string(), Instance::Session))
    }
}

#[async_trait]
impl Nodes for SimPods {
    async fn ensure(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
        dev: DevNum,
        owner: NodeOwner,
    ) -> Result<Outcome, NodeError> {
        self.pass("nodes.create", name.as_str()).await?;
        let mut state = self.lock();
        let nodes = state.nodes(dir)?;
        let wanted = Seen::Node { dev, owner, mode: NODE_MODE };
        match nodes.get(name) {
            Some(Seen::Directory) => Err(NodeError::Refused {
                dir: dir.to_string(),
                name: name.to_string(),
                why: "a directory is in its place",
            }),
            Some(seen) if *seen == wanted => Ok(Outcome::Already(())),
            _ => {
                nodes.insert(name.clone(), wanted);
                Ok(Outcome::Done(()))
            }
        }
    }

    async fn remove(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
        expect: Option<DevNum>,
    ) -> Result<Outcome, NodeError> {
        self.pass("nodes.remove", name.as_str()).await?;
        let mut state = self.lock();
        let nodes = state.nodes(dir)?;
        match nodes.get(name) {
            Some(Seen::Node { dev, .. }) if expect.is_none_or(|e| e == *dev) => {
                nodes.remove(name);
                Ok(Outcome::Done(()))
            }
            _ => Ok(Outcome::Already(())),
        }
    }

    async fn observe(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
    ) -> Result<Option<Seen>, NodeError> {
        self.pass("nodes.observe", name.as_str()).await?;
        Ok(self.lock().nodes(dir)?.get(name).copied())
    }
}

#[async_trait]
impl Overrides for SimPods {
    async fn install(&self) -> Result<Outcome<OverrideStatus>, GrantStoreError> {
        self.pass("grants.install", "").await?;
        let changed = !std::mem::replace(&mut self.lock().installed, true);
        let status = OverrideStatus { program: 1, after_ours: Vec::new() };
        Ok(if changed { Outcome::Done(status) } else { Outcome::Already(status) })
    }

    async fn put(
        &self,
        cgroup: &CgroupRef,
        dev: DevNum,
        access: Access,
    ) -> Result<Outcome, GrantStoreError> {
        self.pass("grants.grant", &format!("{cgroup} {dev}")).await?;
        let mut state = self.lock();
        if state.cgroup_path(cgroup.id).as_deref() != Some(cgroup.path.as_path()) {
            return Err(GrantStoreError::Gone(cgroup.path.clone()));
        }
        state.installed = true;
        Ok(outcome(state.grants.insert((cgroup.id, dev), access) != Some(access)))
    }

    async fn take(&self, cgroup: u64, dev: DevNum) -> Result<Outcome, GrantStoreError> {
        let detail = format!("{} {dev}", self.lock().cgroup_name(cgroup));
        self.pass("grants.revoke", &detail).await?;
        Ok(outcome(self.lock().grants.remove(&(cgroup, dev)).is_some()))
    }

    async fn look_up(&self, cgroup: u64, devs: &[DevNum]) -> Result<Vec<Access>, GrantStoreError> {
        self.pass("grants.list", &cgroup.to_string()).await?;
        let state = self.lock();
        let has = |dev: &DevNum| state.grants.get(&(cgroup, *dev)).filter(|_| state.installed);
        Ok(devs.iter().map(|dev| has(dev).copied().unwrap_or(Access::NONE)).collect())
    }

    async fn entries(&self) -> Result<Vec<Entry>, GrantStoreError> {
        self.pass("grants.list", "").await?;
        let state = self.lock();
        let entry = |(&(cgroup, dev), &access): (&(u64, DevNum), &Access)| Entry {
            cgroup,
            dev,
            access,
            path: state.cgroup_path(cgroup),
        };
        Ok(state.grants.iter().map(entry).collect())
    }

    async fn uninstall(&self) -> Result<Outcome, GrantStoreError> {
        self.pass("grants.install", "").await?;
        let mut state = self.lock();
        state.grants.clear();
        Ok(outcome(std::mem::replace(&mut state.installed, false)))
    }
}

#[async_trait]
impl DeviceLists for SimPods {
    async fn missing(
        &self,
        cgroup: &CgroupRef,
        dev: DevNum,
        access: Access,
    ) -> Result<Vec<ListChange>, GrantStoreError> {
        self.pass("grants.list", &format!("{cgroup} {dev}")).await?;
        let added = access.without(self.lock().allowed(cgroup, dev));
        let change = ListChange { cgroup: cgroup.clone(), added };
        Ok(if added == Access::NONE { Vec::new() } else { vec![change] })
    }

    async fn allow(&self, change: &ListChange, dev: DevNum) -> Result<Outcome, GrantStoreError> {
        self.pass("grants.grant", &format!("{} {dev}", change.cgroup)).await?;
        let mut state = self.lock();
        if state.cgroup_path(change.cgroup.id).is_none() {
            return Err(GrantStoreError::Gone(change.cgroup.path.clone()));
        }
        let has = state.lists.entry((change.cgroup.path.clone(), dev)).or_insert(Access::NONE);
        let covered = has.covers(change.added);
        *has = has.with(change.added);
        Ok(outcome(!covered))
    }

    async fn deny(
        &self,
        change: &ListChange,
        dev: DevNum,
        _spare_children: bool,
    ) -> Result<Outcome, GrantStoreError> {
        self.pass("grants.revoke", &format!("{} {dev}", change.cgroup)).await?;
        let mut state = self.lock();
        let key = (change.cgroup.path.clone(), dev);
        let has = state.lists.remove(&key).unwrap_or(Access::NONE);
        let left = has.without(change.added);
        if left != Access::NONE {
            state.lists.insert(key, left);
        }
        Ok(outcome(left != has))
    }

    async fn allowed(&self, cgroup: &CgroupRef, dev: DevNum) -> Result<Access, GrantStoreError> {
        self.pass("grants.list", &format!("{cgroup} {dev}")).await?;
        Ok(self.lock().allowed(cgroup, dev))
    }
}

fn not_found() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

#[async_trait]
impl Procs for SimPods {
    async fn pod_cgroups(&self, uid: &str) -> io::Result<Vec<CgroupRef>> {
        self.pass("procs.list", uid).await?;
        Ok(self.lock().pods.get(uid).map(|pod| pod.pod_cgroup.clone()).into_iter().collect())
    }

    async fn cgroup(&self, path: &Path) -> io::Result<CgroupRef> {
        self.pass("procs.list", &path.to_string_lossy()).await?;
        if let Some(root) = self.roots().into_iter().find(|r| r.dir == path) {
            return Ok(CgroupRef { path: root.dir, hierarchy: root.hierarchy, id: 1 });
        }
        self.lock().cgroups().find(|c| c.path == path).cloned().ok_or_else(not_found)
    }

    async fn members(&self, cgroup: &CgroupRef) -> io::Result<Vec<u32>> {
        self.pass("procs.list", &cgroup.to_string()).await?;
        let state = self.lock();
        let inside = |p: &&ProcessInfo| p.cgroups.iter().any(|m| m.dir.starts_with(&cgroup.path));
        let mut pids: Vec<u32> = state
            .pods
            .values()
            .flat_map(|p| &p.processes)
            .filter(inside)
            .map(|p| p.id.pid)
            .collect();
        let hidden = |p: &SimPod| p.hidden && p.cgroup.path.starts_with(&cgroup.path);
        pids.extend(state.pods.values().any(hidden).then_some(0));
        Ok(pids)
    }

    async fn inspect(&self, pid: u32) -> io::Result<Option<ProcessInfo>> {
        self.pass("procs.inspect", &pid.to_string()).await?;
        let mut state = self.lock();
        let find = |pod: &'_ mut SimPod| {
            let process = pod.processes.iter_mut().find(|p| p.id.pid == pid)?;
            let now = process.clone();
            process.id.start += u64::from(pod.restarts);
            Some(now)
        };
        Ok(state.pods.values_mut().find_map(find))
    }

    async fn is_alive(&self, id: ProcessId) -> io::Result<bool> {
        self.pass("procs.inspect", &id.pid.to_string()).await?;
        Ok(self.lock().process(id).is_some())
    }

    async fn sees(&self, id: ProcessId, dir: &Path) -> io::Result<DirView> {
        self.pass("procs.inspect", &dir.to_string_lossy()).await?;
        let state = self.lock();
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let (pod, _) = state.process(id).ok_or_else(gone)?;
        if dir != pod.hotplug_in_pod {
            return Err(not_found());
        }
        let mut inode = inode(pod);
        inode.dev += u64::from(pod.another_dir);
        Ok(DirView { inode, nodev: pod.nodev, uid: pod.idmap, gid: pod.idmap })
    }

    async fn own(&self) -> io::Result<Vec<Membership>> {
        let dir = PathBuf::from(V2_ROOT).join("system.slice/lunplugd.service");
        Ok(vec![Membership { hierarchy: Hierarchy::V2, dir }])
    }

    fn roots(&self) -> Vec<Membership> {
        [(Hierarchy::V1, V1_ROOT), (Hierarchy::V2, V2_ROOT)]
            .map(|(hierarchy, dir)| Membership { hierarchy, dir: dir.into() })
            .to_vec()
    }
}
