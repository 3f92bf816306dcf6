//! Finding a VM: its libvirt, its hotplug directory, its QEMU and that one's cgroup.
//!
//! ```text
//! pod UID -> kubelet's directory -> libvirt socket                        (endpoint)
//!         -> hotplug directory, as the host sees it
//!         -> the pod's cgroup -> processes in it -> the QEMU of the domain (discover)
//!              -> its container's cgroup        : the grant's key
//!              -> its user, seen from the host  : the node's owner
//!              -> its view of the directory     : the same one, and not nodev
//! ```
//!
//! Nothing that the pod says is believed. QEMU is not found by the peer of libvirt's socket (with
//! socket activation that is systemd, and granting to systemd's cgroup would grant to everybody) nor
//! by a pid file (a number of the pod's own PID namespace), but among the members of the pod's
//! cgroup as the host counts them. A candidate is held by pidfd and start time while it is looked
//! at; a process that a hostile pod dresses up as QEMU gains it nothing, since it can only be one of
//! that pod's own.

mod process;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::cgroup::{CgroupRef, Hierarchy};
use crate::devnode::{HotplugDir, NodeOwner, path_reason};
use crate::host::poddir::{LibvirtEndpoint, PathError, PodDir};
use crate::host::pods::PodDoors;
use crate::host::procs::{DirView, ProcessId, ProcessInfo};
use crate::reason::Reason;
use crate::spec::VmPlace;
use crate::types::VmId;
pub use process::Wanted;

/// kubelet's root directory unless configured.
pub const KUBELET_ROOT: &str = "/var/lib/kubelet";
/// The hotplug directory beneath the pod's unless registered: an emptyDir volume of KubeVirt's name.
pub const HOTPLUG_DIR: &str = "volumes/kubernetes.io~empty-dir/hotplug-disks";
/// The same in the pod.
pub const HOTPLUG_DIR_IN_POD: &str = "/var/run/kubevirt/hotplug-disks";
/// libvirt's socket beneath the pod's directory unless registered.
pub const POD_SOCKET: &str = "volumes/kubernetes.io~empty-dir/libvirt-runtime/libvirt-sock";
/// libvirt's socket on a plain host unless registered.
pub const HOST_SOCKET: &str = "/run/libvirt/libvirt-sock";

/// What does not differ between VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// kubelet's root directory, as this process sees it.
    pub kubelet_root: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self { kubelet_root: KUBELET_ROOT.into() }
    }
}

/// Where a VM is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its libvirt.
    pub libvirt: LibvirtEndpoint,
    /// Its pod; `None` on a plain libvirt host, where libvirt itself makes the node and allows it.
    pub pod: Option<PodPlace>,
}

/// What is needed to give a pod's QEMU a device. Good for as long as that QEMU runs
/// ([`PodPlace::is_current`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPlace {
    /// Where nodes are made.
    pub hotplug: HotplugDir,
    /// The same directory as QEMU sees it: what goes into the disk's XML, with the node's name.
    pub dir_in_pod: PathBuf,
    /// The container's cgroup, to which devices are granted.
    pub cgroup: CgroupRef,
    /// Whose the nodes must be.
    pub owner: NodeOwner,
    /// The process that all this was found by: QEMU, or before there is one, libvirt's daemon.
    pub by: ProcessId,
}

impl PodPlace {
    /// Whether the process that this was found by still runs. When it does not, nothing here may be
    /// relied on.
    pub async fn is_current(&self, doors: &PodDoors) -> Result<bool> {
        doors.procs.is_alive(self.by).await.map_err(procs("looking for QEMU"))
    }
}

/// A VM could not be found, or not be trusted.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// The pod's directory.
    #[error("the VM's pod cannot be used")]
    Pod(#[source] PathError),
    /// libvirt's socket.
    #[error("the VM's libvirt socket cannot be used")]
    Socket(#[source] PathError),
    /// The hotplug directory.
    #[error("the VM's hotplug directory cannot be used")]
    Hotplug(#[source] PathError),
    /// The hotplug directory's path in the pod.
    #[error("hotplug directory {} in the pod must be absolute, without '..'", .0.display())]
    DirInPod(PathBuf),
    /// kubelet made no cgroup for the pod, or not where this process sees it.
    #[error("no cgroup of pod {uid} is to be seen; lunplugd needs the host's cgroups")]
    NoPodCgroup {
        /// The pod's UID.
        uid: String,
    },
    /// No process in the pod's cgroup is the one that was looked for.
    #[error("{wanted} is not among the {processes} processes of {scope}{}",
        if *.hidden { "; some of them are not to be seen: lunplugd needs the host's PID namespace" } else { "" })]
    NotFound {
        /// What was looked for.
        wanted: Wanted,
        /// Where it was looked for.
        scope: CgroupRef,
        /// How many processes are there.
        processes: usize,
        /// Some are of a PID namespace that this process does not see.
        hidden: bool,
    },
    /// Several processes claim to be it and differ in user or cgroup.
    #[error("processes {first} and {second} both claim to be {wanted}")]
    Ambiguous {
        /// What was looked for.
        wanted: Wanted,
        /// One of them.
        first: u32,
        /// Another.
        second: u32,
    },
    /// The cgroup must not be granted anything.
    #[error("cgroup {} may not be granted devices: {why}", .path.display())]
    Cgroup {
        /// The cgroup's directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What QEMU sees there is another directory.
    #[error("{} in the pod is not {dir} on the host", .dir_in_pod.display())]
    AnotherDir {
        /// As the host sees it.
        dir: HotplugDir,
        /// As registered for the pod.
        dir_in_pod: PathBuf,
    },
    /// QEMU sees no such directory.
    #[error("QEMU sees no directory {}", .dir_in_pod.display())]
    NotSeen {
        /// As registered for the pod.
        dir_in_pod: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Device nodes cannot be opened there.
    #[error("{} is on a nodev mount in the pod", .dir_in_pod.display())]
    Nodev {
        /// As registered for the pod.
        dir_in_pod: PathBuf,
    },
    /// The mount in the pod does not map QEMU's user.
    #[error("the mount of {} in the pod does not map QEMU's uid {uid}", .dir_in_pod.display())]
    Unmapped {
        /// As registered for the pod.
        dir_in_pod: PathBuf,
        /// QEMU's user, in the host's view.
        uid: u32,
    },
    /// QEMU ended, or moved, while it was looked at.
    #[error("QEMU process {pid} ended or moved while it was looked at")]
    Vanished {
        /// Its number.
        pid: u32,
    },
    /// /proc or a cgroup could not be read.
    #[error("{what} failed")]
    Procs {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl DiscoverError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Pod(e) => path_reason(e, Reason::HotplugDirUnsafe),
            Self::Socket(PathError::Missing(_)) => Reason::LibvirtUnreachable,
            Self::Socket(e) => path_reason(e, Reason::SocketUntrusted),
            Self::Hotplug(e) => path_reason(e, Reason::HotplugDirUnsafe),
            Self::DirInPod(_) => Reason::PathNotAllowed,
            Self::NoPodCgroup { .. }
            | Self::NotFound { .. }
            | Self::Ambiguous { .. }
            | Self::Vanished { .. } => Reason::QemuNotFound,
            Self::Cgroup { .. } => Reason::CgroupRefused,
            Self::AnotherDir { .. } | Self::NotSeen { .. } | Self::Unmapped { .. } => {
                Reason::HotplugDirUnsafe
            }
            Self::Nodev { .. } => Reason::NodevMount,
            Self::Procs { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
                Reason::DeadlineExceeded
            }
            Self::Procs { .. } => Reason::QemuNotFound,
        }
    }
}

type Result<T> = std::result::Result<T, DiscoverError>;

fn procs(what: &'static str) -> impl Fn(io::Error) -> DiscoverError {
    move |source| DiscoverError::Procs { what, source }
}

/// Finds and verifies the libvirt socket: all that is needed before the VM runs.
pub async fn endpoint(
    doors: &PodDoors,
    settings: &Settings,
    place: &VmPlace,
) -> Result<LibvirtEndpoint> {
    match place {
        VmPlace::Host { libvirt_socket } => {
            let path = libvirt_socket.as_deref().unwrap_or(Path::new(HOST_SOCKET));
            doors.dirs.host_socket(path).await.map_err(DiscoverError::Socket)
        }
        VmPlace::Pod { uid, libvirt_socket, .. } => {
            let pod = pod_dir(doors, settings, uid).await?;
            let path = libvirt_socket.as_deref().unwrap_or(Path::new(POD_SOCKET));
            doors.dirs.socket(&pod, path).await.map_err(DiscoverError::Socket)
        }
    }
}

/// Finds the directory in which a VM's nodes are, as the host sees it. Enough to remove nodes when the VM has
/// ended; to make one in a pod, [`discover`] has to prove more.
pub async fn node_dir(
    doors: &PodDoors,
    settings: &Settings,
    vm: &VmId,
    place: &VmPlace,
) -> Result<HotplugDir> {
    match place {
        VmPlace::Host { .. } => {
            doors.dirs.host_nodes(vm, false).await.map_err(DiscoverError::Hotplug)
        }
        VmPlace::Pod { uid, hotplug_dir, .. } => {
            in_pod(doors, settings, uid, hotplug_dir.as_deref()).await
        }
    }
}

async fn in_pod(
    doors: &PodDoors,
    settings: &Settings,
    uid: &str,
    hotplug_dir: Option<&Path>,
) -> Result<HotplugDir> {
    let pod = pod_dir(doors, settings, uid).await?;
    let rel = hotplug_dir.unwrap_or(Path::new(HOTPLUG_DIR));
    doors.dirs.hotplug(&pod, rel).await.map_err(DiscoverError::Hotplug)
}

/// How many processes a VM's pod has, as the host counts them. That its directory is gone does not say
/// that its QEMU is.
pub async fn processes(doors: &PodDoors, place: &VmPlace) -> Result<usize> {
    let VmPlace::Pod { uid, .. } = place else { return Ok(0) };
    let failed = procs("counting the pod's processes");
    let mut count = 0;
    for cgroup in doors.procs.pod_cgroups(uid).await.map_err(&failed)? {
        count += doors.procs.members(&cgroup).await.map_err(&failed)?.len();
    }
    Ok(count)
}

/// Finds all of a VM by its `wanted` process.
///
/// Before there is a QEMU, its place is that of libvirt's daemon, which will start it: in the same
/// container, seeing the same directories. As whom QEMU will run is told by the daemon's own user, or where that
/// is root by the owner of the hotplug directory; once QEMU runs, it is found by itself.
pub async fn discover(
    doors: &PodDoors,
    settings: &Settings,
    place: &VmPlace,
    wanted: &Wanted,
) -> Result<Place> {
    let libvirt = endpoint(doors, settings, place).await?;
    let VmPlace::Pod { uid, cgroup, hotplug_dir, hotplug_dir_in_pod, .. } = place else {
        return Ok(Place { libvirt, pod: None });
    };
    let hotplug = in_pod(doors, settings, uid, hotplug_dir.as_deref()).await?;
    let dir_in_pod =
        hotplug_dir_in_pod.clone().unwrap_or_else(|| PathBuf::from(HOTPLUG_DIR_IN_POD));
    if !dir_in_pod.is_absolute() || dir_in_pod.components().any(|c| c == Component::ParentDir) {
        return Err(DiscoverError::DirInPod(dir_in_pod));
    }
    let found = match cgroup {
        Some(path) => process::find_in_container(doors, path, wanted).await?,
        None => process::find_in_pod(doors, uid, wanted).await?,
    };
    let owner = node_owner(doors, &found.process, wanted, &hotplug, &dir_in_pod).await?;
    // Had it ended and its number been given away in between, or had it been moved, then something
    // else was looked at than what was found.
    let pid = found.process.id.pid;
    let again = doors.procs.inspect(pid).await.map_err(procs("looking at QEMU"))?;
    if again.as_ref() != Some(&found.process) {
        return Err(DiscoverError::Vanished { pid });
    }
    let (cgroup, by) = (found.cgroup, found.process.id);
    Ok(Place { libvirt, pod: Some(PodPlace { hotplug, dir_in_pod, cgroup, owner, by }) })
}

/// Whether a QEMU that runs `domain` is among a pod's processes: what is left to ask when its libvirt
/// does not answer.
pub async fn runs(doors: &PodDoors, uid: &str, domain: &str) -> Result<bool> {
    match process::find_in_pod(doors, uid, &Wanted::Qemu(domain.into())).await {
        Ok(_) => Ok(true),
        Err(DiscoverError::NoPodCgroup { .. } | DiscoverError::NotFound { hidden: false, .. }) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

async fn pod_dir(doors: &PodDoors, settings: &Settings, uid: &str) -> Result<PodDir> {
    doors.dirs.pod(&settings.kubelet_root, uid).await.map_err(DiscoverError::Pod)
}

/// Proves that QEMU sees that very directory and can open nodes in it, and tells whose they must be.
async fn node_owner(
    doors: &PodDoors,
    process: &ProcessInfo,
    wanted: &Wanted,
    hotplug: &HotplugDir,
    dir_in_pod: &Path,
) -> Result<NodeOwner> {
    let dir_in_pod = dir_in_pod.to_owned();
    let view = match doors.procs.sees(process.id, &dir_in_pod).await {
        Ok(view) => view,
        Err(source) if source.raw_os_error() == Some(nix::libc::ESRCH) => {
            return Err(DiscoverError::Vanished { pid: process.id.pid });
        }
        Err(source) => return Err(DiscoverError::NotSeen { dir_in_pod, source }),
    };
    if view.inode != hotplug.inode() {
        return Err(DiscoverError::AnotherDir { dir: hotplug.clone(), dir_in_pod });
    }
    if view.nodev {
        return Err(DiscoverError::Nodev { dir_in_pod });
    }
    let (uid, gid) = match (wanted, process.uid) {
        // A daemon of root's runs QEMU as another user: as the one whose directory it is.
        (Wanted::Libvirt, 0) => (view.uid, view.gid),
        (_, uid) => (uid, process.gid),
    };
    owner_on_host((uid, gid), hotplug.owner(), view)
        .ok_or(DiscoverError::Unmapped { dir_in_pod, uid })
}

/// QEMU's user and group as the host must write them into the directory, so that QEMU finds itself
/// to be the owner. `/proc` gives them in the host's user namespace already, whatever the pod's. An
/// idmapped mount in the pod shifts what is stored; by how much shows in the directory's own owner,
/// seen from both sides. `None` when the shift leads nowhere.
fn owner_on_host(
    (uid, gid): (u32, u32),
    on_host: (u32, u32),
    in_pod: DirView,
) -> Option<NodeOwner> {
    /// What the kernel shows for an id that a mount does not map.
    const OVERFLOW: u32 = 65534;
    let shift = |id: u32, host: u32, pod: u32| {
        if host != pod && (pod == OVERFLOW || host == OVERFLOW) {
            return None;
        }
        u32::try_from(i64::from(id) - (i64::from(pod) - i64::from(host))).ok()
    };
    Some(NodeOwner {
        uid: shift(uid, on_host.0, in_pod.uid)?,
        gid: shift(gid, on_host.1, in_pod.gid)?,
    })
}

/// Whether a cgroup may be granted devices at all, whoever is in it.
async fn check_cgroup(doors: &PodDoors, path: &Path) -> Result<()> {
    let refuse = |why| Err(DiscoverError::Cgroup { path: path.to_owned(), why });
    if doors.procs.roots().iter().any(|root| root.dir == path || root.dir.starts_with(path)) {
        return refuse("it is the root");
    }
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if name.ends_with(".slice") {
        return refuse("it is a slice, which others share");
    }
    if name == "init.scope" {
        return refuse("it is the init system's");
    }
    let own = doors.procs.own().await.map_err(procs("reading our own cgroup"))?;
    if own.iter().any(|own| own.dir.starts_with(path)) {
        return refuse("lunplugd itself is in it");
    }
    Ok(())
}

/// The container's cgroup directory: what a grant is keyed by.
///
/// On v2 it is the first level below the pod's: a grant there reaches what is nested in the container.
/// v1 has no such inheritance for groups that exist already, so there it is QEMU's own group (its
/// parents get what they lack on the way).
fn container_of(scope: &CgroupRef, member: &Path) -> Option<PathBuf> {
    let mut below = member.strip_prefix(&scope.path).ok()?.components();
    let first = below.next()?;
    Some(match scope.hierarchy {
        Hierarchy::V2 => scope.path.join(first),
        Hierarchy::V1 => member.to_owned(),
    })
}
