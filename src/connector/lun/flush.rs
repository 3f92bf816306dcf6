//! What the host has in its cache of a device is written out, and nobody may hold it: before its map and paths go.

use super::Luns;
use super::detach::Going;
use super::held::flush_lost;
use super::transport::Transport;
use crate::connector::error::Error;
use crate::connector::lease::{PathLease, Seen, User};
use crate::connector::multipath::Map;
use crate::connector::scsi::{self, Opens};
use crate::connector::{DetachOptions, multipath};
use crate::host::block::Exclusive;
use crate::host::sysfs::is_gone;
use crate::types::DevNum;

/// What came of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flushed {
    /// It was written out, and nobody had claimed it.
    Unclaimed,
    /// Somebody has claimed it.
    Held,
    /// It is gone.
    NotThere,
    /// It failed, which is to be no obstacle.
    GivenUp,
}

impl<T: Transport> Luns<T> {
    /// Writes out what the host has in its cache of the device, which nobody may hold.
    pub(super) async fn flush_device(
        &self,
        user: &User,
        map: Option<&Map>,
        made: bool,
        options: DetachOptions<'_>,
        going: &mut Going,
    ) -> Result<(), Error> {
        if let Some(map) = map.filter(|map| made && !map.slaves.is_empty())
            && going.opens(map.dev) == Opens::None
            && !options.force
            && self.flush_unclaimed(map.dev, options, going).await? == Flushed::Unclaimed
        {
            return Ok(());
        }
        match map {
            // It was disarmed before: its paths are gone, and all that was to be written is.
            Some(map) if made && map.slaves.is_empty() => {
                self.refuse_held(&map.name, &map.dir(), map.dev, going).await
            }
            Some(map) => {
                if made {
                    let free = self.refuse_held(&map.name, &map.dir(), map.dev, going).await;
                    if let Err(held) = free {
                        self.disarm(user, map, options, going).await?;
                        return Err(held);
                    }
                    going.opens.insert(map.dev, Opens::None);
                }
                if made && options.force {
                    if !self.has_live_path(map).await {
                        options.gave_up(format!(
                            "map {} has no path left: its queueing was switched off, and what waited in it failed",
                            map.name
                        ));
                    }
                    multipath::stop_queueing(&*self.doors.multipathd, &map.name).await;
                }
                self.flush(map.dev, options).await.map(drop)
            }
            None => self.flush_paths(user, options, going).await,
        }
    }

    /// Makes a map harmless that was a guest's and that somebody still holds open: it gives errors
    /// from now on, and its paths go. What is stacked upon it on this host is left alone: it never
    /// came from the guest, and is somebody's mistake to be mended.
    async fn disarm(
        &self,
        user: &User,
        map: &Map,
        options: DetachOptions<'_>,
        going: &mut Going,
    ) -> Result<(), Error> {
        let stacked = scsi::stacked(&*self.doors.sysfs, &map.dir(), &[]).await?;
        if user.attachment.is_none() || stacked.is_some() {
            return Ok(());
        }
        tracing::warn!(map = map.name, dev = %map.dev, "it is still held open after its revoke: from now on it only gives errors");
        if let Err(error) = self.doors.blocks.flush(map.dev).await {
            options.gave_up(flush_lost(map.dev, &error));
        }
        multipath::disarm(&self.doors, &self.settings, map).await?;
        self.delete_paths(user, going).await
    }

    async fn flush_paths(
        &self,
        user: &User,
        options: DetachOptions<'_>,
        going: &mut Going,
    ) -> Result<(), Error> {
        let seen = user.paths.iter().filter_map(|path| Some((path, path.seen.as_ref()?)));
        let there: Vec<_> = seen.filter(|(_, seen)| going.there.contains(&seen.dev)).collect();
        let is_unopened = |seen: &Seen| going.opens(seen.dev) == Opens::None;
        if there.iter().all(|(path, seen)| path.made && is_unopened(seen)) {
            // What was never given away has nothing of anybody's to be written out.
            let mut held = false;
            for (path, seen) in there.into_iter().filter(|_| user.attachment.is_some()) {
                match self.flush_unclaimed(seen.dev, options, going).await? {
                    Flushed::Unclaimed | Flushed::GivenUp => {}
                    Flushed::NotThere => self.tell_dead(path, seen, options).await?,
                    Flushed::Held => held = true,
                }
            }
            if !held {
                return Ok(());
            }
        }
        for path in &user.paths {
            let Some(seen) = &path.seen else { continue };
            match scsi::disk(&*self.doors.sysfs, &path.dir).await? {
                Some(disk) if disk.diskseq == seen.diskseq => {}
                _ => continue,
            }
            let block = format!("{}/block/{}", path.dir, seen.name);
            if path.made {
                // Its maps go as it goes.
                let free = self.free_path(user, path.hctl, &block, seen, going).await;
                if let Err(held @ Error::DeviceHeld { .. }) = free {
                    self.silence(user, path, seen, options).await?;
                    return Err(held);
                }
                free?;
                going.opens.insert(seen.dev, Opens::None);
            }
            self.flush_path(user, path, seen, options).await?;
        }
        Ok(())
    }

    async fn flush_path(
        &self,
        user: &User,
        path: &PathLease,
        seen: &Seen,
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        // What was never given away has nothing of anybody's to be written out.
        if user.attachment.is_some() && !self.flush(seen.dev, options).await? {
            self.tell_dead(path, seen, options).await?;
        }
        Ok(())
    }

    async fn refuse_held(
        &self,
        name: &str,
        block: &str,
        dev: DevNum,
        going: &Going,
    ) -> Result<(), Error> {
        let opens = going.opens(dev);
        match scsi::await_free(&self.doors, &self.settings, block, dev, &[], opens).await? {
            None => Ok(()),
            Some(holder) => Err(Error::DeviceHeld { device: name.into(), holder }),
        }
    }

    /// Whether it was flushed; not if it is gone, or if that is to be no obstacle.
    async fn flush(&self, dev: DevNum, options: DetachOptions<'_>) -> Result<bool, Error> {
        match self.doors.blocks.flush(dev).await {
            Ok(()) => Ok(true),
            Err(e) if is_gone(&e) => Ok(false),
            Err(error) if options.force => {
                options.gave_up(flush_lost(dev, &error));
                Ok(true)
            }
            Err(source) => Err(Error::Flush { dev, source }),
        }
    }

    /// Writes out what nobody on this host has claimed.
    async fn flush_unclaimed(
        &self,
        dev: DevNum,
        options: DetachOptions<'_>,
        going: &mut Going,
    ) -> Result<Flushed, Error> {
        match self.doors.blocks.flush_unclaimed(dev).await {
            Ok(Exclusive::Free) => {
                going.opens.insert(dev, Opens::Unheld);
                Ok(Flushed::Unclaimed)
            }
            Ok(Exclusive::Held) => Ok(Flushed::Held),
            Err(e) if is_gone(&e) => Ok(Flushed::NotThere),
            Err(error) if options.force => {
                options.gave_up(flush_lost(dev, &error));
                Ok(Flushed::GivenUp)
            }
            Err(source) => Err(Error::Flush { dev, source }),
        }
    }
}
