//! Deadlines and parameters of the host's side of an attach. The configuration embeds this.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What can be set. All times are in milliseconds unless the name says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// A sysfs read or listing, and several that belong together (default 5 000: on a node that is busy a thread may
    /// wait for long).
    pub sysfs_read_ms: u64,
    /// A sysfs write on which the kernel works: scan, rescan, delete (default 20 000).
    pub sysfs_write_ms: u64,
    /// Waiting for a lock that another volume or process holds (default 60 000).
    pub lock_ms: u64,
    /// Reading or writing one of our files under /run or a record (default 20 000: where thousands of volumes are added
    /// at once, each waits for its turn).
    pub file_ms: u64,
    /// Exclusive probe of a block device, and asking who has it open (default 5 000).
    pub probe_ms: u64,
    /// Writing out what the host's cache has of a device (default 30 000).
    pub flush_ms: u64,
    /// iscsiadm working on records or logging out (default 30 000).
    pub command_ms: u64,
    /// How long open-iscsi's database may be locked by somebody (default 10 000; iscsiadm works on it
    /// for some 10 ms).
    pub db_lock_ms: u64,
    /// How long a LUN's SCSI device may take to appear after its scan returned (default 300).
    pub lun_ms: u64,
    /// How long a SCSI device's disk may take to appear, with its size (default 10 000).
    pub disk_ms: u64,
    /// How long the map may take to appear with all paths in it, from the last that was heard of any disk or map
    /// (default 15 000): where many come at once, each waits for udev's rules and for multipathd, and in all
    /// for four times as long at most.
    pub map_ms: u64,
    /// After how long without a map, and without a word of any disk or map, multipathd is told of each path
    /// (default 1 500).
    pub map_nudge_ms: u64,
    /// How long to wait for further portals once one path is proven; what comes later is added to
    /// the map in the background (default 1 000).
    pub straggler_ms: u64,
    /// With a single path: how long before the next portal is tried too (default 1 500).
    pub next_portal_ms: u64,
    /// How long a device that is to be removed may still be held by someone (default 3 000).
    pub holders_ms: u64,
    /// iSCSI node records.
    pub iscsi: IscsiSettings,
    /// Fibre Channel.
    pub fc: FcSettings,
    /// What is on the host.
    pub local: LocalSettings,
}

/// What of the host's own volumes may be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LocalSettings {
    /// Directories beneath which block devices may be given to guests: none, unless set.
    pub block_roots: Vec<PathBuf>,
    /// Directories beneath which files may be given to guests: none, unless set.
    pub file_roots: Vec<PathBuf>,
    /// What becomes of a device that has no unique identity.
    pub without_identity: WithoutIdentity,
}

/// What becomes of a device on the host that has no unique identity (a loop device, a virtio disk).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WithoutIdentity {
    /// It is refused with NO_UNIQUE_IDENTITY.
    #[default]
    Refuse,
    /// It is known by its path: what that leads to is not proven.
    Path,
}

/// Fibre Channel's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FcSettings {
    /// How long an attach waits for a target port to log in where none is online (default 10 000). One that
    /// comes later is found by its event.
    pub port_ms: u64,
}

impl Default for FcSettings {
    fn default() -> Self {
        Self { port_ms: 10_000 }
    }
}

/// What our node records say. Times in seconds, as iscsid has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IscsiSettings {
    /// `replacement_timeout` where multipath is above: 5 to 15 (default 5).
    pub replacement_timeout_multipath: u32,
    /// `replacement_timeout` of a single path (default 120).
    pub replacement_timeout_single: u32,
    /// `noop_out_interval` and `noop_out_timeout` (default 5 each).
    pub noop_interval: u32,
    /// See above.
    pub noop_timeout: u32,
    /// `login_timeout` of one try (default 5).
    pub login_timeout: u32,
    /// `initial_login_retry_max` (default 3): times the above it bounds a login to a dead portal.
    pub login_retries: u32,
}

impl Default for IscsiSettings {
    fn default() -> Self {
        Self {
            replacement_timeout_multipath: 5,
            replacement_timeout_single: 120,
            noop_interval: 5,
            noop_timeout: 5,
            login_timeout: 5,
            login_retries: 3,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sysfs_read_ms: 5_000,
            sysfs_write_ms: 20_000,
            lock_ms: 60_000,
            file_ms: 20_000,
            probe_ms: 5_000,
            flush_ms: 30_000,
            command_ms: 30_000,
            db_lock_ms: 10_000,
            lun_ms: 300,
            disk_ms: 10_000,
            map_ms: 15_000,
            map_nudge_ms: 1_500,
            straggler_ms: 1_000,
            next_portal_ms: 1_500,
            holders_ms: 3_000,
            iscsi: IscsiSettings::default(),
            fc: FcSettings::default(),
            local: LocalSettings::default(),
        }
    }
}

impl Settings {
    /// How long a login may take in all: iscsid's own bound and some seconds for itself.
    pub fn login(&self) -> Duration {
        let tries = u64::from(self.iscsi.login_retries) + 1;
        Duration::from_secs(tries * u64::from(self.iscsi.login_timeout) + 5)
    }
}

/// A number of milliseconds as a duration.
pub(crate) const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}
