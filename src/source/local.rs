//! What is on the host already, as people write it: `block:///dev/NAME`, `file:///PATH` for a raw file and
//! `file+qcow2:///PATH` for an image. A path is taken as it is: nothing in it is escaped.

use crate::spec::{BlockSource, FileSource};
use crate::types::{FileFormat, HostPath, Malformed};

const BLOCK: &str = "block:///PATH, e.g. block:///dev/vg/data: the absolute path of a block device on the node, without '.', '..' or empty components";
const FILE: &str = "file:///PATH of a raw file or file+qcow2:///PATH of an image, e.g. file:///srv/pvc/disk.img: an absolute path on the node, without '.', '..' or empty components";

/// Reads `block:///PATH`.
pub(super) fn read_block(url: &str) -> Result<BlockSource, Malformed> {
    Ok(BlockSource { path: path_of(url, BLOCK)? })
}

/// What the URL of a file says that is in it; `None` of other URLs.
pub(super) fn file_format(url: &str) -> Option<FileFormat> {
    match url.split_once("://")?.0.to_ascii_lowercase().as_str() {
        "file" => Some(FileFormat::Raw),
        "file+qcow2" => Some(FileFormat::Qcow2),
        _ => None,
    }
}

/// Reads the URL of a file.
pub(super) fn read_file(url: &str, format: FileFormat) -> Result<FileSource, Malformed> {
    Ok(FileSource { path: path_of(url, FILE)?, format })
}

pub(super) fn write_file(source: &FileSource) -> String {
    match source.format {
        FileFormat::Raw => format!("file://{}", source.path),
        FileFormat::Qcow2 => format!("file+qcow2://{}", source.path),
    }
}

fn path_of(url: &str, rule: &'static str) -> Result<HostPath, Malformed> {
    let path = url.split_once("://").map_or("", |(_, path)| path);
    path.parse().map_err(|_| Malformed::new("source", url, rule))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Source;
    use proptest::prelude::*;

    #[test]
    fn a_path_is_what_follows_as_it_is() {
        for url in ["block:///dev/vg/data", "block:///dev/disk/by-id/a+b?c&d=e"] {
            let source: Source = url.parse().unwrap();
            assert_eq!(source.to_string(), url);
            assert_eq!(source.key(), url);
            assert_eq!(source.host_path().unwrap().as_str(), &url[8..]);
        }
        let (one, two): (Source, Source) =
            ("block:///dev/a".parse().unwrap(), "BLOCK:///dev/a".parse().unwrap());
        assert_eq!(one.shared_with(&two).as_deref(), Some("block:///dev/a"));
        assert_eq!(one.shared_with(&"block:///dev/b".parse().unwrap()), None);
        for bad in ["block://", "block:///", "block://dev/a", "block:///dev/../etc/shadow"] {
            let error = bad.parse::<Source>().unwrap_err();
            assert_eq!(error.what, "source", "{bad}");
            assert!(error.rule.starts_with("block:///PATH"), "{bad}");
        }
    }

    #[test]
    fn a_files_format_is_said_by_its_scheme() {
        for (url, format) in [
            ("file:///srv/pvc/disk.img", FileFormat::Raw),
            ("file:///srv/a?format=qcow2", FileFormat::Raw),
            ("file+qcow2:///srv/pvc/disk.qcow2", FileFormat::Qcow2),
        ] {
            let source: Source = url.parse().unwrap();
            assert_eq!(source.to_string(), url);
            assert_eq!(source.as_file().unwrap().format, format);
        }
        let (raw, qcow2): (Source, Source) =
            ("FILE:///srv/a".parse().unwrap(), "file+qcow2:///srv/a".parse().unwrap());
        assert_eq!(raw.shared_with(&qcow2).as_deref(), Some("file:///srv/a"));
        for bad in ["file://", "file:///", "file://srv/a", "file:///srv/../etc/shadow"] {
            let error = bad.parse::<Source>().unwrap_err();
            assert!(error.rule.starts_with("file:///PATH"), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_source_written_reads_back_the_same(path in "(/[a-zA-Z0-9 _:@+,?=&-]{1,20}){1,6}") {
            let source: Source = format!("block://{path}").parse().unwrap();
            prop_assert_eq!(source.to_string().parse::<Source>().unwrap(), source);
        }
    }
}
