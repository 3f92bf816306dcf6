//! The way back: flushed, and let go of. Also the undoing of a failed attach.

use super::Local;
use super::device;
use super::lease::LocalUser;
use crate::connector::error::Error;
use crate::connector::{DetachOptions, scsi};
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

    /// Whether somebody else has the device, too.
    pub(super) async fn is_shared(
        &self,
        owner: &VolumeKey,
        source: &Source,
    ) -> Result<bool, Error> {
        let Some(user) = self.leases.user(source, owner).await? else { return Ok(false) };
        let Some(found) = user.found else { return Ok(false) };
        let has = |u: &LocalUser| {
            let same = |f: &super::lease::Found| (f.dev, f.diskseq) == (found.dev, found.diskseq);
            u.owner != *owner && u.attachment.is_some() && u.found.as_ref().is_some_and(same)
        };
        let all = self.leases.all().await?;
        Ok(all.iter().flat_map(|lease| &lease.users).any(has))
    }
}
