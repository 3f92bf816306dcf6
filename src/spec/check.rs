//! What of a volume's options excludes each other. `Err` names the field.

use super::{MultipathPolicy, Source, VolumeSpec};
use crate::types::{Bus, CacheMode, DiskType, FileFormat, Malformed, Serial, Tuning};

impl VolumeSpec {
    /// Rules between fields, which no single field's type can express. `Err` names the field.
    pub fn check(&self) -> Result<(), (&'static str, Malformed)> {
        let malformed = |what, value: &str, rule| Malformed { what, value: value.into(), rule };
        self.check_device()?;
        if let Some(drive) = self.drive.as_ref().filter(|_| !self.device.is_cdrom()) {
            let rule = "a drive is for disk_type cdrom alone";
            return Err(("drive", malformed("drive", drive.as_str(), rule)));
        }
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
            Source::File(source) => self.check_file(source.format),
            Source::Iscsi(_) | Source::Fc(_) => Ok(()),
        }
    }
}

impl VolumeSpec {
    /// What is on the host already has no paths of ours to be put together, and may be no LUN.
    fn check_local(&self) -> Result<(), (&'static str, Malformed)> {
        let no = |field, what, value: &str, rule| Err((field, Malformed::new(what, value, rule)));
        if self.multipath == MultipathPolicy::Required {
            let rule = "preferred or off: what is on the host already is taken as it is; for a map give its path by block://";
            return no("multipath", "multipath", "required", rule);
        }
        if self.device == DiskType::Lun {
            let rule =
                "disk_type lun needs an iscsi or fc source: only of these it is known to be a LUN";
            return no("disk_type", "disk_type", "lun", rule);
        }
        Ok(())
    }

    /// A file may besides have a format, which only QEMU understands.
    fn check_file(&self, format: FileFormat) -> Result<(), (&'static str, Malformed)> {
        let no = |field, what, value: &str, rule| Err((field, Malformed::new(what, value, rule)));
        if !format.is_raw() && self.shareable {
            let rule =
                "only raw files can be shared: each QEMU would change the image's tables by itself";
            return no("shareable", "option", "true with format qcow2", rule);
        }
        if !format.is_raw() && self.device.is_cdrom() {
            let rule = "disk_type cdrom takes raw files, e.g. an ISO image: the drive is as the domain defines it";
            return no("source.format", "file format", format.as_str(), rule);
        }
        self.check_local()
    }

    /// What a LUN that is passed through excludes, and what needs one. QEMU's scsi-block does not carry
    /// the guest's I/O, only its SCSI commands: nothing that QEMU does to I/O applies.
    fn check_device(&self) -> Result<(), (&'static str, Malformed)> {
        let no = |field, what, value: &str, rule| Err((field, Malformed::new(what, value, rule)));
        if self.device.is_cdrom() {
            return self.check_medium();
        }
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

impl VolumeSpec {
    /// What a medium excludes: the drive is the domain's, and all but its medium is as that was defined
    /// (`qemuDomainDiskChangeSupported`).
    fn check_medium(&self) -> Result<(), (&'static str, Malformed)> {
        let no = |field, value: &str, rule| Err((field, Malformed::new("option", value, rule)));
        let of_drive = "disk_type cdrom takes none: the drive is as the domain defines it";
        if !self.read_only {
            return no("read_only", "false with disk_type cdrom", "a medium can only be read");
        }
        if let Some(serial) = &self.serial {
            return Err(("serial", Malformed::new("serial", serial.as_str(), of_drive)));
        }
        if self.bus != Bus::default() {
            return no("bus", self.bus.as_str(), of_drive);
        }
        if self.cache != CacheMode::None {
            return no("cache", self.cache.as_str(), of_drive);
        }
        if let Some(policy) = self.error_policy {
            return no("error_policy", policy.as_str(), of_drive);
        }
        if let Some(field) = self.tuning.first_difference(&Tuning::default()) {
            return no(field, field, of_drive);
        }
        if !self.limits.is_none() {
            return no("io_limits", "limits with disk_type cdrom", of_drive);
        }
        if self.dedicated_io_thread {
            return no("dedicated_io_thread", "true with disk_type cdrom", of_drive);
        }
        if self.reservations {
            let rule = "persistent reservations need disk_type lun";
            return no("persistent_reservations", "true with disk_type cdrom", rule);
        }
        if self.persist {
            let rule = "a medium is in no definition: it comes back with the volume whenever the VM starts";
            return no("persist", "true with disk_type cdrom", rule);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::volume_fixture;
    use crate::types::{ErrorPolicy, IoLimits, TargetName};

    #[test]
    fn a_medium_excludes_what_is_the_drives() {
        let drive: Option<TargetName> = "sda".parse().ok();
        let medium = VolumeSpec {
            serial: None,
            device: DiskType::Cdrom,
            drive: drive.clone(),
            read_only: true,
            ..volume_fixture("iso")
        };
        medium.check().unwrap();
        VolumeSpec { shareable: true, drive: None, ..medium.clone() }.check().unwrap();
        let io = Some(crate::types::IoMode::Threads);
        let limits = IoLimits { total_iops_sec: 1, ..IoLimits::default() };
        for (field, spec) in [
            ("read_only", VolumeSpec { read_only: false, ..medium.clone() }),
            ("serial", VolumeSpec { serial: "a".parse().ok(), ..medium.clone() }),
            ("bus", VolumeSpec { bus: Bus::Virtio, ..medium.clone() }),
            ("cache", VolumeSpec { cache: CacheMode::Writeback, ..medium.clone() }),
            (
                "error_policy",
                VolumeSpec { error_policy: Some(ErrorPolicy::Stop), ..medium.clone() },
            ),
            ("io", VolumeSpec { tuning: Tuning { io, ..medium.tuning }, ..medium.clone() }),
            ("io_limits", VolumeSpec { limits, ..medium.clone() }),
            ("dedicated_io_thread", VolumeSpec { dedicated_io_thread: true, ..medium.clone() }),
            ("persistent_reservations", VolumeSpec { reservations: true, ..medium.clone() }),
            ("persist", VolumeSpec { persist: true, ..medium.clone() }),
            ("drive", VolumeSpec { drive, ..volume_fixture("a") }),
        ] {
            let (named, error) = spec.check().unwrap_err();
            assert_eq!(named, field, "{error}");
        }
        let json = serde_json::to_value(&medium).unwrap();
        assert_eq!(serde_json::from_value::<VolumeSpec>(json).unwrap(), medium);
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
        let source = "file+qcow2:///srv/image".parse().unwrap();
        let image = VolumeSpec { source, ..spec.clone() };
        image.check().unwrap();
        let cdrom =
            VolumeSpec { device: DiskType::Cdrom, serial: None, read_only: true, ..image.clone() };
        for (field, spec) in [
            ("shareable", VolumeSpec { shareable: true, ..image.clone() }),
            ("multipath", VolumeSpec { multipath: required, ..image.clone() }),
            ("source.format", cdrom),
        ] {
            assert_eq!(spec.check().unwrap_err().0, field);
        }
        let source: Source = "file:///srv/disk.img".parse().unwrap();
        assert_eq!(
            serde_json::to_value(&source).unwrap(),
            serde_json::json!({"file": {"path": "/srv/disk.img"}})
        );
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["source"], serde_json::json!({"block": {"path": "/dev/vg/data"}}));
        assert_eq!(serde_json::from_value::<VolumeSpec>(json).unwrap(), spec);
    }
}
