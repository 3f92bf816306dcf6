//! Which I/O threads a domain has, and what uses them.

use std::collections::{BTreeMap, BTreeSet};

use quick_xml::events::BytesStart;

use super::XmlError;
use super::raw::{RawIoThreads, number};

/// A domain's I/O threads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoThreads {
    /// Their ids.
    pub ids: BTreeSet<u32>,
    /// How many devices name each, disks and controllers, there or not.
    pub users: BTreeMap<u32, usize>,
}

/// The ids that `<iothreads>` and `<iothreadids>` stand for: those that are not listed are the lowest
/// that are free, from 1 (`virDomainIOThreadIDDefArrayInit`).
pub(super) fn declared(
    count: Option<&str>,
    listed: Option<&RawIoThreads>,
) -> Result<BTreeSet<u32>, XmlError> {
    let bad = |element: &str| XmlError::Unsupported {
        element: format!("<{element}>"),
        why: "its numbers cannot be read",
    };
    let count = number(count.map(str::trim)).ok_or_else(|| bad("iothreads"))?;
    let mut ids = BTreeSet::new();
    for thread in listed.iter().flat_map(|l| &l.iothread) {
        ids.insert(number(Some(&thread.id)).ok_or_else(|| bad("iothreadids"))?);
    }
    let missing = (count as usize).saturating_sub(ids.len());
    let free: Vec<u32> = (1..).filter(|id| !ids.contains(id)).take(missing).collect();
    ids.extend(free);
    Ok(ids)
}

/// Notes what of a device names an I/O thread: `driver/@iothread`, and `driver/iothreads/iothread/@id` of
/// one whose queues are spread over several.
pub(super) fn note_user(
    path: &[String],
    tag: &BytesStart<'_>,
    users: &mut BTreeMap<u32, usize>,
) -> Result<(), XmlError> {
    let name = tag.name();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let attribute = match (path.as_slice(), name.as_ref()) {
        (["domain", "devices", _], "driver") => "iothread",
        (["domain", "devices", _, "driver", "iothreads"], "iothread") => "id",
        _ => return Ok(()),
    };
    for found in tag.attributes() {
        let found = found.map_err(|e| XmlError::Malformed(Box::new(e)))?;
        if found.key.as_ref() != attribute {
            continue;
        }
        let id = number(Some(&found.value)).ok_or_else(|| XmlError::Unsupported {
            element: format!("<driver {attribute}='{}'>", found.value),
            why: "it is not a number",
        })?;
        *users.entry(id).or_default() += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::domain::xml::parse;

    #[test]
    fn threads_are_counted_and_listed_and_their_users_known() {
        let read = |threads: &str, devices: &str| {
            let text = format!(
                "<domain><name>x</name>{threads}<os><type machine='q35'>hvm</type></os><devices>{devices}</devices></domain>"
            );
            parse(&text).map(|d| d.io_threads)
        };
        for (threads, ids) in [
            ("", &[][..]),
            ("<iothreads>2</iothreads>", &[1, 2]),
            ("<iothreads>3</iothreads><iothreadids><iothread id='2'/></iothreadids>", &[1, 2, 3]),
            (
                "<iothreads>2</iothreads><iothreadids><iothread id='1000000007' thread_pool_min='1'><poll max='9'/></iothread><iothread id='4'/></iothreadids>",
                &[4, 1_000_000_007],
            ),
        ] {
            let found: Vec<u32> = read(threads, "").unwrap().ids.into_iter().collect();
            assert_eq!(found, ids, "{threads}");
        }
        let devices = "<controller type='scsi' index='0'><driver iothread='4'/></controller>\
             <disk device='disk'><driver name='qemu' iothread='4'/><target dev='vda' bus='virtio'/></disk>\
             <disk device='disk'><driver><iothreads><iothread id='5'><queue id='0'/></iothread></iothreads></driver>\
             <target dev='vdb' bus='virtio'/></disk>";
        let users = read("<iothreads>5</iothreads>", devices).unwrap().users;
        assert_eq!(users.into_iter().collect::<Vec<_>>(), [(4, 2), (5, 1)]);
        assert!(read("<iothreads>many</iothreads>", "").is_err());
    }
}
