//! What has to be done to a domain so that it has a disk: pure, from its XML alone.
//!
//! Everything is placed explicitly (target name, controller, address), so that what libvirt made of
//! it can be compared, and nothing that is still being removed is taken.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::reason::Reason;
use crate::types::{
    Bus, CacheMode, DetectZeroes, DiskType, ErrorPolicy, FileFormat, IoLimits, Serial, Tuning,
    VolumeName,
};

use super::iothread::{self, OwnThread, Thread};
use super::limits;
use super::place::{free_slot, free_target, place_scsi};
use super::xml::{Disk, Domain, DriveAddress, PciAddress};

/// The model of a controller that we add: plain `virtio-scsi` is modern behind a PCIe root port and
/// transitional on conventional PCI.
pub const CONTROLLER_MODEL: &str = "virtio-scsi";

/// A disk as it should be in the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredDisk {
    /// The volume that it is; its alias is [`super::alias`] of this.
    pub volume: VolumeName,
    /// The path of the block device or file as QEMU sees it.
    pub source: String,
    /// What is in the file; `None` of a block device, which is raw.
    pub file: Option<FileFormat>,
    /// Its serial; a LUN that is passed through has its own.
    pub serial: Option<Serial>,
    /// What kind of device the guest sees.
    pub device: DiskType,
    /// The socket of qemu-pr-helper as QEMU sees it, for persistent reservations.
    pub reservations: Option<String>,
    /// Its bus.
    pub bus: Bus,
    /// Its cache mode.
    pub cache: CacheMode,
    /// The guest may not write.
    pub read_only: bool,
    /// Others may write too.
    pub shareable: bool,
    /// What to do on an I/O error; QEMU's default where `None`.
    pub error_policy: Option<ErrorPolicy>,
    /// It has an I/O thread of its own.
    pub io_thread: Option<OwnThread>,
    /// How it is run.
    pub tuning: Tuning,
    /// How much I/O the guest may do on it. A disk that is there with others can be given these.
    pub limits: IoLimits,
    /// The node is ours and its owner right already: libvirt is told to leave it alone. False on a
    /// plain libvirt host, where libvirt has to make the device accessible itself.
    pub keep_owner: bool,
}

impl DesiredDisk {
    /// What is in the device or file.
    pub fn format(&self) -> FileFormat {
        self.file.unwrap_or_default()
    }
}

/// The definitions that a change is for, both with the disk afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Views {
    /// The running domain; `None` when it does not run.
    pub live: Option<Arc<Domain>>,
    /// The persistent definition; `None` when that is to be left alone.
    pub config: Option<Arc<Domain>>,
}

impl Views {
    /// Both, the running one first.
    pub(super) fn all(&self) -> impl Iterator<Item = &Domain> {
        self.live.iter().chain(&self.config).map(|domain| &**domain)
    }
}

/// An address for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAddress {
    /// On a SCSI controller.
    Drive(DriveAddress),
    /// On PCI.
    Pci(PciAddress),
}

/// Which of the two definitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// The running domain.
    pub live: bool,
    /// The persistent definition.
    pub config: bool,
}

impl Needs {
    /// Whether there is anything to do.
    pub const fn any(self) -> bool {
        self.live || self.config
    }
}

/// A virtio-scsi controller that has to be there first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewController {
    /// Its index among SCSI controllers.
    pub index: u32,
    /// Its address.
    pub address: PciAddress,
    /// Where it is missing.
    pub needs: Needs,
}

/// Where a disk goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Its target name.
    pub target: String,
    /// Its address.
    pub address: DiskAddress,
    /// A controller to add before.
    pub controller: Option<NewController>,
    /// Its own I/O thread, which may have to be added before.
    pub io_thread: Option<Thread>,
    /// Where the disk is missing.
    pub needs: Needs,
    /// Whether to write `<seclabel model='dac' relabel='no'/>`.
    pub dac_keep: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The disk is there as wanted.
    Already {
        /// Its target name.
        target: String,
        /// Where it has other I/O limits than wanted.
        limits: Needs,
    },
    /// The disk has to be added.
    Attach(Placement),
}

/// The disk cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The serial is longer than a guest sees on this bus.
    #[error(
        "serial {serial} is longer than the {max} characters that bus {bus} shows; give a shorter one with --serial"
    )]
    SerialTooLong {
        /// The serial.
        serial: Serial,
        /// The bus.
        bus: Bus,
        /// Its limit.
        max: usize,
    },
    /// Another disk has that serial.
    #[error(
        "serial {serial} is in the domain already, at disk {target}; the guest would take the two for one"
    )]
    SerialInUse {
        /// The serial.
        serial: Serial,
        /// Target name of the disk that has it.
        target: String,
    },
    /// Another disk has that source.
    #[error("source {path} is in the domain already, as disk {target}")]
    SourceInUse {
        /// The path.
        path: String,
        /// Target name of the disk that has it.
        target: String,
    },
    /// The volume's disk is there, but is another.
    #[error(
        "disk {target} ({alias}) is there with {field} {found:?} instead of {wanted:?}; remove the volume first"
    )]
    Differs {
        /// Its alias.
        alias: String,
        /// Its target name.
        target: String,
        /// In what it differs.
        field: &'static str,
        /// What is there.
        found: String,
        /// What was wanted.
        wanted: String,
    },
    /// Somebody else's disk has the volume's name.
    #[error("disk {target} has the alias {alias}, but lunplug did not put it there")]
    NotHotplugged {
        /// The alias.
        alias: String,
        /// Its target name.
        target: String,
    },
    /// There is no place left.
    #[error(
        "no {what} is left for a disk on bus {bus}: {taken} of {total} are taken{}", remedy(*.bus)
    )]
    NoFreeAddress {
        /// The bus.
        bus: Bus,
        /// What kind of place there is none of.
        what: &'static str,
        /// How many there are.
        total: usize,
        /// How many of them are taken.
        taken: usize,
    },
    /// The place that the disk has in one definition is taken in the other.
    #[error(
        "disk {target} has its place in one of the domain's definitions, but in the other that is taken"
    )]
    PlaceTaken {
        /// Its target name.
        target: String,
    },
    /// A controller is of a model that we do not know.
    #[error(
        "the domain's only SCSI controllers are of a model that lunplug does not know: index {index}, model {model:?}"
    )]
    UnknownController {
        /// Its index.
        index: u32,
        /// Its model.
        model: String,
    },
    /// The domain has no drive that can be meant.
    #[error("no cdrom drive for it: {why}; its cdrom drives: {drives}")]
    NoDrive {
        /// What is wrong.
        why: String,
        /// The drives and what is in them.
        drives: String,
    },
    /// All drives that can be meant have other media.
    #[error("no cdrom drive is free for it: {}", list(.drives))]
    DriveOccupied {
        /// Target names, and what is in them.
        drives: Vec<(String, String)>,
    },
    /// Neither the running domain nor its definition can be changed.
    #[error("the domain does not run, and its definition is not to be changed")]
    NothingToChange,
}

/// Drives and what is in them.
fn list(drives: &[(String, String)]) -> String {
    let all = drives.iter().map(|(drive, source)| format!("{drive} has {source}"));
    all.collect::<Vec<_>>().join(", ")
}

/// What to do where there is no place left.
fn remedy(bus: Bus) -> &'static str {
    match bus {
        Bus::Scsi => {
            "; a virtio-scsi controller of the domain's own, or a root port for one, is needed"
        }
        Bus::Virtio => {
            "; each disk on bus virtio takes one: give the domain more pcie-root-port controllers, or use bus scsi"
        }
    }
}

impl PlanError {
    /// The stable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::SerialTooLong { .. } => Reason::InvalidSerial,
            Self::SerialInUse { .. } => Reason::SerialInUse,
            Self::SourceInUse { .. } => Reason::SourceInUse,
            Self::Differs { .. } => Reason::VolumeExists,
            Self::NotHotplugged { .. } => Reason::NotHotplugged,
            Self::NoFreeAddress { .. } | Self::PlaceTaken { .. } => Reason::NoFreeAddress,
            Self::UnknownController { .. } => Reason::DomainXmlUnsupported,
            Self::NoDrive { .. } => Reason::DriveNotFound,
            Self::DriveOccupied { .. } => Reason::DriveOccupied,
            Self::NothingToChange => Reason::VmNotRunning,
        }
    }
}

/// Plans one disk. `pending` are target names that are being removed: still taken, though they may
/// be gone from the XML.
pub fn plan(
    views: &Views,
    desired: &DesiredDisk,
    pending: &BTreeSet<String>,
) -> Result<Plan, PlanError> {
    let max = desired.bus.max_serial();
    if let Some(serial) = desired.serial.as_ref().filter(|s| s.as_str().len() > max) {
        return Err(PlanError::SerialTooLong { serial: serial.clone(), bus: desired.bus, max });
    }
    if views.all().next().is_none() {
        return Err(PlanError::NothingToChange);
    }
    let alias = super::alias(&desired.volume);
    for view in views.all() {
        refuse_clashes(view, desired, &alias)?;
    }
    let found = |view: &Option<Arc<Domain>>| view.as_ref().and_then(|v| v.disk(&alias)).cloned();
    let (live, config) = (found(&views.live), found(&views.config));
    let needs = Needs {
        live: views.live.is_some() && live.is_none(),
        config: views.config.is_some() && config.is_none(),
    };
    let existing = live.or(config);
    let io_thread = desired.io_thread.map(|own| iothread::plan(views, &desired.volume, own, needs));
    // The running domain says whether the DAC driver is at work; a definition mostly does not.
    let dac_keep = desired.keep_owner && views.all().next().is_some_and(|v| v.dac_relabels);
    match existing {
        Some(disk) if !needs.any() => {
            let limits = limits::differing(views, &alias, &desired.limits);
            Ok(Plan::Already { target: disk.target, limits })
        }
        Some(disk) => {
            let placement = complete(views, disk, needs, dac_keep)?;
            Ok(Plan::Attach(Placement { io_thread, ..placement }))
        }
        None => {
            let target = free_target(views, desired.bus, pending);
            let (address, controller) = match desired.bus {
                Bus::Scsi => place_scsi(views, needs)?,
                Bus::Virtio => (DiskAddress::Pci(free_slot(views, desired.bus)?), None),
            };
            Ok(Plan::Attach(Placement { target, address, controller, io_thread, needs, dac_keep }))
        }
    }
}

fn refuse_clashes(view: &Domain, desired: &DesiredDisk, alias: &str) -> Result<(), PlanError> {
    for disk in &view.disks {
        if disk.alias.as_deref() == Some(alias) {
            refuse_difference(disk, desired, alias)?;
            continue;
        }
        if let Some(theirs) = foreign_alias(disk, &desired.volume) {
            return Err(PlanError::NotHotplugged {
                alias: theirs.into(),
                target: disk.target.clone(),
            });
        }
        if let Some(serial) = &desired.serial
            && shows(disk, serial.as_str())
        {
            return Err(PlanError::SerialInUse {
                serial: serial.clone(),
                target: disk.target.clone(),
            });
        }
        if disk.source.as_deref() == Some(desired.source.as_str()) {
            return Err(PlanError::SourceInUse {
                path: desired.source.clone(),
                target: disk.target.clone(),
            });
        }
    }
    Ok(())
}

fn refuse_difference(disk: &Disk, desired: &DesiredDisk, alias: &str) -> Result<(), PlanError> {
    fn found(written: &Option<String>) -> &str {
        written.as_deref().unwrap_or_default()
    }
    let flag = |set: bool| if set { "yes" } else { "no" };
    let policy = desired.error_policy.map_or("", ErrorPolicy::as_str);
    let (tuning, written) = (&desired.tuning, &disk.tuning);
    let [logical, physical] = match tuning.blocks {
        None => [String::new(), String::new()],
        Some(blocks) => [blocks.logical.to_string(), blocks.physical.to_string()],
    };
    let run = |word| if desired.device.is_disk() { word } else { "" };
    let zeroes = tuning.detect_zeroes.unwrap_or(DetectZeroes::Off);
    // A disk that somebody defined with one and that is to have none of its own may keep it.
    let threaded = desired.io_thread.is_none() || disk.io_thread.is_some();
    let pairs = [
        ("source", disk.source.as_deref().unwrap_or(""), desired.source.as_str()),
        // A guest that has an image as a raw disk sees its tables.
        ("format", disk.format.as_deref().unwrap_or("raw"), desired.format().as_str()),
        ("disk_type", disk.device.as_str(), desired.device.as_str()),
        ("persistent_reservations", flag(disk.reservations), flag(desired.reservations.is_some())),
        ("serial", found(&disk.serial), desired.serial.as_ref().map_or("", Serial::as_str)),
        ("bus", disk.bus.as_str(), desired.bus.as_str()),
        ("readonly", flag(disk.readonly), flag(desired.read_only)),
        ("shareable", flag(disk.shareable), flag(desired.shareable)),
        ("dedicated_io_thread", flag(threaded), flag(true)),
        ("error_policy", disk.error_policy.as_deref().unwrap_or(""), policy),
        ("io", found(&written.io), run(tuning.io_mode(desired.cache).as_str())),
        ("discard", found(&written.discard), run(tuning.discard_mode().as_str())),
        ("detect_zeroes", written.detect_zeroes.as_deref().unwrap_or("off"), zeroes.as_str()),
        ("logical_block_size", found(&written.logical_block), &logical),
        ("physical_block_size", found(&written.physical_block), &physical),
    ];
    match pairs.iter().find(|(_, found, wanted)| found != wanted) {
        None => Ok(()),
        Some((field, found, wanted)) => Err(PlanError::Differs {
            alias: alias.into(),
            target: disk.target.clone(),
            field,
            found: (*found).into(),
            wanted: (*wanted).into(),
        }),
    }
}

/// The alias of somebody else's disk that goes by this volume's name: KubeVirt calls the disk of a
/// volume `ua-<volume>`.
fn foreign_alias<'a>(disk: &'a Disk, volume: &VolumeName) -> Option<&'a str> {
    disk.alias
        .as_deref()
        .filter(|alias| alias.strip_prefix("ua-").unwrap_or(alias) == volume.as_str())
}

/// Somebody else's disk that goes by this volume's name, when ours is not there.
pub fn not_ours<'a>(domain: &'a Domain, volume: &VolumeName) -> Option<&'a Disk> {
    if domain.disk(&super::alias(volume)).is_some() {
        return None;
    }
    domain.disks.iter().map(|d| &**d).find(|d| foreign_alias(d, volume).is_some())
}

/// Whether a guest takes that for the disk's serial. Without one, libvirt has `drive-<alias>` stand in VPD
/// page 0x83 on scsi (`qemu_command.c`); one that is too long is cut by QEMU.
fn shows(disk: &Disk, serial: &str) -> bool {
    match &disk.serial {
        Some(own) => {
            let max = if disk.bus == "scsi" { Bus::Scsi } else { Bus::Virtio }.max_serial();
            own.starts_with(serial) && own.chars().take(max).eq(serial.chars())
        }
        // The LUN's own, which the XML does not tell.
        None if disk.device == "lun" => false,
        None if disk.bus == "scsi" => {
            let alias = serial.strip_prefix("drive-");
            alias.is_some() && alias == disk.alias.as_deref()
        }
        None => false,
    }
}

/// Gives a disk that is in one definition the same place in the other.
fn complete(
    views: &Views,
    disk: Disk,
    needs: Needs,
    dac_keep: bool,
) -> Result<Placement, PlanError> {
    let lacking = if needs.live { &views.live } else { &views.config };
    let taken = || PlanError::PlaceTaken { target: disk.target.clone() };
    let lacking = lacking.as_ref().ok_or_else(taken)?;
    let mut controller = None;
    let address = match (disk.drive, disk.pci) {
        (Some(drive), _) => {
            match lacking.scsi.iter().find(|c| c.index == drive.controller) {
                Some(c) if c.is_virtio() == Some(true) => {}
                Some(_) => return Err(taken()),
                None => {
                    let address = free_slot(views, Bus::Scsi)?;
                    controller = Some(NewController { index: drive.controller, address, needs });
                }
            }
            if lacking.scsi_used.contains(&drive) {
                return Err(taken());
            }
            DiskAddress::Drive(drive)
        }
        (None, Some(pci)) if !lacking.pci_used.contains(&pci) => DiskAddress::Pci(pci),
        (None, _) => return Err(taken()),
    };
    if lacking.disks.iter().any(|d| d.target == disk.target) {
        return Err(taken());
    }
    let target = disk.target;
    Ok(Placement { target, address, controller, io_thread: None, needs, dac_keep })
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
