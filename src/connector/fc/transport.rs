//! Fibre Channel as a transport: a route is an HBA that sees the target port, its way the remote port.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::ports::{self, RemotePort};
use super::{Access, Inner, Job};
use crate::connector::error::Error;
use crate::connector::lease;
use crate::connector::lun::{Luns, Transport, Way};
use crate::connector::scsi::Hctl;
use crate::connector::{AttachRequest, Authentication, Discovered};
use crate::spec::{FcSource, Source};
use crate::types::{Portal, VolumeKey, Wwpn};

/// LUNs by HBAs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fc;

/// A target port, as leases are named.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Port {
    pub(super) wwpn: Wwpn,
    text: String,
}

impl Port {
    fn new(wwpn: Wwpn) -> Self {
        Self { wwpn, text: wwpn.to_string() }
    }
}

impl AsRef<str> for Port {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// By which HBA a target port is come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Route {
    /// This one.
    By(Wwpn),
    /// None sees it yet: by the first that does.
    ByAny,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::By(wwpn) => wwpn.fmt(f),
            Self::ByAny => f.write_str("any HBA"),
        }
    }
}

/// Nothing is made of a target: it logs in by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {}

impl lease::Made for Made {
    const TRANSPORT: &'static str = "fc";
}

/// What is remembered of LIPs.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// For whom one was issued: not at every try, for it disturbs all who use the HBA.
    pub(super) lips: Mutex<HashSet<VolumeKey>>,
}

impl Way<Fc> for RemotePort {
    fn route(&self) -> Route {
        Route::By(self.initiator)
    }

    fn hctl(&self, lun: u64) -> Hctl {
        RemotePort::hctl(self, lun)
    }

    fn device_dir(&self, hctl: Hctl) -> String {
        RemotePort::device_dir(self, hctl)
    }

    fn is_up(&self) -> bool {
        self.is_online()
    }
}

#[async_trait]
impl Transport for Fc {
    type Source = FcSource;
    type Target = Port;
    type Route = Route;
    type Way = RemotePort;
    type With = FcSource;
    type Begun = ();
    type Refused = Error;
    type Made = Made;
    type State = State;

    const SCANNED_BY_KERNEL: bool = true;

    fn source(source: &Source) -> Option<&FcSource> {
        match source {
            Source::Fc(source) => Some(source),
            Source::Iscsi(_) | Source::Block(_) | Source::File(_) => None,
        }
    }

    fn targets(source: &FcSource) -> Vec<Access> {
        let access = |target: &crate::spec::FcTarget| Access {
            target: Port::new(target.wwpn),
            routes: vec![Route::ByAny],
            lun: target.lun,
        };
        source.targets.iter().map(access).collect()
    }

    fn lock_name(target: &Port) -> &str {
        target.as_ref()
    }

    fn with(_: &AttachRequest, source: &FcSource) -> Result<FcSource, Error> {
        Ok(source.clone())
    }

    /// By every HBA that sees a port, or that the map has for it; none of a port that the map has for other
    /// nodes' HBAs alone.
    async fn routes(
        luns: &Inner,
        source: &FcSource,
        mut targets: Vec<Access>,
    ) -> Result<Vec<Access>, Error> {
        let sysfs = &*luns.doors.sysfs;
        let hbas = luns.usable(source).await?;
        for at in &mut targets {
            at.routes = match &source.initiator_targets {
                map if map.is_empty() => {
                    let ports = ports::of_target(sysfs, &hbas, at.target.wwpn).await?;
                    ports.iter().map(RemotePort::route).collect()
                }
                map => {
                    let maps =
                        |hba: &Wwpn| map.get(hba).is_some_and(|t| t.contains(&at.target.wwpn));
                    hbas.iter().map(|hba| hba.wwpn).filter(maps).map(Route::By).collect()
                }
            };
            at.routes.sort();
            at.routes.dedup();
            if at.routes.is_empty() && source.initiator_targets.is_empty() {
                at.routes.push(Route::ByAny);
            }
        }
        if targets.iter().all(|at| at.routes.is_empty()) {
            // An HBA of ours is in the map, but for none of these.
            return Err(luns.unmapped(source).await);
        }
        Ok(targets)
    }

    async fn ways(luns: &Inner, job: &Job) -> Result<Vec<RemotePort>, Error> {
        luns.remote_ports(&job.with, &job.source).await
    }

    async fn reach(luns: &Arc<Inner>, job: &Job, _: &[Route]) -> Result<HashMap<Route, ()>, Error> {
        luns.provoke(job).await?;
        Ok(HashMap::new())
    }

    async fn await_way(
        luns: &Arc<Inner>,
        job: &Job,
        route: Route,
        _: Option<()>,
    ) -> Result<RemotePort, Error> {
        luns.await_port(job, route).await
    }

    fn covers(asked: Route, came: Route) -> bool {
        asked == came || asked == Route::ByAny
    }

    async fn unreached(luns: &Inner, parts: &[Job], refused: Vec<(usize, Error)>) -> Error {
        let worse = |error: &Error| !matches!(error, Error::PortNotFound { .. });
        match refused.into_iter().map(|(_, error)| error).find(worse) {
            Some(error) => error,
            None => luns.not_found(parts).await,
        }
    }

    /// Ports have no credentials.
    async fn admit(_: &Inner, _: &Job, _: &RemotePort) -> Result<(), Error> {
        Ok(())
    }

    /// The kernel scans too.
    fn is_ours(_: &Made, _: &Port, _: &RemotePort) -> bool {
        false
    }

    async fn settle(_: &Inner, _: &Port, _: &[Route]) -> Result<bool, Error> {
        Ok(false)
    }

    async fn leave(_: &Inner, _: &Access) -> Result<bool, Error> {
        Ok(false)
    }

    /// What a portal lists is iSCSI.
    async fn discover(
        _: &Arc<Luns<Self>>,
        portal: Portal,
        _: Authentication,
    ) -> Result<Vec<Discovered>, Error> {
        let transport = <Made as lease::Made>::TRANSPORT;
        Err(Error::OtherTransport { transport, source_key: portal.to_string() })
    }
}
