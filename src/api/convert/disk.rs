//! How a disk is run, from the wire and back.

use super::{Refusal, malformed, unknown_value};
use crate::api::v1;
use crate::types::{
    BlockSize, Blocks, DetectZeroes, Discard, DiskType, IoLimits, IoMode, Malformed, Tuning,
};

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

/// I/O limits in that field of a request; none when absent.
pub fn io_limits(field: &str, limits: Option<v1::IoLimits>) -> Result<IoLimits, Refusal> {
    let wire = limits.unwrap_or_default();
    let limits = IoLimits {
        total_bytes_sec: wire.total_bytes_sec,
        read_bytes_sec: wire.read_bytes_sec,
        write_bytes_sec: wire.write_bytes_sec,
        total_iops_sec: wire.total_iops_sec,
        read_iops_sec: wire.read_iops_sec,
        write_iops_sec: wire.write_iops_sec,
    };
    limits.check().map_err(|(of, error)| malformed(format!("{field}.{of}"), &error))?;
    Ok(limits)
}

/// I/O limits on the wire; absent when there are none.
pub(super) fn wire_io_limits(limits: &IoLimits) -> Option<v1::IoLimits> {
    (!limits.is_none()).then_some(v1::IoLimits {
        total_bytes_sec: limits.total_bytes_sec,
        read_bytes_sec: limits.read_bytes_sec,
        write_bytes_sec: limits.write_bytes_sec,
        total_iops_sec: limits.total_iops_sec,
        read_iops_sec: limits.read_iops_sec,
        write_iops_sec: limits.write_iops_sec,
    })
}

/// What kind of device the guest sees.
pub(super) fn device(value: i32) -> Result<DiskType, Refusal> {
    match v1::DiskType::try_from(value) {
        Ok(v1::DiskType::Unspecified | v1::DiskType::Disk) => Ok(DiskType::Disk),
        Ok(v1::DiskType::Lun) => Ok(DiskType::Lun),
        Ok(v1::DiskType::Cdrom) => Ok(DiskType::Cdrom),
        Err(_) => {
            let rule = "disk (1), lun (2) or cdrom (3)";
            Err(unknown_value("volume.disk_type", value, rule))
        }
    }
}

/// A kind of device on the wire.
pub fn wire_disk_type(device: DiskType) -> v1::DiskType {
    match device {
        DiskType::Disk => v1::DiskType::Disk,
        DiskType::Lun => v1::DiskType::Lun,
        DiskType::Cdrom => v1::DiskType::Cdrom,
    }
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
