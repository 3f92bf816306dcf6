//! What is on the host already, as people write it: `block:///dev/NAME`. A path is taken as it is: nothing in it
//! is escaped.

use crate::spec::BlockSource;
use crate::types::{HostPath, Malformed};

const BLOCK: &str = "block:///PATH, e.g. block:///dev/vg/data: the absolute path of a block device on the node, without '.', '..' or empty components";

/// Reads `block:///PATH`.
pub(super) fn read_block(url: &str) -> Result<BlockSource, Malformed> {
    Ok(BlockSource { path: path_of(url, BLOCK)? })
}

fn path_of(url: &str, rule: &'static str) -> Result<HostPath, Malformed> {
    let path = url.split_once("://").map_or("", |(_, path)| path);
    path.parse().map_err(|_| Malformed::new("source", url, rule))
}

#[cfg(test)]
mod tests {
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

    proptest! {
        #[test]
        fn a_source_written_reads_back_the_same(path in "(/[a-zA-Z0-9 _:@+,?=&-]{1,20}){1,6}") {
            let source: Source = format!("block://{path}").parse().unwrap();
            prop_assert_eq!(source.to_string().parse::<Source>().unwrap(), source);
        }
    }
}
