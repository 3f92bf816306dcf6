//! The task that owns one VM's volumes.
//!
//! It never waits for the system: checks, attaches and detaches run in tasks of their own, at most
//! one a volume, and report back by message. So a hung portal or libvirt holds up one volume, and
//! the handler still answers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Span, warn};

use super::backoff::Backoff;
use super::failure::Failure;
use super::handler::Message;
use super::plan::{Known, Rules};
use super::publish::{self, Board};
use super::steps::Steps;
use crate::connector::Attachment;
use crate::journal::{Desired, EffectsStore, StoredVolume};
use crate::spec::{Phase, RemoveOptions, Revision, VolumeStatus};
use crate::step::Tracker;
use crate::types::{VmId, VolumeKey, VolumeName};

mod expand;
mod fc;
mod limits;
mod look;
mod mailbox;
mod moving;
mod removals;
mod requests;
mod sync;
mod work;

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
    /// A volume whose LUN has grown follows it unasked.
    pub auto_expand: bool,
    /// What may be added.
    pub rules: Rules,
    /// The VM is about to move to another pod of this node.
    pub moving: bool,
}

/// A volume as its handler has it.
struct Volume {
    stored: StoredVolume,
    removing: Option<RemoveOptions>,
    failed: bool,
    /// It was ready, or was wanted when this daemon started: no trouble ends it, only a removal.
    lasting: bool,
    working: bool,
    /// It is to be worked on when what is under way has ended.
    again: bool,
    /// Expands that wait for their turn.
    expands: VecDeque<expand::Asked>,
    /// Changes of its I/O limits that wait for their turn.
    limits: VecDeque<limits::Asked>,
    /// Its LUN was announced to have grown, and it has not followed yet; why, if that was tried.
    growth: expand::Growth,
    /// Calls off the attach or expand that is under way.
    cancel: Option<oneshot::Sender<()>>,
    attempts: u32,
    timer: Option<AbortHandle>,
    /// What was attached, as of the last look at it.
    attachment: Option<Attachment>,
    missing: look::Missing,
    /// It was there when this daemon started, and nobody has looked at it since.
    unlooked: bool,
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
            again: false,
            expands: VecDeque::new(),
            limits: VecDeque::new(),
            growth: expand::Growth::default(),
            cancel: None,
            attempts: 0,
            timer: None,
            attachment: None,
            missing: look::Missing::default(),
            unlooked: false,
            cause: Span::none(),
        }
    }

    /// What admission is to know of it.
    fn known(&self) -> Known {
        let (spec, failed, removing) = (self.stored.spec.clone(), self.failed, self.removing);
        Known { spec, failed, removing }
    }
}

/// The task's own state.
pub(super) struct Actor {
    vm: VmId,
    tools: Tools,
    volumes: BTreeMap<VolumeName, Volume>,
    /// The whole set of volumes that was accepted last, as the durable store has it.
    revision: Option<Revision>,
    /// The VM is to be able to have Fibre Channel volumes, as the durable store has it.
    fc_marked: bool,
    tasks: JoinSet<()>,
    looks: look::Looks,
    moving: moving::Moving,
    /// Tells what may have changed; only while there are volumes to look at then.
    watcher: Option<AbortHandle>,
    /// Weak, so that the handler ends when all its users have gone.
    messages: mpsc::WeakSender<Message>,
}

impl Actor {
    pub(super) async fn run(mut self, messages: mpsc::Receiver<Message>) {
        self.take_up();
        let mut mailbox = mailbox::Mailbox::new(messages);
        while let Some(message) = mailbox.next().await {
            // Ended tasks are only collected here; they have reported by message.
            while self.tasks.try_join_next().is_some() {}
            match message {
                Message::Wishes { asked } => match self.moves() {
                    None => self.wishes(asked, None).await,
                    Some(refusal) => {
                        asked.into_iter().for_each(|a| a.asker.answer(Err(refusal.clone())));
                    }
                },
                Message::Sync { set, span, reply } => {
                    // The asker may have gone; what was taken on is durable.
                    let _ = reply.send(self.sync(set, &span).await);
                }
                Message::AddsChecked { checked, of } => self.adds_checked(checked, of).await,
                Message::RemovalsChecked { checked, of } => {
                    self.removals_checked(checked, of).await;
                }
                Message::Expand { name, expected, asker } => match self.moves() {
                    None => self.expand(&name, expected, asker),
                    Some(refusal) => asker.answer(Err(refusal)),
                },
                Message::Expanded { name, result, asker } => {
                    self.expanded(&name, result, asker);
                    self.next_limits(&name).await;
                }
                Message::Attached { name, result } => {
                    self.attached(&name, result).await;
                    self.next_expand(&name);
                    self.next_limits(&name).await;
                }
                Message::Limit { name, limits, asker } => match self.moves() {
                    None => self.limit(&name, limits, asker).await,
                    Some(refusal) => asker.answer(Err(refusal)),
                },
                Message::Limited { name, wanted, result, asker } => {
                    self.limited(&name, wanted, result, asker);
                    self.next_limits(&name).await;
                }
                Message::Detached { name, result } => self.detached(&name, result).await,
                Message::Due { name } => self.work(&name),
                Message::Stirred(stir) => self.stirred(&stir),
                Message::Look => self.look(),
                Message::Looked { found } => self.looked(found),
                Message::Prepare { within, libvirt_waits, reply } => {
                    self.prepare(within, libvirt_waits, reply).await;
                }
                Message::NotStarted => self.not_starting().await,
                Message::Move { away, reply } => self.move_away(away, reply),
                Message::Count { reply } => {
                    let live = self.volumes.values().filter(|v| !v.failed).count();
                    let _ = reply.send(live);
                }
                Message::Revision { reply } => {
                    let _ = reply.send(self.revision.as_ref().map(|known| known.number));
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
            self.arrived(None);
            self.stands_still();
        }
    }

    /// What the stores say: wanted volumes are found attached or are attached, what was begun and is
    /// wanted no more is detached.
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
            if tools.moving {
                moving::show(&tools, &key).await?;
            }
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
            let spec = Arc::new(effects.spec);
            tools.board.open(&key, &spec);
            tools.board.gave_up(&key, &tools.effects.gave_up(&key).await?);
            let stored = StoredVolume { spec, accept_new_identity: false, removing: None };
            volumes.insert(key.volume, Volume::new(stored, Some(removal.unwrap_or_default())));
        }
        for key in tools.effects.kept_chaps(&vm).await? {
            if !volumes.contains_key(&key.volume) {
                tools.effects.delete_chap(&key).await?;
            }
        }
        let revision = tools.desired.revision(&vm).await?;
        let start = tools.effects.start(&vm).await?;
        let (tasks, looks) = (JoinSet::new(), look::Looks::default());
        let moving = moving::Moving::new(tools.moving);
        let fc_marked = tools.desired.fc_marked(&vm).await?;
        let mut actor = Self {
            vm,
            tools,
            volumes,
            revision,
            fc_marked,
            tasks,
            looks,
            moving,
            watcher: None,
            messages,
        };
        actor.tell_who_needs_hbas();
        if let Some(until) = start {
            let left = Duration::try_from(until.duration_since(Timestamp::now()));
            actor.starts_within(left.unwrap_or_default());
        }
        Ok(actor)
    }

    /// The first work: what may be attached is looked at, and only what is not found as it should be is
    /// worked on like the rest.
    fn take_up(&mut self) {
        let looks = !self.is_starting() && !self.moving.away;
        for volume in self.volumes.values_mut() {
            volume.unlooked = looks && volume.removing.is_none();
        }
        let others = |(_, v): &(&VolumeName, &Volume)| !v.unlooked;
        let names: Vec<_> =
            self.volumes.iter().filter(others).map(|(name, _)| name.clone()).collect();
        names.iter().for_each(|name| self.work(name));
        self.look();
        self.watch();
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

    fn phase(&self, name: &VolumeName) -> Phase {
        self.tools.board.phase_of(&self.vm, name).unwrap_or(Phase::Pending)
    }

    fn known(&self) -> Vec<Known> {
        self.volumes.values().map(Volume::known).collect()
    }
}

#[cfg(test)]
mod tests;
