//! Who uses what on this node: one lease a target, and one claim a LUN.
//!
//! A volume that is reached by several targets is a user of each: of those the first one has what is of the
//! whole (identity, map, attachment), every one its own paths.
//!
//! They lie under /run/lunplug, shared by a node daemon and sidecars, and are written *before* the
//! effect that they announce; what another boot wrote is void. Every change is read, changed and
//! written under the lease's own lock, which is held for nothing else.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::host::lock::LockGuard;
use crate::host::storage::StorageDoors;
use crate::step::Step;
use crate::types::{DevNum, Lun, VolumeKey, Wwid};

use super::error::Error;
use super::{Attachment, scsi::Hctl};

/// A target's lease. `M` is what the transport keeps of its own, e.g. the sessions that it made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease<M> {
    /// The boot that it is of.
    boot_id: String,
    /// The target's name.
    pub(crate) target: String,
    /// Who uses it.
    pub(crate) users: Vec<User>,
    /// What was made for all of them.
    pub(crate) made: M,
}

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

impl<M> Lease<M> {
    /// The boot that it is of.
    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The user of that name and LUN.
    pub(crate) fn user(&self, owner: &VolumeKey, lun: Lun) -> Option<&User> {
        self.users.iter().find(|u| u.is(owner, lun))
    }

    /// The user of that name and LUN, to be changed.
    pub(crate) fn user_mut(&mut self, owner: &VolumeKey, lun: Lun) -> Option<&mut User> {
        self.users.iter_mut().find(|u| u.is(owner, lun))
    }

    /// All that a volume has here: mostly one LUN.
    pub(crate) fn users_of(&self, owner: &VolumeKey) -> impl Iterator<Item = &User> {
        self.users.iter().filter(move |u| u.owner == *owner)
    }

    /// Another user of the same LUN.
    pub(crate) fn other(&self, owner: &VolumeKey, lun: Lun) -> Option<&User> {
        self.users.iter().find(|u| u.owner != *owner && u.lun == lun)
    }

    /// A user with those of its paths alone that no other user of the LUN has.
    pub(crate) fn alone_with(&self, mut user: User) -> User {
        let others = || self.users.iter().filter(|u| u.owner != user.owner && u.lun == user.lun);
        let taken: Vec<Hctl> = others().flat_map(|u| &u.paths).map(|p| p.hctl).collect();
        user.paths.retain(|p| !taken.contains(&p.hctl));
        user
    }

    /// Whether somebody wants to come to the target by that way.
    pub(crate) fn wants(&self, route: &str) -> bool {
        self.users.iter().any(|u| u.routes.iter().any(|r| r == route))
    }

    /// Removes a user; what it made passes to another user of the LUN, if there is one.
    pub(crate) fn remove_user(&mut self, owner: &VolumeKey, lun: Lun) -> Option<User> {
        let at = self.users.iter().position(|u| u.is(owner, lun))?;
        let gone = self.users.remove(at);
        if let Some(heir) = self.users.iter_mut().find(|u| u.lun == gone.lun) {
            for path in gone.paths.iter().filter(|p| p.made) {
                match heir.paths.iter_mut().find(|p| p.hctl == path.hctl) {
                    Some(same) => same.made = true,
                    None => heir.paths.push(path.clone()),
                }
            }
            heir.take_map(gone.map.as_ref());
        }
        Some(gone)
    }
}

impl User {
    fn is(&self, owner: &VolumeKey, lun: Lun) -> bool {
        self.owner == *owner && self.lun == lun
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

/// All leases of a transport.
pub(crate) struct Leases {
    doors: StorageDoors,
    lock: Duration,
}

impl Leases {
    /// Over these doors; waiting for another process's change takes at most `lock`.
    pub(crate) fn new(doors: StorageDoors, lock: Duration) -> Self {
        Self { doors, lock }
    }

    /// A target's lease; an empty one where there is none of this boot.
    pub(crate) async fn load<M: Made>(&self, target: &str) -> Result<Lease<M>, Error> {
        let name = format!("leases/{}/{}", M::TRANSPORT, file_name(target));
        self.load_file(&name).await.map(|lease| lease.unwrap_or_else(|| self.empty(target)))
    }

    /// All leases of this boot that can be read. One that cannot is told and left: it is its target's
    /// trouble alone.
    pub(crate) async fn all<M: Made>(&self) -> Result<Vec<Lease<M>>, Error> {
        let dir = format!("leases/{}", M::TRANSPORT);
        let names = self.doors.rundir.list(&dir).await.map_err(Error::store("listing leases"))?;
        let mut all = Vec::new();
        for name in names {
            match self.load_file(&format!("{dir}/{name}")).await {
                Ok(lease) => all.extend(lease),
                Err(error) => {
                    let why = super::error::chain(&error);
                    tracing::error!(why, "see docs/operations.md, damaged records");
                }
            }
        }
        Ok(all)
    }

    /// Reads a target's lease, changes it and writes it back, alone.
    pub(crate) async fn update<M: Made, R>(
        &self,
        target: &str,
        change: impl FnOnce(&mut Lease<M>) -> R + Send,
    ) -> Result<R, Error> {
        let file = file_name(target);
        let lock = format!("locks/lease-{}-{file}", M::TRANSPORT);
        let _guard = self.doors.rundir.lock(&lock, self.lock).await?;
        let mut lease = self.load::<M>(target).await?;
        let before = lease.clone();
        let result = change(&mut lease);
        // Everybody who uses the target is in the file: what is so already is not written again.
        if lease == before && !lease.users.is_empty() {
            return Ok(result);
        }
        let name = format!("leases/{}/{file}", M::TRANSPORT);
        let written = if lease.users.is_empty() && lease.made == M::default() {
            self.doors.rundir.remove(&name).await
        } else {
            let bytes = serde_json::to_vec(&lease)
                .map_err(|source| Error::LeaseCorrupt { name: name.clone(), source })?;
            self.doors.rundir.store(&name, &bytes).await
        };
        written.map_err(Error::store(format!("writing {name}")))?;
        Ok(result)
    }

    fn empty<M: Made>(&self, target: &str) -> Lease<M> {
        Lease {
            boot_id: self.doors.rundir.boot_id().into(),
            target: target.into(),
            users: Vec::new(),
            made: M::default(),
        }
    }

    async fn load_file<M: Made>(&self, name: &str) -> Result<Option<Lease<M>>, Error> {
        let loaded = self.doors.rundir.load(name).await;
        let Some(bytes) = loaded.map_err(Error::store(format!("reading {name}")))? else {
            return Ok(None);
        };
        let lease: Lease<M> = serde_json::from_slice(&bytes)
            .map_err(|source| Error::LeaseCorrupt { name: name.into(), source })?;
        Ok((lease.boot_id == self.doors.rundir.boot_id()).then_some(lease))
    }

    /// Says that `wwid` is `claim.owner`'s, or who else has it. A claim whose owner's lease no
    /// longer knows it is void (`is_live` says so): it is of a detach that was cut short.
    pub(crate) async fn claim<F, Fut>(
        &self,
        wwid: &Wwid,
        claim: Claim,
        is_live: F,
    ) -> Result<(), Error>
    where
        F: Fn(Claim) -> Fut + Send,
        Fut: Future<Output = Result<bool, Error>> + Send,
    {
        let (_guard, name, claims) = self.claims(wwid).await?;
        let mut kept = Vec::new();
        for other in claims {
            if other.owner != claim.owner && is_live(other.clone()).await? {
                kept.push(other);
            }
        }
        if let Some(other) = kept.iter().find(|c| !c.may_share(&claim)) {
            let owner = other.owner.to_string();
            return Err(Error::SourceInUse { wwid: wwid.clone(), owner });
        }
        kept.push(claim);
        self.write_claims(&name, kept).await
    }

    /// The claims on a LUN in other names than `owner`'s, as they were noted.
    pub(crate) async fn claimed_by_others(
        &self,
        wwid: &Wwid,
        owner: &VolumeKey,
    ) -> Result<Vec<Claim>, Error> {
        let (_guard, _, mut claims) = self.claims(wwid).await?;
        claims.retain(|c| c.owner != *owner);
        Ok(claims)
    }

    /// Takes a claim back; absent is fine.
    pub(crate) async fn unclaim(&self, wwid: &Wwid, owner: &VolumeKey) -> Result<(), Error> {
        let (_guard, name, mut claims) = self.claims(wwid).await?;
        claims.retain(|c| c.owner != *owner);
        self.write_claims(&name, claims).await
    }

    /// `None` when somebody has the LUN; otherwise nobody gets it while the guard is held.
    pub(crate) async fn unclaimed(&self, wwid: &Wwid) -> Result<Option<Box<dyn LockGuard>>, Error> {
        let (guard, _, claims) = self.claims(wwid).await?;
        Ok(claims.is_empty().then_some(guard))
    }

    async fn claims(&self, wwid: &Wwid) -> Result<(Box<dyn LockGuard>, String, Vec<Claim>), Error> {
        let file = file_name(wwid.as_str());
        let guard = self.doors.rundir.lock(&format!("locks/wwid-{file}"), self.lock).await?;
        let name = format!("claims/{file}");
        let loaded = self.doors.rundir.load(&name).await;
        let claims = match loaded.map_err(Error::store(format!("reading {name}")))? {
            None => Vec::new(),
            Some(bytes) => {
                let claims: Claims = serde_json::from_slice(&bytes)
                    .map_err(|source| Error::LeaseCorrupt { name: name.clone(), source })?;
                if claims.boot_id == self.doors.rundir.boot_id() { claims.claims } else { vec![] }
            }
        };
        Ok((guard, name, claims))
    }

    async fn write_claims(&self, name: &str, claims: Vec<Claim>) -> Result<(), Error> {
        let written = if claims.is_empty() {
            self.doors.rundir.remove(name).await
        } else {
            let claims = Claims { boot_id: self.doors.rundir.boot_id().into(), claims };
            let bytes = serde_json::to_vec(&claims)
                .map_err(|source| Error::LeaseCorrupt { name: name.into(), source })?;
            self.doors.rundir.store(name, &bytes).await
        };
        written.map_err(Error::store(format!("writing {name}")))
    }
}

/// Who has a LUN, whatever the way to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// Who.
    pub(crate) owner: VolumeKey,
    /// The transport and target whose lease knows of it.
    pub(crate) transport: String,
    /// See above.
    pub(crate) target: String,
    /// Others may have it too.
    pub(crate) shareable: bool,
}

impl Claim {
    /// Whether both may have the LUN. One that is had by a transport goes with it when its volume goes, so it
    /// cannot be shared with one that takes it as what is on the host.
    fn may_share(&self, other: &Self) -> bool {
        let is_local = |claim: &Self| claim.transport == super::local::TRANSPORT;
        self.shareable && other.shareable && is_local(self) == is_local(other)
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Claims {
    /// The boot that they are of.
    pub(crate) boot_id: String,
    /// Those that there are.
    pub(crate) claims: Vec<Claim>,
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn file_names_are_safe_and_do_not_clash(a in "[ -~]{1,90}", b in "[ -~]{1,90}") {
            let ok = |s: &str| s.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c));
            let (x, y) = (file_name(&a), file_name(&b));
            prop_assert!(ok(&x) && x.len() <= 255 && !x.starts_with('.'));
            prop_assert_eq!(a == b, x == y);
        }
    }

    #[test]
    fn a_colon_is_written_out() {
        assert_eq!(file_name("iqn.2026-01.a:b"), "iqn.2026-01.a_3ab");
    }

    fn user(owner: &str, made: bool) -> User {
        User {
            owner: VolumeKey {
                vm: "ns/vm".parse().expect("vm"),
                volume: owner.parse().expect("volume"),
            },
            lun: 1u64.try_into().expect("lun"),
            shareable: true,
            routes: vec!["10.0.0.1:3260".into()],
            wwid: None,
            paths: vec![PathLease {
                hctl: "3:0:0:1".parse().expect("hctl"),
                dir: "d".into(),
                made,
                seen: None,
            }],
            map: Some(MapLease { uuid: "mpath-3x".into(), made }),
            attachment: None,
            first: None,
            step: None,
        }
    }

    #[test]
    fn the_last_user_of_a_lun_removes_what_the_first_made() {
        let mut lease = Lease {
            boot_id: "b".into(),
            target: "t".into(),
            users: vec![user("a", true), user("b", false)],
            made: (),
        };
        let (a, lun) = (lease.users[0].owner.clone(), lease.users[0].lun);
        assert!(lease.remove_user(&a, lun).is_some());
        assert!(lease.users[0].paths[0].made);
        assert!(lease.users[0].map.as_ref().is_some_and(|m| m.made));
        assert!(lease.remove_user(&a, lun).is_none());
    }
}
