//! A VM that moves to another pod of this node: what is made there for each volume while its guest is
//! still in the pod before, and how the volumes go over once it is not.
//!
//! ```text
//!              pod before                  host                     pod to come
//! prepared     node, grant, disk           one device, one lease    node, grant
//! finished     (revoked, unlinked)         the same                 node, grant, disk
//! cancelled    node, grant, disk           the same                 (revoked, unlinked)
//! ```
//! The volumes have one owner throughout: the host's side is neither made twice nor given up in between.
//! Effects in the pod to come have records of their own, so that a crash at any point leaves two whole
//! accounts. Which of the pods has the guest is told by the VM's registration alone: once that is of the
//! other pod, whoever works on a volume next takes over what was made there.

use super::attach::Way;
use super::detach;
use super::failure::Failure;
use super::ways::Ways;
use crate::domain;
use crate::journal::{DiskEffect, Effects};
use crate::reason::Reason;
use crate::spec::VolumeSpec;
use crate::types::VolumeKey;

/// Makes node and grant of an attached volume in the pod of `ways`, whose effects are those to come.
pub(super) async fn admit(ways: &Ways, spec: &VolumeSpec) -> Result<(), Failure> {
    let key = ways.key(&spec.name);
    let found = ways.host.connector.observe(&key, &spec.source).await?;
    let device = found.ok_or_else(|| {
        let message = format!("volume {} is not attached on this node", spec.name);
        Failure::new(Reason::VolumeNotReady, message)
    })?;
    let place = ways.place_to_be().await?;
    if place.pod.is_none() {
        let message = "a VM moves on one node only from pod to pod";
        return Err(Failure::new(Reason::Unsupported, message));
    }
    let effects = match ways.effects.get(&key).await? {
        Some(effects) if effects.incarnation == ways.incarnation() => effects,
        Some(mut other) => {
            detach::leave_pod(ways, &key, &mut other, None).await?;
            ways.effects.begin(ways.incarnation(), spec)
        }
        None => ways.effects.begin(ways.incarnation(), spec),
    };
    let mut way = Way { ways, key, spec, effects, had_disk: false, returns: false, off: false };
    way.effects.device = Some(device.clone());
    way.show(&place, &device).await
}

/// Undoes what [`admit`] has made of a volume.
pub(super) async fn dismiss(ways: &Ways, key: &VolumeKey) -> Result<(), Failure> {
    let Some(mut effects) = ways.effects.get(key).await? else { return Ok(()) };
    detach::leave_pod(ways, key, &mut effects, None).await?;
    Ok(ways.effects.delete(key).await?)
}

/// The effects to go on from. Where they are of the pod before, and the guest has come to this one with what
/// was made for it here, then the pod before loses the volume, and this one's account is the volume's.
pub(super) async fn taken_over(
    ways: &Ways,
    key: &VolumeKey,
    mut before: Effects,
) -> Result<Effects, Failure> {
    if before.incarnation == ways.incarnation() {
        return Ok(before);
    }
    let incoming = ways.effects.incoming();
    let Some(made) = incoming.get(key).await?.filter(|e| e.incarnation == ways.incarnation())
    else {
        return Ok(before);
    };
    tracing::info!(volume = %key.volume, from = before.incarnation, "the volume has moved with its VM");
    detach::leave_pod(ways, key, &mut before, None).await?;
    // Whether the guest has brought the disk along is seen by its name.
    let (alias, bus) = (domain::alias(&before.spec.disk), before.spec.bus);
    let disk = before.disk.as_ref().map(|disk| DiskEffect {
        alias,
        bus,
        target: None,
        io_thread: disk.io_thread,
        medium: disk.medium.clone(),
    });
    let mut effects = before.of(ways.incarnation());
    (effects.node, effects.grant, effects.disk) = (made.node, made.grant, disk);
    ways.effects.put(key, &effects).await?;
    incoming.delete(key).await?;
    Ok(effects)
}
