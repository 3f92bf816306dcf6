//! The handler of a VM as others see it: requests go in by message, answers come back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tracing::{Instrument, Span};

use super::actor::{Actor, Tools};
use super::facade::{Answer, Expanded, Refusal, Set, Synced, Wish};
use super::failure::Failure;
use super::plan::fc::Power;
use super::steps::{AttachFailure, Came, ExpandFailure, Grown, Sight, Stir};
use crate::reason::Reason;
use crate::spec::{AddOptions, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use crate::types::{IoLimits, Outcome, VmId, VolumeName};

/// Who asked: the request's span, under which the work nests, and where its answer goes.
pub(super) struct Asker<T = VolumeStatus> {
    pub(super) span: Span,
    reply: oneshot::Sender<Result<Outcome<T>, Refusal>>,
}

impl<T> Asker<T> {
    pub(super) fn answer(self, result: Result<Outcome<T>, Refusal>) {
        // The asker may have gone; what was taken on is durable.
        let _ = self.reply.send(result);
    }
}

/// A wish, and who has it.
pub(super) struct Asked {
    pub(super) wish: Wish,
    pub(super) asker: Asker,
}

/// An answer to come.
pub(super) type Promise = oneshot::Receiver<Answer>;

impl Asked {
    pub(super) fn new(wish: Wish, span: Span) -> (Self, Promise) {
        let (reply, answer) = oneshot::channel();
        (Self { wish, asker: Asker { span, reply } }, answer)
    }
}

/// The answers to come about a set of volumes.
pub(super) struct Promises {
    /// About its volumes, in their order.
    pub(super) volumes: Vec<Promise>,
    /// About what is not in it.
    pub(super) removed: Vec<(VolumeName, Promise)>,
}

/// An addition that was sent off to be checked.
pub(super) struct Add {
    pub(super) spec: Box<VolumeSpec>,
    pub(super) options: AddOptions,
    pub(super) asker: Asker,
    /// The volumes whose removal was asked for with it.
    pub(super) leaving: Arc<BTreeSet<VolumeName>>,
}

/// A removal that was sent off to be checked.
pub(super) struct Removal {
    pub(super) name: VolumeName,
    pub(super) options: RemoveOptions,
    pub(super) asker: Asker,
    /// The volume and its phase when the check began.
    pub(super) known: Option<(VolumeSpec, Phase)>,
}

/// What the task is told: by requests, and by the work that it has set going.
pub(super) enum Message {
    Wishes {
        asked: Vec<Asked>,
    },
    Sync {
        set: Set,
        span: Span,
        reply: oneshot::Sender<Result<Promises, Refusal>>,
    },
    AddsChecked {
        checked: Vec<(Add, Result<Power, Refusal>)>,
        /// The revision that they belong to.
        of: Option<i64>,
    },
    RemovalsChecked {
        checked: Vec<(Removal, Result<Vec<String>, Refusal>)>,
        of: Option<i64>,
    },
    Expand {
        name: VolumeName,
        expected: Option<u64>,
        asker: Asker<Expanded>,
    },
    Expanded {
        name: VolumeName,
        result: Result<Outcome<Grown>, ExpandFailure>,
        asker: Option<Asker<Expanded>>,
    },
    Limit {
        name: VolumeName,
        limits: IoLimits,
        asker: Asker,
    },
    Limited {
        name: VolumeName,
        /// They were not wanted before.
        wanted: bool,
        result: Result<Outcome, Failure>,
        asker: Asker,
    },
    Attached {
        name: VolumeName,
        result: Result<Came, AttachFailure>,
    },
    Detached {
        name: VolumeName,
        result: Result<(), Failure>,
    },
    Due {
        name: VolumeName,
    },
    Stirred(Stir),
    Look,
    Looked {
        found: Result<BTreeMap<VolumeName, Sight>, Failure>,
    },
    Prepare {
        within: Duration,
        libvirt_waits: bool,
        reply: oneshot::Sender<()>,
    },
    /// The VM that was to start has not.
    NotStarted,
    Move {
        away: bool,
        reply: oneshot::Sender<Result<Vec<VolumeSpec>, Refusal>>,
    },
    Count {
        reply: oneshot::Sender<usize>,
    },
    Revision {
        reply: oneshot::Sender<Option<i64>>,
    },
    Stop {
        grace: Duration,
        reply: oneshot::Sender<()>,
    },
}

/// The handler of one VM, for whoever sends it requests. Clones send to the same task.
#[derive(Debug, Clone)]
pub struct Handler {
    vm: VmId,
    messages: mpsc::Sender<Message>,
}

/// How many requests may wait; more make their senders wait.
const MAILBOX: usize = 256;

impl Handler {
    /// Starts the handler, which first takes up what the stores say was wanted or begun.
    pub async fn start(vm: VmId, tools: Tools) -> Result<Self, Failure> {
        let (messages, mailbox) = mpsc::channel(MAILBOX);
        let actor = Actor::resume(vm.clone(), tools, messages.downgrade()).await?;
        let span = tracing::info_span!(parent: None, "vm", vm = %vm);
        tokio::spawn(actor.run(mailbox).instrument(span));
        Ok(Self { vm, messages })
    }

    /// Wants a volume; see [`super::facade::Volumes::add_volume`].
    pub async fn add(
        &self,
        spec: VolumeSpec,
        options: AddOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        self.wish(Wish::Add { spec: spec.into(), options }).await
    }

    /// Wants a volume no more; see [`super::facade::Volumes::remove_volume`].
    pub async fn remove(
        &self,
        name: VolumeName,
        options: RemoveOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        self.wish(Wish::Remove { name, options }).await
    }

    async fn wish(&self, wish: Wish) -> Answer {
        let (asked, promise) = Asked::new(wish, Span::current());
        self.send(Message::Wishes { asked: vec![asked] }).await?;
        self.kept(promise).await
    }

    /// Grants or refuses wishes; see [`super::facade::Volumes::change_volumes`].
    pub async fn change(&self, wishes: Vec<Wish>) -> Result<Vec<Answer>, Refusal> {
        let span = Span::current();
        let asked = wishes.into_iter().map(|wish| Asked::new(wish, span.clone()));
        let (asked, promises): (Vec<_>, Vec<_>) = asked.unzip();
        self.send(Message::Wishes { asked }).await?;
        Ok(join_all(promises.into_iter().map(|promise| self.kept(promise))).await)
    }

    /// Makes a set the whole of the VM's volumes; see [`super::facade::Volumes::sync_volumes`].
    pub async fn sync(&self, set: Set) -> Result<Synced, Refusal> {
        let span = Span::current();
        let promises = self.ask(|reply| Message::Sync { set, span, reply }).await??;
        let (names, removed): (Vec<_>, Vec<_>) = promises.removed.into_iter().unzip();
        let volumes = join_all(promises.volumes.into_iter().map(|promise| self.kept(promise)));
        let removed = join_all(removed.into_iter().map(|promise| self.kept(promise)));
        let (volumes, removed) = tokio::join!(volumes, removed);
        Ok(Synced { volumes, removed: names.into_iter().zip(removed).collect() })
    }

    /// Has a volume follow its LUN; see [`super::facade::Volumes::expand_volume`].
    pub async fn expand(
        &self,
        name: VolumeName,
        expected: Option<u64>,
    ) -> Result<Outcome<Expanded>, Refusal> {
        let span = Span::current();
        let asked = |reply| Message::Expand { name, expected, asker: Asker { span, reply } };
        self.ask(asked).await?
    }

    /// Sets a volume's I/O limits; see [`super::facade::Volumes::set_io_limits`].
    pub async fn set_limits(
        &self,
        name: VolumeName,
        limits: IoLimits,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let span = Span::current();
        self.ask(|reply| Message::Limit { name, limits, asker: Asker { span, reply } }).await?
    }

    /// The VM is about to start: has its volumes attached as far as goes, and kept so `within` that time.
    /// Returns when each has come as far as it can, until when libvirt is not asked anything if it waits for
    /// that (`libvirt_waits`).
    pub async fn prepare(&self, within: Duration, libvirt_waits: bool) -> Result<(), Refusal> {
        self.ask(|reply| Message::Prepare { within, libvirt_waits, reply }).await
    }

    /// The VM will not start: what was made for that is undone.
    pub async fn cancel_start(&self) -> Result<(), Refusal> {
        self.send(Message::NotStarted).await
    }

    /// The VM is about to move to another pod (`away`), or not any more. From then on nothing of it is
    /// changed. Returns the volumes that its guest has.
    pub async fn move_away(&self, away: bool) -> Result<Vec<VolumeSpec>, Refusal> {
        self.ask(|reply| Message::Move { away, reply }).await?
    }

    /// How many volumes it has, those being removed included.
    pub async fn count(&self) -> Result<usize, Refusal> {
        self.ask(|reply| Message::Count { reply }).await
    }

    /// The set of volumes that was accepted last.
    pub async fn revision(&self) -> Result<Option<i64>, Refusal> {
        self.ask(|reply| Message::Revision { reply }).await
    }

    /// Ends the handler. What is under way has `grace` to end by itself and is dropped then, as a
    /// crash would: the journal knows it. No volume is detached.
    pub async fn stop(&self, grace: Duration) {
        // An error means that it has ended already.
        let _ = self.ask(|reply| Message::Stop { grace, reply }).await;
    }

    async fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> Message,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.send(message(reply)).await?;
        answer.await.map_err(|_| self.gone())
    }

    async fn send(&self, message: Message) -> Result<(), Refusal> {
        self.messages.send(message).await.map_err(|_| self.gone())
    }

    async fn kept(&self, promise: Promise) -> Answer {
        promise.await.unwrap_or_else(|_| Err(self.gone()))
    }

    fn gone(&self) -> Refusal {
        Refusal::new(Reason::ShuttingDown, format!("the handler of {} is stopping", self.vm))
    }
}
