//! Undoes sessions and records that nobody wants any more: only ours, and only unused ones.

use std::time::Duration;

use tokio::time::Instant;

use super::Inner;
use super::login::{Made, login_lock};
use super::noderecords::is_by;
use super::session::{self, Session};
use crate::connector::error::Error;
use crate::connector::settings::ms;
use crate::connector::wait::{About, Wait};
use crate::host::iscsidb::Record;
use crate::step::Step;
use crate::types::{Nexus, Portal};

/// When to ask for a logout again that iscsid could not make: it connects the sessions anew that it
/// finds at its start.
const LOGOUT_AGAIN: Duration = Duration::from_secs(1);

impl Inner {
    /// Undoes what we made at those of `portals` that no user of the target wants: logout when
    /// nothing is left under the session, then the record, then the iface record. Foreign ones stay.
    pub(super) async fn settle(&self, target: &Nexus, portals: &[Portal]) -> Result<bool, Error> {
        let _lock = self.target_lock(target).await?;
        let changed = self.settle_portals(target, portals).await?;
        Ok(changed | self.drop_iface(target.iface()).await?)
    }

    async fn settle_portals(&self, target: &Nexus, portals: &[Portal]) -> Result<bool, Error> {
        let unwanted = self.leases.unwanted::<Made, _>(target.as_str(), portals.to_vec()).await?;
        if unwanted.is_empty() {
            return Ok(false); // Also where nobody serves as iscsid, who has the records.
        }
        let made: Made = self.leases.made(target.as_str()).await?;
        let sessions = session::of_target(&*self.doors.sysfs, target.target()).await?;
        let known = made.portals();
        let something = |p: &Portal| {
            known.contains(p) || sessions.iter().any(|s| s.portal == *p && s.is_by(target))
        };
        let unwanted: Vec<Portal> = unwanted.into_iter().filter(something).collect();
        if unwanted.is_empty() {
            return Ok(false);
        }
        if self.settle_target(target, &unwanted, &made).await? {
            return Ok(true);
        }
        let mut changed = false;
        for portal in unwanted {
            changed |= self.settle_portal(target, portal, &made).await?;
        }
        Ok(changed)
    }

    /// Ends by two programs what would take two a portal, where all that iscsiadm knows of the target is
    /// ours and unwanted: without a portal it means every session and every record of the target.
    /// `false` when that is not so, or not all of it went: then each portal is seen to.
    async fn settle_target(
        &self,
        target: &Nexus,
        unwanted: &[Portal],
        made: &Made,
    ) -> Result<bool, Error> {
        let records = self.known_records(target).await?;
        let is_ours = |r: &Record| {
            is_by(r, target) && unwanted.contains(&r.portal) && made.records.contains(&r.portal)
        };
        if records.len() < 2 || !records.iter().all(|r| !r.corrupt && is_ours(r)) {
            return Ok(false);
        }
        let sysfs = &*self.doors.sysfs;
        let sessions = session::of_target(sysfs, target.target()).await?;
        for session in &sessions {
            let ours =
                session.up && made.has(target, session) && unwanted.contains(&session.portal);
            if !ours || !session::devices(sysfs, session).await?.is_empty() {
                return Ok(false);
            }
        }
        for record in &records {
            let up = sessions.iter().any(|s| s.portal == record.portal);
            if !up && self.login_goes_on(target, record.portal).await {
                return Ok(false);
            }
        }
        if sessions.len() > 1 {
            self.doors.tracker.run(Step::Logout, self.log_out(target, None, &sessions)).await?;
        }
        if !session::of_target(sysfs, target.target()).await?.is_empty() {
            return Ok(false);
        }
        let iscsiadm = self.iscsiadm(target);
        self.doors.tracker.run(Step::DeleteRecord, iscsiadm.delete_record(None)).await?;
        if !self.known_records(target).await?.is_empty() {
            return Ok(false);
        }
        let forget = |made: &mut Made| {
            made.sessions.retain(|portal, _| !unwanted.contains(portal));
            made.records.retain(|portal| !unwanted.contains(portal));
            made.chap.retain(|portal| !unwanted.contains(portal));
        };
        self.leases.update_made(target.as_str(), forget).await?;
        Ok(true)
    }

    async fn settle_portal(
        &self,
        target: &Nexus,
        portal: Portal,
        made: &Made,
    ) -> Result<bool, Error> {
        let sysfs = &*self.doors.sysfs;
        let at_portal = async || -> Result<Vec<Session>, Error> {
            let all = session::of_target(sysfs, target.target()).await?;
            Ok(all.into_iter().filter(|s| s.portal == portal).collect())
        };
        let sessions = at_portal().await?;
        let by_it = sessions.iter().find(|s| s.is_by(target));
        if by_it.is_none_or(|s| !s.up) && self.login_goes_on(target, portal).await {
            return Ok(false); // The login's own end sees to it.
        }
        let mut changed = false;
        let ours = match by_it {
            Some(session) => made.has(target, session) || self.is_orphan(target, session).await?,
            None => false,
        };
        if let Some(session) = by_it.filter(|_| ours) {
            let left = session::devices(sysfs, session).await?;
            if !left.is_empty() {
                tracing::info!(%target, %portal, device = %left[0], "the session stays: it has devices");
                return Ok(false);
            }
            let logout = self.log_out(target, Some(portal), std::slice::from_ref(session));
            self.doors.tracker.run(Step::Logout, logout).await?;
            changed = true;
        }
        if made.sessions.contains_key(&portal) {
            let forget = |made: &mut Made| made.sessions.remove(&portal);
            self.leases.update_made(target.as_str(), forget).await?;
        }
        if made.records.contains(&portal) && at_portal().await?.iter().all(|s| !s.is_by(target)) {
            if let Some(record) = self.record(target, portal).await? {
                let delete = self.delete_record(target, &record);
                self.doors.tracker.run(Step::DeleteRecord, delete).await?;
                changed = true;
            }
            let forget = |made: &mut Made| {
                made.chap.remove(&portal);
                made.records.remove(&portal)
            };
            self.leases.update_made(target.as_str(), forget).await?;
        }
        Ok(changed)
    }

    /// Whether it is of a login of ours that iscsid carried out after it was given up and undone: it
    /// bears our mark, and has no record. iscsiadm removes no record of a session that is there.
    async fn is_orphan(&self, target: &Nexus, session: &Session) -> Result<bool, Error> {
        if !session.marked {
            return Ok(false);
        }
        let records = self.known_records(target).await?;
        Ok(!records.iter().any(|r| r.portal == session.portal && r.iface == session.iface))
    }

    /// The record that we could have made at a portal.
    async fn record(&self, target: &Nexus, portal: Portal) -> Result<Option<Record>, Error> {
        let mut all = self.known_records(target).await?.into_iter();
        Ok(all.find(|r| r.portal == portal && is_by(r, target)))
    }

    /// Logs out at a portal, or of the whole target, and waits until these sessions are gone.
    async fn log_out(
        &self,
        target: &Nexus,
        portal: Option<Portal>,
        sessions: &[Session],
    ) -> Result<(), Error> {
        let end = Instant::now() + ms(self.settings.command_ms);
        loop {
            let within = ms(self.settings.command_ms);
            let mut wait = Wait::about(&*self.doors.uevents, About::Sessions, within);
            let taken = self.iscsiadm(target).logout(portal).await?;
            let until = if taken { end } else { end.min(Instant::now() + LOGOUT_AGAIN) };
            while self.is_logged_in(target, sessions).await? {
                if Instant::now() >= until || !wait.next_before(until).await {
                    break;
                }
            }
            if !self.is_logged_in(target, sessions).await? {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(Error::Tool {
                    doing: format!(
                        "logging out of {target}{}",
                        portal.map_or_else(String::new, |p| format!(" at {p}"))
                    ),
                    code: Some(0),
                    stderr: "the session is still there".into(),
                });
            }
        }
    }

    async fn is_logged_in(&self, target: &Nexus, sessions: &[Session]) -> Result<bool, Error> {
        let all = session::of_target(&*self.doors.sysfs, target.target()).await?;
        Ok(all.iter().any(|s| sessions.iter().any(|gone| gone.sid == s.sid)))
    }

    /// Whether a login at that portal goes on, here or in another process.
    async fn login_goes_on(&self, target: &Nexus, portal: Portal) -> bool {
        if self.state.get(target, portal).is_some() {
            return true;
        }
        let name = login_lock(target, portal);
        self.doors.rundir.lock(&name, Duration::ZERO).await.is_err()
    }
}
