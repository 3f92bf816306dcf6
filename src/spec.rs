//! What is asked for: a VM as registered, a volume as requested; and what is told back: phases.
//!
//! These are the daemon's own types. `api::convert` makes them from the wire's; the stores keep
//! them as JSON.

mod source;
mod vm;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::reason::Reason;
use crate::types::{
    Bus, CacheMode, Chap, DevNum, DiskType, ErrorPolicy, IoLimits, Malformed, Serial, Tuning,
    UnitSerial, VolumeKey, VolumeName, Wwid,
};
use crate::vm::resolve::Names;

pub use source::{BlockSource, ChapFrom, FcSource, FcTarget, IscsiSource, IscsiTarget, Source};
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

impl VolumeSpec {
    /// Rules between fields, which no single field's type can express. `Err` names the field.
    pub fn check(&self) -> Result<(), (&'static str, Malformed)> {
        let malformed = |what, value: &str, rule| Malformed { what, value: value.into(), rule };
        self.check_device()?;
        if self.dedicated_io_thread && self.bus != Bus::Virtio {
            let value = format!("true with bus {}", self.bus);
            let rule = "a dedicated I/O thread needs bus virtio: on bus scsi the controller has one for all of its disks";
            return Err(("dedicated_io_thread", malformed("option", &value, rule)));
        }
        let serial = self.serial.as_ref().map_or("", Serial::as_str);
        if serial.len() > self.bus.max_serial() {
            return Err((
                "serial",
                malformed(
                    "serial",
                    serial,
                    "at most 36 characters on bus scsi and 20 on bus virtio; it defaults to the volume's name, so give a shorter one with --serial",
                ),
            ));
        }
        if self.shareable && self.cache != CacheMode::None {
            return Err((
                "cache",
                malformed("cache", self.cache.as_str(), "a shareable volume needs cache none"),
            ));
        }
        self.tuning.check(self.cache)?;
        self.limits.check().map_err(|(_, error)| ("io_limits", error))?;
        match &self.source {
            Source::Iscsi(source) if source.targets().iter().any(|t| t.portals.is_empty()) => {
                Err(("source.portals", malformed("portals", "", "at least one portal")))
            }
            Source::Fc(source) if source.targets.is_empty() => {
                Err(("source.targets", malformed("targets", "", "at least one target port")))
            }
            Source::Block(_) => self.check_local(),
            Source::Iscsi(_) | Source::Fc(_) => Ok(()),
        }
    }
}

impl VolumeSpec {
    /// What is on the host already has no paths of ours to be put together, and may be no LUN.
    fn check_local(&self) -> Result<(), (&'static str, Malformed)> {
        let no = |field, what, value: &str, rule| Err((field, Malformed::new(what, value, rule)));
        if self.multipath == MultipathPolicy::Required {
            let rule = "preferred or off: what is on the host already is taken as it is; for a map give the path of the map";
            return no("multipath", "multipath", "required", rule);
        }
        if self.device == DiskType::Lun {
            let rule =
                "disk_type lun needs an iscsi or fc source: only of these it is known to be a LUN";
            return no("disk_type", "disk_type", "lun", rule);
        }
        Ok(())
    }

    /// What a LUN that is passed through excludes, and what needs one. QEMU's scsi-block does not carry
    /// the guest's I/O, only its SCSI commands: nothing that QEMU does to I/O applies.
    fn check_device(&self) -> Result<(), (&'static str, Malformed)> {
        let no = |field, what, value: &str, rule| Err((field, Malformed::new(what, value, rule)));
        if self.device == DiskType::Disk {
            if self.reservations {
                let rule = "persistent reservations need disk_type lun";
                return no("persistent_reservations", "option", "true with disk_type disk", rule);
            }
            return match &self.serial {
                Some(_) => Ok(()),
                None => no("serial", "serial", "", "a disk has one: the volume's name or another"),
            };
        }
        if self.bus != Bus::Scsi {
            return no("bus", "bus", self.bus.as_str(), "disk_type lun needs bus scsi");
        }
        if let Some(serial) = &self.serial {
            let rule = "disk_type lun takes none: the guest sees the LUN's own";
            return no("serial", "serial", serial.as_str(), rule);
        }
        if self.cache != CacheMode::None {
            return no("cache", "cache", self.cache.as_str(), "disk_type lun needs cache none");
        }
        if self.read_only {
            let rule =
                "disk_type lun passes the guest's commands on, writes too: use disk_type disk";
            return no("read_only", "option", "true with disk_type lun", rule);
        }
        if let Some(field) = self.tuning.first_difference(&Tuning::default()) {
            let rule = "disk_type lun takes none of it: the guest's commands go to the LUN itself";
            return no(field, "option", field, rule);
        }
        if !self.limits.is_none() {
            let rule =
                "disk_type lun takes none: QEMU does not throttle commands that it passes on";
            return no("io_limits", "limits", "with disk_type lun", rule);
        }
        Ok(())
    }
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
    /// As asked for.
    pub spec: VolumeSpec,
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

/// What is known of a volume's device on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// major:minor of the map or the single path.
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
    fn a_lun_that_is_passed_through_excludes_what_only_qemu_could_do() {
        let lun = VolumeSpec { serial: None, device: DiskType::Lun, ..volume_fixture("data") };
        lun.check().unwrap();
        VolumeSpec { reservations: true, shareable: true, ..lun.clone() }.check().unwrap();
        let discard = Some(crate::types::Discard::Ignore);
        let limits = IoLimits { total_iops_sec: 1, ..IoLimits::default() };
        for (field, spec) in [
            ("bus", VolumeSpec { bus: Bus::Virtio, ..lun.clone() }),
            ("serial", VolumeSpec { serial: "a".parse().ok(), ..lun.clone() }),
            ("cache", VolumeSpec { cache: CacheMode::Writeback, ..lun.clone() }),
            ("read_only", VolumeSpec { read_only: true, ..lun.clone() }),
            ("discard", VolumeSpec { tuning: Tuning { discard, ..lun.tuning }, ..lun.clone() }),
            ("io_limits", VolumeSpec { limits, ..lun.clone() }),
            ("persistent_reservations", VolumeSpec { reservations: true, ..volume_fixture("a") }),
            ("serial", VolumeSpec { serial: None, ..volume_fixture("a") }),
            (
                "dedicated_io_thread",
                VolumeSpec { dedicated_io_thread: true, ..volume_fixture("a") },
            ),
        ] {
            assert_eq!(spec.check().unwrap_err().0, field);
        }
        let json = serde_json::to_value(&lun).unwrap();
        assert_eq!(serde_json::from_value::<VolumeSpec>(json).unwrap(), lun);
    }

    #[test]
    fn what_is_on_the_host_has_no_paths_to_be_put_together_and_may_be_no_lun() {
        let source = "block:///dev/vg/data".parse().unwrap();
        let spec = VolumeSpec { source, ..volume_fixture("data") };
        spec.check().unwrap();
        let off = MultipathPolicy::Off;
        VolumeSpec { multipath: off, ..spec.clone() }.check().unwrap();
        let required = MultipathPolicy::Required;
        let lun = VolumeSpec { serial: None, device: DiskType::Lun, ..spec.clone() };
        for (field, spec) in
            [("multipath", VolumeSpec { multipath: required, ..spec.clone() }), ("disk_type", lun)]
        {
            assert_eq!(spec.check().unwrap_err().0, field);
        }
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["source"], serde_json::json!({"block": {"path": "/dev/vg/data"}}));
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
