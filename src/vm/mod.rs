//! One handler for each VM: a task that owns the VM's volumes; everybody else sends it messages.
//!
//! ```text
//!            add                                  guest has it
//!   absent ───────► Pending ─► Bound ─► AttachedToNode ─► MountedToPod ─► Ready
//!      ▲               │ ▲                    │                             │
//!      │   fails for   │ └── transient trouble: undone, tried again later ──┤ remove
//!      │   good:undone ▼                                                    ▼
//!      ├─────────── Failed                 UnMountedFromPod ◄────────── Detaching
//!      │                                          │                (refused or silent guest,
//!      └────────────── Gone ◄─────────────────────┘                 holder: stays, tried again)
//! ```
//!
//! The handler ([`handler`] to others, [`actor`] within) decides, by the pure rules of [`plan`]; the
//! way itself is walked by `attach` and `detach`, which write each effect to the journal before they
//! make it. Host work of different volumes runs side by side, libvirt work of one VM in order.

pub mod actor;
mod attach;
pub mod backoff;
mod checks;
mod credentials;
mod detach;
pub mod discover;
mod disk;
mod expand;
pub mod facade;
pub mod failure;
mod file;
pub mod handler;
mod incoming;
mod limits;
mod look;
mod media;
mod order;
pub mod plan;
pub mod publish;
pub mod registry;
pub mod resolve;
pub mod steps;
pub mod ways;
