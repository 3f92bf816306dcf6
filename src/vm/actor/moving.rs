//! The VM is about to start, or to move to another pod of this node.
//!
//! ```text
//! about to start:  volumes are attached as far as goes without a guest, until it comes, or does not in time
//! about to move:   nothing is changed, nothing repaired; whoever wants something is refused
//! ```
//! While a VM moves, that its guest has ended in one pod does not say that its volumes are free: the guest may
//! have come up in the other. So they stand still until somebody says how it went.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::{Actor, Tools};
use crate::reason::Reason;
use crate::spec::{Phase, VolumeSpec};
use crate::types::{VolumeKey, VolumeName};
use crate::vm::facade::Refusal;
use crate::vm::failure::Failure;
use crate::vm::handler::Message;

/// A start that was announced, or a move.
#[derive(Default)]
pub(super) struct Moving {
    /// What ends the time in which the VM is believed to start.
    start: Option<AbortHandle>,
    /// libvirt starts it as soon as those who wait have their answer.
    pub(super) libvirt_waits: bool,
    /// Who waits for volumes to come as far as they can, and which of them.
    waiting: Vec<(BTreeSet<VolumeName>, oneshot::Sender<()>)>,
    /// It is about to move.
    pub(super) away: bool,
    /// Who waits for it to stand still.
    still: Option<oneshot::Sender<Result<Vec<VolumeSpec>, Refusal>>>,
}

/// Shows a volume that the guest was given, for nobody will look at it before it is known where the guest is.
pub(super) async fn show(tools: &Tools, key: &VolumeKey) -> Result<(), Failure> {
    let Some(effects) = tools.effects.get(key).await? else { return Ok(()) };
    let Some(target) = effects.disk.and_then(|disk| disk.target) else { return Ok(()) };
    tools.board.update(key, |status| {
        status.phase = Phase::Ready;
        status.target = Some(target);
        status.device = effects.device.map(|attachment| attachment.device);
    });
    Ok(())
}

impl Moving {
    /// At the start of a handler.
    pub(super) fn new(away: bool) -> Self {
        Self { away, ..Self::default() }
    }
}

impl Actor {
    /// Whether the VM is about to start.
    pub(super) fn is_starting(&self) -> bool {
        self.moving.start.is_some()
    }

    /// The VM is about to start: has its volumes attached as far as goes. Answers when each has come
    /// there or cannot.
    pub(super) async fn prepare(
        &mut self,
        within: Duration,
        libvirt_waits: bool,
        reply: oneshot::Sender<()>,
    ) {
        if self.moving.away {
            return; // Who asks has looked before; the answer that never comes says that it ended.
        }
        let until = Timestamp::now().checked_add(within).unwrap_or(Timestamp::MAX);
        if let Err(error) = self.tools.effects.put_start(&self.vm, until).await {
            // It only has to be announced again after a restart of this daemon.
            warn!(why = Failure::from(error).message, "the announced start could not be kept");
        }
        info!(%until, "the VM is about to start");
        self.starts_within(within);
        self.moving.libvirt_waits |= libvirt_waits;
        let wanted = self.volumes.iter().filter(|(_, v)| v.removing.is_none() && !v.failed);
        let names: BTreeSet<VolumeName> = wanted.map(|(name, _)| name.clone()).collect();
        for name in &names {
            if let Some(volume) = self.volumes.get_mut(name) {
                volume.attempts = 0;
            }
            self.work(name);
        }
        self.moving.waiting.push((names, reply));
        self.arrived(None);
    }

    pub(super) fn starts_within(&mut self, within: Duration) {
        let timer = Self::spawn_in(&mut self.tasks, &self.messages, async move {
            tokio::time::sleep(within).await;
            Message::NotStarted
        });
        if let Some(before) = self.moving.start.replace(timer) {
            before.abort();
        }
    }

    /// A volume has come as far as it can, or is not to be waited for.
    pub(super) fn arrived(&mut self, name: Option<&VolumeName>) {
        for (names, _) in &mut self.moving.waiting {
            names.retain(|waited| Some(waited) != name && self.volumes.contains_key(waited));
        }
        let (there, waiting) = std::mem::take(&mut self.moving.waiting)
            .into_iter()
            .partition(|(names, _): &(BTreeSet<VolumeName>, _)| names.is_empty());
        self.moving.waiting = waiting;
        self.moving.libvirt_waits &= !self.moving.waiting.is_empty();
        let there: Vec<(BTreeSet<VolumeName>, oneshot::Sender<()>)> = there;
        for (_, reply) in there {
            // Who asked may have gone; it is done all the same.
            let _ = reply.send(());
        }
    }

    /// The VM runs, has not come in time, or is not to come: what was made for its start has no reason any
    /// more, where it is not in use.
    pub(super) async fn not_starting(&mut self) {
        let Some(timer) = self.moving.start.take() else { return };
        timer.abort();
        if let Err(error) = self.tools.effects.delete_start(&self.vm).await {
            warn!(why = Failure::from(error).message, "the announced start could not be forgotten");
        }
        let waiting = |name: &&VolumeName| !self.is_steady(name);
        let names: Vec<_> = self.volumes.keys().filter(waiting).cloned().collect();
        names.iter().for_each(|name| self.work(name));
    }

    /// The VM is about to move, or not any more. Answers with the volumes that its guest has, once nothing is
    /// under way.
    pub(super) fn move_away(
        &mut self,
        away: bool,
        reply: oneshot::Sender<Result<Vec<VolumeSpec>, Refusal>>,
    ) {
        let leaving = self.volumes.iter().find(|(_, v)| v.removing.is_some());
        if let (true, Some((name, _))) = (away, leaving) {
            let message = format!("volume {name} is being removed");
            let refusal = Refusal::new(Reason::VolumeNotReady, message);
            let _ = reply.send(Err(refusal));
            return;
        }
        self.moving.away = away;
        if away {
            self.moving.still = Some(reply);
            self.stands_still();
        } else {
            let _ = reply.send(Ok(Vec::new()));
            self.look_at_all();
        }
    }

    /// Tells whoever waits for it that nothing is under way, once that is so.
    pub(super) fn stands_still(&mut self) {
        let waited_for = self.moving.still.is_some();
        if !waited_for || self.volumes.values().any(|v| v.working || v.unlooked) {
            return;
        }
        if let Some(reply) = self.moving.still.take() {
            let steady = self.volumes.iter().filter(|(name, _)| self.is_steady(name));
            let _ = reply.send(Ok(steady.map(|(_, v)| (*v.stored.spec).clone()).collect()));
        }
    }

    /// Why nothing may be changed now.
    pub(super) fn moves(&self) -> Option<Refusal> {
        let message = format!("VM {} is about to move to another pod", self.vm);
        self.moving.away.then(|| Refusal::new(Reason::VmMigrating, message).field("vm"))
    }
}
