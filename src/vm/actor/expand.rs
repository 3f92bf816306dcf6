//! Volumes that follow their LUNs, asked for or announced.
//!
//! An expand is work on its volume like any other: one at a time, in the order in which they were asked
//! for, behind an attach that is walked again for a ready volume. A removal wins: it calls off the one
//! that is under way, and those that wait are refused.

use std::sync::Arc;

use tokio::sync::oneshot;
use tracing::{Instrument, Span, debug, info, warn};

use super::Actor;
use crate::connector::Paths;
use crate::reason::Reason;
use crate::spec::Phase;
use crate::types::{Outcome, VolumeName};
use crate::vm::facade::{Expanded, Refusal};
use crate::vm::failure::Failure;
use crate::vm::handler::{Asker, Message};
use crate::vm::steps::{ExpandFailure, Grown};

/// One expand that waits; nobody asked for one that the array announced.
pub(super) struct Asked {
    expected: Option<u64>,
    asker: Option<Asker<Expanded>>,
}

/// Growth that was announced and not followed yet.
#[derive(Default)]
pub(super) struct Growth {
    /// The array has said so.
    pub(super) announced: bool,
    /// Why it could not be followed.
    trouble: Option<Failure>,
}

impl Growth {
    /// What is to be told of it.
    pub(super) fn trouble(&self) -> Option<(Reason, String)> {
        let trouble = self.trouble.as_ref()?;
        let message = format!("the LUN has grown and the guest was not told: {}", trouble.message);
        Some((trouble.reason, message))
    }
}

impl Actor {
    pub(super) fn expand(
        &mut self,
        name: &VolumeName,
        expected: Option<u64>,
        asker: Asker<Expanded>,
    ) {
        let Some(volume) = self.volumes.get_mut(name) else {
            let message = format!("VM {} has no volume {name}", self.vm);
            let refusal = Refusal::new(Reason::VolumeNotFound, message).field("volume");
            return asker.answer(Err(refusal));
        };
        volume.expands.push_back(Asked { expected, asker: Some(asker) });
        self.next_expand(name);
    }

    /// Goes on with the expands that wait, as far as the volume is ready for it.
    pub(super) fn next_expand(&mut self, name: &VolumeName) {
        let refusal = self.not_now(name);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if let Some(refusal) = refusal {
            for asked in volume.expands.drain(..) {
                if let Some(asker) = asked.asker {
                    asker.answer(Err(refusal.clone()));
                }
            }
            return;
        }
        if volume.working {
            return; // Its end comes here again.
        }
        let Some(Asked { expected, asker }) = volume.expands.pop_front() else { return };
        (volume.working, volume.again) = (true, false);
        let (cancel, cancelled) = oneshot::channel();
        volume.cancel = Some(cancel);
        let (steps, stored, name) = (self.tools.steps.clone(), volume.stored.clone(), name.clone());
        let cause = asker.as_ref().map_or_else(Span::none, |asker| asker.span.clone());
        let span = tracing::info_span!(parent: &cause, "expand", volume = %name);
        let task = async move {
            let failed = |failure| Err(ExpandFailure { failure, expect_size: None });
            let result = tokio::select! {
                biased;
                walked = super::work::whole(steps.expand(&stored, expected)) => {
                    walked.unwrap_or_else(failed)
                }
                // It stops where it is; what it did is good for the device whoever has it.
                Ok(()) = cancelled => {
                    let message = "the volume is being removed: its expand was called off";
                    failed(Failure::new(Reason::Cancelled, message))
                }
            };
            Message::Expanded { name, result, asker }
        };
        self.spawn(task.instrument(span));
    }

    /// Why a volume cannot be expanded, nor in a moment.
    fn not_now(&self, name: &VolumeName) -> Option<Refusal> {
        let volume = self.volumes.get(name)?;
        let status = self.status(name);
        let message = if volume.removing.is_some() {
            format!("volume {name} is being removed")
        } else if volume.failed || status.phase != Phase::Ready {
            let why = status.reason.map(|r| format!(" ({r}: {})", status.message));
            let phase = status.phase.as_str();
            format!("volume {name} is {phase}, not Ready{}", why.unwrap_or_default())
        } else {
            return None;
        };
        Some(Refusal::new(Reason::VolumeNotReady, message).field("volume"))
    }

    pub(super) fn expanded(
        &mut self,
        name: &VolumeName,
        result: Result<Outcome<Grown>, ExpandFailure>,
        asker: Option<Asker<Expanded>>,
    ) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        (volume.working, volume.cancel) = (false, None);
        let expect_size = match &result {
            Ok(Outcome::Done(grown) | Outcome::Already(grown)) => grown.expect_size,
            Err(failed) => failed.expect_size,
        };
        if expect_size.is_some() {
            Arc::make_mut(&mut volume.stored.spec).expect_size = expect_size;
        }
        let again = std::mem::take(&mut volume.again) || volume.removing.is_some();
        let trouble = match &result {
            Ok(outcome) => {
                match outcome {
                    Outcome::Done(grown) => info!(volume = %name, ?grown, "volume expanded"),
                    Outcome::Already(grown) => debug!(volume = %name, ?grown, "found expanded"),
                }
                volume.growth.announced = false;
                Some(None)
            }
            Err(ExpandFailure { failure, .. }) => {
                let why = &failure.message;
                warn!(volume = %name, reason = %failure.reason, why, "expand failed");
                failure.count("expand");
                // Whoever asked is told; what nobody asked for is told to all.
                let all = asker.is_none() && volume.removing.is_none();
                all.then(|| Some(failure.clone()))
            }
        };
        if let Some(trouble) = trouble {
            self.show_growth(name, trouble);
        }
        if let Some(asker) = asker {
            asker.answer(self.told(name, result));
        }
        if again {
            self.work(name);
        }
        self.next_expand(name);
    }

    /// Shows why growth that was announced could not be followed, or that it no longer is so.
    fn show_growth(&mut self, name: &VolumeName, trouble: Option<Failure>) {
        let key = self.key(name);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        let before = std::mem::replace(&mut volume.growth.trouble, trouble);
        let now = volume.growth.trouble();
        self.tools.board.update(&key, |status| match (now, before) {
            (Some((reason, message)), _) => {
                (status.reason, status.message) = (Some(reason), message);
            }
            (None, Some(before)) if status.reason == Some(before.reason) => {
                status.reason = None;
                status.message.clear();
            }
            (None, _) => {}
        });
    }

    fn told(
        &self,
        name: &VolumeName,
        result: Result<Outcome<Grown>, ExpandFailure>,
    ) -> Result<Outcome<Expanded>, Refusal> {
        let expanded = |grown: Grown| {
            let Grown { before, size, .. } = grown;
            Expanded { status: self.status(name), before, size }
        };
        match result {
            Ok(Outcome::Done(grown)) => Ok(Outcome::Done(expanded(grown))),
            Ok(Outcome::Already(grown)) => Ok(Outcome::Already(expanded(grown))),
            Err(ExpandFailure { failure, .. }) => Err(failure.into()),
        }
    }

    /// A look has found a volume right: whether its LUN has grown and it has to follow, as configured.
    pub(super) fn follow_growth(&mut self, name: &VolumeName, paths: &Paths) {
        let auto = self.tools.auto_expand;
        let Some(volume) = self.volumes.get_mut(name).filter(|_| auto) else { return };
        if !paths.grown && !volume.growth.announced {
            volume.growth = Growth::default();
            return;
        }
        volume.growth.announced = true;
        if volume.expands.is_empty() {
            info!(volume = %name, "its LUN has grown: it follows");
            volume.expands.push_back(Asked { expected: None, asker: None });
        }
        self.next_expand(name);
    }
}
