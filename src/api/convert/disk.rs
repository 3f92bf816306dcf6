//! How a disk is run, from the wire and back.

use super::{Refusal, malformed, unknown_value};
use crate::api::v1;
use crate::types::{BlockSize, Blocks, DetectZeroes, Discard, IoMode, Malformed, Tuning};

/// How a disk is run, as asked for; rules between fields are `VolumeSpec::check`'s.
pub(super) fn tuning(spec: &v1::VolumeSpec) -> Result<Tuning, Refusal> {
    let logical = block_size("logical_block_size", spec.logical_block_size)?;
    let physical = block_size("physical_block_size", spec.physical_block_size)?;
    let blocks = Blocks::new(logical, physical)
        .map_err(|error| malformed("volume.logical_block_size", &error))?;
    Ok(Tuning {
        io: io_mode(spec.io)?,
        discard: discard(spec.discard)?,
        detect_zeroes: detect_zeroes(spec.detect_zeroes)?,
        blocks,
    })
}

fn block_size(field: &str, bytes: u32) -> Result<Option<BlockSize>, Refusal> {
    let size = (bytes > 0).then(|| BlockSize::try_from(bytes)).transpose();
    size.map_err(|error: Malformed| malformed(format!("volume.{field}"), &error))
}

fn io_mode(value: i32) -> Result<Option<IoMode>, Refusal> {
    use v1::IoMode as Wire;
    Ok(match Wire::try_from(value) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Native) => Some(IoMode::Native),
        Ok(Wire::Threads) => Some(IoMode::Threads),
        Ok(Wire::IoUring) => Some(IoMode::IoUring),
        Err(_) => {
            let rule = "native (1), threads (2) or io_uring (3)";
            return Err(unknown_value("volume.io", value, rule));
        }
    })
}

fn discard(value: i32) -> Result<Option<Discard>, Refusal> {
    use v1::DiscardMode as Wire;
    Ok(match Wire::try_from(value) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Ignore) => Some(Discard::Ignore),
        Ok(Wire::Unmap) => Some(Discard::Unmap),
        Err(_) => return Err(unknown_value("volume.discard", value, "ignore (1) or unmap (2)")),
    })
}

fn detect_zeroes(value: i32) -> Result<Option<DetectZeroes>, Refusal> {
    use v1::DetectZeroes as Wire;
    Ok(match Wire::try_from(value) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Off) => Some(DetectZeroes::Off),
        Ok(Wire::On) => Some(DetectZeroes::On),
        Ok(Wire::Unmap) => Some(DetectZeroes::Unmap),
        Err(_) => {
            let rule = "off (1), on (2) or unmap (3)";
            return Err(unknown_value("volume.detect_zeroes", value, rule));
        }
    })
}

/// An I/O mode on the wire.
pub fn wire_io_mode(mode: IoMode) -> v1::IoMode {
    match mode {
        IoMode::Native => v1::IoMode::Native,
        IoMode::Threads => v1::IoMode::Threads,
        IoMode::IoUring => v1::IoMode::IoUring,
    }
}

/// A discard mode on the wire.
pub fn wire_discard(mode: Discard) -> v1::DiscardMode {
    match mode {
        Discard::Ignore => v1::DiscardMode::Ignore,
        Discard::Unmap => v1::DiscardMode::Unmap,
    }
}

/// A mode of detect_zeroes on the wire.
pub fn wire_detect_zeroes(mode: DetectZeroes) -> v1::DetectZeroes {
    match mode {
        DetectZeroes::Off => v1::DetectZeroes::Off,
        DetectZeroes::On => v1::DetectZeroes::On,
        DetectZeroes::Unmap => v1::DetectZeroes::Unmap,
    }
}
