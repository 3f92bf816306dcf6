//! The kernel's table of mounts (proc_pid_mountinfo(5)), parsed.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its id, as statx(2) gives it too.
    pub id: u64,
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted, relative to the process's root.
    pub mount_point: PathBuf,
    /// Options of this mount, e.g. `nodev`.
    pub options: Vec<String>,
    /// `ext4`, `tmpfs`, `cgroup2`, ...
    pub fs_type: String,
    /// Options of the file system, e.g. cgroup v1's controllers.
    pub super_options: Vec<String>,
}

/// All mounts of a table, in its order; lines that are not understood are left out.
pub fn parse(table: &str) -> Vec<Mount> {
    table.lines().filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: any number of
/// optional fields stand before the dash.
fn parse_line(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let root = unescape(fields.nth(2)?);
    let mount_point = unescape(fields.next()?);
    let options = split(fields.next()?);
    let fs_type = fields.by_ref().skip_while(|f| *f != "-").nth(1)?.to_owned();
    let super_options = split(fields.nth(1)?);
    Some(Mount { id, root, mount_point, options, fs_type, super_options })
}

fn split(options: &str) -> Vec<String> {
    options.split(',').map(str::to_owned).collect()
}

/// Space, tab, newline and backslash are written as three octal digits: `\040`.
fn unescape(field: &str) -> PathBuf {
    let bytes = field.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|d| bytes[at] == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)))
            .map(|d| d.iter().fold(0u32, |n, c| n * 8 + u32::from(c - b'0')))
            .and_then(|n| u8::try_from(n).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn optional_fields_and_escapes_are_understood() {
        let table = "36 35 98:0 /a\\040b /mnt\\134x\\011 rw,nodev shared:1 master:2 - ext4 /dev/r rw\n\
                     37 35 0:5 / /plain rw - tmpfs tmpfs rw,size=5\n\
                     nonsense\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].id, 36);
        assert_eq!(mounts[0].root, PathBuf::from("/a b"));
        assert_eq!(mounts[0].mount_point, PathBuf::from("/mnt\\x\t"));
        assert_eq!(mounts[0].options, ["rw", "nodev"]);
        assert_eq!(mounts[0].fs_type, "ext4");
        assert_eq!(mounts[1].super_options, ["rw", "size=5"]);
    }

    proptest! {
        #[test]
        fn no_table_makes_it_panic(table in ".*") {
            parse(&table);
        }

        #[test]
        fn what_the_kernel_escapes_comes_back(path in "/[ -~\t]{0,40}") {
            let escaped: String = path.chars().map(|c| match c {
                ' ' => "\\040".into(), '\t' => "\\011".into(), '\\' => "\\134".into(), c => c.to_string(),
            }).collect();
            prop_assert_eq!(unescape(&escaped), PathBuf::from(path));
        }
    }
}
