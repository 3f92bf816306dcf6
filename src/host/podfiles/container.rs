//! A pod for tests: a directory, a file beside it, and a process in a mount namespace of its own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::host::poddir::{HotplugDir, Inode, PodDir};
use crate::host::podfiles::InPod;
use crate::host::procs::ProcessId;

/// The pod; ends when dropped.
pub(super) struct Pod {
    _dir: tempfile::TempDir,
    process: Child,
    /// Its hotplug directory.
    pub(super) hotplug: PathBuf,
    /// A file with `data` in it.
    pub(super) source: PathBuf,
}

impl Pod {
    /// `None`, and a word why, where no mount namespace can be had.
    pub(super) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounts need root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (hotplug, source) = (dir.path().join("pod/hotplug"), dir.path().join("disk.img"));
        std::fs::create_dir_all(&hotplug).unwrap();
        std::fs::write(&source, "data").unwrap();
        let mut process = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", "echo in; exec sleep 600"])
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut line = String::new();
        let said = BufReader::new(process.stdout.take()?).read_line(&mut line);
        let pod = Self { _dir: dir, process, hotplug, source };
        if said.is_err() || line != "in\n" {
            eprintln!("skipped: no mount namespace can be had");
            return None;
        }
        Some(pod)
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(super) fn namespace(&self) -> OwnedFd {
        File::open(format!("/proc/{}/ns/mnt", self.pid())).unwrap().into()
    }

    /// What the process sees by that name.
    pub(super) fn sees(&self, name: &str) -> PathBuf {
        let root = format!("/proc/{}/root", self.pid());
        Path::new(&root).join(self.hotplug.strip_prefix("/").unwrap()).join(name)
    }

    pub(super) fn mounts(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/mountinfo", self.pid())).unwrap()
    }

    pub(super) fn place(&self) -> InPod {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
        let pod = PodDir { path: self.hotplug.parent().unwrap().into() };
        InPod {
            hotplug: HotplugDir {
                pod,
                rel: "hotplug".into(),
                inode: inode(&self.hotplug),
                owner: (0, 0),
            },
            dir_in_pod: self.hotplug.clone(),
            process: ProcessId { pid: self.pid(), start: start.parse().unwrap() },
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(super) fn inode(path: &Path) -> Inode {
    let meta = std::fs::symlink_metadata(path).unwrap();
    Inode { dev: meta.dev(), ino: meta.ino() }
}
