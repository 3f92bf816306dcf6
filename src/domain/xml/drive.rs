//! The XML of a drive that the domain has, with another medium.
//!
//! libvirt takes the whole of a disk when one is updated: what is left out is changed or, in some versions,
//! refused (`qemuDomainDiskChangeSupported`; boot order, cache, alias and so on). So the drive's own
//! element is taken as it is written, and nothing but its medium exchanged.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::XmlError;

/// What of a disk's XML belongs to the medium.
const OF_MEDIUM: [&str; 4] = ["source", "backingStore", "mirror", "encryption"];

/// A part of the text, and what it is.
struct Part<'a> {
    text: &'a str,
    tag: Option<Tag<'a>>,
}

/// A tag by its name and attributes, escaped as they are written.
struct Tag<'a> {
    name: String,
    attributes: Vec<(String, String)>,
    kind: Kind,
    text: &'a str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Start,
    End,
    Empty,
}

impl Tag<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.attributes.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }
}

/// What a drive is to have.
#[derive(Debug, Clone, Default)]
pub struct DriveSource {
    /// Its elements as written XML; empty for none.
    pub xml: String,
    /// It is a file, and no block device.
    pub file: bool,
}

/// The element of the disk with that target name, its medium exchanged for `source`. `None` where the domain has no
/// such disk.
pub fn with_medium(
    domain: &str,
    target: &str,
    source: &DriveSource,
) -> Result<Option<String>, XmlError> {
    let parts = parts(domain)?;
    let mut path: Vec<&str> = Vec::new();
    let mut from = None;
    let mut found = false;
    for (at, part) in parts.iter().enumerate() {
        let Some(tag) = &part.tag else { continue };
        if tag.kind == Kind::End {
            path.pop();
            if path == ["domain", "devices"] && tag.name == "disk" && found {
                let disk = &parts[from.unwrap_or(at)..=at];
                return Ok(Some(exchanged(disk, source)));
            }
            continue;
        }
        match path.as_slice() {
            ["domain", "devices"] if tag.name == "disk" => (from, found) = (Some(at), false),
            ["domain", "devices", "disk"] if tag.name == "target" => {
                found = tag.get("dev") == Some(target);
            }
            _ => {}
        }
        if tag.kind == Kind::Start {
            path.push(&tag.name);
        }
    }
    Ok(None)
}

/// Cuts the text at its tags.
fn parts(text: &str) -> Result<Vec<Part<'_>>, XmlError> {
    let mut reader = Reader::from_str(text);
    let (mut parts, mut from) = (Vec::new(), 0);
    loop {
        let event = reader.read_event().map_err(|e| XmlError::Malformed(Box::new(e)))?;
        let to = usize::try_from(reader.buffer_position()).unwrap_or(text.len()).min(text.len());
        let part = &text[from..to];
        let tag = match &event {
            Event::Start(tag) => Some(read(tag, Kind::Start, part)?),
            Event::Empty(tag) => Some(read(tag, Kind::Empty, part)?),
            Event::End(tag) => Some(Tag {
                name: tag.name().as_ref().to_owned(),
                attributes: Vec::new(),
                kind: Kind::End,
                text: part,
            }),
            Event::Eof => return Ok(parts),
            _ => None,
        };
        parts.push(Part { text: part, tag });
        from = to;
    }
}

fn read<'a>(tag: &BytesStart<'_>, kind: Kind, text: &'a str) -> Result<Tag<'a>, XmlError> {
    let mut attributes = Vec::new();
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|e| XmlError::Malformed(Box::new(e)))?;
        attributes.push((attribute.key.as_ref().to_owned(), attribute.value.clone().into_owned()));
    }
    Ok(Tag { name: tag.name().as_ref().to_owned(), attributes, kind, text })
}

/// A disk's parts written anew.
fn exchanged(disk: &[Part<'_>], source: &DriveSource) -> String {
    let mut text = String::new();
    let (mut depth, mut skipping) = (0_usize, false);
    let (mut driver, mut readonly) = (false, false);
    for part in disk {
        let Some(tag) = &part.tag else {
            if !skipping {
                text += part.text;
            }
            continue;
        };
        if tag.kind == Kind::End {
            depth -= 1;
        }
        let of_medium = depth == 1 && OF_MEDIUM.contains(&tag.name.as_str());
        match tag.kind {
            Kind::Start if depth == 0 => {
                let kind = if source.file { "file" } else { "block" };
                text += &element(tag, &[("type", kind)]);
            }
            Kind::Start if of_medium => skipping = true,
            Kind::End if of_medium => skipping = false,
            Kind::Empty if of_medium => {}
            _ if skipping => {}
            Kind::Start | Kind::Empty if depth == 1 && tag.name == "driver" => {
                driver = true;
                // Never probed, whatever was in the drive before.
                text += &element(tag, &[("name", "qemu"), ("type", "raw")]);
            }
            Kind::End if depth == 0 => {
                text += if driver { "" } else { "<driver name='qemu' type='raw'/>" };
                text += &source.xml;
                text += if readonly { "" } else { "<readonly/>" };
                text += tag.text;
            }
            _ => {
                readonly |= depth == 1 && tag.name == "readonly";
                text += tag.text;
            }
        }
        if tag.kind == Kind::Start {
            depth += 1;
        }
    }
    text
}

/// A tag with some of its attributes set.
fn element(tag: &Tag<'_>, set: &[(&str, &str)]) -> String {
    let kept = tag.attributes.iter().filter(|(key, _)| set.iter().all(|(k, _)| k != key));
    let kept = kept.map(|(key, value)| (key.as_str(), value.as_str()));
    let all = set.iter().copied().chain(kept);
    // An attribute may be written with either quote; what is within is escaped for one of them.
    let written = all.map(|(key, value)| {
        let quote = if value.contains('\'') { '"' } else { '\'' };
        format!(" {key}={quote}{value}{quote}")
    });
    let end = if tag.kind == Kind::Empty { "/>" } else { ">" };
    format!("<{}{}{end}", tag.name, written.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: &str = "<domain><name>x</name><devices>
    <disk type='file' device='disk'><source file='/a'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='cdrom' index=\"it's\">
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/old.iso' startupPolicy='optional'><seclabel model='dac'/></source>
      <backingStore/>
      <target dev='sda' bus='sata' tray='open'/>
      <readonly/>
      <boot order='1'/>
      <alias name='ua-cd'/>
      <address type='drive' controller='0' bus='0' target='0' unit='0'/>
    </disk>
    <disk type='block' device='cdrom'><target dev='sdb' bus='sata'/></disk>
  </devices></domain>";

    fn drive(target: &str, source: &str) -> String {
        let source = DriveSource { xml: source.into(), file: source.contains("file=") };
        let text = with_medium(DOMAIN, target, &source).unwrap().unwrap();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_drive_keeps_all_but_its_medium() {
        assert_eq!(
            drive("sda", "<source dev='/new'/>"),
            "<disk type='block' device='cdrom' index=\"it's\"> \
             <driver name='qemu' type='raw' cache='none'/> \
             <target dev='sda' bus='sata' tray='open'/> <readonly/> <boot order='1'/> \
             <alias name='ua-cd'/> \
             <address type='drive' controller='0' bus='0' target='0' unit='0'/> \
             <source dev='/new'/></disk>"
        );
        let empty = drive("sda", "");
        assert!(!empty.contains("source") && !empty.contains("seclabel"), "{empty}");
    }

    #[test]
    fn what_a_drive_lacks_is_added_and_another_disk_is_none() {
        assert_eq!(
            drive("sdb", "<source file='/new'/>"),
            "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/>\
             <driver name='qemu' type='raw'/><source file='/new'/><readonly/></disk>"
        );
        assert_eq!(with_medium(DOMAIN, "sdz", &DriveSource::default()).unwrap(), None);
        assert!(
            with_medium("<domain><devices>", "sda", &DriveSource::default())
                .is_ok_and(|found| found.is_none())
        );
        assert!(with_medium("<domain <<", "sda", &DriveSource::default()).is_err());
    }
}
