//! Changes of devices that libvirt was asked for and that have not returned.
//!
//! A call that is given up on goes on, and may take effect at any time. Until it has returned, nobody
//! can say whether the domain has the device, so nobody may act as if it were known.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{Calls, LibvirtError};

/// Endpoint, domain, device.
type Device = (String, String, String);

/// How many calls of each kind.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    attaches: usize,
    detaches: usize,
}

impl Count {
    fn of(&mut self, attaches: bool) -> &mut usize {
        if attaches { &mut self.attaches } else { &mut self.detaches }
    }

    fn none(self, calls: Calls) -> bool {
        self.attaches == 0 && (calls == Calls::Attach || self.detaches == 0)
    }
}

/// What is in flight at all connections of one process. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(in crate::host) struct InFlight(Arc<watch::Sender<BTreeMap<Device, Count>>>);

impl InFlight {
    /// An attach that is about to be asked for. Goes with the call, wherever that runs.
    pub(in crate::host) fn attach(&self, endpoint: &str, domain: &str, device: &str) -> Flight {
        self.begin((endpoint.to_owned(), domain.to_owned(), device.to_owned()), true)
    }

    /// The same for a detach.
    pub(in crate::host) fn detach(&self, endpoint: &str, domain: &str, device: &str) -> Flight {
        self.begin((endpoint.to_owned(), domain.to_owned(), device.to_owned()), false)
    }

    fn begin(&self, device: Device, attaches: bool) -> Flight {
        self.0.send_modify(|all| *all.entry(device.clone()).or_default().of(attaches) += 1);
        Flight { all: self.clone(), device, attaches }
    }

    /// Returns when no such call for that device is in flight, with an error after `deadline`.
    pub(in crate::host) async fn landed_within(
        &self,
        endpoint: &str,
        domain: &str,
        device: &str,
        calls: Calls,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let landed = self.landed(endpoint, domain, device, calls);
        tokio::time::timeout(deadline, landed).await.map_err(|_| LibvirtError::InFlight {
            endpoint: endpoint.to_owned(),
            device: device.to_owned(),
            waited: deadline,
        })
    }

    async fn landed(&self, endpoint: &str, domain: &str, device: &str, calls: Calls) {
        let device = (endpoint.to_owned(), domain.to_owned(), device.to_owned());
        let mut all = self.0.subscribe();
        // The sender lives as long as we do.
        let _ = all.wait_for(|all| all.get(&device).is_none_or(|count| count.none(calls))).await;
    }
}

/// One change in flight, until it is dropped.
#[derive(Debug)]
pub(in crate::host) struct Flight {
    all: InFlight,
    device: Device,
    attaches: bool,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.all.0.send_modify(|all| {
            if let Some(count) = all.get_mut(&self.device) {
                *count.of(self.attaches) -= 1;
                if count.none(Calls::All) {
                    all.remove(&self.device);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_device_has_landed_when_all_its_calls_have_returned() {
        let calls = InFlight::default();
        let (first, second) = (calls.attach("e", "d", "a"), calls.attach("e", "d", "a"));
        let removal = calls.detach("e", "d", "a");
        calls.landed("e", "d", "b", Calls::All).await;
        calls.landed("other", "d", "a", Calls::All).await;
        let soon = Duration::from_secs(1);
        for flight in [first, second] {
            let landed = calls.landed_within("e", "d", "a", Calls::Attach, soon).await;
            assert!(matches!(landed, Err(LibvirtError::InFlight { .. })), "{landed:?}");
            drop(flight);
        }
        calls.landed("e", "d", "a", Calls::Attach).await;
        assert!(calls.landed_within("e", "d", "a", Calls::All, soon).await.is_err());
        drop(removal);
        calls.landed("e", "d", "a", Calls::All).await;
    }
}
