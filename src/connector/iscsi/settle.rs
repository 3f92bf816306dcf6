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
        let records = self.known_records(target).await?;
        let left = self.settle_target(target, &unwanted, &made, sessions, &records).await?;
        if left.is_none() {
            return Ok(true);
        }
        let (mut changed, mut seen) = (false, left);
        for portal in unwanted {
            let sessions = match seen.take() {
                Some(sessions) => sessions,
                // Time has passed.
                None => session::of_target(&*self.doors.sysfs, target.target()).await?,
            };
            changed |= self.settle_portal(target, portal, &made, &sessions, &records).await?;
        }
        Ok(changed)
    }

    /// Ends several sessions by one program, where all that open-iscsi knows of the target is ours and unwanted: without a
    /// portal iscsiadm means every session of the target. Returns the sessions that there are when that is not so, or not all
    /// of them went: then each portal is seen to.
    async fn settle_target(
        &self,
        target: &Nexus,
        unwanted: &[Portal],
        made: &Made,
        sessions: Vec<Session>,
        records: &[Record],
    ) -> Result<Option<Vec<Session>>, Error> {
        let is_ours = |r: &Record| {
            is_by(r, target) && unwanted.contains(&r.portal) && made.records.contains(&r.portal)
        };
        if records.len() < 2 || !records.iter().all(|r| !r.corrupt && is_ours(r)) {
            return Ok(Some(sessions));
        }
        for session in &sessions {
            let ours =
                session.up && made.has(target, session) && unwanted.contains(&session.portal);
            if !ours || !session::devices(&*self.doors.sysfs, session).await?.is_empty() {
                return Ok(Some(sessions));
            }
        }
        for record in records {
            let up = sessions.iter().any(|s| s.portal == record.portal);
            if !up && self.login_goes_on(target, record.portal).await {
                return Ok(Some(sessions));
            }
        }
        let left = if sessions.len() > 1 {
            let log_out = self.log_out(target, None, &sessions);
            self.doors.tracker.run(Step::Logout, log_out).await?
        } else {
            sessions
        };
        if !left.is_empty() {
            return Ok(Some(left));
        }
        for record in records {
            let remove = self.remove_record(target, record);
            self.doors.tracker.run(Step::DeleteRecord, remove).await?;
        }
        let forget = |made: &mut Made| {
            made.sessions.retain(|portal, _| !unwanted.contains(portal));
            made.records.retain(|portal| !unwanted.contains(portal));
            made.chap.retain(|portal| !unwanted.contains(portal));
        };
        self.leases.update_made(target.as_str(), forget).await?;
        Ok(None)
    }

    async fn settle_portal(
        &self,
        target: &Nexus,
        portal: Portal,
        made: &Made,
        sessions: &[Session],
        records: &[Record],
    ) -> Result<bool, Error> {
        let is_its = |s: &&Session| s.portal == portal && s.is_by(target);
        let by_it = sessions.iter().find(is_its);
        if by_it.is_none_or(|s| !s.up) && self.login_goes_on(target, portal).await {
            return Ok(false); // The login's own end sees to it.
        }
        let (mut changed, mut is_used) = (false, by_it.is_some());
        let is_ours = |s: &&Session| made.has(target, s) || is_orphan(s, records);
        if let Some(session) = by_it.filter(is_ours) {
            let left = session::devices(&*self.doors.sysfs, session).await?;
            if !left.is_empty() {
                tracing::info!(%target, %portal, device = %left[0], "the session stays: it has devices");
                return Ok(false);
            }
            let logout = self.log_out(target, Some(portal), std::slice::from_ref(session));
            let left = self.doors.tracker.run(Step::Logout, logout).await?;
            (changed, is_used) = (true, left.iter().any(|s| is_its(&s)));
        }
        let mut removed = Ok(false);
        if made.records.contains(&portal) && !is_used {
            let record = records.iter().find(|r| r.portal == portal && is_by(r, target));
            removed = match record {
                Some(record) => {
                    let remove = self.remove_record(target, record);
                    self.doors.tracker.run(Step::DeleteRecord, remove).await.map(|()| true)
                }
                None => Ok(true),
            };
            changed |= record.is_some();
        }
        let is_gone = matches!(removed, Ok(true));
        if is_gone || made.sessions.contains_key(&portal) {
            let forget = |made: &mut Made| {
                made.sessions.remove(&portal);
                if is_gone {
                    made.chap.remove(&portal);
                    made.records.remove(&portal);
                }
            };
            self.leases.update_made(target.as_str(), forget).await?;
        }
        removed.map(|_| changed)
    }

    /// Logs out at a portal, or of the whole target, and waits until these sessions are gone; returns those that are left.
    async fn log_out(
        &self,
        target: &Nexus,
        portal: Option<Portal>,
        sessions: &[Session],
    ) -> Result<Vec<Session>, Error> {
        let end = Instant::now() + ms(self.settings.command_ms);
        loop {
            let within = ms(self.settings.command_ms);
            let mut wait = Wait::about(&*self.doors.uevents, About::Sessions, within);
            let taken = self.iscsiadm(target).logout(portal).await?;
            let until = if taken { end } else { end.min(Instant::now() + LOGOUT_AGAIN) };
            loop {
                let all = session::of_target(&*self.doors.sysfs, target.target()).await?;
                if !all.iter().any(|s| sessions.iter().any(|gone| gone.sid == s.sid)) {
                    return Ok(all);
                }
                if Instant::now() >= until {
                    break;
                }
                // Whether there was an event or not, they are looked at once more.
                wait.next_before(until).await;
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

    /// Whether a login at that portal goes on, here or in another process.
    async fn login_goes_on(&self, target: &Nexus, portal: Portal) -> bool {
        if self.state.get(target, portal).is_some() {
            return true;
        }
        let name = login_lock(target, portal);
        self.doors.rundir.lock(&name, Duration::ZERO).await.is_err()
    }
}

/// Whether a session is of a login of ours that iscsid carried out after it was given up and undone: it
/// bears our mark, and has no record.
fn is_orphan(session: &Session, records: &[Record]) -> bool {
    session.marked
        && !records.iter().any(|r| r.portal == session.portal && r.iface == session.iface)
}
