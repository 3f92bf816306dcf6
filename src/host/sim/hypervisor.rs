//! A simulated libvirt: domains with real XML that attach and detach edit, events, a guest agent.
//!
//! Faults: `libvirt.connect` (detail: the endpoint), and `libvirt.info`, `libvirt.xml`,
//! `libvirt.attach`, `libvirt.detach`, `libvirt.update`, `libvirt.iothreadadd`,
//! `libvirt.iothreaddel`, `libvirt.capacity`,
//! `libvirt.resize`, `libvirt.limit`, `libvirt.agent` (detail:
//! `DOMAIN` and the device's XML, alias, source or command). As with the real one, a call whose caller gave up may still take effect later: one that
//! was stalled, when the faults are cleared; one that a libvirtd had received before it hung
//! ([`SimHypervisor::hang`]), when that goes on, whatever became of the caller.

mod connection;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use self::connection::{Scene, SimConnection};
use super::Faults;
use super::domain::{SimDevice, SimDomain, Unplug};
use crate::host::libvirt::{
    Affect, Connection, DomainEvent, Endpoint, EventSender, Hypervisor, InFlight, Job,
    LibvirtError, Lifecycle,
};

/// Asked when QEMU opens a device: endpoint, path in the pod, and whether for reading only. `Err` is
/// the system's words for why it may not.
pub type OpenCheck = Arc<dyn Fn(&str, &str, bool) -> Result<(), String> + Send + Sync>;

/// Asked what a device is: endpoint and path in the pod.
pub type DeviceCheck = Arc<dyn Fn(&str, &str) -> Option<SimDevice> + Send + Sync>;

/// A call that a hung libvirtd has received.
type Request = Box<dyn FnOnce(&mut State) + Send>;

#[derive(Default)]
struct SimLibvirt {
    domains: BTreeMap<String, SimDomain>,
    events: EventSender,
    /// It hangs from when this call comes; any call when empty.
    hangs_at: Option<&'static str>,
    hung: bool,
    received: Vec<Request>,
    withheld: Vec<Request>,
}

#[derive(Default)]
struct State {
    libvirts: BTreeMap<String, SimLibvirt>,
    open_check: Option<OpenCheck>,
    device_check: Option<DeviceCheck>,
}

/// All simulated libvirts of a host, by the name of their endpoint.
#[derive(Clone)]
pub struct SimHypervisor {
    faults: Arc<Faults>,
    state: Arc<Mutex<State>>,
    in_flight: InFlight,
    goes_on: Arc<Notify>,
    stuck: Arc<AtomicUsize>,
}

impl SimHypervisor {
    /// None yet.
    pub fn new(faults: Arc<Faults>) -> Self {
        Self {
            faults,
            state: Arc::default(),
            in_flight: InFlight::default(),
            goes_on: Arc::default(),
            stuck: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A model that a panicking test left behind is still a model.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a domain to the libvirt at this endpoint, which comes into being with its first one.
    pub fn add_domain(&self, endpoint: &str, domain: SimDomain) {
        let mut state = self.lock();
        let libvirt = state.libvirts.entry(endpoint.to_owned()).or_default();
        libvirt.domains.insert(domain.name().to_owned(), domain);
    }

    /// Adds a libvirt without domains.
    pub fn add_libvirt(&self, endpoint: &str) {
        self.lock().libvirts.entry(endpoint.to_owned()).or_default();
    }

    /// Removes a domain with all that is known of it.
    pub fn remove_domain(&self, endpoint: &str, domain: &str) {
        if let Some(libvirt) = self.lock().libvirts.get_mut(endpoint) {
            libvirt.domains.remove(domain);
            libvirt.events.send(domain, DomainEvent::Lifecycle(Lifecycle::Stopped));
        }
    }

    /// Whether a QEMU of this endpoint may open a device; `Err` says why not.
    pub fn may_open(&self, endpoint: &str, path: &str, read_only: bool) -> Result<(), String> {
        let check = self.lock().open_check.clone();
        check.map_or(Ok(()), |check| check(endpoint, path, read_only))
    }

    /// What decides whether QEMU may open a device; all may be opened while there is none.
    pub fn set_open_check(&self, check: OpenCheck) {
        self.lock().open_check = Some(check);
    }

    /// What knows a device; without it disks have no size.
    pub fn set_device_check(&self, check: DeviceCheck) {
        self.lock().device_check = Some(check);
    }

    /// Changes a domain. `None` when there is no such domain.
    pub fn with_domain<T>(
        &self,
        endpoint: &str,
        domain: &str,
        change: impl FnOnce(&mut SimDomain) -> T,
    ) -> Option<T> {
        self.lock().libvirts.get_mut(endpoint)?.domains.get_mut(domain).map(change)
    }

    /// Stops a domain: QEMU is gone, and a transient one with it.
    pub fn stop_domain(&self, endpoint: &str, domain: &str) {
        let mut state = self.lock();
        let Some(libvirt) = state.libvirts.get_mut(endpoint) else { return };
        if libvirt.domains.get_mut(domain).is_some_and(|d| !d.stop()) {
            libvirt.domains.remove(domain);
        }
        libvirt.events.send(domain, DomainEvent::Lifecycle(Lifecycle::Stopped));
    }

    /// Starts a domain from its persistent definition.
    pub fn start_domain(&self, endpoint: &str, domain: &str) {
        let mut state = self.lock();
        let Some(libvirt) = state.libvirts.get_mut(endpoint) else { return };
        if let Some(d) = libvirt.domains.get_mut(domain) {
            d.start();
            libvirt.events.send(domain, DomainEvent::Lifecycle(Lifecycle::Started));
        }
    }

    /// The guest answers now to a removal that it was silent about.
    pub fn acknowledge(&self, endpoint: &str, domain: &str, alias: &str) {
        let mut state = self.lock();
        let Some(libvirt) = state.libvirts.get_mut(endpoint) else { return };
        if libvirt.domains.get_mut(domain).is_some_and(|d| d.acknowledge(alias)) {
            libvirt.events.send(domain, DomainEvent::DeviceRemoved(alias.to_owned()));
        }
    }

    /// Somebody else takes a disk from the running domain.
    pub fn detach_by_hand(&self, endpoint: &str, domain: &str, alias: &str) {
        let mut state = self.lock();
        let Some(libvirt) = state.libvirts.get_mut(endpoint) else { return };
        let detached = libvirt.domains.get_mut(domain).map(|d| d.detach(alias, Affect::LIVE));
        if matches!(detached, Some(Ok(Some(Unplug::Acknowledge)))) {
            libvirt.events.send(domain, DomainEvent::DeviceRemoved(alias.to_owned()));
        }
    }

    /// The libvirt at this endpoint goes away, connections and all; its domains are lost.
    pub fn remove(&self, endpoint: &str) {
        if let Some(libvirt) = self.lock().libvirts.remove(endpoint) {
            libvirt.events.disconnected();
        }
    }

    /// Breaks all connections to this endpoint, as a restart of libvirtd does; domains go on. What a
    /// hung one had received is lost.
    pub fn restart(&self, endpoint: &str) {
        self.disconnect(endpoint);
        if let Some(libvirt) = self.lock().libvirts.get_mut(endpoint) {
            (libvirt.hung, libvirt.hangs_at) = (false, None);
            libvirt.received.clear();
            libvirt.withheld.clear();
        }
        self.goes_on.notify_waiters();
    }

    /// Breaks all connections to this endpoint from the client's side, as keepalive does. What was
    /// received stays received.
    pub fn disconnect(&self, endpoint: &str) {
        if let Some(libvirt) = self.lock().libvirts.get_mut(endpoint) {
            libvirt.events.disconnected();
            libvirt.events = EventSender::default();
        }
    }

    /// The libvirtd at this endpoint hangs from when it receives this call on (`info`, `xml`, `attach`,
    /// `detach`, `update`, `agent`; the next one when empty), as one that is stopped by a signal does.
    pub fn hang(&self, endpoint: &str, call: &'static str) {
        if let Some(libvirt) = self.lock().libvirts.get_mut(endpoint) {
            libvirt.hangs_at = Some(call);
        }
    }

    /// A hung libvirtd goes on: it carries out what it has received, in that order.
    pub fn go_on(&self, endpoint: &str) {
        let mut state = self.lock();
        let Some(libvirt) = state.libvirts.get_mut(endpoint) else { return };
        (libvirt.hung, libvirt.hangs_at) = (false, None);
        for request in std::mem::take(&mut libvirt.received) {
            request(&mut state);
        }
        drop(state);
        self.goes_on.notify_waiters();
    }

    /// A hung libvirtd goes on, but what it has received waits in its queue until [`Self::deliver`], as
    /// for a domain's job.
    pub fn withhold(&self, endpoint: &str) {
        if let Some(libvirt) = self.lock().libvirts.get_mut(endpoint) {
            let received = std::mem::take(&mut libvirt.received);
            libvirt.withheld.extend(received);
        }
        self.go_on(endpoint);
    }

    /// What was withheld is carried out.
    pub fn deliver(&self, endpoint: &str) {
        let mut state = self.lock();
        let withheld = state.libvirts.get_mut(endpoint).map(|l| std::mem::take(&mut l.withheld));
        for request in withheld.into_iter().flatten() {
            request(&mut state);
        }
    }

    /// Whether the libvirtd at this endpoint hangs.
    pub fn is_hung(&self, endpoint: &str) -> bool {
        self.lock().libvirts.get(endpoint).is_some_and(|l| l.hung)
    }

    /// Returns when it does not hang.
    async fn answers(&self, endpoint: &str) {
        loop {
            let goes_on = self.goes_on.notified();
            if !self.is_hung(endpoint) {
                return;
            }
            goes_on.await;
        }
    }

    /// The paths in the pod that the QEMUs of this endpoint have open.
    pub fn open_paths(&self, endpoint: &str) -> Vec<String> {
        let state = self.lock();
        let domains = state.libvirts.get(endpoint).map(|l| l.domains.values());
        domains.into_iter().flatten().flat_map(SimDomain::open_paths).collect()
    }

    /// All disks of all domains, one a line, to compare before with after.
    pub fn snapshot(&self) -> String {
        let mut text = String::new();
        for (endpoint, libvirt) in &self.lock().libvirts {
            for (name, domain) in &libvirt.domains {
                for disk in domain.snapshot() {
                    let _ = writeln!(text, "{endpoint} {name} {disk}");
                }
            }
        }
        text
    }
}

#[async_trait]
impl Hypervisor for SimHypervisor {
    async fn connect(
        &self,
        endpoint: &Endpoint,
        deadline: Duration,
    ) -> Result<Arc<dyn Connection>, LibvirtError> {
        let no_connect =
            |message: String| LibvirtError::NoConnect { endpoint: endpoint.name.clone(), message };
        let passed = async {
            self.faults.pass("libvirt.connect", &endpoint.name).await?;
            self.answers(&endpoint.name).await;
            Ok::<_, std::io::Error>(())
        };
        match tokio::time::timeout(deadline, passed).await {
            Err(_) => {
                return Err(LibvirtError::TimedOut {
                    endpoint: endpoint.name.clone(),
                    call: "connect",
                    deadline,
                    stuck: 1,
                });
            }
            Ok(passed) => passed.map_err(|e| no_connect(e.to_string()))?,
        }
        let state = self.lock();
        let libvirt = state.libvirts.get(&endpoint.name).ok_or_else(|| {
            no_connect("Failed to connect socket: No such file or directory".into())
        })?;
        Ok(Arc::new(SimConnection {
            endpoint: endpoint.name.clone(),
            events: libvirt.events.clone(),
            host: self.clone(),
            stuck: Arc::default(),
        }))
    }

    fn stuck_calls(&self) -> usize {
        self.stuck.load(Ordering::Acquire)
    }
}

impl State {
    /// A call comes to the libvirt of an endpoint, which answers it now, or hangs and keeps it.
    fn receive(&mut self, endpoint: &str, call: &str, request: Request) {
        if let Some(libvirt) = self.libvirts.get_mut(endpoint) {
            libvirt.hung |= libvirt.hangs_at.is_some_and(|at| at.is_empty() || at == call);
            if libvirt.hung {
                libvirt.received.push(request);
                return;
            }
        }
        request(self);
    }

    fn carry_out<T>(
        &mut self,
        endpoint: &str,
        domain: &str,
        work: impl FnOnce(Scene<'_>) -> Result<T, LibvirtError>,
    ) -> Result<T, LibvirtError> {
        let (open_check, device_check) = (self.open_check.clone(), self.device_check.clone());
        let libvirt = self.libvirts.get_mut(endpoint).ok_or_else(|| LibvirtError::NoConnect {
            endpoint: endpoint.to_owned(),
            message: "client socket is closed".into(),
        })?;
        let domain = libvirt.domains.get_mut(domain).ok_or_else(|| LibvirtError::NoDomain {
            message: format!("no domain with matching name '{domain}'"),
        })?;
        work(Scene { endpoint, domain, events: &libvirt.events, open_check, device_check })
    }
}

impl SimHypervisor {
    /// Has a job hold a domain, or end.
    pub fn set_job(&self, endpoint: &str, domain: &str, job: Option<Job>) {
        self.with_domain(endpoint, domain, |d| d.job = job);
    }
}
