//! The field's own nouns as types: a value of one of these is known to be well-formed.
//!
//! Parsing is strict, and an error names the value and what would have been right, so that the
//! API and the CLI can hand it on unchanged.

use serde::{Deserialize, Serialize};

/// A value that is not what its type asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is malformed: {rule}")]
pub struct Malformed {
    /// The kind of value, e.g. `IQN`.
    pub what: &'static str,
    /// The value as it was given.
    pub value: String,
    /// What a right value looks like.
    pub rule: &'static str,
}

impl Malformed {
    pub(crate) fn new(what: &'static str, value: &str, rule: &'static str) -> Self {
        // A hostile value must not be able to fill a log line.
        Self { what, value: value.chars().take(256).collect(), rule }
    }
}

/// Whether a call changed something, or found it as asked: every effect is idempotent and says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome<T = ()> {
    /// The call made the change.
    Done(T),
    /// It was already so; nothing was touched.
    Already(T),
}

impl<T> Outcome<T> {
    /// The value, however it came to be.
    pub fn into_inner(self) -> T {
        match self {
            Self::Done(value) | Self::Already(value) => value,
        }
    }

    /// Whether this call made the change.
    pub fn changed(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

/// Implements what every string type here needs: checked construction from, and display as, text.
macro_rules! text_type {
    ($name:ident) => {
        impl $name {
            /// The value as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = Malformed;
            fn try_from(value: String) -> Result<Self, Malformed> {
                value.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
    };
}

mod chap;
mod disk;
mod endpoint;
mod fc;
mod hostpath;
mod iface;
mod limits;
mod names;
mod san;

pub use chap::{Chap, Login, SecretName, SecretText};
pub use disk::{BlockSize, Blocks, DetectZeroes, Discard, DiskType, FileFormat, IoMode, Tuning};
pub use endpoint::{Endpoint, HostPort};
pub use fc::Wwpn;
pub use hostpath::HostPath;
pub use iface::{Iface, IfaceName, Nexus};
pub use limits::IoLimits;
pub use names::{Bus, CacheMode, ErrorPolicy, Serial, TargetName, VmId, VolumeKey, VolumeName};
pub use san::{Addressing, DevNum, Iqn, Lun, Portal, UnitSerial, Wwid};
