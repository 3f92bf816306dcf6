//! Block devices by number: flush, exclusive probe, dm tables.

mod dm;
mod processes;
mod real;

use std::collections::BTreeSet;
use std::io;

use async_trait::async_trait;

use crate::types::DevNum;

pub use real::RealBlocks;

/// What an exclusive open showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exclusive {
    /// Nobody on the host has claimed it (no mount, swap, md, dm, LVM).
    Free,
    /// Somebody has (`EBUSY`).
    Held,
}

/// The door to block devices. Each call opens the device by number, never by a name in /dev.
#[async_trait]
pub trait Blocks: Send + Sync {
    /// Writes out what the host's page cache has of it and drops that (fsync, `BLKFLSBUF`).
    async fn flush(&self, dev: DevNum) -> io::Result<()>;

    /// The same by an exclusive open, which shows that nobody has claimed it: what is held is left alone.
    async fn flush_unclaimed(&self, dev: DevNum) -> io::Result<Exclusive>;

    /// Tries an exclusive open (O_EXCL) and closes it again.
    async fn exclusive(&self, dev: DevNum) -> io::Result<Exclusive>;

    /// The number of the mapped device of that uuid, by device-mapper's own word; `None` where there is none. An error
    /// where it cannot be asked.
    async fn mapped(&self, uuid: &str) -> io::Result<Option<DevNum>>;

    /// Of each of these multipath maps, in their order, the paths that the kernel uses no more until they are reinstated: I/O
    /// to them failed, or multipathd's checker said so. None of a map that is gone or cannot be asked
    /// about; an error where none can. It waits for nothing and asks nobody else.
    async fn failed_paths(&self, maps: &[DevNum]) -> io::Result<Vec<BTreeSet<DevNum>>>;

    /// Whoever has each of the devices open, in their order, as `command[pid]`, as far as /proc shows it. One look at all
    /// processes serves for all of them.
    async fn openers(&self, devs: &[DevNum]) -> io::Result<Vec<Vec<String>>>;
}

/// Device numbers in words: `8:0, 8:16`.
pub fn listed(devs: &[DevNum]) -> String {
    let each: Vec<String> = devs.iter().map(ToString::to_string).collect();
    each.join(", ")
}
