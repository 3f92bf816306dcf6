//! The processes of this host.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::super::blocking::blocking;
use super::super::grants::CgroupRef;
use super::super::poddir::Inode;
use super::cgroups::{self, is_gone};
use super::{DirView, Membership, ProcessId, ProcessInfo, Procs};

/// /proc and the cgroup hierarchies as this process sees them.
#[derive(Debug, Clone)]
pub struct HostProcs {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    proc: PathBuf,
    roots: Vec<Membership>,
}

impl HostProcs {
    /// With procfs mounted at `proc` (`/proc`, but for a container that has the host's elsewhere).
    /// It must show the PID namespace that this process is in.
    pub fn new(proc: impl Into<PathBuf>) -> Self {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let shared = Shared { proc: proc.into(), roots: cgroups::roots(&mountinfo) };
        Self { shared: Arc::new(shared) }
    }

    /// The mount namespace of a process, if that still runs. Blocks.
    pub(in crate::host) fn mount_namespace(&self, id: ProcessId) -> io::Result<OwnedFd> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let held = self.shared.hold(id)?.ok_or_else(gone)?;
        let namespace = File::open(self.shared.dir(id.pid).join("ns/mnt"))?;
        if has_ended(&held)? {
            return Err(gone());
        }
        Ok(namespace.into())
    }

    async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Shared) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let shared = Arc::clone(&self.shared);
        blocking(what, move || work(&shared)).await
    }
}

#[async_trait]
impl Procs for HostProcs {
    async fn pod_cgroups(&self, uid: &str) -> io::Result<Vec<CgroupRef>> {
        let uid = uid.to_owned();
        self.run("looking for the pod's cgroup", move |s| {
            let mut found = Vec::new();
            for root in &s.roots {
                if let Some(path) = cgroups::find_pod(&root.dir, &uid)? {
                    found.push(cgroups::cgroup(&path)?);
                }
            }
            Ok(found)
        })
        .await
    }

    async fn cgroup(&self, path: &Path) -> io::Result<CgroupRef> {
        let path = path.to_owned();
        self.run("looking at a cgroup", move |_| cgroups::cgroup(&path)).await
    }

    async fn members(&self, cgroup: &CgroupRef) -> io::Result<Vec<u32>> {
        let cgroup = cgroup.clone();
        self.run("listing a cgroup's processes", move |_| cgroups::members(&cgroup)).await
    }

    async fn inspect(&self, pid: u32) -> io::Result<Option<ProcessInfo>> {
        self.run("looking at a process", move |s| s.inspect(pid)).await
    }

    async fn is_alive(&self, id: ProcessId) -> io::Result<bool> {
        self.run("looking at a process", move |s| Ok(s.hold(id)?.is_some())).await
    }

    async fn sees(&self, id: ProcessId, dir: &Path) -> io::Result<DirView> {
        let dir = dir.to_owned();
        self.run("looking at a directory of a process", move |s| s.sees(id, &dir)).await
    }

    async fn own(&self) -> io::Result<Vec<Membership>> {
        self.run("reading our own cgroup", move |s| {
            let lines = std::fs::read_to_string(s.proc.join("self/cgroup"))?;
            Ok(cgroups::memberships(&lines, &s.roots))
        })
        .await
    }

    fn roots(&self) -> Vec<Membership> {
        self.shared.roots.clone()
    }
}

impl Shared {
    fn dir(&self, pid: u32) -> PathBuf {
        self.proc.join(pid.to_string())
    }

    /// Pins the process by pidfd first, so that all that is read before the pidfd tells of its end
    /// is of that one process, whatever becomes of the number later.
    fn inspect(&self, pid: u32) -> io::Result<Option<ProcessInfo>> {
        let Some(fd) = pidfd(pid)? else { return Ok(None) };
        let read = self.read(pid);
        if has_ended(&fd)? {
            return Ok(None);
        }
        match read {
            Ok(info) => Ok(Some(info)),
            // A zombie has no program and no mounts any more, and its pidfd may be a moment late.
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn read(&self, pid: u32) -> io::Result<ProcessInfo> {
        let dir = self.dir(pid);
        let start = self.start(pid)?;
        let status = std::fs::read_to_string(dir.join("status"))?;
        let malformed = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let uid = last_id(&status, "Uid:").ok_or_else(|| malformed("no Uid in status"))?;
        let gid = last_id(&status, "Gid:").ok_or_else(|| malformed("no Gid in status"))?;
        let args = std::fs::read(dir.join("cmdline"))?;
        let args = args.strip_suffix(b"\0").unwrap_or(&args);
        Ok(ProcessInfo {
            id: ProcessId { pid, start },
            exe: std::fs::read_link(dir.join("exe"))?,
            args: args.split(|c| *c == 0).map(|a| String::from_utf8_lossy(a).into()).collect(),
            uid,
            gid,
            cgroups: cgroups::memberships(
                &std::fs::read_to_string(dir.join("cgroup"))?,
                &self.roots,
            ),
        })
    }

    fn start(&self, pid: u32) -> io::Result<u64> {
        let stat = std::fs::read_to_string(self.dir(pid).join("stat"))?;
        start_time(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed stat"))
    }

    /// A pidfd of that very process; `None` when it is gone.
    fn hold(&self, id: ProcessId) -> io::Result<Option<OwnedFd>> {
        let Some(fd) = pidfd(id.pid)? else { return Ok(None) };
        match self.start(id.pid) {
            Ok(start) if start == id.start && !has_ended(&fd)? => Ok(Some(fd)),
            Ok(_) => Ok(None),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The process's root is opened by its magic link, which leads into its mount namespace; from
    /// there its own symlinks are followed as it would, but never out of that root.
    fn sees(&self, id: ProcessId, dir: &Path) -> io::Result<DirView> {
        let gone = || io::Error::from_raw_os_error(libc::ESRCH);
        let held = self.hold(id)?.ok_or_else(gone)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat2(AT_FDCWD, &self.dir(id.pid).join("root"), OpenHow::new().flags(flags))?;
        let how = OpenHow::new()
            .flags(flags)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let seen = File::from(openat2(&root, dir, how)?);
        if has_ended(&held)? {
            return Err(gone());
        }
        let meta = seen.metadata()?;
        Ok(DirView {
            inode: Inode { dev: meta.dev(), ino: meta.ino() },
            // statfs(2) on a path reports the flags of the mount by which it was reached.
            nodev: fstatvfs(&seen)?.flags().contains(FsFlags::ST_NODEV),
            uid: meta.uid(),
            gid: meta.gid(),
        })
    }
}

/// `None` when there is no such process.
fn pidfd(pid: u32) -> io::Result<Option<OwnedFd>> {
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: the call takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        // EINVAL: the number is of a thread, or too large to be one.
        return match error.raw_os_error() {
            Some(libc::ESRCH | libc::EINVAL) => Ok(None),
            _ => Err(error),
        };
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the call returned a new descriptor (close-on-exec) that nobody else owns.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// A pidfd becomes readable when its process ends.
fn has_ended(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? != 0)
}

/// The last of the four ids (real, effective, saved, file system) in a line of /proc/PID/status. The
/// last is the one that opens files.
pub(super) fn last_id(status: &str, key: &str) -> Option<u32> {
    status.lines().find_map(|l| l.strip_prefix(key))?.split_whitespace().nth(3)?.parse().ok()
}

/// Field 22 of /proc/PID/stat. Field 2, the command, is in parentheses and may itself hold spaces
/// and parentheses.
pub(super) fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
