//! /run/lunplug on the real host.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::{LockError, LockGuard, RunDir, check_name, temporary};
use crate::host::keyed::Keyed;
use crate::host::short;
use crate::host::workers::Workers;

/// How often a lock is tried when no event tells that it is free: a holder that was killed lets go
/// a moment after the event of its close.
const RETRY: Duration = Duration::from_millis(200);
/// Only a disk in great trouble takes this long.
const FILE_DEADLINE: Duration = Duration::from_secs(20);

/// The real run directory.
pub struct RealRunDir {
    base: PathBuf,
    boot_id: String,
    /// Whether it is in memory, as /run is: then its files are read and written where that is asked for. A trip to
    /// another thread and back takes ten times as long as such a call.
    in_memory: bool,
    workers: Workers,
    /// Within this process a lock is queued for here, so that only one waits in the kernel.
    queues: Mutex<Keyed<tokio::sync::Mutex<()>>>,
}

impl RealRunDir {
    /// Makes the directory (mode 0700) if need be. One that is a symlink, belongs to someone else
    /// or can be written by others is refused. What killed writers left in it is removed.
    pub fn open(base: impl Into<PathBuf>) -> io::Result<Self> {
        let base = base.into();
        make_dirs(&base)?;
        let meta = fs::symlink_metadata(&base)?;
        if !meta.is_dir()
            || meta.uid() != nix::unistd::geteuid().as_raw()
            || meta.permissions().mode() & 0o022 != 0
        {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "{} must be a directory of our own that nobody else can write; remove it or set run_dir",
                    base.display()
                ),
            ));
        }
        temporary::sweep(&base)?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let in_memory = statfs(&base)?.filesystem_type() == TMPFS_MAGIC;
        Ok(Self {
            base,
            boot_id,
            in_memory,
            workers: Workers::new("lunplug-run", 8, 8),
            queues: Mutex::default(),
        })
    }

    fn path(&self, name: &str) -> io::Result<PathBuf> {
        check_name(name)?;
        Ok(self.base.join(name))
    }

    fn queue(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.get(name, tokio::sync::Mutex::default)
    }

    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if self.in_memory {
            return call();
        }
        self.workers.run("run", FILE_DEADLINE, call).await
    }

    /// Waits for the file's lock; `None` after `end`.
    async fn acquire(&self, path: PathBuf, end: Option<Instant>) -> io::Result<Option<Locked>> {
        let open = move || {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = in_dir_of(&path, || options.open(&path))?;
            Ok((file, path))
        };
        let (file, path) = self.run(open).await?;
        if set_lock(&file, libc::F_WRLCK)? {
            return Ok(Some(Locked(file)));
        }
        let Some(end) = end else { return Ok(None) };
        // Whoever has it has the file open for writing: its close is an event. The watch is set
        // before the lock is tried again, so that none is missed.
        let closed = Watch::new(&path)?;
        loop {
            if set_lock(&file, libc::F_WRLCK)? {
                return Ok(Some(Locked(file)));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            let next = end.min(Instant::now() + RETRY);
            // Either way it is tried again.
            let _ = tokio::time::timeout_at(next, closed.event()).await;
        }
    }
}

/// A file's closes by writers.
struct Watch(AsyncFd<InotifyFd>);

struct InotifyFd(Inotify);

impl AsRawFd for InotifyFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(path, AddWatchFlags::IN_CLOSE_WRITE)?;
        // SAFETY: `InotifyFd` owns its descriptor and always names the same one, until it is dropped.
        let registered = unsafe { AsyncFd::register(InotifyFd(inotify)) }?;
        Ok(Self(registered))
    }

    async fn event(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let read = ready.try_io(|fd| fd.get_ref().0.read_events().map_err(io::Error::from));
            match read {
                Ok(result) => return result.map(drop),
                Err(_) => continue,
            }
        }
    }
}

/// Sets or releases the OFD lock of the whole file; `false` when somebody else has it.
pub(in crate::host) fn set_lock(file: &File, kind: libc::c_int) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// The open file that has the lock.
struct Locked(File);

impl Drop for Locked {
    fn drop(&mut self) {
        // close() would release it too, but only after the event that wakes those who wait.
        let _ = set_lock(&self.0, libc::F_UNLCK);
    }
}

struct RealLock {
    // In this order: the kernel's lock is free before the next in our queue tries it.
    _file: Locked,
    _turn: tokio::sync::OwnedMutexGuard<()>,
}
impl LockGuard for RealLock {}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match short::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes a file; the directory that it is to be in is there but for the first time.
fn in_dir_of<T>(path: &Path, make: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match make() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            make_dirs(path.parent().unwrap_or(Path::new("/")))?;
            make()
        }
        made => made,
    }
}

fn make_dirs(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

#[async_trait]
impl RunDir for RealRunDir {
    async fn lock(&self, name: &str, deadline: Duration) -> Result<Box<dyn LockGuard>, LockError> {
        let io = |source| LockError::Io { name: name.to_owned(), source };
        let timed_out = || LockError::TimedOut { name: name.to_owned(), deadline };
        let path = self.path(name).map_err(io)?;
        let end = (!deadline.is_zero()).then(|| Instant::now() + deadline);
        let queue = self.queue(name);
        let turn = match end {
            None => queue.try_lock_owned().map_err(|_| timed_out())?,
            Some(end) => {
                tokio::time::timeout_at(end, queue.lock_owned()).await.map_err(|_| timed_out())?
            }
        };
        let file = self.acquire(path, end).await.map_err(io)?.ok_or_else(timed_out)?;
        Ok(Box::new(RealLock { _file: file, _turn: turn }))
    }

    async fn load(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let path = self.path(name)?;
        self.run(move || read(&path)).await
    }

    async fn load_each(&self, names: &[String]) -> Vec<io::Result<Option<Vec<u8>>>> {
        let paths: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        let call = move || Ok(paths.into_iter().map(|path| read(&path?)).collect());
        let failed = |e: io::Error| {
            let again = |_| Err(io::Error::new(e.kind(), e.to_string()));
            names.iter().map(again).collect()
        };
        self.run(call).await.unwrap_or_else(failed)
    }

    async fn store(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (path, bytes) = (self.path(name)?, bytes.to_vec());
        let call = move || in_dir_of(&path, || temporary::replace(&path, &bytes));
        self.run(call).await
    }

    async fn remove(&self, name: &str) -> io::Result<()> {
        let path = self.path(name)?;
        let call = move || match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        self.run(call).await
    }

    async fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let path = self.path(dir)?;
        let call = move || {
            let entries = match fs::read_dir(path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                other => other?,
            };
            let mut names = Vec::new();
            for entry in entries {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type()?.is_file() && !temporary::is_temporary(&name) {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        self.run(call).await
    }

    fn boot_id(&self) -> &str {
        &self.boot_id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn rundir() -> (tempfile::TempDir, RealRunDir) {
        let dir = tempfile::tempdir().unwrap();
        let run = RealRunDir::open(dir.path().join("lunplug")).unwrap();
        (dir, run)
    }

    /// The same in memory.
    fn in_memory() -> (tempfile::TempDir, RealRunDir) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let run = RealRunDir::open(dir.path().join("lunplug")).unwrap();
        assert!(run.in_memory);
        (dir, run)
    }

    #[tokio::test]
    async fn a_lock_excludes_others_of_this_process_and_of_another() {
        let (dir, run) = rundir();
        // Its own opens, as another process has them.
        let other = RealRunDir::open(dir.path().join("lunplug")).unwrap();
        let held = run.lock("locks/target.a", LONG).await.unwrap();
        for contender in [&run, &other] {
            let busy = contender.lock("locks/target.a", Duration::ZERO).await;
            assert!(matches!(busy, Err(LockError::TimedOut { .. })));
        }
        let late = other.lock("locks/target.a", Duration::from_millis(20)).await;
        assert!(matches!(late, Err(LockError::TimedOut { .. })));
        other.lock("locks/target.b", Duration::ZERO).await.unwrap();
        drop(held);
        other.lock("locks/target.a", Duration::ZERO).await.unwrap();
    }

    #[tokio::test]
    async fn who_waits_gets_it_when_it_is_released() {
        let (dir, run) = rundir();
        let other = RealRunDir::open(dir.path().join("lunplug")).unwrap();
        let held = run.lock("x", LONG).await.unwrap();
        let waiter = tokio::spawn(async move { other.lock("x", LONG).await.map(drop) });
        tokio::task::yield_now().await;
        drop(held);
        waiter.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn files_are_whole_private_and_listed() {
        for (dir, run) in [rundir(), in_memory()] {
            check_files(&dir, &run).await;
        }
    }

    async fn check_files(dir: &tempfile::TempDir, run: &RealRunDir) {
        assert_eq!(run.load("lease/a").await.unwrap(), None);
        assert!(run.list("lease").await.unwrap().is_empty());
        run.store("lease/b", b"2").await.unwrap();
        run.store("lease/a", b"1").await.unwrap();
        run.store("lease/a", b"11").await.unwrap();
        std::fs::write(dir.path().join("lunplug/lease/.tmp-9-9"), "").unwrap();
        assert_eq!(run.list("lease").await.unwrap(), ["a", "b"]);
        assert_eq!(run.load("lease/a").await.unwrap().unwrap(), b"11");
        let names = ["lease/b", "lease/none", "../x", "lease/a"].map(str::to_owned);
        let [Ok(b), Ok(none), Err(outside), Ok(a)] = &run.load_each(&names).await[..] else {
            panic!("each for itself, in their order")
        };
        assert_eq!((a.as_deref(), b.as_deref(), none), (Some(&b"11"[..]), Some(&b"2"[..]), &None));
        assert_eq!(outside.kind(), io::ErrorKind::InvalidInput);
        let mode = |p: &str| fs::metadata(dir.path().join(p)).unwrap().mode() & 0o777;
        assert_eq!((mode("lunplug"), mode("lunplug/lease")), (0o700, 0o700));
        assert_eq!(mode("lunplug/lease/a"), 0o600);
        run.remove("lease/a").await.unwrap();
        run.remove("lease/a").await.unwrap();
        assert_eq!(run.list("lease").await.unwrap(), ["b"]);
        assert!(!run.boot_id().is_empty());
    }

    #[tokio::test]
    async fn names_stay_inside() {
        let (_dir, run) = rundir();
        for name in ["../x", "/etc/x", "a/../b", "a//b", "", "a b", "a\0"] {
            assert!(run.store(name, b"").await.is_err(), "{name:?}");
            assert!(run.lock(name, Duration::ZERO).await.is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("run");
        fs::create_dir(&base).unwrap();
        fs::set_permissions(&base, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(RealRunDir::open(&base).is_err());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(RealRunDir::open(&link).is_err());
    }
}
