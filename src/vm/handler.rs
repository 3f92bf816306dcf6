//! The handler of a VM as others see it: requests go in by message, answers come back.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::{Instrument, Span};

use super::actor::{Actor, Tools};
use super::facade::{Expanded, Refusal};
use super::failure::Failure;
use super::steps::{AttachFailure, ExpandFailure, Grown, Sight, Stir};
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

/// What the task is told: by requests, and by the work that it has set going.
pub(super) enum Message {
    Add {
        spec: VolumeSpec,
        options: AddOptions,
        asker: Asker,
    },
    AddChecked {
        spec: VolumeSpec,
        options: AddOptions,
        checked: Result<(), Refusal>,
        asker: Asker,
    },
    Remove {
        name: VolumeName,
        options: RemoveOptions,
        asker: Asker,
    },
    RemoveChecked {
        name: VolumeName,
        options: RemoveOptions,
        checked: Result<Vec<String>, Refusal>,
        /// The volume's phase when the check began.
        shown: Option<Phase>,
        asker: Asker,
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
        result: Result<(), AttachFailure>,
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
    Count {
        reply: oneshot::Sender<usize>,
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
        let span = Span::current();
        self.ask(|reply| Message::Add { spec, options, asker: Asker { span, reply } }).await?
    }

    /// Wants a volume no more; see [`super::facade::Volumes::remove_volume`].
    pub async fn remove(
        &self,
        name: VolumeName,
        options: RemoveOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let span = Span::current();
        self.ask(|reply| Message::Remove { name, options, asker: Asker { span, reply } }).await?
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

    /// How many volumes it has, those being removed included.
    pub async fn count(&self) -> Result<usize, Refusal> {
        self.ask(|reply| Message::Count { reply }).await
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
        let gone = || {
            Refusal::new(Reason::ShuttingDown, format!("the handler of {} is stopping", self.vm))
        };
        let (reply, answer) = oneshot::channel();
        self.messages.send(message(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}
