//! The way back: flushed, and let go of. Also the undoing of a failed attach.

use super::Local;
use super::device;
use super::lease::LocalUser;
use crate::connector::error::{Error, chain};
use crate::connector::{Attachment, DetachOptions, scsi};
use crate::host::local::SourceError;
use crate::host::sysfs::is_gone;
use crate::spec::Source;
use crate::step::Step;
use crate::types::{Outcome, VolumeKey};

impl Local {
    /// Lets go of whatever is there in the owner's name. The source's lock is held by the caller.
    pub(super) async fn release(
        &self,
        owner: &VolumeKey,
        source: &Source,
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        let Some(user) = self.leases.user(source, owner).await? else {
            return Ok(Outcome::Already(()));
        };
        let tracker = &self.doors.tracker;
        // What was never given away has nothing of anybody's to be written out.
        if user.attachment.is_some() {
            tracker.run(Step::Flush, self.flush(source, &user, options)).await?;
        }
        if let Some(found) = &user.found {
            tracker.run(Step::Unclaim, self.claims.unclaim(&found.wwid, owner)).await?;
        }
        tracker.run(Step::Unlease, self.leases.remove(source, owner)).await?;
        Ok(Outcome::Done(()))
    }

    /// Writes out what the host has in its cache of the device, which nobody may hold unless it is shared.
    async fn flush(
        &self,
        source: &Source,
        user: &LocalUser,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let Some(attachment) = &user.attachment else { return Ok(()) };
        if attachment.file.is_some() {
            return self.flush_file(source, user, attachment, options).await;
        }
        let (sysfs, dev) = (&*self.doors.sysfs, attachment.device.dev);
        let device = device::read(sysfs, dev).await?;
        let Some(device) = device.filter(|d| d.diskseq == attachment.diskseq) else {
            return Ok(()); // Whoever attached it to the host has taken it away.
        };
        if !self.is_shared(&user.owner, source).await? {
            let (doors, settings) = (&self.doors, &self.settings);
            let held = scsi::await_unheld(doors, settings, &device.dir, dev, &[]).await?;
            if let Some(holder) = held {
                let error = Error::DeviceHeld { device: device.name, holder };
                if !options.force {
                    return Err(error);
                }
                // It is not lunplug's, so it cannot be made harmless.
                options.gave_up(format!("{error}: it was left as it is"));
            }
        }
        match self.doors.blocks.flush(dev).await {
            Ok(()) => Ok(()),
            Err(e) if is_gone(&e) => Ok(()),
            Err(error) if options.force => {
                options.gave_up(format!("the flush of {dev} failed: {error}: what the host's cache had of it may be lost"));
                Ok(())
            }
            Err(source) => Err(Error::Flush { dev, source }),
        }
    }

    /// The same of a file.
    async fn flush_file(
        &self,
        source: &Source,
        user: &LocalUser,
        attachment: &Attachment,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let path = source.host_path().map(ToString::to_string).unwrap_or_default();
        let flushed = async {
            let Some(disk) = self.same_file(source, attachment).await? else {
                return Ok(()); // Whoever it belongs to has removed it, or put another in its place.
            };
            if disk.seen.locked && !self.is_shared(&user.owner, source).await? {
                let holder = "a process that has locked it as QEMU does".into();
                return Err(Error::DeviceHeld { device: path.clone(), holder });
            }
            match self.doors.local.sync(&disk.file).await {
                Ok(()) | Err(SourceError::NotThere(_) | SourceError::Exchanged(_)) => Ok(()),
                Err(source) => Err(Error::FlushFile { path, source }),
            }
        };
        match flushed.await {
            Err(error) if options.force => {
                options.gave_up(format!("{}: it was left as it is", chain(&error)));
                Ok(())
            }
            other => other,
        }
    }

    /// Whether somebody else has the device, too.
    pub(super) async fn is_shared(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<bool, Error> {
        let Some(user) = self.leases.user(source, owner).await? else { return Ok(false) };
        let Some(found) = user.found else { return Ok(false) };
        let has = |u: &LocalUser| {
            let same = u.found.as_ref().is_some_and(|f| f.is_same(&found));
            u.owner != *owner && u.attachment.is_some() && same
        };
        let all = self.leases.all().await?;
        Ok(all.iter().flat_map(|lease| &lease.users).any(has))
    }
}
