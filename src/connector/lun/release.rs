//! The way back: device, lease, ways, records. Also the undoing of a failed attach.

use super::Luns;
use super::access::Access;
use super::transport::Transport;
use crate::connector::DetachOptions;
use crate::connector::error::Error;
use crate::connector::lease::{Claim, Made as _, MapLease, User};
use crate::step::Step;
use crate::types::{Outcome, VolumeKey};

impl<T: Transport> Luns<T> {
    /// Lets go of whatever is there in the owner's name. The LUN's lock is held by the caller.
    pub(super) async fn release(
        &self,
        owner: &VolumeKey,
        targets: &[Access<T>],
        options: DetachOptions<'_>,
    ) -> Result<Outcome, Error> {
        let user = self.held(owner, targets).await?;
        match &user {
            Some(user) => {
                self.let_go(user, targets, options).await?;
                let tracker = &self.doors.tracker;
                if let Some(wwid) = &user.wwid {
                    tracker.run(Step::Unclaim, self.leases.unclaim(wwid, owner)).await?;
                }
                // The first one knows the whole, so it is left last.
                for at in targets.iter().rev() {
                    let leave = self.leases.remove::<T::Made>(at.lease(), owner, at.lun);
                    tracker.run(Step::Unlease, leave).await?;
                }
            }
            None => options.released_soon().await?,
        }
        let mut changed = user.is_some();
        let mut failed = None;
        for at in targets {
            let leave = async {
                if user.is_none() {
                    // The file of a target whose first user had none yet, or whose last had gone.
                    self.leases.remove::<T::Made>(at.lease(), owner, at.lun).await?;
                }
                T::leave(self, at).await
            };
            // One target's trouble must not keep what is left at the others.
            match leave.await {
                Ok(settled) => changed |= settled,
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        match failed {
            Some(error) => Err(error),
            None if changed => Ok(Outcome::Done(())),
            None => Ok(Outcome::Already(())),
        }
    }

    /// Takes away the device, or, where others have the LUN too, what of it is this volume's alone.
    async fn let_go(
        &self,
        user: &User,
        targets: &[Access<T>],
        options: DetachOptions<'_>,
    ) -> Result<(), Error> {
        let owner = &user.owner;
        let (mut alone, mut spare, mut shared) = (Vec::new(), Vec::new(), false);
        for at in targets {
            let (mine, others) =
                self.leases.user_and_others::<T::Made>(at.lease(), owner, at.lun).await?;
            if others.is_empty() {
                alone.extend(mine);
                continue;
            }
            shared = true;
            // What an attach that failed made beside the others' paths is nobody's; else it is left to them.
            if user.attachment.is_none() {
                spare.extend(mine.map(|mine| (at, mine.without_paths_of(&others))));
            }
        }
        let sharers = self.sharers(owner, user.wwid.as_ref()).await?;
        let looked = self.look_over(user, user.map.is_none()).await?;
        options.released_soon().await?;
        if !shared && sharers.is_empty() {
            let map = self.noted_map(&targets[0], user, looked.above).await?;
            return self.remove_device(user, map, looked.there, options).await;
        }
        self.pass_map(user, &sharers).await?;
        alone.extend(spare.iter().map(|(_, mine)| mine.clone()));
        let Some(mine) = User::joined(&alone) else { return Ok(()) };
        // Out of a map, which goes on with the others' paths; what was given away without one is flushed.
        let attachment = user.attachment.clone().filter(|a| a.device.map.is_none());
        let mine = User { map: None, attachment, ..mine };
        let looked = self.look_over(&mine, true).await?;
        self.remove_device(&mine, looked.above, looked.there, options).await?;
        for (at, gone) in spare {
            let forget = |user: &mut User| user.paths.retain(|p| !gone.paths.contains(p));
            self.change(owner, at, forget).await?;
        }
        Ok(())
    }

    /// Leaves the map to one of those who have the LUN too; the last of them removes it.
    async fn pass_map(&self, user: &User, sharers: &[Claim]) -> Result<(), Error> {
        let Some(heir) = sharers.iter().find(|c| c.transport == <T::Made>::TRANSPORT) else {
            return Ok(());
        };
        self.leases.leave_map::<T::Made>(&heir.target, &heir.owner, user.map.as_ref()).await
    }

    /// The map above a volume's paths. One that multipathd made unseen (`above`) is entered into the lease: once it and they
    /// are gone, that alone tells a successor what multipath has yet to forget.
    async fn noted_map(
        &self,
        first: &Access<T>,
        user: &User,
        above: Option<MapLease>,
    ) -> Result<Option<MapLease>, Error> {
        if user.map.is_some() {
            return Ok(user.map.clone()); // One of its leases has it.
        }
        if let Some(map) = above.clone() {
            self.change(&user.owner, first, |user| user.map = Some(map)).await?;
        }
        Ok(above)
    }
}
