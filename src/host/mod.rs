//! The narrow doors to the system. Everything that blocks, everything unsafe and everything that
//! can be simulated stands behind one of these; nothing outside this module knows whether the host
//! is real or simulated.

pub mod block;
pub mod bpf;
pub mod cmd;
pub mod iscsidb;
pub mod libvirt;
pub mod lock;
pub mod multipathd;
pub mod nodes;
pub mod procs;
pub mod sim;
pub mod storage;
pub mod sysfs;
pub mod uevent;
mod workers;
