//! I/O limits that are changed: work on a volume like any other, one at a time. An attach that is under
//! way ends first, for it goes by the limits that it began with; a removal wins.

use tracing::{Instrument, info, warn};

use super::Actor;
use crate::reason::Reason;
use crate::spec::VolumeStatus;
use crate::types::{IoLimits, Outcome, VolumeName};
use crate::vm::facade::Refusal;
use crate::vm::handler::{Asker, Message};
use crate::vm::steps::LimitsFailure;

/// A change that waits.
pub(super) struct Asked {
    limits: IoLimits,
    asker: Asker,
}

impl Actor {
    pub(super) fn limit(&mut self, name: &VolumeName, limits: IoLimits, asker: Asker) {
        let Some(volume) = self.volumes.get_mut(name) else {
            let message = format!("VM {} has no volume {name}", self.vm);
            let refusal = Refusal::new(Reason::VolumeNotFound, message).field("volume");
            return asker.answer(Err(refusal));
        };
        volume.limits.push_back(Asked { limits, asker });
        self.next(name);
    }

    /// Goes on with what waits for its turn at a volume.
    pub(super) fn next(&mut self, name: &VolumeName) {
        self.next_expand(name);
        self.next_limits(name);
    }

    fn next_limits(&mut self, name: &VolumeName) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if volume.removing.is_some() || volume.failed {
            let why = if volume.failed { "has failed" } else { "is being removed" };
            let refusal = Refusal::new(Reason::VolumeNotReady, format!("volume {name} {why}"));
            for asked in volume.limits.drain(..) {
                asked.asker.answer(Err(refusal.clone().field("volume")));
            }
            return;
        }
        if volume.working {
            return; // Its end comes here again.
        }
        let Some(Asked { limits, asker }) = volume.limits.pop_front() else { return };
        (volume.working, volume.again) = (true, false);
        let (steps, stored, name) = (self.tools.steps.clone(), volume.stored.clone(), name.clone());
        let span = tracing::info_span!(parent: &asker.span, "limits", volume = %name);
        let task = async move {
            let set = super::work::whole(steps.set_limits(&stored, limits)).await;
            let result =
                set.unwrap_or_else(|failure| Err(LimitsFailure { failure, wanted: false }));
            Message::Limited { name, limits, result, asker }
        };
        self.spawn(task.instrument(span));
    }

    pub(super) fn limited(
        &mut self,
        name: &VolumeName,
        limits: IoLimits,
        result: Result<Outcome, LimitsFailure>,
        asker: Asker,
    ) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.working = false;
        if result.as_ref().map_or_else(|failed| failed.wanted, |_| true) {
            volume.stored.spec.limits = limits;
        }
        let again = std::mem::take(&mut volume.again) || volume.removing.is_some();
        asker.answer(self.set(name, limits, result));
        if again {
            self.work(name);
        }
        self.next(name);
    }

    fn set(
        &self,
        name: &VolumeName,
        limits: IoLimits,
        result: Result<Outcome, LimitsFailure>,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        match result {
            Ok(Outcome::Done(())) => {
                info!(volume = %name, ?limits, "I/O limits set");
                Ok(Outcome::Done(self.status(name)))
            }
            Ok(Outcome::Already(())) => Ok(Outcome::Already(self.status(name))),
            Err(LimitsFailure { failure, .. }) => {
                let why = &failure.message;
                warn!(volume = %name, reason = %failure.reason, why, "I/O limits not set");
                failure.count("limits");
                Err(failure.into())
            }
        }
    }
}
