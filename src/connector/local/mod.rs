//! Block devices that are on the host already: had by path, proven, claimed, and left as they are.
//!
//! ```text
//! attach:  lease (intent) -> opened beneath a configured directory -> identity, judged
//!            -> claim of the identity -> nobody else holds it -> lease (attached)
//! fails:   claim and lease go
//! detach:  nobody holds it -> flush -> claim -> lease
//! ```
//! Nothing is made of what a volume is given by, so nothing is taken away: no scan, no map, no delete. Whoever
//! attached the device to the host (a CSI driver, LVM, a person) grows it and takes it away.
//!
//! The path counts when the volume is attached. From then on it is the device that was found there, by number
//! and sequence number, whatever the path leads to later.

mod attach;
mod detach;
mod device;
mod lease;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::broadcast;
use tracing::Instrument;

pub(crate) use lease::{LocalLease, LocalUser, TRANSPORT};

use self::device::Device;
use self::lease::LocalLeases;
use super::bounded::bounded;
use super::error::Error;
use super::lease::{Leases, file_name};
use super::settings::{LocalSettings, Settings, ms};
use super::touched::Touched;
use super::{
    AttachRequest, Attachment, Authentication, Connector, DetachOptions, Discovered, Health,
    Measured, Paths, scsi, size,
};
use crate::host::lock::LockGuard;
use crate::host::storage::StorageDoors;
use crate::spec::{BlockSource, Source};
use crate::step::Step;
use crate::types::{HostPath, Outcome, Portal, VolumeKey, Wwid};

/// What is on the host.
pub(crate) struct Local {
    doors: StorageDoors,
    settings: Settings,
    leases: LocalLeases,
    claims: Leases,
}

impl Local {
    /// Over these doors.
    pub(crate) fn new(doors: StorageDoors, settings: Settings) -> Self {
        let doors = bounded(doors, &settings);
        Self {
            leases: LocalLeases::new(doors.rundir.clone()),
            claims: Leases::new(doors.clone(), ms(settings.lock_ms)),
            doors,
            settings,
        }
    }

    /// One attach, change or detach of a source at a time: its lease is read and written under this lock.
    async fn lock(&self, source: &Source) -> Result<Box<dyn LockGuard>, Error> {
        let name = format!("luns/{}", file_name(&format!("{TRANSPORT} {}", source.key())));
        Ok(self.doors.rundir.lock(&name, ms(self.settings.lock_ms)).await?)
    }

    /// What a user has, read again: the device by number, sequence and identity.
    async fn seen(&self, user: &LocalUser) -> Result<Option<(Attachment, Device)>, Error> {
        let Some(attachment) = &user.attachment else { return Ok(None) };
        let sysfs = &*self.doors.sysfs;
        let Some(device) = device::read(sysfs, attachment.device.dev).await? else {
            return Ok(None);
        };
        let wwid = &attachment.device.wwid;
        let same = match device::identity(sysfs, &device, "").await {
            Ok(Some(identity)) => identity.is(wwid),
            Ok(None) => wwid.is_path(),
            // Its driver told another thing of it when it was attached.
            Err(Error::Identity(_)) => false,
            Err(error) => return Err(error),
        };
        let same = same && device.diskseq == attachment.diskseq;
        Ok(same.then(|| (attachment.clone(), device)))
    }

    async fn inspect_one(&self, owner: &VolumeKey, source: &Source) -> Result<Health, Error> {
        let Some(user) = self.leases.user(source, owner).await? else {
            return Ok(Health::Differs("nothing is attached in its name".into()));
        };
        if user.attachment.is_none() {
            return Ok(Health::Differs("its attach was not finished".into()));
        }
        let Some((attachment, device)) = self.seen(&user).await? else {
            return Ok(Health::Differs("its device is gone, or is another now".into()));
        };
        let mut paths = Paths { wanted: 1, present: 1, ..Paths::default() };
        paths.grown = device.size > attachment.device.size;
        paths.protected = scsi::is_protected(&*self.doors.sysfs, &device.dir).await?;
        match device::state(&*self.doors.sysfs, &device).await? {
            Some(state) => paths.dead.push(format!("{} is {state}", device.name)),
            None => paths.living = 1,
        }
        Ok(Health::Right { attachment, paths })
    }

    /// The size of an attached device.
    async fn sized(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<(LocalUser, Attachment, (String, u64)), Error> {
        let user = self.leases.user(source, owner).await?;
        let user = user.filter(|user| user.attachment.is_some());
        let user = user.ok_or_else(|| Error::NotAttached { owner: owner.to_string() })?;
        let Some((attachment, device)) = self.seen(&user).await? else {
            let problem = "it is gone, or another device has its number".into();
            return Err(Error::Path { at: source.to_string(), problem });
        };
        let name = format!("{source} ({})", device.name);
        Ok((user, attachment, (name, device.size)))
    }
}

/// Which of the configured directories a path is beneath, and the rest of it.
pub fn allowed<'a>(
    settings: &'a LocalSettings,
    path: &'a HostPath,
) -> Option<(&'a Path, &'a Path)> {
    path.beneath(settings.block_roots.iter().map(std::path::PathBuf::as_path))
}

fn of(source: &Source) -> Result<&BlockSource, Error> {
    match source {
        Source::Block(source) => Ok(source),
        other => Err(Error::OtherTransport { transport: TRANSPORT, source_key: other.key() }),
    }
}

#[async_trait]
impl Connector for Local {
    async fn attach(&self, request: &AttachRequest) -> Result<Outcome<Attachment>, Error> {
        let source = of(&request.source)?;
        let span = tracing::info_span!("attach", owner = %request.owner, path = %source.path);
        Local::attach(self, request, source).instrument(span).await
    }

    async fn detach(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        let span = tracing::info_span!("detach", %owner, path = %of(source)?.path);
        async {
            let _lock = self.lock(source).await?;
            self.release(owner, source, options).await
        }
        .instrument(span)
        .await
    }

    async fn forget(&self, _: &Source, _: &Wwid) -> Result<(), Error> {
        // The host remembers nothing that lunplug had a part in: a map's memory is whoever's it was.
        Ok(())
    }

    async fn observe(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<Option<Attachment>, Error> {
        match self.leases.user(source, owner).await? {
            Some(user) => Ok(self.seen(&user).await?.map(|(attachment, _)| attachment)),
            None => Ok(None),
        }
    }

    async fn discover(&self, _: Portal, _: Authentication) -> Result<Vec<Discovered>, Error> {
        Ok(Vec::new())
    }

    async fn inspect(&self, volumes: &[(VolumeKey, Source)]) -> Vec<Result<Health, Error>> {
        let mut found = Vec::with_capacity(volumes.len());
        for (owner, source) in volumes {
            found.push(self.inspect_one(owner, source).await);
        }
        found
    }

    async fn measure(
        &self,
        owner: &VolumeKey,
        source: &Source,
        expected: Option<u64>,
    ) -> Result<Measured, Error> {
        let _lock = self.lock(source).await?;
        let measure = async {
            let (_, attachment, shows) = self.sized(owner, source).await?;
            let (before, now) = (attachment.device.size, shows.1);
            size::agreed(&[shows], before, expected)?;
            Ok(Measured { before, now })
        };
        self.doors.tracker.run(Step::Measure, measure).await
    }

    async fn grow(
        &self,
        owner: &VolumeKey,
        source: &Source,
        size: u64,
    ) -> Result<Outcome<Attachment>, Error> {
        let _lock = self.lock(source).await?;
        let grow = async {
            let (mut user, mut attachment, shows) = self.sized(owner, source).await?;
            size::agreed(&[shows], size, Some(size))?;
            let before = std::mem::replace(&mut attachment.device.size, size);
            if before == size {
                return Ok(Outcome::Already(attachment));
            }
            user.attachment = Some(attachment.clone());
            self.leases.put(source, user).await?;
            Ok(Outcome::Done(attachment))
        };
        self.doors.tracker.run(Step::GrowMap, grow).await
    }

    fn changes(&self) -> broadcast::Receiver<Arc<Touched>> {
        // Events are of no kind of source: the router has them from another connector.
        super::touched::channel().subscribe()
    }

    async fn owners(&self) -> Result<Vec<VolumeKey>, Error> {
        let all = self.leases.all().await?;
        Ok(all.into_iter().flat_map(|lease| lease.users).map(|user| user.owner).collect())
    }
}
