//! The node's kernel: iSCSI sessions, SCSI devices, sysfs and uevents.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use tokio::sync::broadcast;

use super::array::{PortalState, SimLun, SimTarget, vpd_pg80, vpd_pg83};
use super::dm::Dm;
use super::iscsiadm::Records;
use super::multipathd::MultipathModel;
use super::tree::Tree;
use crate::host::uevent::{Notice, Uevent};
use crate::types::{DevNum, Iqn, Portal};

/// The first host number that iSCSI gets: a node has others.
const FIRST_HOST: u32 = 2;

/// An iSCSI session, which is also its SCSI host, as with iscsi_tcp.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) sid: u32,
    pub(super) host: u32,
    pub(super) target: Iqn,
    pub(super) portal: Portal,
    pub(super) iface: String,
    pub(super) failed: bool,
}

impl Session {
    /// The session's directory below /sys.
    fn dir(&self) -> String {
        format!("devices/platform/host{}/session{}", self.host, self.sid)
    }
}

/// A SCSI disk as the kernel knows it, which may be behind what the array has.
#[derive(Debug, Clone)]
pub(super) struct ScsiDev {
    pub(super) hctl: String,
    pub(super) sid: u32,
    pub(super) target: Iqn,
    pub(super) scsi_lun: u64,
    /// Counts sd names and minors, lowest first.
    index: u32,
    pub(super) name: String,
    pub(super) dev: DevNum,
    pub(super) known: SimLun,
    /// Whether its path works.
    pub(super) online: bool,
}

/// The node and the arrays it reaches.
#[derive(Debug)]
pub(super) struct World {
    pub(super) tree: Tree,
    pub(super) events: broadcast::Sender<Notice>,
    pub(super) targets: BTreeMap<Iqn, SimTarget>,
    pub(super) records: Records,
    pub(super) sessions: BTreeMap<u32, Session>,
    pub(super) disks: BTreeMap<String, ScsiDev>,
    pub(super) dm: BTreeMap<u32, Dm>,
    pub(super) multipath: MultipathModel,
    /// Exclusive claims (mounts and the like) that tests place.
    pub(super) claims: BTreeMap<DevNum, Vec<String>>,
    /// Plain opens that tests place.
    pub(super) opens: BTreeMap<DevNum, Vec<String>>,
    pub(super) boot: u32,
    last_sid: u32,
    last_diskseq: u64,
}

impl World {
    pub(super) fn new(events: broadcast::Sender<Notice>) -> Self {
        let mut world = Self {
            tree: Tree::default(),
            events,
            targets: BTreeMap::new(),
            records: Records::default(),
            sessions: BTreeMap::new(),
            disks: BTreeMap::new(),
            dm: BTreeMap::new(),
            multipath: MultipathModel::default(),
            claims: BTreeMap::new(),
            opens: BTreeMap::new(),
            boot: 1,
            last_sid: 0,
            last_diskseq: 0,
        };
        world.boot_tree();
        world
    }

    /// What a reboot leaves: records and multipath's files; nothing of the kernel's.
    pub(super) fn reboot(&mut self) {
        self.boot += 1;
        self.sessions.clear();
        self.disks.clear();
        self.dm.clear();
        self.claims.clear();
        self.opens.clear();
        self.multipath.pending.clear();
        (self.last_sid, self.last_diskseq) = (0, 0);
        self.boot_tree();
    }

    fn boot_tree(&mut self) {
        self.tree = Tree::default();
        for dir in [
            "block",
            "bus/scsi/devices",
            "class/block",
            "class/scsi_device",
            "class/scsi_host",
            "dev/block",
            "devices/platform",
            "devices/virtual/block",
            // These classes are there once the transport's module is loaded, as on a node.
            "class/iscsi_connection",
            "class/iscsi_host",
            "class/iscsi_session",
        ] {
            self.tree.mkdir(dir);
        }
    }

    pub(super) fn emit(
        &self,
        action: &str,
        devpath: &str,
        subsystem: &str,
        more: &[(&str, String)],
    ) {
        let mut properties: BTreeMap<String, String> =
            more.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        properties.insert("ACTION".into(), action.into());
        properties.insert("DEVPATH".into(), format!("/{devpath}"));
        properties.insert("SUBSYSTEM".into(), subsystem.into());
        let event = Uevent {
            action: action.into(),
            devpath: devpath.into(),
            subsystem: subsystem.into(),
            properties,
        };
        // Nobody listening is fine: the kernel does not care either.
        let _ = self.events.send(Notice::Event(event));
    }

    pub(super) fn next_diskseq(&mut self) -> u64 {
        self.last_diskseq += 1;
        self.last_diskseq
    }

    /// How a portal of a target answers; `None` when it does not know the target.
    pub(super) fn portal_state(&self, target: &Iqn, portal: &Portal) -> Option<PortalState> {
        match self.targets.get(target).and_then(|t| t.portals.get(portal)) {
            Some(state) => Some(*state),
            // A portal that serves others answers that it has no such target; one that serves
            // nobody is not there.
            None if self.targets.values().any(|t| t.portals.contains_key(portal)) => None,
            None => Some(PortalState::Dead),
        }
    }

    /// Makes a session on a host of its own, logged in.
    pub(super) fn login(&mut self, target: &Iqn, portal: Portal, iface: &str) -> u32 {
        let used = |n: &u32| self.sessions.values().any(|s| s.host == *n);
        let host = (FIRST_HOST..).find(|n| !used(n)).unwrap_or(FIRST_HOST);
        self.last_sid += 1;
        let session = Session {
            sid: self.last_sid,
            host,
            target: target.clone(),
            portal,
            iface: iface.into(),
            failed: false,
        };
        self.show_session(&session);
        self.sessions.insert(session.sid, session);
        self.last_sid
    }

    fn show_session(&mut self, session: &Session) {
        let Session { sid, host, target, portal, iface, .. } = session;
        let host_dir = format!("devices/platform/host{host}");
        let scsi_host = format!("{host_dir}/scsi_host/host{host}");
        let tree = &mut self.tree;
        tree.put_unreadable(&format!("{scsi_host}/scan"), libc::EIO);
        tree.put(&format!("{scsi_host}/proc_name"), "iscsi_tcp");
        tree.put(&format!("{scsi_host}/state"), "running");
        tree.link(&format!("{scsi_host}/device"), &host_dir);
        tree.link(&format!("class/scsi_host/host{host}"), &scsi_host);
        tree.link(&format!("bus/scsi/devices/host{host}"), &host_dir);
        let iscsi_host = format!("{host_dir}/iscsi_host/host{host}");
        tree.put(&format!("{iscsi_host}/initiatorname"), "iqn.2026-01.example.sim:node");
        tree.put(&format!("{iscsi_host}/netdev"), "default");
        tree.link(&format!("{iscsi_host}/device"), &host_dir);
        tree.link(&format!("class/iscsi_host/host{host}"), &iscsi_host);

        let session_dir = session.dir();
        let attrs = format!("{session_dir}/iscsi_session/session{sid}");
        tree.put(&format!("{attrs}/targetname"), target);
        tree.put(&format!("{attrs}/ifacename"), iface);
        tree.put(&format!("{attrs}/state"), "LOGGED_IN");
        tree.put(&format!("{attrs}/recovery_tmo"), 120);
        tree.put(&format!("{attrs}/tpgt"), 1);
        tree.link(&format!("{attrs}/device"), &session_dir);
        tree.link(&format!("class/iscsi_session/session{sid}"), &attrs);
        let conn_dir = format!("{session_dir}/connection{sid}:0");
        let conn = format!("{conn_dir}/iscsi_connection/connection{sid}:0");
        for prefix in ["", "persistent_"] {
            tree.put(&format!("{conn}/{prefix}address"), portal.ip());
            tree.put(&format!("{conn}/{prefix}port"), portal.port());
        }
        tree.put(&format!("{conn}/state"), "up");
        tree.link(&format!("{conn}/device"), &conn_dir);
        tree.link(&format!("class/iscsi_connection/connection{sid}:0"), &conn);

        self.emit("add", &host_dir, "scsi", &[("DEVTYPE", "scsi_host".into())]);
        self.emit("add", &scsi_host, "scsi_host", &[]);
        self.emit("add", &iscsi_host, "iscsi_host", &[]);
        self.emit("add", &attrs, "iscsi_session", &[]);
        self.emit("add", &conn, "iscsi_connection", &[]);
    }

    /// Ends a session with all its devices.
    pub(super) fn logout(&mut self, sid: u32) {
        let Some(session) = self.sessions.remove(&sid) else { return };
        let disks: Vec<String> =
            self.disks.values().filter(|d| d.sid == sid).map(|d| d.hctl.clone()).collect();
        for hctl in disks {
            self.delete_disk(&hctl);
        }
        let (host, session_dir) = (session.host, session.dir());
        let host_dir = format!("devices/platform/host{host}");
        for link in [
            format!("class/iscsi_session/session{sid}"),
            format!("class/iscsi_connection/connection{sid}:0"),
            format!("class/iscsi_host/host{host}"),
            format!("class/scsi_host/host{host}"),
            format!("bus/scsi/devices/host{host}"),
            host_dir.clone(),
        ] {
            self.tree.remove(&link);
        }
        let conn = format!("{session_dir}/connection{sid}:0/iscsi_connection/connection{sid}:0");
        self.emit("remove", &conn, "iscsi_connection", &[]);
        let attrs = format!("{session_dir}/iscsi_session/session{sid}");
        self.emit("remove", &attrs, "iscsi_session", &[]);
        self.emit("remove", &format!("{host_dir}/scsi_host/host{host}"), "scsi_host", &[]);
        self.emit("remove", &host_dir, "scsi", &[("DEVTYPE", "scsi_host".into())]);
    }

    /// Makes sessions and paths follow the state of their portals. The kernel sends no event.
    pub(super) fn follow_portals(&mut self) {
        let states: Vec<(u32, bool)> = self
            .sessions
            .values()
            .map(|s| {
                let state = self.portal_state(&s.target, &s.portal);
                // A session that is up does not ask for leave again.
                (s.sid, !matches!(state, Some(PortalState::Alive | PortalState::Denied)))
            })
            .collect();
        for (sid, failed) in states {
            let Some(session) = self.sessions.get_mut(&sid) else { continue };
            if session.failed == failed {
                continue;
            }
            session.failed = failed;
            let dir = session.dir();
            let state = if failed { "FAILED" } else { "LOGGED_IN" };
            self.tree.put(&format!("{dir}/iscsi_session/session{sid}/state"), state);
            let conn = format!("{dir}/connection{sid}:0/iscsi_connection/connection{sid}:0");
            self.tree.put(&format!("{conn}/state"), if failed { "failed" } else { "up" });
            let hctls: Vec<String> =
                self.disks.values().filter(|d| d.sid == sid).map(|d| d.hctl.clone()).collect();
            for hctl in hctls {
                let state = if failed { "transport-offline" } else { "running" };
                if let Some(dir) = self.disk_dir(&hctl) {
                    self.tree.put(&format!("{dir}/state"), state);
                }
                if let Some(disk) = self.disks.get_mut(&hctl) {
                    disk.online = !failed;
                }
            }
        }
    }

    /// A write to an attribute.
    pub(super) fn write(&mut self, path: &str, value: &str) -> io::Result<()> {
        let errno = |code| Err(io::Error::from_raw_os_error(code));
        let real = self.tree.resolve(path)?;
        let (dir, name) = real.rsplit_once('/').unwrap_or(("", &real));
        let owner = dir.rsplit_once('/').map_or(dir, |(_, last)| last).to_owned();
        match name {
            "scan" => match owner.strip_prefix("host").and_then(|n| n.parse().ok()) {
                Some(host) => self.scan(host, value),
                None => errno(libc::EACCES),
            },
            "delete" | "rescan" if self.disks.contains_key(&owner) => {
                if name == "delete" {
                    self.delete_disk(&owner)
                } else {
                    self.rescan(&owner)
                }
                Ok(())
            }
            "recovery_tmo" | "state" | "timeout" => {
                self.tree.put(&real, value.trim());
                Ok(())
            }
            _ => errno(libc::EACCES),
        }
    }

    /// `C T LUN` with `-` for all: devices of LUNs that are new are made, known ones are left as
    /// they are even when the array has something else there by now.
    fn scan(&mut self, host: u32, value: &str) -> io::Result<()> {
        let fields: Vec<&str> = value.split_whitespace().collect();
        let wanted = |field: &str| -> io::Result<Option<u64>> {
            match field {
                "-" => Ok(None),
                number => {
                    number.parse().map(Some).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
                }
            }
        };
        let [channel, id, lun] = fields[..] else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let (channel, id, lun) = (wanted(channel)?, wanted(id)?, wanted(lun)?);
        if channel.is_some_and(|c| c != 0) || id.is_some_and(|t| t != 0) {
            return Ok(());
        }
        let Some(session) = self.sessions.values().find(|s| s.host == host).cloned() else {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        };
        if session.failed {
            return Ok(());
        }
        let Some(target) = self.targets.get(&session.target) else { return Ok(()) };
        let found: Vec<(u64, SimLun)> = target
            .luns
            .iter()
            .map(|(n, l)| (n.scsi(), l.clone()))
            .filter(|(n, _)| lun.is_none_or(|wanted| wanted == *n))
            .collect();
        for (scsi_lun, known) in found {
            if !self.disks.contains_key(&format!("{host}:0:0:{scsi_lun}")) {
                self.add_disk(&session, scsi_lun, known);
            }
        }
        self.multipathd_react();
        Ok(())
    }

    fn add_disk(&mut self, session: &Session, scsi_lun: u64, known: SimLun) {
        let used = |n: &u32| self.disks.values().any(|d| d.index == *n);
        let index = (0..).find(|n| !used(n)).unwrap_or(0);
        let disk = ScsiDev {
            hctl: format!("{}:0:0:{scsi_lun}", session.host),
            sid: session.sid,
            target: session.target.clone(),
            scsi_lun,
            index,
            name: sd_name(index),
            dev: sd_dev(index),
            known,
            online: true,
        };
        let diskseq = self.next_diskseq();
        let target_dir = format!("{}/target{}:0:0", session.dir(), session.host);
        if self.tree.resolve(&target_dir).is_err() {
            self.tree.mkdir(&target_dir);
            self.emit("add", &target_dir, "scsi", &[("DEVTYPE", "scsi_target".into())]);
        }
        self.disks.insert(disk.hctl.clone(), disk.clone());
        self.show_disk(&target_dir, &disk, diskseq);
        self.multipath.pending.push(disk.hctl);
    }

    fn show_disk(&mut self, target_dir: &str, disk: &ScsiDev, diskseq: u64) {
        let ScsiDev { hctl, name, dev, .. } = disk;
        let dir = format!("{target_dir}/{hctl}");
        let block = format!("{dir}/block/{name}");
        let tree = &mut self.tree;
        tree.put(&format!("{dir}/state"), "running");
        tree.put(&format!("{dir}/vendor"), "LIO-ORG ");
        tree.put(&format!("{dir}/model"), "simulated       ");
        tree.put(&format!("{dir}/rev"), "4.0 ");
        tree.put(&format!("{dir}/type"), 0);
        tree.put(&format!("{dir}/timeout"), 30);
        tree.put_unreadable(&format!("{dir}/delete"), libc::EIO);
        tree.put_unreadable(&format!("{dir}/rescan"), libc::EIO);
        let class = format!("{dir}/scsi_device/{hctl}");
        tree.link(&format!("{class}/device"), &dir);
        tree.link(&format!("class/scsi_device/{hctl}"), &class);
        tree.link(&format!("bus/scsi/devices/{hctl}"), &dir);
        tree.put(&format!("{block}/dev"), dev);
        tree.put(&format!("{block}/diskseq"), diskseq);
        tree.put(&format!("{block}/removable"), 0);
        tree.put(&format!("{block}/queue/logical_block_size"), 512);
        tree.link(&format!("{block}/device"), &dir);
        tree.mkdir(&format!("{block}/holders"));
        tree.mkdir(&format!("{block}/slaves"));
        for link in
            [format!("class/block/{name}"), format!("block/{name}"), format!("dev/block/{dev}")]
        {
            tree.link(&link, &block);
        }
        self.show_identity(&dir, disk);
        self.emit("add", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
        self.emit("add", &class, "scsi_device", &[]);
        self.emit("add", &block, "block", &block_properties(name, *dev, diskseq));
        self.emit("bind", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
    }

    /// Shows what INQUIRY and READ CAPACITY said when they were last asked.
    fn show_identity(&mut self, dir: &str, disk: &ScsiDev) {
        let port = self.sessions.get(&disk.sid).map_or(1, |s| match s.portal.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            std::net::IpAddr::V6(ip) => ip.octets()[15],
        });
        let wwid = disk.known.wwid.as_ref();
        match wwid {
            Some(wwid) => self.tree.put(&format!("{dir}/wwid"), wwid),
            // scsi_vpd_lun_id() finds no designator.
            None => self.tree.put_unreadable(&format!("{dir}/wwid"), libc::ENXIO),
        }
        self.tree.put_bytes(&format!("{dir}/vpd_pg83"), vpd_pg83(wwid, port));
        self.tree.put_bytes(&format!("{dir}/vpd_pg80"), vpd_pg80(wwid));
        let block = format!("{dir}/block/{}", disk.name);
        self.tree.put(&format!("{block}/size"), disk.known.size / 512);
        self.tree.put(&format!("{block}/ro"), u8::from(disk.known.read_only));
    }

    /// Reads VPD and size again. When the array no longer has the LUN, the old pages are kept (the
    /// kernel replaces them only by new ones) and the size becomes 0.
    fn rescan(&mut self, hctl: &str) {
        let Some(mut disk) = self.disks.get(hctl).cloned().filter(|d| d.online) else { return };
        let Some(dir) = self.disk_dir(hctl) else { return };
        let before = disk.known.size;
        match self.targets.get(&disk.target).and_then(|t| t.by_scsi(disk.scsi_lun)) {
            Some(now) => disk.known = now.clone(),
            None => disk.known.size = 0,
        }
        self.show_identity(&dir, &disk);
        if disk.known.size != before {
            let block = format!("{dir}/block/{}", disk.name);
            self.emit("change", &block, "block", &[("RESIZE", "1".into())]);
        }
        self.disks.insert(hctl.to_owned(), disk);
    }

    /// Removes a SCSI device, whoever uses it: the kernel asks nobody.
    pub(super) fn delete_disk(&mut self, hctl: &str) {
        let Some(dir) = self.disk_dir(hctl) else { return };
        let Some(disk) = self.disks.remove(hctl) else { return };
        let block = format!("{dir}/block/{}", disk.name);
        self.drop_path(disk.dev, &disk.name);
        for link in [
            format!("class/block/{}", disk.name),
            format!("block/{}", disk.name),
            format!("dev/block/{}", disk.dev),
            format!("class/scsi_device/{hctl}"),
            format!("bus/scsi/devices/{hctl}"),
            dir.clone(),
        ] {
            self.tree.remove(&link);
        }
        self.claims.remove(&disk.dev);
        self.opens.remove(&disk.dev);
        self.multipath.pending.retain(|p| p != hctl);
        self.emit("unbind", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
        self.emit("remove", &format!("{dir}/scsi_device/{hctl}"), "scsi_device", &[]);
        self.emit("remove", &block, "block", &block_properties(&disk.name, disk.dev, 0));
        self.emit("remove", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
        let target_dir = dir.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
        if self.tree.list(&target_dir).is_ok_and(|names| names.is_empty()) {
            self.tree.remove(&target_dir);
            self.emit("remove", &target_dir, "scsi", &[("DEVTYPE", "scsi_target".into())]);
        }
    }

    fn disk_dir(&self, hctl: &str) -> Option<String> {
        self.tree.resolve(&format!("bus/scsi/devices/{hctl}")).ok()
    }
}

/// The properties of a block device's event.
pub(super) fn block_properties(
    name: &str,
    dev: DevNum,
    diskseq: u64,
) -> Vec<(&'static str, String)> {
    vec![
        ("DEVTYPE", "disk".into()),
        ("DEVNAME", name.into()),
        ("MAJOR", dev.major.to_string()),
        ("MINOR", dev.minor.to_string()),
        ("DISKSEQ", diskseq.to_string()),
    ]
}

/// The kernel's name of the n-th SCSI disk: sda, ..., sdz, sdaa, ...
fn sd_name(index: u32) -> String {
    format!("sd{}", super::letters(index))
}

/// The kernel's number of the n-th SCSI disk (drivers/scsi/sd.c, sd_major and sd_probe).
fn sd_dev(index: u32) -> DevNum {
    let block = (index & 0xf0) >> 4;
    let major = match block {
        0 => 8,
        1..=7 => 65 + block - 1,
        _ => 128 + block - 8,
    };
    DevNum { major, minor: (index & 0xf) << 4 | (index & 0xf_ff00) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_and_numbered_as_the_kernel_does() {
        assert_eq!(["sda", "sdz", "sdaa", "sdba"].map(str::to_owned), [0, 25, 26, 52].map(sd_name));
        assert_eq!(sd_dev(0).to_string(), "8:0");
        assert_eq!(sd_dev(15).to_string(), "8:240");
        assert_eq!(sd_dev(16).to_string(), "65:0");
        assert_eq!(sd_dev(128).to_string(), "128:0");
        assert_eq!(sd_dev(256).to_string(), "8:256");
    }
}
