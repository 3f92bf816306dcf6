//! Logins: side by side, in the background, at most one for a portal at a time.
//!
//! Nobody waits for iscsiadm itself: whoever needs a session waits until sysfs shows it, so that a
//! dead portal holds up nothing. When a login ends, in whatever way, what nobody wants (any more)
//! is undone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::Instrument;

use super::noderecords::Records;
use super::records::Iscsiadm;
use super::session::{self, Session};
use super::verdict::{LoggedIn, LoginError, login_result};
use super::{Inner, Job};
use crate::connector::error::Error;
use crate::connector::lease::{self, file_name};
use crate::connector::wait::{About, Wait};
use crate::host::cmd::{CmdError, Output};
use crate::step::Step;
use crate::types::{Nexus, Portal};

/// What we made of a target: intent first, so a session may be here that is not in sysfs yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    /// Portals whose records are ours.
    pub(crate) records: BTreeSet<Portal>,
    /// Portals whose sessions are ours, with the session's number once it is known.
    pub(crate) sessions: BTreeMap<Portal, Option<u32>>,
    /// Portals whose records, of ours, have the credentials of a volume.
    #[serde(default)]
    pub(crate) chap: BTreeSet<Portal>,
}

impl lease::Made for Made {
    const TRANSPORT: &'static str = "iscsi";
}

impl Made {
    /// All portals at which something was made.
    pub(crate) fn portals(&self) -> BTreeSet<Portal> {
        self.records.iter().chain(self.sessions.keys()).copied().collect()
    }

    /// Whether that session is ours.
    pub(crate) fn has(&self, nexus: &Nexus, session: &Session) -> bool {
        let known = self.sessions.get(&session.portal);
        session.is_by(nexus) && known.is_some_and(|sid| sid.is_none_or(|sid| sid == session.sid))
    }
}

/// How a login ended; `None` while it goes on.
pub(crate) type Progress = watch::Receiver<Option<Result<(), LoginError>>>;
type Report = watch::Sender<Option<Result<(), LoginError>>>;

/// For the end of a login that has met its deadline: SIGTERM, then SIGKILL (host::cmd).
const LOGIN_GRACE: Duration = Duration::from_secs(6);

/// How long a session is waited for that iscsid may make of a login that was given up.
const LATE_LOGIN: Duration = Duration::from_secs(600);

/// The logins that go on in this process.
#[derive(Default)]
pub(crate) struct Logins {
    under_way: Mutex<HashMap<(Nexus, Portal), Progress>>,
    /// Where a late session is watched for.
    watched: Mutex<HashSet<(Nexus, Portal)>>,
}

impl Logins {
    fn lock(&self) -> MutexGuard<'_, HashMap<(Nexus, Portal), Progress>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watched(&self) -> MutexGuard<'_, HashSet<(Nexus, Portal)>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, target: &Nexus, portal: Portal) -> Option<Progress> {
        self.lock().get(&(target.clone(), portal)).cloned()
    }
}

impl Inner {
    /// Sees to it that a login is under way at each of `portals` that has no session yet. Short:
    /// only the records are waited for, under the target's lock. A caller that gives up does not end
    /// it half way: a record that iscsiadm makes late is made under the lock, and found by whoever
    /// has it next.
    pub(super) async fn log_in(
        self: &Arc<Self>,
        job: &Job,
        portals: &[Portal],
    ) -> Result<HashMap<Portal, Progress>, Error> {
        let (inner, job, portals) = (self.clone(), job.clone(), portals.to_vec());
        self.to_its_end(async move { inner.begin_logins(&job, &portals).await }).await
    }

    async fn begin_logins(
        self: &Arc<Self>,
        job: &Job,
        portals: &[Portal],
    ) -> Result<HashMap<Portal, Progress>, Error> {
        let target = &job.source.target;
        let _lock = self.target_lock(target).await?;
        let sessions = session::of_target(&*self.doors.sysfs, target.target()).await?;
        let mut progress = HashMap::new();
        let mut need = Vec::new();
        for &portal in portals {
            if sessions.iter().any(|s| s.portal == portal && s.is_by(target)) {
                continue;
            }
            match self.state.get(target, portal) {
                Some(under_way) => drop(progress.insert(portal, under_way)),
                None => need.push(portal),
            }
        }
        if need.is_empty() {
            return Ok(progress);
        }
        let records = self.records(job, &need);
        let Records { alone, given, without } =
            self.doors.tracker.run(Step::Record, records).await?;
        need.retain(|portal| !without.contains(portal));
        if need.is_empty() {
            return Ok(progress);
        }
        let note = |made: &mut Made| {
            for portal in &need {
                made.sessions.entry(*portal).or_insert(None);
            }
        };
        self.leases.update_made(target.as_str(), note).await?;
        // One iscsiadm serves for all portals when it can meet no record but those.
        let groups: Vec<Vec<Portal>> =
            if alone { vec![need] } else { need.into_iter().map(|p| vec![p]).collect() };
        for group in groups {
            progress.extend(self.start(target, group, alone, given.clone()));
        }
        Ok(progress)
    }

    pub(super) fn iscsiadm<'a>(&'a self, target: &'a Nexus) -> Iscsiadm<'a> {
        Iscsiadm { doors: &self.doors, settings: &self.settings, target }
    }

    /// Starts the login of a group of portals, by one call.
    fn start(
        self: &Arc<Self>,
        target: &Nexus,
        group: Vec<Portal>,
        alone: bool,
        given: HashMap<Portal, String>,
    ) -> HashMap<Portal, Progress> {
        let mut reports = HashMap::new();
        let mut progress = HashMap::new();
        for &portal in &group {
            let (report, under_way) = watch::channel(None);
            self.state.lock().insert((target.clone(), portal), under_way.clone());
            reports.insert(portal, report);
            progress.insert(portal, under_way);
        }
        let (inner, target) = (self.clone(), target.clone());
        let span = tracing::info_span!("session", %target);
        self.background(
            async move {
                let open = inner.login_group(&target, reports, alone, &given).await;
                if let Err(error) = inner.settle(&target, &group).await {
                    tracing::warn!(%target, error = &error as &dyn std::error::Error,
                        "what a login left could not be undone");
                }
                for portal in open {
                    inner.watch_login(&target, portal);
                }
            }
            .instrument(span),
        );
        progress
    }

    /// iscsid carries out what it was asked for also when iscsiadm has been ended meanwhile (it was
    /// stopped, or is started anew with the request in its socket): a session that nobody waits for.
    fn watch_login(self: &Arc<Self>, target: &Nexus, portal: Portal) {
        let place = (target.clone(), portal);
        if !self.state.watched().insert(place.clone()) {
            return;
        }
        let inner = self.clone();
        let watch = async move {
            let mut wait = Wait::about(&*inner.doors.uevents, About::Sessions, LATE_LOGIN);
            while inner.sid(&place.0, portal).await.is_none() && wait.next().await {}
            inner.state.watched().remove(&place);
            if let Err(error) = inner.settle(&place.0, &[portal]).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%portal, error, "a session that came late could not be undone");
            }
        };
        self.background(watch.in_current_span());
    }

    /// Logs in; returns the portals at which nobody has heard how it ended.
    async fn login_group(
        &self,
        target: &Nexus,
        reports: HashMap<Portal, Report>,
        alone: bool,
        given: &HashMap<Portal, String>,
    ) -> Vec<Portal> {
        let outcome = |portal: Portal, out: &Result<Output, CmdError>| {
            outcome(portal, out).map_err(|error| error.of_user(given.get(&portal)))
        };
        let mut unheard = Vec::new();
        let mut locks = Vec::new();
        let mut open = Vec::new();
        let together = alone && reports.len() > 1;
        for (portal, report) in reports {
            // Another process may be at it; when it is done there is a session, or we try.
            let name = login_lock(target, portal);
            match self.doors.rundir.lock(&name, self.settings.login()).await {
                Ok(lock) => {
                    locks.push(lock);
                    match self.sid(target, portal).await {
                        Some(_) => self.finish(target, portal, report, Ok(LoggedIn::Existed)).await,
                        None => open.push((portal, report)),
                    }
                }
                Err(_) => {
                    let late = Err(LoginError::TimedOut { portal });
                    self.finish(target, portal, report, late).await;
                }
            }
        }
        if together && open.len() > 1 {
            let out = self.login(target, None).await;
            for (portal, report) in open {
                let ended = outcome(portal, &out);
                unheard.extend(ended.as_ref().err().filter(|e| e.is_open()).map(|_| portal));
                self.finish(target, portal, report, ended).await;
            }
        } else {
            for (portal, report) in open {
                let ended = outcome(portal, &self.login(target, Some(portal)).await);
                unheard.extend(ended.as_ref().err().filter(|e| e.is_open()).map(|_| portal));
                self.finish(target, portal, report, ended).await;
            }
        }
        unheard
    }

    async fn login(&self, target: &Nexus, portal: Option<Portal>) -> Result<Output, CmdError> {
        let iscsiadm = self.iscsiadm(target);
        self.doors.tracker.run(Step::Login, iscsiadm.login(portal)).await
    }

    /// The number of the session at `portal`.
    async fn sid(&self, target: &Nexus, portal: Portal) -> Option<u32> {
        let sessions =
            session::of_target(&*self.doors.sysfs, target.target()).await.unwrap_or_default();
        sessions.iter().find(|s| s.portal == portal && s.is_by(target)).map(|s| s.sid)
    }

    /// Writes down whose the session is, then tells whoever waits.
    async fn finish(
        &self,
        target: &Nexus,
        portal: Portal,
        report: Report,
        result: Result<LoggedIn, LoginError>,
    ) {
        let sid = self.sid(target, portal).await;
        let written = self
            .leases
            .update_made(target.as_str(), |made: &mut Made| match (&result, sid) {
                (Ok(LoggedIn::New), Some(_)) => {
                    if let Some(known) = made.sessions.get_mut(&portal) {
                        *known = sid;
                    }
                }
                // Somebody else made it in the very moment: it is theirs, unless another process
                // of ours has written its number down.
                (Ok(LoggedIn::Existed), _)
                    if made.sessions.get(&portal).is_some_and(|known| *known != sid) =>
                {
                    made.sessions.remove(&portal);
                }
                // Where iscsid may still come to it, the intent stays: until nobody wants it.
                (Err(error), None) if !error.is_open() => {
                    made.sessions.remove(&portal);
                }
                _ => {}
            })
            .await;
        if let Err(error) = written {
            tracing::warn!(%target, %portal, error = &error as &dyn std::error::Error,
                "the end of a login could not be written down");
        }
        if let Err(error) = &result {
            tracing::info!(%target, %portal, %error, "login failed");
        }
        self.state.lock().remove(&(target.clone(), portal));
        report.send_replace(Some(result.map(drop)));
    }

    /// Waits for a usable session at `portal`.
    pub(super) async fn await_session(
        &self,
        target: &Nexus,
        portal: Portal,
        mut progress: Option<Progress>,
    ) -> Result<Session, LoginError> {
        // The login itself says more of its end than that it took too long.
        let grace = if progress.is_some() { LOGIN_GRACE } else { Duration::ZERO };
        let within = self.settings.login() + grace;
        let mut wait = Wait::about(&*self.doors.uevents, About::Sessions, within);
        loop {
            // Read before the look: a login that ended well has its session by then.
            let ended = progress.as_ref().and_then(|p| p.borrow().clone());
            let sessions = session::of_target(&*self.doors.sysfs, target.target()).await;
            let sessions = sessions.map_err(|e| LoginError::Tool {
                portal,
                detail: crate::connector::error::chain(&e),
                missing: false,
            })?;
            let mut here = sessions.into_iter().filter(|s| s.portal == portal && s.is_by(target));
            if let Some(session) = here.find(|s| s.up) {
                return Ok(session);
            }
            if let Some(Err(error)) = ended {
                return Err(error);
            }
            let more = match &mut progress {
                Some(p) if p.borrow().is_none() => tokio::select! {
                    more = wait.next() => more,
                    _ = p.changed() => true,
                },
                _ => wait.next().await,
            };
            if !more {
                return Err(LoginError::TimedOut { portal });
            }
        }
    }
}

pub(super) fn login_lock(target: &Nexus, portal: Portal) -> String {
    format!("logins/{}", file_name(&format!("{target} {portal}")))
}

fn outcome(portal: Portal, out: &Result<Output, CmdError>) -> Result<LoggedIn, LoginError> {
    match out {
        Ok(out) => login_result(portal, out),
        Err(CmdError::TimedOut { deadline, .. }) => {
            Err(LoginError::Silent { portal, deadline: *deadline })
        }
        Err(CmdError::Place(e)) => {
            Err(LoginError::NoIscsid { portal, detail: crate::connector::error::chain(e) })
        }
        Err(e) => Err(LoginError::Tool {
            portal,
            detail: crate::connector::error::chain(e),
            missing: matches!(e, CmdError::Missing(_)),
        }),
    }
}
