//! An attached volume whose LUN has grown: its paths measured, its map grown.

use super::Luns;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::lease::User;
use crate::connector::mapchange;
use crate::connector::multipath::Map;
use crate::connector::size::{self, Member, PathName};
use crate::connector::{Attachment, Measured, health, scsi};
use crate::step::Step;
use crate::types::{DevNum, Outcome, VolumeKey};

impl<T: Transport> Luns<T> {
    /// See [`crate::connector::Connector::measure`].
    pub(super) async fn measure(
        &self,
        owner: &VolumeKey,
        source: &T::Source,
        expected: Option<u64>,
    ) -> Result<Measured, Error> {
        let _lun = self.lun_lock(&T::targets(source)).await?;
        let (user, attachment) = self.attached_to(owner, source).await?;
        let (map, members) = self.members(&user, &attachment).await?;
        let measure = async {
            let sysfs = &*self.doors.sysfs;
            let maps: Vec<DevNum> = map.iter().map(|map| map.dev).collect();
            let failed = health::failed_paths(&*self.doors.blocks, &maps).await;
            let failed = failed.into_iter().next().unwrap_or_default();
            let sizes = size::measure(sysfs, members, &attachment.device.wwid, &failed).await?;
            let before = attachment.device.size;
            let now = size::agreed(&sizes, before, expected)?;
            // A map that lost its last path meanwhile.
            let now = now.ok_or_else(|| no_path(&attachment))?;
            Ok(Measured { before, now })
        };
        self.doors.tracker.run(Step::Measure, measure).await
    }

    /// See [`crate::connector::Connector::grow`].
    pub(super) async fn grow(
        &self,
        owner: &VolumeKey,
        source: &T::Source,
        size: u64,
    ) -> Result<Outcome<Attachment>, Error> {
        let _lun = self.lun_lock(&T::targets(source)).await?;
        let (user, attachment) = self.attached_to(owner, source).await?;
        let (map, members) = self.members(&user, &attachment).await?;
        self.doors
            .tracker
            .run(Step::GrowMap, self.grown(owner, source, &attachment, map, &members, size))
            .await
    }

    async fn grown(
        &self,
        owner: &VolumeKey,
        source: &T::Source,
        attachment: &Attachment,
        map: Option<Map>,
        members: &[Member],
        size: u64,
    ) -> Result<Outcome<Attachment>, Error> {
        let sysfs = &*self.doors.sysfs;
        let mut sizes = Vec::new();
        for member in members {
            // They were measured just now; one that came since is new, and so is its size.
            let disk = scsi::disk(sysfs, &member.dir).await?;
            sizes.push((member.path.clone(), disk.map_or(0, |d| d.size)));
        }
        size::agreed(&sizes, size, Some(size))?;
        let mut changed = false;
        if let Some(map) = map.filter(|map| map.size != size) {
            let wwid = &attachment.device.wwid;
            mapchange::resize(&self.doors, &self.settings, &map, wwid, size).await?;
            changed = true;
        }
        let note = |user: &mut User| {
            let attachment = user.attachment.as_mut()?;
            let before = std::mem::replace(&mut attachment.device.size, size);
            Some((attachment.clone(), before != size))
        };
        let noted = self.change(owner, &T::targets(source)[0], note).await?.flatten();
        let Some((attachment, noted)) = noted else { return Err(not_attached(owner)) };
        Ok(if changed || noted { Outcome::Done(attachment) } else { Outcome::Already(attachment) })
    }

    async fn attached_to(
        &self,
        owner: &VolumeKey,
        source: &T::Source,
    ) -> Result<(User, Attachment), Error> {
        let user = self.held(owner, &T::targets(source)).await?;
        let found = user.and_then(|user| user.attachment.clone().map(|found| (user, found)));
        found.ok_or_else(|| not_attached(owner))
    }

    /// The map of an attachment, proven to be the one that was handed out, and the paths that have to
    /// be measured: all of the map, or the one that there is.
    async fn members(
        &self,
        user: &User,
        attachment: &Attachment,
    ) -> Result<(Option<Map>, Vec<Member>), Error> {
        let known = user.paths.iter().filter_map(|path| {
            let seen = path.seen.as_ref()?;
            let name = PathName { hctl: path.hctl, name: seen.name.clone() };
            Some((
                seen.dev,
                Member { path: name, dir: path.dir.clone(), diskseq: Some(seen.diskseq) },
            ))
        });
        if attachment.device.map.is_none() {
            let one = known.filter(|(dev, _)| *dev == attachment.device.dev);
            let members: Vec<Member> = one.map(|(_, member)| member).collect();
            return if members.is_empty() { Err(no_path(attachment)) } else { Ok((None, members)) };
        }
        let uuid = user.map.as_ref().map(|m| m.uuid.as_str()).unwrap_or_default();
        let map = self.map_at(attachment).await?;
        let map = map.filter(|m| m.uuid == uuid && m.diskseq == attachment.diskseq);
        let map = map.ok_or_else(|| no_map(attachment))?;
        let known: Vec<Member> = known.map(|(_, member)| member).collect();
        let members = size::members_of(&*self.doors.sysfs, &map, &known).await?;
        if members.is_empty() {
            return Err(no_path(attachment));
        }
        Ok((Some(map), members))
    }
}

fn not_attached(owner: &VolumeKey) -> Error {
    Error::NotAttached { owner: owner.to_string() }
}

fn no_map(attachment: &Attachment) -> Error {
    let wwid = attachment.device.wwid.clone();
    Error::Map { wwid, problem: "that the guest was given is gone".into() }
}

fn no_path(attachment: &Attachment) -> Error {
    let at = attachment.device.dev.to_string();
    Error::Path { at, problem: "it has no path now, so its size cannot be read".into() }
}
