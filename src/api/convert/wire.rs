//! From types to the wire.

use std::path::PathBuf;

use jiff::Timestamp;

use super::disk::wire_io_limits;
use super::{fc, local};
use super::{wire_detect_zeroes, wire_discard, wire_disk_type, wire_io_mode};
use crate::api::{names, v1};
use crate::connector::Discovered;
use crate::spec::FcSupport;
use crate::spec::{
    ChapFrom, DeviceStatus, IscsiTarget, MultipathPolicy, Phase, Source, VmPlace, VolumeSpec,
    VolumeStatus,
};
use crate::types::{
    Addressing, BlockSize, Blocks, Bus, CacheMode, DetectZeroes, DevNum, ErrorPolicy, VmId,
};
use crate::vm::facade::{NodeInfo, VmInfo, VmState};

/// A target that was discovered on the wire.
pub fn wire_discovered(found: &Discovered) -> v1::DiscoveredTarget {
    v1::DiscoveredTarget {
        target: found.target.to_string(),
        portals: found.portals.iter().map(ToString::to_string).collect(),
    }
}

/// The addressing of a LUN on the wire; unspecified is what it mostly is.
pub fn wire_addressing(addressing: Addressing) -> v1::LunAddressing {
    match addressing {
        Addressing::Sam2 => v1::LunAddressing::Unspecified,
        Addressing::Flat => v1::LunAddressing::Sam3Flat,
        Addressing::Plain => v1::LunAddressing::Transparent,
    }
}

fn time(at: Timestamp) -> prost_types::Timestamp {
    // jiff's nanosecond has the sign of the whole; the wire's is never negative.
    let nanos = at.as_nanosecond();
    let second = 1_000_000_000;
    prost_types::Timestamp {
        seconds: i64::try_from(nanos.div_euclid(second)).expect("jiff ends in the year 9999"),
        nanos: i32::try_from(nanos.rem_euclid(second)).expect("less than a second"),
    }
}

fn path(path: &Option<PathBuf>) -> String {
    path.as_deref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A VM's name on the wire.
pub fn wire_vm_id(id: &VmId) -> v1::VmId {
    v1::VmId { namespace: id.namespace().into(), name: id.name().into() }
}

/// A VM on the wire.
pub fn wire_vm(vm: &VmInfo) -> v1::Vm {
    let place = match &vm.spec.place {
        VmPlace::Pod { uid, cgroup, hotplug_dir, hotplug_dir_in_pod, libvirt_socket } => {
            v1::vm_spec::Place::Pod(v1::PodPlace {
                uid: uid.clone(),
                cgroup: path(cgroup),
                hotplug_dir: path(hotplug_dir),
                hotplug_dir_in_pod: path(hotplug_dir_in_pod),
                libvirt_socket: path(libvirt_socket),
            })
        }
        VmPlace::Host { libvirt_socket } => {
            v1::vm_spec::Place::Host(v1::HostPlace { libvirt_socket: path(libvirt_socket) })
        }
    };
    v1::Vm {
        spec: Some(v1::VmSpec {
            id: Some(wire_vm_id(&vm.spec.id)),
            domain: vm.spec.domain.clone(),
            place: Some(place),
            fc: match vm.spec.fc {
                FcSupport::Unspecified => v1::FcSupport::Unspecified,
                FcSupport::Supported => v1::FcSupport::Supported,
                FcSupport::Unsupported => v1::FcSupport::Unsupported,
            }
            .into(),
        }),
        fc_marked: vm.fc_marked,
        state: match vm.state {
            VmState::Unknown => v1::VmState::Unspecified,
            VmState::Running => v1::VmState::Running,
            VmState::Stopped => v1::VmState::Stopped,
            VmState::Unreachable => v1::VmState::Unreachable,
        }
        .into(),
        since: Some(time(vm.since)),
        volumes: vm.volumes,
        pod_dir: path(&vm.pod_dir),
        cgroup: path(&vm.cgroup),
        hotplug_dir: path(&vm.hotplug_dir),
        hotplug_dir_in_pod: path(&vm.hotplug_dir_in_pod),
        reason: vm.reason.map(|r| r.code().into()).unwrap_or_default(),
        message: vm.message.clone(),
        revision: vm.revision.and_then(|known| known.try_into().ok()).unwrap_or_default(),
    }
}

/// A source on the wire.
pub fn wire_source(source: &Source) -> v1::Source {
    let kind = match source {
        Source::Iscsi(s) => v1::source::Kind::Iscsi(v1::IscsiSource {
            target: s.target.to_string(),
            portals: s.portals.iter().map(ToString::to_string).collect(),
            lun: u32::from(s.lun.get()),
            chap_secret: match &s.chap {
                Some(ChapFrom::Secret(name)) => name.to_string(),
                Some(ChapFrom::Request) | None => String::new(),
            },
            chap_in_request: s.chap == Some(ChapFrom::Request),
            lun_addressing: wire_addressing(s.lun.addressing()).into(),
            more_targets: s.more_targets.iter().map(wire_target).collect(),
            iface: s.iface.name.unless_default().into(),
            initiator_name: s.iface.initiator.as_ref().map(ToString::to_string).unwrap_or_default(),
        }),
        Source::Fc(s) => v1::source::Kind::Fc(fc::wire_source(s)),
        Source::Block(source) => local::wire_block(source),
        Source::File(source) => local::wire_file(source),
    };
    v1::Source { kind: Some(kind) }
}

fn wire_target(target: &IscsiTarget) -> v1::IscsiTarget {
    v1::IscsiTarget {
        target: target.target.to_string(),
        portals: target.portals.iter().map(ToString::to_string).collect(),
        lun: u32::from(target.lun.get()),
        lun_addressing: wire_addressing(target.lun.addressing()).into(),
    }
}

/// A volume as asked for on the wire, with every default filled in.
pub fn wire_spec(spec: &VolumeSpec) -> v1::VolumeSpec {
    let tuning = &spec.tuning;
    let block = |of: fn(Blocks) -> BlockSize| tuning.blocks.map_or(0, |b| of(b).get());
    // Of what only QEMU could do a LUN that is passed through has nothing.
    let run = |value: i32| if spec.device.is_disk() { value } else { 0 };
    let mut wire = v1::VolumeSpec {
        name: spec.name.to_string(),
        disk_name: spec.disk.to_string(),
        source: Some(wire_source(&spec.source)),
        serial: spec.serial.as_ref().map(ToString::to_string).unwrap_or_default(),
        bus: match spec.bus {
            // The drive's.
            _ if spec.device.is_cdrom() => v1::Bus::Unspecified,
            Bus::Scsi => v1::Bus::Scsi,
            Bus::Virtio => v1::Bus::Virtio,
        }
        .into(),
        disk_type: wire_disk_type(spec.device).into(),
        drive: spec.drive.as_ref().map(ToString::to_string).unwrap_or_default(),
        persistent_reservations: spec.reservations,
        dedicated_io_thread: spec.dedicated_io_thread,
        cache: match spec.cache {
            _ if spec.device.is_cdrom() => v1::CacheMode::Unspecified,
            CacheMode::None => v1::CacheMode::None,
            CacheMode::Writethrough => v1::CacheMode::Writethrough,
            CacheMode::Writeback => v1::CacheMode::Writeback,
        }
        .into(),
        error_policy: wire_error_policy(spec.error_policy).into(),
        io: run(wire_io_mode(tuning.io_mode(spec.cache)).into()),
        discard: run(wire_discard(tuning.discard_mode()).into()),
        detect_zeroes: run(
            wire_detect_zeroes(tuning.detect_zeroes.unwrap_or(DetectZeroes::Off)).into()
        ),
        logical_block_size: block(|b| b.logical),
        physical_block_size: block(|b| b.physical),
        io_limits: wire_io_limits(&spec.limits),
        read_only: spec.read_only,
        shareable: spec.shareable,
        persist: spec.persist,
        multipath: match spec.multipath {
            MultipathPolicy::Preferred => v1::MultipathPolicy::Preferred,
            MultipathPolicy::Required => v1::MultipathPolicy::Required,
            MultipathPolicy::Off => v1::MultipathPolicy::Off,
        }
        .into(),
        wwid: spec.expect_wwid.as_ref().map(ToString::to_string).unwrap_or_default(),
        size_bytes: spec.expect_size.unwrap_or_default(),
        unit_serial: spec.expect_unit_serial.as_ref().map(ToString::to_string).unwrap_or_default(),
        resolved_portals: spec.names.iter().map(|(n, p)| (n.to_string(), p.to_string())).collect(),
    };
    names::to_names(&mut wire, &spec.names);
    wire
}

/// An error policy on the wire.
pub fn wire_error_policy(policy: Option<ErrorPolicy>) -> v1::ErrorPolicy {
    match policy {
        None => v1::ErrorPolicy::Unspecified,
        Some(ErrorPolicy::Stop) => v1::ErrorPolicy::Stop,
        Some(ErrorPolicy::Report) => v1::ErrorPolicy::Report,
        Some(ErrorPolicy::Ignore) => v1::ErrorPolicy::Ignore,
        Some(ErrorPolicy::Enospace) => v1::ErrorPolicy::Enospace,
    }
}

/// A phase on the wire.
pub fn wire_phase(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Pending => v1::Phase::Pending,
        Phase::Bound => v1::Phase::Bound,
        Phase::AttachedToNode => v1::Phase::AttachedToNode,
        Phase::MountedToPod => v1::Phase::MountedToPod,
        Phase::Ready => v1::Phase::Ready,
        Phase::Detaching => v1::Phase::Detaching,
        Phase::UnmountedFromPod => v1::Phase::UnmountedFromPod,
        Phase::Gone => v1::Phase::Gone,
        Phase::Failed => v1::Phase::Failed,
    }
}

/// A volume on the wire.
pub fn wire_volume(volume: &VolumeStatus) -> v1::Volume {
    v1::Volume {
        vm: Some(wire_vm_id(&volume.key.vm)),
        spec: Some(wire_spec(&volume.spec)),
        phase: wire_phase(volume.phase).into(),
        since: Some(time(volume.since)),
        trouble: volume.reason.map(|reason| v1::Trouble {
            reason: reason.code().into(),
            message: volume.message.clone(),
            remedy: reason.remedy().into(),
            transient: reason.is_transient(),
            retry_at: volume.retry_at.map(time),
        }),
        device: volume.device.as_ref().map(wire_device),
        target: volume.target.clone().unwrap_or_default(),
        generation: volume.generation,
        gave_up: volume.gave_up.clone(),
        vm_needs_hba: volume.vm_needs_hba,
    }
}

fn wire_device(device: &DeviceStatus) -> v1::Device {
    v1::Device {
        dev: if device.dev == DevNum::NONE { String::new() } else { device.dev.to_string() },
        wwid: device.wwid.to_string(),
        size_bytes: device.size,
        map: device.map.clone().unwrap_or_default(),
        paths: device.paths,
    }
}

/// A node on the wire.
pub fn wire_node(node: &NodeInfo) -> v1::Node {
    v1::Node {
        name: node.name.clone(),
        version: node.version.clone(),
        kernel: node.kernel.clone(),
        boot_id: node.boot_id.clone(),
        initiator_name: node.initiator_name.clone().unwrap_or_default(),
        multipathd: node.multipathd,
        grants: node.grants.clone(),
        simulated: node.simulated,
        only_vm: node.only_vm.as_ref().map(wire_vm_id),
        limits: Some(v1::Limits {
            max_vms: node.max_vms,
            max_volumes_per_vm: node.max_volumes_per_vm,
        }),
        stuck_calls: node.stuck_calls,
        state_trouble: node.state_trouble.clone().unwrap_or_default(),
        require_wwid: node.require_wwid,
        hbas: node.hbas.iter().map(fc::wire_hba).collect(),
    }
}
