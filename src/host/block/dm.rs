//! device-mapper's own word on a device (include/uapi/linux/dm-ioctl.h).

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

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
    // DM_DEV_STATUS.
    nix::ioctl_readwrite!(dm_dev_status, 0xfd, 7, super::Request);
}

/// The number of the mapped device of that uuid; `None` where there is none.
pub(super) fn number(uuid: &str) -> io::Result<Option<DevNum>> {
    let mut request = about(uuid)?;
    let control = File::options().read(true).write(true).open(CONTROL)?;
    // SAFETY: the descriptor is open for the time of the call, and the kernel reads and writes as much of the request
    // as its `data_size` says, which is all of it.
    match unsafe { ioctls::dm_dev_status(control.as_raw_fd(), &raw mut request) } {
        Ok(_) => Ok(Some(decoded(request.dev))),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn about(uuid: &str) -> io::Result<Request> {
    // Room for the NUL at its end.
    if uuid.is_empty() || uuid.len() >= UUID_LEN || uuid.contains('\0') {
        let text =
            format!("{uuid:?} is no mapped device's uuid: it has 1 to 128 bytes, without NUL");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let size = size_of::<Request>() as u32;
    let mut request = Request {
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
    };
    request.uuid[..uuid.len()].copy_from_slice(uuid.as_bytes());
    Ok(request)
}

/// The kernel's `huge_encode_dev` (include/linux/kdev_t.h).
fn decoded(dev: u64) -> DevNum {
    let part = |bits: u64| u32::try_from(bits).unwrap_or(u32::MAX);
    DevNum {
        major: part((dev & 0xf_ff00) >> 8),
        minor: part((dev & 0xff) | ((dev >> 12) & 0xf_ff00)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_read_as_the_kernel_writes_it() {
        for (major, minor) in [(253, 7), (8, 0), (259, 1_048_575), (4095, 256)] {
            let encoded = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
            let expect = DevNum { major: major as u32, minor: minor as u32 };
            assert_eq!(decoded(encoded), expect);
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
