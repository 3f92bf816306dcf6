//! The libvirt domain: reading its XML, planning a change, applying it.
//!
//! ```text
//! attach: events ── live XML ─ xml ─> Domain ── diff ─> Plan ── template ─> XML ── libvirt
//!                      ^                                                            │
//!                      └──────────────── confirmed by alias, source, serial ────────┘
//! detach: events ── by alias ── libvirt ── DEVICE_REMOVED ─> gone
//!                                   ├───── DEVICE_REMOVAL_FAILED ─> the guest refused
//!                                   └───── silence until the deadline ─> unacknowledged
//! once QEMU cannot open it any more ── by alias again ─> nothing came late
//! ```
//!
//! [`xml`] and [`diff`] are pure; [`apply`], [`unplug`] and [`guest`] go through the door to libvirt.

pub mod apply;
mod behind;
pub mod diff;
pub mod guest;
pub mod iothread;
pub mod limits;
pub mod media;
mod place;
pub mod resize;
pub mod template;
pub mod unplug;
pub mod xml;

pub use apply::{Attached, Error, attach, check, observe};
pub use diff::DesiredDisk;
pub use guest::{InGuest, Usage, usage};
pub use iothread::OwnThread;
pub use limits::limit;
pub use resize::resize;
pub use unplug::{Detached, confirm_gone, detach, settled};

use crate::types::VolumeName;

/// What the alias of each of our disks begins with. libvirt keeps an alias of the user's that
/// begins with `ua-`; nothing without this prefix is ever changed.
pub const ALIAS_PREFIX: &str = "ua-lunplug-";

/// The alias of a volume's disk.
pub fn alias(volume: &VolumeName) -> String {
    format!("{ALIAS_PREFIX}{volume}")
}
