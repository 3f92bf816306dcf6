//! A volume that is reached by several targets, as one: what it has in each of their leases.

use std::collections::HashMap;

use super::Luns;
use super::access::Access;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::lease::{Claim, Lease, Made as _, User};
use crate::types::{Lun, VolumeKey, Wwid};

impl<T: Transport> Luns<T> {
    /// What is held in the owner's name at all of `targets`, as one.
    pub(super) async fn held(
        &self,
        owner: &VolumeKey,
        targets: &[Access<T>],
    ) -> Result<Option<User>, Error> {
        self.held_now(owner, targets, &mut HashMap::new()).await
    }

    /// The same by leases that were read just now; what is missing of them is read.
    pub(super) async fn held_now(
        &self,
        owner: &VolumeKey,
        targets: &[Access<T>],
        leases: &mut HashMap<T::Target, Lease<T::Made>>,
    ) -> Result<Option<User>, Error> {
        for at in targets {
            if !leases.contains_key(&at.target) {
                let lease = self.leases.load(at.lease()).await?;
                leases.insert(at.target.clone(), lease);
            }
        }
        Ok(User::joined(targets.iter().filter_map(|at| leases[&at.target].user(owner, at.lun))))
    }

    /// Changes what the owner has at the first of its targets; `None` where it has nothing there.
    pub(super) async fn change<R>(
        &self,
        owner: &VolumeKey,
        at: &Access<T>,
        change: impl FnOnce(&mut User) -> R + Send,
    ) -> Result<Option<R>, Error> {
        let update = |lease: &mut Lease<T::Made>| lease.user_mut(owner, at.lun).map(change);
        self.leases.update::<T::Made, _>(at.lease(), update).await
    }

    /// A LUN at one of `targets` that the owner has and that is none of theirs.
    pub(super) async fn other_lun(
        &self,
        owner: &VolumeKey,
        targets: &[Access<T>],
    ) -> Result<Option<(String, Lun)>, Error> {
        for at in targets {
            let lease: Lease<T::Made> = self.leases.load(at.lease()).await?;
            let known =
                |u: &&User| !targets.iter().any(|t| t.target == at.target && t.lun == u.lun);
            if let Some(other) = lease.users_of(owner).find(known) {
                return Ok(Some((at.target.to_string(), other.lun)));
            }
        }
        Ok(None)
    }

    /// Whether a user of a lease has its volume, whole: what the first of its targets knows.
    pub(super) async fn has_volume(&self, user: &User) -> Result<bool, Error> {
        match &user.first {
            Some(first) if user.attachment.is_none() => {
                let lease: Lease<T::Made> = self.leases.load(first).await?;
                Ok(lease.users_of(&user.owner).any(|u| u.attachment.is_some()))
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
        let lease: Lease<T::Made> = self.leases.load(&claim.target).await?;
        let mut users = lease.users_of(&claim.owner);
        Ok(users.any(|u| u.wwid.as_ref().is_none_or(|w| w == wwid)))
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
