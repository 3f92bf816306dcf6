//! What is asked of a VM's handler: wishes about volumes. One is a batch of one.
//!
//! ```text
//! wishes ─ admitted? ─┬─ no, or nothing to do ────────────────────► answer, each its own
//!                     ├─ adds: checked side by side, together ─┐
//!                     └─ removals: checked side by side,       ├─ admitted still? ─ durable: one
//!                        as they come ─────────────────────────┘  transaction ─ answers ─ work
//! ```
//! Additions ask libvirt alone, which answers all of them or none: they are taken on together, in their order.
//! A removal asks the guest too, which may take its time: it is taken on when its own check has ended.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join_all;
use tracing::{Instrument, Span, info};

use super::work::whole;
use super::{Actor, Volume};
use crate::journal::StoredVolume;
use crate::spec::{AddOptions, Phase, VolumeSpec, VolumeStatus};
use crate::step::Step;
use crate::types::{Outcome, VolumeName};
use crate::vm::facade::{Answer, Refusal, Wish};
use crate::vm::failure::Failure;
use crate::vm::handler::{Add, Asked, Message};
use crate::vm::plan::fc::Power;
use crate::vm::plan::{self, Admission, Known, set};
use crate::vm::publish;

impl Actor {
    /// Takes wishes; those that are admitted are checked. `of` is the revision that they belong to.
    pub(super) async fn wishes(&mut self, asked: Vec<Asked>, of: Option<i64>) {
        let of_removal = |asked: &Asked| match &asked.wish {
            Wish::Remove { name, .. } => Some(name.clone()),
            Wish::Add { .. } => None,
        };
        let leaving: BTreeSet<_> = asked.iter().filter_map(of_removal).collect();
        let known = plan::without(self.known(), &leaving);
        let leaving = Arc::new(leaving);
        let (mut adds, mut removals) = (Vec::new(), Vec::new());
        for Asked { wish, asker } in asked {
            match wish {
                Wish::Add { spec, options } => {
                    match plan::admit_add(&known, &spec, self.tools.rules) {
                        Err(refusal) => asker.answer(Err(refusal)),
                        Ok(Admission::Ignore) => asker.answer(self.again(&spec, options).await),
                        Ok(Admission::Accept | Admission::Forget) => {
                            let leaving = Arc::clone(&leaving);
                            adds.push(Add { spec, options, asker, leaving });
                        }
                    }
                }
                Wish::Remove { name, options } => match self.admit_removal(&name, options) {
                    Some(status) => asker.answer(Ok(status)),
                    None => removals.push(self.removal(name, options, asker)),
                },
            }
        }
        self.check_adds(adds, of);
        self.check_removals(removals, of);
    }

    /// Someone asked again for a volume that there is.
    async fn again(&mut self, spec: &VolumeSpec, options: AddOptions) -> Answer {
        let status = self.status(&spec.name);
        if !options.dry_run {
            self.keep(&spec.name, &options).await?;
            if status.phase == Phase::Pending {
                self.try_now(&spec.name, options);
            }
        }
        Ok(Outcome::Already(status))
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

    fn check_adds(&mut self, adds: Vec<Add>, of: Option<i64>) {
        if adds.is_empty() {
            return;
        }
        let steps = self.tools.steps.clone();
        self.spawn(async move {
            let checks = adds
                .iter()
                .map(|add| (whole(steps.check_add(&add.spec, &add.leaving)), &add.asker.span))
                .map(|(check, span)| check.instrument(span.clone()));
            let checked = join_all(checks).await.into_iter().map(|checked| checked?);
            let checked: Vec<_> = checked.collect();
            Message::AddsChecked { checked: adds.into_iter().zip(checked).collect(), of }
        });
    }

    /// Takes on what may be, in its order.
    pub(super) async fn adds_checked(
        &mut self,
        checked: Vec<(Add, Result<Power, Refusal>)>,
        of: Option<i64>,
    ) {
        let current = set::admit_of(self.revision.as_ref(), of);
        // Other requests may have been taken since these were sent off to be checked; and each of these
        // counts for those after it.
        let leaving = checked.first().map(|(add, _)| Arc::clone(&add.leaving)).unwrap_or_default();
        let mut known = plan::without(self.known(), &leaving);
        let (mut taken, mut marks) = (Vec::new(), false);
        for (add, checked) in checked {
            let admitted = current.clone().and(checked).and_then(|power| {
                let admission = plan::admit_add(&known, &add.spec, self.tools.rules)?;
                Ok((admission, self.admit_fc(&add.spec, power)?))
            });
            match admitted {
                Err(refusal) => add.asker.answer(Err(refusal)),
                Ok((Admission::Ignore, _)) => {
                    let again = self.again(&add.spec, add.options).await;
                    add.asker.answer(again);
                }
                Ok((Admission::Accept | Admission::Forget, marks_vm)) => {
                    let spec = Arc::new((*add.spec).clone());
                    if add.options.dry_run {
                        let vm_needs_hba = marks_vm || self.needs_hba(&spec);
                        let blank = publish::blank(&self.key(&spec.name), &spec);
                        let status = VolumeStatus { vm_needs_hba, ..blank };
                        add.asker.answer(Ok(Outcome::Already(status)));
                    } else if let Err(failure) = self.keep(&spec.name, &add.options).await {
                        add.asker.answer(Err(failure.into()));
                        continue;
                    } else {
                        marks |= marks_vm;
                        taken.push(add);
                    }
                    known.push(Known { spec, failed: false, removing: None });
                }
            }
        }
        self.take_on(taken, marks).await;
    }

    /// Makes additions durable, in one transaction, and the VM's mark for Fibre Channel with them, and sets
    /// their work going.
    async fn take_on(&mut self, adds: Vec<Add>, marks: bool) {
        if adds.is_empty() {
            return;
        }
        let stored: Vec<StoredVolume> = adds.iter().map(to_store).collect();
        let store = async { Ok(self.tools.desired.put_volumes(&self.vm, &stored, marks).await?) };
        let stored_now: Result<(), Failure> = self.tools.tracker.run(Step::Intent, store).await;
        if marks && stored_now.is_ok() {
            info!("the VM must be scheduled to a node with an HBA before it starts");
            self.fc_marked = true;
            self.tell_who_needs_hbas();
        }
        for (Add { spec, options: _, asker, leaving: _ }, stored) in adds.into_iter().zip(stored) {
            let answer = match &stored_now {
                Ok(()) => Ok(Outcome::Done(self.begin(stored, &asker.span))),
                Err(failure) => {
                    // The next start would do it, too.
                    let _ = self.tools.effects.delete_chap(&self.key(&spec.name)).await;
                    Err(failure.clone().into())
                }
            };
            asker.answer(answer);
        }
        self.watch();
    }

    /// A volume is wanted, and that is durable.
    fn begin(&mut self, stored: StoredVolume, cause: &Span) -> VolumeStatus {
        let key = self.key(&stored.spec.name);
        info!(volume = %key.volume, source = stored.spec.source.key(), "volume wanted");
        self.tools.board.open(&key, &stored.spec);
        let needs = self.needs_hba(&stored.spec);
        self.tools.board.update(&key, |status| status.vm_needs_hba = needs);
        let volume = Volume { cause: cause.clone(), ..Volume::new(stored, None) };
        self.volumes.insert(key.volume.clone(), volume);
        let status = self.status(&key.volume);
        self.work(&key.volume);
        status
    }
}

fn to_store(add: &Add) -> StoredVolume {
    let accept_new_identity = add.options.accept_new_identity;
    StoredVolume { spec: Arc::new((*add.spec).clone()), accept_new_identity, removing: None }
}
