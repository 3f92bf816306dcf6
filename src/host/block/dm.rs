//! device-mapper's own word on a device (include/uapi/linux/dm-ioctl.h).

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::types::DevNum;

const CONTROL: &str = "/dev/mapper/control";
/// The interface that everything of 4.x serves.
const VERSION: [u32; 3] = [4, 0, 0];
const UUID_LEN: usize = 129;

/// `struct dm_ioctl`.
#[repr(C)]
pub(in crate::host::block) struct Request {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; UUID_LEN],
    data: [u8; 7],
}

const _: () = assert!(size_of::<Request>() == 312, "the request's number has its size");

mod ioctls {
    #![allow(missing_docs)]
    // DM_DEV_STATUS, DM_TABLE_STATUS.
    nix::ioctl_readwrite!(dm_dev_status, 0xfd, 7, super::Request);
    nix::ioctl_readwrite!(dm_table_status, 0xfd, 12, super::Request);
}

/// `DM_NOFLUSH_FLAG`: nothing is written out for it.
const NOFLUSH: u32 = 1 << 11;
/// `DM_BUFFER_FULL_FLAG`: not all of the answer is there.
const BUFFER_FULL: u32 = 1 << 8;

/// A request with room for the answer: the status of some hundred paths.
#[repr(C)]
struct Answered {
    request: Request,
    room: [u8; 16 << 10],
}

/// `struct dm_target_spec`, which the target's own text follows.
const SPEC: usize = 40;
/// Where its `target_type` is, NUL-padded.
const TYPE: std::ops::Range<usize> = 24..40;

/// The number of the mapped device of that uuid; `None` where there is none.
pub(super) fn number(uuid: &str) -> io::Result<Option<DevNum>> {
    let mut request = about(uuid)?;
    let control = control()?;
    // SAFETY: the descriptor is open for the time of the call, and the kernel reads and writes as much of the request
    // as its `data_size` says, which is all of it.
    match unsafe { ioctls::dm_dev_status(control.as_raw_fd(), &raw mut request) } {
        Ok(_) => Ok(Some(decoded(request.dev))),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Of each of these maps the paths that the kernel does not use until somebody reinstates them; none of one that is gone, is
/// not multipath's or cannot be asked about. An error where none can.
pub(super) fn failed_paths(maps: &[DevNum]) -> io::Result<Vec<BTreeSet<DevNum>>> {
    let control = control()?;
    let of_each = maps.iter().map(|map| {
        failed_paths_of(control, *map).unwrap_or_else(|error| {
            // It is no other map's trouble.
            tracing::debug!(%map, %error, "how its paths are is not known: /sys alone counts");
            BTreeSet::new()
        })
    });
    Ok(of_each.collect())
}

fn failed_paths_of(control: &File, map: DevNum) -> io::Result<BTreeSet<DevNum>> {
    let mut answered = Box::new(Answered { request: empty(), room: [0; 16 << 10] });
    answered.request.data_size = size_of::<Answered>() as u32;
    answered.request.flags = NOFLUSH;
    answered.request.dev = encoded(map);
    let at: *mut Answered = &raw mut *answered;
    // SAFETY: the descriptor is open for the time of the call, and the kernel reads and writes as much as `data_size` says,
    // which is all of what `at` points to.
    match unsafe { ioctls::dm_table_status(control.as_raw_fd(), at.cast()) } {
        Ok(_) => {}
        Err(Errno::ENXIO) => return Ok(BTreeSet::new()),
        Err(e) => return Err(e.into()),
    }
    let odd = |what: String| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("device-mapper's status of {map}: {what}"),
        )
    };
    if answered.request.flags & BUFFER_FULL != 0 {
        return Err(odd("longer than 16 KiB".into()));
    }
    // A map that is being made has no table yet.
    if answered.request.target_count == 0 {
        return Ok(BTreeSet::new());
    }
    let begin = (answered.request.data_start as usize).checked_sub(size_of::<Request>());
    let target = begin.and_then(|begin| answered.room.get(begin..));
    let target =
        target.filter(|target| target.len() > SPEC).ok_or_else(|| odd("cut off".into()))?;
    if text(&target[TYPE]) != "multipath" {
        return Ok(BTreeSet::new()); // As one that gives errors from now on.
    }
    let status = text(&target[SPEC..]);
    failed_in(&status).ok_or_else(|| odd(format!("{status:?}")))
}

/// What is before the NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The paths of a multipath target's status (drivers/md/dm-mpath.c, multipath_status) that are `F`; `None` where it is
/// another's:
///
/// ```text
/// features* handler* groups next  { state selector*  paths arguments  { major:minor A|F failures argument... }... }...
/// ```
/// What has a `*` is a number, and so many words.
fn failed_in(status: &str) -> Option<BTreeSet<DevNum>> {
    let words = &mut status.split_ascii_whitespace();
    for _features_then_handler in 0..2 {
        let n = number_of(words)?;
        skip(words, n)?;
    }
    let groups = number_of(words)?;
    skip(words, 1)?;
    let mut failed = BTreeSet::new();
    for _ in 0..groups {
        skip(words, 1)?;
        let selector = number_of(words)?;
        skip(words, selector)?;
        let (paths, arguments) = (number_of(words)?, number_of(words)?);
        for _ in 0..paths {
            let dev: DevNum = words.next()?.parse().ok()?;
            match words.next()? {
                "A" => {}
                "F" => drop(failed.insert(dev)),
                _ => return None,
            }
            skip(words, 1)?;
            skip(words, arguments)?;
        }
    }
    Some(failed)
}

fn number_of<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<usize> {
    words.next()?.parse().ok()
}

fn skip<'a>(words: &mut impl Iterator<Item = &'a str>, n: usize) -> Option<()> {
    (0..n).try_for_each(|_| words.next().map(drop))
}

/// Opened once: what is asked by it is of no device's, and it keeps none.
fn control() -> io::Result<&'static File> {
    static OPEN: OnceLock<File> = OnceLock::new();
    if let Some(control) = OPEN.get() {
        return Ok(control);
    }
    // It is not there before the module is loaded, so that it failed is not kept.
    let control = File::options().read(true).write(true).open(CONTROL)?;
    Ok(OPEN.get_or_init(|| control))
}

fn about(uuid: &str) -> io::Result<Request> {
    // Room for the NUL at its end.
    if uuid.is_empty() || uuid.len() >= UUID_LEN || uuid.contains('\0') {
        let text =
            format!("{uuid:?} is no mapped device's uuid: it has 1 to 128 bytes, without NUL");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut request = empty();
    request.uuid[..uuid.len()].copy_from_slice(uuid.as_bytes());
    Ok(request)
}

/// A request about no device.
fn empty() -> Request {
    let size = size_of::<Request>() as u32;
    Request {
        version: VERSION,
        data_size: size,
        data_start: size,
        target_count: 0,
        open_count: 0,
        flags: 0,
        event_nr: 0,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; UUID_LEN],
        data: [0; 7],
    }
}

/// The kernel's `huge_encode_dev` (include/linux/kdev_t.h).
fn decoded(dev: u64) -> DevNum {
    let part = |bits: u64| u32::try_from(bits).unwrap_or(u32::MAX);
    DevNum {
        major: part((dev & 0xf_ff00) >> 8),
        minor: part((dev & 0xff) | ((dev >> 12) & 0xf_ff00)),
    }
}

fn encoded(dev: DevNum) -> u64 {
    let (major, minor) = (u64::from(dev.major), u64::from(dev.minor));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_read_and_written_as_the_kernel_does() {
        let known = [
            (253, 7, 0xfd07),
            (8, 0, 0x800),
            (259, 1_048_575, 0xfff1_03ff),
            (4095, 256, 0x1f_ff00),
        ];
        for (major, minor, number) in known {
            let dev = DevNum { major, minor };
            assert_eq!((decoded(number), encoded(dev)), (dev, number));
        }
    }

    fn failed(status: &str) -> Option<Vec<String>> {
        Some(failed_in(status)?.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_a_multipath_target_says_of_its_paths() {
        // One group by service-time, as multipath makes it of two ports of one priority.
        let both = "2 0 0 0 1 1 A 0 2 2 8:0 A 0 0 1 8:16 A 0 0 1 ";
        assert_eq!(failed(both).unwrap(), [""; 0]);
        // Two groups, queueing, with round-robin; the second was failed.
        let one = "2 1 3 0 2 1 E 0 1 1 8:32 F 4 1000 A 0 1 1 65:160 A 0 1000";
        assert_eq!(failed(one).unwrap(), ["8:32"]);
        // No group is left.
        assert_eq!(failed("2 0 0 0 0 0").unwrap(), [""; 0]);
        for odd in ["", "0 4096 linear", "2 0 0 0 1 1 A 0 1 1 8:0", "2 0 0 0 1 1 A 0 1 1 8:0 X 0 0"]
        {
            assert_eq!(failed(odd), None, "{odd}");
        }
    }

    #[test]
    fn a_uuid_has_its_end_within_the_request() {
        let request = about(&"x".repeat(128)).unwrap();
        assert_eq!((request.uuid[127], request.uuid[128]), (b'x', 0));
        for bad in ["", "a\0b", &"x".repeat(129)] {
            assert_eq!(about(bad).err().unwrap().kind(), io::ErrorKind::InvalidInput, "{bad}");
        }
    }
}
