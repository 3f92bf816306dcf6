//! What is on the real host.

use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, OFlag, OpenHow, ResolveFlag, fcntl, openat2};
use nix::libc;
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::{FILE_HEAD, FileSeen, HostFile, LocalSources, SourceError};
use crate::host::poddir::{Inode, proc_path};
use crate::host::workers::Workers;
use crate::types::DevNum;

/// The real host's.
pub struct RealLocalSources {
    workers: Workers,
    deadline: Duration,
}

impl RealLocalSources {
    /// `deadline` is for one call: a directory may be on a file system that hangs.
    pub fn new(deadline: Duration) -> Self {
        Self { workers: Workers::new("lunplug-local", 16, 2), deadline }
    }

    /// Calls that are past their deadline and still in the kernel.
    pub fn stuck(&self) -> u64 {
        self.workers.stuck()
    }
}

impl RealLocalSources {
    async fn run<T: Send + 'static>(
        &self,
        at: Beneath,
        call: impl FnOnce(Beneath) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let path = at.path();
        // The outer result is the worker's, the inner one what was found.
        let call = move || Ok(call(at));
        let ran = self.workers.run(&path.to_string_lossy(), self.deadline, call).await;
        ran.unwrap_or_else(|source| Err(SourceError::Io { path, source }))
    }
}

#[async_trait]
impl LocalSources for RealLocalSources {
    async fn block(&self, root: &Path, rest: &Path) -> Result<DevNum, SourceError> {
        self.run(Beneath::new(root, rest), |at| at.block()).await
    }

    async fn file(&self, root: &Path, rest: &Path) -> Result<FileSeen, SourceError> {
        self.run(Beneath::new(root, rest), |at| at.file()).await
    }

    async fn sync(&self, file: &HostFile) -> Result<(), SourceError> {
        let at = Beneath::new(&file.root, &file.rest);
        let file = file.clone();
        let sync = move |at: Beneath| {
            let opened = File::open(proc_path(&open_file(&file)?)).map_err(|e| at.io(e))?;
            opened.sync_all().map_err(|e| at.io(e))
        };
        self.run(at, sync).await
    }
}

/// Opens a file as O_PATH, if it is still the one that it was.
pub(in crate::host) fn open_file(file: &HostFile) -> Result<File, SourceError> {
    let (found, meta) = Beneath::new(&file.root, &file.rest).regular()?;
    if inode_of(&meta) == file.inode { Ok(found) } else { Err(SourceError::Exchanged(file.path())) }
}

fn inode_of(meta: &Metadata) -> Inode {
    Inode { dev: meta.dev(), ino: meta.ino() }
}

/// The bytes that QEMU locks of an image that it has open: 100 and on for what it does, 200 and on for what it
/// lets others do (block/file-posix.c).
const QEMU_LOCKS: (i64, i64) = (100, 164);

/// Whether somebody has such a lock, though only to read.
fn locked(file: &File) -> io::Result<bool> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: QEMU_LOCKS.0,
        l_len: QEMU_LOCKS.1,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
        Ok(_) => Ok(lock.l_type != libc::F_UNLCK as i16),
        // A file system that has no locks keeps QEMU from having any.
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOLCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// A path beneath a configured directory.
struct Beneath {
    root: PathBuf,
    rest: PathBuf,
}

impl Beneath {
    fn new(root: &Path, rest: &Path) -> Self {
        Self { root: root.to_owned(), rest: rest.to_owned() }
    }

    fn path(&self) -> PathBuf {
        self.root.join(&self.rest)
    }

    fn io(&self, source: impl Into<io::Error>) -> SourceError {
        SourceError::Io { path: self.path(), source: source.into() }
    }

    /// Opens it as O_PATH: no driver is asked, and a `nodev` mount does not matter.
    fn open(&self, resolve: ResolveFlag) -> Result<File, SourceError> {
        // The directory is the configuration's word, so its own symlinks are followed.
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        let root = match openat2(AT_FDCWD, &self.root, how) {
            Ok(root) => root,
            Err(Errno::ENOENT | Errno::ENOTDIR) => {
                return Err(SourceError::NotThere(self.root.clone()));
            }
            Err(source) => {
                let path = self.root.clone();
                return Err(SourceError::Io { path, source: source.into() });
            }
        };
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
        match openat2(&root, &self.rest, how) {
            Ok(fd) => Ok(File::from(fd)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Err(SourceError::NotThere(self.path())),
            Err(Errno::ELOOP) if resolve.contains(ResolveFlag::RESOLVE_NO_SYMLINKS) => {
                Err(SourceError::Symlink { path: self.path(), root: self.root.clone() })
            }
            Err(Errno::EXDEV | Errno::ELOOP) => {
                Err(SourceError::Leaves { path: self.path(), root: self.root.clone() })
            }
            Err(source) => Err(self.io(source)),
        }
    }

    fn block(&self) -> Result<DevNum, SourceError> {
        let file = self.open(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS)?;
        let meta = file.metadata().map_err(|e| self.io(e))?;
        if meta.file_type().is_block_device() {
            return Ok(DevNum::from_dev_t(meta.rdev()));
        }
        let is = kind(meta.file_type());
        Err(SourceError::Other { path: self.path(), is, wanted: "a block device" })
    }

    /// A regular file, as O_PATH: a pipe or a device that is in its place is not opened.
    fn regular(&self) -> Result<(File, Metadata), SourceError> {
        let file = self.open(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        )?;
        let meta = file.metadata().map_err(|e| self.io(e))?;
        if meta.is_file() {
            return Ok((file, meta));
        }
        let is = kind(meta.file_type());
        Err(SourceError::Other { path: self.path(), is, wanted: "a regular file" })
    }

    fn file(&self) -> Result<FileSeen, SourceError> {
        let (file, meta) = self.regular()?;
        let io = |e: io::Error| self.io(e);
        let opened = File::open(proc_path(&file)).map_err(io)?;
        let mut head = vec![0; FILE_HEAD];
        let read = opened.read_at(&mut head, 0).map_err(io)?;
        head.truncate(read);
        let system = fstatvfs(&opened).map_err(|e| self.io(e))?;
        Ok(FileSeen {
            inode: inode_of(&meta),
            size: meta.len(),
            head,
            read_only: system.flags().contains(FsFlags::ST_RDONLY),
            locked: locked(&opened).map_err(io)?,
        })
    }
}

/// What something is, in words.
fn kind(is: FileType) -> &'static str {
    match is {
        is if is.is_dir() => "a directory",
        is if is.is_file() => "a regular file",
        is if is.is_block_device() => "a block device",
        is if is.is_char_device() => "a character device",
        is if is.is_fifo() => "a pipe",
        is if is.is_socket() => "a socket",
        _ => "a symlink",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::{Mode, SFlag, mknod};
    use std::os::unix::fs::{OpenOptionsExt, symlink};
    use std::process::Command;

    use crate::connector::settings::{LocalSettings, WithoutIdentity};
    use crate::connector::{
        AttachRequest, Authentication, Connector, Connectors, DetachOptions, Expect, Settings,
    };
    use crate::host::storage::{RealOptions, StorageDoors};
    use crate::reason::Reason;
    use crate::spec::MultipathPolicy;
    use crate::types::VolumeKey;

    async fn block(root: &Path, rest: &str) -> Result<DevNum, SourceError> {
        RealLocalSources::new(Duration::from_secs(60)).block(root, Path::new(rest)).await
    }

    #[tokio::test]
    async fn what_is_no_block_device_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        for (rest, says) in [("file", "a regular file"), (".", "a directory")] {
            let error = block(dir.path(), rest).await.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        for absent in ["none", "file/x"] {
            let error = block(dir.path(), absent).await.unwrap_err();
            assert!(matches!(error, SourceError::NotThere(_)), "{error}");
        }
        let error = block(&dir.path().join("no"), "x").await.unwrap_err();
        assert!(matches!(&error, SourceError::NotThere(p) if p.ends_with("no")), "{error}");
        let error = block(Path::new("/dev"), "null").await.unwrap_err().to_string();
        assert!(error.contains("a character device, not a block device"), "{error}");
    }

    #[tokio::test]
    async fn nothing_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        std::fs::write(outside.join("disk"), "").unwrap();
        symlink("../outside/disk", root.join("relative")).unwrap();
        symlink(outside.join("disk"), root.join("absolute")).unwrap();
        symlink("../outside", root.join("directory")).unwrap();
        symlink("/proc/self/fd/0", root.join("magic")).unwrap();
        symlink("circle", root.join("circle")).unwrap();
        for rest in ["relative", "absolute", "directory/disk", "magic", "circle", "../outside/disk"]
        {
            let error = block(&root, rest).await.unwrap_err();
            assert!(matches!(error, SourceError::Leaves { .. }), "{rest}: {error}");
        }
        // One that stays beneath it is followed.
        symlink("../outside/disk", outside.join("again")).unwrap();
        let error = block(dir.path(), "outside/again").await.unwrap_err().to_string();
        assert!(error.contains("a regular file"), "{error}");
    }

    async fn file(root: &Path, rest: &str) -> Result<FileSeen, SourceError> {
        RealLocalSources::new(Duration::from_secs(60)).file(root, Path::new(rest)).await
    }

    #[tokio::test]
    async fn a_file_is_found_without_a_symlink_and_nothing_else_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir(root.join("pvc")).unwrap();
        std::fs::write(root.join("pvc/disk.img"), [7; 4096]).unwrap();
        let seen = file(root, "pvc/disk.img").await.unwrap();
        let meta = std::fs::metadata(root.join("pvc/disk.img")).unwrap();
        assert_eq!((seen.inode.dev, seen.inode.ino), (meta.dev(), meta.ino()));
        assert_eq!((seen.size, seen.head.len(), seen.locked), (4096, FILE_HEAD, false));
        std::fs::write(root.join("short"), "abc").unwrap();
        assert_eq!(file(root, "short").await.unwrap().head, b"abc");

        symlink("pvc/disk.img", root.join("link")).unwrap();
        symlink("pvc", root.join("dir")).unwrap();
        for rest in ["link", "dir/disk.img"] {
            let error = file(root, rest).await.unwrap_err();
            assert!(matches!(error, SourceError::Symlink { .. }), "{rest}: {error}");
        }
        // Opening it would wait for a writer.
        nix::unistd::mkfifo(&root.join("pipe"), Mode::S_IRWXU).unwrap();
        for (rest, is) in [("pipe", "a pipe"), ("pvc", "a directory")] {
            let error = file(root, rest).await.unwrap_err().to_string();
            assert!(error.contains(is) && error.contains("a regular file"), "{error}");
        }
        assert!(matches!(file(root, "none").await, Err(SourceError::NotThere(_))));
        assert!(matches!(file(root, "../x").await, Err(SourceError::Leaves { .. })));
    }

    #[tokio::test]
    async fn the_lock_of_a_qemu_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 512]).unwrap();
        let qemu = File::open(&path).unwrap();
        // BLK_PERM_CONSISTENT_READ, which every QEMU holds that has it open.
        let lock = libc::flock {
            l_type: libc::F_RDLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: QEMU_LOCKS.0,
            l_len: 1,
            l_pid: 0,
        };
        fcntl(&qemu, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert!(file(dir.path(), "disk").await.unwrap().locked);
        drop(qemu);
        assert!(!file(dir.path(), "disk").await.unwrap().locked);
    }

    #[tokio::test]
    async fn a_file_that_was_exchanged_is_not_synced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("disk"), "a").unwrap();
        std::fs::write(dir.path().join("other"), "b").unwrap();
        let inode = file(dir.path(), "disk").await.unwrap().inode;
        let host = HostFile { root: dir.path().into(), rest: "disk".into(), inode };
        let local = RealLocalSources::new(Duration::from_secs(60));
        local.sync(&host).await.unwrap();
        std::fs::rename(dir.path().join("other"), dir.path().join("disk")).unwrap();
        let error = local.sync(&host).await.unwrap_err();
        assert!(matches!(error, SourceError::Exchanged(_)), "{error}");
    }

    #[tokio::test]
    async fn root_a_device_is_found_by_its_number() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: device nodes need root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let number = DevNum { major: 7, minor: 250 };
        let node = dir.path().join("node");
        mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR, number.to_dev_t()).unwrap();
        std::fs::create_dir(dir.path().join("by-id")).unwrap();
        symlink("../node", dir.path().join("by-id/wwn")).unwrap();
        for rest in ["node", "by-id/wwn"] {
            assert_eq!(block(dir.path(), rest).await.unwrap(), number);
        }
    }

    /// A loop device on a file, by losetup(8); detached when dropped.
    struct Loop(String);

    impl Loop {
        fn new(file: &Path) -> Option<Self> {
            File::create(file).unwrap().set_len(1 << 20).unwrap();
            let losetup = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
            let ran = losetup.ok().filter(|ran| ran.status.success())?;
            Some(Self(String::from_utf8(ran.stdout).unwrap().trim().to_owned()))
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.0]).status();
        }
    }

    fn request(source: &str) -> AttachRequest {
        AttachRequest {
            owner: VolumeKey { vm: "ns/vm".parse().unwrap(), volume: "a".parse().unwrap() },
            source: source.parse().unwrap(),
            expect: Expect::default(),
            multipath: MultipathPolicy::Preferred,
            shareable: false,
            read_only: false,
            authentication: Authentication::None,
        }
    }

    /// The whole way on the real kernel: by path, number and sequence number, with an exclusive probe.
    #[tokio::test]
    async fn root_a_loop_device_is_attached_held_grown_and_let_go() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: loop devices need root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        let Some(device) = Loop::new(&file) else {
            eprintln!("skipped: no loop device can be made here");
            return;
        };
        let options = RealOptions {
            run_dir: dir.path().join("run"),
            nodes: format!("/dev/.lunplug-test-{}", std::process::id()).into(),
            ..RealOptions::default()
        };
        let doors = StorageDoors::real(&options).unwrap();
        let without_identity = WithoutIdentity::Path;
        let block_roots = vec!["/dev".into()];
        let local = LocalSettings { block_roots, file_roots: Vec::new(), without_identity };
        let settings = Settings { local, holders_ms: 500, ..Settings::default() };
        let connector = Connectors::new(doors, settings);
        let request = request(&format!("block://{}", device.0));
        let (owner, source) = (&request.owner, &request.source);

        let holder =
            File::options().read(true).custom_flags(nix::libc::O_EXCL).open(&device.0).unwrap();
        let error = connector.attach(&request).await.unwrap_err();
        assert_eq!(error.reason(), Reason::DeviceHeld, "{error}");
        drop(holder);
        let attached = connector.attach(&request).await.unwrap().into_inner();
        assert_eq!(attached.device.size, 1 << 20);
        assert_eq!(attached.device.wwid.as_str(), format!("path.{}", device.0));
        assert!(!connector.attach(&request).await.unwrap().changed());

        File::options().write(true).open(&file).unwrap().set_len(2 << 20).unwrap();
        assert!(Command::new("losetup").args(["-c", &device.0]).status().unwrap().success());
        let measured = connector.measure(owner, source, None).await.unwrap();
        assert_eq!(measured.now, 2 << 20);
        connector.grow(owner, source, 2 << 20).await.unwrap();

        assert!(connector.detach(owner, source, DetachOptions::default()).await.unwrap().changed());
        assert!(connector.owners().await.unwrap().is_empty());
        assert!(Path::new(&device.0).exists(), "it is left as it was");
        let _ = std::fs::remove_dir(&options.nodes);
    }
}
