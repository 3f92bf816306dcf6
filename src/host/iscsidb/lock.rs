//! open-iscsi's lock of its database: taken, and cleared when whoever took it is dead.
//!
//! Facts (open-iscsi 2.1.11, usr/idbm.c and libopeniscsiusr/idbm.c, and tried): the lock is the hard
//! link `lock.write` to the file `lock` in `/run/lock/iscsi`; a link that is there already means
//! locked. It names no process and outlives one that is killed. It is held for some 10 ms, for reading
//! or writing files only, by iscsiadm, by iscsid when it starts over sessions that are there, and by
//! programs over libopeniscsiusr. Whoever finds it tries for 30 s and then fails with code 6, and
//! mostly leaves it there: until somebody removes it, no login and no record can be made.
//!
//! The link says when it was made by its inode's change time, which nothing but a link, an unlink or a
//! chmod alters: the same time means that it was held all the while. So whoever holds it was alive
//! when it was first seen, and is when it is seen again: when none of those that could have made it
//! then is left, it is nobody's. No clock is compared, so one that was set back does no harm.
//! lunplug's own processes prove themselves by an OFD lock of the file `lock` while they hold the
//! link, and so do those that clear it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;

use super::DbLockState;
use crate::host::lock::set_lock;

/// How often and how long apart the lock is tried; iscsiadm itself tries 3000 times.
const LOCK_TRIES: u32 = 100;
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// The programs that take it, by the first 15 bytes of their names.
const TAKERS: [&str; 4] = ["iscsiadm", "iscsid", "iscsistart", "iscsiuio"];
/// What other programs have mapped that take it.
const LIBRARY: &str = "libopeniscsiusr";

/// The lock, held by this process until it is dropped.
pub(super) struct Held {
    link: PathBuf,
    _file: File,
}

impl Held {
    /// Takes the lock in `dir`.
    pub(super) fn take(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (path, link) = (dir.join("lock"), dir.join("lock.write"));
        for _ in 0..LOCK_TRIES {
            let file = open(&path)?;
            if set_lock(&file, libc::F_WRLCK)? {
                match fs::hard_link(&path, &link) {
                    Ok(()) => return Ok(Self { link, _file: file }),
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(e),
                }
            }
            // Nothing tells when the link goes away; this is a worker's thread.
            std::thread::sleep(LOCK_RETRY);
        }
        Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            format!("the iSCSI database is locked by {}", link.display()),
        ))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Before the file is closed, and its OFD lock with it.
        let _ = fs::remove_file(&self.link);
    }
}

fn open(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// One making of the link: inode and change time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link(u64, u64, i64, i64);

impl Link {
    fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::symlink_metadata(path) {
            Ok(m) => Ok(Some(Self(m.dev(), m.ino(), m.ctime(), m.ctime_nsec()))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// A process that may hold the lock.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Suspect {
    pid: u32,
    /// Field 22 of proc_pid_stat(5): with the number it is this very process.
    start: String,
    name: String,
    /// Its state's letter, as in proc_pid_stat(5).
    state: char,
}

impl Suspect {
    /// `None` when there is no such process any more.
    fn read(proc: &Path, pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
        // The name is in brackets and may hold any character.
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?.chars().next()?;
        Some(Self { pid, start: fields.nth(18)?.into(), name: name.into(), state })
    }

    fn takes_it(&self, proc: &Path) -> bool {
        if TAKERS.contains(&self.name.as_str()) {
            return true;
        }
        let maps = fs::read_to_string(proc.join(self.pid.to_string()).join("maps"));
        maps.is_ok_and(|maps| maps.contains(LIBRARY))
    }

    /// Whether it may hold the lock now. A zombie has nothing. iscsid runs for ever: it holds the
    /// lock only while it works on files, and never sleeps interruptibly then.
    fn may_hold(&self) -> bool {
        match self.state {
            'Z' | 'X' => false,
            'S' => self.name != "iscsid",
            _ => true,
        }
    }

    fn describe(&self) -> String {
        let stopped = if matches!(self.state, 'T' | 't') { ", which is stopped" } else { "" };
        format!("{}[{}]{stopped}", self.name, self.pid)
    }
}

/// Everybody who may hold the lock now. A process that lives through this is in it: /proc is read in
/// the order of the numbers.
fn suspects(proc: &Path) -> io::Result<Vec<Suspect>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(proc)? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse() else { continue };
        let Some(suspect) = Suspect::read(proc, pid) else { continue };
        if suspect.may_hold() && suspect.takes_it(proc) {
            found.push(suspect);
        }
    }
    Ok(found)
}

/// What is known of the lock from one look to the next.
#[derive(Debug)]
pub(super) struct Watcher {
    /// How long it must have been held before anybody is asked: mostly it is gone by then, and file
    /// systems tell no shorter times apart.
    patience: Duration,
    seen: Option<Seen>,
}

#[derive(Debug)]
struct Seen {
    link: Link,
    since: Instant,
    suspects: Option<Vec<Suspect>>,
}

impl Default for Watcher {
    fn default() -> Self {
        Self { patience: Duration::from_millis(100), seen: None }
    }
}

impl Watcher {
    /// One look at the lock in `dir`; clears it when nobody that could hold it is left.
    pub(super) fn look(&mut self, dir: &Path, proc: &Path) -> io::Result<DbLockState> {
        let link = dir.join("lock.write");
        let Some(now) = Link::read(&link)? else {
            self.seen = None;
            return Ok(DbLockState::Free);
        };
        let Some(seen) = self.seen.as_mut().filter(|seen| seen.link == now) else {
            self.seen = Some(Seen { link: now, since: Instant::now(), suspects: None });
            return Ok(DbLockState::Held(Vec::new()));
        };
        if seen.since.elapsed() < self.patience {
            return Ok(DbLockState::Held(Vec::new()));
        }
        let left: Vec<Suspect> = match seen.suspects.take() {
            None => suspects(proc)?,
            Some(all) => all.into_iter().filter_map(|s| still_there(proc, &s)).collect(),
        };
        if left.is_empty() {
            self.seen = None;
            return clear(dir, &link, now);
        }
        let names = left.iter().map(Suspect::describe).collect();
        seen.suspects = Some(left);
        Ok(DbLockState::Held(names))
    }
}

fn still_there(proc: &Path, suspect: &Suspect) -> Option<Suspect> {
    let now = Suspect::read(proc, suspect.pid)?;
    (now.start == suspect.start && now.may_hold()).then_some(now)
}

/// Removes the link if it is still that one, and no lunplug has it.
fn clear(dir: &Path, link: &Path, proven: Link) -> io::Result<DbLockState> {
    let file = open(&dir.join("lock"))?;
    if !set_lock(&file, libc::F_WRLCK)? {
        return Ok(DbLockState::Held(vec!["a lunplugd".into()]));
    }
    if Link::read(link)? != Some(proven) {
        return Ok(DbLockState::Held(Vec::new()));
    }
    fs::remove_file(link)?;
    Ok(DbLockState::Cleared)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process as /proc shows it.
    fn put(proc: &Path, pid: u32, name: &str, state: char, start: u64, maps: &str) {
        let dir = proc.join(pid.to_string());
        fs::create_dir_all(&dir).unwrap();
        let zeros = "0 ".repeat(18);
        fs::write(dir.join("stat"), format!("{pid} ({name}) {state} {zeros}{start} 0 0\n"))
            .unwrap();
        fs::write(dir.join("maps"), maps).unwrap();
    }

    fn gone(proc: &Path, pid: u32) {
        fs::remove_dir_all(proc.join(pid.to_string())).unwrap();
    }

    fn leave_locked(dir: &Path) {
        fs::write(dir.join("lock"), "").unwrap();
        fs::hard_link(dir.join("lock"), dir.join("lock.write")).unwrap();
    }

    fn hasty() -> Watcher {
        Watcher { patience: Duration::ZERO, seen: None }
    }

    fn held(by: &[&str]) -> DbLockState {
        DbLockState::Held(by.iter().map(|b| (*b).to_owned()).collect())
    }

    #[test]
    fn a_lock_whose_holder_was_killed_is_cleared() {
        let (dir, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (dir, proc) = (dir.path(), proc.path());
        let mut watcher = hasty();
        assert_eq!(watcher.look(dir, proc).unwrap(), DbLockState::Free, "not even a directory");
        leave_locked(dir);
        put(proc, 1, "systemd", 'S', 1, "");
        put(proc, 50, "iscsid", 'S', 10, "");
        put(proc, 51, "iscsiadm", 'Z', 10, "");
        assert_eq!(watcher.look(dir, proc).unwrap(), held(&[]), "perhaps it is just held");
        assert_eq!(watcher.look(dir, proc).unwrap(), DbLockState::Cleared);
        assert_eq!(watcher.look(dir, proc).unwrap(), DbLockState::Free);
        drop(Held::take(dir).unwrap());
    }

    #[test]
    fn nobody_that_may_hold_it_is_robbed() {
        let (dir, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (dir, proc) = (dir.path(), proc.path());
        leave_locked(dir);
        put(proc, 7, "iscsiadm", 'T', 70, "");
        put(proc, 8, "iscsid", 'D', 80, "");
        put(proc, 9, "udisksd", 'S', 90, "7f00 r-xp /usr/lib/libopeniscsiusr.so.0\n");
        let mut watcher = hasty();
        watcher.look(dir, proc).unwrap();
        let DbLockState::Held(mut by) = watcher.look(dir, proc).unwrap() else { panic!("robbed") };
        by.sort();
        assert_eq!(by, ["iscsiadm[7], which is stopped", "iscsid[8]", "udisksd[9]"]);
        // Those that came later wait for it, whatever they are.
        put(proc, 10, "iscsiadm", 'S', 100, "");
        gone(proc, 9);
        put(proc, 8, "iscsid", 'S', 80, "");
        assert_eq!(watcher.look(dir, proc).unwrap(), held(&["iscsiadm[7], which is stopped"]));
        // Its number was given to another.
        put(proc, 7, "iscsiadm", 'S', 700, "");
        assert_eq!(watcher.look(dir, proc).unwrap(), DbLockState::Cleared);
    }

    #[test]
    fn a_lock_that_was_taken_anew_is_another() {
        let (dir, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (dir, proc) = (dir.path(), proc.path());
        leave_locked(dir);
        let mut watcher = hasty();
        watcher.look(dir, proc).unwrap();
        let before = Link::read(&dir.join("lock.write")).unwrap();
        // The clock of file systems may be as coarse as a tick.
        while Link::read(&dir.join("lock.write")).unwrap() == before {
            fs::remove_file(dir.join("lock.write")).unwrap();
            fs::hard_link(dir.join("lock"), dir.join("lock.write")).unwrap();
        }
        put(proc, 7, "iscsiadm", 'R', 70, "");
        assert_eq!(watcher.look(dir, proc).unwrap(), held(&[]), "seen for the first time");
        assert_eq!(watcher.look(dir, proc).unwrap(), held(&["iscsiadm[7]"]));
    }

    #[test]
    fn what_lunplug_itself_holds_is_not_cleared() {
        let (dir, proc) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (dir, proc) = (dir.path(), proc.path());
        let ours = Held::take(dir).unwrap();
        let mut watcher = hasty();
        watcher.look(dir, proc).unwrap();
        assert_eq!(watcher.look(dir, proc).unwrap(), held(&["a lunplugd"]));
        assert_eq!(Held::take(dir).err().unwrap().kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert_eq!(watcher.look(dir, proc).unwrap(), DbLockState::Free);
    }
}
