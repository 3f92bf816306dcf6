//! What this process is and what the system has, as asked at start.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, openat2};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access, geteuid};

use super::place::{Place, Places};
use crate::doctor::Service;
use crate::preflight::{Facts, INITIATOR_NAME};

/// The inode of the host's PID namespace: the same on every Linux since 3.8 (`PROC_PID_INIT_INO`,
/// include/linux/proc_ns.h). `/proc/1` cannot tell: in a namespace of its own it is the
/// container's.
const HOST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// The kernel's release, as `uname -r` prints it.
pub fn kernel() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The name by which this node logs in to iSCSI targets.
pub fn initiator_name() -> Option<String> {
    let text = initiator_file(&iscsi_place())?;
    text.lines().find_map(|l| l.trim().strip_prefix("InitiatorName=")).map(|n| n.trim().to_owned())
}

/// Where open-iscsi is: with whoever serves as iscsid. Whatever keeps that from being known is told when
/// it is needed.
fn iscsi_place() -> Place {
    let places = Places::default();
    places.of(Service::Iscsid).unwrap_or_else(|_| places.host())
}

fn initiator_file(place: &Place) -> Option<String> {
    match place {
        Place::Ours => fs::read_to_string(INITIATOR_NAME).ok(),
        Place::Other(root) => root.text(INITIATOR_NAME).ok(),
    }
}

/// Where programs are looked for when PATH does not have them: services often run without sbin.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// Whether a program can be found beneath our own root.
fn has_program(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut directories = path.split(':').chain(SBIN.split(':')).filter(|d| !d.is_empty());
    directories.any(|directory| {
        let program: PathBuf = [directory, name].iter().collect();
        program.is_file() && access(&program, AccessFlags::X_OK).is_ok()
    })
}

/// The system this process runs on.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Facts for System {
    fn euid(&self) -> u32 {
        geteuid().as_raw()
    }

    fn has_iscsiadm(&self) -> bool {
        match iscsi_place() {
            Place::Ours => has_program("iscsiadm"),
            Place::Other(root) => root.program("iscsiadm").is_some(),
        }
    }

    fn has_initiator_name(&self) -> bool {
        initiator_file(&iscsi_place()).is_some()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn text(&self, path: &Path) -> Option<String> {
        fs::read_to_string(path).ok()
    }

    fn writable_dir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o755).create(path)?;
        Ok(access(path, AccessFlags::W_OK | AccessFlags::X_OK)?)
    }

    fn writable_fs(&self, path: &Path) -> bool {
        statvfs(path).is_ok_and(|fs| !fs.flags().contains(FsFlags::ST_RDONLY))
    }

    fn has_openat2(&self) -> bool {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC);
        openat2(nix::fcntl::AT_FDCWD, "/", how).is_ok()
    }

    fn in_host_pid_namespace(&self) -> bool {
        fs::metadata("/proc/self/ns/pid").is_ok_and(|ns| ns.ino() == HOST_PID_NAMESPACE)
    }

    fn in_net_namespace_of_pid_1(&self) -> bool {
        let inode = |path| fs::metadata(path).map(|ns| ns.ino()).ok();
        inode("/proc/1/ns/net").is_some_and(|host| inode("/proc/self/ns/net") == Some(host))
    }
}

/// This host's name.
pub fn hostname() -> String {
    // An unnamed host is no reason not to start.
    fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".into(), |name| name.trim().into())
}

/// Whether a file is there.
pub fn is_there(path: &Path) -> bool {
    path.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_found() {
        assert!(has_program("sh"));
        assert!(!has_program("no-such-program"));
        assert!(!hostname().is_empty());
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        System.writable_dir(&deep).unwrap();
        assert!(deep.is_dir());
        assert!(System.writable_fs(&deep));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(System.writable_dir(&dir.path().join("file")).is_err());
    }
}
