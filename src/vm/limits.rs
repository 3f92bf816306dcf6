//! A volume's I/O limits are changed: durable first, then in the domain.
//!
//! Nothing of it is undone. What failed or was cut off after the wish was durable comes about with the
//! next request, look or attach: a disk whose limits are others than wanted is given those.

use super::failure::Failure;
use super::steps::LimitsFailure;
use super::ways::Ways;
use crate::domain;
use crate::host::libvirt::DomainState;
use crate::journal::StoredVolume;
use crate::reason::Reason;
use crate::step::Step;
use crate::types::{IoLimits, Outcome};

/// Sets a volume's limits, or finds them set. A volume whose guest does not have it now gets them with
/// its next attach.
pub(super) async fn set(
    ways: &Ways,
    volume: &StoredVolume,
    limits: IoLimits,
) -> Result<Outcome, LimitsFailure> {
    let limit = ways.settings().attach;
    let mut wanted = false;
    let walked = tokio::time::timeout(limit, walk(ways, volume, limits, &mut wanted)).await;
    let walked = walked.unwrap_or_else(|_| {
        let message = format!("the change took longer than {limit:?}; ask again, and it goes on");
        Err(Failure::new(Reason::DeadlineExceeded, message))
    });
    walked.map_err(|failure| LimitsFailure { failure, wanted })
}

async fn walk(
    ways: &Ways,
    volume: &StoredVolume,
    limits: IoLimits,
    wanted: &mut bool,
) -> Result<Outcome, Failure> {
    let spec = &volume.spec;
    let key = ways.key(&spec.name);
    let mut changed = spec.limits != limits;
    let mut stored = volume.clone();
    stored.spec.limits = limits;
    let store = async {
        if changed { ways.desired.put_volume(&ways.vm.id, &stored).await } else { Ok(()) }
    };
    ways.host.tracker.run(Step::Limits, store).await?;
    *wanted = true;
    ways.board.update(&key, |status| status.spec.limits = limits);
    let effects = ways.effects.get(&key).await?;
    let has_disk = effects.and_then(|e| e.disk).is_some_and(|disk| disk.target.is_some());
    if has_disk && (spec.persist || runs(ways).await?) {
        let connection = ways.libvirt().await?;
        let limit = ways.settings().libvirt;
        let told = async {
            let _turn = ways.turn.lock().await;
            let (name, disk) = (&ways.vm.domain, &spec.disk);
            domain::limit(&*connection, name, disk, &limits, spec.persist, limit).await
        };
        changed |= ways.host.tracker.run(Step::Throttle, told).await?.changed();
    }
    Ok(if changed { Outcome::Done(()) } else { Outcome::Already(()) })
}

async fn runs(ways: &Ways) -> Result<bool, Failure> {
    let state = ways.domain_state().await?;
    Ok(matches!(state, Some(DomainState::Running | DomainState::Paused)))
}
