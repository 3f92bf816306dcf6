//! All programs that lunplug runs, resolved once.

mod real;

use std::io;
use std::time::Duration;

use async_trait::async_trait;

use super::place::PlaceError;

pub use real::RealCommands;

/// A program that may be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tool {
    /// open-iscsi's administration tool.
    Iscsiadm,
    /// multipath-tools' one-shot tool (`multipath -w WWID`).
    Multipath,
    /// device-mapper's tool, only to put an `error` table under a map that is held after its revoke.
    Dmsetup,
    /// LVM's, only for `lunplug doctor`.
    Lvmconfig,
}

impl Tool {
    /// The program's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iscsiadm => "iscsiadm",
            Self::Multipath => "multipath",
            Self::Dmsetup => "dmsetup",
            Self::Lvmconfig => "lvmconfig",
        }
    }

    /// Debian's package that has it.
    pub const fn package(self) -> &'static str {
        match self {
            Self::Iscsiadm => "open-iscsi",
            Self::Multipath => "multipath-tools",
            Self::Dmsetup => "dmsetup",
            Self::Lvmconfig => "lvm2",
        }
    }
}

/// What a program left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A program could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum CmdError {
    /// It is not installed.
    #[error("{} is not installed (package {})", .0.name(), .0.package())]
    Missing(Tool),
    /// It did not end in time, and was ended (SIGTERM, then SIGKILL).
    #[error("{} did not end within {deadline:?}", .tool.name())]
    TimedOut {
        /// The program.
        tool: Tool,
        /// The deadline it had.
        deadline: Duration,
    },
    /// It could not be started or read.
    #[error("{} could not be run", .tool.name())]
    Io {
        /// The program.
        tool: Tool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The daemon that it belongs to cannot be used: nobody serves, or not one to be trusted.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// The door to other programs. No shell, ever; a non-zero exit is an `Output`, not an error.
#[async_trait]
pub trait Commands: Send + Sync {
    /// Runs `tool` with `args`, standard input closed, environment cleared but for `PATH` and `LC_ALL=C`.
    async fn run(&self, tool: Tool, args: &[&str], deadline: Duration) -> Result<Output, CmdError>;

    /// How many programs were started so far.
    fn started(&self) -> u64;
}
