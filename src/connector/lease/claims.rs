//! Claims: who has a LUN, whatever the way to it.

use serde::{Deserialize, Serialize};

use super::{Leases, file_name};
use crate::connector::error::Error;
use crate::connector::local;
use crate::host::lock::LockGuard;
use crate::types::{VolumeKey, Wwid};

impl Leases {
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
        let claims: Option<Claims> = self.read(&name).await?;
        let claims = claims.filter(|claims| claims.boot_id == self.doors.rundir.boot_id());
        let claims = claims.map(|claims| claims.claims).unwrap_or_default();
        Ok((guard, name, claims))
    }

    async fn write_claims(&self, name: &str, claims: Vec<Claim>) -> Result<(), Error> {
        if claims.is_empty() {
            return self.delete(name).await;
        }
        let claims = Claims { boot_id: self.doors.rundir.boot_id().into(), claims };
        self.store(name, &claims).await
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
        let is_local = |claim: &Self| claim.transport == local::TRANSPORT;
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
