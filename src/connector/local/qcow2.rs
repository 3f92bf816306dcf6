//! What of a qcow2 image's header matters before QEMU is let open it (docs/interop/qcow2.txt of QEMU).
//!
//! The guest writes to what is in an image, never to its header; but whoever has made the image may have had it refer to
//! other files of the host's, which QEMU would then open.

#[cfg(test)]
const HEADER: usize = crate::host::local::FILE_HEAD;
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bit 2 of the incompatible features: the data is in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// An image's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The size of the disk in it, in bytes.
    pub(super) size: u64,
}

/// Why an image is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// It does not begin as one does.
    #[error("it is no qcow2 image")]
    NotOne,
    /// Of a version that is not known here.
    #[error("it is a qcow2 image of version {0}, not 2 or 3")]
    Version(u32),
    /// It is a layer over another image.
    #[error("it has a backing file: make it whole (qemu-img convert)")]
    Backing,
    /// Its data is elsewhere.
    #[error("its data is in another file: make it whole (qemu-img convert)")]
    ExternalData,
}

/// Reads the first bytes of an image: 104 where it has that many.
pub(super) fn read(bytes: &[u8]) -> Result<Header, HeaderError> {
    let u32_at = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    if bytes.get(..4) != Some(&MAGIC) {
        return Err(HeaderError::NotOne);
    }
    let (Some(version), Some(backing), Some(size)) = (u32_at(4), u64_at(8), u64_at(24)) else {
        return Err(HeaderError::NotOne);
    };
    let features = match version {
        2 => 0,
        3 => u64_at(72).ok_or(HeaderError::NotOne)?,
        other => return Err(HeaderError::Version(other)),
    };
    if backing != 0 {
        return Err(HeaderError::Backing);
    }
    if features & EXTERNAL_DATA != 0 {
        return Err(HeaderError::ExternalData);
    }
    Ok(Header { size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(version: u32, backing: u64, features: u64, size: u64) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[8..16].copy_from_slice(&backing.to_be_bytes());
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes
    }

    #[test]
    fn an_image_that_refers_to_other_files_is_refused() {
        assert_eq!(read(&header(3, 0, 0, 1 << 30)), Ok(Header { size: 1 << 30 }));
        assert_eq!(read(&header(3, 0, 1, 1 << 30)), Ok(Header { size: 1 << 30 }), "dirty");
        // Version 2 has no features: what is there is something else.
        assert_eq!(read(&header(2, 0, u64::MAX, 7)), Ok(Header { size: 7 }));
        assert_eq!(read(&header(2, 0, 0, 7)[..72]), Ok(Header { size: 7 }));
        assert_eq!(read(&header(3, 0, 0, 7)[..72]), Err(HeaderError::NotOne));
        assert_eq!(read(&header(3, 0x200, 0, 7)), Err(HeaderError::Backing));
        assert_eq!(read(&header(2, 0x200, 0, 7)), Err(HeaderError::Backing));
        assert_eq!(read(&header(3, 0, EXTERNAL_DATA, 7)), Err(HeaderError::ExternalData));
        assert_eq!(read(&header(4, 0, 0, 7)), Err(HeaderError::Version(4)));
        assert_eq!(read(b""), Err(HeaderError::NotOne));
        assert_eq!(read(b"QFI\xfb"), Err(HeaderError::NotOne));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = read(&bytes);
            let _ = read(&[&MAGIC[..], &bytes].concat());
        }
    }
}
