//! The way of an attach: lease, device, claim; each is noted before it is made.

use super::device::{self, Device, known_by};
use super::lease::{Found, LocalUser, TRANSPORT};
use super::{Local, allowed, not_local, roots_setting};
use crate::connector::error::Error;
use crate::connector::identity::{Identity, judge};
use crate::connector::lease::Claim;
use crate::connector::settings::{WithoutIdentity, ms};
use crate::connector::{AttachRequest, Attachment, DetachOptions, Expect, scsi};
use crate::spec::{BlockSource, DeviceStatus, MultipathPolicy, Source};
use crate::step::Step;
use crate::types::{Outcome, Wwid};

impl Local {
    /// Attaches a device, or finds it attached; what this attach made is undone when it fails.
    pub(super) async fn attach(
        &self,
        request: &AttachRequest,
    ) -> Result<Outcome<Attachment>, Error> {
        let _lock = self.lock(&request.source).await?;
        let before = self.leases.user(&request.source, &request.owner).await?;
        if let Some(user) = &before
            && let Some((found, _)) = self.seen(&request.source, user).await?
            && self.is_expected(&found, &request.expect)
        {
            return Ok(Outcome::Already(found));
        }
        // What a guest may have in use is not undone because looking at it again failed.
        let in_use = before.as_ref().is_some_and(|user| user.attachment.is_some());
        match self.build(request, before).await {
            Ok(attachment) => Ok(Outcome::Done(attachment)),
            Err(cause) if in_use => Err(cause),
            Err(cause) => {
                let force = DetachOptions { force: true, ..DetachOptions::default() };
                match self.release(&request.owner, &request.source, force).await {
                    Ok(_) => Err(cause),
                    Err(undo) => Err(Error::Undo { cause: Box::new(cause), undo: Box::new(undo) }),
                }
            }
        }
    }

    /// Whether what is attached is what a request expects. Its size was judged when it was attached, and may
    /// have grown since; anything else than the same goes the long way, whose judgement names all.
    fn is_expected(&self, found: &Attachment, expect: &Expect) -> bool {
        let expect = Expect { size: None, ..expect.clone() };
        judge("", &expect, &known_by(found.device.wwid.clone()), found.device.size).is_ok()
    }

    async fn build(
        &self,
        request: &AttachRequest,
        before: Option<LocalUser>,
    ) -> Result<Attachment, Error> {
        if request.multipath == MultipathPolicy::Required {
            let path = request.source.host_path().map(ToString::to_string).unwrap_or_default();
            let rule = "no map is made of what is on the host: give the path of the map";
            return Err(Error::NoMapOfLocal { path, rule });
        }
        let mut user = LocalUser {
            owner: request.owner.clone(),
            shareable: request.shareable,
            found: before.as_ref().and_then(|user| user.found.clone()),
            attachment: before.and_then(|user| user.attachment),
            step: Some(Step::Lease),
        };
        let lease = self.leases.put(&request.source, user.clone());
        self.doors.tracker.run(Step::Lease, lease).await?;
        let attachment = match &request.source {
            Source::Block(source) => self.take_device(request, source, &mut user).await?,
            Source::File(source) => self.take_file(request, source, &mut user).await?,
            other => return Err(not_local(other)),
        };
        user.attachment = Some(attachment.clone());
        user.step = Some(Step::Remember);
        self.leases.put(&request.source, user).await?;
        Ok(attachment)
    }

    /// Proves that the device may be had, and claims it for the user.
    async fn take_device(
        &self,
        request: &AttachRequest,
        source: &BlockSource,
        user: &mut LocalUser,
    ) -> Result<Attachment, Error> {
        let tracker = &self.doors.tracker;
        let in_use = user.attachment.is_some();
        let found = self.prove(request, source);
        let (device, identity) = tracker.run(Step::Identity, found).await?;
        tracker.run(Step::Claim, self.claim(request, user, &device, &identity)).await?;
        if !request.read_only && scsi::is_protected(&*self.doors.sysfs, &device.dir).await? {
            let device = at(source, &device);
            return Err(Error::ReadOnly { device, hint: " on the node" });
        }
        self.refuse_holders(request, source, &device, in_use).await?;
        Ok(Attachment {
            device: DeviceStatus {
                dev: device.dev,
                wwid: identity.wwid,
                size: device.size,
                map: None,
                paths: 1,
            },
            diskseq: device.diskseq,
            paths: Vec::new(),
            file: None,
        })
    }

    /// Finds the device, has it read anew where it is a LUN, and judges it.
    async fn prove(
        &self,
        request: &AttachRequest,
        source: &BlockSource,
    ) -> Result<(Device, Identity), Error> {
        let Some((root, rest)) = allowed(&self.settings.local, &request.source) else {
            let setting = roots_setting(&request.source);
            return Err(Error::NotAllowed { path: source.path.to_string(), setting });
        };
        let dev = self.doors.local.block(root, rest).await?;
        let sysfs = &*self.doors.sysfs;
        if let Some((device, _)) = device::disk_of(sysfs, &format!("dev/block/{dev}")).await? {
            return Err(Error::Partition { device });
        }
        // A node whose device is gone, or has no medium.
        let none = || Error::NoDevice { path: source.path.to_string(), dev };
        let device = device::read(sysfs, dev).await?.filter(|d| d.size > 0).ok_or_else(none)?;
        device::refresh(sysfs, &device).await?;
        let shown = at(source, &device);
        // Its size may be another one now.
        let again = device::read(sysfs, dev).await?;
        let again = again.filter(|d| d.diskseq == device.diskseq && d.size > 0);
        let device = again.ok_or_else(none)?;
        let identity = match device::identity(sysfs, &device, &shown).await? {
            Some(identity) => identity,
            None if self.settings.local.without_identity == WithoutIdentity::Path => {
                let path = format!("path.{}", source.path).parse();
                // A path of a source is within what an identity may be.
                known_by(path.map_err(|_| Error::NoIdentity { device: shown.clone() })?)
            }
            None => return Err(Error::NoIdentity { device: shown }),
        };
        judge(&shown, &request.expect, &identity, device.size)?;
        Ok((device, identity))
    }

    /// Claims the identity for the owner: the same device may come by another path, and a LUN by a transport.
    async fn claim(
        &self,
        request: &AttachRequest,
        user: &mut LocalUser,
        device: &Device,
        identity: &Identity,
    ) -> Result<(), Error> {
        let wwid = identity.wwid.clone();
        let (dev, diskseq) = (device.dev, device.diskseq);
        let found = Found { wwid: wwid.clone(), dev, diskseq, file: None };
        // In the lease first, so that a detach finds the claim whatever happens in between.
        user.step = Some(Step::Claim);
        let before = user.found.replace(found.clone());
        if wwid.is_path() {
            self.claim_unproven(request, user, &found).await?;
        } else {
            self.leases.put(&request.source, user.clone()).await?;
        }
        if let Some(other) = before.filter(|b| b.wwid != wwid) {
            self.claims.unclaim(&other.wwid, &request.owner).await?;
        }
        let claim = Claim {
            owner: request.owner.clone(),
            transport: TRANSPORT.into(),
            target: request.source.key(),
            shareable: request.shareable,
        };
        self.claims.claim(&wwid, claim, async |c| self.is_live(&c, &wwid).await).await
    }

    /// Two paths to a device without an identity have nothing in common but its number, and two to a file its inode:
    /// noted and compared under one lock.
    pub(super) async fn claim_unproven(
        &self,
        request: &AttachRequest,
        user: &LocalUser,
        found: &Found,
    ) -> Result<(), Error> {
        let wait = ms(self.settings.lock_ms);
        let _guard = self.doors.rundir.lock("locks/local-unproven", wait).await?;
        let all = self.leases.all().await?;
        let same = |u: &&LocalUser| {
            u.owner != user.owner && u.found.as_ref().is_some_and(|f| f.is_same(found))
        };
        let other = all.iter().flat_map(|lease| &lease.users).find(same);
        if let Some(other) = other.filter(|o| !(o.shareable && user.shareable)) {
            let (wwid, owner) = (found.wwid.clone(), other.owner.to_string());
            return Err(Error::SourceInUse { wwid, owner });
        }
        self.leases.put(&request.source, user.clone()).await
    }

    /// Whether a claim is of somebody who has the device; others' leases are not read here.
    pub(super) async fn is_live(&self, claim: &Claim, wwid: &Wwid) -> Result<bool, Error> {
        if claim.transport != TRANSPORT {
            return Ok(true);
        }
        let users = self.leases.users(&claim.target).await?;
        let has = |u: &LocalUser| u.found.as_ref().is_none_or(|found| found.wwid == *wwid);
        Ok(users.iter().any(|u| u.owner == claim.owner && has(u)))
    }

    /// Nobody on the host may hold it, and it may not lie on what another volume has. A guest may have it open
    /// where it is shared, or was attached before; nothing may be stacked on it even then.
    async fn refuse_holders(
        &self,
        request: &AttachRequest,
        source: &BlockSource,
        device: &Device,
        attached: bool,
    ) -> Result<(), Error> {
        let sysfs = &*self.doors.sysfs;
        for (name, wwid) in device::below(sysfs, device).await? {
            let claims = self.claims.claimed_by_others(&wwid, &request.owner).await?;
            if let Some(other) = claims.first() {
                let device = format!("{name} ({wwid}), on which {} lies,", source.path);
                return Err(Error::DeviceHeld { device, holder: other.owner.to_string() });
            }
        }
        let in_use = attached || self.is_shared(&request.owner, &request.source).await?;
        let holder = if in_use {
            scsi::stacked(sysfs, &device.dir, &[]).await?
        } else {
            scsi::await_unheld(&self.doors, &self.settings, &device.dir, device.dev, &[]).await?
        };
        if let Some(holder) = holder {
            return Err(Error::DeviceHeld { device: at(source, device), holder });
        }
        if !in_use {
            // A device that cannot be opened has shown no holder either.
            let opened = self.doors.blocks.exclusive(device.dev).await;
            let opening = format!("opening {} exclusively", at(source, device));
            opened.map_err(Error::io(opening))?;
        }
        Ok(())
    }
}

/// A device in words: `/dev/vg/data (dm-3)`.
pub(super) fn at(source: &BlockSource, device: &Device) -> String {
    format!("{} ({})", source.path, device.name)
}
