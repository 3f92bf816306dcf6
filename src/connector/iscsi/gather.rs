//! Gathers the paths of a LUN: every portal on its own, the first one sets the pace.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use super::base::agree;
use super::login::Progress;
use super::scan::Proven;
use super::session::{self, Session};
use super::verdict::LoginError;
use super::{Inner, Job};
use crate::connector::error::Error;
use crate::connector::scsi::ScsiPath;
use crate::connector::settings::ms;
use crate::types::{Chap, Portal};

/// What came together in time.
pub(super) struct Gathered {
    /// The verified paths, at least one; they agree.
    pub(super) paths: Vec<ScsiPath>,
    /// The portals that they go through.
    pub(super) used: Vec<Portal>,
    /// One of them was there before, with a map above it.
    pub(super) had_map: bool,
    /// Portals that may still come.
    pub(super) late: Vec<(Portal, Option<Progress>)>,
}

type Came = (Portal, Result<Session, LoginError>);
type Walked = (Portal, Session, Result<Proven, Error>);

/// The state of one gathering.
struct Gathering {
    /// Pure waits: may be dropped at any time.
    sessions: JoinSet<Came>,
    /// Effects under way. Each goes on to its end, also when this gathering is called off, and undoes
    /// then what nobody waits for any more.
    walks: usize,
    walked: (mpsc::UnboundedSender<Walked>, mpsc::UnboundedReceiver<Walked>),
    /// Portals not yet tried.
    queue: VecDeque<Portal>,
    progress: HashMap<Portal, Progress>,
    waiting: Vec<Portal>,
    proven: Vec<(Portal, Proven)>,
    refused: Vec<LoginError>,
    missing: Option<Error>,
    /// What makes the whole attach fail, whatever else comes.
    fatal: Option<Error>,
}

impl Inner {
    /// The paths to the LUN: all that come within a short time of the first one.
    pub(super) async fn gather(self: &Arc<Self>, job: &Job) -> Result<Gathered, Error> {
        let mut all = Gathering {
            sessions: JoinSet::new(),
            walks: 0,
            walked: mpsc::unbounded_channel(),
            queue: self.order(job).await?.into(),
            progress: HashMap::new(),
            waiting: Vec::new(),
            proven: Vec::new(),
            refused: Vec::new(),
            missing: None,
            fatal: None,
        };
        let mut next = self.begin(job, &mut all).await?;
        loop {
            let idle = all.sessions.is_empty() && all.walks == 0;
            if idle && all.queue.is_empty() || all.fatal.is_some() {
                break;
            }
            if !job.multipath && !all.proven.is_empty() {
                break;
            }
            tokio::select! {
                Some(Ok(came)) = all.sessions.join_next() => self.came(job, &mut all, came),
                Some(walked) = all.walked.1.recv() => {
                    if all.take(walked) && job.multipath {
                        next = Instant::now() + ms(self.settings.straggler_ms);
                    }
                }
                () = sleep_until(next) => {
                    if !all.proven.is_empty() {
                        break;
                    }
                    next = self.begin(job, &mut all).await?;
                }
            }
            let stuck = all.sessions.is_empty() && all.walks == 0 && all.proven.is_empty();
            if stuck && !all.queue.is_empty() && all.fatal.is_none() {
                next = self.begin(job, &mut all).await?;
            }
        }
        all.sessions.abort_all();
        self.finish_walks(job, &mut all).await;
        match all.result(job) {
            Err(Error::NoSession { target, source }) => {
                let source = self.diagnose(job, source).await;
                Err(Error::NoSession { target, source })
            }
            other => other,
        }
    }

    /// Some targets (LIO) answer a login to an unknown name like one to a service that is down, so
    /// that iscsid tries until its time is over. The portal itself knows better.
    /// And iscsid itself ends a login with credentials, as one at an unknown target, when the target
    /// did not go through with it: it asked for none, or could not prove itself.
    async fn diagnose(&self, job: &Job, error: LoginError) -> LoginError {
        let portal = match error {
            LoginError::Unreachable { portal, .. } => portal,
            LoginError::NotFound { portal, .. } if job.chap.is_some() => portal,
            other => return other,
        };
        let mutual = job.chap.as_ref().is_some_and(Chap::is_mutual);
        match (self.iscsiadm(&job.source.target).is_exported(portal).await, error) {
            (Some(false), _) => {
                let detail = "it answers, but does not list it among its targets".into();
                LoginError::NotFound { portal, detail }
            }
            (Some(true) | None, LoginError::NotFound { portal, detail }) if mutual => {
                LoginError::Unproven { portal, detail }
            }
            (Some(true) | None, LoginError::NotFound { portal, detail }) => {
                LoginError::Unasked { portal, detail }
            }
            (Some(true) | None, error) => error,
        }
    }

    /// The portals in the order of trying: those with a session first.
    async fn order(&self, job: &Job) -> Result<Vec<Portal>, Error> {
        let sessions = session::of_target(&*self.doors.sysfs, &job.source.target).await?;
        let mut portals = job.source.portals.clone();
        portals.sort_by_key(|p| !sessions.iter().any(|s| s.up && s.is_plain() && s.portal == *p));
        Ok(portals)
    }

    /// Begins with the next portal, or with all when there is to be a map; says when to come back.
    async fn begin(self: &Arc<Self>, job: &Job, all: &mut Gathering) -> Result<Instant, Error> {
        let how_many = if job.multipath { all.queue.len() } else { all.queue.len().min(1) };
        let portals: Vec<Portal> = all.queue.drain(..how_many).collect();
        if !portals.is_empty() {
            let begun = self.log_in(job, &portals).await?;
            all.progress.extend(begun);
        }
        for portal in portals {
            let (inner, target) = (self.clone(), job.source.target.clone());
            let progress = all.progress.get(&portal).cloned();
            all.waiting.push(portal);
            let wait =
                async move { (portal, inner.await_session(&target, portal, progress).await) };
            all.sessions.spawn(wait.in_current_span());
        }
        let pause = if all.queue.is_empty() {
            Duration::from_secs(3600)
        } else {
            ms(self.settings.next_portal_ms)
        };
        Ok(Instant::now() + pause)
    }

    fn came(self: &Arc<Self>, job: &Job, all: &mut Gathering, (portal, session): Came) {
        all.waiting.retain(|p| *p != portal);
        match session {
            Err(error) => all.refused.push(error),
            Ok(session) => {
                let (inner, mut job) = (self.clone(), job.clone());
                job.called_off = Arc::default();
                let span = tracing::info_span!("path", %portal, host = session.host);
                let report = all.walked.0.clone();
                all.walks += 1;
                let walking = self.walking(&job);
                let walk = async move {
                    let walked = inner.path(&job, &session).await;
                    drop(walking);
                    if let Err(unread) = report.send((portal, session, walked)) {
                        inner.take_unawaited(&job, unread.0).await;
                    }
                };
                self.background(walk.instrument(span));
            }
        }
    }

    /// A scan that hangs on one host does not hold up the other path: it goes on in the background,
    /// where what it brings is left to the lease that announces it.
    async fn finish_walks(&self, job: &Job, all: &mut Gathering) {
        // Long enough for one that has found a stale device to see whether somebody holds it: that
        // must fail the attach. A single path needs no second one.
        let patience = if job.multipath {
            ms(2 * self.settings.holders_ms + self.settings.straggler_ms)
        } else {
            Duration::ZERO
        };
        let end = Instant::now() + patience;
        let patient = all.proven.is_empty() || all.fatal.is_some();
        while all.walks > 0 {
            tokio::select! {
                Some(walked) = all.walked.1.recv() => { all.take(walked); }
                () = sleep_until(end), if !patient => break,
            }
        }
        // What has come by now is taken by the caller or in the lease; the rest finds nobody here.
        all.walked.1.close();
        while let Ok(walked) = all.walked.1.try_recv() {
            all.take(walked);
        }
    }

    /// A path was walked to its end after its gathering had ended, or was called off.
    async fn take_unawaited(&self, job: &Job, (portal, session, walked): Walked) {
        let taken = match walked {
            Ok(proven) => self.take_late(job, portal, &session, proven).await,
            Err(cause) => self.reclaim(job, &session).await.and(Err(cause)),
        };
        if let Err(error) = taken {
            tracing::warn!(%portal, error = &error as &dyn std::error::Error, "a path did not come");
        }
    }
}

impl Gathering {
    /// Files what came of a path; `true` for the first that was proven.
    fn take(&mut self, (portal, _, walked): Walked) -> bool {
        self.walks -= 1;
        match walked {
            Ok(proven) => {
                self.proven.push((portal, proven));
                return self.proven.len() == 1;
            }
            Err(e) if is_local(&e) => {
                tracing::warn!(%portal, error = &e as &dyn std::error::Error, "no path");
                self.missing.get_or_insert(e);
            }
            Err(e) => {
                self.fatal.get_or_insert(e);
            }
        }
        false
    }

    fn result(self, job: &Job) -> Result<Gathered, Error> {
        if let Some(fatal) = self.fatal {
            return Err(fatal);
        }
        if self.proven.is_empty() {
            if let Some(missing) = self.missing {
                return Err(missing);
            }
            let portal = job.source.portals[0];
            let all = self.refused.into_iter();
            let source =
                all.max_by_key(LoginError::weight).unwrap_or(LoginError::TimedOut { portal });
            return Err(Error::NoSession { target: job.source.target.to_string(), source });
        }
        let had_map = self.proven.iter().any(|(_, p)| p.had_map);
        let used = self.proven.iter().map(|(portal, _)| *portal).collect();
        let mut paths: Vec<ScsiPath> = self.proven.into_iter().map(|(_, p)| p.path).collect();
        paths.sort_by_key(|p| p.hctl);
        agree(&paths)?;
        let mut progress = self.progress;
        let late = self.waiting.into_iter().map(|p| (p, progress.remove(&p))).collect();
        Ok(Gathered { paths, used, had_map, late })
    }
}

/// Whether an error is this path's alone, so that another may do; the rest says that something is
/// wrong with the LUN itself or with us.
fn is_local(error: &Error) -> bool {
    match error {
        Error::LunNotFound { .. }
        | Error::NoMedium { .. }
        | Error::Io { .. }
        | Error::Store { .. } => true,
        Error::NoSession { .. }
        | Error::Identity(_)
        | Error::Size(_)
        | Error::ReadOnly { .. }
        | Error::NotAttached { .. }
        | Error::SourceInUse { .. }
        | Error::StaleDeviceHeld { .. }
        | Error::DeviceHeld { .. }
        | Error::MultipathUnavailable(_)
        | Error::Map { .. }
        | Error::Multipathd(_)
        | Error::Flush { .. }
        | Error::Path { .. }
        | Error::Swapped { .. }
        | Error::Command { .. }
        | Error::Tool { .. }
        | Error::NoIscsid { .. }
        | Error::RecordCorrupt { .. }
        | Error::SecretUnavailable(_)
        | Error::ChapDiffers { .. }
        | Error::Discovery { .. }
        | Error::DiscoveryRecord { .. }
        | Error::Lock(_)
        | Error::LeaseCorrupt { .. }
        | Error::Undo { .. } => false,
    }
}
