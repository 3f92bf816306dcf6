//! What a LUN proves to be: its designators from VPD page 0x83, and the one rule about what is
//! expected of it.
//!
//! A designator counts if it is associated with the logical unit and unique by construction: NAA
//! of a registered authority, EUI-64, or T10 vendor id with the unit's serial number in it (SPC-5
//! 7.7.6). Locally assigned NAA and vendor specific ones do not.

use std::fmt;

use crate::reason::Reason;
use crate::types::{UnitSerial, Wwid};

use super::Expect;

/// A LUN's proven identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The one that it is known by: the best of all.
    pub(crate) wwid: Wwid,
    /// All unique designators, the best first: multipath's udev helper may prefer another one.
    pub(crate) all: Vec<Wwid>,
    /// What else the unit says of itself.
    pub(crate) unit: Unit,
}

/// What a logical unit says of itself beside its designators, the same by whatever target and port it is
/// reached (SPC-5 6.6.2, 7.7.24). `None` is what could not be read: that contradicts nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unit {
    /// The unit serial number of VPD page 0x80.
    pub(crate) serial: Option<String>,
    /// Vendor and product of the standard INQUIRY data.
    pub(crate) product: Option<String>,
}

impl Unit {
    /// Whether both can be of one unit.
    pub(crate) fn agrees(&self, other: &Self) -> bool {
        let same = |a: &Option<String>, b: &Option<String>| a.is_none() || b.is_none() || a == b;
        same(&self.serial, &other.serial) && same(&self.product, &other.product)
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = || "unknown".to_owned();
        let serial = self.serial.clone().unwrap_or_else(unknown);
        write!(f, "product {}, serial {serial}", self.product.clone().unwrap_or_else(unknown))
    }
}

impl Identity {
    /// Whether `wwid` is one of its names.
    pub(crate) fn is(&self, wwid: &Wwid) -> bool {
        self.all.contains(wwid)
    }

    /// Whether `text` is how multipath writes one of its names.
    pub(crate) fn is_multipath(&self, text: &str) -> bool {
        self.all.iter().any(|w| w.multipath() == text)
    }
}

/// What is wrong with an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No unique designator.
    #[error(
        "the LUN at {at} has no unique identity (no NAA, EUI-64, or T10 designator with a serial)"
    )]
    NotUnique {
        /// SCSI address.
        at: String,
    },
    /// The kernel's `wwid` is not among the page's designators.
    #[error("the kernel says {kernel:?} of the LUN at {at}, but its VPD page 0x83 does not")]
    Contradiction {
        /// SCSI address.
        at: String,
        /// What sysfs has in `wwid`.
        kernel: String,
    },
    /// Not what the request asked for.
    #[error("the device at {at} is {found}, but {expected} was asked for")]
    Mismatch {
        /// SCSI address.
        at: String,
        /// What it is.
        found: Wwid,
        /// What was asked for.
        expected: Wwid,
    },
    /// Not the serial number that the request asked for.
    #[error("the device at {at} has serial number {found}, but {expected} was asked for")]
    Serial {
        /// SCSI address.
        at: String,
        /// The serial number that it has.
        found: String,
        /// What was asked for.
        expected: UnitSerial,
    },
    /// Not the size that the request asked for.
    #[error("the device at {at} has {found} bytes, but {expected} were asked for")]
    Size {
        /// SCSI address.
        at: String,
        /// Bytes that it has.
        found: u64,
        /// Bytes asked for.
        expected: u64,
    },
    /// Not what this volume was at its first attach.
    #[error("the device at {at} is {found}, but this volume was {recorded} when first attached")]
    Changed {
        /// SCSI address.
        at: String,
        /// What it is.
        found: Wwid,
        /// What was recorded.
        recorded: Wwid,
    },
    /// Two paths are two things.
    #[error("the paths disagree: {one_at} is {one}, {other_at} is {other}")]
    Disagree {
        /// SCSI address of one.
        one_at: String,
        /// What it is, with all that they disagree about.
        one: String,
        /// SCSI address of the other.
        other_at: String,
        /// What it is, with all that they disagree about.
        other: String,
    },
}

impl IdentityError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotUnique { .. } => Reason::NoUniqueIdentity,
            Self::Contradiction { .. }
            | Self::Mismatch { .. }
            | Self::Serial { .. }
            | Self::Size { .. } => Reason::IdentityMismatch,
            Self::Changed { .. } => Reason::IdentityChanged,
            Self::Disagree { .. } => Reason::PathsDisagree,
        }
    }
}

/// The identity from the raw pages as sysfs gives them (`vpd_pg83`, `vpd_pg80`) and the kernel's
/// own reading (`wwid`), for the LUN at `at`.
pub(crate) fn identify(
    at: &str,
    pg83: &[u8],
    pg80: Option<&[u8]>,
    kernel: Option<&str>,
) -> Result<Identity, IdentityError> {
    let serial = pg80.and_then(serial_number);
    let mut found: Vec<(u8, Wwid)> = designators(pg83)
        .filter_map(|d| d.wwid(serial.as_deref()).map(|wwid| (d.rank(), wwid)))
        .collect();
    found.sort();
    let mut all: Vec<Wwid> = Vec::new();
    for (_, wwid) in found {
        if !all.contains(&wwid) {
            all.push(wwid);
        }
    }
    let Some(best) = all.first().cloned() else {
        return Err(IdentityError::NotUnique { at: at.into() });
    };
    // The kernel may prefer a designator that does not count here (a SCSI name string that is an
    // iqn, a T10 without serial), but one that counts must be on the page.
    if let Some(text) = kernel
        && let Ok(wwid) = text.parse::<Wwid>()
        && (text.starts_with("naa.") || text.starts_with("eui."))
        && !all.contains(&wwid)
        && !wwid.as_str().starts_with("naa.3")
    {
        return Err(IdentityError::Contradiction { at: at.into(), kernel: text.into() });
    }
    Ok(Identity { wwid: best, all, unit: Unit { serial, product: None } })
}

/// One designation descriptor.
struct Designator<'a> {
    kind: u8,
    body: &'a [u8],
}

impl Designator<'_> {
    /// Place in the order of preference, lowest first: NAA 6, EUI-64 of 16 and 12 bytes, NAA 5 and
    /// 2, EUI-64 of 8 bytes, SCSI name string, T10. It is ours: what counts is that it is the same
    /// at every attach.
    fn rank(&self) -> u8 {
        match (self.kind, self.body.len()) {
            (3, _) if self.body[0] >> 4 == 6 => 0,
            (2, 16) => 1,
            (2, 12) => 2,
            (3, _) => 3,
            (2, _) => 4,
            (8, _) => 5,
            _ => 6,
        }
    }

    fn wwid(&self, serial: Option<&str>) -> Option<Wwid> {
        let hex = || self.body.iter().map(|b| format!("{b:02x}")).collect::<String>();
        match self.kind {
            3 => match (self.body.first()? >> 4, self.body.len()) {
                (6, 16) | (5 | 2, 8) => format!("naa.{}", hex()).parse().ok(),
                _ => None,
            },
            2 if matches!(self.body.len(), 8 | 12 | 16) => format!("eui.{}", hex()).parse().ok(),
            8 => {
                let text = text(self.body)?;
                let wwid: Wwid = text.parse().ok()?;
                // `naa.3...` is locally assigned, whatever way it is written.
                let unique = ["naa.6", "naa.5", "naa.2", "eui."];
                unique.iter().any(|p| wwid.as_str().starts_with(p)).then_some(wwid)
            }
            1 => {
                let text = text(self.body)?;
                let serial = serial?;
                // The first eight bytes are the vendor: the serial must be in what follows.
                text.get(8..)?.contains(serial).then(|| format!("t10.{text}").parse().ok())?
            }
            _ => None,
        }
    }
}

/// Printable ASCII without the padding at its end.
fn text(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches(['\0', ' ']);
    (!text.is_empty() && text.bytes().all(|c| (0x20..0x7f).contains(&c))).then(|| text.to_owned())
}

/// The designators of the logical unit itself; a truncated page ends where it is cut.
fn designators(page: &[u8]) -> impl Iterator<Item = Designator<'_>> {
    let length = match page {
        [_, 0x83, high, low, ..] => usize::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    };
    let mut rest = page.get(4..).map_or(&[][..], |body| &body[..length.min(body.len())]);
    std::iter::from_fn(move || {
        let [_, kind, _, length, after @ ..] = rest else { return None };
        let body = after.get(..usize::from(*length))?;
        rest = &after[body.len()..];
        Some((*kind, body))
    })
    // Bits 4 and 5 are the association; 0 is the logical unit.
    .filter(|(kind, body)| kind & 0x30 == 0 && !body.is_empty())
    .map(|(kind, body)| Designator { kind: kind & 0x0f, body })
}

/// The unit serial number of VPD page 0x80, without padding; `None` when it has none.
fn serial_number(page: &[u8]) -> Option<String> {
    let [_, 0x80, high, low, body @ ..] = page else { return None };
    let length = usize::from(u16::from_be_bytes([*high, *low])).min(body.len());
    text(&body[..length]).map(|s| s.trim().to_owned()).filter(|s| !s.is_empty())
}

/// The one rule about what a LUN must prove to be. What the request names is strict and has the
/// last word; otherwise the volume must be what it was, unless a new identity is accepted.
pub(crate) fn judge(
    at: &str,
    expect: &Expect,
    found: &Identity,
    size: u64,
) -> Result<(), IdentityError> {
    let wwid = || found.wwid.clone();
    if let Some(expected) = &expect.wwid {
        if !found.is(expected) {
            let expected = expected.clone();
            return Err(IdentityError::Mismatch { at: at.into(), found: wwid(), expected });
        }
    } else if let Some(recorded) = &expect.recorded
        && !expect.accept_new_identity
        && !found.is(recorded)
    {
        let recorded = recorded.clone();
        return Err(IdentityError::Changed { at: at.into(), found: wwid(), recorded });
    }
    let serial = found.unit.serial.as_deref();
    if let Some(expected) = &expect.unit_serial
        && serial != Some(expected.as_str())
    {
        let (found, expected) = (serial.unwrap_or("unknown").to_owned(), expected.clone());
        return Err(IdentityError::Serial { at: at.into(), found, expected });
    }
    match expect.size {
        Some(expected) if size < expected || size > expected && !expect.may_have_grown => {
            Err(IdentityError::Size { at: at.into(), found: size, expected })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(list: &[(u8, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, bytes) in list {
            body.extend([0x01, *kind, 0, bytes.len() as u8]);
            body.extend(*bytes);
        }
        let mut page = vec![0, 0x83];
        page.extend((body.len() as u16).to_be_bytes());
        page.extend(body);
        page
    }

    fn serial(text: &str) -> Vec<u8> {
        let mut page = vec![0, 0x80, 0, text.len() as u8];
        page.extend(text.as_bytes());
        page
    }

    const NAA6: [u8; 16] = [0x60, 1, 0x40, 5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    const NAA6_TEXT: &str = "naa.6001400501020304 05060708090a0b0c";

    fn naa6() -> String {
        NAA6_TEXT.replace(' ', "")
    }

    fn wwid_of(pg83: &[u8], pg80: Option<&[u8]>, kernel: Option<&str>) -> String {
        match identify("1:0:0:0", pg83, pg80, kernel) {
            Ok(i) => i.wwid.to_string(),
            Err(e) => e.reason().to_string(),
        }
    }

    #[test]
    fn the_best_designator_is_chosen_whatever_their_order() {
        let eui8 = [0, 0x25, 1, 2, 3, 4, 5, 6];
        let t10 = b"LIO-ORG disk1:abc-123";
        let naa5 = [0x50, 1, 2, 3, 4, 5, 6, 7];
        let naa3 = [0x30, 1, 2, 3, 4, 5, 6, 7];
        let s = serial("abc-123");
        type Case<'a> = (&'a [(u8, &'a [u8])], Option<&'a [u8]>, &'a str);
        let cases: &[Case<'_>] = &[
            (&[(1, t10), (3, &NAA6)], Some(&s), &naa6()),
            (&[(3, &NAA6), (1, t10)], Some(&s), &naa6()),
            (&[(2, &eui8), (3, &naa5)], None, "naa.5001020304050607"),
            (&[(2, &eui8), (1, t10)], Some(&s), "eui.0025010203040506"),
            (&[(1, t10)], Some(&s), "t10.LIO-ORG disk1:abc-123"),
            // Not unique: T10 without a serial, or with another; locally assigned; vendor's own.
            (&[(1, t10)], None, "NO_UNIQUE_IDENTITY"),
            (&[(1, t10)], Some(&serial("zzz")), "NO_UNIQUE_IDENTITY"),
            (&[(1, t10)], Some(&serial("   ")), "NO_UNIQUE_IDENTITY"),
            (&[(3, &naa3)], None, "NO_UNIQUE_IDENTITY"),
            (&[(0, &NAA6)], None, "NO_UNIQUE_IDENTITY"),
            (&[], None, "NO_UNIQUE_IDENTITY"),
            // The target port's own name (association 1) says nothing about the LUN.
            (&[(0x13, &NAA6)], None, "NO_UNIQUE_IDENTITY"),
            (
                &[(8, b"naa.6001400501020304050607080910abcd\0")],
                None,
                "naa.6001400501020304050607080910abcd",
            ),
            (&[(8, b"iqn.2003-01.org.x:1,L,0x0000\0")], None, "NO_UNIQUE_IDENTITY"),
        ];
        for (list, pg80, expected) in cases {
            assert_eq!(wwid_of(&page(list), *pg80, None), *expected, "{list:?}");
        }
    }

    #[test]
    fn the_kernels_reading_must_be_on_the_page() {
        let p = page(&[(3, &NAA6)]);
        assert_eq!(wwid_of(&p, None, Some(&naa6())), naa6());
        assert_eq!(
            wwid_of(&p, None, Some("naa.6001405ffffffffffffffffffffffffff")),
            naa6(),
            "not a WWID: too long"
        );
        assert_eq!(wwid_of(&p, None, Some("naa.5001405fffffffff")), "IDENTITY_MISMATCH");
        assert_eq!(wwid_of(&p, None, Some("t10.LIO-ORG something")), naa6());
    }

    #[test]
    fn multipaths_spelling_of_any_designator_is_known() {
        let p = page(&[(3, &NAA6), (2, &[0, 0x25, 1, 2, 3, 4, 5, 6])]);
        let id = identify("1:0:0:0", &p, None, None).expect("unique");
        assert!(id.is_multipath(&naa6().replace("naa.", "3")));
        assert!(id.is_multipath("20025010203040506"));
        assert!(!id.is_multipath(&naa6()));
    }

    proptest! {
        #[test]
        fn no_page_panics_and_a_cut_page_gives_nothing_new(
            bytes in proptest::collection::vec(any::<u8>(), 0..64), cut in 0usize..64,
        ) {
            let _ = identify("1:0:0:0", &bytes, Some(&bytes), None);
            let whole = page(&[(3, &NAA6), (2, &[0, 0x25, 1, 2, 3, 4, 5, 6])]);
            if let Ok(id) = identify("1:0:0:0", &whole[..cut.min(whole.len())], None, None) {
                prop_assert_eq!(id.wwid.to_string(), naa6());
            }
        }
    }

    #[test]
    fn what_is_expected_decides() {
        let w = |s: &str| s.parse::<Wwid>().expect("wwid");
        let a = w("naa.6001405000000000000000000000000a");
        let b = w("naa.6001405000000000000000000000000b");
        let eui = w("eui.0025010203040506");
        let all = vec![a.clone(), eui.clone()];
        let unit = Unit { serial: Some("6000-A".into()), product: None };
        let found = Identity { wwid: a.clone(), all, unit };
        let e = |wwid: Option<&Wwid>, size, recorded: Option<&Wwid>, accept| Expect {
            wwid: wwid.cloned(),
            unit_serial: None,
            size,
            may_have_grown: false,
            recorded: recorded.cloned(),
            accept_new_identity: accept,
        };
        let cases = [
            (e(None, None, None, false), None),
            (e(Some(&a), None, None, false), None),
            (e(Some(&eui), None, None, false), None),
            (e(Some(&b), None, None, false), Some(Reason::IdentityMismatch)),
            // The request is strict even where a new identity is accepted.
            (e(Some(&b), None, Some(&a), true), Some(Reason::IdentityMismatch)),
            (e(None, Some(100), None, false), None),
            (e(None, Some(101), None, false), Some(Reason::IdentityMismatch)),
            (e(None, Some(101), Some(&a), true), Some(Reason::IdentityMismatch)),
            (e(None, None, Some(&a), false), None),
            (e(None, None, Some(&b), false), Some(Reason::IdentityChanged)),
            (e(None, None, Some(&b), true), None),
            // What the request names replaces what was recorded.
            (e(Some(&a), None, Some(&b), false), None),
        ];
        let returns = |size| Expect { may_have_grown: true, ..e(None, size, Some(&a), false) };
        let returning = [
            (returns(Some(100)), None),
            (returns(Some(99)), None),
            (returns(Some(101)), Some(Reason::IdentityMismatch)),
            (returns(None), None),
        ];
        let serial = |text: &str, wwid| Expect {
            unit_serial: Some(text.parse().expect("serial")),
            ..e(wwid, None, Some(&a), true)
        };
        let serials = [
            (serial("6000-A", None), None),
            (serial("6000-B", None), Some(Reason::IdentityMismatch)),
            (serial("6000", Some(&a)), Some(Reason::IdentityMismatch)),
        ];
        for (expect, reason) in cases.into_iter().chain(returning).chain(serials) {
            let got = judge("1:0:0:0", &expect, &found, 100).err().map(|e| e.reason());
            assert_eq!(got, reason, "{expect:?}");
        }
    }
}
