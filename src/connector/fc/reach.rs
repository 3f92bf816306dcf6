//! Which HBAs and ports a job may use, waiting for them, and what may be done where there are none.

use std::collections::HashSet;
use std::sync::{MutexGuard, PoisonError};

use super::ports::{self, RemotePort};
use super::transport::Route;
use super::{Access, Inner, Job};
use crate::connector::Hba;
use crate::connector::error::Error;
use crate::connector::lun::Way as _;
use crate::connector::settings::ms;
use crate::connector::wait::Wait;
use crate::spec::FcSource;
use crate::step::Step;
use crate::types::VolumeKey;

impl Inner {
    /// The HBAs that the source may be had by: all, or those of its map. At least one.
    pub(super) async fn usable(&self, source: &FcSource) -> Result<Vec<Hba>, Error> {
        let mut hbas = ports::hbas(&*self.doors.sysfs).await?;
        let map = &source.initiator_targets;
        hbas.retain(|hba| map.is_empty() || map.contains_key(&hba.wwpn));
        if hbas.is_empty() {
            return Err(self.unmapped(source).await);
        }
        Ok(hbas)
    }

    /// No HBA of the node's may be used.
    pub(super) async fn unmapped(&self, source: &FcSource) -> Error {
        // Whoever asks has read them just now.
        let hbas = ports::hbas(&*self.doors.sysfs).await.unwrap_or_default();
        let list = |wwpns: Vec<String>| wwpns.join(", ");
        Error::NoHba {
            has: list(hbas.iter().map(|hba| hba.wwpn.to_string()).collect()),
            wanted: list(source.initiator_targets.keys().map(ToString::to_string).collect()),
        }
    }

    /// The remote ports of one target that the source may be had by, in whatever state.
    pub(super) async fn remote_ports(
        &self,
        source: &FcSource,
        at: &Access,
    ) -> Result<Vec<RemotePort>, Error> {
        let hbas = self.usable(source).await?;
        let mut ports = ports::of_target(&*self.doors.sysfs, &hbas, at.target.wwpn).await?;
        let map = &source.initiator_targets;
        let may = |port: &RemotePort| {
            map.get(&port.initiator).is_some_and(|targets| targets.contains(&port.target))
        };
        ports.retain(|port| map.is_empty() || may(port));
        Ok(ports)
    }

    /// Waits until a port is online by that route. A port that comes back sends no event of its own; the
    /// slow look of every wait finds it.
    pub(super) async fn await_port(&self, job: &Job, route: Route) -> Result<RemotePort, Error> {
        let mut wait = Wait::new(&*self.doors.uevents, ms(self.settings.fc.port_ms));
        loop {
            let ports = self.remote_ports(&job.with, &job.source).await?;
            let is_it = |port: &RemotePort| match route {
                Route::By(_) => port.route() == route,
                Route::ByAny => true,
            };
            if let Some(port) = ports.into_iter().find(|p| p.is_online() && is_it(p)) {
                return Ok(port);
            }
            if !wait.next().await {
                return Err(self.not_found(std::slice::from_ref(job)).await);
            }
        }
    }

    /// No port is online, in words of what each HBA has of them.
    pub(super) async fn not_found(&self, parts: &[Job]) -> Error {
        let mut targets = Vec::new();
        let mut seen = Vec::new();
        for job in parts {
            targets.push(job.source.target.to_string());
            for port in self.remote_ports(&job.with, &job.source).await.unwrap_or_default() {
                let RemotePort { initiator, target, state, .. } = port;
                seen.push(format!("{target} is {state} to HBA {initiator}"));
            }
        }
        let hbas = self.usable(&parts[0].with).await.unwrap_or_default();
        for hba in hbas {
            let speed = if hba.speed.is_empty() { "unknown" } else { &hba.speed };
            seen.push(format!("HBA {} is {}, speed {speed}", hba.wwpn, hba.state));
        }
        Error::PortNotFound { targets: targets.join(", "), seen: seen.join("; ") }
    }

    /// Where no HBA has any of the volume's ports, in whatever state, and the request allows it: has the
    /// HBAs initialize their links anew, or scan all that they have for the LUN.
    pub(super) async fn provoke(&self, job: &Job) -> Result<(), Error> {
        let source = &job.with;
        // Once for all of the volume's targets.
        if !(source.lip || source.wildcard_scan) || job.source != job.whole[0] {
            return Ok(());
        }
        for at in job.whole.iter() {
            if !self.remote_ports(source, at).await?.is_empty() {
                self.lips().remove(&job.owner);
                return Ok(());
            }
        }
        let hbas = self.usable(source).await?;
        if source.lip && self.lips().insert(job.owner.clone()) {
            for hba in &hbas {
                self.issue_lip(hba).await?;
            }
            if self.await_port(job, Route::ByAny).await.is_ok() {
                return Ok(());
            }
        }
        if source.wildcard_scan {
            for hba in &hbas {
                self.doors.tracker.run(Step::Scan, self.scan_all(hba, job)).await?;
            }
        }
        Ok(())
    }

    fn lips(&self) -> MutexGuard<'_, HashSet<VolumeKey>> {
        self.state.lips.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn issue_lip(&self, hba: &Hba) -> Result<(), Error> {
        tracing::warn!(host = hba.host, wwpn = %hba.wwpn, "LIP: the request asks for it, and no HBA sees its ports");
        let path = format!("class/fc_host/host{}/issue_lip", hba.host);
        let written = self.doors.sysfs.write(&path, "1").await;
        written.map_err(Error::io(format!("issuing a LIP on {}", hba.wwpn)))
    }

    /// Scans whatever the HBA has for the numbers of the volume's LUN: those of other targets, too.
    async fn scan_all(&self, hba: &Hba, job: &Job) -> Result<(), Error> {
        let mut luns: Vec<u64> = job.whole.iter().map(|at| at.lun.scsi()).collect();
        luns.sort_unstable();
        luns.dedup();
        for lun in luns {
            tracing::warn!(host = hba.host, wwpn = %hba.wwpn, lun, "wildcard scan: the request allows it, and no HBA sees its ports");
            let path = format!("class/scsi_host/host{}/scan", hba.host);
            let written = self.doors.sysfs.write(&path, &format!("- - {lun}")).await;
            written.map_err(Error::io(format!("scanning all of {}", hba.wwpn)))?;
        }
        Ok(())
    }
}
