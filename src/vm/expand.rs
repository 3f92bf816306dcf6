//! The way of an expand: a ready volume follows its LUN, which has grown.
//!
//! ```text
//! every path measured ─► the expectation raised: durable ─► map ─► lease, effects ─► guest told
//! ```
//! Nothing of it is ever undone: a device that is larger than the guest knows harms nobody. Each part
//! finds itself done, so an expand that failed or was cut off is gone on with by asking again. The
//! expectation goes first, for the LUN has that size whatever becomes of the rest: the next attach must
//! not refuse it.

use std::sync::Arc;

use super::failure::Failure;
use super::steps::{ExpandFailure, Grown};
use super::ways::Ways;
use crate::domain;
use crate::host::libvirt::DomainState;
use crate::journal::{Effects, StoredVolume};
use crate::reason::Reason;
use crate::step::Step;
use crate::types::Outcome;

/// Expands a volume to its LUN's size, or finds it expanded; `expected` is the size that the LUN must
/// have by now.
pub(super) async fn expand(
    ways: &Ways,
    volume: &StoredVolume,
    expected: Option<u64>,
) -> Result<Outcome<Grown>, ExpandFailure> {
    let limit = ways.settings().attach;
    let mut way = Way { ways, volume, raised: None };
    let walked = tokio::time::timeout(limit, way.walk(expected)).await;
    let walked = walked.unwrap_or_else(|_| {
        let message = format!("the expand took longer than {limit:?}; ask again, and it goes on");
        Err(Failure::new(Reason::DeadlineExceeded, message))
    });
    walked.map_err(|failure| ExpandFailure { failure, expect_size: way.raised })
}

struct Way<'a> {
    ways: &'a Ways,
    volume: &'a StoredVolume,
    /// The size that the volume is expected to have from now on.
    raised: Option<u64>,
}

impl Way<'_> {
    async fn walk(&mut self, expected: Option<u64>) -> Result<Outcome<Grown>, Failure> {
        let (ways, spec) = (self.ways, &self.volume.spec);
        let key = ways.key(&spec.name);
        self.runs().await?;
        let mut effects = self.effects().await?;
        let connector = &ways.host.connector;
        let measured = connector.measure(&key, &spec.source, expected).await?;
        self.raise(measured.now).await?;
        let grown = connector.grow(&key, &spec.source, measured.now).await?;
        let mut changed = grown.changed();
        let device = grown.into_inner().device;
        if let Some(given) = effects.device.as_mut().filter(|g| g.device.size != device.size) {
            given.device.size = device.size;
            ways.effects.put(&key, &effects).await?;
        }
        let size = device.size;
        ways.board.update(&key, |status| {
            if let Some(shown) = &mut status.device {
                shown.size = size;
            }
            if self.raised.is_some() {
                Arc::make_mut(&mut status.spec).expect_size = self.raised;
            }
        });
        let connection = ways.libvirt().await?;
        let limit = ways.settings().libvirt;
        let told = async {
            let _turn = ways.turn.lock().await;
            let medium = effects.disk.as_ref().and_then(|disk| disk.medium.as_deref());
            let name = &ways.vm.domain;
            domain::resize(&*connection, name, &spec.disk, medium, size, limit).await
        };
        changed |= ways.host.tracker.run(Step::TellGuest, told).await?.changed();
        let grown = Grown { before: measured.before, size, expect_size: self.raised };
        Ok(if changed { Outcome::Done(grown) } else { Outcome::Already(grown) })
    }

    async fn runs(&self) -> Result<(), Failure> {
        match self.ways.domain_state().await? {
            Some(DomainState::Running | DomainState::Paused) => Ok(()),
            Some(DomainState::Shutoff) | None => {
                let vm = &self.ways.vm;
                let message = format!("domain {} of VM {} does not run", vm.domain, vm.id);
                Err(Failure::new(Reason::VmNotRunning, message))
            }
        }
    }

    /// What was done for the volume: its guest must have it.
    async fn effects(&self) -> Result<Effects, Failure> {
        let (ways, name) = (self.ways, &self.volume.spec.name);
        let whole = |e: &Effects| {
            let has_disk = e.disk.as_ref().is_some_and(|disk| disk.target.is_some());
            has_disk && e.device.is_some() && e.incarnation == ways.incarnation()
        };
        let effects = ways.effects.get(&ways.key(name)).await?.filter(whole);
        effects.ok_or_else(|| {
            let message = format!("the guest does not have volume {name} yet");
            Failure::new(Reason::VolumeNotReady, message)
        })
    }

    /// A volume that must have a size must have the LUN's new one from now on.
    async fn raise(&mut self, size: u64) -> Result<(), Failure> {
        let spec = &self.volume.spec;
        if spec.expect_size.is_none_or(|expected| expected >= size) {
            return Ok(());
        }
        self.ways.desired.raise_size(&self.ways.key(&spec.name), size).await?;
        self.raised = Some(size);
        Ok(())
    }
}
