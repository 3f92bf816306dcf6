//! How an attached volume is on the host: told by what can be read, changing nothing.

use std::collections::BTreeSet;

use super::Attachment;
use crate::host::block::Blocks;
use crate::types::DevNum;

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

/// Of each of these maps, in their order, the paths that do not work, by the kernel's own word: a LUN that was unmapped at
/// the array leaves devices that /sys calls running. multipathd tells the same of what it saw when it last looked, which may
/// be before the event that somebody looks for. None where it cannot be read: then /sys alone counts.
pub(super) async fn failed_paths(blocks: &dyn Blocks, maps: &[DevNum]) -> Vec<BTreeSet<DevNum>> {
    if maps.is_empty() {
        return Vec::new();
    }
    match blocks.failed_paths(maps).await {
        Ok(failed) => failed,
        Err(error) => {
            tracing::debug!(%error, "device-mapper does not tell how paths are; /sys alone counts");
            vec![BTreeSet::new(); maps.len()]
        }
    }
}
