//! Files that are being written beside what they replace.
//!
//! A process that is killed while it writes leaves its file behind, and several processes with
//! pids of different namespaces share the directory, so neither a pid nor an age says whose a file
//! is. The kernel does: a writer has its file locked for as long as it writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;

use super::real::set_lock;

/// Names with this are being written.
const PREFIX: &str = ".tmp-";

static NUMBER: AtomicU64 = AtomicU64::new(0);

pub(super) fn is_temporary(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Replaces what `path` has with `bytes`: whoever reads sees all of the old or all of the new.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (mut file, temporary) = create(path.parent().unwrap_or(Path::new("/")))?;
    let replaced = file.write_all(bytes).and_then(|()| fs::rename(&temporary, path));
    if replaced.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    replaced
}

/// A new file that is ours until it is closed.
fn create(dir: &Path) -> io::Result<(File, PathBuf)> {
    loop {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{PREFIX}{}-{number}", std::process::id()));
        let mut options = OpenOptions::new();
        let file = match options.write(true).create_new(true).mode(0o600).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        if ours(&file)? {
            return Ok((file, path));
        }
        // A sweep came between the two and takes it for one that was left behind.
    }
}

/// Locks the file; `false` when another has it, or has removed it meanwhile.
fn ours(file: &File) -> io::Result<bool> {
    Ok(set_lock(file, libc::F_WRLCK)? && file.metadata()?.nlink() > 0)
}

/// Removes what killed writers left in `dir` and beneath it. Others work there meanwhile: what goes, or gets its name,
/// while it is looked at is as it should be.
pub(super) fn sweep(dir: &Path) -> io::Result<()> {
    let Some(entries) = unless_gone(fs::read_dir(dir))? else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let Some(kind) = unless_gone(entry.file_type())? else { continue };
        if kind.is_dir() {
            sweep(&path)?;
        } else if kind.is_file()
            && is_temporary(&entry.file_name().to_string_lossy())
            && let Some(file) = unless_gone(OpenOptions::new().write(true).open(&path))?
        {
            remove_left(&file, &path)?;
        }
    }
    Ok(())
}

/// Removes a file by its temporary name, if nobody writes it. One that has got its own name since it was opened keeps that.
fn remove_left(file: &File, path: &Path) -> io::Result<()> {
    if ours(file)? {
        unless_gone(fs::remove_file(path))?;
    }
    Ok(())
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_killed_writer_left_is_swept_and_what_is_being_written_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let beneath = dir.path().join("lease/iscsi");
        fs::create_dir_all(&beneath).unwrap();
        let (file, killed) = create(&beneath).unwrap();
        drop(file);
        let (_file, written) = create(&beneath).unwrap();
        fs::write(beneath.join("kept"), "").unwrap();
        sweep(dir.path()).unwrap();
        assert!(!killed.exists());
        assert_eq!(
            names(&beneath),
            [written.file_name().unwrap().to_str().unwrap(), "kept"],
            "the one that is locked stays"
        );
    }

    #[test]
    fn a_file_that_gets_its_name_while_it_is_looked_at_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, temporary) = create(dir.path()).unwrap();
        let seen = OpenOptions::new().write(true).open(&temporary).unwrap();
        fs::rename(&temporary, dir.path().join("lease")).unwrap();
        drop(file);
        remove_left(&seen, &temporary).unwrap();
        assert_eq!(names(dir.path()), ["lease"]);
        sweep(&dir.path().join("gone")).unwrap();
    }

    #[test]
    fn a_name_that_another_pid_namespace_took_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let next = NUMBER.load(Ordering::Relaxed);
        let taken: Vec<_> = (next..next + 50)
            .map(|n| dir.path().join(format!("{PREFIX}{}-{n}", std::process::id())))
            .collect();
        for path in &taken {
            fs::write(path, "another's").unwrap();
        }
        replace(&dir.path().join("ours"), b"ours").unwrap();
        assert_eq!(fs::read(dir.path().join("ours")).unwrap(), b"ours");
        for path in &taken {
            assert_eq!(fs::read(path).unwrap(), b"another's");
        }
    }

    #[test]
    fn a_write_that_fails_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("taken")).unwrap();
        replace(&dir.path().join("taken"), b"x").unwrap_err();
        assert_eq!(names(dir.path()), ["taken"]);
    }
}
