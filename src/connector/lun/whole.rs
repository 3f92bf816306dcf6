//! A volume that is reached by several targets, as one: what it has in each of their leases.

use super::access::Access;
use super::transport::Transport;
use super::{Luns, of};
use crate::connector::error::Error;
use crate::connector::lease::{Claim, Made as _, User};
use crate::spec::Source;
use crate::types::{Lun, VolumeKey, Wwid};

impl<T: Transport> Luns<T> {
    /// What is held in the owner's name at all of `targets`, as one.
    pub(super) async fn held(
        &self,
        owner: &VolumeKey,
        targets: &[Access<T>],
    ) -> Result<Option<User>, Error> {
        let mut users = Vec::new();
        for at in targets {
            users.extend(self.leases.user::<T::Made>(at.lease(), owner, at.lun).await?);
        }
        Ok(User::joined(&users))
    }

    /// The same of many volumes, read in one.
    pub(super) async fn held_each(
        &self,
        volumes: &[(VolumeKey, Source)],
    ) -> Vec<Result<Option<User>, Error>> {
        let targets: Vec<_> =
            volumes.iter().map(|(_, source)| of::<T>(source).map(T::targets)).collect();
        let asked = volumes.iter().zip(&targets).flat_map(|((owner, _), targets)| {
            let targets = targets.iter().flatten();
            targets.map(move |at| (at.lease().to_owned(), owner.clone(), at.lun))
        });
        let asked: Vec<_> = asked.collect();
        let mut users = self.leases.read_users::<T::Made>(&asked).await.into_iter();
        let mut joined = |targets: Result<Vec<Access<T>>, Error>| {
            // All of it, also where a part cannot be read: what follows is the next volume's.
            let its: Vec<_> = users.by_ref().take(targets?.len()).collect();
            let its: Vec<Option<User>> = its.into_iter().collect::<Result<_, _>>()?;
            Ok(User::joined(its.iter().flatten()))
        };
        targets.into_iter().map(&mut joined).collect()
    }

    /// Changes what the owner has at the first of its targets; `None` where it has nothing there.
    pub(super) async fn change<R>(
        &self,
        owner: &VolumeKey,
        at: &Access<T>,
        change: impl FnOnce(&mut User) -> R + Send,
    ) -> Result<Option<R>, Error> {
        self.leases.change::<T::Made, _>(at.lease(), owner, at.lun, change).await
    }

    /// A LUN at one of `targets` that the owner has and that is none of theirs.
    pub(super) async fn other_lun(
        &self,
        owner: &VolumeKey,
        targets: &[Access<T>],
    ) -> Result<Option<(String, Lun)>, Error> {
        for at in targets {
            let other = |u: &User| !targets.iter().any(|t| t.target == at.target && t.lun == u.lun);
            let users = self.leases.users_of::<T::Made>(at.lease(), owner).await?;
            if let Some(other) = users.into_iter().find(other) {
                return Ok(Some((at.target.to_string(), other.lun)));
            }
        }
        Ok(None)
    }

    /// Whether a user of a lease has its volume, whole: what the first of its targets knows.
    pub(super) async fn has_volume(&self, user: &User) -> Result<bool, Error> {
        match &user.first {
            Some(first) if user.attachment.is_none() => {
                let users = self.leases.users_of::<T::Made>(first, &user.owner).await?;
                Ok(users.iter().any(|u| u.attachment.is_some()))
            }
            _ => Ok(user.attachment.is_some()),
        }
    }

    /// Whether a claim is of somebody who has the LUN: one whose owner's lease no longer knows it is of a
    /// detach that was cut short.
    pub(super) async fn is_live(&self, claim: &Claim, wwid: &Wwid) -> Result<bool, Error> {
        // Only this transport's leases can be read here; others' claims count as they are.
        if claim.transport != <T::Made>::TRANSPORT {
            return Ok(true);
        }
        let users = self.leases.users_of::<T::Made>(&claim.target, &claim.owner).await?;
        Ok(users.iter().any(|u| u.wwid.as_ref().is_none_or(|w| w == wwid)))
    }

    /// Who else has the LUN, by whatever target: all must share it.
    pub(super) async fn sharers(
        &self,
        owner: &VolumeKey,
        wwid: Option<&Wwid>,
    ) -> Result<Vec<Claim>, Error> {
        let Some(wwid) = wwid else { return Ok(Vec::new()) };
        let mut live = Vec::new();
        for claim in self.leases.claimed_by_others(wwid, owner).await? {
            // Whose lease cannot be read may have it.
            if self.is_live(&claim, wwid).await.unwrap_or(true) {
                live.push(claim);
            }
        }
        Ok(live)
    }
}
