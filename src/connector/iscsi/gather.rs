//! Gathers the paths of a LUN: every portal of every target on its own, the first one sets the pace.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
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
    /// The targets ([`key`](super::access::Access::key)) and portals that they go through.
    pub(super) used: Vec<(String, Portal)>,
    /// One of them was there before, with a map above it.
    pub(super) had_map: bool,
    /// Portals that may still come.
    pub(super) late: Vec<Late>,
}

/// A portal that may still come.
pub(super) struct Late {
    /// At which of the volume's targets.
    pub(super) job: Job,
    pub(super) portal: Portal,
    /// Its login, where one was begun.
    pub(super) progress: Option<Progress>,
}

/// A portal of one of the targets, by the number of that.
type Place = (usize, Portal);
type Came = (Place, Result<Session, LoginError>);
type Walked = (Place, Session, Result<Proven, Error>);

/// The state of one gathering.
struct Gathering {
    /// Pure waits: may be dropped at any time.
    sessions: JoinSet<Came>,
    /// Effects under way. Each goes on to its end, also when this gathering is called off, and undoes
    /// then what nobody waits for any more.
    walks: usize,
    walked: (mpsc::UnboundedSender<Walked>, mpsc::UnboundedReceiver<Walked>),
    /// Portals not yet tried.
    queue: VecDeque<Place>,
    progress: HashMap<Place, Progress>,
    waiting: Vec<Place>,
    proven: Vec<(Place, Proven)>,
    refused: Vec<(usize, LoginError)>,
    missing: Option<Error>,
    /// What makes the whole attach fail, whatever else comes.
    fatal: Option<Error>,
}

impl Inner {
    /// The paths to the LUN: all that come within a short time of the first one. `parts` are the job at each
    /// of the volume's targets.
    pub(super) async fn gather(self: &Arc<Self>, parts: &[Job]) -> Result<Gathered, Error> {
        let multipath = parts[0].multipath;
        let mut all = Gathering {
            sessions: JoinSet::new(),
            walks: 0,
            walked: mpsc::unbounded_channel(),
            queue: self.order(parts).await?.into(),
            progress: HashMap::new(),
            waiting: Vec::new(),
            proven: Vec::new(),
            refused: Vec::new(),
            missing: None,
            fatal: None,
        };
        let mut next = self.begin(parts, &mut all).await?;
        loop {
            let idle = all.sessions.is_empty() && all.walks == 0;
            if idle && all.queue.is_empty() || all.fatal.is_some() {
                break;
            }
            if !multipath && !all.proven.is_empty() {
                break;
            }
            tokio::select! {
                Some(Ok(came)) = all.sessions.join_next() => self.came(parts, &mut all, came),
                Some(walked) = all.walked.1.recv() => {
                    if all.take(walked) && multipath {
                        next = Instant::now() + ms(self.settings.straggler_ms);
                    }
                }
                () = sleep_until(next) => {
                    if !all.proven.is_empty() {
                        break;
                    }
                    next = self.begin(parts, &mut all).await?;
                }
            }
            let stuck = all.sessions.is_empty() && all.walks == 0 && all.proven.is_empty();
            if stuck && !all.queue.is_empty() && all.fatal.is_none() {
                next = self.begin(parts, &mut all).await?;
            }
        }
        all.sessions.abort_all();
        self.finish_walks(multipath, &mut all).await;
        match all.result(parts) {
            Err(Error::NoSession { target, source }) => {
                let job = parts.iter().find(|job| job.source.nexus.as_str() == target);
                let source = self.diagnose(job.unwrap_or(&parts[0]), source).await;
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
        match (self.iscsiadm(&job.source.nexus).is_exported(portal).await, error) {
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
    async fn order(&self, parts: &[Job]) -> Result<Vec<Place>, Error> {
        let mut places = Vec::new();
        for (n, job) in parts.iter().enumerate() {
            let sessions =
                session::of_target(&*self.doors.sysfs, job.source.nexus.target()).await?;
            let usable = |p: &Portal| {
                sessions.iter().any(|s| s.up && s.is_by(&job.source.nexus) && s.portal == *p)
            };
            places.extend(job.source.portals.iter().map(|p| (!usable(p), (n, *p))));
        }
        places.sort_by_key(|(unusable, _)| *unusable);
        Ok(places.into_iter().map(|(_, place)| place).collect())
    }

    /// Begins with the next portal, or with all when there is to be a map; says when to come back.
    async fn begin(self: &Arc<Self>, parts: &[Job], all: &mut Gathering) -> Result<Instant, Error> {
        let how_many = if parts[0].multipath { all.queue.len() } else { all.queue.len().min(1) };
        let places: Vec<Place> = all.queue.drain(..how_many).collect();
        let at = |n: usize| -> Vec<Portal> {
            places.iter().filter(|(part, _)| *part == n).map(|(_, portal)| *portal).collect()
        };
        let logins = parts.iter().enumerate().map(async |(n, job)| match at(n) {
            portals if portals.is_empty() => Ok(HashMap::new()),
            portals => self.log_in(job, &portals).await,
        });
        let mut failed = Vec::new();
        for (n, begun) in join_all(logins).await.into_iter().enumerate() {
            match begun {
                Ok(begun) => all.progress.extend(begun.into_iter().map(|(p, how)| ((n, p), how))),
                Err(error) if parts.len() == 1 => return Err(error),
                // One target's trouble keeps none of the others.
                Err(error) => {
                    let target = &parts[n].source.nexus;
                    tracing::warn!(%target, error = &error as &dyn std::error::Error, "no login");
                    all.missing.get_or_insert(error);
                    failed.push(n);
                }
            }
        }
        for place in places.into_iter().filter(|(n, _)| !failed.contains(n)) {
            let (inner, target) = (self.clone(), parts[place.0].source.nexus.clone());
            let progress = all.progress.get(&place).cloned();
            all.waiting.push(place);
            let wait =
                async move { (place, inner.await_session(&target, place.1, progress).await) };
            all.sessions.spawn(wait.in_current_span());
        }
        let pause = if all.queue.is_empty() {
            Duration::from_secs(3600)
        } else {
            ms(self.settings.next_portal_ms)
        };
        Ok(Instant::now() + pause)
    }

    fn came(self: &Arc<Self>, parts: &[Job], all: &mut Gathering, (place, session): Came) {
        all.waiting.retain(|p| *p != place);
        let (part, portal) = place;
        match session {
            Err(error) => all.refused.push((part, error)),
            Ok(session) => {
                let (inner, mut job) = (self.clone(), parts[part].clone());
                job.called_off = Arc::default();
                let span = tracing::info_span!("path", %portal, host = session.host);
                let report = all.walked.0.clone();
                all.walks += 1;
                let walking = self.walking(&job);
                let walk = async move {
                    let walked = inner.path(&job, &session).await;
                    drop(walking);
                    if let Err(unread) = report.send((place, session, walked)) {
                        inner.take_unawaited(&job, unread.0).await;
                    }
                };
                self.background(walk.instrument(span));
            }
        }
    }

    /// A scan that hangs on one host does not hold up the other path: it goes on in the background,
    /// where what it brings is left to the lease that announces it.
    async fn finish_walks(&self, multipath: bool, all: &mut Gathering) {
        // Long enough for one that has found a stale device to see whether somebody holds it: that
        // must fail the attach. A single path needs no second one.
        let patience = if multipath {
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
    async fn take_unawaited(&self, job: &Job, ((_, portal), session, walked): Walked) {
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
    fn take(&mut self, (place, _, walked): Walked) -> bool {
        self.walks -= 1;
        match walked {
            Ok(proven) => {
                self.proven.push((place, proven));
                return self.proven.len() == 1;
            }
            Err(e) if is_local(&e) => {
                tracing::warn!(portal = %place.1, error = &e as &dyn std::error::Error, "no path");
                self.missing.get_or_insert(e);
            }
            Err(e) => {
                self.fatal.get_or_insert(e);
            }
        }
        false
    }

    fn result(self, parts: &[Job]) -> Result<Gathered, Error> {
        if let Some(fatal) = self.fatal {
            return Err(fatal);
        }
        if self.proven.is_empty() {
            if let Some(missing) = self.missing {
                return Err(missing);
            }
            let portal = parts[0].source.portals[0];
            let worst = self.refused.into_iter().max_by_key(|(_, error)| error.weight());
            let (part, source) = worst.unwrap_or((0, LoginError::TimedOut { portal }));
            return Err(Error::NoSession { target: parts[part].source.nexus.to_string(), source });
        }
        let had_map = self.proven.iter().any(|(_, p)| p.had_map);
        let used = |((part, portal), _): &(Place, Proven)| (parts[*part].source.key(), *portal);
        let used = self.proven.iter().map(used).collect();
        let mut paths: Vec<ScsiPath> = self.proven.into_iter().map(|(_, p)| p.path).collect();
        paths.sort_by_key(|p| p.hctl);
        agree(&paths)?;
        let mut progress = self.progress;
        let late = |place: Place| Late {
            job: parts[place.0].clone(),
            portal: place.1,
            progress: progress.remove(&place),
        };
        let late = self.waiting.into_iter().map(late).collect();
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
        | Error::NoIface { .. }
        | Error::RecordInTheWay { .. }
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
