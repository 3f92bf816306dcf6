//! The whole handler on a simulated host: what its user meets, and what is left afterwards.
//!
//! Each life of the daemon is a runtime of its own with a paused clock. It ends by being dropped at
//! an await, which is what `kill -9` is: nothing is told, nothing is cleaned up.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod batch;
mod cancel;
mod cdrom;
mod chap;
mod crash;
mod discover;
mod disks;
mod expand;
mod faults;
mod fc;
mod fc_ability;
mod files;
mod force;
mod guest;
mod identity;
mod ifaces;
mod iothread;
mod journal;
mod late;
mod leases;
mod local;
mod main_job;
mod matrix;
mod moves;
mod names;
mod protected;
mod reconcile;
mod restart;
mod scale;
mod serving;
mod starts;
mod stores;
mod targets;
mod walk;
mod world;
