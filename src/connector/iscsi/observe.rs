//! What is attached, read again.

use super::Inner;
use crate::connector::error::Error;
use crate::connector::identity::{Identity, judge};
use crate::connector::lease::User;
use crate::connector::{Attachment, Expect, multipath, scsi};

impl Inner {
    /// The attachment if it is still there and is what is expected of it.
    pub(super) async fn still_right(
        &self,
        user: &User,
        expect: &Expect,
    ) -> Result<Option<Attachment>, Error> {
        let Some(found) = self.observe(user).await? else { return Ok(None) };
        let wwid = found.device.wwid.clone();
        let identity = Identity { all: vec![wwid.clone()], wwid };
        // Anything else than the same goes the long way, whose judgement names all.
        let right = judge("", expect, &identity, found.device.size).is_ok();
        Ok(right.then_some(found))
    }

    /// What a user has, read again: the device and each path by number, sequence and identity.
    pub(super) async fn observe(&self, user: &User) -> Result<Option<Attachment>, Error> {
        let Some(mut found) = user.attachment.clone() else { return Ok(None) };
        let sysfs = &*self.doors.sysfs;
        let mut there = Vec::new();
        for path in &user.paths {
            let Some(seen) = &path.seen else { continue };
            match scsi::disk(sysfs, &path.dir).await? {
                Some(disk) if disk.diskseq == seen.diskseq => {}
                _ => continue,
            }
            if scsi::raw_wwid(sysfs, &path.dir).await? != seen.wwid {
                return Ok(None);
            }
            there.extend(found.paths.iter().find(|p| p.hctl == path.hctl.to_string()).cloned());
        }
        if there.is_empty() {
            return Ok(None);
        }
        if found.device.map.is_some() {
            let Some(lease) = &user.map else { return Ok(None) };
            let map = multipath::by_uuid(sysfs, &lease.uuid).await?;
            if !map.is_some_and(|m| m.diskseq == found.diskseq && m.dev == found.device.dev) {
                return Ok(None);
            }
        }
        found.device.paths = u32::try_from(there.len()).unwrap_or(u32::MAX);
        found.paths = there;
        Ok(Some(found))
    }
}
