//! Requests about a VM that starts or moves.

use std::time::Duration;

use super::batch::result;
use super::service::{Service, split};
use super::status::malformed;
use super::{convert, v1};
use crate::types::{Malformed, VolumeName};
use crate::vm::facade::{Answer, Refusal, Start};

impl Service {
    pub(super) async fn prepare(
        &self,
        request: v1::PrepareStartRequest,
    ) -> Result<v1::PrepareStartResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let within = within(request.within)?;
        let domain = Some(request.domain).filter(|domain| !domain.is_empty());
        let parts = self.volumes.prepare_start(&vm, Start { within, domain }).await?;
        Ok(v1::PrepareStartResponse { results: results(parts) })
    }

    pub(super) async fn prepare_target(
        &self,
        request: v1::PrepareMigrationTargetRequest,
    ) -> Result<v1::PrepareMigrationTargetResponse, Refusal> {
        use v1::prepare_migration_target_request::Place;
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let place = match request.place {
            Some(Place::Pod(pod)) => convert::pod_place("pod", pod)?,
            Some(Place::Host(host)) => convert::host_place("host", host)?,
            None => return Err(convert::no_place("place", "pod (--pod-uid) or host (--host)")),
        };
        let within = within(request.within)?;
        let parts = self.volumes.prepare_migration_target(&vm, place, within).await?;
        Ok(v1::PrepareMigrationTargetResponse { results: results(parts) })
    }

    pub(super) async fn finish(
        &self,
        request: v1::FinishMigrationRequest,
    ) -> Result<v1::FinishMigrationResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let parts = self.volumes.finish_migration(&vm).await?;
        Ok(v1::FinishMigrationResponse { results: results(parts) })
    }

    pub(super) async fn cancel(
        &self,
        request: v1::CancelMigrationRequest,
    ) -> Result<v1::CancelMigrationResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let ((), changed) = split(self.volumes.cancel_migration(&vm).await?);
        Ok(v1::CancelMigrationResponse { changed })
    }
}

/// No request names the volumes, so none of its fields is to blame for what becomes of one.
fn results(parts: Vec<(VolumeName, Answer)>) -> Vec<v1::VolumeResult> {
    let unasked = |answer: Answer| answer.map_err(|refusal| Refusal { field: None, ..refusal });
    parts.into_iter().map(|(name, answer)| result(name.as_str(), unasked(answer))).collect()
}

/// The longest time for which a start may be announced.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

fn within(asked: Option<prost_types::Duration>) -> Result<Option<Duration>, Refusal> {
    let Some(asked) = asked else { return Ok(None) };
    let shown = format!("{}.{:09}s", asked.seconds, asked.nanos);
    match Duration::try_from(asked) {
        Ok(within) if !within.is_zero() && within <= LONGEST => Ok(Some(within)),
        _ => {
            let rule = "a time above 0s, at most 24h";
            Err(malformed("within", &Malformed::new("within", &shown, rule)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_announced_for_some_time() {
        let of = |seconds, nanos| within(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(within(None).unwrap(), None);
        assert_eq!(of(90, 500_000_000).unwrap(), Some(Duration::from_millis(90_500)));
        assert_eq!(of(24 * 60 * 60, 0).unwrap(), Some(LONGEST));
        for (seconds, nanos) in [(0, 0), (-1, 0), (24 * 60 * 60, 1), (i64::MAX, 0)] {
            let refusal = of(seconds, nanos).unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("within"));
            assert!(refusal.message.contains(&seconds.to_string()), "{refusal}");
        }
    }
}
