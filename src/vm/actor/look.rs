//! When the handler looks at its volumes, and what it makes of what it sees.
//!
//! ```text
//! the VM gone or back ──┐            ┌─ right ──► how its paths are is shown
//! a disk removed ───────┤            ├─ differs ► the attach is walked again
//! the host's devices ───┼─► a look ──┤
//! the slow timer ───────┘            ├─ VM gone ► every volume is worked on
//!                                    └─ cannot be seen ► shown; looked again later
//! ```
//! The first look is at what was there when the daemon started: what is right is ready by it, all else is
//! walked.
//!
//! There is one look at a time, and a pause between two: a storm of events is a look or two.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Actor, Volume};
use crate::connector::{Paths, Touched};
use crate::reason::Reason;
use crate::spec::{Phase, Source};
use crate::types::VolumeName;
use crate::vm::failure::Failure;
use crate::vm::handler::Message;
use crate::vm::steps::{LookedAt, Sight, Stir};

/// Between an event, or a look, and the next look.
const PAUSE: Duration = Duration::from_secs(1);
/// Between a volume's coming to be ready and the look at its paths: those that are slow join meanwhile.
const SETTLE: Duration = Duration::from_secs(5);
/// How many volumes of the node are looked at within an interval when nothing happens; of more each is looked at less
/// often. Events tell of nearly all that may happen; this is for the rest, and is not to cost more the more there are.
const IN_AN_INTERVAL: u32 = 1200;
/// A missing path is tried again after one, two and then always so many intervals.
const MISSING: u32 = 4;

/// When it was looked and will be.
#[derive(Default)]
pub(super) struct Looks {
    /// One is under way, and whether another has been asked for since it began.
    under_way: bool,
    again: bool,
    /// When the next one is due, and the timer for it.
    next: Option<(Instant, AbortHandle)>,
    /// Looks in a row that saw nothing of the VM.
    failed: u32,
}

impl Looks {
    /// Ends the timer.
    pub(super) fn stop(&mut self) {
        if let Some((_, timer)) = self.next.take() {
            timer.abort();
        }
    }
}

impl Actor {
    pub(super) fn stirred(&mut self, stir: &Stir) {
        match stir {
            Stir::Vm => {
                debug!("the VM may have gone or come back");
                // Those that are not ready wait for just that; the others are looked at first.
                let waiting =
                    |(name, v): &(&VolumeName, &Volume)| !v.unlooked && !self.is_steady(name);
                let waiting = self.volumes.iter().filter(waiting);
                let names: Vec<_> = waiting.map(|(name, _)| name.clone()).collect();
                names.iter().for_each(|name| self.work(name));
                self.look_within(Duration::ZERO);
            }
            Stir::Disks => self.look_within(PAUSE),
            Stir::Storage(touched) => {
                if self.tools.auto_expand {
                    let volumes = self.volumes.values_mut();
                    let announced =
                        volumes.filter(|v| touched.announces_size(v.attachment.as_ref()));
                    announced.for_each(|v| v.growth.announced = true);
                }
                self.paths_came(touched);
                let parts = |v: &Volume| v.attachment.as_ref().is_none_or(|a| touched.concerns(a));
                if self.volumes.iter().any(|(name, v)| parts(v) && self.is_steady(name)) {
                    self.look_within(PAUSE);
                }
            }
        }
    }

    /// Ports have come: what waits for one need not wait for its time.
    fn paths_came(&mut self, touched: &Touched) {
        let is_its = |v: &Volume| {
            let is_fc = matches!(v.stored.spec.source, Source::Fc(_));
            is_fc && touched.brings_paths(v.attachment.as_ref())
        };
        let its = self.volumes.values_mut().filter(|v| is_its(v));
        its.for_each(|v| v.missing = Missing::default());
        let waits = |name: &VolumeName, volume: &Volume| {
            let waits = is_its(volume) && volume.timer.is_some();
            waits && self.status(name).reason == Some(Reason::FcPortNotFound)
        };
        let waiting = self.volumes.iter().filter(|(name, volume)| waits(name, volume));
        let names: Vec<_> = waiting.map(|(name, _)| name.clone()).collect();
        names.iter().for_each(|name| self.work(name));
    }

    /// Whether a volume is ready and nothing is going on with it.
    pub(super) fn is_steady(&self, name: &VolumeName) -> bool {
        self.volumes.get(name).is_some_and(is_idle) && self.phase(name) == Phase::Ready
    }

    /// A volume has come to be ready.
    pub(super) fn look_when_settled(&mut self) {
        self.look_within(SETTLE);
    }

    /// Has the volumes looked at after `delay` at the latest.
    fn look_within(&mut self, delay: Duration) {
        let looks = &mut self.looks;
        looks.again |= looks.under_way;
        let at = Instant::now() + delay;
        if looks.under_way || looks.next.as_ref().is_some_and(|(next, _)| *next <= at) {
            return;
        }
        looks.stop();
        let timer = Self::spawn_in(&mut self.tasks, &self.messages, async move {
            tokio::time::sleep_until(at).await;
            Message::Look
        });
        self.looks.next = Some((at, timer));
    }

    /// The slow timer: up to a fifth less than the interval, so that many VMs are spread.
    fn look_later(&mut self) {
        let interval = at_rest(self.tools.look_interval, self.tools.board.count());
        self.look_within(interval.mul_f64(1.0 - fastrand::f64() * 0.2));
    }

    pub(super) fn look(&mut self) {
        self.looks.next = None;
        let phases = self.tools.board.phases(&self.vm, self.volumes.keys());
        let looked_at: Vec<LookedAt> = (self.volumes.values().zip(phases))
            .filter(|(v, phase)| v.unlooked || (is_idle(v) && *phase == Some(Phase::Ready)))
            .map(|(v, _)| LookedAt { volume: v.stored.clone(), anew: v.unlooked })
            .collect();
        if looked_at.is_empty() {
            // Whichever comes to be ready asks for a look.
            return;
        }
        (self.looks.under_way, self.looks.again) = (true, false);
        let steps = self.tools.steps.clone();
        self.spawn(async move {
            let found = super::work::whole(steps.look(&looked_at)).await;
            Message::Looked { found: found.and_then(|found| found) }
        });
    }

    pub(super) fn looked(&mut self, found: Result<BTreeMap<VolumeName, Sight>, Failure>) {
        self.looks.under_way = false;
        match found {
            Ok(found) => {
                self.looks.failed = 0;
                for (name, sight) in found {
                    if self.volumes.get(&name).is_some_and(|v| v.unlooked) {
                        self.taken_up(&name, sight);
                    } else if self.is_steady(&name) {
                        self.seen(&name, sight);
                    }
                }
                self.look_later();
            }
            Err(failure) if matches!(failure.reason, Reason::VmNotRunning | Reason::PodGone) => {
                info!(reason = %failure.reason, why = failure.message, "the VM has ended");
                self.looks.failed = 0;
                self.look_at_all();
            }
            Err(failure) => {
                self.walk_unlooked(&failure);
                self.unseen(&failure);
            }
        }
        if std::mem::take(&mut self.looks.again) {
            self.look_within(PAUSE);
        }
    }

    /// Whatever keeps the VM from being seen: the attach that is walked says so in its own words.
    fn walk_unlooked(&mut self, failure: &Failure) {
        let unlooked = self.volumes.iter().filter(|(_, v)| v.unlooked);
        let names: Vec<_> = unlooked.map(|(name, _)| name.clone()).collect();
        if !names.is_empty() {
            debug!(why = failure.message, "the VM could not be looked at: its volumes are walked");
        }
        names.iter().for_each(|name| self.walk(name));
    }

    /// A volume that was there when this daemon started was looked at for the first time.
    fn taken_up(&mut self, name: &VolumeName, sight: Sight) {
        let Some(volume) = self.volumes.get(name) else { return };
        let idle = !volume.working && !volume.failed && volume.removing.is_none();
        let (attachment, target) = match &sight {
            Sight::Right { attachment, target: Some(target), .. } if idle => (attachment, target),
            _ => return self.walk(name),
        };
        self.tools.board.update(&self.key(name), |status| {
            status.phase = Phase::Ready;
            status.device = Some(attachment.device.clone());
            status.target = Some(target.clone());
        });
        debug!(volume = %name, "found as it was made");
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.unlooked = false;
        }
        self.seen(name, sight);
    }

    /// Has a volume worked on that was not found as it should be.
    fn walk(&mut self, name: &VolumeName) {
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.unlooked = false;
        }
        self.work(name);
    }

    /// Nothing could be seen of the VM: its volumes say so, and stay as they are.
    fn unseen(&mut self, failure: &Failure) {
        self.looks.failed += 1;
        let delay = self.tools.backoff.delay(self.looks.failed, fastrand::f64());
        if self.looks.failed == 1 {
            warn!(reason = %failure.reason, why = failure.message, "the VM cannot be looked at");
        }
        self.look_within(delay);
        let at = Timestamp::now().checked_add(delay).ok();
        let names: Vec<_> = self.volumes.keys().filter(|n| self.is_steady(n)).cloned().collect();
        for name in names.iter().filter(|n| self.volumes[*n].timer.is_none()) {
            self.tools.board.trouble(&self.key(name), Phase::Ready, failure, at);
        }
    }

    fn seen(&mut self, name: &VolumeName, sight: Sight) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        // One in trouble has its own time to be tried again.
        if volume.timer.is_some() {
            return;
        }
        match sight {
            Sight::Differs(why) => {
                info!(volume = %name, why, "not as it should be: it is repaired");
                self.work(name);
            }
            Sight::Unclear(failure) => {
                debug!(volume = %name, why = failure.message, "it could not be seen");
            }
            Sight::Right { attachment, paths, .. } => {
                volume.attachment = Some(attachment);
                let missing = paths.present < paths.wanted;
                let repair = missing && volume.missing.is_due(self.tools.look_interval);
                if !missing {
                    volume.missing = Missing::default();
                }
                self.show(name, &paths);
                if repair {
                    info!(volume = %name, ?paths, "paths are missing: they are looked for");
                    self.work(name);
                }
                self.follow_growth(name, &paths);
            }
        }
    }

    /// Shows how the paths of a volume are that is otherwise well.
    fn show(&self, name: &VolumeName, paths: &Paths) {
        let Some(volume) = self.volumes.get(name) else { return };
        let (reason, message) = noticed(volume, paths).unzip();
        let message = message.unwrap_or_default();
        let before = self.status(name).reason;
        if before != reason {
            match reason {
                Some(reason) => warn!(volume = %name, %reason, message, "not all is well"),
                None => info!(volume = %name, living = paths.living, "all is well again"),
            }
        }
        self.tools.board.update(&self.key(name), |status| {
            status.reason = reason;
            status.message = message;
            status.retry_at = None;
            if let Some(device) = &mut status.device {
                device.paths = paths.living;
            }
        });
    }
}

/// Whether nothing is going on with a volume.
fn is_idle(volume: &Volume) -> bool {
    !volume.working && !volume.failed && volume.removing.is_none()
}

/// How often volumes are looked at when nothing happens, on a node that has so many.
fn at_rest(interval: Duration, volumes: usize) -> Duration {
    let volumes = u32::try_from(volumes).unwrap_or(u32::MAX);
    interval.mul_f64((f64::from(volumes) / f64::from(IN_AN_INTERVAL)).max(1.0))
}

/// What is to be told of a volume that is as it was made: the worst of it.
fn noticed(volume: &Volume, paths: &Paths) -> Option<(Reason, String)> {
    let (living, wanted) = (paths.living, paths.wanted);
    if living < wanted || living == 0 {
        let reason = if living == 0 { Reason::NoPaths } else { Reason::PathsDegraded };
        let dead = paths.dead.iter().map(|dead| format!(", {dead}")).collect::<String>();
        return Some((reason, format!("{living} of {wanted} paths work{dead}")));
    }
    if paths.protected && !volume.stored.spec.read_only {
        let message = "the LUN has become write-protected: the guest's writes fail";
        return Some((Reason::LunReadOnly, message.into()));
    }
    volume.growth.trouble()
}

/// When missing paths are tried again: a dead portal is not asked at every look.
#[derive(Default)]
pub(super) struct Missing {
    tries: u32,
    next: Option<Instant>,
}

impl Missing {
    fn is_due(&mut self, interval: Duration) -> bool {
        let now = Instant::now();
        if self.next.is_some_and(|next| now < next) {
            return false;
        }
        self.next = Some(now + interval.saturating_mul((1 << self.tries.min(8)).min(MISSING)));
        self.tries += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_at_rest_cost_a_large_node_no_more() {
        let minute = Duration::from_secs(60);
        for (volumes, interval) in [(0, 60), (1200, 60), (1800, 90), (10_000, 500)] {
            assert_eq!(at_rest(minute, volumes), Duration::from_secs(interval), "{volumes}");
        }
    }
}
