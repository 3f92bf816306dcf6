//! The real libvirt.

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use virt::domain::{Domain, DomainPausedReason, DomainStateReason};
use virt::enumutil::Enum;
use virt::sys;

use super::ffi::{self, Handle};
use super::workers::{self, Workers};
use super::{
    Affect, Calls, Connection, Definition, DomainEvents, DomainInfo, DomainState, Endpoint,
    EventSender, Hypervisor, InFlight, Instance, IoThread, LibvirtError, Medium, Socket, Version,
};
use crate::host::workers::Pool;
use crate::types::IoLimits;

/// How many calls of one connection run at once. libvirt has one modifying job a domain at a time,
/// so more would only queue up in the daemon.
const PLACES: usize = 4;

/// Whether libvirt's client library bears calls at the same time and keepalive.
///
/// Before 10.4 it does not (CVE-2024-4418): a wait for a reply that is ended by anything but data,
/// that is by another thread's call or by a keepalive timer, leaves a pointer to its dead stack
/// behind, and the next data crash the process. A pod that holds up its libvirtd and lets it go
/// again does that at will. There, one call at a time and no keepalive keep to the path without that
/// fault; a daemon that hangs is then noticed by the calls' own deadlines alone.
pub(super) fn client_is_sound() -> bool {
    const FIXED: u32 = 10_004_000;
    virt::connect::Connect::version().is_ok_and(|version| version >= FIXED)
}

/// libvirt as it is on this host.
pub struct RealHypervisor {
    in_flight: InFlight,
    threads: Arc<Pool>,
    stuck: Arc<AtomicUsize>,
}

impl Default for RealHypervisor {
    fn default() -> Self {
        Self { in_flight: InFlight::default(), threads: workers::threads(), stuck: Arc::default() }
    }
}

#[async_trait]
impl Hypervisor for RealHypervisor {
    async fn connect(
        &self,
        endpoint: &Endpoint,
        deadline: Duration,
    ) -> Result<Arc<dyn Connection>, LibvirtError> {
        let name: Arc<str> = endpoint.name.as_str().into();
        let sound = client_is_sound();
        let places = if sound { PLACES } else { 1 };
        let threads = Arc::clone(&self.threads);
        let workers = Workers::new(&name, threads, places, Arc::clone(&self.stuck));
        let events = EventSender::default();
        let alive = Arc::new(AtomicBool::new(true));
        let handle = {
            let (endpoint, events, alive) = (endpoint.clone(), events.clone(), Arc::clone(&alive));
            workers
                .run("connect", deadline, move || open(&endpoint, &events, &alive, sound))
                .await?
        };
        let in_flight = self.in_flight.clone();
        Ok(Arc::new(RealConnection { name, handle, workers, events, alive, sound, in_flight }))
    }

    fn stuck_calls(&self) -> usize {
        self.stuck.load(Ordering::Acquire)
    }
}

/// Connects, on a worker; `endpoint` keeps the socket's descriptor open until that is done.
fn open(
    endpoint: &Endpoint,
    events: &EventSender,
    alive: &Arc<AtomicBool>,
    keepalive: bool,
) -> Result<Closer, LibvirtError> {
    ffi::start_event_loop().map_err(|message| LibvirtError::Other { code: 0, message })?;
    let attempt = |instance| {
        Handle::open(&uri(endpoint, instance), events.clone(), Arc::clone(alive), keepalive)
            .map_err(|e| convert(&endpoint.name, &e))
    };
    let opened = match attempt(endpoint.instance) {
        Err(error) if error.is_other_instance() => attempt(endpoint.instance.other()),
        other => other,
    };
    opened.map(|handle| Closer(Some(Arc::new(handle))))
}

/// The URI for an endpoint.
fn uri(endpoint: &Endpoint, instance: Instance) -> String {
    let socket = match &endpoint.socket {
        Socket::Uri(uri) => return uri.clone(),
        Socket::Path(path) => path.as_os_str().as_encoded_bytes().to_vec(),
        Socket::Opened(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes(),
    };
    let mut uri = format!("qemu+unix:///{}?socket=", instance.as_str());
    for byte in socket {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}

fn convert(endpoint: &str, error: &virt::error::Error) -> LibvirtError {
    LibvirtError::from_parts(
        endpoint,
        error.code().to_raw(),
        error.domain().to_raw(),
        error.message().to_owned(),
    )
}

/// Lets go of a connection, the last one on a thread of its own, because that may block: the daemon
/// is told.
struct Closer(Option<Arc<Handle>>);

impl Drop for Closer {
    fn drop(&mut self) {
        // Only the last one closes it.
        let Some(handle) = self.0.take().and_then(Arc::into_inner) else { return };
        let spawned = std::thread::Builder::new()
            .name("libvirt-close".into())
            .spawn(move || drop(handle))
            .map(drop);
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to close a libvirt connection on");
        }
    }
}

/// One connection to a real libvirt.
struct RealConnection {
    name: Arc<str>,
    handle: Closer,
    workers: Workers,
    events: EventSender,
    alive: Arc<AtomicBool>,
    sound: bool,
    in_flight: InFlight,
}

impl RealConnection {
    /// Runs `work` with the connection on a worker.
    async fn with_connect<T: Send + 'static>(
        &self,
        call: &'static str,
        deadline: Duration,
        work: impl FnOnce(&Handle) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let handle = self.handle.0.clone().filter(|_| self.is_alive());
        let Some(handle) = handle else {
            return Err(LibvirtError::NoConnect {
                endpoint: self.name.to_string(),
                message: "the connection is gone".into(),
            });
        };
        let (name, gone) = (Arc::clone(&self.name), self.gone());
        // Should the caller be gone by then, the last reference must not be dropped in between.
        let handle = Closer(Some(handle));
        let result = self
            .workers
            .run(call, deadline, move || {
                let Some(open) = &handle.0 else {
                    return Err(LibvirtError::Other { code: 0, message: "closed".into() });
                };
                work(open).map_err(|e| {
                    let error = convert(&name, &e);
                    // With several calls waiting on a daemon that hangs, keepalive fails one of
                    // them and forgets the close callback (seen with libvirt 9.0).
                    if error.is_disconnect() {
                        gone();
                    }
                    error
                })
            })
            .await;
        // With the one place taken for good, the connection is of no more use.
        if !self.sound && matches!(result, Err(LibvirtError::TimedOut { stuck: 1.., .. })) {
            self.gone()();
        }
        result
    }

    /// Tells everybody, once, that the connection is gone.
    fn gone(&self) -> impl Fn() + Send + use<> {
        let (events, alive) = (self.events.clone(), Arc::clone(&self.alive));
        move || {
            if alive.swap(false, Ordering::AcqRel) {
                events.disconnected();
            }
        }
    }

    /// Runs `work` with a domain on a worker.
    async fn with_domain<T: Send + 'static>(
        &self,
        call: &'static str,
        domain: &str,
        deadline: Duration,
        work: impl Fn(&Domain) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let domain = domain.to_owned();
        self.with_connect(call, deadline, move |handle| handle.with_domain(&domain, work)).await
    }
}

const fn flags(affect: Affect) -> u32 {
    (if affect.live { sys::VIR_DOMAIN_AFFECT_LIVE } else { 0 })
        | (if affect.config { sys::VIR_DOMAIN_AFFECT_CONFIG } else { 0 })
}

fn state(state: virt::domain::DomainStateEnum) -> DomainState {
    use virt::domain::DomainState as V;
    match state.known() {
        Some(V::Running | V::Blocked) => DomainState::Running,
        Some(V::Paused | V::PMSuspended | V::Crashed | V::NoState) | None => DomainState::Paused,
        Some(V::Shutdown | V::Shutoff) => DomainState::Shutoff,
    }
}

/// No domain of that name is an answer.
fn there<T>(asked: Result<T, LibvirtError>) -> Result<Option<T>, LibvirtError> {
    match asked {
        Ok(found) => Ok(Some(found)),
        Err(LibvirtError::NoDomain { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

#[async_trait]
impl Connection for RealConnection {
    async fn version(&self, deadline: Duration) -> Result<Version, LibvirtError> {
        // virConnectGetLibVersion: major * 1,000,000 + minor * 1,000 + micro.
        let v = self.with_connect("version", deadline, |h| h.connect().lib_version()).await?;
        Ok(Version { major: v / 1_000_000, minor: v / 1_000 % 1_000, micro: v % 1_000 })
    }

    async fn info(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainInfo>, LibvirtError> {
        let info = self.with_domain("info", domain, deadline, |domain| {
            let (found, reason) = domain.state()?;
            let state = state(found);
            let io_error = match reason {
                Enum::Known(DomainStateReason::Paused(why)) => {
                    why.known() == Some(DomainPausedReason::IOError)
                }
                Enum::Known(_) | Enum::Unknown(_) => false,
            };
            let job = match state {
                DomainState::Shutoff => None,
                // Not offered by every driver; then a conflict shows by libvirt's own lock.
                DomainState::Running | DomainState::Paused => ffi::job(domain).unwrap_or(None),
            };
            Ok(DomainInfo { state, persistent: domain.is_persistent()?, job, io_error })
        });
        there(info.await)
    }

    async fn state(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainState>, LibvirtError> {
        let found = self.with_domain("state", domain, deadline, |domain| domain.state());
        there(found.await.map(|(found, _)| state(found)))
    }

    async fn xml(
        &self,
        domain: &str,
        definition: Definition,
        deadline: Duration,
    ) -> Result<String, LibvirtError> {
        let flags = match definition {
            Definition::Live => 0,
            Definition::Config => sys::VIR_DOMAIN_XML_INACTIVE,
        };
        self.with_domain("xml", domain, deadline, move |d| d.xml_desc(flags)).await
    }

    async fn attach_device(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let xml = xml.to_owned();
        let flight = self.in_flight.attach(&self.name, domain, device);
        self.with_domain("attach", domain, deadline, move |d| {
            let _flight = &flight;
            d.attach_device_flags(&xml, flags(affect))
        })
        .await
    }

    async fn detach_alias(
        &self,
        domain: &str,
        alias: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let flight = self.in_flight.detach(&self.name, domain, alias);
        let alias = CString::new(alias).map_err(|_| LibvirtError::DeviceMissing {
            message: format!("an alias cannot hold NUL: {alias:?}"),
        })?;
        self.with_domain("detach", domain, deadline, move |d| {
            let _flight = &flight;
            ffi::detach_alias(d, &alias, flags(affect))
        })
        .await
    }

    async fn update_drive(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        how: Medium,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let xml = xml.to_owned();
        let flight = match how {
            Medium::Insert => self.in_flight.attach(&self.name, domain, device),
            Medium::Eject | Medium::EjectByForce => {
                self.in_flight.detach(&self.name, domain, device)
            }
        };
        let force = match how {
            Medium::EjectByForce => sys::VIR_DOMAIN_DEVICE_MODIFY_FORCE,
            Medium::Insert | Medium::Eject => 0,
        };
        self.with_domain("update", domain, deadline, move |d| {
            let _flight = &flight;
            d.update_device_flags(&xml, flags(Affect::LIVE) | force)
        })
        .await
    }

    async fn block_capacity(
        &self,
        domain: &str,
        source: &str,
        deadline: Duration,
    ) -> Result<u64, LibvirtError> {
        let source = source.to_owned();
        let info =
            self.with_domain("blockinfo", domain, deadline, move |d| d.block_info(&source, 0));
        Ok(info.await?.capacity)
    }

    async fn block_resize(
        &self,
        domain: &str,
        source: &str,
        bytes: u64,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let source = source.to_owned();
        // The exact size, in bytes. VIR_DOMAIN_BLOCK_RESIZE_CAPACITY would find it out by itself, but
        // there is that only from libvirt 10.0 on.
        self.with_domain("resize", domain, deadline, move |d| {
            d.block_resize(&source, bytes, sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        })
        .await
    }

    async fn set_io_limits(
        &self,
        domain: &str,
        source: &str,
        limits: &IoLimits,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let source = CString::new(source).map_err(|_| LibvirtError::DeviceMissing {
            message: format!("a source cannot hold NUL: {source:?}"),
        })?;
        let limits = *limits;
        self.with_domain("limit", domain, deadline, move |d| {
            ffi::set_io_limits(d, &source, &limits, flags(affect))
        })
        .await
    }

    async fn change_io_thread(
        &self,
        domain: &str,
        device: &str,
        id: u32,
        how: IoThread,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let (call, flight) = match how {
            IoThread::Add => ("iothreadadd", self.in_flight.attach(&self.name, domain, device)),
            IoThread::Remove => ("iothreaddel", self.in_flight.detach(&self.name, domain, device)),
        };
        self.with_domain(call, domain, deadline, move |d| {
            let _flight = &flight;
            ffi::io_thread(d, id, how, flags(affect))
        })
        .await
    }

    async fn landed(
        &self,
        domain: &str,
        device: &str,
        calls: Calls,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.in_flight.landed_within(&self.name, domain, device, calls, deadline).await
    }

    async fn agent_command(
        &self,
        domain: &str,
        command: &str,
        deadline: Duration,
    ) -> Result<String, LibvirtError> {
        let command = command.to_owned();
        // libvirt's own timeout, in seconds, comes first, so that the agent's channel is in order
        // again when the call is given up.
        let seconds =
            i32::try_from(deadline.as_secs().saturating_sub(1).max(1)).unwrap_or(i32::MAX);
        self.with_domain("agent", domain, deadline, move |d| {
            d.qemu_agent_command(&command, seconds, 0)
        })
        .await
    }

    fn events(&self, domain: &str) -> DomainEvents {
        self.events.subscribe(domain)
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    fn stuck_calls(&self) -> usize {
        self.workers.stuck()
    }
}

#[cfg(test)]
#[path = "real_tests.rs"]
mod tests;
