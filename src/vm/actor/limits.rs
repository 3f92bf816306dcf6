//! I/O limits that are changed: work on a volume like any other, one at a time. An attach that is under
//! way ends first, for it goes by the limits that it began with; a removal wins.
//!
//! The wish is written by the handler itself, as every wish is: so it never comes in between a removal
//! and its mark.

use std::sync::Arc;

use tracing::{Instrument, Span, info, warn};

use super::Actor;
use crate::reason::Reason;
use crate::spec::{VolumeSpec, VolumeStatus};
use crate::step::Step;
use crate::types::{IoLimits, Outcome, VolumeName};
use crate::vm::facade::Refusal;
use crate::vm::failure::Failure;
use crate::vm::handler::{Asker, Message};

/// A change that waits.
pub(super) struct Asked {
    limits: IoLimits,
    asker: Asker,
}

impl Actor {
    pub(super) async fn limit(&mut self, name: &VolumeName, limits: IoLimits, asker: Asker) {
        let Some(volume) = self.volumes.get_mut(name) else {
            let message = format!("VM {} has no volume {name}", self.vm);
            let refusal = Refusal::new(Reason::VolumeNotFound, message).field("volume");
            return asker.answer(Err(refusal));
        };
        let spec = VolumeSpec { limits, ..(*volume.stored.spec).clone() };
        if let Err((_, error)) = spec.check() {
            let refusal = Refusal::new(Reason::InvalidOption, error.to_string()).field("limits");
            return asker.answer(Err(refusal));
        }
        volume.limits.push_back(Asked { limits, asker });
        self.next_limits(name).await;
    }

    /// Goes on with the changes that wait, as far as nothing else goes on with the volume.
    pub(super) async fn next_limits(&mut self, name: &VolumeName) {
        let key = self.key(name);
        while let Some(volume) = self.volumes.get_mut(name) {
            let ends = volume.removing.is_some() || volume.failed;
            if volume.working && !ends {
                return; // Its end comes here again.
            }
            let Some(Asked { limits, asker }) = volume.limits.pop_front() else { return };
            if ends {
                let why = if volume.failed { "has failed" } else { "is being removed" };
                let message = format!("volume {name} {why}");
                let refusal = Refusal::new(Reason::VolumeNotReady, message).field("volume");
                asker.answer(Err(refusal));
                continue;
            }
            let mut stored = volume.stored.clone();
            let wanted = stored.spec.limits != limits;
            Arc::make_mut(&mut stored.spec).limits = limits;
            let store = async {
                let put = self.tools.desired.put_volume(&self.vm, &stored);
                if wanted { put.await } else { Ok(()) }
            };
            if let Err(error) = self.tools.tracker.run(Step::Limits, store).await {
                asker.answer(Err(Failure::from(error).into()));
                continue;
            }
            volume.stored.spec = stored.spec.clone();
            self.tools.board.update(&key, |status| status.spec = stored.spec.clone());
            (volume.working, volume.again) = (true, false);
            let (steps, name) = (self.tools.steps.clone(), name.clone());
            let parent: &Span = &asker.span;
            let span = tracing::info_span!(parent: parent, "limits", volume = %name);
            let task = async move {
                let set = super::work::whole(steps.set_limits(&stored)).await;
                Message::Limited { name, wanted, result: set.and_then(|set| set), asker }
            };
            self.spawn(task.instrument(span));
        }
    }

    pub(super) fn limited(
        &mut self,
        name: &VolumeName,
        wanted: bool,
        result: Result<Outcome, Failure>,
        asker: Asker,
    ) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.working = false;
        let again = std::mem::take(&mut volume.again) || volume.removing.is_some();
        asker.answer(self.set(name, wanted, result));
        if again {
            self.work(name);
        }
        self.next_expand(name);
    }

    fn set(
        &self,
        name: &VolumeName,
        wanted: bool,
        result: Result<Outcome, Failure>,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let status = self.status(name);
        match result {
            Ok(outcome) if outcome.changed() || wanted => {
                info!(volume = %name, limits = ?status.spec.limits, "I/O limits set");
                Ok(Outcome::Done(status))
            }
            Ok(_) => Ok(Outcome::Already(status)),
            Err(failure) => {
                let why = &failure.message;
                warn!(volume = %name, reason = %failure.reason, why, "I/O limits not set yet");
                failure.count("limits");
                Err(failure.into())
            }
        }
    }
}
