//! Files of a few hundred bytes, read by as few calls as it takes: of them there are many on the way to a volume and
//! back.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// At most so much is read by one call: what the kernel gives of an attribute in /sys, text or binary, by one read(2)
/// (fs/kernfs/file.c).
const PIECE: usize = 4096;

/// All of a file, whose end is where a read gives less than was asked for. That is so of regular files on a local file
/// system and of attributes in /sys, not of pipes and sockets.
pub(in crate::host) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_rest(&mut File::open(path)?)
}

/// The same of what is open, from where it is. What fits one read is not copied: it may be a secret.
pub(in crate::host) fn read_rest(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let before = bytes.len();
        bytes.resize(before + PIECE, 0);
        let n = loop {
            match file.read(&mut bytes[before..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                n => break n?,
            }
        };
        bytes.truncate(before + n);
        if n < PIECE {
            return Ok(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_its_size_all_of_a_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for size in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE] {
            let bytes: Vec<u8> = (0..size).map(|n| n as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read(&path).unwrap(), bytes, "{size}");
        }
        assert_eq!(read(&dir.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
