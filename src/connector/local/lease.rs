//! Who uses what is on the host: one lease a source, under /run/lunplug, written before each effect. What another
//! boot wrote is void.
//!
//! Read and written under the source's lock, which each attach and detach has for its whole time.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::connector::Attachment;
use crate::connector::error::{Error, chain};
use crate::connector::lease::lease_file;
use crate::host::lock::RunDir;
use crate::host::poddir::Inode;
use crate::spec::Source;
use crate::step::Step;
use crate::types::{DevNum, VolumeKey, Wwid};

/// The name in file names and claims.
pub(crate) const TRANSPORT: &str = "local";

/// A source's lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LocalLease {
    /// The boot that it is of.
    pub(crate) boot_id: String,
    /// The source's key.
    pub(crate) source: String,
    /// Who uses it.
    pub(crate) users: Vec<LocalUser>,
}

/// One volume that uses a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LocalUser {
    /// Whose it is.
    pub(crate) owner: VolumeKey,
    /// Others may have it too.
    pub(crate) shareable: bool,
    /// What was found, from before it is claimed.
    pub(crate) found: Option<Found>,
    /// The whole, once handed out.
    pub(crate) attachment: Option<Attachment>,
    /// The last step that was begun for it; for people.
    pub(crate) step: Option<Step>,
}

/// What a source leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// Its identity, which is claimed.
    pub(crate) wwid: Wwid,
    /// Its number.
    pub(crate) dev: DevNum,
    /// Its sequence number.
    pub(crate) diskseq: u64,
    /// Which file it is, where it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<Inode>,
}

impl Found {
    /// Whether two are of the same device or file.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let which = |f: &Self| (f.dev, f.diskseq, f.file);
        which(self) == which(other)
    }
}

/// All leases on what is on the host.
pub(super) struct LocalLeases(Arc<dyn RunDir>);

impl LocalLeases {
    pub(super) fn new(rundir: Arc<dyn RunDir>) -> Self {
        Self(rundir)
    }

    /// What the owner has of a source.
    pub(super) async fn user(
        &self,
        source: &Source,
        owner: &VolumeKey,
    ) -> Result<Option<LocalUser>, Error> {
        let users = self.users(&source.key()).await?;
        Ok(users.into_iter().find(|user| user.owner == *owner))
    }

    /// Who uses the source of that key.
    pub(super) async fn users(&self, key: &str) -> Result<Vec<LocalUser>, Error> {
        Ok(self.load(&file(key)).await?.map(|lease| lease.users).unwrap_or_default())
    }

    /// Enters what a user has, in the place of what it had.
    pub(super) async fn put(&self, source: &Source, user: LocalUser) -> Result<(), Error> {
        let mut users = self.users(&source.key()).await?;
        match users.iter_mut().find(|known| known.owner == user.owner) {
            Some(known) => *known = user,
            None => users.push(user),
        }
        self.write(source, users).await
    }

    /// Takes a user out.
    pub(super) async fn remove(&self, source: &Source, owner: &VolumeKey) -> Result<(), Error> {
        let mut users = self.users(&source.key()).await?;
        users.retain(|user| user.owner != *owner);
        self.write(source, users).await
    }

    /// All of this boot that can be read; one that cannot is told and left.
    pub(super) async fn all(&self) -> Result<Vec<LocalLease>, Error> {
        let dir = format!("leases/{TRANSPORT}");
        let names = self.0.list(&dir).await.map_err(Error::store("listing leases"))?;
        let mut all = Vec::new();
        for name in names {
            match self.load(&format!("{dir}/{name}")).await {
                Ok(lease) => all.extend(lease),
                Err(error) => {
                    tracing::error!(why = chain(&error), "see docs/operations.md, damaged records");
                }
            }
        }
        Ok(all)
    }

    async fn load(&self, name: &str) -> Result<Option<LocalLease>, Error> {
        let loaded = self.0.load(name).await.map_err(Error::store(format!("reading {name}")))?;
        let Some(bytes) = loaded else { return Ok(None) };
        let lease: LocalLease = serde_json::from_slice(&bytes)
            .map_err(|source| Error::LeaseCorrupt { name: name.into(), source })?;
        Ok((lease.boot_id == self.0.boot_id()).then_some(lease))
    }

    async fn write(&self, source: &Source, users: Vec<LocalUser>) -> Result<(), Error> {
        let name = file(&source.key());
        let written = if users.is_empty() {
            self.0.remove(&name).await
        } else {
            let boot_id = self.0.boot_id().to_owned();
            let lease = LocalLease { boot_id, source: source.key(), users };
            let bytes = serde_json::to_vec(&lease)
                .map_err(|source| Error::LeaseCorrupt { name: name.clone(), source })?;
            self.0.store(&name, &bytes).await
        };
        written.map_err(Error::store(format!("writing {name}")))
    }
}

fn file(key: &str) -> String {
    lease_file(TRANSPORT, key)
}
