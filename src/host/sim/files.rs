//! Files of the simulated host, and their mounts in pods.
//!
//! Points where faults act: `local.file`, `local.sync` (path), `files.open`, `files.mount`, `files.observe`,
//! `files.unmount` (name).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use nix::errno::Errno;

use super::pods::SimPods;
use crate::host::local::{FileSeen, HostFile, SourceError};
use crate::host::nodes::{NodeError, NodeOwner, Seen};
use crate::host::poddir::{HotplugDir, Inode};
use crate::host::podfiles::{FileError, InPod, OpenAs, PodFiles, Taken};
use crate::types::{Outcome, VolumeName};

/// The user that simulated QEMUs run as.
pub const QEMU_USER: NodeOwner = NodeOwner { uid: 64055, gid: 107 };

/// A file.
#[derive(Debug, Clone)]
pub struct SimFile {
    /// Bytes.
    pub size: u64,
    /// What it begins with.
    pub head: Vec<u8>,
    /// Who alone may open it.
    pub owner: NodeOwner,
    /// Its file system is mounted for reading only.
    pub read_only: bool,
    /// Its file system has direct I/O.
    pub direct: bool,
    /// A QEMU of somebody else's has it open.
    pub locked: bool,
}

impl SimFile {
    /// A raw file of QEMU's user.
    pub fn raw(size: u64) -> Self {
        Self {
            size,
            head: Vec::new(),
            owner: QEMU_USER,
            read_only: false,
            direct: true,
            locked: false,
        }
    }
}

/// All files. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct SimFiles(Arc<Mutex<Model>>);

#[derive(Debug, Default)]
struct Model {
    files: BTreeMap<PathBuf, (u64, SimFile)>,
    made: u64,
}

impl SimFiles {
    fn lock(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a file there: another one than any before.
    pub fn put(&self, path: &str, file: SimFile) {
        let mut model = self.lock();
        model.made += 1;
        let ino = model.made;
        model.files.insert(path.into(), (ino, file));
    }

    /// Changes a file.
    pub fn edit(&self, path: &str, change: impl FnOnce(&mut SimFile)) {
        if let Some((_, file)) = self.lock().files.get_mut(Path::new(path)) {
            change(file);
        }
    }

    /// Removes a name; whoever has it mounted keeps it.
    pub fn remove(&self, path: &str) {
        self.lock().files.remove(Path::new(path));
    }

    fn get(&self, path: &Path) -> Result<(Inode, SimFile), SourceError> {
        let model = self.lock();
        let found = model.files.get(path);
        let (ino, file) = found.ok_or_else(|| SourceError::NotThere(path.to_owned()))?;
        Ok((Inode { dev: 42, ino: *ino }, file.clone()))
    }

    pub(super) fn seen(&self, path: &Path) -> Result<FileSeen, SourceError> {
        let (inode, SimFile { size, head, read_only, locked, .. }) = self.get(path)?;
        Ok(FileSeen { inode, size, head, read_only, locked })
    }

    pub(super) fn same(&self, file: &HostFile) -> Result<SimFile, SourceError> {
        let (inode, found) = self.get(&file.path())?;
        if inode == file.inode { Ok(found) } else { Err(SourceError::Exchanged(file.path())) }
    }

    /// How large the file of that inode is.
    pub(super) fn size_of(&self, inode: Inode) -> Option<u64> {
        let model = self.lock();
        model.files.values().find(|(ino, _)| *ino == inode.ino).map(|(_, file)| file.size)
    }
}

/// A file's mount in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimMount {
    /// Which file.
    pub inode: Inode,
    /// For reading only.
    pub read_only: bool,
    /// Somebody in the pod has it open, beside QEMU.
    pub open: bool,
}

/// The mounts of a pod as text.
pub(super) fn write_mounts(text: &mut String, mounts: &BTreeMap<VolumeName, SimMount>) {
    for (name, mount) in mounts {
        let how = if mount.read_only { "ro" } else { "rw" };
        let _ = writeln!(text, "  mount {name} file {} {how}", mount.inode.ino);
    }
}

fn failed(source: io::Error) -> FileError {
    FileError::Io { what: "work on a simulated file", source }
}

#[async_trait]
impl PodFiles for SimPods {
    async fn may_open(&self, file: &HostFile, how: OpenAs) -> Result<(), FileError> {
        self.pass("files.open", &file.path().to_string_lossy()).await.map_err(failed)?;
        let found = self.files().same(file).map_err(FileError::Source)?;
        if found.owner != how.user {
            return Err(FileError::NoAccess {
                path: file.path(),
                how: if how.write { "reading and writing" } else { "reading" },
                user: how.user,
                source: Errno::EACCES.into(),
            });
        }
        if how.direct && !found.direct {
            return Err(FileError::NoDirect(file.path()));
        }
        Ok(())
    }

    async fn ensure(
        &self,
        at: &InPod,
        name: &VolumeName,
        file: &HostFile,
        read_only: bool,
    ) -> Result<Outcome, FileError> {
        self.pass("files.mount", name.as_str()).await.map_err(failed)?;
        self.files().same(file).map_err(FileError::Source)?;
        let wanted = SimMount { inode: file.inode, read_only, open: false };
        self.with_hotplug(&at.hotplug, |pod| {
            if !pod.processes.iter().any(|process| process.id == at.process) {
                return Err(failed(Errno::ESRCH.into()));
            }
            if pod.nodes.get(name) == Some(&Seen::Directory) {
                return Err(FileError::Place(NodeError::Refused {
                    dir: at.hotplug.to_string(),
                    name: name.to_string(),
                    why: "a directory is in its place",
                }));
            }
            pod.nodes.insert(name.clone(), Seen::Other);
            if pod.mounts.get(name).is_some_and(|mount| mount.inode == wanted.inode) {
                return Ok(Outcome::Already(()));
            }
            pod.mounts.insert(name.clone(), wanted);
            Ok(Outcome::Done(()))
        })?
    }

    async fn is_seen(&self, at: &InPod, name: &VolumeName, file: Inode) -> Result<bool, FileError> {
        self.pass("files.observe", name.as_str()).await.map_err(failed)?;
        self.with_hotplug(&at.hotplug, |pod| {
            let there = pod.nodes.get(name) == Some(&Seen::Other);
            there && pod.mounts.get(name).is_some_and(|mount| mount.inode == file)
        })
    }

    async fn remove(
        &self,
        dir: &HotplugDir,
        seen: Option<&InPod>,
        name: &VolumeName,
        force: bool,
    ) -> Result<Taken, FileError> {
        self.pass("files.unmount", name.as_str()).await.map_err(failed)?;
        self.with_hotplug(dir, |pod| {
            if pod.nodes.get(name) != Some(&Seen::Other) {
                return Ok(Taken { outcome: Outcome::Already(()), was_open: false });
            }
            let was_open = seen.is_some() && pod.mounts.get(name).is_some_and(|mount| mount.open);
            if was_open && !force {
                return Err(FileError::Busy { dir: dir.to_string(), name: name.to_string() });
            }
            // The mount goes with its placeholder.
            pod.mounts.remove(name);
            pod.nodes.remove(name);
            Ok(Taken { outcome: Outcome::Done(()), was_open })
        })?
    }
}
