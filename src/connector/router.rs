//! One connector for all kinds of sources: the kind chooses.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::broadcast;

use super::error::Error;
use super::fc::{self, Fc};
use super::iscsi::Iscsi;
use super::local::Local;
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

/// Attaches and detaches what every kind of source gives. Clones share everything.
#[derive(Clone)]
pub struct Connectors {
    doors: StorageDoors,
    iscsi: Arc<Luns<Iscsi>>,
    fc: Arc<Luns<Fc>>,
    local: Arc<Local>,
}

impl Connectors {
    /// A connector over these doors.
    pub fn new(doors: StorageDoors, settings: Settings) -> Self {
        Self {
            iscsi: Arc::new(Luns::new(doors.clone(), settings.clone())),
            fc: Arc::new(Luns::new(doors.clone(), settings.clone())),
            local: Arc::new(Local::new(doors.clone(), settings)),
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
        self.by(Kind::of(source))
    }

    fn by(&self, kind: Kind) -> &dyn Connector {
        match kind {
            Kind::Iscsi => &self.iscsi,
            Kind::Fc => &self.fc,
            Kind::Local => &*self.local,
        }
    }
}

/// The kinds of sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Iscsi,
    Fc,
    Local,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Iscsi, Self::Fc, Self::Local];

    fn of(source: &Source) -> Self {
        match source {
            Source::Iscsi(_) => Self::Iscsi,
            Source::Fc(_) => Self::Fc,
            Source::Block(_) | Source::File(_) => Self::Local,
        }
    }
}

#[async_trait]
impl Connector for Connectors {
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

    async fn forget(&self, source: &Source, wwid: &Wwid) -> Result<(), Error> {
        self.of(source).forget(source, wwid).await
    }

    async fn observe(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<Option<Attachment>, Error> {
        self.of(source).observe(owner, source).await
    }

    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>> {
        // Each transport is asked once; the answers are in the order asked for.
        let mut found: Vec<Option<Result<Health, Error>>> = volumes.iter().map(|_| None).collect();
        for kind in Kind::ALL {
            let its = |(_, (_, source)): &(usize, &(VolumeKey, Source))| Kind::of(source) == kind;
            let (places, its): (Vec<usize>, Vec<(VolumeKey, Source)>) =
                volumes.iter().enumerate().filter(its).map(|(n, v)| (n, v.clone())).unzip();
            if its.is_empty() {
                continue;
            }
            let healths = self.by(kind).inspect(&its).await;
            for (place, health) in places.into_iter().zip(healths) {
                found[place] = Some(health);
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
        for kind in Kind::ALL {
            owners.extend(self.by(kind).owners().await?);
        }
        Ok(owners.into_iter().collect())
    }
}
