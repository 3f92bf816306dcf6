//! Fibre Channel's noun: the name of a port.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Malformed;

/// A world-wide port name (FC-FS-5, 14): of an HBA's port or of a target's, or that of a node. 64 bits.
///
/// Any spelling is read: `500a0982991b8dc5`, `0x500a0982991b8dc5` (sysfs), `50:0a:09:82:99:1b:8d:c5`
/// (switches), also with dashes, and `naa.500a0982991b8dc5`, in whatever case. Written as the first of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Wwpn(u64);

impl Wwpn {
    /// As the kernel writes it in sysfs.
    pub fn sysfs(self) -> String {
        format!("{:#018x}", self.0)
    }
}

impl FromStr for Wwpn {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "16 hex digits but not all 0 or f, e.g. 500a0982991b8dc5, 0x500a0982991b8dc5 or 50:0a:09:82:99:1b:8d:c5";
        let malformed = || Malformed::new("WWPN", s, RULE);
        let lower = s.trim_end_matches('\n').to_ascii_lowercase();
        let bare = ["0x", "naa."].iter().find_map(|prefix| lower.strip_prefix(prefix));
        let digits = match bare.unwrap_or(&lower) {
            // Pairs, all by the same sign.
            pairs if bare.is_none() && pairs.len() == 23 => {
                let sign = if pairs.contains(':') { ':' } else { '-' };
                let parts: Vec<&str> = pairs.split(sign).collect();
                if parts.len() != 8 || parts.iter().any(|part| part.len() != 2) {
                    return Err(malformed());
                }
                parts.concat()
            }
            digits => digits.to_owned(),
        };
        if digits.len() != 16 || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        match u64::from_str_radix(&digits, 16) {
            // What the kernel shows of a port that has no name.
            Ok(0 | u64::MAX) | Err(_) => Err(malformed()),
            Ok(name) => Ok(Self(name)),
        }
    }
}

impl fmt::Debug for Wwpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wwpn({self})")
    }
}

impl fmt::Display for Wwpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl TryFrom<String> for Wwpn {
    type Error = Malformed;
    fn try_from(value: String) -> Result<Self, Malformed> {
        value.parse()
    }
}

impl From<Wwpn> for String {
    fn from(value: Wwpn) -> String {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_port_has_one_name_however_it_is_written() {
        for text in [
            "500a0982991b8dc5",
            "500A0982991B8DC5",
            "0x500a0982991b8dc5",
            "0X500A0982991B8DC5\n",
            "50:0a:09:82:99:1b:8d:c5",
            "50-0A-09-82-99-1B-8D-C5",
            "naa.500a0982991b8dc5",
        ] {
            let wwpn: Wwpn = text.parse().unwrap();
            assert_eq!(wwpn.to_string(), "500a0982991b8dc5", "{text}");
            assert_eq!(wwpn.sysfs(), "0x500a0982991b8dc5");
        }
        for bad in [
            "",
            "0x",
            "500a0982991b8dc",
            "500a0982991b8dc55",
            "500a0982991b8dcg",
            "+500a0982991b8dc",
            "50:0a:09:82:99:1b:8d-c5",
            "500:a:09:82:99:1b:8d:c5",
            "0x50:0a:09:82:99:1b:8d:c5",
            "0000000000000000",
            "0xffffffffffffffff",
            "iqn.2026-01.example:a",
        ] {
            assert_eq!(bad.parse::<Wwpn>().unwrap_err().what, "WWPN", "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(name in 1u64..u64::MAX) {
            let wwpn = Wwpn(name);
            prop_assert_eq!(wwpn.to_string().parse::<Wwpn>().unwrap(), wwpn);
            prop_assert_eq!(wwpn.sysfs().parse::<Wwpn>().unwrap(), wwpn);
            let stored = serde_json::to_string(&wwpn).unwrap();
            prop_assert_eq!(serde_json::from_str::<Wwpn>(&stored).unwrap(), wwpn);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,40}") {
            let _ = text.parse::<Wwpn>();
        }
    }
}
