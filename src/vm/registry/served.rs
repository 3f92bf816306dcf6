//! One VM of a registry, and what is told of it.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::Mutex;

use super::LOOK;
use crate::host::lock::LockGuard;
use crate::reason::Reason;
use crate::spec::{VmPlace, VmSpec};
use crate::vm::facade::{Refusal, VmInfo, VmState};
use crate::vm::failure::Failure;
use crate::vm::handler::Handler;
use crate::vm::ways::Ways;

/// One VM that is served.
pub(super) struct Served {
    pub(super) ways: Arc<Ways>,
    /// The same in the pod to which it is about to move.
    pub(super) incoming: Mutex<Option<Arc<Ways>>>,
    pub(super) handler: Handler,
    pub(super) since: std::sync::Mutex<(VmState, Timestamp)>,
    /// Nobody else on this node serves this VM while it is held.
    pub(super) _lock: Box<dyn LockGuard>,
}

/// Whether a VM's volumes may go over to its registration as `new`: to another pod of the same name,
/// once the guest in the one before has ended; or to the same place, of which something else is said now.
pub(super) async fn may_take_over(old: &Ways, new: &VmSpec) -> Result<(), Refusal> {
    let (id, known) = (&new.id, old.spec());
    if *new == (VmSpec { fc: new.fc, ..known.clone() }) {
        return Ok(());
    }
    let refusal = |message| Err(Refusal::new(Reason::VmExists, message).field("vm"));
    let (VmPlace::Pod { uid, .. }, VmPlace::Pod { uid: other, .. }) = (&known.place, &new.place)
    else {
        return refusal(format!("VM {id} is registered with other particulars and has volumes"));
    };
    if uid == other {
        return refusal(format!("VM {id} is registered with other particulars and has volumes"));
    }
    if !old.has_ended().await? {
        return refusal(format!("VM {id} still runs in pod {uid}, with volumes"));
    }
    tracing::info!(vm = %id, from = uid, to = other, "the VM has a new pod: its volumes go there");
    Ok(())
}

/// What is told of a VM that could not be taken up.
pub(super) fn unserved_info((spec, failure, since): &(VmSpec, Failure, Timestamp)) -> VmInfo {
    VmInfo {
        fc_marked: false,
        spec: spec.clone(),
        state: VmState::Unknown,
        since: *since,
        volumes: 0,
        revision: None,
        pod_dir: None,
        cgroup: None,
        hotplug_dir: None,
        hotplug_dir_in_pod: None,
        reason: Some(failure.reason),
        message: failure.message.clone(),
    }
}

impl Served {
    /// Refuses what may not be done while the VM is about to move, also while that is being prepared or
    /// undone: nobody waits for it who holds up other VMs.
    pub(super) fn stays(&self) -> Result<(), Refusal> {
        if self.incoming.try_lock().is_ok_and(|incoming| incoming.is_none()) {
            return Ok(());
        }
        let message = format!("VM {} is about to move to another pod", self.ways.spec().id);
        Err(Refusal::new(Reason::VmMigrating, message).field("vm"))
    }

    pub(super) async fn info(&self) -> VmInfo {
        let looked = tokio::time::timeout(LOOK, self.ways.look()).await.ok();
        let failure = match &looked {
            Some(looked) => looked.failure.clone(),
            None => Some(Failure::new(
                Reason::DeadlineExceeded,
                format!("the VM's libvirt or pod did not answer within {LOOK:?}"),
            )),
        };
        let state = looked.as_ref().map_or(VmState::Unreachable, |l| l.state);
        let since = {
            // A panicking holder leaves a whole pair behind.
            let mut since = self.since.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if since.0 != state {
                *since = (state, Timestamp::now());
            }
            since.1
        };
        let volumes = self.handler.count().await.unwrap_or(0);
        let revision = self.handler.revision().await.unwrap_or_default();
        let spec = self.ways.spec().clone();
        VmInfo {
            fc_marked: self.ways.desired.fc_marked(&spec.id).await.unwrap_or_default(),
            spec,
            state,
            since,
            volumes: u32::try_from(volumes).unwrap_or(u32::MAX),
            revision,
            pod_dir: self.ways.pod_dir(),
            cgroup: looked.as_ref().and_then(|l| l.cgroup.clone()),
            hotplug_dir: looked.as_ref().and_then(|l| l.hotplug_dir.clone()),
            hotplug_dir_in_pod: looked.and_then(|l| l.hotplug_dir_in_pod),
            reason: failure.as_ref().map(|f| f.reason),
            message: failure.map(|f| f.message).unwrap_or_default(),
        }
    }
}
