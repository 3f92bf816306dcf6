//! A domain's XML is read at each step, and from one step to the next little of it changes: what is as it was is not
//! read again. A VM may have hundreds of disks.
//!
//! The text is cut where libvirt begins and ends a disk: on lines of their own, four spaces in. What is between is
//! the domain's rest, with a mark where disks were. Both are known by their whole text. A text that cannot be
//! cut so, or whose pieces say that something is not as it looks, is read as a whole.

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use hashlink::LruCache;
use memchr::memmem::Finder;

use super::addresses::{Used, addresses};
use super::raw::{RawDevices, RawDisk};
use super::{Disk, Domain, XmlError, read};

/// What stands in the rest where disks were.
pub(super) const MARK: &str = "lunplug-disks";

const BEGIN: &str = "\n    <disk ";
const END: &str = "\n    </disk>\n";

/// How many disks are remembered on the whole node: those of the VMs that are worked on.
const DISKS: usize = 4096;
/// And rests of domains.
const RESTS: usize = 64;
/// And whole texts: a step reads again what the one before has read.
const WHOLE: usize = 8;

/// Reads a domain's XML, what is known of it from memory.
pub fn recall(xml: String) -> Result<Arc<Domain>, XmlError> {
    static MEMORY: LazyLock<Memory> = LazyLock::new(Memory::default);
    MEMORY.read(xml)
}

/// What was read before. All of it is what its text says, so it never is out of date. Nothing is read while one of
/// them is locked.
struct Memory {
    whole: Mutex<VecDeque<(String, Arc<Domain>)>>,
    rests: Mutex<LruCache<String, Arc<Domain>>>,
    disks: Mutex<LruCache<Box<str>, Arc<Piece>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Held for single changes only.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            whole: Mutex::default(),
            rests: Mutex::new(LruCache::new(RESTS)),
            disks: Mutex::new(LruCache::new(DISKS)),
        }
    }
}

/// A disk, and what it takes.
struct Piece {
    disk: Arc<Disk>,
    used: Used,
}

impl Piece {
    /// `None` where it is not one disk, and that alone.
    fn read(text: &str) -> Option<Self> {
        let raw: RawDevices =
            quick_xml::de::from_str(&format!("<devices>{text}</devices>")).ok()?;
        let used = addresses(text, &["domain", "devices"]).ok()?;
        let more = !raw.controller.is_empty() || !raw.channel.is_empty();
        let [disk] = <[RawDisk; 1]>::try_from(raw.disk).ok().filter(|_| !more)?;
        Some(Self { disk: Arc::new(disk.check().ok()?), used })
    }
}

impl Memory {
    fn read(&self, xml: String) -> Result<Arc<Domain>, XmlError> {
        if let Some(domain) = self.known(&xml) {
            return Ok(domain);
        }
        let domain = match self.join(&cut(&xml)) {
            Some(domain) => domain,
            // It tells what is wrong with it.
            None => read(&xml)?.0,
        };
        let domain = Arc::new(domain);
        let mut whole = lock(&self.whole);
        whole.truncate(WHOLE - 1);
        whole.push_front((xml, domain.clone()));
        Ok(domain)
    }

    fn known(&self, xml: &str) -> Option<Arc<Domain>> {
        let mut whole = lock(&self.whole);
        let at = whole.iter().position(|(text, _)| text == xml)?;
        let known = whole.remove(at)?;
        let domain = known.1.clone();
        whole.push_front(known);
        Some(domain)
    }

    fn join(&self, cut: &Cut<'_>) -> Option<Domain> {
        let mut domain = Domain::clone(&*self.rest(cut)?);
        domain.disks.reserve_exact(cut.disks.len());
        let mut drives = Vec::with_capacity(cut.disks.len());
        for text in &cut.disks {
            let piece = self.piece(text)?;
            domain.pci_used.extend(&piece.used.pci);
            for (thread, users) in &piece.used.io_threads {
                *domain.io_threads.users.entry(*thread).or_default() += users;
            }
            drives.extend(piece.disk.scsi_address().ok()?);
            domain.disks.push(piece.disk.clone());
        }
        // One after the other they would be looked up in a tree each.
        domain.scsi_used.append(&mut drives.into_iter().collect());
        Some(domain)
    }

    /// The domain without its disks, if all of these were where a disk may be.
    fn rest(&self, cut: &Cut<'_>) -> Option<Arc<Domain>> {
        if let Some(rest) = lock(&self.rests).get(&cut.rest).cloned() {
            return Some(rest);
        }
        let (rest, marks) = read(&cut.rest).ok()?;
        if marks != cut.marks || !rest.disks.is_empty() {
            return None;
        }
        let rest = Arc::new(rest);
        lock(&self.rests).insert(cut.rest.clone(), rest.clone());
        Some(rest)
    }

    fn piece(&self, text: &str) -> Option<Arc<Piece>> {
        if let Some(piece) = lock(&self.disks).get(text).cloned() {
            return Some(piece);
        }
        let piece = Arc::new(Piece::read(text)?);
        lock(&self.disks).insert(text.into(), piece.clone());
        Some(piece)
    }
}

/// A text in pieces.
struct Cut<'a> {
    rest: String,
    marks: usize,
    disks: Vec<&'a str>,
}

fn cut(xml: &str) -> Cut<'_> {
    let mut cut = Cut { rest: String::new(), marks: 0, disks: Vec::new() };
    let mut left = xml;
    let (begin, end) = (Finder::new(BEGIN), Finder::new(END));
    loop {
        let disk = begin.find(left.as_bytes()).and_then(|from| {
            let long = end.find(&left.as_bytes()[from..])?;
            // Without the last line's end: the next disk may begin with it.
            Some((from, from + long + END.len() - 1))
        });
        let Some((from, to)) = disk else { break };
        // A row of disks is one mark, so that one more leaves the rest as it is.
        if from > 0 || cut.marks == 0 {
            cut.rest.push_str(&left[..from]);
            cut.rest.push_str("\n<");
            cut.rest.push_str(MARK);
            cut.rest.push_str("/>");
            cut.marks += 1;
        }
        cut.disks.push(&left[from..to]);
        left = &left[to..];
    }
    cut.rest.push_str(left);
    cut
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parse;
    use super::*;

    fn disk(name: &str, unit: u32) -> String {
        format!(
            "    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' iothread='{}'/>
      <source dev='/d/{name}'/>
      <target dev='{name}' bus='scsi'/>
      <serial>{name}</serial>
      <alias name='ua-{name}'/>
      <address type='drive' controller='0' bus='0' target='{unit}' unit='0'/>
    </disk>
",
            1 + unit % 2
        )
    }

    fn domain(before: &str, devices: &str) -> String {
        format!(
            "<domain type='kvm'>
  <name>x</name>
{before}  <iothreads>2</iothreads>
  <os>
    <type machine='q35'>hvm</type>
  </os>
  <devices>
{devices}    <controller type='scsi' index='0' model='virtio-scsi'/>
  </devices>
</domain>
"
        )
    }

    #[test]
    fn the_fixtures_are_read_the_same_in_pieces_and_again() {
        let memory = Memory::default();
        for xml in [
            include_str!("../fixtures/kubevirt-q35.xml"),
            include_str!("../fixtures/plain-i440fx.xml"),
        ] {
            assert!(!cut(xml).disks.is_empty());
            let whole = parse(xml).unwrap();
            assert_eq!(memory.join(&cut(xml)).unwrap(), whole);
            for _ in 0..2 {
                assert_eq!(*memory.read(xml.to_owned()).unwrap(), whole);
            }
        }
    }

    #[test]
    fn one_more_disk_is_all_that_is_read() {
        let memory = Memory::default();
        let mut devices = String::new();
        for unit in 0..8 {
            devices += &disk(&format!("sd{unit}"), unit);
            let found = memory.read(domain("", &devices)).unwrap();
            assert_eq!(found.disks.len(), unit as usize + 1);
            let known = (lock(&memory.rests).len(), lock(&memory.disks).len());
            assert_eq!(known, (1, unit as usize + 1));
        }
    }

    #[test]
    fn what_only_looks_like_a_disk_is_none() {
        let (real, other) = (disk("sda", 0), disk("sdz", 9));
        for xml in [
            domain(&format!("  <metadata>\n{other}  </metadata>\n"), &real),
            domain("", &format!("{real}    <!--\n{other}    -->\n")),
            domain("", &format!("    <x>\n{other}    </x>\n{real}")),
        ] {
            let found = Memory::default().read(xml.clone()).unwrap();
            let names: Vec<_> = found.disks.iter().map(|d| d.target.as_str()).collect();
            assert_eq!((names, &*found), (vec!["sda"], &parse(&xml).unwrap()), "{xml}");
        }
    }

    #[test]
    fn a_piece_that_is_more_than_one_disk_is_not_taken_for_one() {
        let first = disk("sda", 0).trim_end().replace("\n      ", "").replace("\n    ", "");
        for between in ["", "\n"] {
            let xml = domain("", &format!("{first}{between}{}", disk("sdb", 1)));
            let found = Memory::default().read(xml.clone()).unwrap();
            assert_eq!((found.disks.len(), &*found), (2, &parse(&xml).unwrap()), "{xml}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_piece_is_told_as_of_the_whole() {
        for bad in
            ["      <target dev='sdq' bus='scsi'/>\n", "      <target/>\n", "      <target\n"]
        {
            let devices = format!("    <disk device='disk'>\n{bad}    </disk>\n");
            let xml = domain("", &(disk("sda", 0) + &devices));
            let error = Memory::default().read(xml.clone()).unwrap_err().to_string();
            assert_eq!(error, parse(&xml).unwrap_err().to_string());
        }
    }

    proptest! {
        #[test]
        fn any_row_of_devices_is_read_as_in_one(kinds in prop::collection::vec(0..5u8, 0..12)) {
            let memory = Memory::default();
            for upto in 0..=kinds.len() {
                let devices: String = kinds[..upto].iter().enumerate().map(|(at, kind)| match kind {
                    0 | 1 => disk(&format!("sd{at}"), at as u32),
                    2 => disk(&format!("vd{at}"), 0).replace("scsi", "virtio").replace(
                        "type='drive' controller='0' bus='0' target='0' unit='0'",
                        &format!("type='pci' domain='0x0000' bus='0x{at:02x}' slot='0x00' function='0x0'"),
                    ),
                    3 => "    <rng model='virtio'>\n      <address type='pci' bus='0x09'/>\n    </rng>\n".into(),
                    _ => disk(&format!("se{at}"), at as u32).replace('\n', ""),
                }).collect();
                let xml = domain("", &devices);
                prop_assert_eq!(&*memory.read(xml.clone()).unwrap(), &parse(&xml).unwrap());
            }
        }
    }
}
