//! Bind mounts of files in the mount namespace of a pod's process.
//!
//! ```text
//! host:   source opened beneath its root ─► open_tree(CLONE): a detached mount ─► mount_setattr
//!         placeholder made fd-relative in the hotplug directory
//! thread: unshare(FS) ─► setns(mnt of QEMU) ─► directory as QEMU sees it, the same inode?
//!           ─► placeholder, no symlink, no mount crossed, the same inode? ─► move_mount ─► looked at
//! ```
//! The mount is in the container's namespace alone: it goes with it, and the host and other pods never see it. It goes
//! with its placeholder, too: once that is unlinked on the host, where nothing is mounted on it, the kernel unmounts it
//! wherever it is (`detach_mounts` of fs/namespace.c).
//! open_tree(2) and move_mount(2) came with Linux 5.2, mount_setattr(2) with 5.12.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::libc;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::host::poddir::Inode;

// include/uapi/linux/mount.h; libc has no struct mount_attr for musl.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = libc::O_CLOEXEC as libc::c_uint;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_NOEXEC: u64 = 0x8;

/// struct mount_attr of mount_setattr(2), its first version.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// What is at a name in a directory, mounts followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SeenFile {
    /// Which file.
    pub(super) inode: Inode,
    /// Something is mounted on the name.
    pub(super) mounted: bool,
}

pub(super) fn inode_of(fd: &impl AsFd) -> io::Result<Inode> {
    let meta = File::from(fd.as_fd().try_clone_to_owned()?).metadata()?;
    Ok(Inode { dev: meta.dev(), ino: meta.ino() })
}

/// The pod has exchanged something meanwhile.
#[derive(Debug, thiserror::Error)]
#[error("{0} is another one than before")]
struct Changed(&'static str);

fn changed(what: &'static str) -> io::Error {
    io::Error::other(Changed(what))
}

pub(super) fn is_changed(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Changed>())
}

/// The result of one of the calls on mounts.
fn call(result: libc::c_long) -> io::Result<libc::c_long> {
    if result >= 0 {
        return Ok(result);
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENOSYS) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "files need Linux 5.12 or newer on the node",
        )),
        e => Err(e),
    }
}

/// A mount of the file alone, in nobody's namespace yet: without set-uid, devices and programs, and for reading only
/// where that is asked for.
fn detached(source: &OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    // SAFETY: the descriptor is open, the path an empty string that ends in NUL.
    let fd = call(unsafe {
        libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags)
    })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    let tree = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut attr = MountAttr {
        attr_set: MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
        // A clone of a shared mount is shared: what is done to it in the pod is not to come back.
        propagation: libc::MS_PRIVATE,
        ..MountAttr::default()
    };
    if read_only {
        attr.attr_set |= MOUNT_ATTR_RDONLY;
    }
    // SAFETY: `attr` is a struct mount_attr of the size that is given, and outlives the call.
    call(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })?;
    Ok(tree)
}

/// Runs `work` on a thread of its own that is in another mount namespace, with that namespace's root for its own.
fn within<T: Send>(
    namespace: &OwnedFd,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("lunplug-mnt".into());
        let ran = thread.spawn_scoped(scope, || {
            // A thread that shares its root and directory with others cannot change namespaces (setns(2)). It is
            // never used again.
            unshare(CloneFlags::CLONE_FS)?;
            setns(namespace, CloneFlags::CLONE_NEWNS)?;
            work()
        })?;
        ran.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

/// The directory as whoever has this root sees it. Its own symlinks (`/var/run`) are followed beneath the root,
/// and the inode tells whether it is the one that is meant.
fn directory(dir: &Path, expect: Inode) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let root = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
    let root = openat2(AT_FDCWD, "/", root)?;
    let fd = openat2(&root, dir, how)?;
    if inode_of(&fd)? != expect {
        return Err(changed("the hotplug directory in the pod"));
    }
    Ok(fd)
}

/// What has a name there. A symlink is opened itself, which no inode of a file is.
fn open_name(dir: &OwnedFd, name: &str, resolve: ResolveFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | resolve);
    openat2(dir, name, how)
}

fn look(dir: &OwnedFd, name: &str) -> io::Result<Option<SeenFile>> {
    let through = match open_name(dir, name, ResolveFlag::empty()) {
        Ok(fd) => inode_of(&fd)?,
        Err(Errno::ENOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let mounted = match open_name(dir, name, ResolveFlag::RESOLVE_NO_XDEV) {
        Ok(_) => false,
        Err(Errno::EXDEV) => true,
        Err(e) => return Err(e.into()),
    };
    Ok(Some(SeenFile { inode: through, mounted }))
}

/// Mounts `source` on the placeholder `name` in `dir` as it is seen in `namespace`; `false` when it was there.
pub(super) fn mount(
    namespace: &OwnedFd,
    dir: (&Path, Inode),
    name: &str,
    placeholder: Inode,
    source: &OwnedFd,
    read_only: bool,
) -> io::Result<bool> {
    let wanted = inode_of(source)?;
    let tree = detached(source, read_only)?;
    within(namespace, move || {
        let dir = directory(dir.0, dir.1)?;
        let right = SeenFile { inode: wanted, mounted: true };
        match look(&dir, name)? {
            Some(seen) if seen == right => return Ok(false),
            Some(seen) if seen.mounted => return Err(changed("what is mounted there")),
            _ => {}
        }
        let on = open_name(&dir, name, ResolveFlag::RESOLVE_NO_XDEV)?;
        // A number of a file that was removed may be another's by now.
        let meta = File::from(on.as_fd().try_clone_to_owned()?).metadata()?;
        let is = Inode { dev: meta.dev(), ino: meta.ino() };
        if is != placeholder || !meta.is_file() || meta.len() > 0 {
            return Err(changed("the placeholder"));
        }
        // SAFETY: both descriptors are open, both paths empty strings that end in NUL.
        call(unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                tree.as_raw_fd(),
                c"".as_ptr(),
                on.as_raw_fd(),
                c"".as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
            )
        })?;
        match look(&dir, name)? {
            Some(seen) if seen == right => Ok(true),
            _ => Err(changed("what was mounted there")),
        }
    })
}

/// How long whoever has the file open may take to close it: a QEMU that lets go of it, a program that was just
/// started and has not yet closed what it inherited.
const CLOSING: Duration = Duration::from_secs(1);
/// The event of a close comes a moment before the mount is free.
const RETRY: Duration = Duration::from_millis(20);

/// Unmounts what is mounted on `name`; `false` when nothing is, EBUSY when somebody has it open and does not close it.
pub(super) fn unmount(namespace: &OwnedFd, dir: (&Path, Inode), name: &str) -> io::Result<bool> {
    within(namespace, move || {
        let dir = directory(dir.0, dir.1)?;
        if !look(&dir, name)?.is_some_and(|seen| seen.mounted) {
            return Ok(false);
        }
        // This thread's directory is its own, so that the name is one beneath the directory that was proven.
        nix::unistd::fchdir(&dir)?;
        let (end, mut closes) = (Instant::now() + CLOSING, None);
        loop {
            match umount2(name, MntFlags::UMOUNT_NOFOLLOW) {
                Err(Errno::EBUSY) if Instant::now() < end => {}
                other => return other.map(|()| true).map_err(io::Error::from),
            }
            await_close(closes.get_or_insert_with(|| closes_of(name)).as_ref());
        }
    })
}

/// The closes of a file, by its name in this thread's directory. `None` where no watch is to be had.
fn closes_of(name: &str) -> Option<Inotify> {
    let closes = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
    closes.add_watch(name, AddWatchFlags::IN_CLOSE | AddWatchFlags::IN_DONT_FOLLOW).ok()?;
    Some(closes)
}

/// Waits for a close, for a short time: whatever comes, or does not, it is tried again.
fn await_close(closes: Option<&Inotify>) {
    let wait = PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::ZERO);
    let watched = closes.map(|closes| PollFd::new(closes.as_fd(), PollFlags::POLLIN));
    let _ = poll(&mut watched.into_iter().collect::<Vec<_>>(), wait);
    let _ = closes.map(Inotify::read_events);
}

/// What is there, as it is seen in `namespace`.
pub(super) fn observe(
    namespace: &OwnedFd,
    dir: (&Path, Inode),
    name: &str,
) -> io::Result<Option<SeenFile>> {
    within(namespace, move || look(&directory(dir.0, dir.1)?, name))
}

#[cfg(test)]
mod tests {
    use super::super::container::{Pod, inode};
    use super::*;

    fn path_fd(path: &Path) -> OwnedFd {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC);
        openat2(AT_FDCWD, path, how).unwrap()
    }

    /// A pod with a placeholder.
    fn pod() -> Option<Pod> {
        let pod = Pod::new()?;
        std::fs::write(pod.hotplug.join("disk"), "").unwrap();
        Some(pod)
    }

    impl Pod {
        fn dir(&self) -> (&Path, Inode) {
            (&self.hotplug, inode(&self.hotplug))
        }

        fn on(&self, placeholder: Inode, read_only: bool) -> io::Result<bool> {
            let source = path_fd(&self.source);
            mount(&self.namespace(), self.dir(), "disk", placeholder, &source, read_only)
        }

        fn mount(&self, read_only: bool) -> io::Result<bool> {
            self.on(inode(&self.hotplug.join("disk")), read_only)
        }

        fn observe(&self) -> Option<SeenFile> {
            observe(&self.namespace(), self.dir(), "disk").unwrap()
        }

        fn unmount(&self) -> io::Result<bool> {
            unmount(&self.namespace(), self.dir(), "disk")
        }
    }

    #[test]
    fn root_a_file_is_seen_in_the_pod_alone_and_goes_again() {
        let Some(pod) = pod() else { return };
        assert!(pod.mount(false).unwrap());
        assert!(!pod.mount(false).unwrap(), "it is there already");
        assert_eq!(std::fs::read_to_string(pod.sees("disk")).unwrap(), "data");
        std::fs::write(pod.sees("disk"), "written").unwrap();
        assert_eq!(std::fs::read_to_string(&pod.source).unwrap(), "written");
        assert_eq!(std::fs::read_to_string(pod.hotplug.join("disk")).unwrap(), "");
        let source = inode(&pod.source);
        assert_eq!(pod.observe(), Some(SeenFile { inode: source, mounted: true }));
        let open = File::open(pod.sees("disk")).unwrap();
        assert_eq!(pod.unmount().unwrap_err().raw_os_error(), Some(libc::EBUSY));
        // Whoever is about to close it is waited for.
        std::thread::scope(|scope| {
            let unmount = scope.spawn(|| pod.unmount());
            drop(open);
            assert!(unmount.join().unwrap().unwrap());
        });
        assert!(!pod.unmount().unwrap());
        let placeholder = inode(&pod.hotplug.join("disk"));
        assert_eq!(pod.observe(), Some(SeenFile { inode: placeholder, mounted: false }));
    }

    #[test]
    fn root_a_mount_goes_with_its_placeholder() {
        let Some(pod) = pod() else { return };
        assert!(pod.mount(false).unwrap());
        let open = File::open(pod.sees("disk")).unwrap();
        std::fs::remove_file(pod.hotplug.join("disk")).unwrap();
        assert_eq!(pod.observe(), None);
        assert!(!pod.mounts().contains("hotplug/disk"));
        let text = io::read_to_string(open).unwrap();
        assert_eq!(text, "data", "whoever has it open keeps it");
    }

    #[test]
    fn root_a_read_only_file_cannot_be_written_nor_executed() {
        let Some(pod) = pod() else { return };
        assert!(pod.mount(true).unwrap());
        let error = std::fs::write(pod.sees("disk"), "x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        let mounts = crate::host::mounts::parse(&pod.mounts());
        let ours = mounts.iter().find(|m| m.mount_point.ends_with("hotplug/disk")).unwrap();
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(ours.options.iter().any(|o| o == option), "{:?}", ours.options);
        }
    }

    #[test]
    fn root_nothing_is_mounted_where_the_pod_has_exchanged_something() {
        let Some(pod) = pod() else { return };
        let placeholder = inode(&pod.hotplug.join("disk"));
        std::fs::remove_file(pod.hotplug.join("disk")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", pod.hotplug.join("disk")).unwrap();
        let refused = |placeholder| {
            let error = pod.on(placeholder, false).unwrap_err();
            assert!(is_changed(&error) && error.to_string().contains("placeholder"), "{error}");
        };
        refused(placeholder);
        // Nor where the symlink has the number of the file that was removed.
        refused(inode(&pod.hotplug.join("disk")));
        std::fs::remove_file(pod.hotplug.join("disk")).unwrap();
        std::fs::write(pod.hotplug.join("other"), "").unwrap();
        std::fs::write(pod.hotplug.join("disk"), "").unwrap();
        refused(inode(&pod.hotplug.join("other")));
        let elsewhere = (pod.dir().0, inode(&pod.source));
        let placeholder = inode(&pod.hotplug.join("disk"));
        let source = path_fd(&pod.source);
        let error = mount(&pod.namespace(), elsewhere, "disk", placeholder, &source, false);
        assert!(error.unwrap_err().to_string().contains("hotplug directory"));
    }
}
