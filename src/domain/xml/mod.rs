//! Reading a domain's XML: only what is needed to place and find disks, in the case it is written in.
//!
//! What is not known is skipped, unless a disk could not be placed safely without it: then the
//! error names the element. Element and attribute names are those of libvirt's
//! docs/formatdomain.rst.

mod addresses;
mod drive;
mod iothreads;
mod pieces;
mod raw;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::types::IoLimits;
use addresses::addresses;
pub use drive::{DriveSource, with_medium};
pub use iothreads::IoThreads;
pub use pieces::recall;
use raw::{RawChannel, RawDomain, RawSeclabel};

/// A domain's XML cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    /// It is not well-formed, or not a domain.
    #[error("the domain's XML cannot be read")]
    Malformed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Something is in it that keeps a disk from being placed safely.
    #[error("the domain's XML has {element} that lunplug cannot work with: {why}")]
    Unsupported {
        /// The element, e.g. `<disk> sda`.
        element: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// A PCI address in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// PCI domain; 0 but on exotic machines.
    pub domain: u32,
    /// Bus: the index of the PCI controller.
    pub bus: u32,
    /// Slot (device number).
    pub slot: u32,
    /// Function.
    pub function: u32,
}

/// An address on a SCSI (or SATA, IDE) controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DriveAddress {
    /// Index of the controller among those of its type.
    pub controller: u32,
    /// Channel; 0 on virtio-scsi.
    pub bus: u32,
    /// SCSI target.
    pub target: u32,
    /// LUN behind it.
    pub unit: u32,
}

/// A disk of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its alias, when it has one (an inactive definition's disk may not).
    pub alias: Option<String>,
    /// Target name, e.g. `sda`.
    pub target: String,
    /// Bus as written: `scsi`, `virtio`, `sata`, ...
    pub bus: String,
    /// `disk`, `lun`, `cdrom`, `floppy`.
    pub device: String,
    /// What the serial element holds, in its case.
    pub serial: Option<String>,
    /// `dev` or `file` of the source; `None` for network sources and empty drives.
    pub source: Option<String>,
    /// `type` of the driver: what is in the source.
    pub format: Option<String>,
    /// What of whatever kind is in it, in words; `None` for an empty drive.
    pub medium: Option<String>,
    /// The guest may not write.
    pub readonly: bool,
    /// Others may write too.
    pub shareable: bool,
    /// The I/O thread that it names.
    pub io_thread: Option<u32>,
    /// `error_policy` of the driver, as written.
    pub error_policy: Option<String>,
    /// Persistent reservations go to a helper.
    pub reservations: bool,
    /// How it is run, as written.
    pub tuning: Written,
    /// Its `<iotune>`.
    pub limits: IoLimits,
    /// Its address, where it is of the `drive` kind.
    pub drive: Option<DriveAddress>,
    /// Its address, where it is of the `pci` kind.
    pub pci: Option<PciAddress>,
}

/// How a disk is run, as its XML has it: what is not there is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Written {
    /// `io` of the driver.
    pub io: Option<String>,
    /// `discard` of the driver.
    pub discard: Option<String>,
    /// `detect_zeroes` of the driver.
    pub detect_zeroes: Option<String>,
    /// `logical_block_size` of `<blockio>`.
    pub logical_block: Option<String>,
    /// `physical_block_size` of `<blockio>`.
    pub physical_block: Option<String>,
}

/// A SCSI controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScsiController {
    /// Its index.
    pub index: u32,
    /// Its model as written.
    pub model: Option<String>,
}

impl ScsiController {
    /// Whether it is a virtio-scsi controller: `Some(false)` for a model known to be another,
    /// `None` for one that we do not know.
    pub fn is_virtio(&self) -> Option<bool> {
        match self.model.as_deref()? {
            "virtio-scsi" | "virtio-transitional" | "virtio-non-transitional" => Some(true),
            "buslogic" | "lsilogic" | "lsisas1068" | "lsisas1078" | "vmpvscsi" | "ibmvscsi"
            | "ncr53c90" | "dc390" | "am53c974" => Some(false),
            _ => None,
        }
    }
}

/// A PCI controller: a bus that devices may be plugged into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciController {
    /// Its index, which is the number of its bus.
    pub index: u32,
    /// Its model as written.
    pub model: String,
    /// Not switched off by `<target hotplug='off'/>`.
    pub hotplug: bool,
}

/// What a domain's XML says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// The machine type, e.g. `pc-q35-10.0`.
    pub machine: String,
    /// All disks, in the order of the XML.
    pub disks: Vec<Arc<Disk>>,
    /// All SCSI controllers.
    pub scsi: Vec<ScsiController>,
    /// All PCI controllers.
    pub pci: Vec<PciController>,
    /// PCI addresses that a device has, of whatever kind it is.
    pub pci_used: BTreeSet<PciAddress>,
    /// SCSI addresses that a device has, disks and host devices.
    pub scsi_used: BTreeSet<DriveAddress>,
    /// Its I/O threads.
    pub io_threads: IoThreads,
    /// The guest agent's channel: `None` when there is none, else whether the guest opened it
    /// (unknown in an inactive definition, then false).
    pub agent_connected: Option<bool>,
    /// libvirt's DAC driver manages this domain's files: only then may a disk say that its owner is
    /// to be left alone (with `relabel='no'` for the whole domain libvirt refuses that, and without
    /// the driver, as in a session daemon, a domain that says so can no longer be started;
    /// `security_manager.c`, `virSecurityManagerCheckAllLabel`).
    pub dac_relabels: bool,
}

impl Domain {
    /// The disk of this alias.
    pub fn disk(&self, alias: &str) -> Option<&Disk> {
        self.disks.iter().map(|d| &**d).find(|d| d.alias.as_deref() == Some(alias))
    }

    fn put(&mut self, disk: Arc<Disk>) -> Result<(), XmlError> {
        self.scsi_used.extend(disk.scsi_address()?);
        self.disks.push(disk);
        Ok(())
    }
}

impl Disk {
    /// The address that it takes on a SCSI controller.
    fn scsi_address(&self) -> Result<Option<DriveAddress>, XmlError> {
        if self.bus != "scsi" {
            return Ok(None);
        }
        let address = self.drive.ok_or_else(|| XmlError::Unsupported {
            element: format!("<disk> {}", self.target),
            why: "a disk on bus scsi without an address",
        })?;
        Ok(Some(address))
    }
}

/// Reads a domain's XML.
pub fn parse(xml: &str) -> Result<Domain, XmlError> {
    Ok(read(xml)?.0)
}

/// The same; and how many [`pieces::MARK`]s stand where a disk may.
fn read(xml: &str) -> Result<(Domain, usize), XmlError> {
    let raw: RawDomain =
        quick_xml::de::from_str(xml).map_err(|e| XmlError::Malformed(Box::new(e)))?;
    let used = addresses(xml, &[])?;
    let ids = iothreads::declared(raw.iothreads.as_deref(), raw.iothreadids.as_ref())?;
    let (mut scsi, mut pci) = (Vec::new(), Vec::new());
    for controller in raw.devices.controller {
        let index = controller.index()?;
        match controller.kind.as_str() {
            "scsi" => scsi.push(ScsiController { index, model: controller.model }),
            "pci" => pci.push(PciController {
                index,
                model: controller.model.unwrap_or_default(),
                hotplug: controller.targets.iter().all(|t| t.hotplug.as_deref() != Some("off")),
            }),
            _ => {}
        }
    }
    let agent = |c: &RawChannel| {
        c.target.iter().find(|t| t.name.as_deref() == Some("org.qemu.guest_agent.0")).cloned()
    };
    let agent = raw.devices.channel.iter().find_map(agent);
    let dac =
        |s: &RawSeclabel| s.model.as_deref() == Some("dac") && s.relabel.as_deref() == Some("yes");
    let mut domain = Domain {
        name: raw.name,
        machine: raw.os.kind.machine.unwrap_or_default(),
        disks: Vec::with_capacity(raw.devices.disk.len()),
        scsi,
        pci,
        pci_used: used.pci,
        scsi_used: used.drive,
        io_threads: IoThreads { ids, users: used.io_threads },
        agent_connected: agent.map(|target| target.state.as_deref() == Some("connected")),
        dac_relabels: raw.seclabel.iter().any(dac),
    };
    for disk in raw.devices.disk {
        domain.put(Arc::new(disk.check()?))?;
    }
    Ok((domain, used.marks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubevirt_domain_is_read() {
        let d = parse(include_str!("../fixtures/kubevirt-q35.xml")).unwrap();
        assert_eq!((d.name.as_str(), d.machine.as_str()), ("default_vm1", "pc-q35-rhel9.6.0"));
        assert_eq!(d.disks.len(), 4);
        let a = d.disk("ua-data-a").unwrap();
        assert_eq!(a.serial.as_deref(), Some("KeepThisCASE-01"), "the case is kept");
        assert_eq!(a.source.as_deref(), Some("/var/run/kubevirt/hotplug-disks/data-a"));
        assert!(a.shareable && !a.readonly);
        let cd = d.disk("ua-cd").unwrap();
        assert_eq!((cd.device.as_str(), cd.bus.as_str()), ("cdrom", "sata"));
        assert!(cd.readonly && cd.source.is_none());
        assert_eq!(d.scsi.len(), 1);
        assert_eq!(d.scsi[0].is_virtio(), Some(true));
        let at = |target| DriveAddress { controller: 0, bus: 0, target, unit: 0 };
        assert_eq!(
            d.scsi_used,
            BTreeSet::from([at(0), at(1), at(2)]),
            "a SCSI host device counts, a SATA drive does not"
        );
        let port = |bus| PciAddress { domain: 0, bus, slot: 0, function: 0 };
        assert!(d.pci_used.contains(&port(9)), "the guest's address of a host device counts");
        assert!(!d.pci_used.contains(&port(10)), "the host's address of it does not");
        let off: Vec<_> = d.pci.iter().filter(|p| !p.hotplug).map(|p| p.index).collect();
        assert_eq!(off, [8]);
        assert_eq!(d.agent_connected, Some(true));
        assert!(d.dac_relabels);
    }

    #[test]
    fn an_i440fx_domain_is_read() {
        let d = parse(include_str!("../fixtures/plain-i440fx.xml")).unwrap();
        assert_eq!(d.disks[1].source, None, "a network source has no path");
        assert_eq!(d.scsi[0].is_virtio(), Some(false));
        assert!(d.scsi_used.is_empty(), "an IDE drive is not on SCSI");
        assert_eq!(d.agent_connected, None);
        assert!(!d.dac_relabels);
    }

    #[test]
    fn what_cannot_be_placed_safely_is_named() {
        let with = |devices: &str| {
            parse(&format!(
                "<domain><name>x</name><os><type machine='q35'>hvm</type></os><devices>{devices}</devices></domain>"
            ))
        };
        assert!(with("<rng model='virtio'><new/></rng>").is_ok(), "unknown things are skipped");
        for (devices, says) in [
            ("<disk device='disk'><alias name='a1'/></disk>", "<disk> a1"),
            ("<disk><target dev='sda'/></disk>", "no bus"),
            ("<disk><target bus='scsi'/></disk>", "no name"),
            ("<disk><target dev='sdq' bus='scsi'/></disk>", "<disk> sdq"),
            ("<controller type='scsi' index='many'/>", "<controller type='scsi'>"),
            ("<rng><address type='pci' bus='zz'/></rng>", "of rng"),
        ] {
            let error = with(devices).unwrap_err();
            assert!(matches!(error, XmlError::Unsupported { .. }), "{error:?}");
            assert!(error.to_string().contains(says), "{error} / {says}");
        }
        for bad in ["", "<domain>", "<network/>", "<domain><name>x</name></domain>", "no xml"] {
            assert!(matches!(parse(bad), Err(XmlError::Malformed(_))), "{bad}");
        }
    }
}
