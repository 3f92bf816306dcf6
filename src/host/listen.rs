//! The daemon's own socket: made so that nobody is ever locked out or let in by accident.
//!
//! ```text
//! lock SOCKET.lock -> bind SOCKET.new -> mode, group -> rename over SOCKET
//! ```
//! The lock, held for life, keeps two daemons apart; the rename replaces what a killed one left,
//! and the socket never shows with a wrong mode.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::Group;

/// The longest path of a unix socket in bytes: `sun_path` less its NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path does not fit in an address.
    #[error(
        "socket path {0} is longer than {MAX_SOCKET_PATH} bytes: set `socket` to a shorter one"
    )]
    TooLong(PathBuf),
    /// Somebody serves there.
    #[error("another lunplugd serves {0}: stop it, or set `socket` to another path")]
    Served(PathBuf),
    /// Something else is at its place.
    #[error("{0} is not a socket: remove it, or set `socket` to another path")]
    NotASocket(PathBuf),
    /// The group is not known here.
    #[error("there is no group {0:?}: create it, or correct `socket_group`")]
    NoGroup(String),
    /// The system refused.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A listening socket at its place. Dropping it takes it away again.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode of our socket, so that only ours is removed.
    identity: (u64, u64),
    _lock: File,
}

impl Socket {
    /// Makes the socket with mode 0660 and, if `group` is given, that group. Blocks for a moment;
    /// meant for start-up. The directory must exist.
    pub fn bind(path: &Path, group: Option<&str>) -> Result<(Self, UnixListener), Error> {
        let fresh = beside(path, ".new");
        if fresh.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Error::TooLong(path.into()));
        }
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { what, path, source }
        };
        let gid = group.map(gid_of).transpose()?;
        let lock = lock(path)?;
        check_place(path)?;
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io("remove", &fresh)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&fresh).map_err(io("make the socket", &fresh))?;
        listener.set_nonblocking(true).map_err(io("set up the socket", &fresh))?;
        if let Some(gid) = gid {
            chown(&fresh, None, Some(gid)).map_err(io("change the group of", &fresh))?;
        }
        fs::set_permissions(&fresh, Permissions::from_mode(0o660))
            .map_err(io("change the mode of", &fresh))?;
        let made = fs::symlink_metadata(&fresh).map_err(io("examine", &fresh))?;
        fs::rename(&fresh, path).map_err(io("put the socket at", path))?;
        let identity = (made.dev(), made.ino());
        Ok((Self { path: path.into(), identity, _lock: lock }, listener))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours {
            // Left behind it does no harm: the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn gid_of(name: &str) -> Result<u32, Error> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) | Err(_) => Err(Error::NoGroup(name.into())),
    }
}

fn lock(socket: &Path) -> Result<File, Error> {
    let path = beside(socket, ".lock");
    let failed = |what| {
        let path = path.clone();
        move |source| Error::Io { what, path, source }
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(&path)
        .map_err(failed("open"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Served(socket.into())),
        Err(TryLockError::Error(source)) => Err(failed("lock")(source)),
    }
}

/// Nothing, or a socket that nobody answers.
fn check_place(path: &Path) -> Result<(), Error> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Io { what: "examine", path: path.into(), source }),
    };
    if !found.file_type().is_socket() {
        return Err(Error::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        // Whoever answers without our lock is no lunplugd, or one that lost its lock's file.
        Ok(_) => Err(Error::Served(path.into())),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_made_with_its_mode_and_taken_away_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (socket, _listener) = Socket::bind(&path, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_killed_daemon_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        drop(UnixListener::bind(&path).unwrap());
        drop(UnixListener::bind(beside(&path, ".new")).unwrap());
        assert!(path.exists());
        let (_socket, _listener) = Socket::bind(&path, None).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn two_do_not_serve_one_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (_socket, _listener) = Socket::bind(&path, None).unwrap();
        assert!(matches!(Socket::bind(&path, None), Err(Error::Served(_))));
        let other = dir.path().join("other.sock");
        let _listener = UnixListener::bind(&other).unwrap();
        assert!(matches!(Socket::bind(&other, None), Err(Error::Served(_))));
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path, None), Err(Error::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(Socket::bind(&long, None), Err(Error::TooLong(_))));
        let other = dir.path().join("o.sock");
        assert!(matches!(Socket::bind(&other, Some("no such")), Err(Error::NoGroup(_))));
    }
}
