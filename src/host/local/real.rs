//! What is on the real host.

use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

use super::{LocalSources, SourceError};
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

#[async_trait]
impl LocalSources for RealLocalSources {
    async fn block(&self, root: &Path, rest: &Path) -> Result<DevNum, SourceError> {
        let path = root.join(rest);
        let at = Beneath { root: root.to_owned(), rest: rest.to_owned() };
        // The outer result is the worker's, the inner one what was found.
        let call = move || Ok(at.block());
        let ran = self.workers.run(&path.to_string_lossy(), self.deadline, call).await;
        ran.unwrap_or_else(|source| Err(SourceError::Io { path, source }))
    }
}

/// A path beneath a configured directory.
struct Beneath {
    root: PathBuf,
    rest: PathBuf,
}

impl Beneath {
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
        let local = LocalSettings { block_roots: vec!["/dev".into()], without_identity };
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
