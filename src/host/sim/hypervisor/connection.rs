//! A connection to a simulated libvirt: its calls, each as the real one answers it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::super::domain::{SimDomain, Unplug};
use super::{DeviceCheck, OpenCheck, Request, SimHypervisor};
use crate::host::libvirt::{
    Affect, Calls, Connection, Definition, DomainEvent, DomainEvents, DomainInfo, DomainState,
    EventSender, Flight, IoThread, LibvirtError, Medium, Version,
};
use crate::types::IoLimits;

pub(super) struct SimConnection {
    pub(super) endpoint: String,
    /// Of the libvirt as it was when this connection was made.
    pub(super) events: EventSender,
    pub(super) host: SimHypervisor,
    pub(super) stuck: Arc<AtomicUsize>,
}

/// What a call works on.
pub(super) struct Scene<'a> {
    pub(super) endpoint: &'a str,
    pub(super) domain: &'a mut SimDomain,
    pub(super) events: &'a EventSender,
    pub(super) open_check: Option<OpenCheck>,
    pub(super) device_check: Option<DeviceCheck>,
}

impl Scene<'_> {
    /// The size of a device that QEMU has open, in bytes; 0 where nobody knows.
    fn size(&self, path: &str) -> u64 {
        let check = self.device_check.as_ref();
        check.and_then(|device| device(self.endpoint, path)).unwrap_or_default().size
    }
}

impl SimConnection {
    /// Passes the door's faults and then runs `work`, in a task of its own: like a worker thread, it
    /// goes on when its caller has given up.
    async fn call<T: Send + 'static>(
        &self,
        call: &'static str,
        domain: &str,
        detail: &str,
        deadline: Duration,
        flight: Option<Flight>,
        work: impl FnOnce(Scene<'_>) -> Result<T, LibvirtError> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        if !self.is_alive() {
            return Err(self.no_connect("client socket is closed"));
        }
        let (host, endpoint, domain) =
            (self.host.clone(), self.endpoint.clone(), domain.to_owned());
        let detail = format!("{domain} {detail}");
        let broken = broken(self.events.subscribe(&domain));
        let mut task = tokio::spawn(async move {
            let _flight = flight;
            let gone = || LibvirtError::NoConnect {
                endpoint: endpoint.clone(),
                message: "client socket is closed".into(),
            };
            host.faults
                .pass_or_end(&format!("libvirt.{call}"), &detail)
                .await
                .map_err(|e| LibvirtError::Other { code: 0, message: e.to_string() })?;
            let (answer, answered) = oneshot::channel();
            let at = endpoint.clone();
            let request: Request = Box::new(move |state| {
                // Whoever asked may have gone.
                let _ = answer.send(state.carry_out(&at, &domain, work));
            });
            host.lock().receive(&endpoint, call, request);
            tokio::select! {
                biased;
                result = answered => result.unwrap_or_else(|_| Err(gone())),
                () = broken => Err(gone()),
            }
        });
        match tokio::time::timeout(deadline, &mut task).await {
            Ok(Ok(result)) => result,
            Ok(Err(e)) => Err(LibvirtError::Other { code: 0, message: e.to_string() }),
            Err(_) => {
                let stuck = self.stuck.fetch_add(1, Ordering::AcqRel) + 1;
                self.host.stuck.fetch_add(1, Ordering::AcqRel);
                let counts = [Arc::clone(&self.stuck), Arc::clone(&self.host.stuck)];
                tokio::spawn(async move {
                    let _ = task.await;
                    for count in counts {
                        count.fetch_sub(1, Ordering::AcqRel);
                    }
                });
                let endpoint = self.endpoint.clone();
                Err(LibvirtError::TimedOut { endpoint, call, deadline, stuck })
            }
        }
    }

    fn no_connect(&self, message: &str) -> LibvirtError {
        LibvirtError::NoConnect { endpoint: self.endpoint.clone(), message: message.into() }
    }
}

/// Returns when the connection breaks.
async fn broken(mut events: DomainEvents) {
    while events.next().await != DomainEvent::Disconnected {}
}

fn refuse_busy(domain: &SimDomain) -> Result<(), LibvirtError> {
    match domain.job {
        None => Ok(()),
        Some(job) => Err(LibvirtError::Busy {
            message: format!(
                "Timed out during operation: cannot acquire state change lock ({job})"
            ),
        }),
    }
}

#[async_trait]
impl Connection for SimConnection {
    async fn version(&self, _: Duration) -> Result<Version, LibvirtError> {
        Ok(Version { major: 11, minor: 3, micro: 0 })
    }

    async fn info(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainInfo>, LibvirtError> {
        match self.call("info", domain, "", deadline, None, |s| Ok(s.domain.info())).await {
            Err(LibvirtError::NoDomain { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    async fn state(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainState>, LibvirtError> {
        // To the simulated libvirt it is the same question.
        Ok(self.info(domain, deadline).await?.map(|info| info.state))
    }

    async fn xml(
        &self,
        domain: &str,
        definition: Definition,
        deadline: Duration,
    ) -> Result<String, LibvirtError> {
        self.call("xml", domain, "", deadline, None, move |s| Ok(s.domain.xml(definition))).await
    }

    async fn attach_device(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let flight = self.host.in_flight.attach(&self.endpoint, domain, device);
        let device = xml.to_owned();
        self.call("attach", domain, xml, deadline, Some(flight), move |s| {
            refuse_busy(s.domain)?;
            let endpoint = s.endpoint;
            let check = |path: &str, read_only| {
                s.open_check.as_ref().map_or(Ok(()), |c| c(endpoint, path, read_only))
            };
            let found =
                |path: &str| s.device_check.as_ref().and_then(|found| found(endpoint, path));
            if let Some(alias) = s.domain.attach(&device, affect, &check, &found)? {
                s.events.send(s.domain.name(), DomainEvent::DeviceAdded(alias));
            }
            Ok(())
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
        let flight = self.host.in_flight.detach(&self.endpoint, domain, alias);
        let wanted = alias.to_owned();
        self.call("detach", domain, alias, deadline, Some(flight), move |s| {
            refuse_busy(s.domain)?;
            match s.domain.detach(&wanted, affect)? {
                Some(Unplug::Acknowledge) => {
                    s.events.send(s.domain.name(), DomainEvent::DeviceRemoved(wanted));
                }
                Some(Unplug::Refuse) => {
                    s.events.send(s.domain.name(), DomainEvent::DeviceRemovalFailed(wanted));
                }
                Some(Unplug::Silent) | None => {}
            }
            Ok(())
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
        let flight = match how {
            Medium::Insert => self.host.in_flight.attach(&self.endpoint, domain, device),
            Medium::Eject | Medium::EjectByForce => {
                self.host.in_flight.detach(&self.endpoint, domain, device)
            }
        };
        let drive = xml.to_owned();
        self.call("update", domain, xml, deadline, Some(flight), move |s| {
            refuse_busy(s.domain)?;
            let endpoint = s.endpoint;
            let check = |path: &str| {
                s.open_check.as_ref().map_or(Ok(()), |check| check(endpoint, path, true))
            };
            let found =
                |path: &str| s.device_check.as_ref().and_then(|found| found(endpoint, path));
            s.domain.update(&drive, how == Medium::EjectByForce, &check, &found)
        })
        .await
    }

    async fn block_capacity(
        &self,
        domain: &str,
        source: &str,
        deadline: Duration,
    ) -> Result<u64, LibvirtError> {
        let path = source.to_owned();
        let work = move |s: Scene<'_>| s.domain.capacity(&path);
        self.call("capacity", domain, source, deadline, None, work).await
    }

    async fn block_resize(
        &self,
        domain: &str,
        source: &str,
        bytes: u64,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        let path = source.to_owned();
        self.call("resize", domain, source, deadline, None, move |s| {
            refuse_busy(s.domain)?;
            let has = s.size(&path);
            s.domain.resize(&path, bytes, has)
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
        let (path, limits) = (source.to_owned(), *limits);
        self.call("limit", domain, source, deadline, None, move |s| {
            refuse_busy(s.domain)?;
            s.domain.limit(&path, &limits, affect)
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
        let (at, flights) = (&self.endpoint, &self.host.in_flight);
        let (call, flight) = match how {
            IoThread::Add => ("iothreadadd", flights.attach(at, domain, device)),
            IoThread::Remove => ("iothreaddel", flights.detach(at, domain, device)),
        };
        self.call(call, domain, device, deadline, Some(flight), move |s| {
            refuse_busy(s.domain)?;
            match how {
                IoThread::Add => s.domain.add_io_thread(id, affect),
                IoThread::Remove => s.domain.del_io_thread(id, affect),
            }
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
        self.host.in_flight.landed_within(&self.endpoint, domain, device, calls, deadline).await
    }

    async fn agent_command(
        &self,
        domain: &str,
        command: &str,
        deadline: Duration,
    ) -> Result<String, LibvirtError> {
        let request = command.to_owned();
        self.call("agent", domain, command, deadline, None, move |s| s.domain.agent(&request)).await
    }

    fn events(&self, domain: &str) -> DomainEvents {
        self.events.subscribe(domain)
    }

    fn is_alive(&self) -> bool {
        // A libvirt that was restarted or removed has another sender, or none.
        let state = self.host.lock();
        state.libvirts.get(&self.endpoint).is_some_and(|l| l.events.same(&self.events))
    }

    fn stuck_calls(&self) -> usize {
        self.stuck.load(Ordering::Acquire)
    }
}
