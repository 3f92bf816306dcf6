//! Results as tables, JSON and YAML. The JSON and YAML forms are stable: fields are only added.

use std::collections::BTreeMap;
use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{Table, presets};
use jiff::Timestamp;
use serde::Serialize;

use super::file::{VolumeFile, plain};
use crate::api::v1;

/// How to print results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One JSON document; for a stream, one a line.
    Json,
    /// One YAML document; for a stream, several.
    Yaml,
}

/// Writes one JSON or YAML document.
pub(super) fn document(
    format: Format,
    value: &impl Serialize,
    to: &mut dyn Write,
) -> io::Result<()> {
    match format {
        Format::Yaml => {
            let text = serde_yaml_ng::to_string(value).map_err(io::Error::other)?;
            write!(to, "---\n{text}")
        }
        Format::Json | Format::Table => {
            serde_json::to_writer(&mut *to, value)?;
            writeln!(to)
        }
    }
}

/// Text that cannot drive a terminal: messages may quote targets, pods and guests.
pub(super) fn clean(text: &str) -> String {
    text.trim_end().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Writes a table; nothing but the header when there are no rows.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>, to: &mut dyn Write) -> io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)).collect::<Vec<_>>());
    }
    for line in table.to_string().lines() {
        // The library puts a space before the first column.
        let line = line.trim_end();
        writeln!(to, "{}", line.strip_prefix(' ').unwrap_or(line))?;
    }
    Ok(())
}

/// Writes `name: value` lines, those without a value left out.
pub(super) fn facts(facts: &[(&str, String)], to: &mut dyn Write) -> io::Result<()> {
    let width = facts.iter().map(|(name, _)| name.len() + 1).max().unwrap_or_default();
    for (name, value) in facts.iter().filter(|(_, value)| !value.is_empty()) {
        writeln!(to, "{:width$}  {}", format!("{name}:"), clean(value))?;
    }
    Ok(())
}

/// A time of the contract.
pub(super) fn time(at: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    at.and_then(|at| Timestamp::new(at.seconds, at.nanos).ok())
}

/// How long ago, in its two largest units at most.
pub(super) fn age(since: Option<Timestamp>) -> String {
    let Some(since) = since else { return String::new() };
    let s = Timestamp::now().duration_since(since).as_secs().max(0);
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{}m", s / 3600, s / 60 % 60),
        _ => format!("{}d{}h", s / 86_400, s / 3600 % 24),
    }
}

/// A size for people, exact.
pub(super) fn size(bytes: u64) -> String {
    let units = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];
    let (mut n, mut unit) = (bytes, 0);
    while n >= 1024 && n.is_multiple_of(1024) && unit + 1 < units.len() {
        (n, unit) = (n / 1024, unit + 1);
    }
    format!("{n}{}", units[unit])
}

/// `namespace/name`.
pub(super) fn vm_name(id: Option<&v1::VmId>) -> String {
    id.map(|id| format!("{}/{}", id.namespace, id.name)).unwrap_or_default()
}

/// A volume as results show it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct VolumeView {
    pub(super) vm: String,
    pub(super) name: String,
    pub(super) phase: &'static str,
    pub(super) since: Option<Timestamp>,
    pub(super) target: String,
    pub(super) trouble: Option<TroubleView>,
    pub(super) device: Option<DeviceView>,
    pub(super) generation: u64,
    pub(super) gave_up: Vec<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) vm_needs_hba: bool,
    pub(super) spec: VolumeFile,
    /// What portals that were given by name were resolved to.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) resolved_portals: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct TroubleView {
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) remedy: String,
    pub(super) transient: bool,
    pub(super) retry_at: Option<Timestamp>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct DeviceView {
    pub(super) dev: String,
    pub(super) wwid: String,
    pub(super) size_bytes: u64,
    pub(super) map: String,
    pub(super) paths: u32,
}

impl From<&v1::Volume> for VolumeView {
    fn from(volume: &v1::Volume) -> Self {
        let spec = volume.spec.as_ref().map(VolumeFile::from_wire).unwrap_or_default();
        Self {
            vm: vm_name(volume.vm.as_ref()),
            name: spec.name.clone(),
            phase: phase(volume.phase()),
            since: time(volume.since.as_ref()),
            target: volume.target.clone(),
            trouble: volume.trouble.as_ref().map(|t| TroubleView {
                reason: t.reason.clone(),
                message: t.message.clone(),
                remedy: t.remedy.clone(),
                transient: t.transient,
                retry_at: time(t.retry_at.as_ref()),
            }),
            device: volume.device.as_ref().map(|d| DeviceView {
                dev: d.dev.clone(),
                wwid: d.wwid.clone(),
                size_bytes: d.size_bytes,
                map: d.map.clone(),
                paths: d.paths,
            }),
            generation: volume.generation,
            gave_up: volume.gave_up.clone(),
            vm_needs_hba: volume.vm_needs_hba,
            resolved_portals: volume
                .spec
                .as_ref()
                .map(|spec| spec.resolved_portals.clone().into_iter().collect())
                .unwrap_or_default(),
            spec,
        }
    }
}

/// What a volume says whose VM is marked for Fibre Channel.
pub(super) const NEEDS_HBA: &str =
    "its VM must be scheduled with an HBA before it starts, and registered with --fc supported";

/// A phase's name, as users of the peers know it.
pub(super) fn phase(phase: v1::Phase) -> &'static str {
    use crate::spec::Phase as P;
    match phase {
        v1::Phase::Unspecified => "Unknown",
        v1::Phase::Pending => P::Pending.as_str(),
        v1::Phase::Bound => P::Bound.as_str(),
        v1::Phase::AttachedToNode => P::AttachedToNode.as_str(),
        v1::Phase::MountedToPod => P::MountedToPod.as_str(),
        v1::Phase::Ready => P::Ready.as_str(),
        v1::Phase::Detaching => P::Detaching.as_str(),
        v1::Phase::UnmountedFromPod => P::UnmountedFromPod.as_str(),
        v1::Phase::Gone => P::Gone.as_str(),
        v1::Phase::Failed => P::Failed.as_str(),
    }
}

/// Writes volumes.
pub(super) fn volumes(
    format: Format,
    volumes: &[v1::Volume],
    to: &mut dyn Write,
) -> io::Result<()> {
    let views: Vec<VolumeView> = volumes.iter().map(VolumeView::from).collect();
    if format != Format::Table {
        return document(format, &views, to);
    }
    let rows = views.iter().map(|v| {
        let device = v.device.as_ref();
        vec![
            v.vm.clone(),
            v.name.clone(),
            v.phase.into(),
            v.target.clone(),
            device.map(|d| size(d.size_bytes)).unwrap_or_default(),
            device.map(|d| d.paths.to_string()).unwrap_or_default(),
            age(v.since),
            v.trouble.as_ref().map(|t| t.reason.clone()).unwrap_or_default(),
        ]
    });
    let header = ["VM", "VOLUME", "PHASE", "TARGET", "SIZE", "PATHS", "SINCE", "REASON"];
    table(&header, rows.collect(), to)
}

/// Writes one volume, whole.
pub(super) fn volume(format: Format, volume: &v1::Volume, to: &mut dyn Write) -> io::Result<()> {
    let v = VolumeView::from(volume);
    if format != Format::Table {
        return document(format, &v, to);
    }
    let flag = |on: bool| if on { "yes".to_owned() } else { String::new() };
    let text = |at: Option<Timestamp>| at.map(|at| at.to_string()).unwrap_or_default();
    let (trouble, device) = (v.trouble.as_ref(), v.device.as_ref());
    let of = |get: fn(&TroubleView) -> String| trouble.map(get).unwrap_or_default();
    let on = |get: fn(&DeviceView) -> String| device.map(get).unwrap_or_default();
    let resolved: Vec<String> =
        v.resolved_portals.iter().map(|(name, address)| format!("{name} is {address}")).collect();
    let [logical, physical] = [v.spec.logical_block_size, v.spec.physical_block_size];
    let blocks =
        if logical > 0 { format!("{logical} (physical {physical})") } else { String::new() };
    let list = [
        ("VM", v.vm.clone()),
        ("Volume", v.name.clone()),
        ("Phase", v.phase.to_owned()),
        ("Since", text(v.since)),
        ("Reason", of(|t| t.reason.clone())),
        ("Message", of(|t| t.message.clone())),
        ("What to do", of(|t| t.remedy.clone())),
        ("Gave up", v.gave_up.join("; ")),
        ("VM", if v.vm_needs_hba { NEEDS_HBA.into() } else { String::new() }),
        ("Next try", of(|t| t.retry_at.map(|at| at.to_string()).unwrap_or_default())),
        ("Target", v.target.clone()),
        ("Device", on(|d| d.dev.clone())),
        ("WWID", on(|d| d.wwid.clone())),
        ("Size", on(|d| format!("{} ({} bytes)", size(d.size_bytes), d.size_bytes))),
        ("Map", on(|d| d.map.clone())),
        ("Paths", on(|d| if d.dev.is_empty() { String::new() } else { d.paths.to_string() })),
        (
            "Disk",
            if v.spec.disk_name == v.spec.name { String::new() } else { v.spec.disk_name.clone() },
        ),
        ("Source", v.spec.source_url()),
        ("Resolved", resolved.join(", ")),
        ("Serial", v.spec.serial.clone()),
        ("Bus", v.spec.bus.clone()),
        ("Disk type", v.spec.disk_type.clone()),
        ("Drive", v.spec.drive.clone()),
        ("Reservations", flag(v.spec.persistent_reservations)),
        ("Own I/O thread", flag(v.spec.dedicated_io_thread)),
        ("Cache", v.spec.cache.clone()),
        ("Error policy", v.spec.error_policy.clone()),
        ("I/O", v.spec.io.clone()),
        ("Discard", v.spec.discard.clone()),
        ("Detect zeroes", v.spec.detect_zeroes.clone()),
        ("Block size", blocks),
        ("I/O limits", v.spec.io_limits.map(|limits| limits.words()).unwrap_or_default()),
        ("Multipath", v.spec.multipath.clone()),
        ("Read-only", flag(v.spec.read_only)),
        ("Shareable", flag(v.spec.shareable)),
        ("Persistent", flag(v.spec.persist)),
        ("Expected WWID", v.spec.wwid.clone()),
        ("Expected serial", v.spec.unit_serial.clone()),
        ("Expected size", Some(v.spec.size_bytes).filter(|&b| b > 0).map(size).unwrap_or_default()),
    ];
    facts(&list, to)
}

/// A VM as results show it.
#[derive(Debug, Serialize)]
struct VmView {
    vm: String,
    domain: String,
    state: String,
    since: Option<Timestamp>,
    volumes: u32,
    revision: u64,
    pod_uid: String,
    pod_dir: String,
    cgroup: String,
    hotplug_dir: String,
    hotplug_dir_in_pod: String,
    libvirt_socket: String,
    /// supported, unsupported, marked, or nothing.
    fc: String,
    reason: String,
    message: String,
}

impl From<&v1::Vm> for VmView {
    fn from(vm: &v1::Vm) -> Self {
        let spec = vm.spec.clone().unwrap_or_default();
        let fc = plain(spec.fc().as_str_name(), "FC_SUPPORT_");
        let (pod_uid, libvirt_socket) = match spec.place {
            Some(v1::vm_spec::Place::Pod(pod)) => (pod.uid, pod.libvirt_socket),
            Some(v1::vm_spec::Place::Host(host)) => (String::new(), host.libvirt_socket),
            None => (String::new(), String::new()),
        };
        Self {
            vm: vm_name(spec.id.as_ref()),
            domain: spec.domain,
            state: match plain(vm.state().as_str_name(), "VM_STATE_") {
                state if state.is_empty() => "unknown".into(),
                state => state,
            },
            since: time(vm.since.as_ref()),
            volumes: vm.volumes,
            revision: vm.revision,
            pod_uid,
            pod_dir: vm.pod_dir.clone(),
            cgroup: vm.cgroup.clone(),
            hotplug_dir: vm.hotplug_dir.clone(),
            hotplug_dir_in_pod: vm.hotplug_dir_in_pod.clone(),
            libvirt_socket,
            fc: if vm.fc_marked { "marked".into() } else { fc },
            reason: vm.reason.clone(),
            message: vm.message.clone(),
        }
    }
}

/// Writes VMs.
pub(super) fn vms(format: Format, vms: &[v1::Vm], to: &mut dyn Write) -> io::Result<()> {
    let views: Vec<VmView> = vms.iter().map(VmView::from).collect();
    if format != Format::Table {
        return document(format, &views, to);
    }
    let rows = views.iter().map(|v| {
        let place = if v.pod_uid.is_empty() { "host" } else { v.pod_uid.as_str() };
        vec![
            v.vm.clone(),
            v.domain.clone(),
            v.state.clone(),
            v.volumes.to_string(),
            place.to_owned(),
            v.fc.clone(),
            age(v.since),
            v.reason.clone(),
        ]
    });
    let header = ["VM", "DOMAIN", "STATE", "VOLUMES", "POD", "FC", "SINCE", "REASON"];
    table(&header, rows.collect(), to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_short_and_exact() {
        assert_eq!(size(10 << 30), "10Gi");
        assert_eq!(size(1000), "1000");
        assert_eq!(size(0), "0");
        assert_eq!(size((1 << 30) + 512), "1073742336");
        let ago = |s| age(Timestamp::now().checked_sub(jiff::SignedDuration::from_secs(s)).ok());
        assert_eq!(ago(3 * 86_400 + 7200), "3d2h");
        assert_eq!(age(None), "");
        // A clock that was set back, or was years ahead when it began.
        assert_eq!(ago(-3600), "0s");
        assert_eq!(age(Some(Timestamp::MAX)), "0s");
        assert!(!age(Some(Timestamp::MIN)).is_empty());
    }

    #[test]
    fn a_table_has_no_frame_and_no_control_characters() {
        let mut out = Vec::new();
        table(&["A", "LONG"], vec![vec!["\x1b[31mx".into(), String::new()]], &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.starts_with('A'), "{text:?}");
        assert!(!text.contains('\x1b') && !text.contains('|'), "{text:?}");
    }
}
