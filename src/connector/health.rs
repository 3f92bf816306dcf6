//! How an attached volume is on the host: told by what can be read, changing nothing.

use std::collections::BTreeMap;

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

/// What multipathd thinks of each path: whether it works, by SCSI address.
pub(crate) type Checked = BTreeMap<String, bool>;

/// Asks multipathd once for all paths: a LUN that was unmapped at the array leaves a device that the
/// kernel calls running, and only the path checker knows. Empty when it does not answer.
pub(super) async fn checked(multipathd: &dyn Multipathd) -> Checked {
    // %i: address; %t: device-mapper's state of it, `active`, `failed` or `undef` (multipath-tools,
    // print.c, snprint_dm_path_state).
    match multipathd.ask("show paths raw format \"%i %t\"").await {
        Ok(answer) => answer
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(address, state)| (address.to_owned(), state.trim() != "failed"))
            .collect(),
        Err(error) => {
            tracing::debug!(%error, "multipathd does not tell how paths are; /sys alone counts");
            Checked::new()
        }
    }
}
