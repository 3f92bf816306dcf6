//! The task that owns one VM's volumes.
//!
//! It never waits for the system: checks, attaches and detaches run in tasks of their own, at most
//! one a volume, and report back by message. So a hung portal or libvirt holds up one volume, and
//! the handler still answers.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument, Span, info, warn};

use super::backoff::Backoff;
use super::facade::Refusal;
use super::failure::Failure;
use super::handler::{Asker, Message};
use super::plan::{self, Admission, Known, Left, Next};
use super::publish::{self, Board};
use super::steps::{AttachFailure, Steps};
use crate::connector::Attachment;
use crate::journal::{Desired, EffectsStore, StoredVolume};
use crate::reason::Reason;
use crate::spec::{AddOptions, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use crate::step::{Step, Tracker};
use crate::types::{Outcome, VmId, VolumeKey, VolumeName};

mod look;

/// What the handler works with.
#[derive(Clone)]
pub struct Tools {
    /// The way of an attach and back.
    pub steps: Arc<dyn Steps>,
    /// Where statuses are published.
    pub board: Board,
    /// What is wanted, durable.
    pub desired: Desired,
    /// What was done in this boot.
    pub effects: EffectsStore,
    /// When to try again.
    pub backoff: Backoff,
    /// Runs the steps.
    pub tracker: Tracker,
    /// How often volumes are looked at when nothing happens.
    pub look_interval: Duration,
    /// At most so many volumes.
    pub max_volumes: usize,
}

/// A volume as its handler has it.
struct Volume {
    stored: StoredVolume,
    removing: Option<RemoveOptions>,
    failed: bool,
    /// It was ready, or was wanted when this daemon started: no trouble ends it, only a removal.
    lasting: bool,
    working: bool,
    /// Calls off the attach that is under way.
    cancel: Option<oneshot::Sender<()>>,
    attempts: u32,
    timer: Option<AbortHandle>,
    /// What was attached, as of the last look at it.
    attachment: Option<Attachment>,
    missing: look::Missing,
    /// The span of the request that is being worked on; that of nobody after a restart.
    cause: Span,
}

impl Volume {
    fn new(stored: StoredVolume, removing: Option<RemoveOptions>) -> Self {
        Self {
            stored,
            removing,
            failed: false,
            lasting: false,
            working: false,
            cancel: None,
            attempts: 0,
            timer: None,
            attachment: None,
            missing: look::Missing::default(),
            cause: Span::none(),
        }
    }
}

/// The task's own state.
pub(super) struct Actor {
    vm: VmId,
    tools: Tools,
    volumes: BTreeMap<VolumeName, Volume>,
    tasks: JoinSet<()>,
    looks: look::Looks,
    /// Tells what may have changed; only while there are volumes to look at then.
    watcher: Option<AbortHandle>,
    /// Weak, so that the handler ends when all its users have gone.
    messages: mpsc::WeakSender<Message>,
}

impl Actor {
    pub(super) async fn run(mut self, mut mailbox: mpsc::Receiver<Message>) {
        self.look_at_all();
        while let Some(message) = mailbox.recv().await {
            // Ended tasks are only collected here; they have reported by message.
            while self.tasks.try_join_next().is_some() {}
            match message {
                Message::Add { spec, options, asker } => self.add(spec, options, asker),
                Message::AddChecked { spec, options, checked, asker } => {
                    let answer = self.add_checked(spec, options, checked, &asker.span).await;
                    asker.answer(answer);
                }
                Message::Remove { name, options, asker } => self.remove(name, options, asker),
                Message::RemoveChecked { name, options, checked, shown, asker } => {
                    if checked.is_ok() && !options.force && self.became_ready(&name, shown) {
                        // The guest was not asked about it yet.
                        self.remove(name, options, asker);
                        continue;
                    }
                    let answer = self.remove_checked(&name, options, checked, &asker.span).await;
                    asker.answer(answer);
                }
                Message::Attached { name, result } => self.attached(&name, result).await,
                Message::Detached { name, result } => self.detached(&name, result).await,
                Message::Due { name } => self.work(&name),
                Message::Stirred(stir) => self.stirred(&stir),
                Message::Look => self.look(),
                Message::Looked { found } => self.looked(found),
                Message::Count { reply } => {
                    let live = self.volumes.values().filter(|v| !v.failed).count();
                    let _ = reply.send(live);
                }
                Message::Stop { grace, reply } => {
                    let timers = self.volumes.values_mut().filter_map(|v| v.timer.take());
                    timers.chain(self.watcher.take()).for_each(|task| task.abort());
                    self.looks.stop();
                    let ended = async { while self.tasks.join_next().await.is_some() {} };
                    if tokio::time::timeout(grace, ended).await.is_err() {
                        warn!(
                            left = self.tasks.len(),
                            "work was still under way; the journal has it"
                        );
                    }
                    let _ = reply.send(());
                    return;
                }
            }
        }
    }

    /// Takes up what the stores say: wanted volumes are attached (or found attached), what was
    /// begun and is wanted no more is detached.
    pub(super) async fn resume(
        vm: VmId,
        tools: Tools,
        messages: mpsc::WeakSender<Message>,
    ) -> Result<Self, Failure> {
        let key = |volume: &VolumeName| VolumeKey { vm: vm.clone(), volume: volume.clone() };
        let mut volumes = BTreeMap::new();
        for stored in tools.desired.volumes(&vm).await? {
            let key = key(&stored.spec.name);
            let removing = tools.effects.removal(&key).await?.or(stored.removing);
            tools.board.open(&key, &stored.spec);
            tools.board.gave_up(&key, &tools.effects.gave_up(&key).await?);
            let volume = Volume { lasting: true, ..Volume::new(stored, removing) };
            volumes.insert(key.volume, volume);
        }
        for key in tools.effects.volumes(&vm).await? {
            if volumes.contains_key(&key.volume) {
                continue;
            }
            let removal = tools.effects.removal(&key).await?;
            let Some(effects) = tools.effects.get(&key).await? else {
                tools.effects.delete_removal(&key).await?;
                continue;
            };
            let spec = effects.spec;
            tools.board.open(&key, &spec);
            tools.board.gave_up(&key, &tools.effects.gave_up(&key).await?);
            let stored = StoredVolume { spec, accept_new_identity: false, removing: None };
            volumes.insert(key.volume, Volume::new(stored, Some(removal.unwrap_or_default())));
        }
        let (tasks, looks) = (JoinSet::new(), look::Looks::default());
        Ok(Self { vm, tools, volumes, tasks, looks, watcher: None, messages })
    }

    /// Sees to it that every volume is as it is wanted.
    fn look_at_all(&mut self) {
        let names: Vec<_> = self.volumes.keys().cloned().collect();
        for name in names {
            self.work(&name);
        }
        self.watch();
    }

    fn watch(&mut self) {
        if self.watcher.is_some() || self.volumes.values().all(|v| v.failed) {
            return;
        }
        let (steps, messages) = (self.tools.steps.clone(), self.messages.clone());
        let (tell, mut told) = mpsc::channel(8);
        let pass_on = async move {
            while let Some(stir) = told.recv().await {
                let Some(messages) = messages.upgrade() else { return };
                if messages.send(Message::Stirred(stir)).await.is_err() {
                    return;
                }
            }
        };
        let watch = async move {
            tokio::join!(steps.watch(tell), pass_on);
        };
        self.watcher = Some(self.tasks.spawn(watch));
    }

    fn key(&self, name: &VolumeName) -> VolumeKey {
        VolumeKey { vm: self.vm.clone(), volume: name.clone() }
    }

    fn status(&self, name: &VolumeName) -> VolumeStatus {
        let key = self.key(name);
        self.tools.board.get(&key).unwrap_or_else(|| {
            let spec = &self.volumes[name].stored.spec;
            publish::blank(&key, spec)
        })
    }

    fn known(&self) -> Vec<Known> {
        let known = |(name, volume): (&VolumeName, &Volume)| Known {
            spec: volume.stored.spec.clone(),
            phase: self.status(name).phase,
            removing: volume.removing,
        };
        self.volumes.iter().map(known).collect()
    }

    // ---- add ----------------------------------------------------------------------------------

    fn add(&mut self, spec: VolumeSpec, options: AddOptions, asker: Asker) {
        match plan::admit_add(&self.known(), &spec, self.tools.max_volumes) {
            Err(refusal) => asker.answer(Err(refusal)),
            Ok(Admission::Ignore) => {
                let status = self.status(&spec.name);
                if !options.dry_run && status.phase == Phase::Pending {
                    self.try_now(&spec.name, options);
                }
                asker.answer(Ok(Outcome::Already(status)));
            }
            Ok(Admission::Accept | Admission::Forget) => {
                let steps = self.tools.steps.clone();
                self.spawn(async move {
                    let checked = steps.check_add(&spec).instrument(asker.span.clone()).await;
                    Message::AddChecked { spec, options, checked, asker }
                });
            }
        }
    }

    /// Someone asked again for a volume that waits to be tried again.
    fn try_now(&mut self, name: &VolumeName, options: AddOptions) {
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.attempts = 0;
            volume.stored.accept_new_identity |= options.accept_new_identity;
        }
        self.work(name);
    }

    async fn add_checked(
        &mut self,
        spec: VolumeSpec,
        options: AddOptions,
        checked: Result<(), Refusal>,
        cause: &Span,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        checked?;
        // Another request may have been taken since this one was sent off to be checked.
        if plan::admit_add(&self.known(), &spec, self.tools.max_volumes)? == Admission::Ignore {
            return Ok(Outcome::Already(self.status(&spec.name)));
        }
        let key = self.key(&spec.name);
        if options.dry_run {
            return Ok(Outcome::Already(publish::blank(&key, &spec)));
        }
        let accept_new_identity = options.accept_new_identity;
        let stored = StoredVolume { spec, accept_new_identity, removing: None };
        let store = self.tools.desired.put_volume(&self.vm, &stored);
        self.tools.tracker.run(Step::Intent, store).await.map_err(Failure::from)?;
        info!(volume = %key.volume, source = stored.spec.source.key(), "volume wanted");
        let status = self.tools.board.open(&key, &stored.spec);
        let volume = Volume { cause: cause.clone(), ..Volume::new(stored, None) };
        self.volumes.insert(key.volume.clone(), volume);
        self.work(&key.volume);
        self.watch();
        Ok(Outcome::Done(status))
    }

    // ---- remove -------------------------------------------------------------------------------

    fn remove(&mut self, name: VolumeName, options: RemoveOptions, asker: Asker) {
        let volume = self.volumes.get(&name);
        let known = volume.map(|v| Known {
            spec: v.stored.spec.clone(),
            phase: self.status(&name).phase,
            removing: v.removing,
        });
        match plan::admit_remove(known.as_ref(), options) {
            Some(Admission::Ignore) => {
                let mut status = self.status(&name);
                if !options.dry_run {
                    self.try_now(&name, AddOptions::default());
                    // What is told is the new attempt, which has no trouble yet.
                    self.tools.board.phase(&status.key, status.phase);
                    status = self.status(&name);
                }
                asker.answer(Ok(Outcome::Already(status)));
            }
            Some(Admission::Forget) => {
                let status = self.status(&name);
                if !options.dry_run {
                    self.volumes.remove(&name);
                    self.tools.board.close(&status.key);
                }
                asker.answer(Ok(Outcome::Done(VolumeStatus { phase: Phase::Gone, ..status })));
            }
            Some(Admission::Accept) | None => {
                let steps = self.tools.steps.clone();
                let shown = known.as_ref().map(|k| k.phase);
                let spec = known.map(|k| k.spec);
                self.spawn(async move {
                    let check = steps.check_remove(&name, spec.as_ref(), options);
                    let checked = check.instrument(asker.span.clone()).await;
                    Message::RemoveChecked { name, options, checked, shown, asker }
                });
            }
        }
    }

    /// Whether a volume came to be ready since it was `shown` in a phase.
    fn became_ready(&self, name: &VolumeName, shown: Option<Phase>) -> bool {
        shown != Some(Phase::Ready)
            && self.volumes.contains_key(name)
            && self.status(name).phase == Phase::Ready
    }

    async fn remove_checked(
        &mut self,
        name: &VolumeName,
        options: RemoveOptions,
        checked: Result<Vec<String>, Refusal>,
        cause: &Span,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let key = self.key(name);
        let gave_up = checked?;
        let Some(volume) = self.volumes.get_mut(name) else {
            // It went while the removal was being checked.
            let message = format!("volume {key} is unknown");
            return Err(Refusal::new(Reason::VolumeNotFound, message).field("name"));
        };
        if options.dry_run {
            return Ok(Outcome::Already(VolumeStatus { gave_up, ..self.status(name) }));
        }
        let removal = note_removal(&self.tools, &key, options, &gave_up);
        self.tools.tracker.run(Step::Removal, removal).await?;
        info!(volume = %name, force = options.force, ?gave_up, "volume wanted no more");
        self.tools.board.gave_up(&key, &gave_up);
        volume.removing = Some(options);
        volume.attempts = 0;
        volume.cause = cause.clone();
        if let Some(attach) = volume.cancel.take() {
            // It stops where it is, as a crash would; its report starts the detach, which goes by the
            // effects. An error means that it has ended already.
            let _ = attach.send(());
        }
        self.tools.board.phase(&key, Phase::Detaching);
        self.work(name);
        Ok(Outcome::Done(self.status(name)))
    }

    // ---- work ---------------------------------------------------------------------------------

    /// Sets the volume's task going, unless it runs: attach or detach, whichever is wanted.
    fn work(&mut self, name: &VolumeName) {
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if let Some(timer) = volume.timer.take() {
            timer.abort();
        }
        if volume.working || volume.failed {
            return;
        }
        volume.working = true;
        let (cancel, cancelled) = oneshot::channel();
        volume.cancel = volume.removing.is_none().then_some(cancel);
        let (steps, name) = (self.tools.steps.clone(), name.clone());
        let (stored, removing) = (volume.stored.clone(), volume.removing);
        let span = match removing {
            None => tracing::info_span!(parent: &volume.cause, "attach", volume = %name),
            Some(_) => tracing::info_span!(parent: &volume.cause, "detach", volume = %name),
        };
        let task = async move {
            match removing {
                None => {
                    let attached = tokio::select! {
                        biased;
                        attached = whole(steps.attach(&stored)) => attached,
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

    async fn attached(&mut self, name: &VolumeName, result: Result<(), AttachFailure>) {
        let key = self.key(name);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.working = false;
        volume.cancel = None;
        if volume.removing.is_some() {
            self.tools.board.phase(&key, Phase::Detaching);
            return self.work(name);
        }
        let AttachFailure { failure, left } = match result {
            Ok(()) => {
                volume.attempts = 0;
                volume.lasting = true;
                volume.cause = Span::none();
                volume.stored.accept_new_identity = false;
                volume.attachment = None;
                return self.look_when_settled();
            }
            Err(failed) => failed,
        };
        warn!(volume = %name, reason = %failure.reason, why = failure.message, ?left, "attach failed");
        failure.count("attach");
        let lasting = volume.lasting;
        match plan::after_failure(failure.reason, left, lasting, self.status(name).phase) {
            Next::Retry(phase) => {
                let at = self.retry(name);
                self.tools.board.trouble(&key, phase, &failure, at);
            }
            Next::GiveUp => {
                self.volumes.entry(name.clone()).and_modify(|v| v.failed = true);
                if let Err(error) = self.tools.desired.delete_volume(&key).await {
                    let why = Failure::from(error).message;
                    warn!(volume = %name, why, "the failed add is still stored: a restart tries it again");
                }
                self.tools.board.trouble(&key, Phase::Failed, &failure, None);
            }
        }
    }

    async fn detached(&mut self, name: &VolumeName, result: Result<(), Failure>) {
        let key = self.key(name);
        let Some(volume) = self.volumes.get_mut(name) else { return };
        volume.working = false;
        let gave_up = self.status(name).gave_up;
        let failure = match result {
            Ok(()) => match self.tools.tracker.run(Step::Gone, self.forget(&key)).await {
                Ok(()) => {
                    self.volumes.remove(name);
                    self.tools.board.close(&key);
                    info!(volume = %name, ?gave_up, "volume gone");
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
        let phase = match self.status(name).phase {
            Phase::UnmountedFromPod => Phase::UnmountedFromPod,
            _ => Phase::Detaching,
        };
        // A removal that was taken on is carried through, however long it takes.
        let at = self.retry(name);
        self.tools.board.trouble(&key, phase, &failure, at);
    }

    /// Forgets a volume in both stores, the mark of its removal last.
    async fn forget(&self, key: &VolumeKey) -> Result<(), Failure> {
        self.tools.desired.delete_volume(key).await?;
        self.tools.effects.delete(key).await?;
        Ok(self.tools.effects.delete_removal(key).await?)
    }

    /// Has the volume tried again later; returns when.
    fn retry(&mut self, name: &VolumeName) -> Option<Timestamp> {
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

    fn spawn(&mut self, task: impl Future<Output = Message> + Send + 'static) {
        Self::spawn_in(&mut self.tasks, &self.messages, task);
    }

    fn spawn_in(
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

/// Notes that a removal was taken on.
async fn note_removal(
    tools: &Tools,
    key: &VolumeKey,
    options: RemoveOptions,
    gave_up: &[String],
) -> Result<(), Failure> {
    tools.effects.put_removal(key, options).await?;
    tools.effects.add_gave_up(key, gave_up).await?;
    if let Err(error) = tools.desired.put_removal(key, options).await {
        // The removal holds by its mark in /run; the durable store is told when it is done.
        let why = Failure::from(error).message;
        warn!(volume = %key.volume, why, "the removal is not durable yet");
    }
    Ok(())
}

/// Runs a step to its end; a panic in it (a bug) is a failure of this volume alone.
async fn whole<T>(step: impl Future<Output = T>) -> Result<T, Failure> {
    AssertUnwindSafe(step).catch_unwind().await.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let text = text.unwrap_or_else(|| "a panic without words".into());
        Failure::new(Reason::Internal, format!("a step panicked: {text}"))
    })
}

#[cfg(test)]
mod tests;
