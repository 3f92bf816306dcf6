//! Undoes sessions and records that nobody wants any more: only ours, and only unused ones.

use std::time::Duration;

use tokio::time::Instant;

use super::Inner;
use super::login::{Made, login_lock};
use super::session::{self, Session};
use crate::connector::error::Error;
use crate::connector::lease::Lease;
use crate::connector::settings::ms;
use crate::connector::wait::Wait;
use crate::step::Step;
use crate::types::{Iqn, Portal};

/// When to ask for a logout again that iscsid could not make: it connects the sessions anew that it
/// finds at its start.
const LOGOUT_AGAIN: Duration = Duration::from_secs(1);

impl Inner {
    /// Undoes what we made at those of `portals` that no user of the target wants: logout when
    /// nothing is left under the session, then the record. Foreign ones stay.
    pub(super) async fn settle(&self, target: &Iqn, portals: &[Portal]) -> Result<bool, Error> {
        let _lock = self.target_lock(target).await?;
        let mut changed = false;
        for &portal in portals {
            let lease: Lease<Made> = self.leases.load(target.as_str()).await?;
            if !lease.wants(&portal.to_string()) {
                changed |= self.settle_portal(target, portal, &lease.made).await?;
            }
        }
        Ok(changed)
    }

    async fn settle_portal(
        &self,
        target: &Iqn,
        portal: Portal,
        made: &Made,
    ) -> Result<bool, Error> {
        let sysfs = &*self.doors.sysfs;
        let at_portal = async || -> Result<Vec<Session>, Error> {
            let all = session::of_target(sysfs, target).await?;
            Ok(all.into_iter().filter(|s| s.portal == portal).collect())
        };
        let sessions = at_portal().await?;
        let plain = sessions.iter().find(|s| s.is_plain());
        if plain.is_none_or(|s| !s.up) && self.login_goes_on(target, portal).await {
            return Ok(false); // The login's own end sees to it.
        }
        let mut changed = false;
        let ours = match plain {
            Some(session) => made.has(session) || self.is_orphan(target, session).await?,
            None => false,
        };
        if let Some(session) = plain.filter(|_| ours) {
            let left = session::devices(sysfs, session).await?;
            if !left.is_empty() {
                tracing::info!(%target, %portal, device = %left[0], "the session stays: it has devices");
                return Ok(false);
            }
            self.doors.tracker.run(Step::Logout, self.log_out(target, session)).await?;
            changed = true;
        }
        if made.sessions.contains_key(&portal) {
            self.leases
                .update::<Made, _>(target.as_str(), |l| l.made.sessions.remove(&portal))
                .await?;
        }
        if made.records.contains(&portal) && at_portal().await?.iter().all(|s| !s.is_plain()) {
            let delete = self.delete_record(target, portal);
            changed |= self.doors.tracker.run(Step::DeleteRecord, delete).await?;
            self.leases
                .update::<Made, _>(target.as_str(), |l| {
                    l.made.chap.remove(&portal);
                    l.made.records.remove(&portal)
                })
                .await?;
        }
        Ok(changed)
    }

    /// Whether it is of a login of ours that iscsid carried out after it was given up and undone: it
    /// bears our mark, and has no record. iscsiadm removes no record of a session that is there.
    async fn is_orphan(&self, target: &Iqn, session: &Session) -> Result<bool, Error> {
        if !session.marked {
            return Ok(false);
        }
        let records = self.doors.iscsidb.records(target).await;
        let records = records.map_err(Error::io(format!("reading the records of {target}")))?;
        let mut records = records.iter();
        Ok(!records.any(|r| r.portal == session.portal && r.iface == session.iface))
    }

    /// Removes our record, whatever state it is in; `false` when there is none.
    async fn delete_record(&self, target: &Iqn, portal: Portal) -> Result<bool, Error> {
        let found = self.doors.iscsidb.records(target).await;
        let found = found.map_err(Error::io(format!("reading the records of {target}")))?;
        match found.iter().find(|r| r.portal == portal && r.iface == "default") {
            None => return Ok(false),
            Some(record) if record.corrupt => self.remove_corrupt(target, record).await?,
            Some(_) => self.iscsiadm(target).delete_record(portal).await?,
        }
        Ok(true)
    }

    async fn log_out(&self, target: &Iqn, session: &Session) -> Result<(), Error> {
        let end = Instant::now() + ms(self.settings.command_ms);
        loop {
            let mut wait = Wait::new(&*self.doors.uevents, ms(self.settings.command_ms));
            let taken = self.iscsiadm(target).logout(session.portal).await?;
            let until = if taken { end } else { end.min(Instant::now() + LOGOUT_AGAIN) };
            while self.is_logged_in(target, session).await? {
                if Instant::now() >= until || !wait.next_before(until).await {
                    break;
                }
            }
            if !self.is_logged_in(target, session).await? {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(Error::Tool {
                    doing: format!("logging out of {target} at {}", session.portal),
                    code: Some(0),
                    stderr: "the session is still there".into(),
                });
            }
        }
    }

    async fn is_logged_in(&self, target: &Iqn, session: &Session) -> Result<bool, Error> {
        let all = session::of_target(&*self.doors.sysfs, target).await?;
        Ok(all.iter().any(|s| s.sid == session.sid))
    }

    /// Whether a login at that portal goes on, here or in another process.
    async fn login_goes_on(&self, target: &Iqn, portal: Portal) -> bool {
        if self.logins.get(target, portal).is_some() {
            return true;
        }
        let name = login_lock(target, portal);
        self.doors.rundir.lock(&name, Duration::ZERO).await.is_err()
    }
}
