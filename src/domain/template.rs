//! The XML that libvirt is given, filled from `xml-templates/` with every value escaped.
//!
//! A disk's XML always names the driver's type (an image's format is never probed) and has an empty
//! `<backingStore/>` (a chain is never followed).

use std::fmt::{self, Write};

use askama::{Template, filters::Escaper};

use crate::types::Blocks;

use super::diff::{CONTROLLER_MODEL, DesiredDisk, DiskAddress, NewController, Placement};
use super::xml::{DriveSource, PciAddress};

/// A fragment could not be filled.
#[derive(Debug, thiserror::Error)]
#[error("the XML for libvirt could not be filled")]
pub struct TemplateError(#[from] askama::Error);

/// Escapes text for XML, in elements and in attributes of either quote. Characters that XML 1.0
/// cannot hold at all become U+FFFD.
#[derive(Debug, Clone, Copy, Default)]
pub struct Xml;

impl Escaper for Xml {
    fn write_escaped_str<W: Write>(&self, mut dest: W, string: &str) -> fmt::Result {
        string.chars().try_for_each(|c| self.write_escaped_char(&mut dest, c))
    }

    fn write_escaped_char<W: Write>(&self, mut dest: W, c: char) -> fmt::Result {
        match c {
            '<' => dest.write_str("&lt;"),
            '>' => dest.write_str("&gt;"),
            '&' => dest.write_str("&amp;"),
            '\'' => dest.write_str("&apos;"),
            '"' => dest.write_str("&quot;"),
            // As references, or a parser makes spaces of them in attributes.
            '\t' | '\n' | '\r' => write!(dest, "&#{};", u32::from(c)),
            '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => dest.write_char('\u{fffd}'),
            c => dest.write_char(c),
        }
    }
}

#[derive(Template)]
#[template(path = "disk.xml")]
struct DiskXml<'a> {
    cache: &'a str,
    device: &'a str,
    reservations: Option<&'a str>,
    io: Option<&'a str>,
    discard: Option<&'a str>,
    detect_zeroes: Option<&'a str>,
    blocks: Option<Blocks>,
    limits: Vec<(&'static str, u64)>,
    error_policy: Option<&'a str>,
    io_thread: Option<u32>,
    source: &'a str,
    file: bool,
    format: &'a str,
    dac_keep: bool,
    target: &'a str,
    bus: &'a str,
    read_only: bool,
    shareable: bool,
    serial: Option<&'a str>,
    alias: &'a str,
    address: DiskAddress,
}

#[derive(Template)]
#[template(path = "medium.xml")]
struct MediumXml<'a> {
    source: &'a str,
    file: bool,
    dac_keep: bool,
}

#[derive(Template)]
#[template(path = "controller.xml")]
struct ControllerXml<'a> {
    index: u32,
    model: &'a str,
    address: PciAddress,
}

/// A disk's XML.
pub fn disk(desired: &DesiredDisk, placement: &Placement) -> Result<String, TemplateError> {
    // What QEMU does to I/O is nothing to a LUN that is passed through.
    let run = desired.device.is_disk();
    let xml = DiskXml {
        cache: desired.cache.as_str(),
        device: desired.device.as_str(),
        reservations: desired.reservations.as_deref(),
        io: run.then(|| desired.tuning.io_mode(desired.cache).as_str()),
        discard: run.then(|| desired.tuning.discard_mode().as_str()),
        detect_zeroes: desired.tuning.detect_zeroes.map(|z| z.as_str()),
        blocks: desired.tuning.blocks,
        limits: desired.limits.fields().into_iter().filter(|(_, limit)| *limit > 0).collect(),
        error_policy: desired.error_policy.map(|p| p.as_str()),
        io_thread: placement.io_thread.map(|thread| thread.id),
        source: &desired.source,
        file: desired.file.is_some(),
        format: desired.format().as_str(),
        dac_keep: placement.dac_keep,
        target: &placement.target,
        bus: desired.bus.as_str(),
        read_only: desired.read_only,
        shareable: desired.shareable,
        serial: desired.serial.as_ref().map(|s| s.as_str()),
        alias: &super::alias(&desired.volume),
        address: placement.address,
    };
    Ok(xml.render()?)
}

/// The source of a medium, as it stands in its drive's XML.
pub fn medium(source: &str, file: bool, dac_keep: bool) -> Result<DriveSource, TemplateError> {
    Ok(DriveSource { xml: MediumXml { source, file, dac_keep }.render()?, file })
}

/// A virtio-scsi controller's XML.
pub fn controller(new: &NewController) -> Result<String, TemplateError> {
    Ok(ControllerXml { index: new.index, model: CONTROLLER_MODEL, address: new.address }
        .render()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::diff::Needs;
    use crate::domain::iothread::Thread;
    use crate::domain::xml::DriveAddress;
    use crate::types::{
        BlockSize, Bus, CacheMode, DetectZeroes, Discard, DiskType, ErrorPolicy, IoLimits, IoMode,
        Tuning,
    };

    fn sample() -> (DesiredDisk, Placement) {
        let desired = DesiredDisk {
            volume: "vol1".parse().unwrap(),
            source: "/hotplug/vol1".into(),
            file: None,
            serial: "Serial-1".parse().ok(),
            device: DiskType::Disk,
            reservations: None,
            bus: Bus::Scsi,
            cache: CacheMode::None,
            read_only: false,
            shareable: false,
            error_policy: None,
            io_thread: None,
            tuning: Tuning::default(),
            limits: IoLimits::default(),
            keep_owner: true,
        };
        let address = DriveAddress { controller: 0, bus: 0, target: 3, unit: 0 };
        let placement = Placement {
            target: "sdc".into(),
            address: DiskAddress::Drive(address),
            controller: None,
            io_thread: None,
            needs: Needs { live: true, config: false },
            dac_keep: true,
        };
        (desired, placement)
    }

    #[test]
    fn a_disk_is_written_out_whole() {
        let (desired, placement) = sample();
        assert_eq!(
            disk(&desired, &placement).unwrap(),
            "<disk type='block' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
  <source dev='/hotplug/vol1'>
    <seclabel model='dac' relabel='no'/>
  </source>
  <backingStore/>
  <target dev='sdc' bus='scsi'/>
  <serial>Serial-1</serial>
  <alias name='ua-lunplug-vol1'/>
  <address type='drive' controller='0' bus='0' target='3' unit='0'/>
</disk>"
        );
    }

    #[test]
    fn options_are_written_where_they_belong() {
        let (mut desired, mut placement) = sample();
        desired.cache = CacheMode::Writeback;
        desired.read_only = true;
        desired.shareable = true;
        desired.error_policy = Some(ErrorPolicy::Stop);
        placement.dac_keep = false;
        placement.io_thread = Some(Thread { id: 7, needs: Needs::default() });
        placement.address =
            DiskAddress::Pci(PciAddress { domain: 0, bus: 5, slot: 0, function: 0 });
        let xml = disk(&desired, &placement).unwrap();
        for part in [
            "cache='writeback' io='threads' discard='unmap' error_policy='stop' iothread='7'/>",
            "<readonly/>",
            "<shareable/>",
            "<address type='pci' domain='0' bus='5' slot='0' function='0'/>",
        ] {
            assert!(xml.contains(part), "{part} in {xml}");
        }
        assert!(!xml.contains("seclabel"), "{xml}");
    }

    #[test]
    fn how_it_is_run_is_written_as_asked() {
        let (mut desired, placement) = sample();
        let size = |bytes: u32| BlockSize::try_from(bytes).ok();
        desired.tuning = Tuning {
            io: Some(IoMode::IoUring),
            discard: Some(Discard::Ignore),
            detect_zeroes: Some(DetectZeroes::On),
            blocks: Blocks::new(size(512), size(4096)).unwrap(),
        };
        desired.limits = IoLimits { read_iops_sec: 7, total_bytes_sec: 9, ..IoLimits::default() };
        let xml = disk(&desired, &placement).unwrap();
        for part in [
            "cache='none' io='io_uring' discard='ignore' detect_zeroes='on'/>",
            "<blockio logical_block_size='512' physical_block_size='4096'/>",
            "<iotune>\n    <total_bytes_sec>9</total_bytes_sec>\n    <read_iops_sec>7</read_iops_sec>\n  </iotune>",
        ] {
            assert!(xml.contains(part), "{part} in {xml}");
        }
    }

    #[test]
    fn a_lun_is_passed_through_without_what_libvirt_refuses_of_it() {
        let (mut desired, placement) = sample();
        (desired.device, desired.serial) = (DiskType::Lun, None);
        desired.reservations = Some("/run/pr&helper.sock".into());
        assert_eq!(
            disk(&desired, &placement).unwrap(),
            "<disk type='block' device='lun'>
  <driver name='qemu' type='raw' cache='none'/>
  <source dev='/hotplug/vol1'>
    <seclabel model='dac' relabel='no'/>
    <reservations managed='no'>
      <source type='unix' path='/run/pr&amp;helper.sock' mode='client'/>
    </reservations>
  </source>
  <backingStore/>
  <target dev='sdc' bus='scsi'/>
  <alias name='ua-lunplug-vol1'/>
  <address type='drive' controller='0' bus='0' target='3' unit='0'/>
</disk>"
        );
    }

    #[test]
    fn values_cannot_break_out() {
        let (mut desired, placement) = sample();
        desired.source = "/a'/><x y=\"&\n\u{1}<".into();
        let xml = disk(&desired, &placement).unwrap();
        assert!(xml.contains("dev='/a&apos;/&gt;&lt;x y=&quot;&amp;&#10;\u{fffd}&lt;'>"), "{xml}");
    }
}
