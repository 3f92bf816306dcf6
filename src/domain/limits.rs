//! How much I/O a guest may do on a disk that it has: changed while it runs.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::apply::{At, Error};
use super::diff::{Needs, Views};
use super::xml::Domain;
use crate::host::libvirt::{Affect, Connection};
use crate::types::{IoLimits, Outcome, VolumeName};

/// Gives our disk of that volume these limits, or finds that it has them; with `persist` in the
/// persistent definition too, and of a domain that does not run there alone.
///
/// A call that was given up on may come late and bring old limits back: the next look sees that.
pub async fn limit(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    limits: &IoLimits,
    persist: bool,
    deadline: Duration,
) -> Result<Outcome, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let views = at.views(persist).await?;
    let alias = super::alias(volume);
    if views.all().all(|view| view.disk(&alias).is_none()) {
        return Err(Error::NoDisk { alias, domain: domain.to_owned() });
    }
    if !differing(&views, &alias, limits).any() {
        return Ok(Outcome::Already(()));
    }
    give(&at, persist, &views, &alias, limits).await.map(Outcome::Done)
}

/// Where a disk of that alias has other limits.
pub(super) fn differing(views: &Views, alias: &str, limits: &IoLimits) -> Needs {
    let other = |view: &Option<Arc<Domain>>| {
        view.as_ref().and_then(|v| v.disk(alias)).is_some_and(|d| d.limits != *limits)
    };
    Needs { live: other(&views.live), config: other(&views.config) }
}

/// Tells libvirt the limits, for each definition in which the disk has others, and reads them back. libvirt
/// knows disks by target name or source, not by alias; no disk but ours has the source.
pub(super) async fn give(
    at: &At<'_>,
    persist: bool,
    views: &Views,
    alias: &str,
    limits: &IoLimits,
) -> Result<(), Error> {
    let needs = differing(views, alias, limits);
    for (view, affect, needed) in
        [(&views.live, Affect::LIVE, needs.live), (&views.config, Affect::CONFIG, needs.config)]
    {
        let source = view.as_ref().and_then(|v| v.disk(alias)).and_then(|d| d.source.as_deref());
        if let Some(source) = source.filter(|_| needed) {
            let set = at.connection.set_io_limits(at.domain, source, limits, affect, at.left());
            set.await.map_err(at.failed("limit", alias))?;
        }
    }
    // libvirt's word is not enough: they must be there as asked for.
    if differing(&at.views(persist).await?, alias, limits).any() {
        return Err(Error::NotConfirmed { alias: alias.to_owned(), domain: at.domain.to_owned() });
    }
    Ok(())
}
