//! Paths on the host that a request may name.

use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Malformed;

/// An absolute path on the host: 2 to 1024 printable ASCII characters, without `.`, `..`, empty components or a
/// slash at its end, so that it is written in one way only.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPath(String);
text_type!(HostPath);

impl HostPath {
    /// As a path.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// Of `roots` the widest that it lies beneath, and the rest of it from there.
    pub fn beneath<'a, 'r>(
        &'a self,
        roots: impl IntoIterator<Item = &'r Path>,
    ) -> Option<(&'r Path, &'a Path)> {
        let below = |root: &'r Path| Some((root, self.as_path().strip_prefix(root).ok()?));
        let found = roots.into_iter().filter_map(below);
        // The root itself is not beneath it.
        let found = found.filter(|(_, rest)| !rest.as_os_str().is_empty());
        found.min_by_key(|(root, _)| root.components().count())
    }
}

impl FromStr for HostPath {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "an absolute path of at most 1024 printable ASCII characters, without '.', '..' or empty components";
        let plain = |part: &str| !["", ".", ".."].contains(&part);
        let ok = s.len() <= 1024
            && s.bytes().all(|c| (0x20..0x7f).contains(&c))
            && s.strip_prefix('/').is_some_and(|rest| rest.split('/').all(plain));
        if ok { Ok(Self(s.into())) } else { Err(Malformed::new("host path", s, RULE)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_path_is_absolute_and_written_in_one_way() {
        for good in ["/dev/sda", "/dev/disk/by-id/wwn-0x6001405", "/a b+c?d", "/x..y"] {
            assert_eq!(good.parse::<HostPath>().unwrap().as_str(), good);
        }
        let long = format!("/{}", "x".repeat(1024));
        for bad in [
            "",
            "/",
            "dev/sda",
            "/dev/",
            "//dev",
            "/dev//sda",
            "/./a",
            "/dev/../etc",
            "/a\n",
            &long,
        ] {
            assert_eq!(bad.parse::<HostPath>().unwrap_err().what, "host path", "{bad:?}");
        }
    }

    #[test]
    fn the_widest_root_counts_and_none_is_beneath_itself() {
        let path: HostPath = "/dev/mapper/vg-lv".parse().unwrap();
        let roots = |all: &[&'static str]| {
            path.beneath(all.iter().map(|r| Path::new(*r))).map(|(root, rest)| {
                (root.to_str().unwrap().to_owned(), rest.to_str().unwrap().to_owned())
            })
        };
        let own = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(roots(&["/dev/mapper", "/dev"]), own("/dev", "mapper/vg-lv"));
        assert_eq!(roots(&["/dev/mapper/"]), own("/dev/mapper/", "vg-lv"));
        assert_eq!(roots(&["/"]), own("/", "dev/mapper/vg-lv"));
        for not in [&["/dev/map"][..], &["/dev/mapper/vg-lv"], &[]] {
            assert_eq!(roots(not), None);
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_and_what_is_read_stays_beneath(text in ".{0,80}") {
            if let Ok(path) = format!("/{text}").parse::<HostPath>() {
                prop_assert!(path.as_path().components().all(|c| c.as_os_str() != ".."));
            }
        }
    }
}
