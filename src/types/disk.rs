//! How QEMU runs a disk: what is told apart beside its bus and its cache mode.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{CacheMode, Malformed};

/// An enum whose values are words of libvirt's.
macro_rules! words {
    ($(#[$of_all:meta])+ $name:ident $what:literal $rule:literal
     { $($(#[$of:meta])+ $value:ident $word:literal,)* }) => {
        $(#[$of_all])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$of])+ #[serde(rename = $word)] $value,)*
        }

        impl $name {
            /// libvirt's word for it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$value => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = Malformed;
            fn from_str(text: &str) -> Result<Self, Malformed> {
                match text {
                    $($word => Ok(Self::$value),)*
                    _ => Err(Malformed::new($what, text, $rule)),
                }
            }
        }
    };
}

words! {
    /// How QEMU does a disk's I/O on the host.
    IoMode "I/O mode" "native, threads or io_uring" {
        /// Linux AIO; needs O_DIRECT, that is cache mode `none`.
        Native "native",
        /// Blocking calls on a pool of threads.
        Threads "threads",
        /// io_uring, where QEMU and the pod's seccomp profile have it.
        IoUring "io_uring",
    }
}

words! {
    /// What becomes of the guest's discards.
    Discard "discard mode" "ignore or unmap" {
        /// They go no further.
        Ignore "ignore",
        /// They are passed on to the LUN.
        Unmap "unmap",
    }
}

words! {
    /// What QEMU makes of a write of zeroes.
    DetectZeroes "mode of detect_zeroes" "off, on or unmap" {
        /// A write like any other.
        Off "off",
        /// An offloaded write of zeroes.
        On "on",
        /// A discard where that leaves zeroes.
        Unmap "unmap",
    }
}

words! {
    /// What kind of device the guest sees.
    #[derive(Default)]
    DiskType "disk type" "disk, lun or cdrom" {
        /// A disk emulated by QEMU.
        #[default]
        Disk "disk",
        /// The LUN itself: the guest's SCSI commands go to it.
        Lun "lun",
        /// A medium in a cdrom drive that the domain has.
        Cdrom "cdrom",
    }
}

words! {
    /// What is in a file that is a disk. It is said and never guessed: in a raw one the guest may have written
    /// the header of any other.
    #[derive(Default)]
    FileFormat "file format" "raw or qcow2" {
        /// The disk's bytes, one after the other.
        #[default]
        Raw "raw",
        /// QEMU's copy-on-write image.
        Qcow2 "qcow2",
    }
}

impl FileFormat {
    /// Whether it is the disk's bytes alone.
    pub fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

impl DiskType {
    /// Whether it is a disk emulated by QEMU.
    pub fn is_disk(&self) -> bool {
        *self == Self::Disk
    }

    /// Whether it is a medium in a drive.
    pub fn is_cdrom(&self) -> bool {
        *self == Self::Cdrom
    }
}

/// A block size in bytes that a guest sees: a power of two from 512 to 2097152 (QEMU's
/// `MIN_BLOCK_SIZE` and `MAX_BLOCK_SIZE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BlockSize(u32);

impl BlockSize {
    /// What a disk has unless it says otherwise.
    pub const DEFAULT: Self = Self(512);

    /// In bytes.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = Malformed;
    fn try_from(bytes: u32) -> Result<Self, Malformed> {
        if bytes.is_power_of_two() && (512..=2_097_152).contains(&bytes) {
            return Ok(Self(bytes));
        }
        let rule = "a power of two from 512 to 2097152";
        Err(Malformed::new("block size", &bytes.to_string(), rule))
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.0
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a disk is run, as far as it was asked for; what was not has its default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Tuning {
    /// How QEMU does its I/O; [`Self::io_mode`] where `None`.
    pub io: Option<IoMode>,
    /// What becomes of discards; they are passed on where `None`.
    pub discard: Option<Discard>,
    /// What QEMU makes of written zeroes; nothing where `None`.
    pub detect_zeroes: Option<DetectZeroes>,
    /// Logical and physical block size; QEMU's own where `None`.
    pub blocks: Option<Blocks>,
}

/// The block sizes that a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blocks {
    /// The unit of the guest's addresses.
    pub logical: BlockSize,
    /// What it had better write at once.
    pub physical: BlockSize,
}

impl Blocks {
    /// From what was asked for: the other follows from one alone. QEMU refuses a logical size that is
    /// larger than the physical one (`blkconf_blocksizes`).
    pub fn new(
        logical: Option<BlockSize>,
        physical: Option<BlockSize>,
    ) -> Result<Option<Self>, Malformed> {
        let (logical, physical) = match (logical, physical) {
            (None, None) => return Ok(None),
            (Some(logical), None) => (logical, logical),
            (logical, Some(physical)) => (logical.unwrap_or(BlockSize::DEFAULT), physical),
        };
        if logical > physical {
            let value = format!("{logical} with physical_block_size {physical}");
            let rule = "logical_block_size must not be larger than physical_block_size";
            return Err(Malformed::new("logical block size", &value, rule));
        }
        Ok(Some(Self { logical, physical }))
    }
}

impl Tuning {
    /// How QEMU does the I/O of a disk with that cache mode: native AIO wherever it can be.
    pub fn io_mode(&self, cache: CacheMode) -> IoMode {
        let default = if cache == CacheMode::None { IoMode::Native } else { IoMode::Threads };
        self.io.unwrap_or(default)
    }

    /// What becomes of discards.
    pub fn discard_mode(&self) -> Discard {
        self.discard.unwrap_or(Discard::Unmap)
    }

    /// The same without what would be so anyway: two volumes that mean the same are the same.
    #[must_use]
    pub fn normal(self, cache: CacheMode) -> Self {
        let default = Self::default();
        Self {
            io: self.io.filter(|io| *io != default.io_mode(cache)),
            discard: self.discard.filter(|discard| *discard != default.discard_mode()),
            detect_zeroes: self.detect_zeroes.filter(|zeroes| *zeroes != DetectZeroes::Off),
            blocks: self.blocks,
        }
    }

    /// Rules between its fields and the cache mode. `Err` names the field.
    pub fn check(&self, cache: CacheMode) -> Result<(), (&'static str, Malformed)> {
        if self.io == Some(IoMode::Native) && cache != CacheMode::None {
            let value = format!("native with cache {}", cache.as_str());
            let rule = "io native needs cache none: give cache none, or io threads or io_uring";
            return Err(("io", Malformed::new("I/O mode", &value, rule)));
        }
        if self.detect_zeroes == Some(DetectZeroes::Unmap) && self.discard_mode() != Discard::Unmap
        {
            let rule = "detect_zeroes unmap needs discard unmap: give that, or detect_zeroes on";
            let value = "unmap with discard ignore";
            return Err(("detect_zeroes", Malformed::new("mode of detect_zeroes", value, rule)));
        }
        Ok(())
    }

    /// Whether nothing was asked for.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// The first field in which two differ.
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        let logical = |t: &Self| t.blocks.map(|b| b.logical);
        [
            ("io", self.io != other.io),
            ("discard", self.discard != other.discard),
            ("detect_zeroes", self.detect_zeroes != other.detect_zeroes),
            ("logical_block_size", logical(self) != logical(other)),
            ("physical_block_size", self.blocks != other.blocks),
        ]
        .into_iter()
        .find_map(|(field, differs)| differs.then_some(field))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(bytes: u32) -> BlockSize {
        bytes.try_into().unwrap()
    }

    #[test]
    fn a_block_size_is_a_power_of_two_within_bounds() {
        for bytes in [512, 4096, 2_097_152] {
            assert_eq!(size(bytes).get(), bytes);
        }
        for bytes in [0, 1, 256, 513, 1000, 4_194_304, u32::MAX] {
            let error = BlockSize::try_from(bytes).unwrap_err().to_string();
            assert!(error.contains(&bytes.to_string()) && error.contains("512 to 2097152"));
        }
    }

    #[test]
    fn one_block_size_stands_for_both() {
        let blocks = |l: Option<u32>, p: Option<u32>| Blocks::new(l.map(size), p.map(size));
        let both = |logical, physical| Blocks { logical: size(logical), physical: size(physical) };
        assert_eq!(blocks(None, None).unwrap(), None);
        assert_eq!(blocks(Some(4096), None).unwrap(), Some(both(4096, 4096)));
        assert_eq!(blocks(None, Some(4096)).unwrap(), Some(both(512, 4096)));
        assert_eq!(blocks(Some(512), Some(4096)).unwrap(), Some(both(512, 4096)));
        let error = blocks(Some(4096), Some(512)).unwrap_err().to_string();
        assert!(error.contains("4096") && error.contains("physical_block_size 512"), "{error}");
    }

    #[test]
    fn native_io_needs_cache_none() {
        let native = Tuning { io: Some(IoMode::Native), ..Tuning::default() };
        native.check(CacheMode::None).unwrap();
        for cache in [CacheMode::Writeback, CacheMode::Writethrough] {
            let (field, error) = native.check(cache).unwrap_err();
            let text = error.to_string();
            assert!(field == "io" && text.contains("cache none") && text.contains(cache.as_str()));
            assert_eq!(Tuning::default().io_mode(cache), IoMode::Threads);
        }
        let zeroes = Tuning {
            detect_zeroes: Some(DetectZeroes::Unmap),
            discard: Some(Discard::Ignore),
            ..Tuning::default()
        };
        assert_eq!(zeroes.check(CacheMode::None).unwrap_err().0, "detect_zeroes");
    }

    fn tunings() -> impl Strategy<Value = (Tuning, CacheMode)> {
        let io = prop::option::of(prop::sample::select(vec![
            IoMode::Native,
            IoMode::Threads,
            IoMode::IoUring,
        ]));
        let discard = prop::option::of(prop::sample::select(vec![Discard::Ignore, Discard::Unmap]));
        let zeroes = prop::option::of(prop::sample::select(vec![
            DetectZeroes::Off,
            DetectZeroes::On,
            DetectZeroes::Unmap,
        ]));
        let cache = prop::sample::select(vec![CacheMode::None, CacheMode::Writeback]);
        let size = || prop::option::of((9u32..=21).prop_map(|n| size(1 << n)));
        (io, discard, zeroes, size(), size(), cache).prop_map(
            |(io, discard, detect_zeroes, logical, physical, cache)| {
                let blocks = Blocks::new(logical, physical).ok().flatten();
                (Tuning { io, discard, detect_zeroes, blocks }, cache)
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_normal_means_the_same_and_is_stored_and_read((tuning, cache) in tunings()) {
            let normal = tuning.normal(cache);
            prop_assert_eq!(normal.io_mode(cache), tuning.io_mode(cache));
            prop_assert_eq!(normal.discard_mode(), tuning.discard_mode());
            prop_assert_eq!(normal.normal(cache), normal);
            prop_assert_eq!(tuning.check(cache).is_ok(), normal.check(cache).is_ok());
            let json = serde_json::to_string(&normal).unwrap();
            prop_assert_eq!(serde_json::from_str::<Tuning>(&json).unwrap(), normal);
            prop_assert_eq!(tuning.first_difference(&tuning), None);
        }
    }
}
