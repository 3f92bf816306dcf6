//! What is attached, read again.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join_all;

use super::Luns;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::health::failed_paths;
use crate::connector::identity::{Identity, Unit, judge};
use crate::connector::lease::{PathLease, Seen, User};
use crate::connector::multipath::Map;
use crate::connector::{Attachment, Expect, Health, Paths, multipath, scsi};
use crate::host::sysfs::{ReadError, View};
use crate::types::{DevNum, VmId};

impl<T: Transport> Luns<T> {
    /// The attachment if it is still there and is what is expected of it.
    pub(super) async fn still_right(
        &self,
        user: &User,
        expect: &Expect,
    ) -> Result<Option<Attachment>, Error> {
        let Some(found) = self.observe(user).await? else { return Ok(None) };
        let wwid = found.device.wwid.clone();
        let identity = Identity { all: vec![wwid.clone()], wwid, unit: Unit::default() };
        // Its size was judged when it was attached. Since then the LUN may have grown, and an expand
        // that was cut off may have noted so in one place and not yet in another.
        let expect = Expect { size: None, ..expect.clone() };
        // Anything else than the same goes the long way, whose judgement names all.
        let right = judge("", &expect, &identity, found.device.size).is_ok();
        Ok(right.then_some(found))
    }

    /// What a user has, read again: the device and each path by number, sequence and identity.
    pub(super) async fn observe(&self, user: &User) -> Result<Option<Attachment>, Error> {
        let Some(mut found) = user.attachment.clone() else { return Ok(None) };
        let sysfs = &*self.doors.sysfs;
        let mut there = Vec::new();
        for path in &user.paths {
            let Some(seen) = &path.seen else { continue };
            match scsi::present(sysfs, &path.dir).await? {
                Some(now) if now.disk.diskseq != seen.diskseq => continue,
                Some(now) if now.raw_wwid != seen.wwid => return Ok(None),
                Some(_) => {}
                None => continue,
            }
            there.extend(found.paths.iter().find(|p| p.hctl == path.hctl.to_string()).cloned());
        }
        if there.is_empty() {
            return Ok(None);
        }
        if found.device.map.is_some() {
            let Some(lease) = &user.map else { return Ok(None) };
            // By its number, not by its uuid: a node has thousands of maps.
            let map = self.map_at(&found).await?;
            if !map.is_some_and(|m| m.uuid == lease.uuid && m.diskseq == found.diskseq) {
                return Ok(None);
            }
        }
        found.device.paths = u32::try_from(there.len()).unwrap_or(u32::MAX);
        found.paths = there;
        Ok(Some(found))
    }

    /// How users' volumes are, in their order: their maps, and each path by number, sequence, identity and state.
    pub(super) async fn inspect_each(
        &self,
        vm: &VmId,
        held: Vec<Result<Option<User>, Error>>,
    ) -> Vec<Result<Health, Error>> {
        let asked: Vec<_> =
            held.iter().map(|held| Asked::of(held.as_ref().ok()?.as_ref()?)).collect();
        let shown = self.shown_each(vm, asked.into_iter().flatten().collect()).await;
        // Of those alone that have it still.
        let maps = shown.iter().map(|shown| shown.as_ref().ok()?.map());
        let maps: Vec<Option<DevNum>> = maps.collect();
        let known: Vec<DevNum> = maps.iter().flatten().copied().collect();
        let mut failed = failed_paths(&*self.doors.blocks, &known).await.into_iter();
        let failed = maps.iter().map(|map| map.and_then(|_| failed.next()).unwrap_or_default());
        let mut shown = shown.into_iter().zip(failed);
        let mut judge = |held: Result<Option<User>, Error>| {
            let differs = |why: &str| Ok(Health::Differs(why.into()));
            let Some(user) = held? else { return differs("nothing is attached in its name") };
            let Some(attachment) = user.attachment.clone() else {
                return differs("its attach was not finished");
            };
            // There is one for each that has an attachment.
            let Some((shown, failed)) = shown.next() else {
                return differs("nobody has looked at it");
            };
            Ok(judge_health(&user, attachment, shown?, &failed))
        };
        held.into_iter().map(&mut judge).collect()
    }

    /// What /sys shows of volumes of a VM. All are read in one; where that does not return in time each is by itself, so
    /// that one whose device is kept by the kernel is no other's trouble.
    async fn shown_each(&self, vm: &VmId, asked: Vec<Asked>) -> Vec<Result<Shown, ReadError>> {
        let asked: Arc<[Asked]> = asked.into();
        if asked.len() > 1 {
            let all = asked.clone();
            let look = move |view: &View<'_>| Ok(all.iter().map(|a| a.read(view)).collect());
            if let Ok(shown) = self.doors.sysfs.look(&format!("volumes of {vm}"), look).await {
                return shown;
            }
        }
        join_all((0..asked.len()).map(async |at| {
            let (about, asked) = (format!("dev/block/{}", asked[at].dev), asked.clone());
            self.doors.sysfs.look(&about, move |view| asked[at].read(view)).await
        }))
        .await
    }

    /// The map that has the attachment's number now.
    pub(super) async fn map_at(&self, attachment: &Attachment) -> Result<Option<Map>, Error> {
        multipath::by_number(&*self.doors.sysfs, attachment.device.dev).await
    }
}

/// What is to be seen of a volume. A sequence number is given once in a boot: what has that of then is what was proven
/// then, and of that only what may have changed is read.
struct Asked {
    dev: DevNum,
    diskseq: u64,
    has_map: bool,
    paths: Vec<(PathLease, Seen)>,
}

/// What is.
struct Shown {
    dev: DevNum,
    /// What its map has beneath it; `None` where the map has gone, or there was to be none.
    slaves: Option<Vec<String>>,
    paths: Vec<Found>,
    protected: bool,
}

impl Shown {
    /// The number of its map, where it has one.
    fn map(&self) -> Option<DevNum> {
        self.slaves.as_ref().map(|_| self.dev)
    }
}

/// A path that is to be there, and what is.
struct Found {
    path: PathLease,
    seen: Seen,
    now: Option<Now>,
}

/// What may have changed of a path.
struct Now {
    /// Bytes.
    size: u64,
    raw_wwid: String,
    state: String,
}

impl Asked {
    /// Nothing, where its attach was not finished.
    fn of(user: &User) -> Option<Self> {
        let device = &user.attachment.as_ref()?.device;
        let seen = |p: &PathLease| Some((p.clone(), p.seen.clone()?));
        let mut paths: Vec<_> = user.paths.iter().filter_map(seen).collect();
        paths.sort_by_key(|(path, _)| path.hctl);
        let diskseq = user.attachment.as_ref()?.diskseq;
        Some(Self { dev: device.dev, diskseq, has_map: device.map.is_some(), paths })
    }

    fn read(&self, view: &View<'_>) -> Result<Shown, ReadError> {
        let device = format!("dev/block/{}", self.dev);
        let slaves = match self.has_map && is_still(view, &device, self.diskseq)? {
            true => Some(view.entries(&format!("{device}/slaves"))?),
            false => None,
        };
        let found = |(path, seen): &(PathLease, Seen)| {
            let now = Now::read(view, path, seen)?;
            Ok(Found { path: path.clone(), seen: seen.clone(), now })
        };
        let paths = self.paths.iter().map(found).collect::<Result<_, _>>()?;
        let protected = scsi::is_protected_in(view, &device)?;
        Ok(Shown { dev: self.dev, slaves, paths, protected })
    }
}

impl Now {
    /// `None` where the path has gone, or another is at its place.
    fn read(view: &View<'_>, path: &PathLease, seen: &Seen) -> Result<Option<Self>, ReadError> {
        let block = format!("{}/block/{}", path.dir, seen.name);
        if !is_still(view, &block, seen.diskseq)? {
            return Ok(None);
        }
        let raw_wwid = scsi::raw_wwid_in(view, &path.dir)?;
        let state = view.text(&format!("{}/state", path.dir))?.unwrap_or_default();
        let size = scsi::size_in(view, &block)?;
        Ok(size.map(|size| Self { size, raw_wwid, state }))
    }
}

/// Whether a block device is the one that had this sequence number.
fn is_still(view: &View<'_>, block_dir: &str, diskseq: u64) -> Result<bool, ReadError> {
    let now = view.text(&format!("{block_dir}/diskseq"))?;
    Ok(now.and_then(|now| now.parse().ok()) == Some(diskseq))
}

fn judge_health(
    user: &User,
    attachment: Attachment,
    shown: Shown,
    failed: &BTreeSet<DevNum>,
) -> Health {
    let Shown { slaves, paths: found, protected, .. } = shown;
    if let Some(name) = &attachment.device.map
        && slaves.is_none()
    {
        return Health::Differs(format!("its map {name} is gone"));
    }
    let mut paths = Paths { wanted: 1, protected, ..Paths::default() };
    if slaves.is_some() {
        paths.wanted = u32::try_from(user.routes.len()).unwrap_or(u32::MAX);
    }
    for Found { path, seen, now } in found {
        let hctl = path.hctl.to_string();
        let Some(now) = now else {
            paths.dead.push(format!("{hctl} ({}) is gone", seen.name));
            continue;
        };
        paths.grown |= now.size > attachment.device.size;
        if now.raw_wwid != seen.wwid {
            return Health::Differs(format!("{hctl} ({}) shows another LUN", seen.name));
        }
        if slaves.as_ref().is_some_and(|slaves| !slaves.contains(&seen.name)) {
            paths.dead.push(format!("{hctl} ({}) is not in the map", seen.name));
            continue;
        }
        paths.present += 1;
        match now.state.as_str() {
            "running" if !failed.contains(&seen.dev) => paths.living += 1,
            "running" => paths.dead.push(format!("{hctl} ({}) has failed", seen.name)),
            other => paths.dead.push(format!("{hctl} ({}) is {other}", seen.name)),
        }
    }
    if slaves.is_none() && paths.present == 0 {
        return Health::Differs("its device is gone".into());
    }
    Health::Right { attachment, paths }
}
