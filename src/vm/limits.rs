//! A volume's I/O limits come to its disk. That they are wanted is durable by then.
//!
//! Nothing of it is undone. What failed or was cut off comes about with the next request, look or attach:
//! a disk whose limits are others than wanted is given those.

use super::failure::Failure;
use super::ways::Ways;
use crate::domain;
use crate::host::libvirt::DomainState;
use crate::journal::StoredVolume;
use crate::reason::Reason;
use crate::step::Step;
use crate::types::Outcome;

/// Gives a volume's disk its limits, or finds that it has them. A volume whose guest does not have it now
/// gets them with its next attach.
pub(super) async fn set(ways: &Ways, volume: &StoredVolume) -> Result<Outcome, Failure> {
    let limit = ways.settings().attach;
    let walked = tokio::time::timeout(limit, walk(ways, volume)).await;
    walked.unwrap_or_else(|_| {
        let message = format!("the change took longer than {limit:?}; ask again, and it goes on");
        Err(Failure::new(Reason::DeadlineExceeded, message))
    })
}

async fn walk(ways: &Ways, volume: &StoredVolume) -> Result<Outcome, Failure> {
    let spec = &volume.spec;
    let effects = ways.effects.get(&ways.key(&spec.name)).await?;
    // A medium takes none.
    let has_disk = !spec.device.is_cdrom()
        && effects.and_then(|e| e.disk).is_some_and(|disk| disk.target.is_some());
    if !has_disk || !(spec.persist || runs(ways).await?) {
        return Ok(Outcome::Already(()));
    }
    let connection = ways.libvirt().await?;
    let limit = ways.settings().libvirt;
    let told = async {
        let _turn = ways.turn.lock().await;
        let (name, disk) = (&ways.vm.domain, &spec.disk);
        domain::limit(&*connection, name, disk, &spec.limits, spec.persist, limit).await
    };
    Ok(ways.host.tracker.run(Step::Throttle, told).await?)
}

async fn runs(ways: &Ways) -> Result<bool, Failure> {
    let state = ways.domain_state().await?;
    Ok(matches!(state, Some(DomainState::Running | DomainState::Paused)))
}
