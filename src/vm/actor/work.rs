//! The work on a VM's volumes: one task a volume at a time, and what becomes of its result.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument, Span, info, warn};

use super::Actor;
use crate::reason::Reason;
use crate::spec::Phase;
use crate::step::Step;
use crate::types::{VolumeKey, VolumeName};
use crate::vm::failure::Failure;
use crate::vm::handler::Message;
use crate::vm::plan::{self, Left, Next};
use crate::vm::steps::{AttachFailure, Came, Circumstances};

impl Actor {
    /// Sets the volume's task going, unless it runs: attach or detach, whichever is wanted.
    pub(super) fn work(&mut self, name: &VolumeName) {
        let (starting, away) = (self.is_starting(), self.moving.away);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if let Some(timer) = volume.timer.take() {
            timer.abort();
        }
        if volume.working || volume.failed || away {
            volume.again = true;
            return;
        }
        (volume.working, volume.again, volume.unlooked) = (true, false, false);
        let (cancel, cancelled) = oneshot::channel();
        volume.cancel = volume.removing.is_none().then_some(cancel);
        let (steps, name) = (self.tools.steps.clone(), name.clone());
        let (stored, removing) = (volume.stored.clone(), volume.removing);
        let libvirt_waits = self.moving.libvirt_waits;
        let how = Circumstances { returns: volume.lasting, starting, libvirt_waits };
        let span = match removing {
            None => tracing::info_span!(parent: &volume.cause, "attach", volume = %name),
            Some(_) => tracing::info_span!(parent: &volume.cause, "detach", volume = %name),
        };
        let task = async move {
            match removing {
                None => {
                    let attached = tokio::select! {
                        biased;
                        attached = whole(steps.attach(&stored, how)) => attached,
                        Ok(()) = cancelled => {
                            Err(Failure::new(Reason::Cancelled, "the volume is wanted no more"))
                        }
                    };
                    let result = attached.unwrap_or_else(|failure| {
                        // What the guest has is not known here, so it is not taken away.
                        Err(AttachFailure { failure, left: Left::Unknown })
                    });
                    Message::Attached { name, result }
                }
                Some(options) => {
                    let detach = steps.detach(&stored.spec, options);
                    let result = whole(detach).await.unwrap_or_else(Err);
                    Message::Detached { name, result }
                }
            }
        };
        self.spawn(task.instrument(span));
    }

    pub(super) async fn attached(
        &mut self,
        name: &VolumeName,
        result: Result<Came, AttachFailure>,
    ) {
        let (starting, libvirt_waits) = (self.is_starting(), self.moving.libvirt_waits);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.working = false;
        volume.cancel = None;
        // It may have set out before the VM's start was announced, and asked libvirt, which waits.
        let too_soon = match &result {
            Ok(_) => false,
            Err(f) => libvirt_waits || f.failure.reason == Reason::VmNotRunning,
        };
        if too_soon && starting && volume.again && volume.removing.is_none() {
            return self.work(name);
        }
        self.came(name, result).await;
        self.arrived(Some(name));
    }

    /// What becomes of a volume whose attach has ended.
    async fn came(&mut self, name: &VolumeName, result: Result<Came, AttachFailure>) {
        let key = self.key(name);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if volume.removing.is_some() {
            self.tools.board.phase(&key, Phase::Detaching);
            return self.work(name);
        }
        let AttachFailure { failure, left } = match result {
            Ok(Came::ToPod) => return self.waits_for_start(name).await,
            Ok(Came::ToGuest) => {
                volume.attempts = 0;
                volume.lasting = true;
                volume.cause = Span::none();
                volume.stored.accept_new_identity = false;
                volume.attachment = None;
                self.look_when_settled();
                return self.not_starting().await;
            }
            Err(failed) => failed,
        };
        warn!(volume = %name, reason = %failure.reason, why = failure.message, ?left, "attach failed");
        failure.count("attach");
        let lasting = volume.lasting;
        match plan::after_failure(failure.reason, left, lasting, self.phase(name)) {
            Next::Retry(phase) => {
                let at = self.retry(name);
                self.tools.board.trouble(&key, phase, &failure, at);
            }
            Next::GiveUp => {
                self.volumes.entry(name.clone()).and_modify(|v| v.failed = true);
                let deleted = match self.disown(&key).await {
                    Ok(()) => self.tools.effects.delete_chap(&key).await,
                    error => error,
                };
                if let Err(error) = deleted {
                    let why = Failure::from(error).message;
                    warn!(volume = %name, why, "the failed add is still stored: a restart tries it again");
                }
                self.tools.board.trouble(&key, Phase::Failed, &failure, None);
            }
        }
    }

    /// Node and grant of a volume are there, and its VM is not yet.
    async fn waits_for_start(&mut self, name: &VolumeName) {
        let again = match self.volumes.get_mut(name) {
            // It may have been called off, or the start, while the last of it was made.
            Some(volume) => std::mem::take(&mut volume.again) || !self.is_starting(),
            None => return,
        };
        let words = "all is done that can be done before the VM runs";
        let waits = Failure::new(Reason::VmNotRunning, words);
        self.tools.board.trouble(&self.key(name), Phase::MountedToPod, &waits, None);
        if again {
            self.work(name);
        }
    }

    pub(super) async fn detached(&mut self, name: &VolumeName, result: Result<(), Failure>) {
        let key = self.key(name);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.working = false;
        let gave_up = self.status(name).gave_up;
        let tracker = self.tools.tracker.clone();
        let failure = match result {
            Ok(()) => match tracker.run(Step::Gone, self.forget(&key)).await {
                Ok(()) => {
                    self.volumes.remove(name);
                    self.tools.board.close(&key);
                    info!(volume = %name, ?gave_up, "volume gone");
                    self.drives_came_free();
                    if let Some(idle) = self.watcher.take_if(|_| self.volumes.is_empty()) {
                        idle.abort();
                        self.looks.stop();
                    }
                    return;
                }
                Err(failure) => failure,
            },
            Err(failure) => failure,
        };
        warn!(volume = %name, reason = %failure.reason, why = failure.message, "detach failed");
        failure.count("detach");
        let phase = match self.phase(name) {
            Phase::UnmountedFromPod => Phase::UnmountedFromPod,
            _ => Phase::Detaching,
        };
        // A removal that was taken on is carried through, however long it takes.
        let at = self.retry(name);
        self.tools.board.trouble(&key, phase, &failure, at);
    }

    /// What waits for a drive need not wait for its time.
    fn drives_came_free(&mut self) {
        let waits = |name: &VolumeName| self.status(name).reason == Some(Reason::DriveBusy);
        let names: Vec<_> = self.volumes.keys().filter(|name| waits(name)).cloned().collect();
        names.iter().for_each(|name| self.work(name));
    }

    /// Forgets a volume in both stores, the mark of its removal last.
    pub(super) async fn forget(&mut self, key: &VolumeKey) -> Result<(), Failure> {
        self.disown(key).await?;
        self.tools.effects.delete_chap(key).await?;
        self.tools.effects.delete(key).await?;
        Ok(self.tools.effects.delete_removal(key).await?)
    }

    /// Has the volume tried again later; returns when.
    pub(super) fn retry(&mut self, name: &VolumeName) -> Option<Timestamp> {
        let volume = self.volumes.get_mut(name)?;
        volume.attempts += 1;
        let delay = self.tools.backoff.delay(volume.attempts, fastrand::f64());
        let due = name.clone();
        let timer = Self::spawn_in(&mut self.tasks, &self.messages, async move {
            tokio::time::sleep(delay).await;
            Message::Due { name: due }
        });
        volume.timer = Some(timer);
        Timestamp::now().checked_add(delay).ok()
    }

    pub(super) fn spawn(&mut self, task: impl Future<Output = Message> + Send + 'static) {
        Self::spawn_in(&mut self.tasks, &self.messages, task);
    }

    pub(super) fn spawn_in(
        tasks: &mut JoinSet<()>,
        messages: &mpsc::WeakSender<Message>,
        task: impl Future<Output = Message> + Send + 'static,
    ) -> AbortHandle {
        let messages = messages.clone();
        tasks.spawn(async move {
            let message = task.await;
            if let Some(messages) = messages.upgrade() {
                // The handler may have stopped meanwhile; the journal knows what was done.
                let _ = messages.send(message).await;
            }
        })
    }
}

/// Runs a step to its end; a panic in it (a bug) is a failure of this volume alone.
pub(super) async fn whole<T>(step: impl Future<Output = T>) -> Result<T, Failure> {
    AssertUnwindSafe(step).catch_unwind().await.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let text = text.unwrap_or_else(|| "a panic without words".into());
        Failure::new(Reason::Internal, format!("a step panicked: {text}"))
    })
}
