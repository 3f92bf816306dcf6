//! The simulated host: one set of doors behind which a small model of a node lives.
//!
//! Each door's model is in its own file; [`Faults`] makes any of them fail or hang.

mod devices;
pub mod domain;
mod drives;
mod faults;
mod files;
mod host;
pub mod hypervisor;
mod iothreads;
mod migration;
pub mod pods;
pub mod storage;

pub use faults::{Fault, FaultAction, Faults};
pub use files::{QEMU_USER, SimFile, SimFiles, SimMount};
pub use host::SimHost;
pub use storage::{Appears, FindMultipaths, PortalState, SimBlock, SimLun, SimStorage};
