//! The libvirt domain: reading its XML, planning a change, applying it.
//!
//! ```text
//! attach: events ── live XML ─ xml ─> Domain ── diff ─> Plan ── template ─> XML ── libvirt
//!                      ^                                                            │
//!                      └──────────────── confirmed by alias, source, serial ────────┘
//! detach: events ── by alias ── libvirt ── DEVICE_REMOVED ─> gone
//!                                   ├───── DEVICE_REMOVAL_FAILED ─> the guest refused
//!                                   └───── silence until the deadline ─> unacknowledged
//! ```
//!
//! [`xml`] and [`diff`] are pure; [`apply`] and [`guest`] go through the door to libvirt.

pub mod apply;
pub mod diff;
pub mod guest;
mod place;
pub mod template;
pub mod xml;

pub use apply::{Attached, Detached, Error, attach, check, detach, observe};
pub use diff::{DesiredDisk, ErrorPolicy};
pub use guest::{Usage, usage};

use crate::types::VolumeName;

/// What the alias of each of our disks begins with. libvirt keeps an alias of the user's that
/// begins with `ua-`; nothing without this prefix is ever changed.
pub const ALIAS_PREFIX: &str = "ua-lunplug-";

/// The alias of a volume's disk.
pub fn alias(volume: &VolumeName) -> String {
    format!("{ALIAS_PREFIX}{volume}")
}
