//! Cgroup directories: the roots, pods in kubelet's layout, members.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::libc;
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, fstatfs};

use super::super::grants::{CgroupRef, Hierarchy};
use super::super::mounts::{self, Mount};
use super::Membership;

/// How deep kubelet's cgroups are looked for: the usual layouts have them at 3, a node that is
/// itself a container some levels more.
const SEARCH_DEPTH: usize = 10;

/// The hierarchies that decide over devices, v1's first: where it is in use, it is what decides.
pub(super) fn roots(mountinfo: &str) -> Vec<Membership> {
    let mounts = mounts::parse(mountinfo);
    let find = |hierarchy, fits: fn(&Mount) -> bool| {
        let mount = mounts.iter().find(|m| fits(m))?;
        Some(Membership { hierarchy, dir: mount.mount_point.clone() })
    };
    let v1 = find(Hierarchy::V1, |m| {
        m.fs_type == "cgroup" && m.super_options.iter().any(|o| o == "devices")
    });
    let v2 = find(Hierarchy::V2, |m| m.fs_type == "cgroup2");
    v1.into_iter().chain(v2).collect()
}

/// The memberships in /proc/PID/cgroup: lines `ID:CONTROLLERS:PATH`, v2's with an empty middle. The
/// path is relative to the reader's cgroup namespace; what lies outside of that starts with `/..`.
pub(super) fn memberships(lines: &str, roots: &[Membership]) -> Vec<Membership> {
    lines
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let hierarchy = match controllers {
                "" => Hierarchy::V2,
                list if list.split(',').any(|c| c == "devices") => Hierarchy::V1,
                _ => return None,
            };
            let relative = Path::new(path).strip_prefix("/").ok()?;
            if relative.components().any(|c| c == Component::ParentDir) {
                return None;
            }
            let root = roots.iter().find(|r| r.hierarchy == hierarchy)?;
            let dir = root.dir.components().chain(relative.components()).collect();
            Some(Membership { hierarchy, dir })
        })
        .collect()
}

/// Whether a directory's name is that of the pod: `podUID` (cgroupfs driver), or a slice that ends
/// with `-podUID.slice`, the UID's dashes as underscores (systemd driver).
pub(super) fn is_pod(name: &str, uid: &str) -> bool {
    let slice = uid.replace('-', "_");
    let own =
        |name: &str| name.strip_prefix("pod").is_some_and(|rest| rest == uid || rest == slice);
    match name.strip_suffix(".slice") {
        Some(stem) => own(stem.rsplit('-').next().unwrap_or(stem)),
        None => own(name),
    }
}

/// The pod's directory beneath one root: of the pod's name, and below a directory of kubelet's
/// (`kubepods`, `kubepods.slice`, `kubelet-kubepods.slice`...). Nothing is looked for inside of other
/// pods: what a container makes there is its own.
pub(super) fn find_pod(root: &Path, uid: &str) -> io::Result<Option<PathBuf>> {
    let mut queue = VecDeque::from([(root.to_owned(), 0, false)]);
    while let Some((dir, depth, in_kubepods)) = queue.pop_front() {
        for name in child_dirs(&dir)? {
            let path = dir.join(&name);
            if in_kubepods && is_pod(&name, uid) {
                return Ok(Some(path));
            }
            let in_kubepods = in_kubepods || name.contains("kubepods");
            let is_other_pod = in_kubepods && looks_like_pod(&name);
            if depth < SEARCH_DEPTH && !is_other_pod {
                queue.push_back((path, depth + 1, in_kubepods));
            }
        }
    }
    Ok(None)
}

/// Whether a name below kubepods is that of any pod (and not of a QoS class).
fn looks_like_pod(name: &str) -> bool {
    let stem = name.strip_suffix(".slice").unwrap_or(name);
    stem.rsplit('-').next().is_some_and(|s| s.starts_with("pod")) || stem.starts_with("pod")
}

fn child_dirs(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if is_gone(&e) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
}

/// The cgroup at a path.
pub(super) fn cgroup(path: &Path) -> io::Result<CgroupRef> {
    let invalid = |why: &str| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {why}", path.display()))
    };
    if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
        return Err(invalid("not an absolute path without '..'"));
    }
    let dir = File::open(path)?;
    let meta = dir.metadata()?;
    let hierarchy = match fstatfs(&dir)?.filesystem_type() {
        CGROUP2_SUPER_MAGIC => Hierarchy::V2,
        CGROUP_SUPER_MAGIC if path.join("devices.list").exists() => Hierarchy::V1,
        _ => return Err(invalid("not a cgroup that has device rules")),
    };
    // Symlinks (/sys/fs/cgroup may have them) are resolved, so that paths can be compared.
    Ok(CgroupRef { path: path.canonicalize()?, hierarchy, id: meta.ino() })
}

/// The processes in a cgroup and all below it.
pub(super) fn members(cgroup: &CgroupRef) -> io::Result<Vec<u32>> {
    if std::fs::metadata(&cgroup.path)?.ino() != cgroup.id {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    let mut pids = Vec::new();
    let mut dirs = vec![cgroup.path.clone()];
    while let Some(dir) = dirs.pop() {
        match std::fs::read_to_string(dir.join("cgroup.procs")) {
            Ok(text) => pids.extend(text.lines().filter_map(|l| l.trim().parse::<u32>().ok())),
            // A threaded cgroup has no list of processes; its domain has.
            Err(e) if is_gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
        dirs.extend(child_dirs(&dir)?.into_iter().map(|name| dir.join(name)));
    }
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// A cgroup or process that ended while it was looked at.
pub(in crate::host) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ESRCH | libc::ENOTDIR))
}
