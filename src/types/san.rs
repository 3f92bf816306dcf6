//! The SAN's nouns: target, portal, LUN, identity, device number.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Malformed;

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

/// How a LUN's number is laid out in the eight bytes that the target is asked with (SAM-5 4.7), by the
/// names of Cinder's `addressing_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Addressing {
    /// `SAM2`: peripheral up to 255, flat space above.
    #[default]
    Sam2,
    /// `SAM3-flat`: flat space for every number.
    Flat,
    /// `SAM`, `transparent`: the number as the Linux SCSI layer takes it, whatever the array makes of it.
    Plain,
}

impl FromStr for Addressing {
    type Err = Malformed;
    /// Cinder's names, or those of `lun_addressing` in a volume's file.
    fn from_str(s: &str) -> Result<Self, Malformed> {
        match s {
            "SAM2" | "sam2" => Ok(Self::Sam2),
            "SAM3-flat" | "sam3_flat" => Ok(Self::Flat),
            "SAM" | "transparent" => Ok(Self::Plain),
            _ => Err(Malformed::new("LUN addressing", s, "sam2, sam3_flat or transparent")),
        }
    }
}

/// A logical unit number as arrays and people count it, and how it is addressed: `7`, `flat:7`,
/// `plain:16640`. Numbers that come to the same address are equal: `plain:7` is `7`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "StoredLun", into = "StoredLun")]
pub struct Lun {
    number: u16,
    addressing: Addressing,
}

/// A bare number, as it ever was; else the text.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StoredLun {
    Number(u64),
    Text(String),
}

/// What flat space addressing adds to a number.
const FLAT: u16 = 0x4000;

impl Lun {
    /// The highest LUN that flat space addressing can express (14 bits, SAM-5 4.7.7.3).
    pub const MAX: u64 = 16383;

    /// A number, addressed as `addressing` says: 0 to 16383, plain 0 to 32767.
    pub fn new(number: u64, addressing: Addressing) -> Result<Self, Malformed> {
        let (most, rule) = match addressing {
            Addressing::Sam2 | Addressing::Flat => (Self::MAX, "a decimal number from 0 to 16383"),
            Addressing::Plain => (0x7fff, "a decimal number from 0 to 32767"),
        };
        let small = u16::try_from(number).ok().filter(|_| number <= most);
        let number = small.ok_or_else(|| Malformed::new("LUN", &number.to_string(), rule))?;
        Ok(match addressing {
            Addressing::Plain if number < 256 => Self { number, addressing: Addressing::Sam2 },
            Addressing::Flat if number >= 256 => Self { number, addressing: Addressing::Sam2 },
            Addressing::Plain if number >= FLAT => Self::flat(number - FLAT),
            _ => Self { number, addressing },
        })
    }

    fn flat(number: u16) -> Self {
        let addressing = if number < 256 { Addressing::Flat } else { Addressing::Sam2 };
        Self { number, addressing }
    }

    /// The number as given.
    pub fn get(self) -> u16 {
        self.number
    }

    /// How it is addressed.
    pub fn addressing(self) -> Addressing {
        self.addressing
    }

    /// The number as the Linux SCSI layer writes and scans it, in decimal: flat space is
    /// `0x4000 | lun`, so LUN 256 is 16640.
    pub fn scsi(self) -> u64 {
        match self.addressing {
            Addressing::Plain => u64::from(self.number),
            Addressing::Sam2 if self.number < 256 => u64::from(self.number),
            Addressing::Sam2 | Addressing::Flat => u64::from(FLAT | self.number),
        }
    }
}

impl fmt::Display for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.addressing {
            Addressing::Sam2 => self.number.fmt(f),
            Addressing::Flat => write!(f, "flat:{}", self.number),
            Addressing::Plain => write!(f, "plain:{}", self.number),
        }
    }
}

impl TryFrom<u64> for Lun {
    type Error = Malformed;
    fn try_from(value: u64) -> Result<Self, Malformed> {
        Self::new(value, Addressing::Sam2)
    }
}

impl TryFrom<StoredLun> for Lun {
    type Error = Malformed;
    fn try_from(value: StoredLun) -> Result<Self, Malformed> {
        match value {
            StoredLun::Number(number) => number.try_into(),
            StoredLun::Text(text) => text.parse(),
        }
    }
}

impl From<Lun> for StoredLun {
    fn from(value: Lun) -> Self {
        match value.addressing {
            Addressing::Sam2 => Self::Number(value.number.into()),
            Addressing::Flat | Addressing::Plain => Self::Text(value.to_string()),
        }
    }
}

impl FromStr for Lun {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "a decimal number from 0 to 16383, or flat:NUMBER or plain:NUMBER for another addressing";
        let (addressing, digits) = match s.split_once(':') {
            Some(("flat", rest)) => (Addressing::Flat, rest),
            Some(("plain", rest)) => (Addressing::Plain, rest),
            _ => (Addressing::Sam2, s),
        };
        let decimal =
            !digits.is_empty() && digits.len() <= 5 && digits.bytes().all(|c| c.is_ascii_digit());
        let number = digits.parse().ok().filter(|_| decimal);
        number
            .and_then(|n| Self::new(n, addressing).ok())
            .ok_or_else(|| Malformed::new("LUN", s, RULE))
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
    /// The number of no block device: major 0 is for file systems without one (Documentation/admin-guide/devices.txt).
    pub const NONE: Self = Self { major: 0, minor: 0 };

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
///
/// A block device of the host's that is no LUN has the identity that its driver gives it: `dm.UUID`,
/// `rbd.FSID/POOL_ID/IMAGE_ID`, `nvme.TEXT`, `uuid.UUID` (both of NVMe's), `md.UUID`; or none but the path that
/// leads to it, `path./dev/loop0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Wwid(String);
text_type!(Wwid);

impl Wwid {
    /// The kinds of identities that are no SCSI designator.
    const OF_DEVICES: [&'static str; 6] = ["dm", "rbd", "nvme", "uuid", "md", "path"];

    /// Whether nothing is proven by it: it is the path that was asked for.
    pub fn is_path(&self) -> bool {
        self.0.starts_with("path.")
    }

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
        const RULE: &str = "naa.<16 or 32 hex>, eui.<16, 24 or 32 hex>, t10.<vendor and serial>, or multipath's 3<hex>, 2<hex>, 1<text>; of other devices dm.<uuid>, rbd.<fsid>/<pool id>/<image id>, nvme.<text>, uuid.<uuid>, md.<uuid>, path.<path>";
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
        // A path is at most as long as `HostPath` lets it be.
        let text = |t: &str| {
            !t.is_empty() && t.len() <= 1024 && t.bytes().all(|c| (0x20..0x7f).contains(&c))
        };
        let found = match s.split_once('.') {
            Some((p, rest)) if Self::OF_DEVICES.contains(&p) => text(rest).then(|| s.to_owned()),
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

/// A logical unit's serial number as VPD page 0x80 has it, without the padding on both sides: 1 to 252
/// printable characters (SPC-5 7.7.24).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UnitSerial(String);
text_type!(UnitSerial);

impl FromStr for UnitSerial {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let text = s.trim_matches(' ');
        if (1..=252).contains(&text.len()) && text.bytes().all(|c| (0x20..0x7f).contains(&c)) {
            Ok(Self(text.into()))
        } else {
            Err(Malformed::new("unit serial number", s, "1 to 252 printable ASCII characters"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn iscsi_names_are_read_strictly_and_compared_in_lower_case() {
        for good in [
            "iqn.2026-01.org.lunplug:lab",
            "iqn.1993-08.org.debian",
            "eui.02004567A425678D",
            "naa.52004567BA64678D",
        ] {
            let iqn: Iqn = good.parse().unwrap();
            assert_eq!(iqn.as_str(), good.to_ascii_lowercase());
        }
        for bad in [
            "",
            "iqn",
            "iqn.2026-13.org.x",
            "iqn.26-01.org.x",
            "iqn.2026-01",
            "iqn.2026-01.org x",
            "iqn.2026-01.org/../x",
            "eui.123",
            "naa.xyz",
            "wwn.5",
        ] {
            assert!(bad.parse::<Iqn>().is_err(), "{bad}");
        }
        assert!(format!("iqn.2026-01.org.{}", "x".repeat(207)).parse::<Iqn>().is_ok());
        assert!(format!("iqn.2026-01.org.{}", "x".repeat(208)).parse::<Iqn>().is_err());
    }

    #[test]
    fn a_portal_is_an_address_and_a_port_that_defaults() {
        for (text, shown) in [
            ("10.0.0.1", "10.0.0.1:3260"),
            ("10.0.0.1:860", "10.0.0.1:860"),
            ("[fd00::1]:3260", "[fd00::1]:3260"),
            ("[fd00::1]", "[fd00::1]:3260"),
            ("fd00::1", "[fd00::1]:3260"),
        ] {
            assert_eq!(text.parse::<Portal>().unwrap().to_string(), shown);
        }
        for bad in ["", "host", "10.0.0.1:0", "10.0.0.1:65536", "0.0.0.0", "224.0.0.1", "[::]:3260"]
        {
            assert!(bad.parse::<Portal>().is_err(), "{bad}");
        }
    }

    #[test]
    fn luns_above_255_are_addressed_flat() {
        for (lun, scsi) in [(0, 0), (1, 1), (255, 255), (256, 16_640), (16_383, 32_767)] {
            assert_eq!(Lun::try_from(lun).unwrap().scsi(), scsi);
        }
        for bad in ["", "-1", "+1", "0x1", "1 ", "16384", "99999999999999999999", "flat:", "sam:1"]
        {
            assert!(bad.parse::<Lun>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_lun_can_be_addressed_otherwise_and_what_comes_to_the_same_is_equal() {
        for (text, scsi, shown) in [
            ("flat:0", 0x4000, "flat:0"),
            ("flat:255", 0x40ff, "flat:255"),
            ("flat:256", 0x4100, "256"),
            ("plain:255", 255, "255"),
            ("plain:256", 256, "plain:256"),
            ("plain:16383", 16383, "plain:16383"),
            ("plain:16384", 0x4000, "flat:0"),
            ("plain:16640", 0x4100, "256"),
            ("plain:32767", 0x7fff, "16383"),
        ] {
            let lun: Lun = text.parse().unwrap();
            assert_eq!((lun.scsi(), lun.to_string().as_str()), (scsi, shown), "{text}");
            let stored = serde_json::to_string(&lun).unwrap();
            assert_eq!(serde_json::from_str::<Lun>(&stored).unwrap(), lun, "{stored}");
        }
        assert_eq!(serde_json::to_string(&Lun::try_from(300).unwrap()).unwrap(), "300");
        for bad in ["flat:16384", "plain:32768"] {
            assert!(bad.parse::<Lun>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_identity_is_the_same_in_sysfs_and_in_multipath_spelling() {
        let wwid: Wwid = "naa.6001405ABCDEF0123456789ABCDEF012\n".parse().unwrap();
        assert_eq!(wwid.as_str(), "naa.6001405abcdef0123456789abcdef012");
        assert_eq!(wwid.multipath(), "36001405abcdef0123456789abcdef012");
        assert_eq!(wwid.multipath().parse::<Wwid>().unwrap(), wwid);
        assert_eq!(
            "eui.0025385b71b00001".parse::<Wwid>().unwrap().multipath(),
            "20025385b71b00001"
        );
        for bad in ["", "naa.", "naa.123", "3600", "naa.600140500000000000000000000000zz", "x.y"] {
            assert!(bad.parse::<Wwid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn devices_that_are_no_luns_have_the_identity_that_their_driver_gives_them() {
        for text in [
            "dm.LVM-lXqC2qX1pQn8pQ2oUuD5mZ0Zqk1d8m3r0pK8nGf3b5sY7tWvXcJ2hL4eR6aT9uIo",
            "rbd.b2c1e3f0-0000-4000-8000-000000000001/3/10226b8b4567",
            "nvme.8086-50484d42-494e54454c-00000001",
            "uuid.b2c1e3f0-0000-4000-8000-000000000001",
            "path./dev/loop0",
        ] {
            let wwid: Wwid = text.parse().unwrap();
            assert_eq!(wwid.as_str(), text);
            assert_eq!(wwid.is_path(), text.starts_with("path."));
        }
        for bad in ["dm.", "rbd.\u{e4}", "zfs.x", "DM.x", &format!("path./{}", "x".repeat(1024))] {
            assert!(bad.parse::<Wwid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_unit_serial_is_compared_without_its_padding() {
        assert_eq!("  6000-A b ".parse::<UnitSerial>().unwrap().as_str(), "6000-A b");
        for bad in ["", "   ", "a\tb", "ä", &"x".repeat(253)] {
            assert!(bad.parse::<UnitSerial>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(lun in 0..=Lun::MAX, major in 0u32..4096, minor in 0u32..1 << 20) {
            let lun = Lun::try_from(lun).unwrap();
            prop_assert_eq!(lun.to_string().parse::<Lun>().unwrap(), lun);
            let dev = DevNum { major, minor };
            prop_assert_eq!(dev.to_string().parse::<DevNum>().unwrap(), dev);
            prop_assert_eq!(DevNum::from_dev_t(dev.to_dev_t()), dev);
        }

        #[test]
        fn no_text_makes_a_parser_panic(text in ".{0,300}") {
            let _ = text.parse::<Iqn>();
            let _ = text.parse::<Portal>();
            let _ = text.parse::<Lun>();
            let _ = text.parse::<Wwid>();
            let _ = text.parse::<DevNum>();
        }
    }
}
