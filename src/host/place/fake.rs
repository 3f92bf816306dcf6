//! A /proc with daemons in it.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::*;

pub(crate) struct Proc(tempfile::TempDir);

pub(crate) const IN_FULL: &str = "000001ffffffffff";

impl Proc {
    pub(crate) fn new() -> Self {
        let proc = Self(tempfile::tempdir().unwrap());
        proc.listens(&[]);
        proc
    }

    pub(crate) fn places(&self) -> Places {
        Places { proc: self.0.path().into(), found: Arc::default() }
    }

    /// A directory to be a root, with programs.
    pub(crate) fn root(&self, name: &str, programs: &[&str]) -> PathBuf {
        let root = self.0.path().join(name);
        for dir in ["etc/iscsi", "var/lib/iscsi", "run/lock", "usr/sbin"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for program in programs {
            fs::copy("/bin/true", root.join("usr/sbin").join(program)).unwrap();
        }
        root
    }

    /// Sockets of iscsid's name, by inode.
    pub(crate) fn listens(&self, inodes: &[u64]) {
        let line =
            |inode| format!("0: 2 0 00010000 0001 01 {inode} @{}\n", Service::Iscsid.socket());
        fs::create_dir_all(self.0.path().join("net")).unwrap();
        let text: String = inodes.iter().map(line).collect();
        fs::write(self.0.path().join("net/unix"), text).unwrap();
    }

    /// A process of root's that has sockets open.
    pub(crate) fn runs(&self, pid: i32, comm: &str, root: &Path, caps: &str, inodes: &[u64]) {
        let dir = self.0.path().join(pid.to_string());
        for sub in ["fd", "ns"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        fs::write(dir.join("comm"), format!("{comm}\n")).unwrap();
        fs::write(dir.join("status"), format!("Uid:\t0\t0\t0\t0\nCapEff:\t{caps}\n")).unwrap();
        symlink(root, dir.join("root")).unwrap();
        for ns in ["user", "ipc", "mnt"] {
            symlink(format!("/proc/self/ns/{ns}"), dir.join("ns").join(ns)).unwrap();
        }
        for inode in inodes {
            symlink(format!("socket:[{inode}]"), dir.join(format!("fd/{inode}"))).unwrap();
        }
    }

    /// It closes a socket.
    pub(crate) fn closes(&self, pid: i32, inode: u64) {
        fs::remove_file(self.0.path().join(format!("{pid}/fd/{inode}"))).unwrap();
    }

    pub(crate) fn ends(&self, pid: i32) {
        fs::remove_dir_all(self.0.path().join(pid.to_string())).unwrap();
    }
}
