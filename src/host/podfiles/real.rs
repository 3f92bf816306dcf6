//! Files in the pods of this host.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{FileError, InPod, OpenAs, PodFiles, Taken, mount, open};
use crate::host::blocking::blocking;
use crate::host::local::{HostFile, open_file};
use crate::host::nodes::NodeError;
use crate::host::poddir::{HotplugDir, Inode, open_hotplug};
use crate::host::procs::{HostProcs, is_gone};
use crate::types::{Outcome, VolumeName};

/// The real host's.
#[derive(Debug, Clone)]
pub struct HostPodFiles {
    procs: HostProcs,
}

impl HostPodFiles {
    /// With the processes of this host.
    pub fn new(procs: HostProcs) -> Self {
        Self { procs }
    }
}

type Result<T> = std::result::Result<T, FileError>;

#[async_trait]
impl PodFiles for HostPodFiles {
    async fn may_open(&self, file: &HostFile, how: OpenAs) -> Result<()> {
        let file = file.clone();
        blocking("opening a file as QEMU's user", move || open::may_open(&file, how)).await
    }

    async fn ensure(
        &self,
        at: &InPod,
        name: &VolumeName,
        file: &HostFile,
        read_only: bool,
    ) -> Result<Outcome> {
        let work = (self.procs.clone(), at.clone(), name.clone(), file.clone());
        blocking("mounting a file in a pod", move || {
            let (procs, at, name, file) = work;
            let namespace = procs.mount_namespace(at.process).map_err(io("entering the pod"))?;
            let source = open_file(&file).map_err(FileError::Source)?;
            Place::open(&at.hotplug, &name)?.ensure(&at, &namespace, &source.into(), read_only)
        })
        .await
    }

    async fn is_seen(&self, at: &InPod, name: &VolumeName, file: Inode) -> Result<bool> {
        let work = (self.procs.clone(), at.clone(), name.clone());
        blocking("looking at a file in a pod", move || {
            let (procs, at, name) = work;
            let namespace = procs.mount_namespace(at.process).map_err(io("entering the pod"))?;
            let dir = (at.dir_in_pod.as_path(), at.hotplug.inode());
            let seen = mount::observe(&namespace, dir, name.as_str());
            let seen = seen.map_err(io("looking at a file in the pod"))?;
            Ok(seen.is_some_and(|seen| seen.mounted && seen.inode == file))
        })
        .await
    }

    async fn remove(
        &self,
        dir: &HotplugDir,
        seen: Option<&InPod>,
        name: &VolumeName,
        force: bool,
    ) -> Result<Taken> {
        let work = (self.procs.clone(), dir.clone(), seen.cloned(), name.clone());
        blocking("taking a file from a pod", move || {
            let (procs, dir, seen, name) = work;
            let place = Place::open(&dir, &name)?;
            if !matches!(place.look()?, Some(Thing::Placeholder(_) | Thing::Mounted)) {
                return Ok(Taken { outcome: Outcome::Already(()), was_open: false });
            }
            let mut was_open = false;
            if let Some(at) = seen {
                match procs.mount_namespace(at.process) {
                    Ok(namespace) => was_open = place.unmount(&at, &namespace, force)?,
                    // It has ended since, and sees nothing any more.
                    Err(e) if is_gone(&e) => {}
                    Err(e) => return Err(io("entering the pod")(e)),
                }
            }
            // What of it is mounted anywhere still goes with it.
            if let Some(Thing::Placeholder(_)) = place.look()? {
                place.unlink()?;
            }
            Ok(Taken { outcome: Outcome::Done(()), was_open })
        })
        .await
    }
}

fn io(what: &'static str) -> impl Fn(io::Error) -> FileError {
    move |source| FileError::Io { what, source }
}

/// How often a pod that exchanges names under us is answered by another try.
const TRIES: usize = 3;

/// A name in a hotplug directory, as the host sees it.
struct Place<'a> {
    dir: &'a HotplugDir,
    fd: OwnedFd,
    name: &'a str,
}

/// What has the name.
enum Thing {
    /// An empty file that nobody can open, root's: made here.
    Placeholder(Inode),
    /// Something that is mounted on the name, which the node sees where the pod's mounts are shared with it.
    Mounted,
    Directory,
    Other,
}

impl<'a> Place<'a> {
    fn open(dir: &'a HotplugDir, name: &'a VolumeName) -> Result<Self> {
        let fd = open_hotplug(dir).map_err(|e| FileError::Place(NodeError::Dir(e)))?;
        Ok(Self { dir, fd, name: name.as_str() })
    }

    fn refused(&self, why: &'static str) -> FileError {
        let (dir, name) = (self.dir.to_string(), self.name.to_owned());
        FileError::Place(NodeError::Refused { dir, name, why })
    }

    fn failed<E: Into<io::Error>>(&self, what: &'static str) -> impl Fn(E) -> FileError {
        let (dir, name) = (self.dir.to_string(), self.name.to_owned());
        move |e| {
            let (dir, name) = (dir.clone(), name.clone());
            FileError::Place(NodeError::Io { what, dir, name, source: e.into() })
        }
    }

    fn look(&self) -> Result<Option<Thing>> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_XDEV);
        let file = match openat2(&self.fd, self.name, how) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::EXDEV) => return Ok(Some(Thing::Mounted)),
            Err(e) => return Err(self.failed("looking at")(e)),
        };
        let meta = file.metadata().map_err(self.failed("looking at"))?;
        let ours = meta.is_file()
            && meta.uid() == 0
            && meta.permissions().mode() & 0o7777 == 0
            && meta.len() == 0;
        Ok(Some(match meta.is_dir() {
            true => Thing::Directory,
            false if ours => Thing::Placeholder(Inode { dev: meta.dev(), ino: meta.ino() }),
            false => Thing::Other,
        }))
    }

    fn unlink(&self) -> Result<()> {
        match unlinkat(&self.fd, self.name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(Errno::EISDIR) => Err(self.refused("a directory is in its place")),
            Err(e) => Err(self.failed("removing")(e)),
        }
    }

    /// The placeholder that has the name, made where it is missing.
    fn placeholder(&self) -> Result<Inode> {
        for _ in 0..TRIES {
            match self.look()? {
                Some(Thing::Placeholder(inode)) => return Ok(inode),
                Some(Thing::Mounted) => {
                    return Err(self.refused("something is mounted in its place"));
                }
                Some(Thing::Directory) => return Err(self.refused("a directory is in its place")),
                Some(Thing::Other) => self.unlink()?,
                None => {}
            }
            let how = OpenHow::new()
                .flags(OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC)
                .mode(Mode::empty())
                .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
            match openat2(&self.fd, self.name, how) {
                Ok(fd) => return mount::inode_of(&fd).map_err(self.failed("making")),
                Err(Errno::EEXIST) => {}
                Err(e) => return Err(self.failed("making")(e)),
            }
        }
        Err(self.refused("the pod keeps exchanging it"))
    }

    fn ensure(
        &self,
        at: &InPod,
        namespace: &OwnedFd,
        source: &OwnedFd,
        read_only: bool,
    ) -> Result<Outcome> {
        let dir = (at.dir_in_pod.as_path(), at.hotplug.inode());
        let file = mount::inode_of(source).map_err(io("looking at the file"))?;
        for _ in 0..TRIES {
            let seen = mount::observe(namespace, dir, self.name);
            let seen = seen.map_err(io("looking at a file in the pod"))?;
            match seen.filter(|seen| seen.mounted) {
                Some(seen) if seen.inode == file => return Ok(Outcome::Already(())),
                // Another file of before, which goes with its placeholder.
                Some(_) => self.unlink()?,
                None => {}
            }
            let on = self.placeholder()?;
            match mount::mount(namespace, dir, self.name, on, source, read_only) {
                Ok(true) => return Ok(Outcome::Done(())),
                Ok(false) => return Ok(Outcome::Already(())),
                Err(e) if mount::is_changed(&e) => {}
                Err(e) => return Err(io("mounting the file in the pod")(e)),
            }
        }
        Err(self.refused("the pod keeps exchanging it"))
    }

    /// Unmounts it where it is seen; whether it is open there, which only `force` goes on with.
    fn unmount(&self, at: &InPod, namespace: &OwnedFd, force: bool) -> Result<bool> {
        let dir = (at.dir_in_pod.as_path(), at.hotplug.inode());
        match mount::unmount(namespace, dir, self.name) {
            Ok(_) => Ok(false),
            Err(e) if e.raw_os_error() == Some(Errno::EBUSY as i32) => {
                if force {
                    return Ok(true);
                }
                let (dir, name) = (self.dir.to_string(), self.name.to_owned());
                Err(FileError::Busy { dir, name })
            }
            // The pod sees another directory there, and so not ours.
            Err(e) if mount::is_changed(&e) || e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io("unmounting the file in the pod")(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::container::{Pod, inode};
    use super::*;
    use crate::reason::Reason;

    struct Scene {
        pod: Pod,
        files: HostPodFiles,
        name: VolumeName,
        file: HostFile,
    }

    impl Scene {
        fn new() -> Option<Self> {
            let pod = Pod::new()?;
            let (root, rest) = (pod.source.parent()?.into(), "disk.img".into());
            let file = HostFile { root, rest, inode: inode(&pod.source) };
            let files = HostPodFiles::new(HostProcs::new("/proc"));
            Some(Self { pod, files, name: "vol-1".parse().unwrap(), file })
        }

        async fn ensure(&self) -> Result<Outcome> {
            self.files.ensure(&self.pod.place(), &self.name, &self.file, false).await
        }

        async fn is_seen(&self) -> bool {
            let at = self.pod.place();
            self.files.is_seen(&at, &self.name, self.file.inode).await.unwrap()
        }

        async fn remove(&self, force: bool) -> Result<Taken> {
            let at = self.pod.place();
            self.files.remove(&at.hotplug, Some(&at), &self.name, force).await
        }

        fn on_host(&self) -> std::path::PathBuf {
            self.pod.hotplug.join("vol-1")
        }
    }

    const DONE: Taken = Taken { outcome: Outcome::Done(()), was_open: false };
    const NOTHING: Taken = Taken { outcome: Outcome::Already(()), was_open: false };

    #[tokio::test]
    async fn root_whatever_has_the_name_is_replaced_and_a_directory_is_not() {
        let Some(s) = Scene::new() else { return };
        std::os::unix::fs::symlink("/etc/passwd", s.on_host()).unwrap();
        assert!(!s.is_seen().await);
        assert_eq!(s.ensure().await.unwrap(), Outcome::Done(()));
        assert_eq!(s.ensure().await.unwrap(), Outcome::Already(()));
        assert!(s.is_seen().await);
        assert_eq!(std::fs::read_to_string(s.pod.sees("vol-1")).unwrap(), "data");
        let meta = std::fs::symlink_metadata(s.on_host()).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o7777, meta.uid()), (0, 0, 0));
        assert_eq!(s.remove(false).await.unwrap(), DONE);
        assert_eq!(s.remove(false).await.unwrap(), NOTHING);
        assert!(!s.on_host().exists() && !s.pod.mounts().contains("vol-1"));

        std::fs::write(s.on_host(), "theirs").unwrap();
        assert_eq!(s.remove(true).await.unwrap(), NOTHING, "it is none of ours");
        std::fs::remove_file(s.on_host()).unwrap();
        std::fs::create_dir(s.on_host()).unwrap();
        let error = s.ensure().await.unwrap_err();
        assert_eq!(error.reason(), Reason::NodeRefused, "{error}");
    }

    #[tokio::test]
    async fn root_a_file_that_is_open_goes_by_force_alone() {
        let Some(s) = Scene::new() else { return };
        s.ensure().await.unwrap();
        let open = File::open(s.pod.sees("vol-1")).unwrap();
        assert_eq!(s.remove(false).await.unwrap_err().reason(), Reason::DeviceHeld);
        assert!(s.is_seen().await, "it stays");
        let taken = s.remove(true).await.unwrap();
        assert_eq!(taken, Taken { was_open: true, ..DONE });
        assert!(!s.pod.mounts().contains("vol-1"));
        drop(open);
    }

    #[tokio::test]
    async fn root_another_file_of_the_same_path_takes_the_place_of_the_old_one() {
        let Some(mut s) = Scene::new() else { return };
        s.ensure().await.unwrap();
        let other = s.pod.source.with_file_name("other");
        std::fs::write(&other, "other").unwrap();
        std::fs::rename(other, &s.pod.source).unwrap();
        let error = s.files.ensure(&s.pod.place(), &s.name, &s.file, false).await.unwrap_err();
        assert_eq!(error.reason(), Reason::DeviceHeld, "{error}");
        s.file.inode = inode(&s.pod.source);
        assert_eq!(s.ensure().await.unwrap(), Outcome::Done(()));
        assert_eq!(std::fs::read_to_string(s.pod.sees("vol-1")).unwrap(), "other");
        // Without anybody in the pod to ask, it goes with its placeholder.
        let at = s.pod.place();
        assert_eq!(s.files.remove(&at.hotplug, None, &s.name, false).await.unwrap(), DONE);
        assert!(!s.pod.mounts().contains("vol-1"));
    }

    #[tokio::test]
    async fn root_a_process_that_has_ended_is_not_entered() {
        let Some(s) = Scene::new() else { return };
        let mut at = s.pod.place();
        at.process.start += 1;
        let error = s.files.ensure(&at, &s.name, &s.file, false).await.unwrap_err();
        assert_eq!(error.reason(), Reason::HostIoFailed, "{error}");
        assert!(!s.on_host().exists(), "nothing was made");
    }
}
