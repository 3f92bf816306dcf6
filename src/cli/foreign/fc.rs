//! Sources by Fibre Channel: `fc:` of a Kubernetes volume, Cinder's `fibre_channel`.

use std::collections::BTreeMap;

use serde_yaml_ng::Value;

use super::super::file::{FcFile, FcTargetFile, VolumeFile};
use super::{Fields, Foreign, addressing};
use crate::types::{Addressing, Wwpn};

/// `spec.fc` of a PersistentVolume, `fc` of a pod's volume.
pub(super) fn stanza(mut fields: Fields<'_>) -> Result<Foreign, String> {
    let mut volume = VolumeFile { read_only: fields.flag("readOnly")?, ..VolumeFile::default() };
    let wwpns = fields.texts("targetWWNs")?;
    let wwids = fields.texts("wwids")?;
    fields.pass("fsType", "the guest gets a block device");
    if wwpns.is_empty() {
        // Kubernetes looks for such a one among the disks that the host has already.
        let needed = "lunplug looks for a LUN at its target ports, and takes the wwid as what it must prove to be";
        return Err(format!("{}targetWWNs and lun are missing: {needed}", fields.path));
    }
    let lun = match fields.take("lun") {
        Some(value) => fields.number("lun", value)?,
        None => return Err(format!("{}lun is missing", fields.path)),
    };
    match &wwids[..] {
        [] => {}
        [wwid] => volume.wwid.clone_from(wwid),
        _ => {
            let value = Value::String(wwids.join(", "));
            return Err(fields.wrong("wwids", &value, "one: a LUN has one identity"));
        }
    }
    let target = |wwpn| FcTargetFile::new(wwpn, lun, Addressing::default());
    let targets = distinct(wwpns).into_iter().map(target).collect();
    volume.set_fc(FcFile { targets, ..FcFile::default() });
    Ok(Foreign { volume, notes: fields.end()? })
}

/// Each port once, in their order, however it is spelled.
fn distinct(wwpns: Vec<String>) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for wwpn in wwpns {
        let wwpn = wwpn.parse().map_or(wwpn, |known: Wwpn| known.to_string());
        if !found.contains(&wwpn) {
            found.push(wwpn);
        }
    }
    found
}

/// The places of `connection_info.data`.
pub(super) fn cinder(fields: &mut Fields<'_>) -> Result<FcFile, String> {
    let (wwpns, luns) = (ports(fields)?, luns(fields)?);
    let addressing = addressing(fields)?;
    let luns = match (&luns[..], wwpns.len()) {
        ([lun], n) => vec![*lun; n],
        (all, n) if all.len() == n => luns,
        (all, n) => {
            return Err(format!(
                "{}target_wwns and target_luns have {n} and {} entries: they belong together one by one",
                fields.path,
                all.len()
            ));
        }
    };
    let mut targets: Vec<FcTargetFile> = Vec::new();
    for (wwpn, lun) in wwpns.into_iter().zip(luns) {
        let wwpn = wwpn.parse().map_or(wwpn, |known: Wwpn| known.to_string());
        let target = FcTargetFile::new(wwpn, lun, addressing);
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    let initiator_target_map = map(fields)?;
    let wildcard_scan = fields.flag("enable_wildcard_scan")?;
    Ok(FcFile { targets, initiator_target_map, wildcard_scan, lip: false })
}

/// `target_wwn` is one or a list of them; drivers are known that give `target_wwns`.
fn ports(fields: &mut Fields<'_>) -> Result<Vec<String>, String> {
    let several = fields.texts("target_wwns")?;
    let one = match fields.take("target_wwn") {
        None => Vec::new(),
        Some(Value::String(wwpn)) => vec![wwpn.clone()],
        Some(Value::Sequence(values)) => {
            let texts = values.iter().map(|value| value.as_str().map(str::to_owned)).collect();
            let texts: Option<Vec<String>> = texts;
            texts.ok_or_else(|| format!("{}target_wwn: it must be texts", fields.path))?
        }
        Some(other) => {
            return Err(fields.wrong("target_wwn", other, "it must be a text or a list of them"));
        }
    };
    let wwpns = if several.is_empty() { one } else { several };
    if wwpns.is_empty() {
        return Err(format!("{}target_wwn is missing", fields.path));
    }
    Ok(wwpns)
}

fn luns(fields: &mut Fields<'_>) -> Result<Vec<u32>, String> {
    let one = match fields.take("target_lun") {
        Some(value) => Some(fields.number("target_lun", value)?),
        None => None,
    };
    let several = fields.list("target_luns")?;
    let several = several.iter().map(|v| fields.number("target_luns", v));
    let several = several.collect::<Result<Vec<u32>, _>>()?;
    match one {
        _ if !several.is_empty() => Ok(several),
        Some(lun) => Ok(vec![lun]),
        None => Err(format!("{}target_lun is missing", fields.path)),
    }
}

/// Of each HBA the target ports that it is zoned to.
fn map(fields: &mut Fields<'_>) -> Result<BTreeMap<String, Vec<String>>, String> {
    const NAME: &str = "initiator_target_map";
    let map = match fields.take(NAME) {
        None => return Ok(BTreeMap::new()),
        Some(Value::Mapping(map)) => map,
        Some(other) => return Err(fields.wrong(NAME, other, "it must be a structure")),
    };
    let mut inner = Fields::new(&format!("{}{NAME}.", fields.path), map);
    let hbas: Vec<String> = inner.left.iter().map(|(hba, _)| hba.clone()).collect();
    let mut found = BTreeMap::new();
    for hba in hbas {
        let targets = inner.texts(&hba)?;
        // One that is zoned to none of them has no path.
        if !targets.is_empty() {
            found.insert(hba, targets);
        }
    }
    Ok(found)
}
