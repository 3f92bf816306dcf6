//! From the wire to types, and in `wire` back. Every error names the field, the value and what is right.

mod disk;
mod fc;
mod local;
mod wire;

use std::path::{Component, Path, PathBuf};

pub use disk::{io_limits, wire_detect_zeroes, wire_discard, wire_disk_type, wire_io_mode};
pub use local::wire_format;
pub use wire::{
    wire_addressing, wire_discovered, wire_error_policy, wire_node, wire_phase, wire_source,
    wire_spec, wire_vm, wire_vm_id, wire_volume,
};

use super::names;
use super::status::malformed;
use super::v1;
use crate::reason::Reason;
use crate::source::{portals_of, source_of};
use crate::spec::FcSupport;
use crate::spec::{
    ChapFrom, IscsiSource, IscsiTarget, MultipathPolicy, Source, VmPlace, VmSpec, VolumeSpec,
};
use crate::types::{
    Addressing, Bus, CacheMode, Chap, DiskType, ErrorPolicy, Iface, IfaceName, Lun, Malformed,
    Portal, Serial, VmId, VolumeKey, VolumeName,
};
use crate::vm::facade::{DiscoverWith, Refusal};
use crate::vm::resolve::Names;

fn missing(field: &str, reason: Reason, what: &str) -> Refusal {
    Refusal::new(reason, format!("{field} is missing: give {what}")).field(field)
}

fn unknown_value(field: &str, value: i32, rule: &'static str) -> Refusal {
    malformed(field, &Malformed::new("value", &value.to_string(), rule))
}

fn parse<T: std::str::FromStr<Err = Malformed>>(field: &str, value: &str) -> Result<T, Refusal> {
    value.parse().map_err(|error| malformed(field, &error))
}

/// A VM's name, which must be there.
pub fn vm_id(field: &str, id: Option<&v1::VmId>) -> Result<VmId, Refusal> {
    let id = id.ok_or_else(|| missing(field, Reason::InvalidName, "the VM's name"))?;
    VmId::new(&id.namespace, &id.name).map_err(|error| {
        let part = if error.what == "VM namespace" { "namespace" } else { "name" };
        malformed(format!("{field}.{part}"), &error)
    })
}

/// One volume of one VM.
pub fn volume_key(vm: Option<&v1::VmId>, volume: &str) -> Result<VolumeKey, Refusal> {
    Ok(VolumeKey { vm: vm_id("vm", vm)?, volume: parse("volume", volume)? })
}

/// A VM to register.
pub fn vm_spec(spec: Option<v1::VmSpec>) -> Result<VmSpec, Refusal> {
    let spec = spec.ok_or_else(|| missing("vm", Reason::InvalidName, "the VM"))?;
    let id = vm_id("vm.id", spec.id.as_ref())?;
    let domain = match spec.domain {
        name if name.is_empty() => format!("{}_{}", id.namespace(), id.name()),
        name => domain_name(name)?,
    };
    let place = match spec.place {
        Some(v1::vm_spec::Place::Pod(pod)) => pod_place("vm.pod", pod)?,
        Some(v1::vm_spec::Place::Host(host)) => host_place("vm.host", host)?,
        None => return Err(no_place("vm.place", "vm.pod (--pod-uid) or vm.host (--host)")),
    };
    let fc = match v1::FcSupport::try_from(spec.fc) {
        Ok(v1::FcSupport::Unspecified) => FcSupport::Unspecified,
        Ok(v1::FcSupport::Supported) => FcSupport::Supported,
        Ok(v1::FcSupport::Unsupported) => FcSupport::Unsupported,
        Err(_) => return Err(unknown_value("vm.fc", spec.fc, "supported (1) or unsupported (2)")),
    };
    Ok(VmSpec { id, domain, place, fc })
}

fn domain_name(name: String) -> Result<String, Refusal> {
    if name.len() > 255 || name.contains(|c: char| c == '/' || c.is_control()) {
        let rule = "libvirt's name of the domain: at most 255 bytes, no '/' or control characters";
        return Err(malformed("vm.domain", &Malformed::new("domain", &name, rule)));
    }
    Ok(name)
}

/// A request does not say where a VM runs; `what` could.
pub fn no_place(field: &str, what: &str) -> Refusal {
    missing(field, Reason::InvalidOption, what)
}

/// A place on the host itself, given as `field`.
pub fn host_place(field: &str, host: v1::HostPlace) -> Result<VmPlace, Refusal> {
    let libvirt_socket = absolute(&format!("{field}.libvirt_socket"), host.libvirt_socket)?;
    Ok(VmPlace::Host { libvirt_socket })
}

/// A place in a pod, given as `field`.
pub fn pod_place(field: &str, pod: v1::PodPlace) -> Result<VmPlace, Refusal> {
    let of = |part: &str| format!("{field}.{part}");
    let uid_ok = [32, 36].contains(&pod.uid.len())
        && pod.uid.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c) || c == b'-');
    if !uid_ok {
        let rule =
            "the pod's metadata.uid: 36 of 0-9, a-f and '-', or the 32 hex digits of a static pod";
        return Err(malformed(of("uid"), &Malformed::new("pod UID", &pod.uid, rule)));
    }
    Ok(VmPlace::Pod {
        uid: pod.uid,
        cgroup: absolute(&of("cgroup"), pod.cgroup)?,
        hotplug_dir: beneath(&of("hotplug_dir"), pod.hotplug_dir)?,
        hotplug_dir_in_pod: absolute(&of("hotplug_dir_in_pod"), pod.hotplug_dir_in_pod)?,
        libvirt_socket: beneath(&of("libvirt_socket"), pod.libvirt_socket)?,
    })
}

/// An absolute path without `.` and `..`; `None` when empty.
fn absolute(field: &str, path: String) -> Result<Option<PathBuf>, Refusal> {
    plain(field, path, true, "an absolute path without '..'")
}

/// A path that stays beneath the directory it is opened in; `None` when empty. (The kernel checks
/// it again when it is opened, symlinks included.)
fn beneath(field: &str, path: String) -> Result<Option<PathBuf>, Refusal> {
    plain(field, path, false, "a path relative to the pod's directory, without '..'")
}

fn plain(
    field: &str,
    path: String,
    rooted: bool,
    rule: &'static str,
) -> Result<Option<PathBuf>, Refusal> {
    if path.is_empty() {
        return Ok(None);
    }
    let names = |c: &Component<'_>| matches!(c, Component::Normal(_) | Component::RootDir);
    let ok = path.len() < 4096
        && !path.contains('\0')
        && Path::new(&path).has_root() == rooted
        && Path::new(&path).components().all(|c| names(&c));
    if ok {
        Ok(Some(path.into()))
    } else {
        Err(malformed(field, &Malformed::new("path", &path, rule)))
    }
}

/// A volume to add, defaults filled in, the rules between fields checked. `names` is what the names in it
/// were resolved to.
pub fn volume_spec(spec: Option<v1::VolumeSpec>, names: Names) -> Result<VolumeSpec, Refusal> {
    let mut spec = spec.ok_or_else(|| missing("volume", Reason::InvalidName, "the volume"))?;
    names::to_addresses(&mut spec, &names);
    let name: VolumeName = parse("volume.name", &spec.name)?;
    let device = disk::device(spec.disk_type)?;
    let tuning = disk::tuning(&spec)?;
    let cache = cache(spec.cache)?;
    let disk: Option<VolumeName> = optional("volume.disk_name", &spec.disk_name)?;
    let spec = VolumeSpec {
        disk: disk.unwrap_or_else(|| name.clone()),
        bus: bus(spec.bus)?,
        serial: serial(&spec.serial, &name, device)?,
        device,
        drive: optional("volume.drive", &spec.drive)?,
        reservations: spec.persistent_reservations,
        dedicated_io_thread: spec.dedicated_io_thread,
        source: source(spec.source)?,
        cache,
        error_policy: error_policy(spec.error_policy)?,
        // A medium can only be read.
        read_only: spec.read_only || device.is_cdrom(),
        shareable: spec.shareable,
        persist: spec.persist,
        multipath: multipath(spec.multipath)?,
        expect_wwid: optional("volume.wwid", &spec.wwid)?,
        expect_size: size("volume.size_bytes", spec.size_bytes)?,
        expect_unit_serial: optional("volume.unit_serial", &spec.unit_serial)?,
        tuning,
        limits: io_limits("volume.io_limits", spec.io_limits)?,
        names,
        name,
    };
    spec.check().map_err(|(field, error)| malformed(format!("volume.{field}"), &error))?;
    Ok(VolumeSpec { tuning: tuning.normal(cache), ..spec })
}

fn optional<T: std::str::FromStr<Err = Malformed>>(
    field: &str,
    value: &str,
) -> Result<Option<T>, Refusal> {
    if value.is_empty() { Ok(None) } else { parse(field, value).map(Some) }
}

fn serial(given: &str, name: &VolumeName, device: DiskType) -> Result<Option<Serial>, Refusal> {
    if !given.is_empty() || device != DiskType::Disk {
        return optional("volume.serial", given);
    }
    name.as_str().parse().map(Some).map_err(|_| {
        let rule = "it defaults to the volume's name, which is longer than 36 characters (bus virtio: 20): give another with --serial";
        malformed("volume.serial", &Malformed::new("serial", name.as_str(), rule))
    })
}

fn source(source: Option<v1::Source>) -> Result<Source, Refusal> {
    match source.and_then(|source| source.kind) {
        Some(v1::source::Kind::Iscsi(iscsi)) => iscsi_source(iscsi).map(Source::Iscsi),
        Some(v1::source::Kind::Fc(given)) => fc::source(&given).map(Source::Fc),
        Some(v1::source::Kind::Block(given)) => local::block(&given),
        Some(v1::source::Kind::File(given)) => local::file(&given),
        None => Err(missing(
            "volume.source",
            Reason::InvalidSource,
            "its kind, e.g. iscsi (a kind of a newer version is not known here)",
        )),
    }
}

fn iscsi_source(iscsi: v1::IscsiSource) -> Result<IscsiSource, Refusal> {
    let field = |name: &str| format!("volume.source.iscsi.{name}");
    let secret = optional(&field("chap_secret"), &iscsi.chap_secret)?.map(ChapFrom::Secret);
    let v1::IscsiSource { target, portals, lun, lun_addressing, .. } = iscsi;
    let first = v1::IscsiTarget { target, portals, lun, lun_addressing };
    let first = iscsi_target(&first, &field)?;
    let more =
        iscsi.more_targets.iter().enumerate().map(|(n, more)| {
            iscsi_target(more, &|name| field(&format!("more_targets[{n}].{name}")))
        });
    let more = more.collect::<Result<Vec<_>, _>>()?;
    let written = more.iter().map(IscsiTarget::key).collect::<Vec<_>>().join(", ");
    let source = source_of(first, more, &written)
        .map_err(|error| malformed(field("more_targets"), &error))?;
    let iface = Iface {
        name: optional(&field("iface"), &iscsi.iface)?.unwrap_or_default(),
        initiator: optional(&field("initiator_name"), &iscsi.initiator_name)?,
    };
    own_name_is_not_taken(&field("iface"), &iface.name)?;
    let chap = secret.or(iscsi.chap_in_request.then_some(ChapFrom::Request));
    Ok(IscsiSource { chap, iface, ..source })
}

/// The records that lunplug makes go with their last volume.
fn own_name_is_not_taken(field: &str, name: &IfaceName) -> Result<(), Refusal> {
    if !name.is_own() {
        return Ok(());
    }
    let rule = "a record of the node's own: those that begin with lunplug- come and go with volumes; give initiator_name instead";
    Err(malformed(field, &Malformed::new("iface", name.as_str(), rule)))
}

fn iscsi_target(
    wire: &v1::IscsiTarget,
    field: &dyn Fn(&str) -> String,
) -> Result<IscsiTarget, Refusal> {
    Ok(IscsiTarget {
        target: parse(&field("target"), &wire.target)?,
        portals: portals_of(wire.portals.iter().map(String::as_str))
            .map_err(|error| malformed(field("portals"), &error))?,
        lun: Lun::new(u64::from(wire.lun), addressing(field, wire.lun_addressing)?)
            .map_err(|error| malformed(field("lun"), &error))?,
    })
}

/// The credentials that come with an addition, which then is where the volume has them from.
pub fn chap(
    given: Option<v1::ChapCredentials>,
    spec: &mut VolumeSpec,
) -> Result<Option<Chap>, Refusal> {
    let source = spec.source.as_iscsi_mut();
    let Some(given) = given else {
        if source.is_none_or(|source| source.chap != Some(ChapFrom::Request)) {
            return Ok(None);
        }
        let what = "the credentials, or take chap_in_request out of the source";
        return Err(missing("chap", Reason::InvalidOption, what));
    };
    let Some(source) = source else {
        let message = "chap: only iscsi sources have credentials: leave it out".to_owned();
        return Err(Refusal::new(Reason::InvalidOption, message).field("chap"));
    };
    let chap = chap_of(given)?;
    if let Some(ChapFrom::Secret(name)) = &source.chap {
        let message =
            format!("chap: the source refers to secret {name} already: give one of the two");
        return Err(Refusal::new(Reason::InvalidOption, message).field("chap"));
    }
    source.chap = Some(ChapFrom::Request);
    Ok(Some(chap))
}

fn chap_of(mut given: v1::ChapCredentials) -> Result<Chap, Refusal> {
    let take = std::mem::take::<String>;
    let (username, password) = (take(&mut given.username), take(&mut given.password).into());
    let (username_in, password_in) =
        (take(&mut given.username_in), take(&mut given.password_in).into());
    Chap::new(username, password, username_in, password_in)
        .map_err(|error| malformed(format!("chap.{}", error.what), &error))
}

/// What a discovery is about.
pub fn discovery(
    request: v1::DiscoverTargetsRequest,
) -> Result<(Portal, Option<DiscoverWith>), Refusal> {
    let portal = parse("portal", &request.portal)?;
    let secret = optional("chap_secret", &request.chap_secret)?.map(DiscoverWith::Secret);
    let chap = request.chap.map(chap_of).transpose()?.map(DiscoverWith::Chap);
    match (secret, chap) {
        (Some(_), Some(_)) => {
            let message = "chap: chap_secret is given already: give one of the two";
            Err(Refusal::new(Reason::InvalidOption, message).field("chap"))
        }
        (secret, chap) => Ok((portal, secret.or(chap))),
    }
}

fn bus(value: i32) -> Result<Bus, Refusal> {
    match v1::Bus::try_from(value) {
        Ok(v1::Bus::Unspecified | v1::Bus::Scsi) => Ok(Bus::Scsi),
        Ok(v1::Bus::Virtio) => Ok(Bus::Virtio),
        Err(_) => Err(unknown_value("volume.bus", value, "scsi (1) or virtio (2)")),
    }
}

fn cache(value: i32) -> Result<CacheMode, Refusal> {
    match v1::CacheMode::try_from(value) {
        Ok(v1::CacheMode::Unspecified | v1::CacheMode::None) => Ok(CacheMode::None),
        Ok(v1::CacheMode::Writethrough) => Ok(CacheMode::Writethrough),
        Ok(v1::CacheMode::Writeback) => Ok(CacheMode::Writeback),
        Err(_) => {
            let rule = "none (1), writethrough (2) or writeback (3)";
            Err(unknown_value("volume.cache", value, rule))
        }
    }
}

fn error_policy(value: i32) -> Result<Option<ErrorPolicy>, Refusal> {
    use v1::ErrorPolicy as Wire;
    Ok(match Wire::try_from(value) {
        Ok(Wire::Unspecified) => None,
        Ok(Wire::Stop) => Some(ErrorPolicy::Stop),
        Ok(Wire::Report) => Some(ErrorPolicy::Report),
        Ok(Wire::Ignore) => Some(ErrorPolicy::Ignore),
        Ok(Wire::Enospace) => Some(ErrorPolicy::Enospace),
        Err(_) => {
            let rule = "stop (1), report (2), ignore (3) or enospace (4)";
            return Err(unknown_value("volume.error_policy", value, rule));
        }
    })
}

fn addressing(field: &dyn Fn(&str) -> String, value: i32) -> Result<Addressing, Refusal> {
    use v1::LunAddressing as Wire;
    match Wire::try_from(value) {
        Ok(Wire::Unspecified | Wire::Sam2) => Ok(Addressing::Sam2),
        Ok(Wire::Sam3Flat) => Ok(Addressing::Flat),
        Ok(Wire::Transparent) => Ok(Addressing::Plain),
        Err(_) => {
            let rule = "SAM2 (1), SAM3_FLAT (2) or TRANSPARENT (3)";
            Err(unknown_value(&field("lun_addressing"), value, rule))
        }
    }
}

fn multipath(value: i32) -> Result<MultipathPolicy, Refusal> {
    use v1::MultipathPolicy as Wire;
    match Wire::try_from(value) {
        Ok(Wire::Unspecified | Wire::Preferred) => Ok(MultipathPolicy::Preferred),
        Ok(Wire::Required) => Ok(MultipathPolicy::Required),
        Ok(Wire::Off) => Ok(MultipathPolicy::Off),
        Err(_) => {
            let rule = "preferred (1), required (2) or off (3)";
            Err(unknown_value("volume.multipath", value, rule))
        }
    }
}

/// A size in bytes; `None` for 0.
pub fn size(field: &str, bytes: u64) -> Result<Option<u64>, Refusal> {
    if !bytes.is_multiple_of(512) {
        let rule = "a size in bytes, a multiple of 512";
        let error = Malformed::new("size", &bytes.to_string(), rule);
        return Err(malformed(field, &error));
    }
    Ok((bytes > 0).then_some(bytes))
}
