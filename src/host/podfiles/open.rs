//! What QEMU's user may open: asked of the kernel, whose answer has modes, ACLs, capabilities and mounts in it.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

use super::{FileError, OpenAs};
use crate::host::local::{HostFile, open_file};
use crate::host::poddir::proc_path;

/// Opens the file as that user, without its supplementary groups, and closes it again.
pub(super) fn may_open(file: &HostFile, how: OpenAs) -> Result<(), FileError> {
    let found = open_file(file).map_err(FileError::Source)?;
    let denied = |source| FileError::NoAccess {
        path: file.path(),
        how: if how.write { "reading and writing" } else { "reading" },
        user: how.user,
        source,
    };
    match as_user(how, || open(&found, how, 0)) {
        Ok(()) => {}
        Err(source) if is_denial(&source) => return Err(denied(source)),
        Err(source) => return Err(FileError::Io { what: "opening the file", source }),
    }
    if !how.direct {
        return Ok(());
    }
    as_user(how, || open(&found, how, libc::O_DIRECT)).map_err(|source| {
        match source.raw_os_error() {
            Some(libc::EINVAL) => FileError::NoDirect(file.path()),
            _ => FileError::Io { what: "opening the file for direct I/O", source },
        }
    })
}

fn is_denial(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY))
}

fn open(found: &File, how: OpenAs, flags: i32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(how.write).custom_flags(flags | libc::O_NONBLOCK);
    options.open(proc_path(found)).map(drop)
}

/// Runs `work` on a thread of its own with that user's rights on files.
fn as_user<T: Send>(how: OpenAs, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("lunplug-open".into());
        let ran = thread.spawn_scoped(scope, || {
            // The system call is the thread's alone, glibc's function is not (nptl(7)).
            // SAFETY: no groups are given, so that nothing is read.
            if unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) } < 0
            {
                return Err(io::Error::last_os_error());
            }
            // A change from 0 takes the capabilities on files from the thread, too (setfsuid(2)).
            setfsgid(Gid::from_raw(how.user.gid));
            setfsuid(Uid::from_raw(how.user.uid));
            work()
        })?;
        ran.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::nodes::NodeOwner;
    use crate::host::poddir::Inode;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    use std::path::Path;

    const QEMU: NodeOwner = NodeOwner { uid: 64055, gid: 107 };

    fn is_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("skipped: another user's rights need root");
        }
        root
    }

    fn host_file(dir: &Path, name: &str) -> HostFile {
        let meta = std::fs::metadata(dir.join(name)).unwrap();
        let inode = Inode { dev: meta.dev(), ino: meta.ino() };
        HostFile { root: dir.into(), rest: name.into(), inode }
    }

    #[test]
    fn root_the_kernel_says_what_the_user_may() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "data").unwrap();
        let file = host_file(dir.path(), "disk");
        let may = |write| may_open(&file, OpenAs { user: QEMU, write, direct: false });
        let set = |mode, uid, gid| {
            chown(&path, Some(uid), Some(gid)).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        // Mode, owner, group; may it be read, may it be written.
        for (mode, uid, gid, reads, writes) in [
            (0o600, 0, 0, false, false),
            (0o600, QEMU.uid, 0, true, true),
            (0o400, QEMU.uid, 0, true, false),
            (0o640, 0, QEMU.gid, true, false),
            (0o660, 0, QEMU.gid, true, true),
            (0o604, 0, 0, true, false),
            // Root's groups are not QEMU's.
            (0o660, 0, 0, false, false),
        ] {
            set(mode, uid, gid);
            assert_eq!(may(false).is_ok(), reads, "{mode:o} {uid}:{gid}");
            assert_eq!(may(true).is_ok(), writes, "{mode:o} {uid}:{gid}");
        }
        set(0o600, 0, 0);
        let error = may(true).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("64055:107") && text.contains("disk"), "{text}");
        assert_eq!(error.reason(), crate::reason::Reason::FileNotAccessible);
        // This thread has kept its own rights.
        File::open(&path).unwrap();
    }

    #[test]
    fn a_file_that_was_exchanged_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk"), "data").unwrap();
        std::fs::write(dir.path().join("other"), "data").unwrap();
        let file = host_file(dir.path(), "disk");
        std::fs::rename(dir.path().join("other"), dir.path().join("disk")).unwrap();
        let how = OpenAs { user: QEMU, write: false, direct: false };
        let error = may_open(&file, how).unwrap_err();
        assert_eq!(error.reason(), crate::reason::Reason::DeviceHeld, "{error}");
    }
}
