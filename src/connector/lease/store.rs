//! The files of leases: how they are changed, and brought from the form of before to this one.
//!
//! A target's own file is there from before its first user's is made until after its last user's is gone. What
//! passes from a user to another is written there before it goes here.
//!
//! The form of before has all users in the target's file. Whoever changes something brings it to this one first:
//! each user's file is written, then the target's, without them; until then that one alone counts. A lunplugd of
//! before cannot read a target's file without users, and leaves that target as it is.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Made, MapLease, User, file_name};
use crate::connector::error::Error;
use crate::host::lock::LockGuard;
use crate::host::storage::StorageDoors;
use crate::types::{Lun, VolumeKey};

/// A target's own file. `M` is what the transport keeps of its own, e.g. the sessions that it made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease<M> {
    /// The boot that it is of.
    pub(crate) boot_id: String,
    /// The target's name.
    pub(crate) target: String,
    /// Who uses it, in the form of before; else `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) users: Option<Vec<User>>,
    /// What was made for all of them.
    pub(crate) made: M,
}

/// A user's file.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Entry<U> {
    /// The boot that it is of.
    pub(crate) boot_id: String,
    /// The target's name.
    pub(crate) target: String,
    /// What it has there.
    pub(crate) user: U,
}

/// The name of a target's file below the run directory.
pub(crate) fn lease_file(transport: &str, target: &str) -> String {
    format!("leases/{transport}/{}", file_name(target))
}

/// The directory of its users' files. No target's name has a colon in a file's.
pub(super) fn users_dir(transport: &str, target: &str) -> String {
    format!("{}:users", lease_file(transport, target))
}

/// The name of a user's file below the run directory.
pub(crate) fn user_file(transport: &str, target: &str, owner: &VolumeKey, lun: Lun) -> String {
    format!("{}/{}", users_dir(transport, target), entry_name(owner, lun))
}

pub(super) fn entry_name(owner: &VolumeKey, lun: Lun) -> String {
    format!("{}{}", of_lun(lun), file_name(&owner.to_string()))
}

/// What the names of all users of a LUN begin with.
pub(super) fn of_lun(lun: Lun) -> String {
    format!("{}:", file_name(&lun.to_string()))
}

/// All leases of a transport.
pub(crate) struct Leases {
    pub(super) doors: StorageDoors,
    pub(super) lock: Duration,
}

impl Leases {
    /// Over these doors; waiting for another process's change takes at most `lock`.
    pub(crate) fn new(doors: StorageDoors, lock: Duration) -> Self {
        Self { doors, lock }
    }

    /// Changes what was made at a target for all of its users.
    pub(crate) async fn update_made<M: Made, R>(
        &self,
        target: &str,
        change: impl FnOnce(&mut M) -> R + Send,
    ) -> Result<R, Error> {
        let (_guard, lease) = self.locked::<M>(target).await?;
        let mut lease = lease.unwrap_or_else(|| self.empty(target));
        let before = lease.made.clone();
        let result = change(&mut lease.made);
        if lease.made != before && !self.drop_unused(target, &lease.made).await? {
            self.store(&lease_file(M::TRANSPORT, target), &lease).await?;
        }
        Ok(result)
    }

    /// Enters a user, or changes the entry that it has.
    pub(crate) async fn enter<M: Made>(
        &self,
        target: &str,
        intent: User,
        change: impl FnOnce(&mut User, User) + Send,
    ) -> Result<(), Error> {
        let (_guard, lease, before) =
            self.locked_with::<M>(target, &intent.owner, intent.lun).await?;
        if lease.is_none() {
            let lease = self.empty::<M>(target);
            self.store(&lease_file(M::TRANSPORT, target), &lease).await?;
        }
        let user = match before.clone() {
            None => intent,
            Some(mut user) => {
                change(&mut user, intent);
                user
            }
        };
        self.store_user::<M>(target, before.as_ref(), &user).await
    }

    /// Changes what an owner has of a LUN; `None` where it has nothing of it.
    pub(crate) async fn change<M: Made, R>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
        change: impl FnOnce(&mut User) -> R + Send,
    ) -> Result<Option<R>, Error> {
        let (_guard, _, before) = self.locked_with::<M>(target, owner, lun).await?;
        let Some(before) = before else { return Ok(None) };
        let mut user = before.clone();
        let result = change(&mut user);
        self.store_user::<M>(target, Some(&before), &user).await?;
        Ok(Some(result))
    }

    /// Leaves a map to an owner, which has the LUN by this target.
    pub(crate) async fn leave_map<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        map: Option<&MapLease>,
    ) -> Result<(), Error> {
        let (_guard, _) = self.locked::<M>(target).await?;
        match self.users_of::<M>(target, owner).await?.first() {
            None => Ok(()),
            Some(before) => {
                let mut heir = before.clone();
                heir.take_map(map);
                self.store_user::<M>(target, Some(before), &heir).await
            }
        }
    }

    /// Removes a user; what it made passes to another user of the LUN, if there is one. Cut short in between,
    /// both have made it, which is as good: whoever goes last takes it away.
    pub(crate) async fn remove<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
    ) -> Result<(), Error> {
        let (_guard, lease, user) = self.locked_with::<M>(target, owner, lun).await?;
        if let Some(gone) = user {
            if let Some(before) = self.others_filed::<M>(target, owner, lun).await?.first() {
                let mut heir = before.clone();
                heir.inherit(&gone);
                self.store_user::<M>(target, Some(before), &heir).await?;
            }
            self.delete(&user_file(M::TRANSPORT, target, owner, lun)).await?;
        }
        match &lease {
            Some(lease) => self.drop_unused(target, &lease.made).await.map(drop),
            None => Ok(()),
        }
    }

    // ---- files ----------------------------------------------------------------------------------

    /// The target's lock, and its own file, in the form of now.
    async fn locked<M: Made>(
        &self,
        target: &str,
    ) -> Result<(Box<dyn LockGuard>, Option<Lease<M>>), Error> {
        let guard = self.lock::<M>(target).await?;
        let lease = match self.lease::<M>(target).await? {
            Some(lease) if lease.users.is_some() => self.renew(target, lease).await?,
            lease => lease,
        };
        Ok((guard, lease))
    }

    /// The same, and what an owner has of a LUN there.
    async fn locked_with<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
    ) -> Result<(Box<dyn LockGuard>, Option<Lease<M>>, Option<User>), Error> {
        let guard = self.lock::<M>(target).await?;
        let (lease, user) = self.read_both(target, owner, lun).await?;
        let lease = match lease {
            Some(lease) if lease.users.is_some() => self.renew(target, lease).await?,
            lease => lease,
        };
        Ok((guard, lease, user))
    }

    async fn lock<M: Made>(&self, target: &str) -> Result<Box<dyn LockGuard>, Error> {
        let lock = format!("locks/lease-{}-{}", M::TRANSPORT, file_name(target));
        Ok(self.doors.rundir.lock(&lock, self.lock).await?)
    }

    /// Brings a lease from the form of before to this one.
    async fn renew<M: Made>(
        &self,
        target: &str,
        mut lease: Lease<M>,
    ) -> Result<Option<Lease<M>>, Error> {
        let users = lease.users.take().unwrap_or_default();
        let dir = users_dir(M::TRANSPORT, target);
        // What is there was left by one that was cut short, and may be of users that have gone since.
        for name in self.names(&dir).await? {
            self.delete(&format!("{dir}/{name}")).await?;
        }
        for user in &users {
            self.store_user::<M>(target, None, user).await?;
        }
        if self.drop_unused(target, &lease.made).await? {
            return Ok(None);
        }
        self.store(&lease_file(M::TRANSPORT, target), &lease).await?;
        Ok(Some(lease))
    }

    fn empty<M: Made>(&self, target: &str) -> Lease<M> {
        Lease {
            boot_id: self.doors.rundir.boot_id().into(),
            target: target.into(),
            users: None,
            made: M::default(),
        }
    }

    /// Removes a target's own file where nothing is made there and nobody uses it; whether that is so.
    async fn drop_unused<M: Made>(&self, target: &str, made: &M) -> Result<bool, Error> {
        if *made != M::default() {
            return Ok(false);
        }
        let dir = users_dir(M::TRANSPORT, target);
        for name in self.names(&dir).await? {
            // Of another boot: nobody's. Who cannot be read may be a user.
            if !matches!(self.read_user(&format!("{dir}/{name}")).await, Ok(None)) {
                return Ok(false);
            }
        }
        self.delete(&lease_file(M::TRANSPORT, target)).await?;
        Ok(true)
    }

    pub(super) async fn names(&self, dir: &str) -> Result<Vec<String>, Error> {
        self.doors.rundir.list(dir).await.map_err(Error::store(format!("listing {dir}")))
    }

    pub(super) async fn read_lease<M: Made>(&self, name: &str) -> Result<Option<Lease<M>>, Error> {
        Ok(self.of_this_boot(self.read(name).await?))
    }

    pub(super) async fn read_user(&self, name: &str) -> Result<Option<User>, Error> {
        let entry: Option<Entry<User>> = self.read(name).await?;
        Ok(self.entered(entry))
    }

    /// A target's own file, and what an owner has of a LUN there.
    pub(super) async fn read_both<M: Made>(
        &self,
        target: &str,
        owner: &VolumeKey,
        lun: Lun,
    ) -> Result<(Option<Lease<M>>, Option<User>), Error> {
        let names = [lease_file(M::TRANSPORT, target), user_file(M::TRANSPORT, target, owner, lun)];
        let mut loaded = self.doors.rundir.load_each(&names).await.into_iter();
        let mut next = || loaded.next().unwrap_or(Ok(None));
        let lease: Option<Lease<M>> = self.of_this_boot(value(&names[0], next())?);
        // The target's own file says whether the users have files.
        let user = match lease.as_ref().and_then(|lease| lease.users.as_ref()) {
            Some(users) => users.iter().find(|u| u.is(owner, lun)).cloned(),
            None => self.entered(value(&names[1], next())?).filter(|u: &User| u.is(owner, lun)),
        };
        Ok((lease, user))
    }

    /// What each of these has, read in one: a target's name, an owner, a LUN.
    pub(crate) async fn read_users<M: Made>(
        &self,
        asked: &[(String, VolumeKey, Lun)],
    ) -> Vec<Result<Option<User>, Error>> {
        let mut targets: Vec<&String> = asked.iter().map(|(target, ..)| target).collect();
        targets.sort();
        targets.dedup();
        let own = targets.iter().map(|target| lease_file(M::TRANSPORT, target));
        let users = asked.iter().map(|(at, owner, lun)| user_file(M::TRANSPORT, at, owner, *lun));
        let names: Vec<String> = own.chain(users).collect();
        let mut loaded = names.iter().zip(self.doors.rundir.load_each(&names).await);
        let own: Vec<Result<Option<Lease<M>>, Error>> = (loaded.by_ref().take(targets.len()))
            .map(|(name, loaded)| Ok(self.of_this_boot(value(name, loaded)?)))
            .collect();
        let mut found = Vec::with_capacity(asked.len());
        for ((target, owner, lun), (name, loaded)) in asked.iter().zip(loaded) {
            let own = targets.binary_search(&target).ok().map(|n| &own[n]);
            found.push(match own {
                Some(Ok(Some(Lease { users: Some(users), .. }))) => {
                    Ok(users.iter().find(|u| u.is(owner, *lun)).cloned())
                }
                Some(Ok(_)) => {
                    let entry = value(name, loaded);
                    entry.map(|entry| self.entered(entry).filter(|u: &User| u.is(owner, *lun)))
                }
                // Each says so for itself.
                Some(Err(_)) | None => self.user::<M>(target, owner, *lun).await,
            });
        }
        found
    }

    fn of_this_boot<M>(&self, lease: Option<Lease<M>>) -> Option<Lease<M>> {
        lease.filter(|lease| lease.boot_id == self.doors.rundir.boot_id())
    }

    fn entered(&self, entry: Option<Entry<User>>) -> Option<User> {
        let entry = entry.filter(|entry| entry.boot_id == self.doors.rundir.boot_id());
        entry.map(|entry| entry.user)
    }

    /// Writes what a user has, unless that is there.
    async fn store_user<M: Made>(
        &self,
        target: &str,
        before: Option<&User>,
        user: &User,
    ) -> Result<(), Error> {
        if before == Some(user) {
            return Ok(());
        }
        let boot_id = self.doors.rundir.boot_id().into();
        let entry = Entry { boot_id, target: target.into(), user };
        self.store(&user_file(M::TRANSPORT, target, &user.owner, user.lun), &entry).await
    }

    /// A file's value, of whatever boot.
    pub(super) async fn read<V: DeserializeOwned>(&self, name: &str) -> Result<Option<V>, Error> {
        value(name, self.doors.rundir.load(name).await)
    }

    pub(super) async fn store(
        &self,
        name: &str,
        value: &(impl Serialize + Sync),
    ) -> Result<(), Error> {
        let bytes = serde_json::to_vec(value)
            .map_err(|source| Error::LeaseCorrupt { name: name.into(), source })?;
        let stored = self.doors.rundir.store(name, &bytes).await;
        stored.map_err(Error::store(format!("writing {name}")))
    }

    pub(super) async fn delete(&self, name: &str) -> Result<(), Error> {
        let removed = self.doors.rundir.remove(name).await;
        removed.map_err(Error::store(format!("writing {name}")))
    }
}

/// A file's value, as it was loaded.
fn value<V: DeserializeOwned>(
    name: &str,
    loaded: std::io::Result<Option<Vec<u8>>>,
) -> Result<Option<V>, Error> {
    let bytes = loaded.map_err(Error::store(format!("reading {name}")))?;
    let read = bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose();
    read.map_err(|source| Error::LeaseCorrupt { name: name.into(), source })
}
