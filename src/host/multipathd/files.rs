//! multipath's two files of what it has seen: `wwids` and `bindings`, edited as multipath-tools
//! itself does.
//!
//! All its versions take an fcntl write lock on the file before they touch it (libmultipath/file.c,
//! `open_file`). `wwids` has a line `/WWID/` for each map and is always changed in place; what
//! `multipath -w` leaves is the line with its first slash turned into `#`. `bindings` has lines
//! `alias WWID`. Since 0.9.7 multipathd keeps it in memory, writes it anew with a rename, and reads
//! it again only when it sees another file renamed to its name with a later time
//! (libmultipath/alias.c, `handle_bindings_file_inotify`): so it is replaced here, not edited.
//! Versions before append to the file in place; one that waited for the lock meanwhile appends to
//! the replaced file, and gives that map's alias out again at its next start.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::host::short;

/// How long its lock is waited for, as multipath-tools does (FILE_TIMEOUT is 30 s) but shorter.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// Nothing tells when another process lets go of an fcntl lock.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// Removes a WWID's lines from `wwids`; whether there were any.
pub(super) fn forget_wwid(path: &Path, wwid: &str) -> io::Result<bool> {
    let Some(mut file) = open_locked(path)? else { return Ok(false) };
    let text = text(&mut file)?;
    let (listed, removed) = (format!("/{wwid}/"), format!("#{wwid}/"));
    let ours = |line: &str| line.trim_end() == listed || line.trim_end() == removed;
    let Some(start) = first_match(&text, ours) else { return Ok(false) };
    let rest: String = text[start..].split_inclusive('\n').filter(|line| !ours(line)).collect();
    let start = u64::try_from(start).map_err(io::Error::other)?;
    file.seek(SeekFrom::Start(start))?;
    file.write_all(rest.as_bytes())?;
    // Until here what is behind is a second copy of the last lines, which does no harm.
    file.set_len(start + u64::try_from(rest.len()).map_err(io::Error::other)?)?;
    Ok(true)
}

/// Removes a WWID's line from `bindings`; whether there was one.
pub(super) fn forget_binding(path: &Path, wwid: &str) -> io::Result<bool> {
    // multipathd replaces the file without a look at the lock: start over if it did meanwhile.
    for _ in 0..8 {
        let Some(mut file) = open_locked(path)? else { return Ok(false) };
        let text = text(&mut file)?;
        let ours = |line: &str| {
            let line = line.split('#').next().unwrap_or_default();
            line.split_whitespace().nth(1) == Some(wwid)
        };
        if first_match(&text, ours).is_none() {
            return Ok(false);
        }
        let kept: String = text.split_inclusive('\n').filter(|line| !ours(line)).collect();
        if replace(path, &file, &kept)? {
            return Ok(true);
        }
    }
    Err(io::Error::new(
        io::ErrorKind::WouldBlock,
        format!("{} is being rewritten all the time", path.display()),
    ))
}

fn text(file: &mut File) -> io::Result<String> {
    String::from_utf8(short::read_rest(file)?)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

fn first_match(text: &str, matches: impl Fn(&str) -> bool) -> Option<usize> {
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        if matches(line) {
            return Some(offset);
        }
        offset += line.len();
    }
    None
}

/// Puts a new file in the place of `old`; `false` when `old` is no longer there or has changed.
fn replace(path: &Path, old: &File, text: &str) -> io::Result<bool> {
    let before = old.metadata()?;
    let temp = path.with_extension(format!("lunplug-{}", std::process::id()));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| {
        // Later than the old one even within one tick of the clock, else multipathd keeps to what
        // it has in memory.
        let later = before.modified()? + Duration::from_micros(1);
        file.set_modified(later.max(SystemTime::now()))?;
        file.sync_all()
    });
    let same = |now: &fs::Metadata| {
        (now.ino(), now.dev(), now.mtime(), now.mtime_nsec(), now.len())
            == (before.ino(), before.dev(), before.mtime(), before.mtime_nsec(), before.len())
    };
    let renamed = written.and_then(|()| match fs::metadata(path) {
        Ok(now) if same(&now) => fs::rename(&temp, path).map(|()| true),
        Ok(_) => Ok(false),
        Err(e) => Err(e),
    });
    if !matches!(renamed, Ok(true)) {
        let _ = fs::remove_file(&temp);
    }
    renamed
}

/// Opens a file and takes its write lock; `None` when there is no such file.
fn open_locked(path: &Path) -> io::Result<Option<File>> {
    let end = Instant::now() + LOCK_WAIT;
    loop {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        if try_lock(&file)? {
            let (locked, named) = (file.metadata()?, fs::metadata(path));
            if named.is_ok_and(|n| (n.ino(), n.dev()) == (locked.ino(), locked.dev())) {
                return Ok(Some(file));
            }
        } else {
            std::thread::sleep(LOCK_RETRY);
        }
        if Instant::now() > end {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("{} stays locked by someone else", path.display()),
            ));
        }
    }
}

/// An OFD lock: it conflicts with multipath's own, and is not lost when another descriptor of the
/// file is closed in this process.
fn try_lock(file: &File) -> io::Result<bool> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
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

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "36001405000000000000000000000000a";
    const OTHER: &str = "36001405000000000000000000000000ab";

    fn file(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn a_wwid_goes_in_both_its_forms_and_no_other_goes() {
        let (_dir, path) = file(&format!(
            "# Multipath wwids\n/{OTHER}/\n/{OURS}/\n#{OURS}/\n/{OTHER}x/\n/{OURS}/\n"
        ));
        let inode = fs::metadata(&path).unwrap().ino();
        assert!(forget_wwid(&path, OURS).unwrap());
        let left = fs::read_to_string(&path).unwrap();
        assert_eq!(left, format!("# Multipath wwids\n/{OTHER}/\n/{OTHER}x/\n"));
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode, "changed in place");
        assert!(!forget_wwid(&path, OURS).unwrap());
        assert!(!forget_wwid(Path::new("/nonexistent/wwids"), OURS).unwrap());
    }

    #[test]
    fn a_binding_goes_and_the_file_is_a_later_one() {
        let text = format!(
            "# Multipath bindings\n# mpathz {OURS}\nmpatha {OTHER}\nmpathb {OURS}\nmpathc 3{OURS}\n"
        );
        let (dir, path) = file(&text);
        let before = fs::metadata(&path).unwrap();
        assert!(forget_binding(&path, OURS).unwrap());
        let left = fs::read_to_string(&path).unwrap();
        assert_eq!(left, text.replace(&format!("mpathb {OURS}\n"), ""));
        let after = fs::metadata(&path).unwrap();
        assert_ne!(after.ino(), before.ino());
        assert!(after.modified().unwrap() > before.modified().unwrap());
        assert_eq!(after.mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        assert!(!forget_binding(&path, OURS).unwrap());
    }

    #[test]
    fn multipaths_lock_is_waited_for() {
        let (_dir, path) = file(&format!("/{OURS}/\n"));
        let held = File::options().read(true).write(true).open(&path).unwrap();
        assert!(try_lock(&held).unwrap());
        let (begun, wait) = std::sync::mpsc::channel();
        let other = path.clone();
        let editor = std::thread::spawn(move || {
            begun.send(()).unwrap();
            forget_wwid(&other, OURS).unwrap()
        });
        wait.recv().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("/{OURS}/\n"));
        drop(held);
        assert!(editor.join().unwrap());
    }

    #[test]
    fn a_file_that_was_replaced_meanwhile_is_not_overwritten() {
        let (_dir, path) = file("mpatha 1\n");
        let old = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mpatha 1\nmpathb 2\n").unwrap();
        assert!(!replace(&path, &old, "").unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mpatha 1\nmpathb 2\n");
    }
}
