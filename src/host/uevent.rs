//! Kernel uevents over netlink.

mod real;

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::broadcast;

use crate::types::DevNum;

pub use real::RealUevents;

/// One uevent of the kernel's own (not udev's).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent {
    /// `add`, `remove`, `change`, `bind`, ...
    pub action: String,
    /// The device's path below /sys, without a leading slash: `devices/platform/host3/session1/...`.
    pub devpath: String,
    /// `scsi`, `block`, `iscsi_session`, ...
    pub subsystem: String,
    /// All properties, these three included.
    pub properties: BTreeMap<String, String>,
}

/// What a subscriber is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Something happened. Many may hear of it.
    Event(Arc<Uevent>),
    /// Events may have been lost (socket overrun, slow reader): read sysfs again.
    Lost,
    /// No event came for a while: read sysfs again, in case one was missed.
    Recheck,
}

/// A subscription: what happens after it was made is not missed.
#[derive(Debug)]
pub struct UeventStream(broadcast::Receiver<Notice>);

impl UeventStream {
    /// How long without events before a subscriber is told to look by itself: the slow fallback
    /// of a wait that is driven by events.
    pub(crate) const RECHECK: std::time::Duration = std::time::Duration::from_secs(1);

    /// A subscription to what is sent over `receiver`.
    pub fn new(receiver: broadcast::Receiver<Notice>) -> Self {
        Self(receiver)
    }

    /// The next event, or [`Notice::Lost`], however long it takes. Safe to cancel.
    pub async fn event(&mut self) -> Notice {
        match self.0.recv().await {
            Ok(notice) => notice,
            Err(broadcast::error::RecvError::Lagged(_)) => Notice::Lost,
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }

    /// The next notice. Never ends: when the source is gone, only `Recheck` comes.
    pub async fn next(&mut self) -> Notice {
        match tokio::time::timeout(Self::RECHECK, self.0.recv()).await {
            Ok(Ok(notice)) => notice,
            Ok(Err(broadcast::error::RecvError::Lagged(_))) => Notice::Lost,
            Ok(Err(broadcast::error::RecvError::Closed)) => {
                tokio::time::sleep(Self::RECHECK).await;
                Notice::Recheck
            }
            Err(_) => Notice::Recheck,
        }
    }
}

/// The door to the kernel's events.
pub trait Uevents: Send + Sync {
    /// Subscribes; events from now on are seen.
    fn subscribe(&self) -> UeventStream;

    /// Subscribes to udev's own events instead: each tells, by [`Notice::Recheck`], that the rules for some
    /// device have been run. Where they cannot be had the kernel's come, which are somewhat early.
    fn subscribe_to_udev(&self) -> UeventStream {
        self.subscribe()
    }

    /// Whether udev has run its rules for a block device, as far as can be seen: it is in its database then, as for
    /// libudev's `udev_device_get_is_initialized`.
    fn is_ruled(&self, _dev: DevNum) -> bool {
        true
    }
}
