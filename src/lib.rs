//! lunplug hot-plugs SAN volumes into running KVM virtual machines.
//!
//! The modules stand in the order of the data's way: a request enters by [`api`], is owned by the
//! VM's handler in [`vm`], which attaches the LUN by [`connector`], makes its node by [`devnode`],
//! allows it by [`cgroup`] and gives it to the guest by [`domain`]; [`journal`] remembers all of it.
//! Only [`host`] touches the system.

pub mod api;
pub mod cgroup;
pub mod cli;
pub mod config;
pub mod connector;
pub mod daemon;
pub mod devnode;
pub mod doctor;
pub mod domain;
pub mod host;
pub mod journal;
pub mod preflight;
pub mod reason;
pub mod source;
pub mod spec;
pub mod step;
pub mod telemetry;
pub mod types;
pub mod uninstall;
pub mod vm;
