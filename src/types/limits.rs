//! How much I/O a guest may do on a disk.

use serde::{Deserialize, Serialize};

use super::Malformed;

/// What a guest may do on a disk in a second; 0 is no limit. QEMU throttles, on the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct IoLimits {
    /// Bytes, read and written.
    pub total_bytes_sec: u64,
    /// Bytes read.
    pub read_bytes_sec: u64,
    /// Bytes written.
    pub write_bytes_sec: u64,
    /// Requests, reads and writes.
    pub total_iops_sec: u64,
    /// Reads.
    pub read_iops_sec: u64,
    /// Writes.
    pub write_iops_sec: u64,
}

/// The most that QEMU takes (`THROTTLE_VALUE_MAX`; libvirt's `QEMU_BLOCK_IOTUNE_MAX`).
const MOST: u64 = 1_000_000_000_000_000;

impl IoLimits {
    /// Each by libvirt's name, which is also the contract's.
    pub const fn fields(&self) -> [(&'static str, u64); 6] {
        [
            ("total_bytes_sec", self.total_bytes_sec),
            ("read_bytes_sec", self.read_bytes_sec),
            ("write_bytes_sec", self.write_bytes_sec),
            ("total_iops_sec", self.total_iops_sec),
            ("read_iops_sec", self.read_iops_sec),
            ("write_iops_sec", self.write_iops_sec),
        ]
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What QEMU takes: each within its bounds, and a total beside neither reads' nor writes'. `Err`
    /// names the field.
    pub fn check(&self) -> Result<(), (&'static str, Malformed)> {
        let fields = self.fields();
        if let Some((field, value)) = fields.iter().find(|(_, value)| *value > MOST) {
            let rule = "at most 1000000000000000 a second; 0 for no limit";
            return Err((field, Malformed::new("limit", &value.to_string(), rule)));
        }
        for of in [&fields[..3], &fields[3..]] {
            let (total, all) = of[0];
            if let Some((part, value)) = of[1..].iter().find(|(_, value)| all > 0 && *value > 0) {
                let value = format!("{all} with {part} {value}");
                let rule =
                    "a total excludes limits on reads and writes: give the one or the others";
                return Err((total, Malformed::new("limit", &value, rule)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_excludes_its_parts() {
        let none = IoLimits::default();
        none.check().unwrap();
        let iops = IoLimits { read_iops_sec: 1, write_iops_sec: 2, ..none };
        iops.check().unwrap();
        IoLimits { total_bytes_sec: 5, ..iops }.check().unwrap();
        let (field, error) = IoLimits { total_iops_sec: 3, ..iops }.check().unwrap_err();
        assert_eq!(field, "total_iops_sec");
        assert!(error.to_string().contains("3 with read_iops_sec 1"), "{error}");
        let both = IoLimits { total_bytes_sec: 1, write_bytes_sec: 1, ..none };
        assert_eq!(both.check().unwrap_err().0, "total_bytes_sec");
        let huge = IoLimits { read_bytes_sec: MOST + 1, ..none };
        assert_eq!(huge.check().unwrap_err().0, "read_bytes_sec");
    }
}
