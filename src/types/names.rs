//! Names, and how a disk is shown to a guest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Malformed;

const LABEL_RULE: &str =
    "1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit (a DNS-1123 label)";

fn is_label(s: &str) -> bool {
    let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = s.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|&c| alnum(c) || c == b'-')
        && alnum(bytes[0])
        && alnum(bytes[bytes.len() - 1])
}

/// A VM's name on this node: namespace and name, both DNS-1123 labels, written `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId {
    namespace: String,
    name: String,
}

impl VmId {
    /// Checks both parts. An empty namespace means `default`, as kubectl and virtctl have it.
    pub fn new(namespace: &str, name: &str) -> Result<Self, Malformed> {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        if !is_label(namespace) {
            return Err(Malformed::new("VM namespace", namespace, LABEL_RULE));
        }
        if !is_label(name) {
            return Err(Malformed::new("VM name", name, LABEL_RULE));
        }
        Ok(Self { namespace: namespace.into(), name: name.into() })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name within the namespace.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for VmId {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        match s.split_once('/') {
            Some((namespace, name)) => Self::new(namespace, name),
            None => Self::new("", s),
        }
    }
}

impl TryFrom<String> for VmId {
    type Error = Malformed;
    fn try_from(value: String) -> Result<Self, Malformed> {
        value.parse()
    }
}

impl From<VmId> for String {
    fn from(value: VmId) -> String {
        value.to_string()
    }
}

/// A volume's name, unique within its VM: a DNS-1123 label (no dots: libvirt drops an alias with
/// characters outside `[A-Za-z0-9_-]`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);
text_type!(VolumeName);

impl FromStr for VolumeName {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        if is_label(s) {
            Ok(Self(s.into()))
        } else {
            Err(Malformed::new("volume name", s, LABEL_RULE))
        }
    }
}

/// The target name of a drive in a domain, e.g. `sda` (`<target dev=.../>`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TargetName(String);
text_type!(TargetName);

impl FromStr for TargetName {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let ok = s.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if ok && (1..=16).contains(&s.len()) {
            Ok(Self(s.into()))
        } else {
            let rule = "the drive's target name in the domain, as sda: 1 to 16 of a-z and 0-9";
            Err(Malformed::new("drive", s, rule))
        }
    }
}

/// One volume of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VolumeKey {
    /// The VM.
    pub vm: VmId,
    /// The volume within it.
    pub volume: VolumeName,
}

impl fmt::Display for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vm, self.volume)
    }
}

/// The bus a disk is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// virtio-scsi: removal is a surprise to the guest.
    #[default]
    Scsi,
    /// virtio-blk on PCI: the guest acknowledges a removal.
    Virtio,
}

impl Bus {
    /// The longest serial number that a guest sees whole, in bytes: QEMU's scsi-hd cuts its serial
    /// at 36, virtio-blk at 20 (`VIRTIO_BLK_ID_BYTES`).
    pub const fn max_serial(self) -> usize {
        match self {
            Self::Scsi => 36,
            Self::Virtio => 20,
        }
    }

    /// libvirt's name of the bus.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scsi => "scsi",
            Self::Virtio => "virtio",
        }
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Bus {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        match s {
            "scsi" => Ok(Self::Scsi),
            "virtio" => Ok(Self::Virtio),
            _ => Err(Malformed::new("bus", s, "scsi or virtio")),
        }
    }
}

/// How QEMU caches a disk on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// O_DIRECT, the only mode that is safe to share or migrate.
    #[default]
    None,
    /// Host page cache, written through.
    Writethrough,
    /// Host page cache, written back on the guest's flush.
    Writeback,
}

impl CacheMode {
    /// libvirt's name of the mode.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writethrough => "writethrough",
            Self::Writeback => "writeback",
        }
    }
}

impl FromStr for CacheMode {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        match s {
            "none" => Ok(Self::None),
            "writethrough" => Ok(Self::Writethrough),
            "writeback" => Ok(Self::Writeback),
            _ => Err(Malformed::new("cache mode", s, "none, writethrough or writeback")),
        }
    }
}

/// What QEMU does when an I/O of the guest's fails (its `werror` and `rerror`). Without one it pauses
/// the guest at a write for which there is no space, and hands everything else on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorPolicy {
    /// Pause the guest.
    Stop,
    /// Hand it to the guest.
    Report,
    /// Pretend that it did not happen: the guest's data are lost without its knowing.
    Ignore,
    /// Pause when space ran out, hand on otherwise.
    Enospace,
}

impl ErrorPolicy {
    /// libvirt's name of it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Enospace => "enospace",
        }
    }
}

impl FromStr for ErrorPolicy {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        match s {
            "stop" => Ok(Self::Stop),
            "report" => Ok(Self::Report),
            "ignore" => Ok(Self::Ignore),
            "enospace" => Ok(Self::Enospace),
            _ => Err(Malformed::new("error policy", s, "stop, report, ignore or enospace")),
        }
    }
}

/// A disk's serial number as the guest sees it; upper and lower case are kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(String);
text_type!(Serial);

impl FromStr for Serial {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let ok = |c: u8| c.is_ascii_alphanumeric() || b"_.+-".contains(&c);
        if (1..=36).contains(&s.len()) && s.bytes().all(ok) {
            Ok(Self(s.into()))
        } else {
            Err(Malformed::new(
                "serial",
                s,
                "1 to 36 (bus virtio: 20) of A-Z, a-z, 0-9, '_', '.', '+' and '-'",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "data-1", "0", &"x".repeat(63)] {
            assert!(good.parse::<VolumeName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "../x", "ä", &"x".repeat(64)] {
            let error = bad.parse::<VolumeName>().unwrap_err();
            assert!(error.to_string().contains("DNS-1123"), "{error}");
        }
    }

    #[test]
    fn a_vm_without_a_namespace_is_in_the_default_one() {
        let vm: VmId = "web-1".parse().unwrap();
        assert_eq!((vm.namespace(), vm.name()), ("default", "web-1"));
        let vm: VmId = "prod/web-1".parse().unwrap();
        assert_eq!(vm.to_string(), "prod/web-1");
        for bad in ["", "a/", "a/b/c", "A/b", "../b"] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_serial_keeps_its_case_and_has_only_what_every_bus_carries() {
        let serial: Serial = "Az09_.+-".parse().unwrap();
        assert_eq!(serial.as_str(), "Az09_.+-");
        assert!("x".repeat(36).parse::<Serial>().is_ok());
        for bad in ["", "a b", "a/b", "a\"b", "<a>", &"x".repeat(37)] {
            assert!(bad.parse::<Serial>().is_err(), "{bad}");
        }
    }
}
