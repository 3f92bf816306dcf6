//! The field's own nouns as types: a value of one of these is known to be well-formed.
//!
//! Parsing is strict, and an error names the value and what would have been right, so that the
//! API and the CLI can hand it on unchanged.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A value that is not what its type asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is malformed: {rule}")]
pub struct Malformed {
    /// The kind of value, e.g. `IQN`.
    pub what: &'static str,
    /// The value as it was given.
    pub value: String,
    /// What a right value looks like.
    pub rule: &'static str,
}

impl Malformed {
    pub(crate) fn new(what: &'static str, value: &str, rule: &'static str) -> Self {
        // A hostile value must not be able to fill a log line.
        Self { what, value: value.chars().take(256).collect(), rule }
    }
}

/// Whether a call changed something, or found it as asked: every effect is idempotent and says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome<T = ()> {
    /// The call made the change.
    Done(T),
    /// It was already so; nothing was touched.
    Already(T),
}

impl<T> Outcome<T> {
    /// The value, however it came to be.
    pub fn into_inner(self) -> T {
        match self {
            Self::Done(value) | Self::Already(value) => value,
        }
    }

    /// Whether this call made the change.
    pub fn changed(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

/// Implements what every string type here needs: checked construction from, and display as, text.
macro_rules! text_type {
    ($name:ident) => {
        impl $name {
            /// The value as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = Malformed;
            fn try_from(value: String) -> Result<Self, Malformed> {
                value.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
    };
}

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

/// An iSCSI name: `iqn.yyyy-mm.naming-authority[:unique]`, `eui.` + 16 hex or `naa.` + 16 or 32
/// hex digits (RFC 7143, 4.2.7), at most 223 bytes. Kept in lower case, the form that names are
/// compared in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Iqn(String);
text_type!(Iqn);

impl FromStr for Iqn {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "iqn.YYYY-MM.reversed.domain[:name], eui.<16 hex> or naa.<16 or 32 hex>, at most 223 of a-z, 0-9, '-', '.' and ':'";
        let lower = s.to_ascii_lowercase();
        let hex = |t: &str, lens: &[usize]| {
            lens.contains(&t.len()) && t.bytes().all(|c| c.is_ascii_hexdigit())
        };
        let chars = |t: &str| t.bytes().all(|c| c.is_ascii_alphanumeric() || b"-.:".contains(&c));
        let iqn = |t: &str| {
            let b = t.as_bytes();
            let digits = |r: std::ops::Range<usize>| b[r].iter().all(u8::is_ascii_digit);
            b.len() > 8
                && digits(0..4)
                && b[4] == b'-'
                && digits(5..7)
                && (1..=12).contains(&t[5..7].parse().unwrap_or(0u8))
                && b[7] == b'.'
                && b[8].is_ascii_alphanumeric()
        };
        let ok = lower.len() <= 223
            && chars(&lower)
            && match lower.split_once('.') {
                Some(("iqn", rest)) => iqn(rest),
                Some(("eui", rest)) => hex(rest, &[16]),
                Some(("naa", rest)) => hex(rest, &[16, 32]),
                _ => false,
            };
        if ok { Ok(Self(lower)) } else { Err(Malformed::new("IQN", s, RULE)) }
    }
}

/// An iSCSI portal: IP address and TCP port, written `10.0.0.1:3260` or `[fd00::1]:3260`; the port
/// defaults to 3260 when parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Portal(SocketAddr);

impl Portal {
    /// The IANA port of iSCSI targets.
    pub const DEFAULT_PORT: u16 = 3260;

    /// The address.
    pub fn ip(&self) -> IpAddr {
        self.0.ip()
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.0.port()
    }
}

impl fmt::Display for Portal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Portal {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str =
            "IPV4[:PORT] or [IPV6][:PORT], a unicast address and a port from 1 to 65535";
        let bare = s.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(s);
        let address = s
            .parse::<SocketAddr>()
            .or_else(|_| bare.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, Self::DEFAULT_PORT)))
            .map_err(|_| Malformed::new("portal", s, RULE))?;
        let ip = address.ip();
        if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
            return Err(Malformed::new("portal", s, RULE));
        }
        Ok(Self(address))
    }
}

impl TryFrom<String> for Portal {
    type Error = Malformed;
    fn try_from(value: String) -> Result<Self, Malformed> {
        value.parse()
    }
}

impl From<Portal> for String {
    fn from(value: Portal) -> String {
        value.to_string()
    }
}

/// A logical unit number as arrays and people count it, 0 to 16383.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Lun(u16);

impl Lun {
    /// The highest LUN that flat space addressing can express (14 bits, SAM-5 4.7.7.3).
    pub const MAX: u64 = 16383;

    /// The number as given.
    pub fn get(self) -> u16 {
        self.0
    }

    /// The number as the Linux SCSI layer writes and scans it, in decimal: peripheral addressing up
    /// to 255, flat space (`0x4000 | lun`) above, so LUN 256 is 16640.
    pub fn scsi(self) -> u64 {
        if self.0 < 256 { u64::from(self.0) } else { 0x4000 | u64::from(self.0) }
    }
}

impl fmt::Display for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<u64> for Lun {
    type Error = Malformed;
    fn try_from(value: u64) -> Result<Self, Malformed> {
        match u16::try_from(value) {
            Ok(lun) if value <= Self::MAX => Ok(Self(lun)),
            _ => Err(Malformed::new("LUN", &value.to_string(), "a decimal number from 0 to 16383")),
        }
    }
}

impl From<Lun> for u64 {
    fn from(value: Lun) -> u64 {
        u64::from(value.0)
    }
}

impl FromStr for Lun {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let decimal = !s.is_empty() && s.len() <= 5 && s.bytes().all(|c| c.is_ascii_digit());
        s.parse::<u64>()
            .ok()
            .filter(|_| decimal)
            .and_then(|n| Self::try_from(n).ok())
            .ok_or_else(|| Malformed::new("LUN", s, "a decimal number from 0 to 16383"))
    }
}

/// A block device's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DevNum {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DevNum {
    /// From the kernel's `dev_t` as stat(2) gives it.
    pub fn from_dev_t(dev: u64) -> Self {
        Self { major: nix::libc::major(dev), minor: nix::libc::minor(dev) }
    }

    /// As mknod(2) wants it.
    pub fn to_dev_t(self) -> u64 {
        nix::libc::makedev(self.major, self.minor)
    }
}

impl fmt::Display for DevNum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DevNum {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        s.trim()
            .split_once(':')
            .and_then(|(major, minor)| {
                Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
            })
            .ok_or_else(|| Malformed::new("device number", s, "MAJOR:MINOR in decimal"))
    }
}

impl TryFrom<String> for DevNum {
    type Error = Malformed;
    fn try_from(value: String) -> Result<Self, Malformed> {
        value.parse()
    }
}

impl From<DevNum> for String {
    fn from(value: DevNum) -> String {
        value.to_string()
    }
}

/// A LUN's world-wide identity in the form of sysfs (`naa.6001405...`, `eui.0025...`,
/// `t10.VENDOR...`).
///
/// multipath's and udev's spelling is read as well: there the prefix is the designator type of
/// VPD page 0x83 as one digit (`3` NAA, `2` EUI-64, `1` T10).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Wwid(String);
text_type!(Wwid);

impl Wwid {
    /// multipath's and udev's spelling: `3` + NAA, `2` + EUI-64, `1` + T10 vendor id.
    pub fn multipath(&self) -> String {
        match self.0.split_once('.') {
            Some(("naa", rest)) => format!("3{rest}"),
            Some(("eui", rest)) => format!("2{rest}"),
            Some((_, rest)) => {
                format!("1{}", rest.split_whitespace().collect::<Vec<_>>().join("_"))
            }
            None => self.0.clone(),
        }
    }
}

impl FromStr for Wwid {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "naa.<16 or 32 hex>, eui.<16, 24 or 32 hex>, t10.<vendor and serial>, or multipath's 3<hex>, 2<hex>, 1<text>";
        let hex = |t: &str, lens: &[usize]| {
            lens.contains(&t.len()) && t.bytes().all(|c| c.is_ascii_hexdigit())
        };
        let naa = |t: &str| hex(t, &[16, 32]).then(|| format!("naa.{}", t.to_ascii_lowercase()));
        let eui =
            |t: &str| hex(t, &[16, 24, 32]).then(|| format!("eui.{}", t.to_ascii_lowercase()));
        let printable =
            |t: &str| t.len() > 8 && t.len() <= 256 && t.bytes().all(|c| (0x20..0x7f).contains(&c));
        let t10 = |t: &str| printable(t).then(|| format!("t10.{}", t.trim_end()));
        let s = s.trim_end_matches(['\n', '\0']);
        let found = match s.split_once('.') {
            Some((p, rest)) if p.eq_ignore_ascii_case("naa") => naa(rest),
            Some((p, rest)) if p.eq_ignore_ascii_case("eui") => eui(rest),
            Some((p, rest)) if p.eq_ignore_ascii_case("t10") => t10(rest),
            _ => match s.split_at_checked(1) {
                Some(("3", rest)) => naa(rest),
                Some(("2", rest)) => eui(rest),
                Some(("1", rest)) => t10(rest),
                _ => None,
            },
        };
        found.map(Self).ok_or_else(|| Malformed::new("WWID", s, RULE))
    }
}
