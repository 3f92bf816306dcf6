//! The devices in a simulated domain's XML, changed as libvirt changes them and refused what it refuses.

use super::domain::{read, refused};
use super::iothreads::refuse_io_thread;
use crate::domain::xml::Disk;
use crate::host::libvirt::LibvirtError;
use crate::types::IoLimits;

/// A device as libvirt writes it: on lines of its own, four spaces in.
fn formatted(device: &str) -> String {
    device.trim().lines().map(|line| format!("    {line}\n")).collect()
}

/// The XML with one more device, and that as a disk if it is one; refused where libvirt refuses.
pub(super) fn with_device(
    text: &str,
    device: &str,
) -> Result<(String, Option<Disk>), LibvirtError> {
    let before = read(text)?;
    let at = text.find("  </devices>").or_else(|| text.find("</devices>"));
    let at = at.ok_or_else(|| refused("XML error: a domain without devices".into()))?;
    let new = format!("{}{}{}", &text[..at], formatted(device), &text[at..]);
    let after = read(&new)?;
    let grew = (after.pci_used.len() - before.pci_used.len())
        + (after.scsi_used.len() - before.scsi_used.len());
    if grew != 1 {
        return Err(refused("XML error: the device's address is missing or in use".into()));
    }
    let Some(disk) = after.disks.last().filter(|_| after.disks.len() > before.disks.len()) else {
        let index = after.scsi.last().map(|c| c.index);
        if before.scsi.iter().any(|c| Some(c.index) == index) {
            return Err(refused("operation failed: target scsi:0 already exists".into()));
        }
        return Ok((new, None));
    };
    if before.disks.iter().any(|d| d.target == disk.target) {
        return Err(refused(format!("operation failed: target {} already exists", disk.target)));
    }
    if before.disks.iter().any(|d| d.alias == disk.alias) {
        return Err(refused("XML error: non unique alias detected".into()));
    }
    if let Some(at) = disk.drive.filter(|_| disk.bus == "scsi")
        && before.scsi.iter().all(|c| c.index != at.controller)
    {
        return Err(refused(format!("internal error: no SCSI controller {}", at.controller)));
    }
    let disk = Disk::clone(disk);
    refuse_lun(&disk)?;
    refuse_io_thread(&disk, &before)?;
    Ok((new, Some(disk)))
}

/// What libvirt refuses of a LUN that is passed through (`qemuValidateDomainDeviceDefDiskFrontend`), and
/// of what is none.
fn refuse_lun(disk: &Disk) -> Result<(), LibvirtError> {
    let unsupported = |why: &str| Err(refused(format!("unsupported configuration: {why}")));
    match disk.device.as_str() {
        "lun" if disk.bus != "scsi" => {
            unsupported("disk device='lun' is not supported for this bus")
        }
        "lun" if disk.serial.is_some() => {
            unsupported("scsi-block 'lun' devices do not support the serial property")
        }
        "lun" => Ok(()),
        _ if disk.reservations => unsupported("<reservations/> allowed only for lun devices"),
        _ => Ok(()),
    }
}

/// Gives the disk with that source another `<iotune>`.
pub(super) fn set_limits(
    text: &mut String,
    source: &str,
    limits: &IoLimits,
) -> Result<(), LibvirtError> {
    let missing = || refused(format!("invalid argument: invalid path: {source}"));
    let at = text.find(&format!("<source dev='{source}'")).ok_or_else(missing)?;
    let to = at + text[at..].find("</disk>").ok_or_else(missing)?;
    let old = text[at..to].find("<iotune>").zip(text[at..to].find("</iotune>"));
    let fields = limits.fields().into_iter().filter(|(_, limit)| *limit > 0);
    let new: String = fields.map(|(name, limit)| format!("<{name}>{limit}</{name}>")).collect();
    let new = if new.is_empty() { new } else { format!("<iotune>{new}</iotune>") };
    match old {
        Some((from, end)) => text.replace_range(at + from..at + end + "</iotune>".len(), &new),
        None if new.is_empty() => {}
        None => text.insert_str(to, &format!("  {new}\n    ")),
    }
    Ok(())
}

/// Cuts a disk out of the XML; whether it was there.
pub(super) fn remove_disk(text: &mut String, alias: &str) -> bool {
    const END: &str = "</disk>";
    let Some(at) = text.find(&format!("<alias name='{alias}'/>")) else { return false };
    let (Some(from), Some(to)) = (text[..at].rfind("<disk "), text[at..].find(END)) else {
        return false;
    };
    // With its lines.
    let from = text[..from].trim_end_matches(' ').len();
    let to = at + to + END.len();
    let to = to + usize::from(text[to..].starts_with('\n'));
    text.replace_range(from..to, "");
    true
}
