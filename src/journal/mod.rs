//! The two stores: what is wanted, and what was done.
//!
//! ```text
//!   Desired (SQLite, fsync)          Effects (/run, this boot)
//!   ───────────────────────          ─────────────────────────
//!   VMs as registered                per volume: each effect, written *before* it is made
//!   volumes as asked for             stamped with the boot id: a reboot voids them
//!   removals until they are done     survives kill -9, needs no fsync
//!   identities once proven
//!   sets of volumes: the last revision
//! ```
//!
//! Desired state must survive a power cut; effects must not, for the cut undid them. A volume's
//! removal is written to both, so that it can be made while the state disk is full (see
//! [`EffectsStore::put_removal`]).

mod desired;
mod effects;
pub mod inspect;
mod store;
pub mod verify;

pub use desired::{Desired, Identities, StoredVolume};
pub use effects::{DiskEffect, Effects, EffectsStore, NodeEffect};

use std::path::PathBuf;

use crate::reason::Reason;

/// A store could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state was written by a newer version; nothing was changed.
    #[error("{} has schema {found}, this version knows schemas up to {known}", .path.display())]
    Newer {
        /// The database.
        path: PathBuf,
        /// The schema it has.
        found: i64,
        /// The newest that we know.
        known: i64,
    },
    /// The database failed.
    #[error("the state in {} could not be read or written", .path.display())]
    Database {
        /// The database.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// Its disk is full, read-only or does not answer. What was asked for was not done.
    #[error("the state in {} cannot be written, so nothing new is taken on", .path.display())]
    Unwritable {
        /// The database.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The file is not the database that it was. It is never reset silently.
    #[error("the state in {} is damaged: {what}", .path.display())]
    Corrupt {
        /// The database.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A value in a store is not what it should be. It is never reset silently.
    #[error("{what} in the state is damaged")]
    Damaged {
        /// Which value.
        what: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The directory could not be made or the run-time store failed.
    #[error("{what} could not be read or written")]
    Io {
        /// Which file.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The store's worker is gone: the daemon is stopping.
    #[error("the state store is closed")]
    Closed,
}

impl Error {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Newer { .. } => Reason::StateStoreNewer,
            Self::Database { .. } | Self::Unwritable { .. } | Self::Io { .. } => {
                Reason::StateStoreFailed
            }
            Self::Corrupt { .. } | Self::Damaged { .. } => Reason::RecordCorrupt,
            Self::Closed => Reason::ShuttingDown,
        }
    }
}
