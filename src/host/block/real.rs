//! Block devices of the real host.
#![allow(unsafe_code)]

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{Mode, SFlag, mknod};
use tokio::sync::oneshot;

use super::processes::Processes;
use super::{Blocks, Exclusive, dm};
use crate::host::workers::Workers;
use crate::types::DevNum;

mod ioctls {
    #![allow(missing_docs)]
    // BLKFLSBUF, include/uapi/linux/fs.h.
    nix::ioctl_none_bad!(blkflsbuf, 0x1261);
}

/// Real block devices.
pub struct RealBlocks {
    opener: Arc<Opener>,
    processes: Arc<Processes>,
    asked: Arc<Asked>,
    workers: Workers,
    deadline: Duration,
}

impl RealBlocks {
    /// `nodes` is a directory of our own for device nodes that live for one open(2). It must not be
    /// on a `nodev` mount, which systemd makes of /run: beneath /dev it is fine. `deadline` is for
    /// one call.
    pub fn new(nodes: impl Into<PathBuf>, deadline: Duration) -> Self {
        Self {
            opener: Arc::new(Opener { nodes: nodes.into(), count: AtomicU64::new(0) }),
            processes: Arc::new(Processes::of_host()),
            asked: Arc::default(),
            workers: Workers::new("lunplug-block", 64, 2),
            deadline,
        }
    }

    /// Calls that are past their deadline and still in the kernel.
    pub fn stuck(&self) -> u64 {
        self.workers.stuck()
    }
}

/// Opens devices by number.
struct Opener {
    nodes: PathBuf,
    count: AtomicU64,
}

impl Opener {
    /// Opens read-only, so that udev, which watches for writers, does not probe the device again
    /// when it is closed.
    fn open(&self, dev: DevNum, flags: libc::c_int) -> io::Result<File> {
        match self.by_node(dev, flags) {
            Ok(file) => check(file, dev),
            // No leave to make a node here, or not one that can be opened: use udev's link.
            Err(e) if is_refusal(&e) => check(open(&device_link(dev), flags)?, dev),
            Err(e) => Err(e),
        }
    }

    /// Opens it exclusively; `None` where somebody else has claimed it.
    fn claim(&self, dev: DevNum) -> io::Result<Option<File>> {
        match self.open(dev, libc::O_EXCL) {
            Ok(claimed) => Ok(Some(claimed)),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn by_node(&self, dev: DevNum, flags: libc::c_int) -> io::Result<File> {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        let node = self.nodes.join(format!("{dev}.{}.{n}", std::process::id()));
        let make = || mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, dev.to_dev_t());
        match make() {
            Err(Errno::ENOENT) => {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.nodes)?;
                make()?;
            }
            // A crash between mknod and unlink has left the name.
            Err(Errno::EEXIST) => {
                fs::remove_file(&node)?;
                make()?;
            }
            made => made?,
        }
        let opened = open(&node, flags);
        fs::remove_file(&node)?;
        opened
    }
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPERM | libc::EACCES | libc::EROFS | libc::ENOENT | libc::ENOTDIR)
    )
}

fn device_link(dev: DevNum) -> PathBuf {
    PathBuf::from(format!("/dev/block/{dev}"))
}

fn open(path: &Path, flags: libc::c_int) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(flags | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
}

/// That it is the device which was asked for, and a block device at all.
fn check(file: File, dev: DevNum) -> io::Result<File> {
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() && meta.rdev() == dev.to_dev_t() {
        return Ok(file);
    }
    Err(io::Error::other(format!("what was opened is not the block device {dev}")))
}

fn flush(file: &File) -> io::Result<()> {
    file.sync_all()?;
    // SAFETY: the descriptor is open for the time of the call, and the request takes no argument.
    unsafe { ioctls::blkflsbuf(file.as_raw_fd()) }?;
    Ok(())
}

/// Who waits to be told who has a device open. A look at all processes takes as long as there are
/// descriptors on the node, so it serves for all who wait when it begins.
#[derive(Default)]
struct Asked(Mutex<Vec<Question>>);

type Question = (Vec<DevNum>, oneshot::Sender<Openers>);

/// Those of each device that was asked about.
type Openers = Result<Vec<Vec<String>>, (io::ErrorKind, String)>;

impl Asked {
    fn lock(&self) -> MutexGuard<'_, Vec<Question>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, devs: &[DevNum]) -> oneshot::Receiver<Openers> {
        let (tell, told) = oneshot::channel();
        self.lock().push((devs.to_vec(), tell));
        told
    }

    /// Looks once for all who have asked by now.
    fn answer(&self, processes: &Processes) {
        let asked = std::mem::take(&mut *self.lock());
        let devices = asked.iter().flat_map(|(devs, _)| devs);
        let devices: HashSet<u64> = devices.map(|dev| dev.to_dev_t()).collect();
        if devices.is_empty() {
            return;
        }
        let found = processes.openers(&devices).map_err(|e| (e.kind(), e.to_string()));
        for (devs, tell) in asked {
            let each = |all: &HashMap<u64, Vec<String>>| {
                let of = |dev: &DevNum| all.get(&dev.to_dev_t()).cloned().unwrap_or_default();
                devs.iter().map(of).collect()
            };
            // Who has given up does not listen.
            let _ = tell.send(found.as_ref().map(each).map_err(Clone::clone));
        }
    }
}

#[async_trait]
impl Blocks for RealBlocks {
    async fn flush(&self, dev: DevNum) -> io::Result<()> {
        let opener = self.opener.clone();
        let call = move || flush(&opener.open(dev, 0)?);
        self.workers.run(&dev.to_string(), self.deadline, call).await
    }

    async fn flush_unclaimed(&self, dev: DevNum) -> io::Result<Exclusive> {
        let opener = self.opener.clone();
        let call = move || match opener.claim(dev)? {
            Some(claimed) => flush(&claimed).map(|()| Exclusive::Free),
            None => Ok(Exclusive::Held),
        };
        self.workers.run(&dev.to_string(), self.deadline, call).await
    }

    async fn exclusive(&self, dev: DevNum) -> io::Result<Exclusive> {
        let opener = self.opener.clone();
        let call = move || {
            let claimed = opener.claim(dev)?;
            Ok(claimed.map_or(Exclusive::Held, |_| Exclusive::Free))
        };
        self.workers.run(&dev.to_string(), self.deadline, call).await
    }

    async fn mapped(&self, uuid: &str) -> io::Result<Option<DevNum>> {
        let uuid = uuid.to_owned();
        self.workers.run("dm", self.deadline, move || dm::number(&uuid)).await
    }

    async fn failed_paths(&self, maps: &[DevNum]) -> io::Result<Vec<BTreeSet<DevNum>>> {
        let maps = maps.to_vec();
        self.workers.run("dm", self.deadline, move || dm::failed_paths(&maps)).await
    }

    async fn openers(&self, devs: &[DevNum]) -> io::Result<Vec<Vec<String>>> {
        let (processes, asked) = (self.processes.clone(), self.asked.clone());
        let told = self.asked.ask(devs);
        let look = async {
            // A key of its own: a device that hangs does not hide who has it open.
            let looked = self.workers.run("proc", self.deadline, move || {
                asked.answer(&processes);
                Ok(())
            });
            looked.await?;
            // By this look, or by one that has begun since it was asked.
            let told = told.await.map_err(io::Error::other)?;
            told.map_err(|(kind, text)| io::Error::new(kind, text))
        };
        let in_time = tokio::time::timeout(self.deadline, look).await;
        in_time.unwrap_or_else(|_| {
            let text = format!("no look at all processes has ended within {:?}", self.deadline);
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn blocks(dir: &Path) -> RealBlocks {
        RealBlocks::new(dir.join("nodes"), LONG)
    }

    #[tokio::test]
    async fn a_device_that_does_not_exist_is_an_error_and_leaves_no_node() {
        let dir = tempfile::tempdir().unwrap();
        let blocks = blocks(dir.path());
        // Major 60 to 63 are for local use; nothing has them.
        let none = DevNum { major: 60, minor: 7 };
        assert!(blocks.exclusive(none).await.is_err());
        assert!(blocks.flush(none).await.is_err());
        let left = fs::read_dir(dir.path().join("nodes")).map_or(0, Iterator::count);
        assert_eq!(left, 0);
        assert_eq!(blocks.openers(&[none]).await.unwrap(), [[""; 0]]);
    }

    #[test]
    fn another_file_is_not_taken_for_the_device() {
        let file = File::open("/dev/null").unwrap();
        assert!(check(file, DevNum { major: 1, minor: 3 }).is_err());
    }

    /// A loop device on a file of 1 MiB; detached when dropped.
    struct Loop(File);

    mod loop_ioctls {
        // include/uapi/linux/loop.h.
        nix::ioctl_none_bad!(get_free, 0x4C82);
        nix::ioctl_write_int_bad!(set_fd, 0x4C00);
        nix::ioctl_none_bad!(clr_fd, 0x4C01);
    }

    impl Loop {
        fn new(dir: &Path) -> (Self, DevNum) {
            let backing = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(dir.join("disk"))
                .unwrap();
            backing.set_len(1 << 20).unwrap();
            let control = File::options().read(true).write(true).open("/dev/loop-control").unwrap();
            // SAFETY: both descriptors are open, and these requests take an integer or nothing.
            let n = unsafe { loop_ioctls::get_free(control.as_raw_fd()) }.unwrap();
            let dev = DevNum { major: 7, minor: u32::try_from(n).unwrap() };
            let node = dir.join("loop");
            mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR | Mode::S_IWUSR, dev.to_dev_t()).unwrap();
            let device = File::options().read(true).write(true).open(&node).unwrap();
            // SAFETY: as above; the kernel takes its own reference to the backing file.
            unsafe { loop_ioctls::set_fd(device.as_raw_fd(), backing.as_raw_fd()) }.unwrap();
            (Self(device), dev)
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            // SAFETY: the descriptor is open and the request takes nothing.
            let _ = unsafe { loop_ioctls::clr_fd(self.0.as_raw_fd()) };
        }
    }

    #[tokio::test]
    async fn root_a_real_device_is_flushed_and_probed_by_number() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: loop devices need root");
            return;
        }
        // Not beneath /tmp, which may be mounted nodev.
        let dir = tempfile::tempdir_in("/dev").unwrap();
        let blocks = blocks(dir.path());
        let (_device, dev) = Loop::new(dir.path());
        blocks.flush(dev).await.unwrap();
        assert_eq!(blocks.exclusive(dev).await.unwrap(), Exclusive::Free);
        let holder = open(&dir.path().join("loop"), libc::O_EXCL).unwrap();
        assert_eq!(blocks.exclusive(dev).await.unwrap(), Exclusive::Held);
        drop(holder);
        assert_eq!(blocks.exclusive(dev).await.unwrap(), Exclusive::Free);
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .stdin(File::open(dir.path().join("loop")).unwrap())
            .spawn()
            .unwrap();
        let expected = format!("sleep[{}]", child.id());
        let openers = blocks.openers(&[dev]).await.unwrap().concat();
        // However it was told, /proc says the same.
        let in_proc = Processes::below(Path::new("/proc")).openers(&[dev.to_dev_t()].into());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(openers, std::slice::from_ref(&expected));
        assert_eq!(in_proc.unwrap(), [(dev.to_dev_t(), vec![expected])].into());
        assert_eq!(fs::read_dir(dir.path().join("nodes")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn one_look_answers_all_who_have_asked() {
        let proc = tempfile::tempdir().unwrap();
        let asked = Asked::default();
        let devs = [1, 2, 3].map(|minor| DevNum { major: 60, minor });
        let [one, others] = [&devs[..1], &devs[1..]].map(|devs| asked.ask(devs));
        asked.answer(&Processes::below(proc.path()));
        assert_eq!(one.await.unwrap(), Ok(vec![vec![]]));
        assert_eq!(others.await.unwrap(), Ok(vec![vec![], vec![]]));
        let late = asked.ask(&devs);
        asked.answer(&Processes::below(&proc.path().join("absent")));
        assert_eq!(late.await.unwrap().unwrap_err().0, io::ErrorKind::NotFound);
    }
}
