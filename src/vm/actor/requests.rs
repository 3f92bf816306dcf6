//! What is asked of a VM's handler: volumes wanted, and wanted no more.

use tracing::{Instrument, Span, info, warn};

use super::{Actor, Tools, Volume};
use crate::journal::StoredVolume;
use crate::reason::Reason;
use crate::spec::{AddOptions, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use crate::step::Step;
use crate::types::{Outcome, VolumeKey, VolumeName};
use crate::vm::facade::Refusal;
use crate::vm::failure::Failure;
use crate::vm::handler::{Asker, Message};
use crate::vm::plan::{self, Admission, Known};
use crate::vm::publish;

impl Actor {
    pub(super) async fn add(&mut self, spec: VolumeSpec, options: AddOptions, asker: Asker) {
        match plan::admit_add(&self.known(), &spec, self.tools.rules) {
            Err(refusal) => asker.answer(Err(refusal)),
            Ok(Admission::Ignore) => {
                if !options.dry_run
                    && let Err(failure) = self.keep(&spec.name, &options).await
                {
                    return asker.answer(Err(failure.into()));
                }
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

    /// Keeps the credentials that came with a request, in the place of those before.
    async fn keep(&self, name: &VolumeName, options: &AddOptions) -> Result<(), Failure> {
        let Some(chap) = &options.chap else { return Ok(()) };
        Ok(self.tools.effects.put_chap(&self.key(name), chap).await?)
    }

    /// Someone asked again for a volume that waits to be tried again.
    pub(super) fn try_now(&mut self, name: &VolumeName, options: AddOptions) {
        if let Some(volume) = self.volumes.get_mut(name) {
            volume.attempts = 0;
            volume.stored.accept_new_identity |= options.accept_new_identity;
        }
        self.work(name);
    }

    pub(super) async fn add_checked(
        &mut self,
        spec: VolumeSpec,
        options: AddOptions,
        checked: Result<(), Refusal>,
        cause: &Span,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        checked?;
        // Another request may have been taken since this one was sent off to be checked.
        if plan::admit_add(&self.known(), &spec, self.tools.rules)? == Admission::Ignore {
            if !options.dry_run {
                self.keep(&spec.name, &options).await?;
            }
            return Ok(Outcome::Already(self.status(&spec.name)));
        }
        let key = self.key(&spec.name);
        if options.dry_run {
            return Ok(Outcome::Already(publish::blank(&key, &spec)));
        }
        let accept_new_identity = options.accept_new_identity;
        let stored = StoredVolume { spec, accept_new_identity, removing: None };
        let store = async {
            self.keep(&stored.spec.name, &options).await?;
            Ok(self.tools.desired.put_volume(&self.vm, &stored).await?)
        };
        let stored_now: Result<(), Failure> = self.tools.tracker.run(Step::Intent, store).await;
        if let Err(failure) = stored_now {
            // The next start would do it, too.
            let _ = self.tools.effects.delete_chap(&key).await;
            return Err(failure.into());
        }
        info!(volume = %key.volume, source = stored.spec.source.key(), "volume wanted");
        let status = self.tools.board.open(&key, &stored.spec);
        let volume = Volume { cause: cause.clone(), ..Volume::new(stored, None) };
        self.volumes.insert(key.volume.clone(), volume);
        self.work(&key.volume);
        self.watch();
        Ok(Outcome::Done(status))
    }

    pub(super) fn remove(&mut self, name: VolumeName, options: RemoveOptions, asker: Asker) {
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
    pub(super) fn became_ready(&self, name: &VolumeName, shown: Option<Phase>) -> bool {
        shown != Some(Phase::Ready)
            && self.volumes.contains_key(name)
            && self.status(name).phase == Phase::Ready
    }

    pub(super) async fn remove_checked(
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
        self.next_expand(name);
        self.next_limits(name).await;
        Ok(Outcome::Done(self.status(name)))
    }
}

/// Notes that a removal was taken on.
async fn note_removal(
    tools: &Tools,
    key: &VolumeKey,
    options: RemoveOptions,
    gave_up: &[String],
) -> Result<(), Failure> {
    tools.effects.put_removal(key, options, gave_up).await?;
    if let Err(error) = tools.desired.put_removal(key, options).await {
        // The removal holds by its mark in /run; the durable store is told when it is done.
        let why = Failure::from(error).message;
        warn!(volume = %key.volume, why, "the removal is not durable yet");
    }
    Ok(())
}
