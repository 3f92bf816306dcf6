//! Block devices and files that are on the host already: had by path, proven, claimed, and left as they are.
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
//! and sequence number, or the file, by its inode, whatever the path leads to later. A file has no identity but its path.

mod attach;
mod detach;
mod device;
mod file;
mod lease;
mod qcow2;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::broadcast;
use tracing::Instrument;

pub(crate) use lease::{LocalLease, LocalUser, TRANSPORT};
pub use qcow2::HeaderError;

use self::device::Device;
use self::file::DiskFile;
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
use crate::spec::Source;
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

    /// What a user has, read again: the device by number, sequence and identity, the file by path and inode.
    async fn seen(
        &self,
        source: &Source,
        user: &LocalUser,
    ) -> Result<Option<(Attachment, Thing)>, Error> {
        let Some(attachment) = &user.attachment else { return Ok(None) };
        let thing = match &attachment.file {
            Some(_) => self.same_file(source, attachment).await?.map(Thing::File),
            None => self.same_device(attachment).await?.map(Thing::Device),
        };
        Ok(thing.map(|thing| (attachment.clone(), thing)))
    }

    /// The device that an attachment is of, if it is still that one.
    async fn same_device(&self, attachment: &Attachment) -> Result<Option<Device>, Error> {
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
        Ok((same && device.diskseq == attachment.diskseq).then_some(device))
    }

    async fn inspect_one(&self, owner: &VolumeKey, source: &Source) -> Result<Health, Error> {
        let Some(user) = self.leases.user(source, owner).await? else {
            return Ok(Health::Differs("nothing is attached in its name".into()));
        };
        if user.attachment.is_none() {
            return Ok(Health::Differs("its attach was not finished".into()));
        }
        let Some((attachment, thing)) = self.seen(source, &user).await? else {
            let what = if source.as_file().is_some() { "file" } else { "device" };
            return Ok(Health::Differs(format!("its {what} is gone, or is another now")));
        };
        let grown = thing.size() > attachment.device.size;
        let mut paths = Paths { wanted: 1, present: 1, grown, ..Paths::default() };
        match &thing {
            Thing::File(disk) => (paths.living, paths.protected) = (1, disk.seen.read_only),
            Thing::Device(device) => {
                let sysfs = &*self.doors.sysfs;
                paths.protected = scsi::is_protected(sysfs, &device.dir).await?;
                match device::state(sysfs, device).await? {
                    Some(state) => paths.dead.push(format!("{} is {state}", device.name)),
                    None => paths.living = 1,
                }
            }
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
        let Some((attachment, thing)) = self.seen(source, &user).await? else {
            let problem = "it is gone, or another has its place".into();
            return Err(Error::Path { at: source.to_string(), problem });
        };
        let name = match &thing {
            Thing::Device(device) => format!("{source} ({})", device.name),
            Thing::File(_) => source.to_string(),
        };
        Ok((user, attachment, (name, thing.size())))
    }
}

/// What a volume was given, as it is now.
enum Thing {
    Device(Device),
    File(DiskFile),
}

impl Thing {
    /// The size of the disk, in bytes.
    fn size(&self) -> u64 {
        match self {
            Self::Device(device) => device.size,
            Self::File(file) => file.size,
        }
    }
}

/// Which of the configured directories a source is beneath, and the rest of its path.
pub fn allowed<'a>(
    settings: &'a LocalSettings,
    source: &'a Source,
) -> Option<(&'a Path, &'a Path)> {
    let roots = match source {
        Source::Block(_) => &settings.block_roots,
        Source::File(_) => &settings.file_roots,
        Source::Iscsi(_) | Source::Fc(_) => return None,
    };
    source.host_path()?.beneath(roots.iter().map(std::path::PathBuf::as_path))
}

/// The setting that names those directories.
pub fn roots_setting(source: &Source) -> &'static str {
    if source.as_file().is_some() { "local.file_roots" } else { "local.block_roots" }
}

fn not_local(source: &Source) -> Error {
    Error::OtherTransport { transport: TRANSPORT, source_key: source.key() }
}

fn path_of(source: &Source) -> Result<&HostPath, Error> {
    source.host_path().ok_or_else(|| not_local(source))
}

#[async_trait]
impl Connector for Local {
    async fn attach(&self, request: &AttachRequest) -> Result<Outcome<Attachment>, Error> {
        let path = path_of(&request.source)?;
        let span = tracing::info_span!("attach", owner = %request.owner, %path);
        Local::attach(self, request).instrument(span).await
    }

    async fn detach(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        let span = tracing::info_span!("detach", %owner, path = %path_of(source)?);
        async {
            // It has nothing to read that takes long.
            options.released().await?;
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
            Some(user) => Ok(self.seen(source, &user).await?.map(|(attachment, _)| attachment)),
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
