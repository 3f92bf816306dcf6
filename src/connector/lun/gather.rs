//! Gathers the paths of a LUN: every route to every target on its own, the first one sets the pace.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use super::Luns;
use super::base::agree;
use super::scan::Proven;
use super::transport::{Job, Transport, Way as _};
use crate::connector::error::Error;
use crate::connector::scsi::ScsiPath;
use crate::connector::settings::ms;

/// What came together in time.
pub(super) struct Gathered<T: Transport> {
    /// The verified paths, at least one; they agree.
    pub(super) paths: Vec<ScsiPath>,
    /// The targets ([`key`](super::access::Access<T>::key)) and routes that they go through.
    pub(super) used: Vec<(String, T::Route)>,
    /// One of them was there before, with a map above it.
    pub(super) had_map: bool,
    /// Portals that may still come.
    pub(super) late: Vec<Late<T>>,
}

/// A route that may still come.
pub(super) struct Late<T: Transport> {
    /// At which of the volume's targets.
    pub(super) job: Job<T>,
    pub(super) route: T::Route,
    /// That it is being made usable, where that was begun.
    pub(super) begun: Option<T::Begun>,
}

/// A route to one of the targets, by the number of that.
type Place<T> = (usize, <T as Transport>::Route);
type Came<T> = (Place<T>, Result<<T as Transport>::Way, <T as Transport>::Refused>);
type Walked<T> = (Place<T>, Walk<T>, Result<Proven, Error>);

/// A way that is being walked.
#[derive(Clone)]
struct Walk<T: Transport> {
    way: T::Way,
    /// The kernel had a device there, which is nobody's before the volume is attached.
    kept: bool,
}

/// The state of one gathering.
struct Gathering<T: Transport> {
    /// Pure waits: may be dropped at any time.
    ways: JoinSet<Came<T>>,
    /// Effects under way. Each goes on to its end, also when this gathering is called off, and undoes
    /// then what nobody waits for any more.
    walks: usize,
    walked: (mpsc::UnboundedSender<Walked<T>>, mpsc::UnboundedReceiver<Walked<T>>),
    /// Portals not yet tried.
    queue: VecDeque<Place<T>>,
    begun: HashMap<Place<T>, T::Begun>,
    waiting: Vec<Place<T>>,
    /// With the routes that came up.
    proven: Vec<(Place<T>, Proven)>,
    refused: Vec<(usize, T::Refused)>,
    missing: Option<Error>,
    /// What makes the whole attach fail, whatever else comes.
    fatal: Option<Error>,
}

impl<T: Transport> Luns<T> {
    /// The paths to the LUN: all that come within a short time of the first one. `parts` are the job at each
    /// of the volume's targets.
    pub(super) async fn gather(self: &Arc<Self>, parts: &[Job<T>]) -> Result<Gathered<T>, Error> {
        let multipath = parts[0].multipath;
        let mut all = Gathering {
            ways: JoinSet::new(),
            walks: 0,
            walked: mpsc::unbounded_channel(),
            queue: self.order(parts).await?.into(),
            begun: HashMap::new(),
            waiting: Vec::new(),
            proven: Vec::new(),
            refused: Vec::new(),
            missing: None,
            fatal: None,
        };
        let mut next = self.begin(parts, &mut all).await?;
        loop {
            let idle = all.ways.is_empty() && all.walks == 0;
            if idle && all.queue.is_empty() || all.fatal.is_some() {
                break;
            }
            if !multipath && !all.proven.is_empty() {
                break;
            }
            tokio::select! {
                Some(Ok(came)) = all.ways.join_next() => self.came(parts, &mut all, came),
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
            let stuck = all.ways.is_empty() && all.walks == 0 && all.proven.is_empty();
            if stuck && !all.queue.is_empty() && all.fatal.is_none() {
                next = self.begin(parts, &mut all).await?;
            }
        }
        all.ways.abort_all();
        self.finish_walks(multipath, &mut all).await;
        if all.is_unreached() {
            return Err(T::unreached(self, parts, all.refused).await);
        }
        all.result(parts)
    }

    /// The routes in the order of trying: those with a way first.
    async fn order(&self, parts: &[Job<T>]) -> Result<Vec<Place<T>>, Error> {
        let mut places = Vec::new();
        for (n, job) in parts.iter().enumerate() {
            let ways = T::ways(self, job).await?;
            let usable = |p: &T::Route| ways.iter().any(|way| way.is_up() && way.route() == *p);
            places.extend(job.source.routes.iter().map(|p| (!usable(p), (n, *p))));
        }
        places.sort_by_key(|(unusable, _)| *unusable);
        Ok(places.into_iter().map(|(_, place)| place).collect())
    }

    /// Begins with the next route, or with all when there is to be a map; says when to come back.
    async fn begin(
        self: &Arc<Self>,
        parts: &[Job<T>],
        all: &mut Gathering<T>,
    ) -> Result<Instant, Error> {
        let how_many = if parts[0].multipath { all.queue.len() } else { all.queue.len().min(1) };
        let places: Vec<Place<T>> = all.queue.drain(..how_many).collect();
        let at = |n: usize| -> Vec<T::Route> {
            places.iter().filter(|(part, _)| *part == n).map(|(_, route)| *route).collect()
        };
        let begun = parts.iter().enumerate().map(async |(n, job)| match at(n) {
            routes if routes.is_empty() => Ok(HashMap::new()),
            routes => T::reach(self, job, &routes).await,
        });
        let mut failed = Vec::new();
        for (n, begun) in join_all(begun).await.into_iter().enumerate() {
            match begun {
                Ok(begun) => all.begun.extend(begun.into_iter().map(|(p, how)| ((n, p), how))),
                Err(error) if parts.len() == 1 => return Err(error),
                // One target's trouble keeps none of the others.
                Err(error) => {
                    let target = &parts[n].source.target;
                    tracing::warn!(%target, error = &error as &dyn std::error::Error, "no route");
                    all.missing.get_or_insert(error);
                    failed.push(n);
                }
            }
        }
        for place in places.into_iter().filter(|(n, _)| !failed.contains(n)) {
            let (inner, job) = (self.clone(), parts[place.0].clone());
            let begun = all.begun.get(&place).cloned();
            all.waiting.push(place);
            let wait = async move { (place, T::await_way(&inner, &job, place.1, begun).await) };
            all.ways.spawn(wait.in_current_span());
        }
        let pause = if all.queue.is_empty() {
            Duration::from_secs(3600)
        } else {
            ms(self.settings.next_portal_ms)
        };
        Ok(Instant::now() + pause)
    }

    fn came(self: &Arc<Self>, parts: &[Job<T>], all: &mut Gathering<T>, (place, way): Came<T>) {
        all.waiting.retain(|p| *p != place);
        let (part, route) = place;
        match way {
            Err(error) => all.refused.push((part, error)),
            Ok(way) => {
                let (inner, mut job) = (self.clone(), parts[part].clone());
                job.called_off = Arc::default();
                let span =
                    tracing::info_span!("path", %route, way = %way.hctl(job.source.lun.scsi()));
                let report = all.walked.0.clone();
                all.walks += 1;
                let walking = self.walking(&job);
                let walk = async move {
                    let kept = inner.is_kept(&job, &way).await;
                    let walked = inner.path(&job, &way).await;
                    drop(walking);
                    let walk = Walk { way, kept };
                    if let Err(unread) = report.send((place, walk, walked)) {
                        inner.take_unawaited(&job, unread.0).await;
                    }
                };
                self.background(walk.instrument(span));
            }
        }
    }

    /// A scan that hangs on one host does not hold up the other path: it goes on in the background,
    /// where what it brings is left to the lease that announces it.
    async fn finish_walks(&self, multipath: bool, all: &mut Gathering<T>) {
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
    async fn take_unawaited(&self, job: &Job<T>, ((_, route), walk, walked): Walked<T>) {
        let Walk { way, kept } = walk;
        let taken = match walked {
            Ok(proven) => self.take_late(job, &way, proven, kept).await,
            Err(cause) if kept => Err(cause),
            Err(cause) => self.reclaim(job, &way).await.and(Err(cause)),
        };
        if let Err(error) = taken {
            tracing::warn!(%route, error = &error as &dyn std::error::Error, "a path did not come");
        }
    }
}

impl<T: Transport> Gathering<T> {
    /// Files what came of a path; `true` for the first that was proven.
    fn take(&mut self, (place, walk, walked): Walked<T>) -> bool {
        self.walks -= 1;
        match walked {
            Ok(proven) => {
                self.proven.push(((place.0, walk.way.route()), proven));
                return self.proven.len() == 1;
            }
            Err(e) if is_local(&e) => {
                tracing::warn!(route = %place.1, error = &e as &dyn std::error::Error, "no path");
                self.missing.get_or_insert(e);
            }
            Err(e) => {
                self.fatal.get_or_insert(e);
            }
        }
        false
    }

    /// No route came up, and nothing worse is known.
    fn is_unreached(&self) -> bool {
        self.proven.is_empty() && self.fatal.is_none() && self.missing.is_none()
    }

    fn result(self, parts: &[Job<T>]) -> Result<Gathered<T>, Error> {
        if let Some(fatal) = self.fatal {
            return Err(fatal);
        }
        if let (true, Some(missing)) = (self.proven.is_empty(), self.missing) {
            return Err(missing);
        }
        let had_map = self.proven.iter().any(|(_, p)| p.had_map);
        let used = |((part, route), _): &(Place<T>, Proven)| (parts[*part].source.key(), *route);
        let used = self.proven.iter().map(used).collect();
        let mut paths: Vec<ScsiPath> = self.proven.into_iter().map(|(_, p)| p.path).collect();
        paths.sort_by_key(|p| p.hctl);
        agree(&paths)?;
        let mut begun = self.begun;
        let late = |place: Place<T>| Late {
            job: parts[place.0].clone(),
            route: place.1,
            begun: begun.remove(&place),
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
        | Error::NoHba { .. }
        | Error::PortNotFound { .. }
        | Error::NotAllowed { .. }
        | Error::Source(_)
        | Error::NoDevice { .. }
        | Error::Partition { .. }
        | Error::NoIdentity { .. }
        | Error::NoMapOfLocal { .. }
        | Error::OtherTransport { .. }
        | Error::NotReleased
        | Error::NotAttached { .. }
        | Error::SourceInUse { .. }
        | Error::StaleDeviceHeld { .. }
        | Error::DeviceHeld { .. }
        | Error::MultipathUnavailable(_)
        | Error::Map { .. }
        | Error::Multipathd(_)
        | Error::Flush { .. }
        | Error::FlushFile { .. }
        | Error::Image { .. }
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
