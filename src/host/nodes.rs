//! Device nodes, made and removed fd-relative beneath a pod's directory.
//!
//! The pod can write to that directory and may exchange any name in it at any moment. So a node is
//! made under a temporary name with mode 0, its inode is pinned by an O_PATH descriptor and checked
//! to be a block device of the right number (which no inode ever changes), and only through that
//! descriptor are owner, mode and label set: whatever the pod renames, no other file is touched.
//! Then it is renamed into place, and what is found there must be the pinned inode.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat2};
use nix::libc;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};
use serde::{Deserialize, Serialize};

use super::blocking::blocking;
use super::poddir::{HotplugDir, PathError, open_hotplug, proc_path};
use crate::types::{DevNum, Outcome, VolumeName};

/// Who may open a node, in the host's user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeOwner {
    /// QEMU's user.
    pub uid: u32,
    /// QEMU's group.
    pub gid: u32,
}

/// The mode of every node: its owner alone.
pub const NODE_MODE: u32 = 0o600;

/// What is at a node's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// A block node.
    Node {
        /// Its device.
        dev: DevNum,
        /// Its owner.
        owner: NodeOwner,
        /// Its permission bits.
        mode: u32,
    },
    /// A directory.
    Directory,
    /// Something else: a file, a symlink, a character node, ...
    Other,
}

/// A node could not be made, removed or seen.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The directory is not what it was.
    #[error("the hotplug directory cannot be used")]
    Dir(#[source] PathError),
    /// Something is in the way that is not removed.
    #[error("{name} in {dir} is refused: {why}")]
    Refused {
        /// The directory.
        dir: String,
        /// The node's name.
        name: String,
        /// What is wrong.
        why: &'static str,
    },
    /// A call failed.
    #[error("{what} {name} in {dir} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The directory.
        dir: String,
        /// The node's name.
        name: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl From<io::Error> for NodeError {
    fn from(source: io::Error) -> Self {
        Self::Io { what: "work on", dir: String::new(), name: "node".into(), source }
    }
}

type Result<T> = std::result::Result<T, NodeError>;

/// The door to device nodes in pods' directories.
#[async_trait]
pub trait Nodes: Send + Sync {
    /// Sees to it that the node is there with this device, owner, mode 0600 and the directory's
    /// SELinux label. A node that differs, a file or a symlink is replaced; a directory is not.
    async fn ensure(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
        dev: DevNum,
        owner: NodeOwner,
    ) -> Result<Outcome>;

    /// Removes the node, if it is a block node and (where `expect` is given) of that device. What
    /// is anything else is not ours and is left.
    async fn remove(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
        expect: Option<DevNum>,
    ) -> Result<Outcome>;

    /// What is there.
    async fn observe(&self, dir: &HotplugDir, name: &VolumeName) -> Result<Option<Seen>>;

    /// The same of several, in their order: looked at one after the other, with a single trip to where that is done.
    async fn observe_each(
        &self,
        dir: &HotplugDir,
        names: &[VolumeName],
    ) -> Vec<Result<Option<Seen>>> {
        let mut seen = Vec::with_capacity(names.len());
        for name in names {
            seen.push(self.observe(dir, name).await);
        }
        seen
    }
}

/// The device nodes of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostNodes;

#[async_trait]
impl Nodes for HostNodes {
    async fn ensure(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
        dev: DevNum,
        owner: NodeOwner,
    ) -> Result<Outcome> {
        let (dir, name) = (dir.clone(), name.clone());
        blocking("making a node", move || Work::open(&dir, &name)?.ensure(dev, owner)).await
    }

    async fn remove(
        &self,
        dir: &HotplugDir,
        name: &VolumeName,
        expect: Option<DevNum>,
    ) -> Result<Outcome> {
        let (dir, name) = (dir.clone(), name.clone());
        blocking("removing a node", move || Work::open(&dir, &name)?.remove(expect)).await
    }

    async fn observe(&self, dir: &HotplugDir, name: &VolumeName) -> Result<Option<Seen>> {
        let (dir, name) = (dir.clone(), name.clone());
        blocking("looking at a node", move || look(&dir, &name)).await
    }

    async fn observe_each(
        &self,
        dir: &HotplugDir,
        names: &[VolumeName],
    ) -> Vec<Result<Option<Seen>>> {
        let (dir, all) = (dir.clone(), names.to_vec());
        let look_at_each = move || Ok(all.iter().map(|name| look(&dir, name)).collect());
        match blocking("looking at nodes", look_at_each).await {
            Ok(seen) => seen,
            Err::<_, io::Error>(error) => {
                let same = |_| Err(io::Error::new(error.kind(), error.to_string()).into());
                names.iter().map(same).collect()
            }
        }
    }
}

fn look(dir: &HotplugDir, name: &VolumeName) -> Result<Option<Seen>> {
    let work = Work::open(dir, name)?;
    Ok(work.look(name.as_str())?.map(|found| found.seen))
}

/// How often a pod that exchanges names under us is answered by another try.
const TRIES: usize = 3;

/// One call's work in one directory.
struct Work<'a> {
    dir: &'a HotplugDir,
    fd: OwnedFd,
    name: &'a str,
    /// Where the node is made first. Always the same for a name, so that one that a crash left
    /// behind is found; cannot clash with a volume's name, which has no dots.
    temporary: String,
}

/// Something that was found, pinned.
struct Found {
    fd: OwnedFd,
    seen: Seen,
    inode: (u64, u64),
}

impl<'a> Work<'a> {
    fn open(dir: &'a HotplugDir, name: &'a VolumeName) -> Result<Self> {
        let fd = open_hotplug(dir).map_err(NodeError::Dir)?;
        let temporary = format!(".lunplug-{name}");
        Ok(Self { dir, fd, name: name.as_str(), temporary })
    }

    fn error<E: Into<io::Error>>(&self, what: &'static str) -> impl Fn(E) -> NodeError {
        let (dir, name) = (self.dir.to_string(), self.name.to_owned());
        move |e| NodeError::Io { what, dir: dir.clone(), name: name.clone(), source: e.into() }
    }

    fn refused(&self, why: &'static str) -> NodeError {
        NodeError::Refused { dir: self.dir.to_string(), name: self.name.to_owned(), why }
    }

    fn ensure(&self, dev: DevNum, owner: NodeOwner) -> Result<Outcome> {
        let label = label(&self.fd).map_err(self.error("reading the SELinux label for"))?;
        for _ in 0..TRIES {
            match self.look(self.name)? {
                Some(found) if found.seen == Seen::Directory => {
                    return Err(self.refused("a directory is in its place"));
                }
                Some(found) if self.is_right(&found, dev, owner, label.as_deref())? => {
                    self.unlink(&self.temporary)?;
                    return Ok(Outcome::Already(()));
                }
                _ => {}
            }
            if self.place(dev, owner, label.as_deref())? {
                return Ok(Outcome::Done(()));
            }
        }
        Err(self.refused("the pod keeps exchanging it"))
    }

    fn is_right(
        &self,
        found: &Found,
        dev: DevNum,
        owner: NodeOwner,
        dir_label: Option<&[u8]>,
    ) -> Result<bool> {
        let labelled = match dir_label {
            None => true,
            Some(_) => {
                let own = label(&found.fd).map_err(self.error("reading the SELinux label of"))?;
                own.as_deref() == dir_label
            }
        };
        Ok(labelled && found.seen == Seen::Node { dev, owner, mode: NODE_MODE })
    }

    /// Makes the node and moves it into place; `false` when the pod got in between.
    fn place(&self, dev: DevNum, owner: NodeOwner, label: Option<&[u8]>) -> Result<bool> {
        let temporary = self.temporary.as_str();
        self.unlink(temporary)?;
        // Mode 0 whatever the umask: nobody can open it before it is done.
        match mknodat(&self.fd, temporary, SFlag::S_IFBLK, Mode::empty(), dev.to_dev_t()) {
            Err(Errno::EEXIST) => return Ok(false),
            other => other.map_err(self.error("making"))?,
        }
        let Some(node) = self.look(temporary)? else { return Ok(false) };
        if !matches!(node.seen, Seen::Node { dev: found, .. } if found == dev) {
            return Ok(false);
        }
        self.dress(&node, owner, label)?;
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(&self.fd, temporary, &self.fd, self.name, flags) {
            Err(Errno::ENOENT) => return Ok(false),
            // What is in the way was looked at; rename(2) replaces it without following it, and
            // never replaces a directory.
            Err(Errno::EEXIST) => self.replace(temporary)?,
            other => other.map_err(self.error("placing"))?,
        }
        // A rename between two links of one inode leaves both.
        self.unlink(temporary)?;
        let Some(placed) = self.look(self.name)? else { return Ok(false) };
        Ok(placed.inode == node.inode && self.is_right(&placed, dev, owner, label)?)
    }

    fn replace(&self, temporary: &str) -> Result<()> {
        match renameat2(&self.fd, temporary, &self.fd, self.name, RenameFlags::empty()) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => Err(self.refused("a directory is in its place")),
            Err(e) => Err(self.error("replacing")(e)),
        }
    }

    /// Owner, then label, then mode: it is not to be opened before the rest is right.
    fn dress(&self, node: &Found, owner: NodeOwner, label: Option<&[u8]>) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
        fchownat(&node.fd, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
            .map_err(self.error("giving away"))?;
        if let Some(label) = label {
            set_label(&node.fd, label).map_err(self.error("labelling"))?;
        }
        // fchmod takes no O_PATH descriptor before Linux 6.6.
        let mode = Mode::from_bits_truncate(NODE_MODE);
        fchmodat(
            nix::fcntl::AT_FDCWD,
            &proc_path(&std::os::fd::AsRawFd::as_raw_fd(&node.fd)),
            mode,
            FchmodatFlags::FollowSymlink,
        )
        .map_err(self.error("setting the mode of"))
    }

    fn remove(&self, expect: Option<DevNum>) -> Result<Outcome> {
        self.unlink(&self.temporary)?;
        match self.look(self.name)?.map(|found| found.seen) {
            Some(Seen::Node { dev, .. }) if expect.is_none_or(|e| e == dev) => {
                let removed = self.unlink(self.name)?;
                Ok(if removed { Outcome::Done(()) } else { Outcome::Already(()) })
            }
            _ => Ok(Outcome::Already(())),
        }
    }

    /// Pins what has a name, without following or opening it.
    fn look(&self, name: &str) -> Result<Option<Found>> {
        let how =
            OpenHow::new().flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).resolve(
                ResolveFlag::RESOLVE_BENEATH
                    | ResolveFlag::RESOLVE_NO_MAGICLINKS
                    | ResolveFlag::RESOLVE_NO_XDEV,
            );
        let file = match openat2(&self.fd, name, how) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            // Something is mounted on that very name: nothing that can be replaced.
            Err(Errno::EXDEV) => return Err(self.refused("something is mounted in its place")),
            Err(e) => return Err(self.error("looking at")(e)),
        };
        let meta = file.metadata().map_err(self.error("looking at"))?;
        let kind = meta.file_type();
        let seen = if kind.is_block_device() {
            Seen::Node {
                dev: DevNum::from_dev_t(meta.rdev()),
                owner: NodeOwner { uid: meta.uid(), gid: meta.gid() },
                mode: meta.mode() & 0o7777,
            }
        } else if kind.is_dir() {
            Seen::Directory
        } else {
            Seen::Other
        };
        Ok(Some(Found { fd: file.into(), seen, inode: (meta.dev(), meta.ino()) }))
    }

    /// Removes a name that is not a directory; whether it was there.
    fn unlink(&self, name: &str) -> Result<bool> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(Errno::EISDIR) => Err(self.refused("a directory is in its place")),
            Err(e) => Err(self.error("removing")(e)),
        }
    }
}

const LABEL: &std::ffi::CStr = c"security.selinux";

/// The SELinux label of what a descriptor (O_PATH will do) stands for; `None` without SELinux.
fn label(fd: &impl AsFd) -> io::Result<Option<Vec<u8>>> {
    let path = c_path(fd)?;
    let mut value = vec![0u8; 1024];
    // SAFETY: both strings end in NUL, and the kernel writes at most `value.len()` bytes.
    let length = unsafe {
        libc::getxattr(path.as_ptr(), LABEL.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    match usize::try_from(length) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(_) => {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENODATA | libc::EOPNOTSUPP) => Ok(None),
                _ => Err(error),
            }
        }
    }
}

fn set_label(fd: &impl AsFd, label: &[u8]) -> io::Result<()> {
    let path = c_path(fd)?;
    // SAFETY: both strings end in NUL, and `label` is valid for its length.
    let result = unsafe {
        libc::setxattr(path.as_ptr(), LABEL.as_ptr(), label.as_ptr().cast(), label.len(), 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn c_path(fd: &impl AsFd) -> io::Result<CString> {
    let path = proc_path(&std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd()));
    CString::new(Path::as_os_str(&path).as_bytes()).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
