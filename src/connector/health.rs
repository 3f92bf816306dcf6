//! How an attached volume is on the host: told by what can be read, changing nothing.

use std::collections::BTreeSet;

use super::Attachment;
use crate::host::multipathd::Multipathd;

/// How an attached volume is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is not what was attached, in these words.
    Differs(String),
    /// It is what was attached.
    Right {
        /// What that was.
        attachment: Attachment,
        /// How its paths are.
        paths: Paths,
    },
}

/// How the paths of a volume are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// How many there should be.
    pub wanted: u32,
    /// How many are there and in use, dead ones included.
    pub present: u32,
    /// How many work.
    pub living: u32,
    /// One shows more bytes than were handed out.
    pub grown: bool,
    /// Writes to the device are refused.
    pub protected: bool,
    /// Those that do not, `3:0:0:1 (sda) is offline`, in the order of their addresses.
    pub dead: Vec<String>,
}

/// What multipathd thinks of the node's paths.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// The addresses of those that do not work; those that do are many.
    failed: BTreeSet<String>,
}

impl Checked {
    /// Whether it says that a path does not work.
    pub(crate) fn is_failed(&self, hctl: &str) -> bool {
        self.failed.contains(hctl)
    }
}

/// Asks multipathd once for all paths: a LUN that was unmapped at the array leaves a device that the
/// kernel calls running, and only the path checker knows. Empty when it does not answer.
pub(super) async fn checked(multipathd: &dyn Multipathd) -> Checked {
    // %i: address; %t: device-mapper's state of it, `active`, `failed` or `undef` (multipath-tools,
    // print.c, snprint_dm_path_state).
    match multipathd.ask("show paths raw format \"%i %t\"").await {
        Ok(answer) => {
            let lines = answer.lines().filter_map(|line| line.split_once(' '));
            let failed = lines.filter(|(_, state)| state.trim() == "failed");
            Checked { failed: failed.map(|(address, _)| address.to_owned()).collect() }
        }
        Err(error) => {
            tracing::debug!(%error, "multipathd does not tell how paths are; /sys alone counts");
            Checked::default()
        }
    }
}
