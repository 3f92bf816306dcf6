//! Sources as others write them: the `iscsi:`, `fc:` and `local:` stanzas of a Kubernetes volume, and OpenStack Cinder's
//! `connection_info`. Each field is either taken, passed over with a note, or refused by its name;
//! one that is not known is refused, for nobody knows what was meant by it.

mod fc;

use serde_yaml_ng::{Mapping, Value};

use super::chap::ChapFile;
use super::disk::LimitsFile;
use super::file::{TargetFile, VolumeFile};
use crate::types::{Addressing, Endpoint};

/// A volume that was read, and what was passed over in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    pub(super) volume: VolumeFile,
    pub(super) notes: Vec<String>,
}

/// The volume of a document in one of these forms; `None` for any other document.
pub(super) fn read(document: &Value) -> Option<Result<Foreign, String>> {
    let map = document.as_mapping()?;
    if map.contains_key("driver_volume_type") {
        return Some(cinder(Fields::new("", map)));
    }
    // As Nova keeps it.
    if let Some(inner) = map.get("connection_info").and_then(Value::as_mapping) {
        return Some(cinder(Fields::new("connection_info.", inner)));
    }
    if map.get("kind").and_then(Value::as_str) == Some("PersistentVolume") {
        let spec = map.get("spec").and_then(Value::as_mapping);
        return Some(spec.and_then(|spec| of_kind("spec.", spec)).unwrap_or_else(|| {
            let what = "only iscsi, fc and local volumes can be read";
            Err(format!("spec.iscsi is missing, and so are spec.fc and spec.local: {what}"))
        }));
    }
    let stanza = of_kind("", map)?;
    Some(if map.len() == 1 {
        stanza
    } else {
        Err("iscsi, fc or local must be the only key: the volume's name and the rest are flags"
            .into())
    })
}

/// What is under `iscsi`, `fc` or `local`.
fn of_kind(path: &str, map: &Mapping) -> Option<Result<Foreign, String>> {
    let kind = |name: &str| map.get(name).and_then(Value::as_mapping);
    if let Some(iscsi) = kind("iscsi") {
        return Some(stanza(Fields::new(&format!("{path}iscsi."), iscsi)));
    }
    if let Some(fc) = kind("fc") {
        return Some(fc::stanza(Fields::new(&format!("{path}fc."), fc)));
    }
    let mode = map.get("volumeMode").and_then(Value::as_str);
    Some(local(Fields::new(&format!("{path}local."), kind("local")?), path, mode))
}

/// The file in a PersistentVolume of mode Filesystem that is the disk, as KubeVirt has it.
const DISK_IMAGE: &str = "disk.img";

/// `spec.local` of a PersistentVolume, whose mode is beside it: a device, or a directory with the disk in it.
fn local(mut fields: Fields<'_>, path: &str, mode: Option<&str>) -> Result<Foreign, String> {
    let mut volume = VolumeFile::default();
    let given = fields.text("path")?;
    if given.is_empty() {
        return Err(format!("{}path is missing", fields.path));
    }
    match mode {
        // A stanza by itself says nothing of it.
        Some("Block") => volume.set_block(given),
        None if path.is_empty() => volume.set_block(given),
        // Filesystem is what Kubernetes takes where nothing is said.
        None | Some("Filesystem") => {
            let image = format!("{}/{DISK_IMAGE}", given.trim_end_matches('/'));
            volume.set_file(image);
        }
        Some(mode) => {
            return Err(format!("{path}volumeMode: {mode:?} is not possible: Block or Filesystem"));
        }
    }
    fields.pass("fsType", "what is there is taken as it is");
    Ok(Foreign { volume, notes: fields.end()? })
}

/// A mapping whose fields are taken one by one.
struct Fields<'a> {
    path: String,
    left: Vec<(String, &'a Value)>,
    notes: Vec<String>,
}

impl<'a> Fields<'a> {
    fn new(path: &str, map: &'a Mapping) -> Self {
        let name = |key: &Value| key.as_str().map_or_else(|| format!("{key:?}"), str::to_owned);
        let left = map.iter().map(|(key, value)| (name(key), value)).collect();
        Self { path: path.into(), left, notes: Vec::new() }
    }

    /// A field's value; null is as good as absent.
    fn take(&mut self, name: &str) -> Option<&'a Value> {
        let at = self.left.iter().position(|(key, _)| key == name)?;
        Some(self.left.swap_remove(at).1).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, value: &Value, rule: &str) -> String {
        // A value that may be a secret is not shown.
        let shown = match value {
            _ if name.contains("password") || name.contains("secret") => "(not shown)".into(),
            Value::String(text) => format!("{text:?}"),
            Value::Bool(on) => on.to_string(),
            Value::Number(number) => number.to_string(),
            _ => "(a structure)".into(),
        };
        format!("{}{name}: {shown} is not possible: {rule}", self.path)
    }

    fn text(&mut self, name: &str) -> Result<String, String> {
        match self.take(name) {
            None => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(self.wrong(name, other, "it must be a text")),
        }
    }

    fn flag(&mut self, name: &str) -> Result<bool, String> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(other) => Err(self.wrong(name, other, "it must be true or false")),
        }
    }

    fn number(&self, name: &str, value: &Value) -> Result<u32, String> {
        let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
        number
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| self.wrong(name, value, "it must be a number"))
    }

    fn list(&mut self, name: &str) -> Result<&'a [Value], String> {
        match self.take(name) {
            None => Ok(&[]),
            Some(Value::Sequence(values)) => Ok(values),
            Some(other) => Err(self.wrong(name, other, "it must be a list")),
        }
    }

    fn texts(&mut self, name: &str) -> Result<Vec<String>, String> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let values = self.list(name)?;
        let texts: Option<Vec<String>> = values.iter().map(text).collect();
        texts.ok_or_else(|| format!("{}{name}: it must be a list of texts", self.path))
    }

    /// Passes over a field; says why when it is there.
    fn pass(&mut self, name: &str, why: &str) {
        if self.take(name).is_some() {
            self.notes.push(format!("{}{name} is passed over: {why}", self.path));
        }
    }

    /// Nothing may be left.
    fn end(self) -> Result<Vec<String>, String> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(self.notes),
            Some((name, value)) => {
                Err(self.wrong(name, value, "lunplug does not know this field; take it out"))
            }
        }
    }
}

/// `spec.iscsi` of a PersistentVolume, `iscsi` of a pod's volume.
fn stanza(mut fields: Fields<'_>) -> Result<Foreign, String> {
    let mut portals = vec![fields.text("targetPortal")?];
    portals.extend(fields.texts("portals")?);
    let mut volume = VolumeFile { read_only: fields.flag("readOnly")?, ..VolumeFile::default() };
    let target = fields.text("iqn")?;
    let lun = match fields.take("lun") {
        Some(value) => fields.number("lun", value)?,
        None => return Err(format!("{}lun is missing", fields.path)),
    };
    let (iface, initiator) = (fields.text("iscsiInterface")?, fields.text("initiatorName")?);
    let secret = match fields.take("secretRef") {
        None => String::new(),
        Some(Value::Mapping(map)) => {
            let mut inner = Fields::new(&format!("{}secretRef.", fields.path), map);
            let name = inner.text("name")?;
            inner.pass("namespace", "secrets are found in lunplugd's secrets_dir by their name");
            fields.notes.extend(inner.end()?);
            name
        }
        Some(other) => return Err(fields.wrong("secretRef", other, "it must have a name")),
    };
    let chap = fields.flag("chapAuthSession")?;
    if chap && secret.is_empty() {
        return Err(format!("{}chapAuthSession needs secretRef.name", fields.path));
    }
    if !chap && !secret.is_empty() {
        fields.notes.push(format!("{}secretRef is passed over: no chapAuthSession", fields.path));
    }
    fields.pass("chapAuthDiscovery", "nothing is discovered to attach a volume");
    fields.pass("fsType", "the guest gets a block device");
    let secret = if chap { secret } else { String::new() };
    let first = TargetFile::new(target, distinct(portals), lun);
    volume.set_iscsi(first, Vec::new(), secret);
    volume.set_iface(&iface, &initiator).map_err(|failure| failure.message)?;
    Ok(Foreign { volume, notes: fields.end()? })
}

/// Each portal once, in their order. The port that is not written is 3260.
fn distinct(portals: Vec<String>) -> Vec<String> {
    let whole = |text: &String| text.parse().map_or(text.clone(), |p: Endpoint| p.to_string());
    let mut found: Vec<String> = Vec::new();
    for portal in portals.iter().filter(|p| !p.is_empty()).map(whole) {
        if !found.contains(&portal) {
            found.push(portal);
        }
    }
    found
}

/// Cinder's `connection_info`, as initialize_connection answers it.
fn cinder(mut outer: Fields<'_>) -> Result<Foreign, String> {
    let is_fc = match outer.take("driver_volume_type") {
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("iscsi") => false,
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("fibre_channel") => true,
        Some(other) => {
            let rule = "only iscsi and fibre_channel are offered";
            return Err(outer.wrong("driver_volume_type", other, rule));
        }
        None => return Err(format!("{}driver_volume_type is missing", outer.path)),
    };
    let Some(data) = outer.take("data").and_then(Value::as_mapping) else {
        return Err(format!("{}data is missing", outer.path));
    };
    let mut fields = Fields::new(&format!("{}data.", outer.path), data);
    // Nova's and Cinder's own bookkeeping.
    for name in [
        "status",
        "serial",
        "multiattach",
        "volume_id",
        "instance",
        "attached_at",
        "attach_mode",
        "attachment_id",
        "connector",
        "detached_at",
    ] {
        outer.take(name);
    }
    for name in ["volume_id", "target_discovered", "device_path", "name", "discard"] {
        fields.take(name);
    }
    let mut volume = VolumeFile::default();
    access(&mut fields, &mut volume)?;
    if is_fc {
        volume.set_fc(fc::cinder(&mut fields)?);
    } else {
        volume.chap = credentials(&mut fields)?;
        let mut targets = places(&mut fields)?;
        let addressing = addressing(&mut fields)?;
        targets.iter_mut().for_each(|target| target.address(addressing));
        let first = targets.remove(0);
        volume.set_iscsi(first, targets, String::new());
    }
    let mut notes = fields.end()?;
    notes.extend(outer.end()?);
    Ok(Foreign { volume, notes })
}

fn access(fields: &mut Fields<'_>, volume: &mut VolumeFile) -> Result<(), String> {
    match fields.text("access_mode")?.as_str() {
        "" | "rw" => {}
        "ro" => volume.read_only = true,
        other => {
            let other = Value::String(other.into());
            return Err(fields.wrong("access_mode", &other, "rw or ro"));
        }
    }
    if fields.flag("encrypted")? {
        let on = Value::Bool(true);
        return Err(fields.wrong("encrypted", &on, "lunplug decrypts nothing; the guest can"));
    }
    if fields.flag("enforce_multipath")? {
        volume.multipath = "required".into();
    }
    volume.io_limits = qos(fields)?;
    fields.pass("cacheable", "the cache mode is given with --cache");
    Ok(())
}

/// The limits of Cinder's front end, by the names that Nova has for them; bursts are not offered.
fn qos(fields: &mut Fields<'_>) -> Result<Option<LimitsFile>, String> {
    let map = match fields.take("qos_specs") {
        None => return Ok(None),
        Some(Value::Mapping(map)) => map,
        Some(other) => return Err(fields.wrong("qos_specs", other, "it must be a structure")),
    };
    let mut inner = Fields::new(&format!("{}qos_specs.", fields.path), map);
    let mut limit = |name: &str| match inner.take(name) {
        None => Ok(None),
        Some(value) => {
            let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
            let number = number.ok_or_else(|| inner.wrong(name, value, "it must be a number"))?;
            Ok::<_, String>(Some(number).filter(|n| *n > 0))
        }
    };
    let limits = LimitsFile {
        total_bytes_sec: limit("total_bytes_sec")?,
        read_bytes_sec: limit("read_bytes_sec")?,
        write_bytes_sec: limit("write_bytes_sec")?,
        total_iops_sec: limit("total_iops_sec")?,
        read_iops_sec: limit("read_iops_sec")?,
        write_iops_sec: limit("write_iops_sec")?,
    };
    fields.notes.extend(inner.end()?);
    Ok(Some(limits).filter(|limits| *limits != LimitsFile::default()))
}

fn credentials(fields: &mut Fields<'_>) -> Result<Option<ChapFile>, String> {
    let method = fields.text("auth_method")?;
    let (username, password) = (fields.text("auth_username")?, fields.text("auth_password")?);
    for name in ["discovery_auth_method", "discovery_auth_username", "discovery_auth_password"] {
        fields.pass(name, "nothing is discovered to attach a volume");
    }
    match method.as_str() {
        "" if username.is_empty() && password.is_empty() => Ok(None),
        "CHAP" | "" => Ok(Some(ChapFile::one_way(username, password.into()))),
        other => {
            let other = Value::String(other.into());
            Err(fields.wrong("auth_method", &other, "CHAP, or none at all"))
        }
    }
}

/// Targets, each with its portals and LUN, at least one: of the lists where they are there, else of the
/// single fields.
fn places(fields: &mut Fields<'_>) -> Result<Vec<TargetFile>, String> {
    let (portal, target) = (fields.text("target_portal")?, fields.text("target_iqn")?);
    let lun = match fields.take("target_lun") {
        Some(value) => Some(fields.number("target_lun", value)?),
        None => None,
    };
    let (mut portals, mut targets) =
        (fields.texts("target_portals")?, fields.texts("target_iqns")?);
    let luns = fields.list("target_luns")?;
    let mut luns =
        luns.iter().map(|v| fields.number("target_luns", v)).collect::<Result<Vec<u32>, _>>()?;
    if portals.is_empty() {
        portals = vec![portal];
    }
    if targets.is_empty() {
        targets = vec![target; portals.len()];
    }
    if luns.is_empty() {
        luns = vec![
            lun.ok_or_else(|| format!("{}target_lun is missing", fields.path))?;
            portals.len()
        ];
    }
    if targets.len() != portals.len() || luns.len() != portals.len() {
        return Err(format!(
            "{}target_portals, target_iqns and target_luns have {}, {} and {} entries: they belong together one by one",
            fields.path,
            portals.len(),
            targets.len(),
            luns.len()
        ));
    }
    Ok(grouped(portals.into_iter().zip(targets).zip(luns).map(|((p, t), l)| (t, l, p))))
}

/// What is one target and LUN by several portals, as one, in the order in which they come first.
fn grouped(entries: impl Iterator<Item = (String, u32, String)>) -> Vec<TargetFile> {
    let mut found: Vec<TargetFile> = Vec::new();
    for (target, lun, portal) in entries {
        let same = |t: &&mut TargetFile| t.lun == lun && t.target.eq_ignore_ascii_case(&target);
        match found.iter_mut().find(same) {
            Some(same) => same.portals.push(portal),
            None => found.push(TargetFile::new(target, vec![portal], lun)),
        }
    }
    for target in &mut found {
        target.portals = distinct(std::mem::take(&mut target.portals));
    }
    found
}

/// How the LUN is addressed; `transparent` where nothing is said, as os-brick has it.
fn addressing(fields: &mut Fields<'_>) -> Result<Addressing, String> {
    let mode = fields.text("addressing_mode")?;
    match mode.as_str() {
        "" => Ok(Addressing::Plain),
        text => text.parse().map_err(|_| {
            let rule = "transparent, SAM, SAM2 or SAM3-flat";
            fields.wrong("addressing_mode", &Value::String(mode.clone()), rule)
        }),
    }
}

#[cfg(test)]
mod tests;
