//! Stories told in the lab's node: real kernel, real target, real libvirt, real guest.
//!
//! They run as root in the node and are ignored elsewhere; `hack/test` takes them there. Each takes
//! a snapshot of the node's storage state by the system's own tools and compares it at the end.

#![allow(clippy::disallowed_methods, reason = "a story runs programs and waits for them")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod agent;
mod attach;
mod bad_input;
mod batch;
mod cdrom;
mod chap;
mod cost;
mod daemon;
mod discover;
mod disks;
mod doctor;
mod emulation;
mod expand;
mod fc;
mod files;
mod gone;
mod grant;
mod guest;
mod heal;
mod hypervisor;
mod identity;
mod ifaces;
mod initiator;
mod kill;
mod lifecycle;
mod local;
mod migration;
mod mpathd;
mod mpconf;
mod node;
mod paths;
mod placement;
mod places;
mod policy;
mod power;
mod san;
mod scale;
mod soak;
mod state;
mod targets;
