//! Which addresses are taken, and which I/O threads used, by devices of any kind.

use std::collections::{BTreeMap, BTreeSet};

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::iothreads::note_user;
use super::pieces;
use super::raw::RawAddress;
use super::{DriveAddress, PciAddress, XmlError};

/// What is taken.
#[derive(Debug, Clone, Default)]
pub(super) struct Used {
    pub(super) pci: BTreeSet<PciAddress>,
    pub(super) drive: BTreeSet<DriveAddress>,
    pub(super) io_threads: BTreeMap<u32, usize>,
    /// How many [`pieces::MARK`]s stand where a disk may.
    pub(super) marks: usize,
}

/// The addresses of all devices, whatever they are: `domain/devices/*/address`. Deeper ones (a host
/// device's source) are the host's, not the guest's. Disks' drive addresses are left to the caller,
/// who knows their bus. `path` leads to what the text is, in the domain.
pub(super) fn addresses(xml: &str, path: &[&str]) -> Result<Used, XmlError> {
    let mut reader = Reader::from_str(xml);
    let mut path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
    let mut used = Used::default();
    loop {
        match reader.read_event().map_err(|e| XmlError::Malformed(Box::new(e)))? {
            Event::Start(tag) => {
                note(&path, &tag, &mut used)?;
                path.push(tag.name().as_ref().to_owned());
            }
            Event::Empty(tag) => note(&path, &tag, &mut used)?,
            Event::End(_) => {
                path.pop();
            }
            Event::Eof => return Ok(used),
            _ => {}
        }
    }
}

fn note(path: &[String], tag: &BytesStart<'_>, used: &mut Used) -> Result<(), XmlError> {
    used.marks += usize::from(path == ["domain", "devices"] && tag.name().as_ref() == pieces::MARK);
    note_address(path, tag, used)?;
    note_user(path, tag, &mut used.io_threads)
}

fn note_address(path: &[String], tag: &BytesStart<'_>, used: &mut Used) -> Result<(), XmlError> {
    let [domain, devices, device] = path else { return Ok(()) };
    if tag.name().as_ref() != "address" || domain != "domain" || devices != "devices" {
        return Ok(());
    }
    let mut raw = RawAddress::default();
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|e| XmlError::Malformed(Box::new(e)))?;
        let value = Some(attribute.value.clone().into_owned());
        match attribute.key.as_ref() {
            "type" => raw.kind = value,
            "controller" => raw.controller = value,
            "domain" => raw.domain = value,
            "bus" => raw.bus = value,
            "target" => raw.target = value,
            "unit" => raw.unit = value,
            "slot" => raw.slot = value,
            "function" => raw.function = value,
            _ => {}
        }
    }
    match raw.kind.as_deref() {
        Some("pci") => {
            used.pci.insert(raw.pci(device)?);
        }
        Some("drive") if device != "disk" => {
            used.drive.insert(raw.drive(device)?);
        }
        _ => {}
    }
    Ok(())
}
