//! The node's kernel: iSCSI sessions, SCSI devices, sysfs and uevents.

use std::collections::BTreeMap;
use std::io;

use nix::libc;
use tokio::sync::broadcast;

use super::array::{PortalState, SimTarget};
use super::disks::Behind;
use super::fc::{RemotePort, SimHba};
use super::indexed::{Disks, Maps};
use super::iscsiadm::Records;
use super::local::LocalModel;
use super::multipathd::MultipathModel;
use super::tree::Tree;
use crate::host::uevent::{Notice, Uevent};
use crate::types::{Chap, DevNum, IfaceName, Iqn, Portal};

/// The first host number that iSCSI gets: a node has others.
const FIRST_HOST: u32 = 2;

/// The node's initiator name.
const NODE_NAME: &str = "iqn.2026-01.example.sim:node";

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
    /// What LUNs are scanned by it.
    pub(super) fn behind(&self) -> Behind {
        let (sid, host, target) = (self.sid, self.host, self.target.clone());
        Behind { sid, host, id: 0, dir: self.dir(), target, fc: None }
    }

    /// The session's directory below /sys.
    pub(super) fn dir(&self) -> String {
        format!("devices/platform/host{}/session{}", self.host, self.sid)
    }
}

/// The node and the arrays it reaches.
#[derive(Debug)]
pub(super) struct World {
    pub(super) tree: Tree,
    pub(super) events: broadcast::Sender<Notice>,
    pub(super) targets: BTreeMap<Iqn, SimTarget>,
    pub(super) records: Records,
    /// Iface records, with the initiator name of those that have one of their own.
    pub(super) ifaces: BTreeMap<IfaceName, Option<Iqn>>,
    /// Discovery records, with the credentials of those that are lunplug's.
    pub(super) discoveries: BTreeMap<Portal, Option<Chap>>,
    /// What the portals demand of who asks for their targets.
    pub(super) discovery_chap: Option<Chap>,
    /// The database's lock, with the processes that may hold it: none when they are dead.
    pub(super) db_lock: Option<Vec<String>>,
    pub(super) sessions: BTreeMap<u32, Session>,
    pub(super) hbas: Vec<SimHba>,
    pub(super) rports: Vec<RemotePort>,
    /// The kernel scans remote ports that log in by itself.
    pub(super) fc_scans: bool,
    /// How many LIPs were issued.
    pub(super) lips: u32,
    /// What is on the host already.
    pub(super) local: LocalModel,
    pub(super) disks: Disks,
    pub(super) dm: Maps,
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
            ifaces: BTreeMap::new(),
            discoveries: BTreeMap::new(),
            discovery_chap: None,
            db_lock: None,
            sessions: BTreeMap::new(),
            hbas: Vec::new(),
            rports: Vec::new(),
            fc_scans: true,
            lips: 0,
            local: LocalModel::default(),
            disks: Disks::default(),
            dm: Maps::default(),
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
        self.disks = Disks::default();
        self.dm = Maps::default();
        self.claims.clear();
        self.opens.clear();
        self.db_lock = None;
        self.multipath.pending.clear();
        (self.last_sid, self.last_diskseq) = (0, 0);
        self.boot_tree();
        self.boot_hbas();
        self.boot_local();
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
            "class/fc_host",
            "class/fc_remote_ports",
            "class/fc_transport",
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
        let _ = self.events.send(Notice::Event(event.into()));
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

    /// Whether there is that iface record; two are built in.
    pub(super) fn knows_iface(&self, name: &str) -> bool {
        ["default", "iser"].contains(&name) || self.ifaces.keys().any(|i| i.as_str() == name)
    }

    /// The initiator name that goes with an iface record: its own, or the node's.
    pub(super) fn initiator(&self, iface: &str) -> String {
        let own = iface.parse().ok().and_then(|name: IfaceName| self.ifaces.get(&name)?.clone());
        own.map_or_else(|| NODE_NAME.to_owned(), |own| own.to_string())
    }

    /// Makes a session on a host of its own, logged in.
    pub(super) fn login(&mut self, target: &Iqn, portal: Portal, iface: &str) -> u32 {
        let (host, sid) = (self.free_host(), self.next_sid());
        let session = Session {
            sid,
            host,
            target: target.clone(),
            portal,
            iface: iface.into(),
            failed: false,
        };
        self.show_session(&session);
        self.sessions.insert(sid, session);
        sid
    }

    /// A host number that nobody has.
    pub(super) fn free_host(&self) -> u32 {
        let used = |n: &u32| self.sessions.values().any(|s| s.host == *n) || self.is_hba(*n);
        (FIRST_HOST..).find(|n| !used(n)).unwrap_or(FIRST_HOST)
    }

    /// The next number of a session or remote port.
    pub(super) fn next_sid(&mut self) -> u32 {
        self.last_sid += 1;
        self.last_sid
    }

    fn show_session(&mut self, session: &Session) {
        let Session { sid, host, target, portal, iface, .. } = session;
        let initiator = self.initiator(iface);
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
        tree.put(&format!("{iscsi_host}/initiatorname"), &initiator);
        tree.put(&format!("{iscsi_host}/netdev"), "default");
        tree.link(&format!("{iscsi_host}/device"), &host_dir);
        tree.link(&format!("class/iscsi_host/host{host}"), &iscsi_host);

        let session_dir = session.dir();
        let attrs = format!("{session_dir}/iscsi_session/session{sid}");
        tree.put(&format!("{attrs}/targetname"), target);
        tree.put(&format!("{attrs}/ifacename"), iface);
        tree.put(&format!("{attrs}/initiatorname"), &initiator);
        tree.put(&format!("{attrs}/state"), "LOGGED_IN");
        tree.put(&format!("{attrs}/recovery_tmo"), 120);
        tree.put(&format!("{attrs}/tgt_reset_tmo"), 30);
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

    pub(super) fn set_session_attribute(&mut self, sid: u32, name: &str, value: &str) {
        if let Some(session) = self.sessions.get(&sid) {
            let attribute = format!("{}/iscsi_session/session{sid}/{name}", session.dir());
            self.tree.put(&attribute, value);
        }
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
                if let Some(dir) = self.disk_dir(&hctl)
                    && !self.is_offline(&dir)
                {
                    self.tree.put(&format!("{dir}/state"), state);
                }
                self.disks.set_online(&hctl, !failed);
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
            "uevent" if dir.contains("/block/") => {
                self.emit(value.trim(), dir, "block", &[("SYNTH_UUID", "0".into())]);
                Ok(())
            }
            "issue_lip" => match owner.strip_prefix("host").and_then(|n| n.parse().ok()) {
                Some(host) => self.issue_lip(host),
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
            // Nothing else can be ordered, and the line's end must be there (store_state_field,
            // drivers/scsi/scsi_sysfs.c).
            "state"
                if self.disks.contains_key(&owner)
                    && !["running\n", "offline\n"].contains(&value) =>
            {
                errno(libc::EINVAL)
            }
            "recovery_tmo" | "state" | "timeout" => {
                self.tree.put(&real, value.trim());
                Ok(())
            }
            _ => errno(libc::EACCES),
        }
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
