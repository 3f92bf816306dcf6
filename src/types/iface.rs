//! By what a node comes to an iSCSI target: open-iscsi's iface records.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Iqn, Malformed};

/// The name of an iface record: 1 to 64 of A-Z, a-z, 0-9, '.', '_', ':' and '-', beginning with a letter or
/// digit (open-iscsi itself bounds the length, `ISCSI_MAX_IFACE_LEN`). `default` is software iSCSI over TCP.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfaceName(String);
text_type!(IfaceName);

/// What the names of our own records begin with.
const OWN: &str = "lunplug-";

impl FromStr for IfaceName {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "the name of an iface record of the node (iscsiadm -m iface), 1 to 64 of A-Z, a-z, 0-9, '.', '_', ':' and '-', beginning with a letter or digit";
        let ok = (1..=64).contains(&s.len())
            && s.starts_with(|c: char| c.is_ascii_alphanumeric())
            && s.bytes().all(|c| c.is_ascii_alphanumeric() || b"._:-".contains(&c));
        if ok { Ok(Self(s.to_owned())) } else { Err(Malformed::new("iface", s, RULE)) }
    }
}

impl Default for IfaceName {
    /// `default`.
    fn default() -> Self {
        Self("default".into())
    }
}

impl IfaceName {
    /// Its text; empty for the one that need not be named.
    pub fn unless_default(&self) -> &str {
        if *self == Self::default() { "" } else { &self.0 }
    }

    /// Whether it is the name of a record that lunplug makes and removes.
    pub fn is_own(&self) -> bool {
        self.0.starts_with(OWN)
    }
}

/// The initiator that a volume's sessions are to be made by: an iface record of the node, as it is or with
/// another initiator name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Iface {
    /// The node's iface record: transport, network interface.
    pub name: IfaceName,
    /// Whom the target is to see instead of the record's initiator, or the node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initiator: Option<Iqn>,
}

impl Iface {
    /// Whether it is the node's plain one.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The record that sessions go by: the node's own, or one of ours for that initiator name, the same for
    /// all volumes that ask for the same.
    pub fn record(&self) -> IfaceName {
        let Some(initiator) = &self.initiator else { return self.name.clone() };
        let id =
            Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("{} {initiator}", self.name).as_bytes());
        IfaceName(format!("{OWN}{}", id.simple()))
    }
}

/// A target by way of an iface record: what records, sessions and leases are of. Written `IQN`, or
/// `IQN via IFACE` where that is not `default`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nexus {
    target: Iqn,
    iface: IfaceName,
    text: String,
}

impl Nexus {
    /// The target by that iface record.
    pub fn new(target: Iqn, iface: IfaceName) -> Self {
        let text = match iface == IfaceName::default() {
            true => target.to_string(),
            false => format!("{target}{VIA}{iface}"),
        };
        Self { target, iface, text }
    }

    /// The target.
    pub fn target(&self) -> &Iqn {
        &self.target
    }

    /// The name of the iface record.
    pub fn iface(&self) -> &IfaceName {
        &self.iface
    }

    /// Both as text, which reads back as the same.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// No part has a space.
const VIA: &str = " via ";

impl AsRef<str> for Nexus {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Nexus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Nexus {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        Ok(match s.split_once(VIA) {
            Some((target, iface)) => Self::new(target.parse()?, iface.parse()?),
            None => Self::new(s.parse()?, IfaceName::default()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iface(name: &str, initiator: &str) -> Iface {
        Iface { name: name.parse().unwrap(), initiator: initiator.parse().ok() }
    }

    #[test]
    fn a_name_of_its_own_has_a_record_of_its_own() {
        assert_eq!(iface("iser", "").record().as_str(), "iser");
        let own = iface("default", "iqn.2026-01.example:vm-1").record();
        assert!(own.is_own() && own.as_str().parse::<IfaceName>().is_ok());
        assert_eq!(own.as_str().len(), 40);
        // It is on disk from one version to the next.
        assert_eq!(own.as_str(), "lunplug-0339c9d54ae159cc9c27d2ce5b897d4e");
        assert_ne!(own, iface("iser", "iqn.2026-01.example:vm-1").record());
        assert_ne!(own, iface("default", "iqn.2026-01.example:vm-2").record());
    }

    #[test]
    fn a_nexus_reads_back() {
        for text in ["iqn.2026-01.example:a", "iqn.2026-01.example:a via be2iscsi.00:11:22"] {
            assert_eq!(text.parse::<Nexus>().unwrap().as_str(), text);
        }
        assert!("iqn.2026-01.example:a via ".parse::<Nexus>().is_err());
    }

    #[test]
    fn names_that_are_paths_or_options_are_none() {
        for name in ["", "../x", "a/b", "-I", ".x", "a b", &"x".repeat(65)] {
            assert!(name.parse::<IfaceName>().is_err(), "{name}");
        }
    }
}
