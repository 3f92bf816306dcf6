//! A VM's process among the members of a cgroup.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{DiscoverError, Result, check_cgroup, container_of, procs};
use crate::cgroup::{CgroupRef, Hierarchy};
use crate::host::pods::PodDoors;
use crate::host::procs::ProcessInfo;

/// The process by which a VM is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The QEMU that runs this domain.
    Qemu(String),
    /// The libvirt daemon that will start it.
    Libvirt,
}

impl Wanted {
    fn is(&self, process: &ProcessInfo) -> bool {
        match self {
            Self::Qemu(domain) => is_qemu(process, domain),
            Self::Libvirt => is_libvirt(process),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Qemu(domain) => write!(f, "a QEMU that runs domain {domain:?}"),
            Self::Libvirt => write!(f, "a libvirt daemon ({})", DAEMONS.join(" or ")),
        }
    }
}

/// libvirt's daemons that start QEMU: the monolithic and the modular one.
const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];

/// A process and the cgroup of its container.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) process: ProcessInfo,
    pub(super) cgroup: CgroupRef,
}

/// In the pod's cgroup, found in kubelet's layout: only in a strict descendant of that is QEMU in a
/// container.
pub(super) async fn find_in_pod(doors: &PodDoors, uid: &str, wanted: &Wanted) -> Result<Found> {
    let scopes =
        doors.procs.pod_cgroups(uid).await.map_err(procs("looking for the pod's cgroup"))?;
    let mut last = DiscoverError::NoPodCgroup { uid: uid.into() };
    // v1's devices first: where both hierarchies have the pod, v1's rules are those in force.
    for scope in scopes {
        match find(doors, &scope, wanted, |member| container_of(&scope, member)).await {
            Err(e @ DiscoverError::NotFound { .. }) => last = e,
            other => return other,
        }
    }
    Err(last)
}

/// In a cgroup that was registered as the container's.
pub(super) async fn find_in_container(
    doors: &PodDoors,
    path: &Path,
    wanted: &Wanted,
) -> Result<Found> {
    let scope = doors.procs.cgroup(path).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidInput | std::io::ErrorKind::NotFound => DiscoverError::Cgroup {
            path: path.to_owned(),
            why: "there is no cgroup with device rules at that absolute path",
        },
        _ => procs("looking at the container's cgroup")(e),
    })?;
    check_cgroup(doors, &scope.path).await?;
    find(doors, &scope, wanted, |member| match scope.hierarchy {
        Hierarchy::V2 => member.starts_with(&scope.path).then(|| scope.path.clone()),
        Hierarchy::V1 => member.starts_with(&scope.path).then(|| member.to_owned()),
    })
    .await
}

/// The one that is wanted below `scope`. `key` gives the container's cgroup for a member's, and
/// `None` where the member is not in a container of that scope.
async fn find(
    doors: &PodDoors,
    scope: &CgroupRef,
    wanted: &Wanted,
    key: impl Fn(&Path) -> Option<PathBuf>,
) -> Result<Found> {
    let pids = doors.procs.members(scope).await.map_err(procs("listing the pod's processes"))?;
    let mut found: Option<(ProcessInfo, PathBuf)> = None;
    let mut outside = None;
    for &pid in &pids {
        // One that ended since the list was read is not it.
        let info = doors.procs.inspect(pid).await.map_err(procs("looking at a process"))?;
        let Some(process) = info.filter(|p| wanted.is(p)) else { continue };
        // The number may by now be another process's: what counts is that this one is in there.
        let member = process.cgroups.iter().find(|m| m.hierarchy == scope.hierarchy);
        let Some(member) = member else { continue };
        let Some(path) = key(&member.dir) else {
            outside = Some(member.dir.clone());
            continue;
        };
        match &found {
            Some((first, at))
                if (first.uid, first.gid, at) != (process.uid, process.gid, &path) =>
            {
                return Err(DiscoverError::Ambiguous {
                    wanted: wanted.clone(),
                    first: first.id.pid,
                    second: pid,
                });
            }
            Some(_) => {}
            None => found = Some((process, path)),
        }
    }
    match (found, outside) {
        (Some((process, path)), _) => {
            check_cgroup(doors, &path).await?;
            let cgroup = doors.procs.cgroup(&path).await;
            let cgroup = cgroup.map_err(procs("looking at the container's cgroup"))?;
            Ok(Found { process, cgroup })
        }
        (None, Some(path)) => Err(DiscoverError::Cgroup {
            path,
            why: "the VM's process is not in a container's cgroup below the pod's",
        }),
        (None, None) => Err(DiscoverError::NotFound {
            wanted: wanted.clone(),
            scope: scope.clone(),
            processes: pids.len(),
            hidden: pids.contains(&0),
        }),
    }
}

/// Whether a process is a libvirt daemon, by its program.
fn is_libvirt(process: &ProcessInfo) -> bool {
    process.exe.file_name().is_some_and(|name| DAEMONS.iter().any(|daemon| name == *daemon))
}

/// Whether a process is a QEMU that runs that domain, by its program and libvirt's `-name`.
pub(super) fn is_qemu(process: &ProcessInfo, domain: &str) -> bool {
    let exe = process.exe.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let mut args = process.args.iter();
    let name = args.by_ref().find(|a| *a == "-name").and_then(|_| args.next());
    exe.starts_with("qemu-") && name.is_some_and(|n| guest_name(n).as_deref() == Some(domain))
}

/// The name in QEMU's option `guest=NAME,debug-threads=on`; a comma in a value is written twice, and
/// the key of the first may be left out.
pub(super) fn guest_name(option: &str) -> Option<String> {
    let mut values = vec![String::new()];
    let mut chars = option.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.peek() != Some(&',') {
            values.push(String::new());
            continue;
        }
        if c == ',' {
            chars.next();
        }
        values.last_mut()?.push(c);
    }
    let keyed = values.iter().find_map(|v| v.strip_prefix("guest="));
    let bare = values.first().filter(|v| !v.contains('=')).map(String::as_str);
    keyed.or(bare).map(str::to_owned)
}
