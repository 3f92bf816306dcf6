//! Volumes that come back together come in the order in which they were asked for, so that a guest that
//! was started again numbers its disks as before.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::watch;

use crate::types::VolumeName;

/// How long a volume waits for those before it: one that is in trouble must not keep the others away.
const PATIENCE: Duration = Duration::from_secs(10);

/// The volumes of a VM whose attach is on its way.
#[derive(Debug, Default)]
pub(super) struct Order(watch::Sender<BTreeSet<VolumeName>>);

impl Order {
    /// A volume sets out.
    pub(super) fn set_out(&self, volume: &VolumeName) -> OnTheWay<'_> {
        self.0.send_modify(|all| {
            all.insert(volume.clone());
        });
        OnTheWay { order: self, volume: volume.clone() }
    }

    /// Waits for those of `before` that are on their way, but not for ever.
    pub(super) async fn after(&self, before: &BTreeSet<VolumeName>) {
        let mut all = self.0.subscribe();
        let arrived = all.wait_for(|all| all.is_disjoint(before));
        if tokio::time::timeout(PATIENCE, arrived).await.is_err() {
            tracing::warn!(
                "a volume before this one is not back yet: it comes later than its turn"
            );
        }
    }
}

/// Arrives, or gives up, when it is dropped.
#[derive(Debug)]
pub(super) struct OnTheWay<'a> {
    order: &'a Order,
    volume: VolumeName,
}

impl Drop for OnTheWay<'_> {
    fn drop(&mut self) {
        self.order.0.send_modify(|all| {
            all.remove(&self.volume);
        });
    }
}
