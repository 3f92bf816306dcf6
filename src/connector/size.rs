//! How large a LUN is: every path of a map is read anew, proven to be what it was, and compared.
//!
//! ```text
//! each path:  running? ─► diskseq as before? ─► rescan ─► still running? ─► same identity? ─► size
//! all paths:  the same size? ─► not less than was handed out? ─► as expected? ─► that is it
//! ```
//! A write to `rescan` of a path that is not running returns without having asked the LUN (sd.c,
//! sd_revalidate_disk), so its old size would pass for the new one: its state is read before and after.

use std::collections::BTreeSet;
use std::fmt;

use futures_util::future::join_all;

use super::error::Error;
use super::multipath::Map;
use super::scsi::{self, Hctl};
use crate::host::sysfs::Sysfs;
use crate::reason::Reason;
use crate::types::{DevNum, Wwid};

/// A path, for people: `3:0:0:1 (sda)`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PathName {
    /// SCSI address.
    pub(crate) hctl: Hctl,
    /// Kernel name.
    pub(crate) name: String,
}

impl fmt::Display for PathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.hctl, self.name)
    }
}

/// Why a LUN's size is not known, or not good. Nothing of the map or the guest was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// A path cannot say.
    #[error("the path {path} {state}, so what size it shows is not known")]
    PathDown {
        /// Which.
        path: String,
        /// What it is like: `is offline`.
        state: String,
    },
    /// Two paths show two sizes.
    #[error("the paths disagree: {one} shows {one_size} bytes, {other} shows {other_size}")]
    Disagree {
        /// One path.
        one: String,
        /// Its bytes.
        one_size: u64,
        /// Another.
        other: String,
        /// Its bytes.
        other_size: u64,
    },
    /// It has become smaller.
    #[error("the path {path} shows {found} bytes, but the LUN had {was} when it was handed out")]
    Shrunk {
        /// One path.
        path: String,
        /// Bytes as they were handed out.
        was: u64,
        /// Bytes now.
        found: u64,
    },
    /// It is not as large as was said.
    #[error("the path {path} shows {found} bytes (before: {was}), but {expected} were expected")]
    Unexpected {
        /// One path.
        path: String,
        /// Bytes as they were handed out.
        was: u64,
        /// Bytes now.
        found: u64,
        /// Bytes that were said.
        expected: u64,
    },
}

impl SizeError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::PathDown { .. } => Reason::PathDown,
            Self::Disagree { .. } => Reason::SizesDisagree,
            Self::Shrunk { .. } => Reason::LunShrunk,
            Self::Unexpected { .. } => Reason::SizeUnexpected,
        }
    }
}

/// A path that is to be measured.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    /// Its names.
    pub(crate) path: PathName,
    /// Its directory below /sys.
    pub(crate) dir: String,
    /// Its disk's sequence number when it was attached; `None` for another session's path in the map.
    pub(crate) diskseq: Option<u64>,
}

/// Reads all of `members` anew, side by side; their sizes in the order of their addresses. Each must
/// be the LUN `wwid`. `failed` are those that the kernel does not use.
pub(crate) async fn measure(
    sysfs: &dyn Sysfs,
    mut members: Vec<Member>,
    wwid: &Wwid,
    failed: &BTreeSet<DevNum>,
) -> Result<Vec<(PathName, u64)>, Error> {
    members.sort_by(|a, b| a.path.cmp(&b.path));
    let read = members.iter().map(|member| remeasured(sysfs, member, wwid, failed));
    join_all(read).await.into_iter().collect()
}

async fn remeasured(
    sysfs: &dyn Sysfs,
    member: &Member,
    wwid: &Wwid,
    failed: &BTreeSet<DevNum>,
) -> Result<(PathName, u64), Error> {
    let Member { path, dir, diskseq } = member;
    let down = |state: String| SizeError::PathDown { path: path.to_string(), state };
    must_run(sysfs, member).await?;
    let Some(before) = scsi::disk(sysfs, dir).await? else {
        return Err(down("is gone".into()).into());
    };
    if before.name != path.name || diskseq.is_some_and(|seq| seq != before.diskseq) {
        return Err(down("is gone: another device is at its place".into()).into());
    }
    if failed.contains(&before.dev) {
        return Err(down("has failed".into()).into());
    }
    scsi::rescan(sysfs, dir).await.map_err(|error| {
        down(format!("could not be read anew: {}", super::error::chain(&error)))
    })?;
    must_run(sysfs, member).await?;
    match scsi::identity(sysfs, path.hctl, dir).await?.1 {
        Ok(identity) if identity.is(wwid) => {}
        other => {
            let found = other.map_or_else(|error| error.to_string(), |id| id.wwid.to_string());
            return Err(Error::Swapped { at: path.to_string(), was: wwid.to_string(), found });
        }
    }
    match scsi::disk(sysfs, dir).await? {
        Some(now) if (now.dev, now.diskseq) != (before.dev, before.diskseq) => {
            Err(down("is gone: another device came to its place".into()).into())
        }
        Some(now) if now.size > 0 => Ok((path.clone(), now.size)),
        _ => Err(down("shows no medium".into()).into()),
    }
}

async fn must_run(sysfs: &dyn Sysfs, member: &Member) -> Result<(), Error> {
    let file = format!("{}/state", member.dir);
    let state = sysfs.text(&file).await.map_err(Error::io(format!("reading {file}")))?;
    match state.as_deref() {
        Some("running") => Ok(()),
        other => {
            let state = other.map_or_else(|| "is gone".into(), |state| format!("is {state}"));
            Err(SizeError::PathDown { path: member.path.to_string(), state }.into())
        }
    }
}

/// The one size of all paths, which may not be less than `was`, and must be `expected` where that is
/// said.
pub(crate) fn agreed<P: fmt::Display>(
    sizes: &[(P, u64)],
    was: u64,
    expected: Option<u64>,
) -> Result<Option<u64>, SizeError> {
    let Some(((path, found), rest)) = sizes.split_first() else { return Ok(None) };
    let (path, found) = (path.to_string(), *found);
    if let Some((other, other_size)) = rest.iter().find(|(_, size)| *size != found) {
        let (other, other_size) = (other.to_string(), *other_size);
        return Err(SizeError::Disagree { one: path, one_size: found, other, other_size });
    }
    match expected {
        _ if found < was => Err(SizeError::Shrunk { path, was, found }),
        Some(expected) if expected != found => {
            Err(SizeError::Unexpected { path, was, found, expected })
        }
        _ => Ok(Some(found)),
    }
}

/// The slaves of a map as paths: those of `known` (kernel name, path) as they are, others as sysfs has
/// them.
pub(crate) async fn members_of(
    sysfs: &dyn Sysfs,
    map: &Map,
    known: &[Member],
) -> Result<Vec<Member>, Error> {
    let mut members = Vec::new();
    for slave in &map.slaves {
        if let Some(member) = known.iter().find(|m| m.path.name == *slave) {
            members.push(member.clone());
            continue;
        }
        let link = format!("block/{slave}/device");
        let dir = sysfs.resolve(&link).await.map_err(Error::io(format!("resolving {link}")))?;
        let hctl = dir.rsplit('/').next().unwrap_or_default().parse();
        let hctl = hctl.map_err(|_| Error::DeviceHeld {
            device: slave.clone(),
            holder: format!("{} although it is no SCSI disk", map.name),
        })?;
        let path = PathName { hctl, name: slave.clone() };
        members.push(Member { path, dir, diskseq: None });
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(all: &[u64]) -> Vec<(PathName, u64)> {
        let path = |n: usize| PathName {
            hctl: format!("{n}:0:0:1").parse().unwrap(),
            name: format!("sd{n}"),
        };
        all.iter().enumerate().map(|(n, size)| (path(n), *size)).collect()
    }

    #[test]
    fn one_size_that_is_not_less_and_is_as_expected() {
        for (all, was, expected, came) in [
            (&[200u64, 200][..], 100u64, None, Ok(Some(200))),
            (&[100, 100], 100, None, Ok(Some(100))),
            (&[200, 200], 100, Some(200), Ok(Some(200))),
            (&[200, 200], 100, Some(300), Err(Reason::SizeUnexpected)),
            (&[100, 100], 100, Some(200), Err(Reason::SizeUnexpected)),
            (&[200, 100], 100, None, Err(Reason::SizesDisagree)),
            (&[50, 100], 100, Some(50), Err(Reason::SizesDisagree)),
            (&[50, 50], 100, None, Err(Reason::LunShrunk)),
            (&[50], 100, Some(50), Err(Reason::LunShrunk)),
            (&[], 100, None, Ok(None)),
        ] {
            let agreed = agreed(&sizes(all), was, expected).map_err(|e| e.reason());
            assert_eq!(agreed, came, "{all:?} {was} {expected:?}");
        }
    }

    #[test]
    fn an_error_names_the_paths_and_the_sizes() {
        let error = agreed(&sizes(&[100, 200]), 100, None).unwrap_err().to_string();
        for part in ["0:0:0:1 (sd0)", "100 bytes", "1:0:0:1 (sd1)", "200"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
