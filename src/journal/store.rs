//! The durable store's file: made whole or not at all, never reset, and read from a copy while its
//! disk takes no writes.
//!
//! ```text
//!            opened for writing ──► Whole ◄── a write that finds room again
//! open ─────┤                                  │
//!            no room, or read-only ──► Degraded┘   reads: from a copy in memory; writes: refused
//!            damaged, newer ──► refused, and left as it is
//! ```
//! SQLite needs room for its `-wal` and `-shm` files merely to open a database. `immutable=1` would do
//! without, but does not read the `-wal`, which after a crash has what was asked for last. So file and
//! `-wal` are copied to a place that can be written and read from there.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::Error;
use crate::host::runtree::{self, with};

/// The schema that this version writes; older ones are brought to it, newer ones are refused.
pub(super) const SCHEMA: i64 = 1 + STEPS.len() as i64;

/// Schema 1.
const FIRST: &str = "
    CREATE TABLE vms (
        vm TEXT PRIMARY KEY,
        spec TEXT NOT NULL
    ) STRICT;
    CREATE TABLE volumes (
        vm TEXT NOT NULL REFERENCES vms(vm),
        volume TEXT NOT NULL,
        position INTEGER NOT NULL,
        spec TEXT NOT NULL,
        accept_new_identity INTEGER NOT NULL,
        removing TEXT,
        PRIMARY KEY (vm, volume)
    ) STRICT;
    CREATE TABLE identities (
        vm TEXT NOT NULL,
        volume TEXT NOT NULL,
        source TEXT NOT NULL,
        wwid TEXT NOT NULL,
        PRIMARY KEY (vm, volume, source)
    ) STRICT;";

/// What each later schema has more than the one before it.
const STEPS: [&str; 4] = [
    "
    CREATE TABLE revisions (
        vm TEXT PRIMARY KEY REFERENCES vms(vm),
        revision INTEGER NOT NULL,
        asked BLOB NOT NULL
    ) STRICT;",
    // A version that knows only iSCSI would take the volume's value for damage.
    "
    -- 3: a volume's source may be by Fibre Channel
    ",
    "
    ALTER TABLE vms ADD COLUMN fc_marked INTEGER NOT NULL DEFAULT 0;",
    // The same of one that knows only LUNs.
    "
    -- 5: a volume's source may be what is on the host
    ",
];

/// Brings a database from a schema (0: an empty one) to [`SCHEMA`], as a whole or not at all.
fn upgrade(connection: &Connection, from: i64) -> Result<(), rusqlite::Error> {
    let steps = std::iter::once(FIRST).chain(STEPS);
    let missing: String = steps.skip(usize::try_from(from).unwrap_or(usize::MAX)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let change = format!("BEGIN IMMEDIATE; {missing} PRAGMA user_version = {SCHEMA}; COMMIT;");
    let changed = connection.execute_batch(&change);
    if changed.is_err() && !connection.is_autocommit() {
        connection.execute_batch("ROLLBACK;")?;
    }
    changed
}

/// The store's connection. One blocking call uses it at a time.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    state: Mutex<State>,
    /// Why the last write did not succeed, where the disk was in the way.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
enum State {
    Whole(Connection),
    /// Reads are from this copy, which cannot have fallen behind: nothing was written since.
    Degraded(Connection),
    /// The daemon is ending.
    Closed,
}

impl Store {
    /// Opens the database at `path`, or makes it (its directory with mode 0700). While it cannot be
    /// written it is read by way of a copy below `scratch`.
    pub(super) fn open(path: &Path, scratch: &Path) -> Result<Self, Error> {
        let (state, trouble) = match open_whole(path) {
            Ok(connection) => (State::Whole(connection), None),
            Err(refused) if refused.is_unwritable() && path.exists() => {
                let copy = copy_of(path, scratch)?;
                let why = chain(&refused);
                tracing::error!(
                    why,
                    "the state cannot be written: volumes stay and can be removed, none is added until that is mended"
                );
                (State::Degraded(copy), Some(why))
            }
            Err(error) => return Err(error),
        };
        let (state, trouble) = (Mutex::new(state), Mutex::new(trouble));
        Ok(Self { path: path.to_owned(), state, trouble })
    }

    /// A store in memory.
    pub(super) fn in_memory() -> Result<Self, Error> {
        let path = PathBuf::from(":memory:");
        let made = (|| {
            let connection = Connection::open_in_memory()?;
            connection.execute_batch("PRAGMA foreign_keys = ON;")?;
            upgrade(&connection, 0)?;
            Ok(connection)
        })();
        let connection = made.map_err(|source| Error::of(&path, source))?;
        let state = Mutex::new(State::Whole(connection));
        Ok(Self { path, state, trouble: Mutex::default() })
    }

    /// Why nothing can be written, if that is so.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads.
    pub(super) fn read<T>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, Error> {
        let state = self.lock();
        let (State::Whole(connection) | State::Degraded(connection)) = &*state else {
            return Err(Error::Closed);
        };
        work(connection).map_err(|source| Error::of(&self.path, source))
    }

    /// Writes. A store that could not be written is tried again first.
    pub(super) fn write<T>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, Error> {
        let written = self.try_write(work);
        let trouble = written.as_ref().err().filter(|e| e.is_unwritable()).map(|e| chain(e));
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
        written
    }

    fn try_write<T>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, Error> {
        let mut state = self.lock();
        if let State::Degraded(..) = *state {
            if !self.path.exists() {
                // Making it anew would forget everything.
                let (path, what) = (self.path.clone(), "the file has gone".into());
                return Err(Error::Corrupt { path, what });
            }
            *state = State::Whole(open_whole(&self.path)?);
            tracing::info!(path = %self.path.display(), "the state can be written again");
        }
        match &mut *state {
            State::Whole(connection) => {
                work(connection).map_err(|source| Error::of(&self.path, source))
            }
            State::Degraded(..) | State::Closed => Err(Error::Closed),
        }
    }

    /// Ends all use, whoever still holds the store: what the `-wal` has goes into the file.
    pub(super) fn close(&self) {
        *self.lock() = State::Closed;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // SQLite rolls back what a panicking holder had begun.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the database for writing; where there is none it is made.
fn open_whole(path: &Path) -> Result<Connection, Error> {
    if let Some(dir) = path.parent() {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| Error::Io { what: dir.display().to_string(), source })?;
    }
    if !path.exists() {
        create(path)?;
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let (connection, schema) = open_known(path, path, flags)?;
    // The last is a write, to see that it can: where the -wal and -shm of a killed daemon lie about, SQLite
    // opens on a read-only disk too, but such a connection would stay read-only for good.
    let set = connection.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
         PRAGMA busy_timeout = 5000; PRAGMA user_version = {schema};"
    ));
    set.and_then(|()| upgrade(&connection, schema)).map_err(|source| Error::of(path, source))?;
    Ok(connection)
}

/// Makes the database beside its place and moves it there, so that one that is there is complete: an
/// empty file is one that was cut off, not one that is new.
fn create(path: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { what: path.display().to_string(), source };
    if fs::metadata(with(path, "-wal")).is_ok_and(|wal| wal.len() > 0) {
        let what = "the file is not there, but its -wal is: it was moved or deleted".into();
        return Err(Error::Corrupt { path: path.to_owned(), what });
    }
    let new = with(path, ".new");
    for rest in ["", "-journal"] {
        match fs::remove_file(with(&new, rest)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io(e)),
            _ => {}
        }
    }
    let made = (|| {
        let connection = Connection::open(&new)?;
        connection.execute_batch("PRAGMA synchronous = FULL;")?;
        upgrade(&connection, 0)?;
        connection.close().map_err(|(_, error)| error)
    })();
    if let Err(source) = made {
        let _ = fs::remove_file(&new);
        return Err(Error::of(path, source));
    }
    fs::rename(&new, path).map_err(io)?;
    File::open(path.parent().unwrap_or(Path::new("."))).and_then(|d| d.sync_all()).map_err(io)
}

/// Opens the file `at` and sees that it is what it should be; errors name `path`. Returns its schema too.
fn open_known(at: &Path, path: &Path, flags: OpenFlags) -> Result<(Connection, i64), Error> {
    let corrupt = |what: String| Error::Corrupt { path: path.to_owned(), what };
    if fs::metadata(at).is_ok_and(|file| file.len() == 0) {
        return Err(corrupt("the file is empty: it was cut off".into()));
    }
    let of = |source| Error::of(path, source);
    let connection = Connection::open_with_flags(at, flags).map_err(of)?;
    connection.set_db_config(ON_CLOSE, true).map_err(of)?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |r| r.get(0)).map_err(of)?;
    if version > SCHEMA {
        return Err(Error::Newer { path: path.to_owned(), found: version, known: SCHEMA });
    }
    if version == 0 {
        return Err(corrupt("it is not a database of lunplug's".into()));
    }
    if let Some(what) = integrity(&connection, 1).map_err(of)?.into_iter().next() {
        return Err(corrupt(what));
    }
    connection.set_db_config(ON_CLOSE, false).map_err(of)?;
    Ok((connection, version))
}

/// SQLite's last connection moves what the `-wal` has into the file, a refused one too.
const ON_CLOSE: DbConfig = DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE;

/// What SQLite finds wrong with the database's pages, `most` lines at most.
pub(super) fn integrity(
    connection: &Connection,
    most: u32,
) -> Result<Vec<String>, rusqlite::Error> {
    let mut check = connection.prepare(&format!("PRAGMA integrity_check({most})"))?;
    let lines = check.query_map([], |r| r.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()?;
    Ok(lines.into_iter().filter(|line| line != "ok").collect())
}

/// The database at `path` as it is now, in memory, with what only its `-wal` has; nothing of it is
/// touched. `scratch` is where it is copied to for a moment.
pub(super) fn copy_of(path: &Path, scratch: &Path) -> Result<Connection, Error> {
    let of = |source| Error::of(path, source);
    with_copy(path, scratch, |copy| {
        let (file, schema) = open_known(copy, path, COPY)?;
        // What is in memory cannot have a WAL, and the backup copies the mode too.
        file.query_row("PRAGMA journal_mode = DELETE", [], |_| Ok(())).map_err(of)?;
        let mut memory = Connection::open_in_memory().map_err(of)?;
        let backup = rusqlite::backup::Backup::new(&file, &mut memory).map_err(of)?;
        backup.run_to_completion(1000, Duration::ZERO, None).map_err(of)?;
        drop(backup);
        upgrade(&memory, schema).map_err(of)?;
        memory.execute_batch("PRAGMA query_only = ON;").map_err(of)?;
        Ok(memory)
    })
}

const COPY: OpenFlags = OpenFlags::SQLITE_OPEN_READ_WRITE.union(OpenFlags::SQLITE_OPEN_NO_MUTEX);

/// Shows `work` a copy of the database at `path`, whatever state that is in.
pub(super) fn with_copy<T>(
    path: &Path,
    scratch: &Path,
    work: impl FnOnce(&Path) -> Result<T, Error>,
) -> Result<T, Error> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = scratch.join(format!(".state-copy-{}-{n}", std::process::id()));
    let io = |what: &Path| {
        let what = what.display().to_string();
        move |source| Error::Io { what, source }
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io(&dir))?;
    let copied = (|| {
        let copy = dir.join("copy.db");
        runtree::copy_still(path, &copy).map_err(io(path))?;
        work(&copy)
    })();
    // Nothing of it is needed any more, whatever came of it.
    let _ = fs::remove_dir_all(&dir);
    copied
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

impl Error {
    /// A failure of SQLite's, by what it means for the file.
    fn of(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                Self::Corrupt { path, what: source.to_string() }
            }
            Some(
                ErrorCode::DiskFull
                | ErrorCode::ReadOnly
                | ErrorCode::CannotOpen
                | ErrorCode::SystemIoFailure
                | ErrorCode::PermissionDenied,
            ) => Self::Unwritable { path, source },
            _ => Self::Database { path, source },
        }
    }

    /// Whether the disk, not what is on it, is in the way.
    fn is_unwritable(&self) -> bool {
        match self {
            Self::Unwritable { .. } => true,
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull
                    | io::ErrorKind::QuotaExceeded
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::PermissionDenied
            ),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests;
