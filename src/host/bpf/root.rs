//! The host's cgroup2 root, and cgroups beneath it by path and by id.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::super::grants::{CgroupRef, GrantStoreError};
use super::super::mounts;

/// kernfs gives its root directory this inode number, and no other directory.
const ROOT_INODE: u64 = 1;
/// `FILEID_KERNFS`: a file handle that is a kernfs node's 64-bit id.
const FILEID_KERNFS: i32 = 0xfe;

/// The mount point of the whole hierarchy.
#[derive(Debug, Clone)]
pub(super) struct Root {
    path: PathBuf,
}

impl Root {
    /// The first mount of cgroup2 that shows the host's real root. A cgroup namespace shows its own
    /// part as if it were the root, but there the directory has another inode number and a
    /// `cgroup.events`, which only the real root lacks.
    pub(super) fn find() -> Option<Self> {
        let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        mounts::parse(&table)
            .into_iter()
            .filter(|m| m.fs_type == "cgroup2")
            .map(|m| m.mount_point)
            .find(|path| {
                let real = std::fs::metadata(path).is_ok_and(|m| m.ino() == ROOT_INODE);
                real && path.join("cgroup.procs").exists() && !path.join("cgroup.events").exists()
            })
            .map(|path| Self { path })
    }

    /// Where it is mounted.
    #[cfg(test)]
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of the root directory.
    pub(super) fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// A descriptor of a cgroup that may be granted devices: it exists, is the one that was meant,
    /// and is neither the root nor deeper than the program looks.
    pub(super) fn open_cgroup(&self, cgroup: &CgroupRef) -> Result<File, GrantStoreError> {
        let refused = |why| GrantStoreError::Refused { path: cgroup.path.clone(), why };
        let dir = File::open(&cgroup.path).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR) => {
                GrantStoreError::Gone(cgroup.path.clone())
            }
            _ => GrantStoreError::from(e),
        })?;
        let kind = fstatfs(&dir).map_err(io::Error::from)?.filesystem_type();
        let (meta, root) = (dir.metadata()?, self.open()?.metadata()?);
        if kind != CGROUP2_SUPER_MAGIC || !meta.is_dir() || meta.dev() != root.dev() {
            return Err(refused("it is not a directory of the host's cgroup2 hierarchy"));
        }
        if meta.ino() == ROOT_INODE {
            return Err(refused("it is the root"));
        }
        if meta.ino() != cgroup.id {
            return Err(GrantStoreError::Gone(cgroup.path.clone()));
        }
        if super::too_deep(&self.path, &cgroup.path) {
            return Err(refused("it lies more than 32 levels below the root"));
        }
        Ok(dir)
    }

    /// The directory of a cgroup's id; `None` when the cgroup is gone.
    pub(super) fn path_of(&self, id: u64) -> io::Result<Option<PathBuf>> {
        /// `struct file_handle` with a kernfs id.
        #[repr(C)]
        struct Handle {
            handle_bytes: u32,
            handle_type: i32,
            id: u64,
        }
        let root = self.open()?;
        let mut handle = Handle { handle_bytes: 8, handle_type: FILEID_KERNFS, id };
        // SAFETY: `handle` is laid out as the kernel's struct with the eight bytes that it announces
        // and outlives the call; `root` is open.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                root.as_raw_fd(),
                std::ptr::from_mut(&mut handle),
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ESTALE | libc::ENOENT) => Ok(None),
                _ => Err(error),
            };
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let path = std::fs::read_link(Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string()))?;
        Ok(Some(path))
    }
}
