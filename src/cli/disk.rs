//! Flags that say how a disk is run.

use super::file::VolumeFile;

/// How a disk is run.
#[derive(Debug, Default, clap::Args)]
pub(super) struct DiskFlags {
    /// How QEMU does its I/O: native (needs cache none), threads or io_uring [default: native with cache
    /// none, else threads].
    #[arg(long, value_name = "MODE")]
    io: Option<String>,
    /// What becomes of the guest's discards: ignore or unmap [default: unmap].
    #[arg(long, value_name = "MODE")]
    discard: Option<String>,
    /// What QEMU makes of written zeroes: off, on or unmap [default: off].
    #[arg(long, value_name = "MODE")]
    detect_zeroes: Option<String>,
    /// The logical block size that the guest sees: a power of two from 512 to 2097152; Linux guests
    /// take up to 4096 [default: 512].
    #[arg(long, value_name = "BYTES")]
    logical_block_size: Option<u32>,
    /// The physical block size that the guest sees, not smaller than the logical one [default: that].
    #[arg(long, value_name = "BYTES")]
    physical_block_size: Option<u32>,
}

impl DiskFlags {
    /// Puts what was given on top of a volume.
    pub(super) fn set(&self, volume: &mut VolumeFile) {
        for (to, from) in [
            (&mut volume.io, &self.io),
            (&mut volume.discard, &self.discard),
            (&mut volume.detect_zeroes, &self.detect_zeroes),
        ] {
            if let Some(word) = from {
                to.clone_from(word);
            }
        }
        for (to, from) in [
            (&mut volume.logical_block_size, self.logical_block_size),
            (&mut volume.physical_block_size, self.physical_block_size),
        ] {
            *to = from.unwrap_or(*to);
        }
    }
}
