//! VMs that are about to start, or to move: within this node, or to and from another.
//!
//! ```text
//! PrepareStart              this VM, in the pod that it is registered with, starts here soon
//! PrepareMigrationTarget    the same pod: the guest comes from another node, which is a start
//!                           another pod of this node: it is made ready beside the one before
//! FinishMigration           that other pod has the guest: it is the VM's pod from now on
//!                           no such pod: the guest has left this node, and so do its volumes
//! CancelMigration           what was made ready is undone
//! ```

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use super::{Registry, Served};
use crate::host::libvirt::DomainState;
use crate::reason::Reason;
use crate::spec::{Phase, RemoveOptions, VmPlace, VmSpec, VolumeStatus};
use crate::types::{Outcome, VmId, VolumeName};
use crate::vm::facade::{Answer, Refusal, Start, Wish};
use crate::vm::failure::Failure;
use crate::vm::incoming;
use crate::vm::ways::Ways;

/// Whether it is that VM which the host's libvirt is starting as `domain`.
fn starts_by_hook(vm: &VmSpec, domain: &str) -> Result<(), Refusal> {
    let id = &vm.id;
    let message = match vm.place {
        VmPlace::Pod { .. } => {
            format!("VM {id} is registered in a pod, not with the host's libvirt")
        }
        VmPlace::Host { .. } if vm.domain != domain => {
            format!("VM {id} is registered as domain {}, not {domain}", vm.domain)
        }
        VmPlace::Host { .. } => return Ok(()),
    };
    Err(Refusal::new(Reason::InvalidOption, message).field("domain"))
}

/// What became of each volume, by name.
pub(super) type Parts = Vec<(VolumeName, Answer)>;

impl Registry {
    pub(super) async fn prepare_start(&self, id: &VmId, start: Start) -> Result<Parts, Refusal> {
        let served = self.served(id)?;
        served.stays()?;
        if let Some(domain) = &start.domain {
            starts_by_hook(served.ways.spec(), domain)?;
        }
        let before = self.board.list(Some(id));
        let within = start.within.unwrap_or(self.settings.start);
        served.handler.prepare(within, start.domain.is_some()).await?;
        let part = |status: Arc<VolumeStatus>| {
            let known = before.iter().find(|known| known.key == status.key);
            let changed = known.is_none_or(|known| known.phase != status.phase);
            (status.key.volume.clone(), prepared(Arc::unwrap_or_clone(status), changed))
        };
        Ok(self.board.list(Some(id)).into_iter().map(part).collect())
    }

    pub(super) async fn prepare_target(
        &self,
        id: &VmId,
        place: VmPlace,
        within: Duration,
    ) -> Result<Parts, Refusal> {
        let served = self.served(id)?;
        let known = served.ways.spec();
        if known.place == place {
            let start = Start { within: Some(within), domain: None };
            return self.prepare_start(id, start).await;
        }
        let to = VmSpec { place, ..known.clone() };
        let (VmPlace::Pod { uid: from, .. }, VmPlace::Pod { uid, .. }) = (&known.place, &to.place)
        else {
            let message = "a VM moves on one node only from pod to pod: register it where it runs";
            return Err(Refusal::new(Reason::Unsupported, message).field("place"));
        };
        if from == uid {
            let message = format!("VM {id} is registered with pod {uid} and other particulars");
            return Err(Refusal::new(Reason::VmExists, message).field("place"));
        }
        let mut incoming = served.incoming.lock().await;
        if let Some(other) = incoming.as_ref().filter(|ways| *ways.spec() != to) {
            let message = format!("VM {id} is about to move to {}", place_name(other.spec()));
            return Err(Refusal::new(Reason::VmMigrating, message).field("place"));
        }
        if !runs(&served.ways).await? {
            let message = format!(
                "VM {id} does not run in pod {from}, so it does not move: register it with pod {uid}"
            );
            return Err(Refusal::new(Reason::VmNotRunning, message).field("vm"));
        }
        let ways = Arc::new(self.ways_over(to.clone(), self.effects().incoming()));
        ways.check().await?;
        // Noted before anything stands still: whoever comes after a crash has it stand still again.
        self.effects().put_migration(&to).await.map_err(Failure::from)?;
        *incoming = Some(ways.clone());
        let volumes = match served.handler.move_away(true).await {
            Ok(volumes) => volumes,
            Err(refusal) => {
                *incoming = None;
                self.effects().delete_migration(id).await.map_err(Failure::from)?;
                return Err(refusal);
            }
        };
        tracing::info!(vm = %id, from, to = uid, "the VM is about to move");
        let admitted = join_all(volumes.iter().map(|spec| incoming::admit(&ways, spec))).await;
        let mut parts = Vec::new();
        for status in self.board.list(Some(id)) {
            let name = status.key.volume.clone();
            let place = volumes.iter().position(|spec| spec.name == name);
            let answer = match place.map(|n| &admitted[n]) {
                Some(Ok(())) => Ok(Outcome::Done(Arc::unwrap_or_clone(status))),
                Some(Err(failure)) => Err(failure.clone().into()),
                None => {
                    let message =
                        format!("volume {name} is {:?}: the guest has it not", status.phase);
                    Err(Refusal::new(Reason::VolumeNotReady, message).field("volume"))
                }
            };
            parts.push((name, answer));
        }
        Ok(parts)
    }

    pub(super) async fn finish_move(&self, id: &VmId) -> Result<Parts, Refusal> {
        let served = self.served(id)?;
        let to = served.incoming.lock().await.clone();
        if runs(&served.ways).await? {
            let message = format!("VM {id} still runs in {}", place_name(served.ways.spec()));
            return Err(Refusal::new(Reason::VmRunning, message).field("vm"));
        }
        let Some(to) = to else { return self.leave(&served).await };
        if !runs(&to).await? {
            let message = format!("VM {id} does not run in {}", place_name(to.spec()));
            return Err(Refusal::new(Reason::VmNotRunning, message).field("vm"));
        }
        // Not before the libvirts have answered: other VMs are registered meanwhile.
        let _changing = self.changing.lock().await;
        if !Arc::ptr_eq(&served, &self.served(id)?) {
            let message = format!("the move of VM {id} was finished by another request");
            return Err(Refusal::new(Reason::Cancelled, message).field("vm"));
        }
        // From here on the VM is in the other pod, and its volumes go over one by one.
        self.desired.put_vm(to.spec()).await.map_err(Failure::from)?;
        self.effects().delete_migration(id).await.map_err(Failure::from)?;
        let spec = to.spec().clone();
        served.handler.stop(Duration::ZERO).await;
        self.vms().remove(id);
        drop((served, to));
        match self.serve(spec.clone()).await {
            Ok(served) => drop(self.vms().insert(id.clone(), Arc::new(served))),
            Err(failure) => {
                let unserved = (spec, failure.clone(), jiff::Timestamp::now());
                self.unserved().insert(id.clone(), unserved);
                return Err(failure.into());
            }
        }
        tracing::info!(vm = %id, "the VM has moved");
        let moved = |status: Arc<VolumeStatus>| {
            (status.key.volume.clone(), Ok(Outcome::Done(Arc::unwrap_or_clone(status))))
        };
        Ok(self.board.list(Some(id)).into_iter().map(moved).collect())
    }

    /// The guest has gone to another node: its volumes leave this one.
    async fn leave(&self, served: &Served) -> Result<Parts, Refusal> {
        let id = &served.ways.spec().id;
        let names: Vec<VolumeName> =
            self.board.list(Some(id)).iter().map(|status| status.key.volume.clone()).collect();
        let options = RemoveOptions::default();
        let wish = |name: &VolumeName| Wish::Remove { name: name.clone(), options };
        let answers = served.handler.change(names.iter().map(wish).collect()).await?;
        Ok(names.into_iter().zip(answers).collect())
    }

    pub(super) async fn cancel_move(&self, id: &VmId) -> Result<Outcome, Refusal> {
        let served = self.served(id)?;
        let mut incoming = served.incoming.lock().await;
        let Some(ways) = incoming.clone() else {
            if runs(&served.ways).await? {
                return Ok(Outcome::Already(()));
            }
            served.handler.cancel_start().await?;
            return Ok(Outcome::Done(()));
        };
        let there = ways.domain_state().await;
        let ended = match there {
            Ok(state) => state.is_none_or(|state| state == DomainState::Shutoff),
            // It went with its pod, or nobody can say.
            Err(_) => ways.has_ended().await?,
        };
        if !ended {
            let message = format!("VM {id} runs in {} already", place_name(ways.spec()));
            return Err(Refusal::new(Reason::VmRunning, message).field("vm"));
        }
        for key in ways.effects.volumes_begun(id).await.map_err(Failure::from)? {
            incoming::dismiss(&ways, &key).await?;
        }
        self.effects().delete_migration(id).await.map_err(Failure::from)?;
        *incoming = None;
        served.handler.move_away(false).await?;
        tracing::info!(vm = %id, "the VM does not move");
        Ok(Outcome::Done(()))
    }

    /// Where a VM was about to move when its daemon ended, if it has not moved since; what its volumes
    /// left on the way when it has.
    pub(super) async fn resume_move(&self, spec: &VmSpec) -> Result<Option<Arc<Ways>>, Failure> {
        let (effects, id) = (self.effects(), &spec.id);
        let incoming = effects.incoming();
        match effects.migration(id).await? {
            Some(to) if to != *spec => {
                return Ok(Some(Arc::new(self.ways_over(to, incoming))));
            }
            Some(_) => effects.delete_migration(id).await?,
            None => {}
        }
        let here = self.ways(spec.clone());
        for key in incoming.volumes_begun(id).await? {
            let account = effects.get(&key).await?;
            if account.is_some_and(|account| account.incarnation == here.incarnation()) {
                // A killed daemon took it over and did not come to strike it.
                incoming.delete(&key).await?;
            }
        }
        Ok(None)
    }
}

/// Whether the guest is in that pod.
async fn runs(ways: &Ways) -> Result<bool, Refusal> {
    match ways.domain_state().await {
        Ok(state) => Ok(matches!(state, Some(DomainState::Running | DomainState::Paused))),
        Err(failure) => match ways.has_ended().await {
            Ok(true) => Ok(false),
            _ => Err(failure.into()),
        },
    }
}

fn place_name(spec: &VmSpec) -> String {
    match &spec.place {
        VmPlace::Pod { uid, .. } => format!("pod {uid}"),
        VmPlace::Host { .. } => "this host's libvirt".into(),
    }
}

/// Whether a volume is there for its VM to start with.
fn prepared(status: VolumeStatus, changed: bool) -> Answer {
    match (status.phase, status.reason) {
        (Phase::MountedToPod, _) | (Phase::Ready, _) if changed => Ok(Outcome::Done(status)),
        (Phase::MountedToPod | Phase::Ready, _) => Ok(Outcome::Already(status)),
        (_, Some(reason)) => Err(Refusal::new(reason, status.message)),
        (phase, None) => {
            let message = format!("volume {} is {phase:?}", status.key.volume);
            Err(Refusal::new(Reason::VolumeNotReady, message).field("volume"))
        }
    }
}
