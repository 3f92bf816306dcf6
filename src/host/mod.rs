//! The narrow doors to the system. Everything that blocks, everything unsafe and everything that
//! can be simulated stands behind one of these; nothing outside this module knows whether the host
//! is real or simulated.
#![allow(clippy::disallowed_methods)] // what is disallowed elsewhere has its place here

pub mod block;
mod blocking;
pub mod bpf;
pub mod cmd;
mod devlist;
pub mod facts;
pub mod grants;
pub mod iscsidb;
mod keyed;
pub mod killpoint;
pub mod libvirt;
pub mod listen;
pub mod local;
pub mod lock;
pub mod mounts;
pub mod multipathd;
pub mod nodes;
pub mod place;
pub mod poddir;
pub mod podfiles;
pub mod pods;
pub mod priority;
pub mod procs;
pub mod resolver;
pub mod runtree;
pub mod secrets;
mod short;
pub mod sim;
pub mod storage;
pub mod survey;
pub mod sysfs;
pub mod uevent;
mod workers;
