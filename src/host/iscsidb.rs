//! open-iscsi's database of node records, read without its tool.

mod real;

use std::io;

use async_trait::async_trait;

use crate::types::{Iqn, Portal};

pub use real::RealIscsiDb;

/// One node record: a target at a portal through an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its portal.
    pub portal: Portal,
    /// The name of its iface record, usually `default`.
    pub iface: String,
    /// An empty or unreadable record, as a crash of iscsiadm leaves it.
    pub corrupt: bool,
}

/// The door to the database's directory (`/etc/iscsi/nodes` on Debian, `/var/lib/iscsi/nodes`
/// elsewhere). Records are written by iscsiadm alone.
#[async_trait]
pub trait IscsiDb: Send + Sync {
    /// The records of a target, in the order of their portals.
    async fn records(&self, target: &Iqn) -> io::Result<Vec<Record>>;

    /// Removes a corrupt record's file, which iscsiadm itself may refuse to touch. A record that
    /// is not corrupt is left: `InvalidInput`.
    async fn remove_corrupt(&self, target: &Iqn, record: &Record) -> io::Result<()>;
}
