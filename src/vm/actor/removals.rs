//! Removals that are asked of a VM's handler; see [`super::requests`] for their way.

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tracing::{Instrument, info, warn};

use super::work::whole;
use super::{Actor, Tools, Volume};
use crate::reason::Reason;
use crate::spec::{AddOptions, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use crate::step::Step;
use crate::types::{Outcome, VmId, VolumeKey, VolumeName};
use crate::vm::facade::{Refusal, Wish};
use crate::vm::failure::Failure;
use crate::vm::handler::{Asked, Asker, Message, Removal};
use crate::vm::plan::{self, Admission, set};

/// A removal that is taken on, and what it gives up.
struct Taken {
    key: VolumeKey,
    options: RemoveOptions,
    gave_up: Vec<String>,
    asker: Asker,
}

impl Actor {
    /// What becomes of a removal for which nothing has to be checked: it is under way already, or only
    /// the memory of a failed add has to go.
    pub(super) fn admit_removal(
        &mut self,
        name: &VolumeName,
        options: RemoveOptions,
    ) -> Option<Outcome<VolumeStatus>> {
        let known = self.volumes.get(name).map(Volume::known);
        match plan::admit_remove(known.as_ref(), options) {
            Some(Admission::Ignore) => {
                let mut status = self.status(name);
                if !options.dry_run {
                    self.try_now(name, AddOptions::default());
                    // What is told is the new attempt, which has no trouble yet.
                    self.tools.board.phase(&status.key, status.phase);
                    status = self.status(name);
                }
                Some(Outcome::Already(status))
            }
            Some(Admission::Forget) => {
                let status = self.status(name);
                if !options.dry_run {
                    self.volumes.remove(name);
                    self.tools.board.close(&status.key);
                }
                Some(Outcome::Done(VolumeStatus { phase: Phase::Gone, ..status }))
            }
            Some(Admission::Accept) | None => None,
        }
    }

    /// A volume as it is now, and its phase.
    fn shown(&self, name: &VolumeName) -> Option<(VolumeSpec, Phase)> {
        let volume = self.volumes.get(name)?;
        Some(((*volume.stored.spec).clone(), self.phase(name)))
    }

    pub(super) fn removal(
        &self,
        name: VolumeName,
        options: RemoveOptions,
        asker: Asker,
    ) -> Removal {
        let known = self.shown(&name);
        Removal { name, options, asker, known }
    }

    /// Checks removals; those whose checks end together are taken on together.
    pub(super) fn check_removals(&mut self, removals: Vec<Removal>, of: Option<i64>) {
        if removals.is_empty() {
            return;
        }
        let (steps, messages, most) =
            (self.tools.steps.clone(), self.messages.clone(), removals.len());
        let checks = removals.into_iter().map(move |removal| {
            let steps = steps.clone();
            let span = removal.asker.span.clone();
            let check = async move {
                let spec = removal.known.as_ref().map(|(spec, _)| spec);
                let check = steps.check_remove(&removal.name, spec, removal.options);
                let checked = whole(check).await.unwrap_or_else(|failure| Err(failure.into()));
                (removal, checked)
            };
            check.instrument(span)
        });
        let checks: FuturesUnordered<_> = checks.collect();
        self.tasks.spawn(async move {
            let mut ended = checks.ready_chunks(most);
            while let Some(checked) = ended.next().await {
                let Some(messages) = messages.upgrade() else { return };
                // The handler may have stopped meanwhile; nothing was changed.
                let _ = messages.send(Message::RemovalsChecked { checked, of }).await;
            }
        });
    }

    /// Takes on what may be.
    pub(super) async fn removals_checked(
        &mut self,
        checked: Vec<(Removal, Result<Vec<String>, Refusal>)>,
        of: Option<i64>,
    ) {
        let current = set::admit_of(self.revision.as_ref(), of);
        let (mut taken, mut again) = (Vec::new(), Vec::new());
        for (removal, checked) in checked {
            if current.is_ok() && checked.is_ok() && self.became_ready(&removal) {
                // The guest was not asked about it yet.
                let Removal { name, options, asker, .. } = removal;
                again.push(Asked { wish: Wish::Remove { name, options }, asker });
                continue;
            }
            let Removal { name, options, asker, .. } = removal;
            let key = self.key(&name);
            match current.clone().and(checked) {
                Err(refusal) => asker.answer(Err(refusal)),
                Ok(_) if !self.volumes.contains_key(&name) => {
                    // It went while the removal was being checked.
                    let message = format!("there is no volume {key} any more");
                    let refusal = Refusal::new(Reason::VolumeNotFound, message).field("volume");
                    asker.answer(Err(refusal));
                }
                Ok(gave_up) if options.dry_run => {
                    let status = VolumeStatus { gave_up, ..self.status(&name) };
                    asker.answer(Ok(Outcome::Already(status)));
                }
                Ok(gave_up) => taken.push(Taken { key, options, gave_up, asker }),
            }
        }
        self.take_off(taken).await;
        if !again.is_empty() {
            self.wishes(again, of).await;
        }
    }

    /// Whether a volume came to be ready since its removal was sent off to be checked.
    fn became_ready(&self, removal: &Removal) -> bool {
        let Removal { name, options, known, .. } = removal;
        !options.force
            && known.as_ref().is_none_or(|(_, phase)| *phase != Phase::Ready)
            && self.shown(name).is_some_and(|(_, phase)| phase == Phase::Ready)
    }

    /// Makes removals durable, in one transaction, and sets their work going.
    async fn take_off(&mut self, taken: Vec<Taken>) {
        if taken.is_empty() {
            return;
        }
        let noting = note(&self.tools, &self.vm, &taken);
        let noted = match self.tools.tracker.run(Step::Removal, noting).await {
            Ok(noted) => noted,
            Err(failure) => vec![Err(failure); taken.len()],
        };
        for (taken, noted) in taken.into_iter().zip(noted) {
            match noted {
                Ok(()) => self.end(taken).await,
                Err(failure) => taken.asker.answer(Err(failure.into())),
            }
        }
    }

    /// A volume is wanted no more, and that is noted.
    async fn end(&mut self, taken: Taken) {
        let Taken { key, options, gave_up, asker } = taken;
        let name = &key.volume;
        let Some(volume) = self.volumes.get_mut(name) else { return };
        if gave_up.is_empty() {
            info!(volume = %name, force = options.force, "volume wanted no more");
        } else {
            warn!(volume = %name, force = options.force, ?gave_up, "volume wanted no more");
        }
        self.tools.board.gave_up(&key, &gave_up);
        volume.removing = Some(options);
        volume.attempts = 0;
        volume.cause = asker.span.clone();
        if let Some(attach) = volume.cancel.take() {
            // It stops where it is, as a crash would; its report starts the detach, which goes by the
            // effects. An error means that it has ended already.
            let _ = attach.send(());
        }
        self.tools.board.phase(&key, Phase::Detaching);
        self.work(name);
        self.next_expand(name);
        self.next_limits(name).await;
        asker.answer(Ok(Outcome::Done(self.status(name))));
    }
}

/// Notes that removals were taken on, each for itself; an error where none could be.
async fn note(
    tools: &Tools,
    vm: &VmId,
    removals: &[Taken],
) -> Result<Vec<Result<(), Failure>>, Failure> {
    let (mut noted, mut marked) = (Vec::new(), Vec::new());
    for Taken { key, options, gave_up, .. } in removals {
        let mark = tools.effects.put_removal(key, *options, gave_up).await;
        if mark.is_ok() {
            marked.push((key.volume.clone(), *options));
        }
        noted.push(mark.map_err(Failure::from));
    }
    if marked.is_empty() {
        return noted.into_iter().find_map(Result::err).map_or(Ok(Vec::new()), Err);
    }
    if let Err(error) = tools.desired.put_removals(vm, &marked).await {
        // The removals hold by their marks in /run; the durable store is told when they are done.
        let (volumes, why) = (marked.len(), Failure::from(error).message);
        warn!(volumes, why, "removals are not durable yet");
    }
    Ok(noted)
}
