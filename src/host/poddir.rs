//! Paths beneath a pod's directory, which the pod itself can write to.
//!
//! Nothing here holds a descriptor for long: one in a pod's volume would keep kubelet from
//! unmounting it. What is kept is where a thing was found and which inode it was; each use opens it
//! again beneath the pod's root, without following a symlink, and compares.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use serde::{Deserialize, Serialize};

use super::blocking::blocking;
use super::libvirt::{Endpoint, Instance};
use crate::types::{VmId, VolumeName};

/// Where the nodes of VMs on the host's own libvirt are, a directory for each VM: a devtmpfs, so nodes can be
/// opened there, and libvirt takes what lies beneath /dev over into a private /dev of QEMU's.
pub const HOST_NODES: &str = "/dev/lunplug";

/// A path beneath a pod is not what it must be.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// It is absolute, empty or has `..` in it.
    #[error("path {} must be relative to the pod's directory, without '..'", .0.display())]
    NotPlain(PathBuf),
    /// A pod's UID is not one.
    #[error("pod UID {0:?} is malformed: 1 to 64 of a-z, A-Z, 0-9 and '-'")]
    BadUid(String),
    /// The pod's directory is not there.
    #[error("the pod's directory {} is not there", .0.display())]
    PodGone(PathBuf),
    /// The path is not there.
    #[error("{} is not there", .0.display())]
    Missing(PathBuf),
    /// It is something else than it must be: a symlink, another kind of file, another inode.
    #[error("{} is refused: {why}", .path.display())]
    Unsafe {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It could not be opened.
    #[error("{} could not be opened", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<io::Error> for PathError {
    fn from(source: io::Error) -> Self {
        Self::Io { path: "a path beneath the pod".into(), source }
    }
}

type Result<T> = std::result::Result<T, PathError>;

/// An inode: a directory or a file that is recognised again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Inode {
    /// The file system's device number.
    pub dev: u64,
    /// Its number there.
    pub ino: u64,
}

/// A pod's directory below kubelet's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir {
    /// `ROOT/pods/UID`.
    pub(in crate::host) path: PathBuf,
}

impl fmt::Display for PodDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// The directory in which a pod's block nodes are made, as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotplugDir {
    pub(in crate::host) pod: PodDir,
    pub(in crate::host) rel: PathBuf,
    pub(in crate::host) inode: Inode,
    pub(in crate::host) owner: (u32, u32),
}

impl HotplugDir {
    /// Which directory it is, to be compared with what QEMU sees.
    pub fn inode(&self) -> Inode {
        self.inode
    }

    /// Its uid and gid in the host's view, to be compared with QEMU's.
    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }
}

impl fmt::Display for HotplugDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pod.path.join(&self.rel).display().fmt(f)
    }
}

/// Where a VM's libvirt listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtEndpoint {
    pub(in crate::host) place: EndpointPlace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::host) enum EndpointPlace {
    /// Beneath a pod's directory.
    Pod { pod: PodDir, rel: PathBuf },
    /// On the host itself.
    Host { path: PathBuf },
}

impl fmt::Display for LibvirtEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            EndpointPlace::Pod { pod, rel } => pod.path.join(rel).display().fmt(f),
            EndpointPlace::Host { path } => path.display().fmt(f),
        }
    }
}

impl LibvirtEndpoint {
    /// The UID of the pod that it is in; `None` on the host itself.
    pub fn pod_uid(&self) -> Option<&str> {
        match &self.place {
            EndpointPlace::Pod { pod, .. } => pod.path.file_name()?.to_str(),
            EndpointPlace::Host { .. } => None,
        }
    }

    /// Opens and verifies the socket. Blocks. To be held only while connecting: a descriptor in a
    /// pod's volume keeps kubelet from unmounting it.
    fn open(&self) -> Result<PinnedSocket> {
        match &self.place {
            EndpointPlace::Pod { pod, rel } => {
                let fd = open_beneath(&open_pod(pod)?, rel, &pod.path, OFlag::empty())?;
                PinnedSocket::new(fd, &pod.path.join(rel))
            }
            EndpointPlace::Host { path } => {
                let how = OpenHow::new()
                    .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
                    .resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS);
                let fd = openat2(nix::fcntl::AT_FDCWD, path, how).map_err(|e| refuse(e, path))?;
                let socket = PinnedSocket::new(fd, path)?;
                if socket.owner != 0 {
                    let why = "the host's libvirt socket must belong to root";
                    return Err(PathError::Unsafe { path: path.clone(), why });
                }
                Ok(socket)
            }
        }
    }
}

/// A socket that was verified and cannot be exchanged while this lives.
#[derive(Debug)]
pub(in crate::host) struct PinnedSocket {
    fd: OwnedFd,
    owner: u32,
}

impl PinnedSocket {
    fn new(fd: OwnedFd, path: &Path) -> Result<Self> {
        let file = File::from(fd);
        let meta = file.metadata()?;
        if !meta.file_type().is_socket() {
            return Err(PathError::Unsafe { path: path.to_owned(), why: "it is not a socket" });
        }
        Ok(Self { fd: file.into(), owner: meta.uid() })
    }
}

/// The door to pods' directories.
#[async_trait]
pub trait PodDirs: Send + Sync {
    /// The directory of a pod below kubelet's root.
    async fn pod(&self, kubelet_root: &Path, uid: &str) -> Result<PodDir>;

    /// A directory beneath it.
    async fn hotplug(&self, pod: &PodDir, path: &Path) -> Result<HotplugDir>;

    /// The directory for the nodes of a VM on the host's own libvirt, in [`HOST_NODES`]; made where it is
    /// missing if `make`.
    async fn host_nodes(&self, vm: &VmId, make: bool) -> Result<HotplugDir>;

    /// Removes that directory where nothing is in it.
    async fn drop_host_nodes(&self, vm: &VmId);

    /// A libvirt socket beneath it.
    async fn socket(&self, pod: &PodDir, path: &Path) -> Result<LibvirtEndpoint>;

    /// The host's own libvirt socket.
    async fn host_socket(&self, path: &Path) -> Result<LibvirtEndpoint>;

    /// Verifies the socket anew and pins it, so that it is this one that is connected to, whatever
    /// the pod does to its path meanwhile. Hold the result only while connecting.
    async fn pin(&self, endpoint: &LibvirtEndpoint) -> Result<Endpoint>;
}

/// The pods' directories of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostPodDirs;

#[async_trait]
impl PodDirs for HostPodDirs {
    async fn pod(&self, kubelet_root: &Path, uid: &str) -> Result<PodDir> {
        check_uid(uid)?;
        let pod = PodDir { path: kubelet_root.join("pods").join(uid) };
        blocking("opening the pod's directory", move || open_pod(&pod).map(|_| pod)).await
    }

    async fn hotplug(&self, pod: &PodDir, path: &Path) -> Result<HotplugDir> {
        plain(path)?;
        let (pod, rel) = (pod.clone(), path.to_owned());
        blocking("opening the hotplug directory", move || find_dir(pod, rel)).await
    }

    async fn host_nodes(&self, vm: &VmId, make: bool) -> Result<HotplugDir> {
        let rel = PathBuf::from(host_dir(vm));
        blocking("opening the directory for the host's nodes", move || {
            host_nodes_in(Path::new(HOST_NODES), rel, make)
        })
        .await
    }

    async fn drop_host_nodes(&self, vm: &VmId) {
        let dir = Path::new(HOST_NODES).join(host_dir(vm));
        let dropped = blocking("removing the directory for the host's nodes", move || {
            std::fs::remove_dir(&dir).map_err(|source| PathError::Io { path: dir, source })
        });
        // An empty directory in a devtmpfs is nobody's trouble.
        if let Err(error) = dropped.await {
            tracing::debug!(%vm, why = %error, "the directory of the VM's nodes stays");
        }
    }

    async fn socket(&self, pod: &PodDir, path: &Path) -> Result<LibvirtEndpoint> {
        plain(path)?;
        let place = EndpointPlace::Pod { pod: pod.clone(), rel: path.to_owned() };
        let endpoint = LibvirtEndpoint { place };
        blocking("opening the libvirt socket", move || endpoint.open().map(|_| endpoint)).await
    }

    async fn host_socket(&self, path: &Path) -> Result<LibvirtEndpoint> {
        if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
            let why = "the host's libvirt socket must be an absolute path without '..'";
            return Err(PathError::Unsafe { path: path.to_owned(), why });
        }
        let endpoint = LibvirtEndpoint { place: EndpointPlace::Host { path: path.to_owned() } };
        blocking("opening the libvirt socket", move || endpoint.open().map(|_| endpoint)).await
    }

    async fn pin(&self, endpoint: &LibvirtEndpoint) -> Result<Endpoint> {
        let endpoint = endpoint.clone();
        blocking("opening the libvirt socket", move || {
            let socket = endpoint.open()?;
            // Root's is a system libvirt, another user's a session one.
            let instance = if socket.owner == 0 { Instance::System } else { Instance::Session };
            Ok(Endpoint::opened(endpoint.to_string(), Arc::new(socket.fd), instance))
        })
        .await
    }
}

/// Where a node of a VM on the host's own libvirt is.
pub fn host_node(vm: &VmId, name: &VolumeName) -> PathBuf {
    Path::new(HOST_NODES).join(host_dir(vm)).join(name.as_str())
}

/// The name of a VM's directory in [`HOST_NODES`]; neither namespace nor name can have a `_`.
pub(in crate::host) fn host_dir(vm: &VmId) -> String {
    format!("{}_{}", vm.namespace(), vm.name())
}

fn host_nodes_in(root: &Path, rel: PathBuf, make: bool) -> Result<HotplugDir> {
    if make {
        for dir in [root.to_owned(), root.join(&rel)] {
            match DirBuilder::new().mode(0o755).create(&dir) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(PathError::Io { path: dir, source });
                }
                _ => {}
            }
        }
    }
    find_dir(PodDir { path: root.to_owned() }, rel)
}

/// A directory beneath a pod's, or what stands for it.
fn find_dir(pod: PodDir, rel: PathBuf) -> Result<HotplugDir> {
    let fd = open_beneath(&open_pod(&pod)?, &rel, &pod.path, OFlag::O_DIRECTORY)?;
    let meta = File::from(fd).metadata()?;
    let inode = Inode { dev: meta.dev(), ino: meta.ino() };
    Ok(HotplugDir { pod, rel, inode, owner: (meta.uid(), meta.gid()) })
}

/// A UID becomes a component of a path, and part of a cgroup's name.
pub(in crate::host) fn check_uid(uid: &str) -> Result<()> {
    let ok = (1..=64).contains(&uid.len())
        && uid.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-');
    if ok { Ok(()) } else { Err(PathError::BadUid(uid.chars().take(128).collect())) }
}

/// Relative, not empty, only plain components. openat2 would refuse the rest too, but not say why.
pub(in crate::host) fn plain(path: &Path) -> Result<()> {
    let ok = path.components().next().is_some()
        && path.components().all(|c| matches!(c, Component::Normal(_)));
    if ok { Ok(()) } else { Err(PathError::NotPlain(path.to_owned())) }
}

/// kubelet's root is the host's own and may be a symlink; from there on nothing may.
fn open_pod(pod: &PodDir) -> Result<OwnedFd> {
    let gone = || PathError::PodGone(pod.path.clone());
    let (Some(uid), Some(pods)) = (pod.path.file_name(), pod.path.parent()) else {
        return Err(gone());
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let pods = nix::fcntl::open(pods, flags, nix::sys::stat::Mode::empty());
    let pods = pods.map_err(|e| pod_gone(refuse(e, &pod.path), &pod.path))?;
    open_beneath(&pods, Path::new(uid), Path::new(""), OFlag::O_DIRECTORY)
        .map_err(|e| pod_gone(e, &pod.path))
}

fn pod_gone(error: PathError, path: &Path) -> PathError {
    match error {
        PathError::Missing(_) => PathError::PodGone(path.to_owned()),
        other => other,
    }
}

/// Opens (O_PATH) what lies beneath `dir` without leaving it and without following any symlink.
fn open_beneath(dir: &OwnedFd, rel: &Path, base: &Path, flags: OFlag) -> Result<OwnedFd> {
    plain(rel)?;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC | flags).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    );
    openat2(dir, rel, how).map_err(|e| refuse(e, &base.join(rel)))
}

fn refuse(errno: Errno, path: &Path) -> PathError {
    let path = path.to_owned();
    match errno {
        Errno::ENOENT => PathError::Missing(path),
        Errno::ELOOP => PathError::Unsafe { path, why: "there is a symlink in it" },
        Errno::EXDEV => PathError::Unsafe { path, why: "it leads out of the pod's directory" },
        Errno::ENOTDIR => {
            PathError::Unsafe { path, why: "there is no directory where one must be" }
        }
        errno => PathError::Io { path, source: errno.into() },
    }
}

/// Opens a hotplug directory for work in it and checks that it is still the one that was found.
pub(in crate::host) fn open_hotplug(dir: &HotplugDir) -> Result<OwnedFd> {
    let fd = open_beneath(&open_pod(&dir.pod)?, &dir.rel, &dir.pod.path, OFlag::O_DIRECTORY)?;
    let file = File::from(fd);
    let meta = file.metadata()?;
    if (Inode { dev: meta.dev(), ino: meta.ino() }) != dir.inode {
        let why = "it is another directory than when the VM was found";
        return Err(PathError::Unsafe { path: dir.pod.path.join(&dir.rel), why });
    }
    Ok(file.into())
}

/// A descriptor as a path of this process, for calls that take no O_PATH descriptor.
pub(in crate::host) fn proc_path(fd: &impl AsRawFd) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

#[cfg(test)]
mod tests;
