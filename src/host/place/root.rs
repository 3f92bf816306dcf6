//! Another process's root: its files reached through descriptors, its programs run in its namespaces.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use nix::unistd::{chroot, fchdir};

use crate::host::poddir::proc_path;

/// Where distributions put system programs.
const PROGRAMS: [&str; 4] = ["usr/sbin", "usr/bin", "sbin", "bin"];

/// Roots in which all of these are the same directories are one to open-iscsi and multipath-tools, also
/// where namespaces differ: systemd gives a unit a mount namespace of its own for read-only mounts.
const ALIKE: [&str; 6] =
    ["/", "usr/sbin", "etc/iscsi", "var/lib/iscsi", "run/lock", "etc/multipath"];

/// A process's root. It keeps that file system's mounts in use while it is held, so it is not kept.
pub(crate) struct Root {
    pid: i32,
    /// The process's directory in /proc.
    process: PathBuf,
    _dir: OwnedFd,
    root: OwnedFd,
}

/// A path beneath a root, as it can be used from here.
pub(crate) struct Pinned {
    /// It leads through the descriptor.
    pub(crate) path: PathBuf,
    /// None where the path is ours anyway.
    _dir: Option<OwnedFd>,
}

impl Pinned {
    /// One beneath our own root.
    pub(crate) fn ours(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), _dir: None }
    }
}

/// How to come to a program's place; to be used once, by the child that is to become it.
pub(crate) struct Entry {
    /// Namespaces that are not ours.
    namespaces: Vec<(File, CloneFlags)>,
    root: OwnedFd,
}

impl Root {
    /// `dir` is the process's directory in /proc. Fails when the process has ended.
    pub(crate) fn open(pid: i32, dir: &OwnedFd) -> io::Result<Self> {
        let dir = dir.try_clone()?;
        let process = proc_path(&dir);
        // The magic link leads into its mount namespace.
        let root = openat(
            &dir,
            "root",
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self { pid, process, _dir: dir, root })
    }

    /// That of a process by its number.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Self::open(pid, &open(&Path::new("/proc").join(pid.to_string()), flags, Mode::empty())?)
    }

    /// Whose it is.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it is ours, as far as open-iscsi and multipath-tools can tell.
    pub(crate) fn is_ours(&self) -> bool {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open("/", flags, Mode::empty()).is_ok_and(|ours| alike(&self.root, &ours))
    }

    /// Whether both are one.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        alike(&self.root, &other.root)
    }

    /// A directory that need not be there yet: what is there of the way to it is opened, symlinks are
    /// followed as beneath that root, and nothing leads out of it.
    pub(crate) fn dir(&self, path: &str) -> io::Result<Pinned> {
        let path = Path::new(path.trim_start_matches('/'));
        for there in path.ancestors() {
            let at = if there.as_os_str().is_empty() { Path::new("/") } else { there };
            match beneath(&self.root, at, OFlag::O_PATH | OFlag::O_DIRECTORY) {
                Ok(dir) => {
                    let rest = path.strip_prefix(there).map_err(io::Error::other)?;
                    let base = proc_path(&dir);
                    // No slash at the end, lest the path has no parent.
                    let whole = if rest.as_os_str().is_empty() { base } else { base.join(rest) };
                    return Ok(Pinned { path: whole, _dir: Some(dir) });
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// A small regular file's text.
    pub(crate) fn text(&self, path: &str) -> io::Result<String> {
        let path = Path::new(path.trim_start_matches('/'));
        let file = File::from(beneath(
            &self.root,
            path,
            OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
        )?);
        if !file.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut text = String::new();
        file.take(1 << 16).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Whether what is there is a regular file; `None` where nothing is.
    pub(crate) fn is_file(&self, path: &str) -> Option<bool> {
        let file = beneath(&self.root, Path::new(path), OFlag::O_PATH).map(File::from).ok()?;
        Some(file.metadata().ok()?.is_file())
    }

    /// A program, by the path that it has there.
    pub(crate) fn program(&self, name: &str) -> Option<PathBuf> {
        let there = PROGRAMS.iter().map(|dir| Path::new(dir).join(name));
        let mut executable = there.filter(|path| {
            let file = beneath(&self.root, path, OFlag::O_PATH).map(File::from);
            let meta = file.and_then(|file| file.metadata());
            meta.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        });
        executable.next().map(|path| Path::new("/").join(path))
    }

    /// The way to it. Mounts are what a program is of; System V's semaphores, by which device-mapper's
    /// tools wait for udev, are of the IPC namespace, and udev answers in the host's.
    pub(crate) fn entry(&self) -> io::Result<Entry> {
        let mut namespaces = Vec::new();
        for (name, kind) in [("ipc", CloneFlags::CLONE_NEWIPC), ("mnt", CloneFlags::CLONE_NEWNS)] {
            let theirs = File::open(self.process.join("ns").join(name))?;
            let ours = fs::metadata(Path::new("/proc/self/ns").join(name))?;
            if theirs.metadata()?.ino() != ours.ino() {
                namespaces.push((theirs, kind));
            }
        }
        Ok(Entry { namespaces, root: self.root.try_clone()? })
    }
}

impl Entry {
    /// Takes this process there, for good. Between fork(2) and execve(2) nothing else may be called
    /// than what is safe in a signal handler: these are system calls alone.
    fn enter(&self) -> io::Result<()> {
        for (namespace, kind) in &self.namespaces {
            setns(namespace, *kind)?;
        }
        fchdir(&self.root)?;
        chroot(".")?;
        Ok(())
    }

    /// Has a command go there before it is executed; its program's path is one of there.
    pub(crate) fn prepare(self, command: &mut tokio::process::Command) {
        // SAFETY: the closure makes system calls only, with descriptors that it owns, and allocates
        // nothing: an error is an errno.
        unsafe { command.pre_exec(move || self.enter()) };
    }
}

fn beneath(root: &OwnedFd, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(root.as_fd(), path, how)?)
}

/// Two roots with the same of everything that matters, or with none of it.
fn alike(one: &OwnedFd, other: &OwnedFd) -> bool {
    let id = |root: &OwnedFd, path: &str| {
        let meta = File::from(beneath(root, Path::new(path), OFlag::O_PATH).ok()?).metadata();
        meta.ok().map(|m| (m.dev(), m.ino()))
    };
    ALIKE.iter().all(|path| id(one, path) == id(other, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory as another process's root.
    fn root(at: &Path) -> Root {
        let dir = open("/proc/self", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        let process = proc_path(&dir);
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Root { pid: 1, process, _dir: dir, root: open(at, flags, Mode::empty()).unwrap() }
    }

    fn put(dir: &Path, path: &str, mode: u32) {
        let file = dir.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "mine").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn nothing_leads_out_of_anothers_root() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "here", 0o644);
        std::os::unix::fs::symlink("/here", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("out")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo"), Mode::S_IRUSR).unwrap();
        let root = root(dir.path());
        assert_eq!(root.text("/link").unwrap(), "mine");
        assert!(root.text("out").is_err());
        assert!(root.text("fifo").is_err());
        assert!(root.text("../../etc/passwd").is_err());
        assert_eq!((root.is_file("link"), root.is_file("fifo")), (Some(true), Some(false)));
        assert_eq!(root.is_file("out"), None);
    }

    #[test]
    fn directories_are_reached_as_beneath_that_root_and_may_be_made() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("var/lib/iscsi")).unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/var/lib/iscsi", dir.path().join("etc/iscsi")).unwrap();
        let root = root(dir.path());
        let there = root.dir("/etc/iscsi").unwrap();
        fs::write(there.path.join("file"), "").unwrap();
        assert!(dir.path().join("var/lib/iscsi/file").exists());
        let nodes = root.dir("/etc/iscsi/nodes/deep").unwrap();
        assert!(!nodes.path.exists());
        fs::create_dir_all(&nodes.path).unwrap();
        assert!(dir.path().join("var/lib/iscsi/nodes/deep").is_dir());
        fs::create_dir_all(&root.dir("/run/lock/iscsi").unwrap().path).unwrap();
        assert!(dir.path().join("run/lock/iscsi").is_dir());
    }

    #[test]
    fn programs_are_found_by_the_path_that_they_have_there() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "usr/sbin/iscsiadm", 0o644);
        put(dir.path(), "usr/bin/iscsiadm", 0o755);
        std::os::unix::fs::symlink("/bin/sh", dir.path().join("usr/sbin/dmsetup")).unwrap();
        let root = root(dir.path());
        assert_eq!(root.program("iscsiadm").unwrap(), Path::new("/usr/bin/iscsiadm"));
        assert_eq!(root.program("dmsetup"), None, "its link leads to nothing there");
        assert!(!root.is_ours());
        let own = Root::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_ours() && own.entry().unwrap().namespaces.is_empty());
        assert!(own.is_same(&own) && !own.is_same(&root));
    }

    /// A process in mount and IPC namespaces of its own, below whose root something else is in /mnt.
    const CONTAINER: &str = r#"
        mount --rbind / "$1" && mount -t tmpfs none "$1/mnt" || exit 1
        printf '#!/bin/sh\ncat /mnt/mark\nreadlink /proc/self/ns/mnt /proc/self/ns/ipc\npwd\n' >"$1/mnt/program"
        chmod 755 "$1/mnt/program"
        echo there >"$1/mnt/mark"
        echo ready
        exec chroot "$1" sleep 60
    "#;

    #[tokio::test]
    async fn root_a_program_runs_beneath_anothers_root_and_in_its_namespaces() {
        use tokio::io::AsyncReadExt;
        let test = "root_a_program_runs_beneath_anothers_root_and_in_its_namespaces";
        if !nix::unistd::geteuid().is_root() {
            eprintln!("{test}: skipped, needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut container = tokio::process::Command::new("unshare")
            .args(["--mount", "--ipc", "sh", "-c", CONTAINER, "sh"])
            .arg(dir.path())
            .stdout(std::process::Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        if container.stdout.as_mut().unwrap().read_exact(&mut ready).await.is_err() {
            eprintln!("{test}: skipped, no mount namespace can be had");
            return;
        }
        let pid = i32::try_from(container.id().unwrap()).unwrap();
        // The shell is about to change its root.
        let root = loop {
            let root = Root::of(pid).unwrap();
            if root.text("/mnt/mark").is_ok() {
                break root;
            }
            tokio::task::yield_now().await;
        };
        let mut command = tokio::process::Command::new("/mnt/program");
        root.entry().unwrap().prepare(&mut command);
        let output = command.output().await.unwrap();
        let ns = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        let expected = format!("there\n{}\n{}\n/\n", ns("mnt").display(), ns("ipc").display());
        assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
        container.kill().await.unwrap();
        assert!(Root::of(pid).is_err(), "it has ended");
    }
}
