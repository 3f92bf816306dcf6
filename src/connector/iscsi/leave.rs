//! A target is left: what was made at it, also by an earlier boot, and its lock.

use super::login::Made;
use super::{Access, Inner};
use crate::connector::error::Error;
use crate::connector::lease::file_name;
use crate::connector::settings::ms;
use crate::host::lock::LockGuard;
use crate::host::place::is_place_error;
use crate::types::{Nexus, Portal};

impl Inner {
    /// For records and logouts of a target, by whatever iface; held shortly.
    pub(super) async fn target_lock(&self, target: &Nexus) -> Result<Box<dyn LockGuard>, Error> {
        let name = format!("targets/{}", file_name(target.target().as_str()));
        Ok(self.doors.rundir.lock(&name, ms(self.settings.lock_ms)).await?)
    }

    /// Undoes what was made at a target and that nobody wants there any more.
    pub(super) async fn leave(&self, at: &Access) -> Result<bool, Error> {
        let portals = |made: &Made| {
            let mut portals = at.routes.clone();
            portals.extend(made.portals());
            portals.sort();
            portals.dedup();
            portals
        };
        let (mut made, unwanted) = self.leases.made_and_unwanted(at.lease(), &portals).await?;
        if unwanted.is_empty() {
            return Ok(false); // Others are there by all of them: the last one sees to it, under the target's lock.
        }
        if self.adopt(at, &made).await? {
            made = self.leases.made(at.lease()).await?;
        }
        self.settle(&at.target, &portals(&made)).await
    }

    /// Enters records of ours whose lease went with an earlier boot: they are known by their mark or their iface. Whether there
    /// were any.
    async fn adopt(&self, source: &Access, made: &Made) -> Result<bool, Error> {
        if source.routes.iter().all(|portal| made.records.contains(portal)) {
            return Ok(false);
        }
        let records = match self.doors.iscsidb.records(source.target.target()).await {
            // Where there is something to undo, it fails by that.
            Err(e) if is_place_error(&e) => return Ok(false),
            records => records,
        };
        let records =
            records.map_err(Error::io(format!("reading the records of {}", source.target)))?;
        let mut adopted = false;
        for record in records {
            let portal: Portal = record.portal;
            let unknown = record.iface == source.target.iface().as_str()
                && !record.corrupt
                && source.routes.contains(&portal)
                && !made.records.contains(&portal);
            if unknown && self.is_ours(&source.target, portal).await? {
                let target = source.lease();
                self.leases
                    .update_made(target, |made: &mut Made| made.records.insert(portal))
                    .await?;
                adopted = true;
            }
        }
        Ok(adopted)
    }
}
