//! open-iscsi's database of node and iface records, read without its tool.

mod discovery;
mod iface;
mod lock;
mod real;
#[cfg(test)]
mod tests;
mod text;

use std::io;

use async_trait::async_trait;

use crate::types::{Chap, Iface, IfaceName, Iqn, Nexus, Outcome, Portal};

pub use real::RealIscsiDb;

/// One node record: a target at a portal through an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its portal.
    pub portal: Portal,
    /// The name of its iface record, usually `default`.
    pub iface: String,
    /// The tag of the target's portal group; `None` for the one record at a portal that open-iscsi keeps
    /// without: it takes the place of any other there, and is read and removed before those with a tag.
    pub group: Option<u16>,
    /// An empty or unreadable record, as a crash of iscsiadm leaves it.
    pub corrupt: bool,
}

/// A setting of a node record: its name and its value.
pub type Setting = (&'static str, String);

/// What one look at the database's lock found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DbLockState {
    /// Nobody has it.
    Free,
    /// It was left by a process that is dead, and is removed now.
    Cleared,
    /// It is held, by one of these processes (in the form `iscsiadm[7]`) as far as that is known.
    Held(Vec<String>),
}

/// The door to the database's directory (`/etc/iscsi/nodes` on Debian, `/var/lib/iscsi/nodes`
/// elsewhere). Node records are made by iscsiadm, which knows the node's defaults; our settings are written into them
/// here, for iscsiadm would take another program, and takes credentials by its arguments alone, where everybody sees them. They are
/// removed here, each by itself: iscsiadm would take a program, and others' along that have no portal group. Iface records,
/// which people write by hand, are written whole: by iscsiadm they would take two programs, and be the
/// node's own initiator in between.
#[async_trait]
pub trait IscsiDb: Send + Sync {
    /// The records of a target, in the order of their portals.
    async fn records(&self, target: &Iqn) -> io::Result<Vec<Record>>;

    /// Removes a record that nobody is logged in by, and the links to it; also a corrupt one, which iscsiadm
    /// may refuse to touch. One that is whole by now, or corrupt, though it was not is left: `InvalidInput`. None there is fine;
    /// a database that is locked is `WouldBlock`.
    async fn remove(&self, target: &Iqn, record: &Record) -> io::Result<()>;

    /// Writes settings (usr/idbm_fields.h), and credentials in the place of those that it has, into the record of a
    /// target by an iface at a portal, whose file is its owner's alone from then on; what else is in it stays. No such record is
    /// `NotFound`, a corrupt one `InvalidData`, one without such a setting `Unsupported`, for its open-iscsi does not know that and would not
    /// heed it, and a database that is locked `WouldBlock`. No error shows a credential.
    async fn set(
        &self,
        nexus: &Nexus,
        portal: Portal,
        settings: &[Setting],
        chap: Option<&Chap>,
    ) -> io::Result<()>;

    /// Gives the record of a target at a portal that has no portal group tag this one, so that there is room for
    /// others beside it. `NotFound` when there is no such record, `WouldBlock` when the database is locked.
    async fn set_group(&self, target: &Iqn, portal: Portal, group: u16) -> io::Result<()>;

    /// Sees to it that there is the record that an iface needs: where it has an initiator name of its own,
    /// one of ours, made of the node's. `NotFound` when the node has none of that name, `WouldBlock` when the
    /// database is locked.
    async fn put_iface(&self, iface: &Iface) -> io::Result<Outcome>;

    /// The iface records of the node, ours among them.
    async fn ifaces(&self) -> io::Result<Vec<IfaceName>>;

    /// Removes an iface record of ours; `false` when it is none, is gone, or a node record goes by it.
    async fn remove_iface(&self, name: &IfaceName) -> io::Result<bool>;

    /// Writes a discovery record of ours for a portal, with credentials for its list of targets; one of
    /// ours that is there is replaced, another's is `AlreadyExists`. For one discovery that makes no
    /// node records, and to be removed after it.
    async fn put_discovery(&self, portal: Portal, chap: &Chap) -> io::Result<()>;

    /// The portals that have a discovery record of ours.
    async fn discoveries(&self) -> io::Result<Vec<Portal>>;

    /// Removes the discovery record of a portal, if it is ours.
    async fn remove_discovery(&self, portal: Portal) -> io::Result<()>;

    /// One look at the database's lock. A lock that was left by a killed iscsiadm is removed, once
    /// that is proven: mostly by the second look at it.
    async fn look_at_lock(&self) -> io::Result<DbLockState>;
}
