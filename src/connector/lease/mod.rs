//! Who uses what on this node: one lease a target, and one claim a LUN.
//!
//! ```text
//! leases/TRANSPORT/TARGET                    what was made for all of the target's users
//! leases/TRANSPORT/TARGET:users/LUN:OWNER    one user: a volume, and its LUN there
//! claims/WWID                                who has a LUN, whatever the way to it
//! ```
//! A volume that is reached by several targets is a user of each: of those the first one has what is of the
//! whole (identity, map, attachment), every one its own paths.
//!
//! They lie under /run/lunplug, shared by a node daemon and sidecars, and are written *before* the
//! effect that they announce; what another boot wrote is void. Every change is read, changed and
//! written under the lease's own lock, which is held for nothing else. A user costs what it has itself,
//! however many others there are: their files' names say who has which LUN.

mod claims;
mod read;
mod store;
#[cfg(test)]
mod tests;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::step::Step;
use crate::types::{DevNum, Lun, VolumeKey, Wwid};

use super::{Attachment, scsi::Hctl};

pub(crate) use claims::{Claim, Claims};
pub(crate) use store::{Entry, Lease, Leases, lease_file, user_file};

/// One volume that uses a target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct User {
    /// Whose it is.
    pub(crate) owner: VolumeKey,
    /// Which LUN.
    pub(crate) lun: Lun,
    /// Others may have it too.
    pub(crate) shareable: bool,
    /// The ways to the target that it wants (portals, port names).
    pub(crate) routes: Vec<String>,
    /// The LUN's identity, from when it was proven.
    pub(crate) wwid: Option<Wwid>,
    /// Its paths, from before each was scanned.
    pub(crate) paths: Vec<PathLease>,
    /// Its map, where it has one.
    pub(crate) map: Option<MapLease>,
    /// The whole, once handed out.
    pub(crate) attachment: Option<Attachment>,
    /// The target whose lease has what is of the whole, where that is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first: Option<String>,
    /// The last step that was begun for it; for people.
    #[serde(default)]
    pub(crate) step: Option<Step>,
}

/// One path of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PathLease {
    /// Its address.
    pub(crate) hctl: Hctl,
    /// Its directory below /sys.
    pub(crate) dir: String,
    /// We made it (or are about to), so we remove it.
    pub(crate) made: bool,
    /// What was found there; `None` while only announced.
    pub(crate) seen: Option<Seen>,
}

/// What tells a device from any other in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// `wwid` exactly as sysfs has it; empty where it has none.
    pub(crate) wwid: String,
    /// Its disk's number.
    pub(crate) dev: DevNum,
    /// Its disk's sequence number.
    pub(crate) diskseq: u64,
    /// Its disk's name then.
    pub(crate) name: String,
}

/// A user's map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MapLease {
    /// device-mapper's uuid, `mpath-...`.
    pub(crate) uuid: String,
    /// It was not there before us, so we remove it.
    pub(crate) made: bool,
}

impl User {
    fn is(&self, owner: &VolumeKey, lun: Lun) -> bool {
        self.owner == *owner && self.lun == lun
    }

    /// Takes over what another user of the LUN made.
    pub(crate) fn inherit(&mut self, gone: &Self) {
        for path in gone.paths.iter().filter(|p| p.made) {
            match self.paths.iter_mut().find(|p| p.hctl == path.hctl) {
                Some(same) => same.made = true,
                None => self.paths.push(path.clone()),
            }
        }
        self.take_map(gone.map.as_ref());
    }

    /// Those of its paths alone that none of `others` has.
    pub(crate) fn without_paths_of(mut self, others: &[Self]) -> Self {
        let taken: Vec<Hctl> = others.iter().flat_map(|u| &u.paths).map(|p| p.hctl).collect();
        self.paths.retain(|p| !taken.contains(&p.hctl));
        self
    }

    /// Takes over another's map: whoever made it, it is this one's to be removed.
    pub(crate) fn take_map(&mut self, map: Option<&MapLease>) {
        match (&mut self.map, map) {
            (Some(map), Some(made)) if made.made => map.made = true,
            (map @ None, Some(made)) => *map = Some(made.clone()),
            _ => {}
        }
    }

    /// What a volume has at several targets, as one; `None` where it has nothing. The first has what is
    /// of the whole, also where that came to another one, as an heir's.
    pub(crate) fn joined<'a>(users: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let mut users = users.into_iter();
        let mut all = users.next()?.clone();
        for user in users {
            all.routes.extend(user.routes.iter().cloned());
            all.paths.extend(user.paths.iter().cloned());
            all.wwid = all.wwid.or_else(|| user.wwid.clone());
            all.attachment = all.attachment.or_else(|| user.attachment.clone());
            all.take_map(user.map.as_ref());
        }
        Some(all)
    }

    /// Takes what was there before it as its own: its detach takes that away.
    pub(crate) fn adopt(&mut self) {
        self.paths.iter_mut().for_each(|path| path.made = true);
        self.map.iter_mut().for_each(|map| map.made = true);
    }

    /// Announces or updates a path. Whoever made it first, made it.
    pub(crate) fn set_path(&mut self, path: PathLease) {
        match self.paths.iter_mut().find(|p| p.hctl == path.hctl) {
            Some(known) => *known = path,
            None => self.paths.push(path),
        }
    }
}

/// What a transport keeps in its leases.
pub(crate) trait Made:
    Clone + Default + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// The transport's name, in file names.
    const TRANSPORT: &'static str;
}

/// A name as a file's name: injective, within `[A-Za-z0-9._-]` and 255 bytes.
pub(crate) fn file_name(name: &str) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' => out.push(char::from(byte)),
            b'.' if !out.is_empty() => out.push('.'),
            _ => {
                let _ = write!(out, "_{byte:02x}");
            }
        }
    }
    if out.len() > 200 {
        // FNV-1a, 64 bits, told from a plain name by the `_-`: names that long are rare.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        out.truncate(180);
        let _ = write!(out, "_-{hash:016x}");
    }
    out
}
