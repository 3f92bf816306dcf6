//! The kernel's /sys.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use super::{Attributes, Guard, Guarded, Look, Looked, ReadError, Sysfs, View, is_gone};
use crate::host::short;
use crate::host::workers::Workers;

/// Real sysfs below a base directory, `/sys` but for tests.
pub struct RealSysfs {
    tree: Tree,
    reads: Workers,
    writes: Workers,
    deadline: Duration,
}

impl RealSysfs {
    /// `deadline` is for a write; reads get the same.
    pub fn new(base: impl Into<PathBuf>, deadline: Duration) -> Self {
        Self {
            tree: Tree { base: base.into() },
            // A device whose reads hang has four of its own, and four looks at the VM that has it.
            reads: Workers::new("lunplug-sysfs-r", 32, 4),
            // Two for each device: the kernel serialises scans of one host anyway.
            writes: Workers::new("lunplug-sysfs-w", 64, 2),
            deadline,
        }
    }

    /// Calls that are past their deadline and still in the kernel.
    pub fn stuck(&self) -> u64 {
        self.reads.stuck() + self.writes.stuck()
    }
}

/// What is below the base directory.
#[derive(Clone)]
struct Tree {
    base: PathBuf,
}

impl Attributes for Tree {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        short::read(&below(&self.base, path)?)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(below(&self.base, dir)?)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn resolve(&self, path: &str) -> io::Result<String> {
        let full = below(&self.base, path)?;
        let real = real_path(&full)?;
        let inside = real
            .strip_prefix(real_path(&self.base)?)
            .map_err(|_| io::Error::other(format!("{} leads out of /sys", full.display())))?;
        Ok(inside.to_string_lossy().into_owned())
    }
}

/// What the kernel calls the file that a path leads to: to follow links part by part takes a call for each.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(path, flags, Mode::empty())?;
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Joins a relative path; `..` and absolute ones are refused.
fn below(base: &Path, path: &str) -> io::Result<PathBuf> {
    if path.starts_with('/') || path.split('/').any(|part| part == "..") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("path {path:?} must be relative to /sys and without '..'"),
        ));
    }
    Ok(base.join(path))
}

/// What a call may block on: the SCSI device in the path, else what its third component names
/// (a host, a session, a block device).
fn key(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').collect();
    let hctl = |part: &&str| {
        part.split(':').count() == 4
            && part.split(':').all(|n| !n.is_empty() && n.bytes().all(|c| c.is_ascii_digit()))
    };
    match parts.iter().find(|part| hctl(part)) {
        Some(device) => (*device).to_owned(),
        None => parts[..parts.len().min(3)].join("/"),
    }
}

fn write_through(tree: &Tree, path: &Path, value: &str, guards: &[Guard]) -> io::Result<Guarded> {
    // Neither created nor truncated: a device that is gone must not leave a file behind in tests,
    // and sysfs knows no truncation.
    let mut file: File = OpenOptions::new().write(true).open(path)?;
    for guard in guards {
        let found = match tree.read(&guard.path) {
            Ok(bytes) => Some(String::from_utf8_lossy(&bytes).trim().to_owned()),
            Err(e) if is_gone(&e) => None,
            Err(e) => return Err(e),
        };
        if found.as_deref() != Some(guard.expect.trim()) {
            return Ok(Guarded::Refused { guard: guard.clone(), found });
        }
    }
    // One write(2): sysfs takes each as a whole value.
    let written = file.write(value.as_bytes())?;
    if written != value.len() {
        return Err(io::Error::new(
            io::ErrorKind::WriteZero,
            "the kernel took a part of the value",
        ));
    }
    let gone = path.parent().is_some_and(|device| matches!(device.try_exists(), Ok(false)));
    Ok(Guarded::Written { gone })
}

#[async_trait]
impl Sysfs for RealSysfs {
    async fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let (tree, own) = (self.tree.clone(), path.to_owned());
        self.reads.run(&key(path), self.deadline, move || tree.read(&own)).await
    }

    async fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let (tree, own) = (self.tree.clone(), dir.to_owned());
        self.reads.run(&key(dir), self.deadline, move || tree.list(&own)).await
    }

    async fn resolve(&self, path: &str) -> io::Result<String> {
        let (tree, own) = (self.tree.clone(), path.to_owned());
        self.reads.run(&key(path), self.deadline, move || tree.resolve(&own)).await
    }

    async fn look_with(&self, about: &str, look: Look) -> Looked {
        let tree = self.tree.clone();
        let call = move || Ok(look(&View(&tree)));
        let looked = self.reads.run(&key(about), self.deadline, call).await;
        looked.map_err(ReadError::at(about))?
    }

    async fn write(&self, path: &str, value: &str) -> io::Result<()> {
        match self.write_guarded(path, value, &[]).await? {
            Guarded::Written { .. } => Ok(()),
            Guarded::Refused { .. } => Err(io::Error::other("refused without a guard")),
        }
    }

    async fn write_guarded(
        &self,
        path: &str,
        value: &str,
        guards: &[Guard],
    ) -> io::Result<Guarded> {
        let (tree, full) = (self.tree.clone(), below(&self.tree.base, path)?);
        let (value, guards) = (value.to_owned(), guards.to_vec());
        let call = move || write_through(&tree, &full, &value, &guards);
        self.writes.run(&key(path), self.deadline, call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn tree() -> (tempfile::TempDir, RealSysfs) {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("devices/host2/2:0:0:1");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("wwid"), "naa.6001\n").unwrap();
        fs::write(device.join("delete"), "").unwrap();
        fs::create_dir_all(dir.path().join("class/scsi_device")).unwrap();
        let link = dir.path().join("class/scsi_device/2:0:0:1");
        std::os::unix::fs::symlink("../../devices/host2/2:0:0:1", link).unwrap();
        let sysfs = RealSysfs::new(dir.path(), DEADLINE);
        (dir, sysfs)
    }

    #[test]
    fn each_device_and_each_host_has_its_own_places() {
        let dir = "devices/platform/host2/session1";
        assert_eq!(key(&format!("{dir}/target2:0:0/2:0:0:1/delete")), "2:0:0:1");
        assert_eq!(key("class/scsi_device/2:0:0:1/device/rescan"), "2:0:0:1");
        assert_eq!(key("class/scsi_host/host2/scan"), "class/scsi_host/host2");
        assert_eq!(key(dir), "devices/platform/host2");
        assert_eq!(key("block"), "block");
    }

    #[tokio::test]
    async fn reads_lists_and_resolves() {
        let (_dir, sysfs) = tree();
        let device = "class/scsi_device/2:0:0:1";
        assert_eq!(sysfs.text(&format!("{device}/wwid")).await.unwrap().unwrap(), "naa.6001");
        assert_eq!(sysfs.text(&format!("{device}/nothing")).await.unwrap(), None);
        assert_eq!(sysfs.list(device).await.unwrap(), ["delete", "wwid"]);
        assert!(sysfs.entries("class/none").await.unwrap().is_empty());
        assert_eq!(sysfs.resolve(device).await.unwrap(), "devices/host2/2:0:0:1");
        let looked = (&sysfs as &dyn Sysfs).look(device, |view| {
            let device = "class/scsi_device/2:0:0:1";
            let absent = view.text(&format!("{device}/nothing"))?;
            let out = view.entries("../etc").map_err(|e| e.path);
            Ok((view.text(&format!("{device}/wwid"))?, view.resolve(device)?, absent, out))
        });
        let (wwid, dir, absent, out) = looked.await.unwrap();
        assert_eq!(wwid.as_deref(), Some("naa.6001"));
        assert_eq!(dir.as_deref(), Some("devices/host2/2:0:0:1"));
        assert_eq!((absent, out), (None, Err("../etc".to_owned())));
        assert!(sysfs.read("../etc/passwd").await.is_err());
        assert!(sysfs.read("/etc/passwd").await.is_err());
    }

    #[tokio::test]
    async fn a_guard_that_does_not_hold_stops_the_write() {
        let (dir, sysfs) = tree();
        let delete = "class/scsi_device/2:0:0:1/delete";
        let guard = |expect: &str| Guard {
            path: "class/scsi_device/2:0:0:1/wwid".into(),
            expect: expect.into(),
        };
        let written = || fs::read_to_string(dir.path().join(delete)).unwrap();
        let refused = sysfs.write_guarded(delete, "1", &[guard("naa.6002")]).await.unwrap();
        assert_eq!(
            refused,
            Guarded::Refused { guard: guard("naa.6002"), found: Some("naa.6001".into()) }
        );
        assert_eq!(written(), "");
        let both = [guard("naa.6001"), guard(" naa.6001\n")];
        let done = sysfs.write_guarded(delete, "1", &both).await.unwrap();
        assert_eq!(done, Guarded::Written { gone: false }, "no kernel has taken it away");
        assert_eq!(written(), "1");
        let gone = sysfs.write("class/scsi_device/9:0:0:1/delete", "1").await.unwrap_err();
        assert!(is_gone(&gone));
    }

    #[tokio::test]
    async fn a_write_that_the_kernel_keeps_is_abandoned() {
        let (dir, _) = tree();
        // Opening a FIFO for writing waits for a reader, as a write to `delete` may for I/O.
        let fifo = dir.path().join("stuck");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let sysfs = RealSysfs::new(dir.path(), Duration::from_millis(50));
        let late = sysfs.write("stuck", "1").await.unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        // A reader lets the abandoned call go on.
        nix::fcntl::open(&fifo, nix::fcntl::OFlag::O_NONBLOCK, nix::sys::stat::Mode::empty())
            .unwrap();
    }
}
