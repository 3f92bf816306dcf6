//! A source by Fibre Channel in a volume's file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::plain;
use super::source::LUN_ADDRESSING;
use super::words::word;
use crate::api::{convert, v1};
use crate::cli::failure::Failure;
use crate::spec::{FcSource, FcTarget, Source};
use crate::types::{Addressing, Lun};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct FcFile {
    pub(in crate::cli) targets: Vec<FcTargetFile>,
    /// Of each HBA the target ports that it is to come to.
    #[serde(default, alias = "initiatorTargetMap", skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::cli) initiator_target_map: BTreeMap<String, Vec<String>>,
    #[serde(default, alias = "wildcardScan", skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::cli) wildcard_scan: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(in crate::cli) lip: bool,
}

/// A target port, and the LUN's number there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct FcTargetFile {
    wwpn: String,
    lun: u32,
    #[serde(default, alias = "lunAddressing", skip_serializing_if = "String::is_empty")]
    lun_addressing: String,
}

impl FcTargetFile {
    pub(in crate::cli) fn new(wwpn: String, lun: u32, addressing: Addressing) -> Self {
        let lun_addressing =
            plain(convert::wire_addressing(addressing).as_str_name(), LUN_ADDRESSING);
        Self { wwpn, lun, lun_addressing }
    }

    fn to_wire(&self) -> Result<v1::FcTarget, Failure> {
        let Self { wwpn, lun, lun_addressing } = self.clone();
        let lun_addressing = match lun_addressing.as_str() {
            "" => v1::LunAddressing::Unspecified,
            text => convert::wire_addressing(word("source.fc.lun_addressing", text)?),
        };
        Ok(v1::FcTarget { wwpn, lun, lun_addressing: lun_addressing.into() })
    }

    fn from_wire(wire: v1::FcTarget) -> Self {
        let lun_addressing = plain(wire.lun_addressing().as_str_name(), LUN_ADDRESSING);
        Self { wwpn: wire.wwpn, lun: wire.lun, lun_addressing }
    }

    /// As far as it can be read; of what came from a daemon that is all.
    fn read(&self) -> Option<FcTarget> {
        let addressing = self.lun_addressing.parse().unwrap_or_default();
        let lun = Lun::new(self.lun.into(), addressing).ok()?;
        Some(FcTarget { wwpn: self.wwpn.parse().ok()?, lun })
    }
}

impl From<FcSource> for FcFile {
    fn from(source: FcSource) -> Self {
        let target = |t: &FcTarget| {
            FcTargetFile::new(t.wwpn.to_string(), t.lun.get().into(), t.lun.addressing())
        };
        let map = source.initiator_targets.iter();
        Self {
            targets: source.targets.iter().map(target).collect(),
            initiator_target_map: map
                .map(|(hba, to)| (hba.to_string(), to.iter().map(ToString::to_string).collect()))
                .collect(),
            wildcard_scan: source.wildcard_scan,
            lip: source.lip,
        }
    }
}

impl FcFile {
    pub(super) fn to_wire(&self) -> Result<v1::FcSource, Failure> {
        let entry = |(wwpn, targets): (&String, &Vec<String>)| v1::FcInitiator {
            wwpn: wwpn.clone(),
            targets: targets.clone(),
        };
        Ok(v1::FcSource {
            targets: self.targets.iter().map(FcTargetFile::to_wire).collect::<Result<_, _>>()?,
            initiator_target_map: self.initiator_target_map.iter().map(entry).collect(),
            wildcard_scan: self.wildcard_scan,
            lip: self.lip,
        })
    }

    pub(super) fn from_wire(wire: v1::FcSource) -> Self {
        let entry = |entry: v1::FcInitiator| (entry.wwpn, entry.targets);
        Self {
            targets: wire.targets.into_iter().map(FcTargetFile::from_wire).collect(),
            initiator_target_map: wire.initiator_target_map.into_iter().map(entry).collect(),
            wildcard_scan: wire.wildcard_scan,
            lip: wire.lip,
        }
    }

    pub(super) fn url(&self) -> String {
        let map = self.initiator_target_map.iter().filter_map(|(hba, to)| {
            Some((hba.parse().ok()?, to.iter().filter_map(|wwpn| wwpn.parse().ok()).collect()))
        });
        let source = FcSource {
            targets: self.targets.iter().filter_map(FcTargetFile::read).collect(),
            initiator_targets: map.collect(),
            wildcard_scan: self.wildcard_scan,
            lip: self.lip,
        };
        Source::Fc(source).to_string()
    }
}
