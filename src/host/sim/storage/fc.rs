//! Fibre Channel: HBAs, the fabric's zones, and remote ports as the transport class keeps them.
//!
//! A target port is a target of the array by the name [`SimStorage::fc_target`] gives it, so that LUNs are
//! mapped to it as to any other. The kernel scans a port that logs in, unless it was started with
//! `scsi_mod.scan=manual`; a port that is lost blocks its devices, until `dev_loss_tmo` has them removed:
//! the remote port itself stays, `Not Present`, and has its target id when it comes back.

use std::io;

use nix::libc;

use super::SimStorage;
use super::disks::Behind;
use super::kernel::World;
use crate::types::{Iqn, Wwpn};

/// The first host number of an HBA: apart from those of sessions, which come and go.
const FIRST_HOST: u32 = 100;

/// What `fabric_name` shows.
const FABRIC: &str = "0x100000051e0a1234";

/// An HBA, which a reboot leaves where it is.
#[derive(Debug, Clone)]
pub(super) struct SimHba {
    wwpn: Wwpn,
    host: u32,
    up: bool,
    /// The target ports that the fabric shows to it.
    zones: Vec<Zone>,
}

#[derive(Debug, Clone)]
struct Zone {
    target: Wwpn,
    appears: Appears,
}

/// What makes a port appear that an HBA is zoned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appears {
    /// It logs in at once.
    AtOnce,
    /// Only a LIP has it log in.
    ByLip,
    /// The HBA shows no remote port of it, only the SCSI target, once all is scanned.
    ByScan,
    /// It is away, or lost.
    Not,
}

/// A remote port of this boot.
#[derive(Debug, Clone)]
pub(super) struct RemotePort {
    /// Counted with the sessions: no two have the same.
    sid: u32,
    host: u32,
    /// R of `rport-H:0-R`.
    number: u32,
    target_id: u32,
    wwpn: Wwpn,
    state: &'static str,
    /// The transport class knows of it.
    shown: bool,
}

impl RemotePort {
    fn name(&self) -> String {
        format!("rport-{}:0-{}", self.host, self.number)
    }

    fn dir(&self) -> String {
        let host = format!("devices/pci0000:00/0000:00:03.0/host{}", self.host);
        if self.shown { format!("{host}/{}", self.name()) } else { host }
    }

    fn behind(&self) -> Behind {
        Behind {
            sid: self.sid,
            host: self.host,
            id: self.target_id,
            dir: self.dir(),
            target: SimStorage::fc_target(self.wwpn),
            fc: Some(self.wwpn),
        }
    }
}

impl SimStorage {
    /// The target that is a port of that name (SAM-5: an FC target port's name is an NAA name).
    pub fn fc_target(wwpn: Wwpn) -> Iqn {
        format!("naa.{wwpn}").parse().expect("16 hex digits")
    }

    /// Puts an HBA into the node; its SCSI host's number.
    pub fn add_hba(&self, wwpn: Wwpn) -> u32 {
        let mut world = self.world();
        let host = (FIRST_HOST..).find(|n| !world.is_hba(*n)).unwrap_or(FIRST_HOST);
        let hba = SimHba { wwpn, host, up: true, zones: Vec::new() };
        world.show_hba(&hba);
        world.hbas.push(hba);
        host
    }

    /// Whether the kernel scans ports that log in by itself (the default).
    pub fn set_fc_scan(&self, by_itself: bool) {
        self.world().fc_scans = by_itself;
    }

    /// Shows a target port to an HBA; it appears as said.
    pub fn zone(&self, hba: Wwpn, target: Wwpn, appears: Appears) {
        let mut world = self.world();
        world.targets.entry(Self::fc_target(target)).or_default();
        let Some(known) = world.hbas.iter_mut().find(|known| known.wwpn == hba) else { return };
        known.zones.retain(|zone| zone.target != target);
        known.zones.push(Zone { target, appears });
        let host = known.host;
        if appears == Appears::AtOnce {
            world.port_online(host, target);
        }
    }

    /// The port is away from that HBA: its devices block.
    pub fn lose_port(&self, hba: Wwpn, target: Wwpn) {
        self.world().port_lost(hba, target);
    }

    /// `dev_loss_tmo` is over for a port that was lost: its devices are removed.
    pub fn end_dev_loss(&self, hba: Wwpn, target: Wwpn) {
        self.world().dev_loss(hba, target);
    }

    /// How many LIPs were issued.
    pub fn lips(&self) -> u32 {
        self.world().lips
    }
}

impl World {
    fn show_hba(&mut self, hba: &SimHba) {
        let host = hba.host;
        let host_dir = format!("devices/pci0000:00/0000:00:03.0/host{host}");
        let scsi_host = format!("{host_dir}/scsi_host/host{host}");
        let tree = &mut self.tree;
        tree.put_unreadable(&format!("{scsi_host}/scan"), libc::EIO);
        tree.put(&format!("{scsi_host}/proc_name"), "simfc");
        tree.put(&format!("{scsi_host}/state"), "running");
        tree.link(&format!("{scsi_host}/device"), &host_dir);
        tree.link(&format!("class/scsi_host/host{host}"), &scsi_host);
        tree.link(&format!("bus/scsi/devices/host{host}"), &host_dir);
        let fc_host = format!("{host_dir}/fc_host/host{host}");
        tree.put(&format!("{fc_host}/port_name"), hba.wwpn.sysfs());
        tree.put(&format!("{fc_host}/node_name"), hba.wwpn.sysfs().replacen("0x2", "0x1", 1));
        tree.put(&format!("{fc_host}/fabric_name"), FABRIC);
        tree.put(&format!("{fc_host}/port_type"), "NPort (fabric via point-to-point)");
        tree.put_unreadable(&format!("{fc_host}/issue_lip"), libc::EACCES);
        tree.link(&format!("class/fc_host/host{host}"), &fc_host);
        self.show_link(hba);
        self.emit("add", &host_dir, "scsi", &[("DEVTYPE", "scsi_host".into())]);
        self.emit("add", &scsi_host, "scsi_host", &[]);
        self.emit("add", &fc_host, "fc_host", &[]);
    }

    fn show_link(&mut self, hba: &SimHba) {
        let fc_host = format!("class/fc_host/host{}", hba.host);
        let Ok(fc_host) = self.tree.resolve(&fc_host) else { return };
        let (state, speed) = if hba.up { ("Online", "16 Gbit") } else { ("Linkdown", "unknown") };
        self.tree.put(&format!("{fc_host}/port_state"), state);
        self.tree.put(&format!("{fc_host}/speed"), speed);
    }

    /// What the HBAs find at a boot.
    pub(super) fn boot_hbas(&mut self) {
        self.rports.clear();
        for hba in self.hbas.clone() {
            self.show_hba(&hba);
            for zone in hba.zones.iter().filter(|zone| zone.appears == Appears::AtOnce) {
                self.port_online(hba.host, zone.target);
            }
        }
    }

    /// Whether a host number is an HBA's.
    pub(super) fn is_hba(&self, host: u32) -> bool {
        self.hbas.iter().any(|hba| hba.host == host)
    }

    /// A port logs in, or comes back.
    fn port_online(&mut self, host: u32, wwpn: Wwpn) {
        let known = self.rports.iter().position(|p| p.host == host && p.wwpn == wwpn);
        let at = known.unwrap_or_else(|| self.add_rport(host, wwpn, true));
        let port = &mut self.rports[at];
        port.state = "Online";
        let port = port.clone();
        self.show_rport(&port);
        self.paths_follow(&port, true);
        if known.is_none() {
            let attrs = format!("{}/fc_remote_ports/{}", port.dir(), port.name());
            self.emit("add", &attrs, "fc_remote_ports", &[]);
        }
        if self.fc_scans {
            self.scan_behind(&port.behind(), None);
            self.multipathd_react();
        }
    }

    fn add_rport(&mut self, host: u32, wwpn: Wwpn, shown: bool) -> usize {
        let count = self.rports.iter().filter(|p| p.host == host).count();
        let number = u32::try_from(count).unwrap_or(u32::MAX);
        let (sid, state) = (self.next_sid(), "Online");
        // Target ids are given out as targets come; other ports (switches, initiators) have numbers too.
        let port =
            RemotePort { sid, host, number: number + 2, target_id: number, wwpn, state, shown };
        self.rports.push(port);
        self.rports.len() - 1
    }

    fn show_rport(&mut self, port: &RemotePort) {
        let dir = port.dir();
        let attrs = format!("{dir}/fc_remote_ports/{}", port.name());
        let tree = &mut self.tree;
        tree.put(&format!("{attrs}/port_name"), port.wwpn.sysfs());
        tree.put(&format!("{attrs}/node_name"), port.wwpn.sysfs());
        tree.put(&format!("{attrs}/port_state"), port.state);
        tree.put(&format!("{attrs}/roles"), "FCP Target");
        tree.put(&format!("{attrs}/scsi_target_id"), port.target_id);
        tree.put(&format!("{attrs}/dev_loss_tmo"), 30);
        tree.put(&format!("{attrs}/fast_io_fail_tmo"), "off");
        tree.link(&format!("{attrs}/device"), &dir);
        tree.link(&format!("class/fc_remote_ports/{}", port.name()), &attrs);
    }

    fn port_lost(&mut self, hba: Wwpn, target: Wwpn) {
        if let Some(port) = self.change_port(hba, target, "Blocked") {
            self.paths_follow(&port, false);
        }
    }

    fn dev_loss(&mut self, hba: Wwpn, target: Wwpn) {
        let Some(port) = self.change_port(hba, target, "Not Present") else { return };
        let its = self.disks.values().filter(|d| d.sid == port.sid);
        let hctls: Vec<String> = its.map(|d| d.hctl.clone()).collect();
        hctls.iter().for_each(|hctl| self.delete_disk(hctl));
    }

    fn change_port(&mut self, hba: Wwpn, target: Wwpn, state: &'static str) -> Option<RemotePort> {
        let hba = self.hbas.iter_mut().find(|known| known.wwpn == hba)?;
        hba.zones.iter_mut().filter(|z| z.target == target).for_each(|z| z.appears = Appears::Not);
        let host = hba.host;
        let port = self.rports.iter_mut().find(|p| p.host == host && p.wwpn == target)?;
        port.state = state;
        let port = port.clone();
        self.show_rport(&port);
        Some(port)
    }

    /// Makes a port's devices follow its state. The kernel sends no event.
    fn paths_follow(&mut self, port: &RemotePort, up: bool) {
        let its = self.disks.values().filter(|d| d.sid == port.sid);
        let hctls: Vec<String> = its.map(|d| d.hctl.clone()).collect();
        for hctl in hctls {
            if let Some(dir) = self.disk_dir(&hctl)
                && !self.is_offline(&dir)
            {
                self.tree.put(&format!("{dir}/state"), if up { "running" } else { "blocked" });
            }
            self.disks.set_online(&hctl, up);
        }
    }

    /// Shows the SCSI target of a port, which the FC transport does when it is made.
    pub(super) fn show_fc_target(&mut self, target_dir: &str, wwpn: Wwpn) {
        let Some(name) = target_dir.rsplit('/').next() else { return };
        let attrs = format!("{target_dir}/fc_transport/{name}");
        self.tree.put(&format!("{attrs}/port_name"), wwpn.sysfs());
        self.tree.put(&format!("{attrs}/node_name"), wwpn.sysfs());
        self.tree.put(&format!("{attrs}/port_id"), "0x010200");
        self.tree.link(&format!("class/fc_transport/{name}"), &attrs);
    }

    /// What a scan of an HBA's host finds: at a port that is online (fc_user_scan), or at all.
    pub(super) fn scan_hba(&mut self, host: u32, id: Option<u64>, lun: Option<u64>) {
        if id.is_none() {
            let hidden = |zone: &&Zone| zone.appears == Appears::ByScan;
            let hba = self.hbas.iter().find(|hba| hba.host == host);
            let found: Vec<Wwpn> = hba
                .map(|hba| hba.zones.iter().filter(hidden).map(|zone| zone.target).collect())
                .unwrap_or_default();
            for wwpn in found {
                if !self.rports.iter().any(|p| p.host == host && p.wwpn == wwpn) {
                    self.add_rport(host, wwpn, false);
                }
            }
        }
        let its = |p: &&RemotePort| {
            p.host == host
                && p.state == "Online"
                && id.is_none_or(|id| id == u64::from(p.target_id))
        };
        let ports: Vec<Behind> = self.rports.iter().filter(its).map(RemotePort::behind).collect();
        for port in ports {
            self.scan_behind(&port, lun);
        }
    }

    /// A write to an HBA's `issue_lip`.
    pub(super) fn issue_lip(&mut self, host: u32) -> io::Result<()> {
        self.lips += 1;
        let Some(hba) = self.hbas.iter_mut().find(|hba| hba.host == host) else { return Ok(()) };
        let mut came = Vec::new();
        for zone in hba.zones.iter_mut().filter(|zone| zone.appears == Appears::ByLip) {
            zone.appears = Appears::AtOnce;
            came.push(zone.target);
        }
        came.into_iter().for_each(|target| self.port_online(host, target));
        Ok(())
    }

    /// The remote ports and HBAs, for a picture of the node.
    pub(super) fn fc_lines(&self) -> Vec<String> {
        let hba = |hba: &SimHba| format!("hba {} host{} up {}\n", hba.wwpn, hba.host, hba.up);
        let port = |p: &RemotePort| format!("rport {} {} {}\n", p.name(), p.wwpn, p.state);
        self.hbas.iter().map(hba).chain(self.rports.iter().map(port)).collect()
    }
}
