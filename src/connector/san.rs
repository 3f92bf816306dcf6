//! One connector for all transports: a source's kind chooses.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::broadcast;

use super::error::Error;
use super::fc::{self, Fc};
use super::iscsi::Iscsi;
use super::lun::Luns;
use super::settings::Settings;
use super::touched::Touched;
use super::{
    AttachRequest, Attachment, Authentication, Connector, DetachOptions, Discovered, Hba, Health,
    Measured,
};
use crate::host::storage::StorageDoors;
use crate::spec::Source;
use crate::types::{Outcome, Portal, VolumeKey, Wwid};

/// Attaches and detaches LUNs of every transport. Clones share everything.
#[derive(Clone)]
pub struct SanConnector {
    doors: StorageDoors,
    iscsi: Arc<Luns<Iscsi>>,
    fc: Arc<Luns<Fc>>,
}

impl SanConnector {
    /// A connector over these doors.
    pub fn new(doors: StorageDoors, settings: Settings) -> Self {
        Self {
            iscsi: Arc::new(Luns::new(doors.clone(), settings.clone())),
            fc: Arc::new(Luns::new(doors.clone(), settings)),
            doors,
        }
    }

    /// Undoes what no volume wants: sessions and records that a killed daemon's login left. For the
    /// start, and harmless at any time.
    pub async fn sweep(&self) -> Result<(), Error> {
        self.iscsi.sweep().await
    }

    /// What is known to be wrong with the iscsiadm that is installed, in words.
    pub async fn tool_fault(&self) -> Option<String> {
        self.iscsi.tool_fault().await
    }

    /// Returns when nothing goes on in the background: no login, no late path.
    pub async fn settled(&self) {
        self.iscsi.settled().await;
        self.fc.settled().await;
    }

    fn of(&self, source: &Source) -> &dyn Connector {
        match source {
            Source::Iscsi(_) => &self.iscsi,
            Source::Fc(_) => &self.fc,
        }
    }

    fn all(&self) -> [&dyn Connector; 2] {
        [&self.iscsi, &self.fc]
    }
}

#[async_trait]
impl Connector for SanConnector {
    async fn attach(&self, request: &AttachRequest) -> Result<Outcome<Attachment>, Error> {
        self.of(&request.source).attach(request).await
    }

    async fn detach(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        self.of(source).detach(owner, source, options).await
    }

    async fn forget(&self, wwid: &Wwid) -> Result<(), Error> {
        // Claims are of no transport.
        self.iscsi.forget(wwid).await
    }

    async fn observe(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<Option<Attachment>, Error> {
        self.of(source).observe(owner, source).await
    }

    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>> {
        let mut found: Vec<Option<Result<Health, Error>>> = volumes.iter().map(|_| None).collect();
        for connector in self.all() {
            // In the order asked for; each transport is asked once.
            let is_its =
                |(_, source): &&(VolumeKey, Source)| std::ptr::addr_eq(self.of(source), connector);
            let its: Vec<_> = volumes.iter().filter(is_its).cloned().collect();
            if its.is_empty() {
                continue;
            }
            let mut healths = connector.inspect(&its).await.into_iter();
            for (place, volume) in found.iter_mut().zip(volumes) {
                if is_its(&volume) {
                    *place = healths.next();
                }
            }
        }
        found.into_iter().flatten().collect()
    }

    async fn measure(
        &self,
        owner: &VolumeKey,
        source: &Source,
        expected: Option<u64>,
    ) -> Result<Measured, Error> {
        self.of(source).measure(owner, source, expected).await
    }

    async fn grow(
        &self,
        owner: &VolumeKey,
        source: &Source,
        size: u64,
    ) -> Result<Outcome<Attachment>, Error> {
        self.of(source).grow(owner, source, size).await
    }

    fn changes(&self) -> broadcast::Receiver<Arc<Touched>> {
        // Events are of no transport.
        self.iscsi.changes()
    }

    async fn discover(
        &self,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error> {
        self.iscsi.discover(portal, authentication).await
    }

    async fn hbas(&self) -> Result<Vec<Hba>, Error> {
        fc::hbas(&*self.doors.sysfs).await
    }

    async fn owners(&self) -> Result<Vec<VolumeKey>, Error> {
        let mut owners = BTreeSet::new();
        for connector in self.all() {
            owners.extend(connector.owners().await?);
        }
        Ok(owners.into_iter().collect())
    }
}
