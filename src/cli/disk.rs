//! Flags that say how a disk is run.

use serde::{Deserialize, Serialize};

use super::file::{self, VolumeFile};
use crate::api::v1;

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
    /// Give the guest's persistent reservations to the LUN, by the node's qemu-pr-helper; needs disk type
    /// lun.
    #[arg(long)]
    persistent_reservations: bool,
    /// Give the disk an I/O thread of its own in QEMU; needs bus virtio.
    #[arg(long)]
    dedicated_io_thread: bool,
    /// The drive of the domain that a medium (disk type cdrom) is for, by its target name as sda [default: the
    /// only one that is empty].
    #[arg(long, value_name = "NAME")]
    drive: Option<String>,
    #[command(flatten)]
    limits: LimitsFile,
}

/// How much I/O a guest may do in a second, as flags and as fields of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(id = "limit")]
#[serde(default, deny_unknown_fields)]
pub(super) struct LimitsFile {
    /// Bytes that the guest may read and write in a second, also with a unit as 50Mi.
    #[arg(long = "total-bytes", alias = "total-bytes-sec", value_name = "BYTES", value_parser = bytes)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) total_bytes_sec: Option<u64>,
    /// Bytes that it may read in a second.
    #[arg(long = "read-bytes", alias = "read-bytes-sec", value_name = "BYTES", value_parser = bytes)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) read_bytes_sec: Option<u64>,
    /// Bytes that it may write in a second.
    #[arg(long = "write-bytes", alias = "write-bytes-sec", value_name = "BYTES", value_parser = bytes)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) write_bytes_sec: Option<u64>,
    /// Requests that it may make in a second.
    #[arg(long = "total-iops", alias = "total-iops-sec", value_name = "NUMBER", value_parser = clap::value_parser!(u64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) total_iops_sec: Option<u64>,
    /// Reads that it may make in a second.
    #[arg(long = "read-iops", alias = "read-iops-sec", value_name = "NUMBER", value_parser = clap::value_parser!(u64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) read_iops_sec: Option<u64>,
    /// Writes that it may make in a second.
    #[arg(long = "write-iops", alias = "write-iops-sec", value_name = "NUMBER", value_parser = clap::value_parser!(u64))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) write_iops_sec: Option<u64>,
}

fn bytes(text: &str) -> Result<u64, String> {
    file::size(text).map_err(|error| error.to_string())
}

impl LimitsFile {
    /// The contract's form; absent when there is no limit.
    pub(super) fn to_wire(self) -> Option<v1::IoLimits> {
        let wire = v1::IoLimits {
            total_bytes_sec: self.total_bytes_sec.unwrap_or_default(),
            read_bytes_sec: self.read_bytes_sec.unwrap_or_default(),
            write_bytes_sec: self.write_bytes_sec.unwrap_or_default(),
            total_iops_sec: self.total_iops_sec.unwrap_or_default(),
            read_iops_sec: self.read_iops_sec.unwrap_or_default(),
            write_iops_sec: self.write_iops_sec.unwrap_or_default(),
        };
        (wire != v1::IoLimits::default()).then_some(wire)
    }

    /// From the contract's form.
    pub(super) fn from_wire(wire: &v1::IoLimits) -> Self {
        let some = |limit: u64| (limit > 0).then_some(limit);
        Self {
            total_bytes_sec: some(wire.total_bytes_sec),
            read_bytes_sec: some(wire.read_bytes_sec),
            write_bytes_sec: some(wire.write_bytes_sec),
            total_iops_sec: some(wire.total_iops_sec),
            read_iops_sec: some(wire.read_iops_sec),
            write_iops_sec: some(wire.write_iops_sec),
        }
    }

    /// These, with what else `below` has.
    fn over(self, below: Self) -> Self {
        Self {
            total_bytes_sec: self.total_bytes_sec.or(below.total_bytes_sec),
            read_bytes_sec: self.read_bytes_sec.or(below.read_bytes_sec),
            write_bytes_sec: self.write_bytes_sec.or(below.write_bytes_sec),
            total_iops_sec: self.total_iops_sec.or(below.total_iops_sec),
            read_iops_sec: self.read_iops_sec.or(below.read_iops_sec),
            write_iops_sec: self.write_iops_sec.or(below.write_iops_sec),
        }
    }

    /// In words; empty when there is no limit.
    pub(super) fn words(&self) -> String {
        let limits = [
            ("total_bytes_sec", self.total_bytes_sec),
            ("read_bytes_sec", self.read_bytes_sec),
            ("write_bytes_sec", self.write_bytes_sec),
            ("total_iops_sec", self.total_iops_sec),
            ("read_iops_sec", self.read_iops_sec),
            ("write_iops_sec", self.write_iops_sec),
        ];
        let said = limits.iter().filter_map(|(name, limit)| Some(format!("{name} {}", (*limit)?)));
        said.collect::<Vec<_>>().join(", ")
    }
}

impl DiskFlags {
    /// Puts what was given on top of a volume.
    pub(super) fn set(&self, volume: &mut VolumeFile) {
        for (to, from) in [
            (&mut volume.io, &self.io),
            (&mut volume.discard, &self.discard),
            (&mut volume.detect_zeroes, &self.detect_zeroes),
            (&mut volume.drive, &self.drive),
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
        volume.persistent_reservations |= self.persistent_reservations;
        volume.dedicated_io_thread |= self.dedicated_io_thread;
        let limits = self.limits.over(volume.io_limits.unwrap_or_default());
        volume.io_limits = Some(limits).filter(|limits| *limits != LimitsFile::default());
    }
}
