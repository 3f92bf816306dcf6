//! Fibre Channel: which of the node's HBAs see a target port, and at which address. What follows from the scan
//! on is [`lun`]'s.
//!
//! ```text
//! routes:  HBA -> target port, as sysfs has them; as the request's initiator_target_map limits them
//! reach:   nothing, for the fabric logs in by itself. Where no HBA sees any of the ports, and only if
//!          the request allows it: a LIP, once; a scan of everything for that LUN
//! ways:    remote ports that are online, each with its H:C:T; a late one is waited for by event
//! ```
//!
//! A target port is a target, with a lease of its own by its WWPN. There is no login of ours and no logout:
//! remote ports and HBAs are left as they are.
//!
//! The kernel scans a port by itself when it logs in (`fc_scsi_scan_rport`), unless it was started with
//! `scsi_mod.scan=manual`. What it found so belongs to the volume from when that is attached
//! ([`Transport::SCANNED_BY_KERNEL`](super::lun::Transport::SCANNED_BY_KERNEL)).

mod ports;
mod reach;
#[cfg(test)]
mod tests;
mod transport;

pub(super) use ports::hbas;
pub(crate) use transport::{Fc, Made};

use super::lun::{self, Luns};

/// The LUNs that are had by Fibre Channel.
type Inner = Luns<Fc>;
type Job = lun::Job<Fc>;
type Access = lun::Access<Fc>;
