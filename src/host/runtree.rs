//! The run directory and the state directory as somebody finds them who only looks: nothing is made,
//! locked or changed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::blocking::blocking;

/// A file below the run directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFile {
    /// Its name below it.
    pub name: String,
    /// What is in it, or why it cannot be read.
    pub content: Result<Vec<u8>, String>,
}

/// What is in the run directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunTree {
    /// The boot in which it was looked at.
    pub boot_id: String,
    /// Its state files, by name.
    pub files: Vec<RunFile>,
    /// The locks of VMs that are held, as `NAMESPACE/NAME`.
    pub served: Vec<String>,
}

/// The directories that have state in them.
const STATE: [&str; 5] = ["effects", "removals", "leases", "claims", "guest-luns"];

/// Reads the run directory; one that is not there is empty.
pub async fn run_tree(base: PathBuf) -> io::Result<RunTree> {
    blocking("reading the run directory", move || {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let mut tree = RunTree { boot_id, ..RunTree::default() };
        for dir in STATE {
            walk(&base, dir, &mut |name, path| {
                let content = match fs::read(path) {
                    Ok(bytes) => Ok(bytes),
                    // A lunplugd works beside us.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return,
                    Err(e) => Err(e.to_string()),
                };
                tree.files.push(RunFile { name: name.to_owned(), content });
            })?;
        }
        walk(&base, "vms", &mut |name, path| {
            if is_locked(path) {
                tree.served.extend(name.strip_prefix("vms/").map(str::to_owned));
            }
        })?;
        tree.files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(tree)
    })
    .await
}

/// The databases in the state directory, sorted.
pub async fn databases(dir: PathBuf) -> io::Result<Vec<PathBuf>> {
    blocking("reading the state directory", move || {
        let mut all = Vec::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "db") {
                all.push(path);
            }
        }
        all.sort();
        Ok(all)
    })
    .await
}

/// Each file below `dir`, in whatever order.
fn walk(base: &Path, dir: &str, each: &mut impl FnMut(&str, &Path)) -> io::Result<()> {
    let entries = match fs::read_dir(base.join(dir)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let name = format!("{dir}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            walk(base, &name, each)?;
        } else {
            each(&name, &entry.path());
        }
    }
    Ok(())
}

/// Whether somebody has the file's lock. Asking takes none.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && lock.l_type != libc::F_UNLCK as i16
}

/// How often a database that is being written is copied anew.
const COPIES: usize = 50;

/// Copies a database, its `-wal` and its `-journal` at a moment in which neither changed: a lunplugd may be writing them.
pub fn copy_still(from: &Path, to: &Path) -> io::Result<()> {
    let parts = ["", "-wal", "-journal"];
    let look = || -> io::Result<Vec<Option<(u64, SystemTime)>>> {
        let part = |rest: &&str| match fs::metadata(with(from, rest)) {
            Ok(file) => Ok(Some((file.len(), file.modified()?))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        parts.iter().map(part).collect()
    };
    for _ in 0..COPIES {
        let before = look()?;
        for (rest, there) in parts.iter().zip(&before) {
            let copy = with(to, rest);
            match there {
                Some(_) => drop(fs::copy(with(from, rest), copy)?),
                None if copy.exists() => fs::remove_file(copy)?,
                None => {}
            }
        }
        // A file's time is a clock tick's: a change within that tick would not show. A file of the
        // future (the clock was set back) is not being written.
        let recent = |(_, at): &(u64, SystemTime)| {
            at.elapsed().is_ok_and(|age| age < Duration::from_millis(50))
        };
        if look()? == before && !before.iter().flatten().any(recent) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is being written all the time"))
}

/// The path with something put behind its name.
pub fn with(path: &Path, rest: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(rest);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::host::lock::{RealRunDir, RunDir};

    #[tokio::test]
    async fn state_and_held_locks_are_seen_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("run");
        assert!(run_tree(base.clone()).await.unwrap().files.is_empty());
        assert!(!base.exists());
        let run = RealRunDir::open(&base).unwrap();
        run.store("effects/ns/a/v.json", b"1").await.unwrap();
        run.store("claims/w", b"2").await.unwrap();
        let held = run.lock("vms/ns/a", Duration::ZERO).await.unwrap();
        drop(run.lock("vms/ns/b", Duration::ZERO).await.unwrap());
        let tree = run_tree(base.clone()).await.unwrap();
        let names: Vec<_> = tree.files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["claims/w", "effects/ns/a/v.json"]);
        assert_eq!(tree.files[0].content.as_deref(), Ok(&b"2"[..]));
        assert_eq!(tree.served, ["ns/a"]);
        drop(held);
        assert!(run_tree(base).await.unwrap().served.is_empty());
    }
}
