//! Fibre Channel sources and HBAs.

use std::collections::{BTreeMap, BTreeSet};

use super::{addressing, malformed, parse, wire_addressing};
use crate::api::v1;
use crate::connector::Hba;
use crate::source::fc_source;
use crate::spec::{FcSource, FcTarget};
use crate::types::{Lun, Malformed, Wwpn};
use crate::vm::facade::Refusal;

/// A source from the wire.
pub(super) fn source(wire: &v1::FcSource) -> Result<FcSource, Refusal> {
    let field = |name: &str| format!("volume.source.fc.{name}");
    let target = |(n, target): (usize, &v1::FcTarget)| {
        let field = |name: &str| field(&format!("targets[{n}].{name}"));
        Ok(FcTarget {
            wwpn: parse(&field("wwpn"), &target.wwpn)?,
            lun: Lun::new(u64::from(target.lun), addressing(&field, target.lun_addressing)?)
                .map_err(|error| malformed(field("lun"), &error))?,
        })
    };
    let targets = wire.targets.iter().enumerate().map(target).collect::<Result<_, Refusal>>()?;
    let mut map: BTreeMap<Wwpn, BTreeSet<Wwpn>> = BTreeMap::new();
    for (n, entry) in wire.initiator_target_map.iter().enumerate() {
        let field = |name: String| field(&format!("initiator_target_map[{n}].{name}"));
        if entry.targets.is_empty() {
            let error = Malformed::new("WWPN", "", "at least one target port");
            return Err(malformed(field("targets".into()), &error));
        }
        let to = map.entry(parse(&field("wwpn".into()), &entry.wwpn)?).or_default();
        for (n, wwpn) in entry.targets.iter().enumerate() {
            to.insert(parse(&field(format!("targets[{n}]")), wwpn)?);
        }
    }
    let given = FcSource {
        targets,
        initiator_targets: map,
        wildcard_scan: wire.wildcard_scan,
        lip: wire.lip,
    };
    fc_source(given).map_err(|error| {
        let of_map = error.what == "initiator_target_map";
        malformed(field(if of_map { "initiator_target_map" } else { "targets" }), &error)
    })
}

/// A source on the wire.
pub(super) fn wire_source(source: &FcSource) -> v1::FcSource {
    let target = |target: &FcTarget| v1::FcTarget {
        wwpn: target.wwpn.to_string(),
        lun: u32::from(target.lun.get()),
        lun_addressing: wire_addressing(target.lun.addressing()).into(),
    };
    let entry = |(wwpn, targets): (&Wwpn, &BTreeSet<Wwpn>)| v1::FcInitiator {
        wwpn: wwpn.to_string(),
        targets: targets.iter().map(ToString::to_string).collect(),
    };
    v1::FcSource {
        targets: source.targets.iter().map(target).collect(),
        initiator_target_map: source.initiator_targets.iter().map(entry).collect(),
        wildcard_scan: source.wildcard_scan,
        lip: source.lip,
    }
}

/// An HBA on the wire.
pub(super) fn wire_hba(hba: &Hba) -> v1::Hba {
    v1::Hba {
        host: hba.host,
        wwpn: hba.wwpn.to_string(),
        wwnn: hba.wwnn.map(|name| name.to_string()).unwrap_or_default(),
        state: hba.state.clone(),
        speed: hba.speed.clone(),
        fabric: hba.fabric.map(|name| name.to_string()).unwrap_or_default(),
        port_type: hba.port_type.clone(),
    }
}
