//! What is asked for: a VM as registered, a volume as requested; and what is told back: phases.
//!
//! These are the daemon's own types. `api::convert` makes them from the wire's; the stores keep
//! them as JSON.

mod check;
mod source;
mod vm;

use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::reason::Reason;
use crate::types::{
    Bus, CacheMode, Chap, DevNum, DiskType, ErrorPolicy, IoLimits, Serial, TargetName, Tuning,
    UnitSerial, VolumeKey, VolumeName, Wwid,
};
use crate::vm::resolve::Names;

pub use source::{
    BlockSource, ChapFrom, FcSource, FcTarget, FileSource, IscsiSource, IscsiTarget, Source,
};
pub use vm::{FcSupport, VmPlace, VmSpec};

/// How many paths a volume must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MultipathPolicy {
    /// A map when multipathd runs and there is more than one portal; a single path otherwise.
    #[default]
    Preferred,
    /// A map, or the attach fails.
    Required,
    /// Never a map: the first portal that answers.
    Off,
}

/// A volume as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Its name within the VM.
    pub name: VolumeName,
    /// The disk's name within the VM: of its node in the pod, and in its alias; mostly the volume's.
    pub disk: VolumeName,
    /// Where its data lives.
    pub source: Source,
    /// The serial number that the guest sees; `None` of a LUN that is passed through, which has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The bus it is plugged into.
    pub bus: Bus,
    /// What kind of device the guest sees.
    #[serde(default, skip_serializing_if = "DiskType::is_disk")]
    pub device: DiskType,
    /// The drive that a medium is for; the only one that can be meant where `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drive: Option<TargetName>,
    /// The guest's persistent reservations go to the LUN, by the node's qemu-pr-helper.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reservations: bool,
    /// It has an I/O thread of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dedicated_io_thread: bool,
    /// QEMU's cache mode.
    pub cache: CacheMode,
    /// The guest may not write.
    pub read_only: bool,
    /// Several VMs may have it at once; needs cache `none`.
    pub shareable: bool,
    /// Also in the persistent definition of the domain.
    pub persist: bool,
    /// How many paths it must have.
    pub multipath: MultipathPolicy,
    /// The identity that the LUN must have.
    pub expect_wwid: Option<Wwid>,
    /// What QEMU does on an I/O error; its own default where `None`. Volumes that were stored before
    /// there was a choice have none.
    #[serde(default)]
    pub error_policy: Option<ErrorPolicy>,
    /// The size in bytes that the LUN must have.
    pub expect_size: Option<u64>,
    /// The serial number that the LUN must have (VPD page 0x80).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect_unit_serial: Option<UnitSerial>,
    /// How QEMU runs it, as far as that was asked for.
    #[serde(default, skip_serializing_if = "Tuning::is_plain")]
    pub tuning: Tuning,
    /// How much I/O the guest may do on it.
    #[serde(default, skip_serializing_if = "IoLimits::is_none")]
    pub limits: IoLimits,
    /// What the portals that were given by name were resolved to; the source has the addresses.
    #[serde(default, skip_serializing_if = "Names::is_empty")]
    pub names: Names,
}

/// How an addition is to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddOptions {
    /// The credentials that came with the request; they take the place of those that came before.
    pub chap: Option<Chap>,
    /// Take another identity than the one recorded at the volume's first attach.
    pub accept_new_identity: bool,
    /// Check, and change nothing.
    pub dry_run: bool,
}

/// How a removal is to be made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveOptions {
    /// Go on although the guest uses the disk, or cannot be asked.
    pub force: bool,
    /// Check, and change nothing; so never stored.
    #[serde(skip)]
    pub dry_run: bool,
}

/// A whole set of a VM's volumes as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// Which: a higher one is newer. From 1.
    pub number: i64,
    /// The set, to compare with: equal for the same set. Whoever asks decides how it is written.
    pub asked: Vec<u8>,
}

/// How far a volume is. The order is that of an attach, then of a detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Accepted and durable; nothing done yet, or waiting to be tried again.
    Pending,
    /// The handler works on the host's side of it.
    Bound,
    /// One verified block device is on the host.
    AttachedToNode,
    /// Its node is in the pod and the pod may open it.
    MountedToPod,
    /// The guest has it.
    Ready,
    /// Being removed, or refused to be.
    Detaching,
    /// The guest and the pod no longer have it; the host still does.
    UnmountedFromPod,
    /// Nothing of it is left; only ever seen in a watch.
    Gone,
    /// The add failed for good: nothing of it is left, nor is it tried again. Shown until it is
    /// added anew or removed, or the daemon restarts.
    Failed,
}

impl Phase {
    /// The phase's name as users of the peers know it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Bound => "Bound",
            Self::AttachedToNode => "AttachedToNode",
            Self::MountedToPod => "MountedToPod",
            Self::Ready => "Ready",
            Self::Detaching => "Detaching",
            Self::UnmountedFromPod => "UnMountedFromPod",
            Self::Gone => "Gone",
            Self::Failed => "Failed",
        }
    }
}

/// A volume as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeStatus {
    /// Which volume.
    pub key: VolumeKey,
    /// As asked for; its handler has the same.
    #[serde(serialize_with = "shared")]
    pub spec: Arc<VolumeSpec>,
    /// How far it is.
    pub phase: Phase,
    /// Why it is not further, or what was noticed; `None` when all is well.
    pub reason: Option<Reason>,
    /// The reason in words, with what to do.
    pub message: String,
    /// When it came into this phase.
    pub since: Timestamp,
    /// When it is tried again, for a volume in trouble.
    pub retry_at: Option<Timestamp>,
    /// Device, identity and so on, as far as known.
    pub device: Option<DeviceStatus>,
    /// Target name in the domain, e.g. `sda`.
    pub target: Option<String>,
    /// What its removal gave up on, in words.
    pub gave_up: Vec<String>,
    /// It is had by Fibre Channel, and its VM was marked for that: the VM's pod must be scheduled to where
    /// there is an HBA for it before it starts.
    pub vm_needs_hba: bool,
    /// Counts changes of this volume; an older one never follows a newer.
    pub generation: u64,
}

/// As what is shared.
fn shared<S: serde::Serializer>(spec: &Arc<VolumeSpec>, serializer: S) -> Result<S::Ok, S::Error> {
    spec.as_ref().serialize(serializer)
}

/// What is known of a volume's device on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// major:minor of the map or the single path; [`DevNum::NONE`] of a file.
    pub dev: DevNum,
    /// Proven identity.
    pub wwid: Wwid,
    /// Size in bytes.
    pub size: u64,
    /// Name of the multipath map, where there is one.
    pub map: Option<String>,
    /// How many of its paths work, as of the last look.
    pub paths: u32,
}

/// A plain iSCSI volume for tests; its LUN is derived from the name's length.
#[cfg(test)]
pub(crate) fn volume_fixture(name: &str) -> VolumeSpec {
    use crate::types::{Iface, Lun};
    VolumeSpec {
        name: name.parse().expect("a label"),
        disk: name.parse().expect("a label"),
        source: Source::Iscsi(IscsiSource {
            target: "iqn.2026-01.org.lunplug:test".parse().expect("an IQN"),
            portals: vec!["192.0.2.1:3260".parse().expect("a portal")],
            lun: Lun::try_from(name.len() as u64).expect("a LUN"),
            chap: None,
            more_targets: Vec::new(),
            iface: Iface::default(),
        }),
        serial: Some(name.parse().expect("a serial")),
        device: DiskType::Disk,
        drive: None,
        reservations: false,
        dedicated_io_thread: false,
        bus: Bus::Scsi,
        cache: CacheMode::None,
        error_policy: None,
        read_only: false,
        shareable: false,
        persist: false,
        multipath: MultipathPolicy::Preferred,
        expect_wwid: None,
        expect_size: None,
        expect_unit_serial: None,
        tuning: Tuning::default(),
        limits: IoLimits::default(),
        names: Names::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_that_was_stored_before_there_were_error_policies_is_read() {
        let spec = volume_fixture("data");
        let mut json = serde_json::to_value(&spec).unwrap();
        json.as_object_mut().unwrap().remove("error_policy").unwrap();
        assert_eq!(serde_json::from_value::<VolumeSpec>(json).unwrap(), spec);
    }

    #[test]
    fn a_volume_without_options_is_stored_as_before_there_were_any() {
        let spec = volume_fixture("data");
        let json = serde_json::to_value(&spec).unwrap();
        assert!(json.get("tuning").is_none(), "{json}");
        assert_eq!(serde_json::from_value::<VolumeSpec>(json).unwrap(), spec);
    }
}
