//! The cdrom drives of a simulated domain, and what the guest does with their trays.

use std::sync::Arc;

use super::domain::{SimDevice, SimDomain, read, refused};
use crate::domain::xml::{self, Disk, DriveSource};
use crate::host::libvirt::LibvirtError;

impl SimDomain {
    /// Adds an empty cdrom drive on bus sata, in the running domain and in its definition.
    pub fn add_drive(&mut self, target: &str) {
        for text in [&mut self.live, &mut self.config].into_iter().flatten() {
            let unit = text.matches("device='cdrom'").count();
            let drive = format!(
                "  <disk type='file' device='cdrom'>
      <driver name='qemu'/>
      <target dev='{target}' bus='sata'/>
      <readonly/>
      <boot order='{}'/>
      <alias name='ua-cd-{target}'/>
      <address type='drive' controller='0' bus='0' target='0' unit='{unit}'/>
    </disk>
  </devices>",
                unit + 1
            );
            *text = text.replacen("</devices>", &drive, 1);
        }
    }

    /// The guest locks a drive's tray, as by mounting its medium, or lets go of it.
    pub fn lock_tray(&mut self, target: &str, locked: bool) {
        if locked {
            self.locked.insert(target.to_owned());
        } else {
            self.locked.remove(target);
        }
    }

    /// The guest looks at a drive's medium, and has its tray locked until after the next request to open it.
    pub fn look_at_medium(&mut self, target: &str) {
        self.looked_at.insert(target.to_owned());
    }

    /// Somebody puts a file into a drive of the running domain, or takes out what is there.
    pub fn change_medium(&mut self, target: &str, file: Option<&str>) {
        let xml = file.map(|file| format!("<source file='{file}'/>")).unwrap_or_default();
        let source = DriveSource { xml, file: file.is_some() };
        let live = self.live.clone().unwrap_or_default();
        if let Ok(Some(drive)) = xml::with_medium(&live, target, &source) {
            self.replace(target, &drive);
        }
    }

    /// Changes a drive of the running domain (`qemuDomainChangeDiskLive`, `qemuDomainChangeEjectableMedia`).
    pub fn update(
        &mut self,
        drive: &str,
        force: bool,
        may_open: &dyn Fn(&str) -> Result<(), String>,
        device_of: &dyn Fn(&str) -> Option<SimDevice>,
    ) -> Result<(), LibvirtError> {
        let domain = read(self.running()?)?;
        let new = alone(drive)?;
        let Some(old) = domain.disks.into_iter().find(|disk| disk.target == new.target) else {
            return Err(refused(format!("internal error: disk '{}' not found", new.target)));
        };
        refuse_change(&old, &new)?;
        if old.medium == new.medium {
            return Ok(());
        }
        if old.device != "cdrom" {
            let why = "internal error: disk source can be changed only in removable drives";
            return Err(refused(why.into()));
        }
        if let Some(path) = &new.source {
            may_open(path).map_err(|why| {
                refused(format!(
                    "internal error: unable to execute QEMU command 'blockdev-add': Could not open '{path}': {why}"
                ))
            })?;
            let size = device_of(path).unwrap_or_default().size;
            self.shown.insert(new.alias.clone().unwrap_or_default(), size);
        }
        let looked_at = self.looked_at.remove(&new.target);
        if (looked_at || self.locked.contains(&new.target)) && !force {
            let message = "operation failed: timed out waiting to open tray";
            return Err(LibvirtError::TrayLocked { message: message.into() });
        }
        self.locked.remove(&new.target);
        self.replace(&new.target, drive);
        Ok(())
    }

    fn replace(&mut self, target: &str, drive: &str) {
        const END: &str = "</disk>";
        let Some(text) = &mut self.live else { return };
        let Some(at) = text.find(&format!("<target dev='{target}'")) else { return };
        let (Some(from), Some(to)) = (text[..at].rfind("<disk "), text[at..].find(END)) else {
            return;
        };
        text.replace_range(from..at + to + END.len(), drive);
    }
}

/// A device's XML as a disk.
fn alone(device: &str) -> Result<Arc<Disk>, LibvirtError> {
    let text = format!(
        "<domain><name>x</name><os><type>hvm</type></os><devices>{device}</devices></domain>"
    );
    read(&text)?.disks.pop().ok_or_else(|| refused("XML error: not a disk".into()))
}

/// What cannot be changed of a disk (`qemuDomainDiskChangeSupported`, `virDomainDefCompatibleDevice`).
fn refuse_change(old: &Disk, new: &Disk) -> Result<(), LibvirtError> {
    if old.alias != new.alias {
        return Err(refused("operation denied: changing device alias is not allowed".into()));
    }
    let differs = [
        ("bus", old.bus != new.bus),
        ("device", old.device != new.device),
        ("address", old.drive != new.drive || old.pci != new.pci),
        ("serial", old.serial != new.serial),
        ("readonly", old.readonly != new.readonly),
        ("shareable", old.shareable != new.shareable),
        ("error_policy", old.error_policy != new.error_policy),
        ("io", old.tuning != new.tuning),
        ("iotune", old.limits != new.limits),
    ];
    match differs.iter().find(|(_, differs)| *differs) {
        None => Ok(()),
        Some((field, _)) => Err(refused(format!(
            "operation unsupported: cannot modify field '{field}' of the disk"
        ))),
    }
}
