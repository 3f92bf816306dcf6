//! The simulated SAN and the node's view of it: arrays, iSCSI sessions, SCSI devices in sysfs,
//! uevents, iscsiadm, multipathd and /run/lunplug.
//!
//! It behaves as the kernel and the tools do where that matters to whoever attaches LUNs: names
//! and numbers are given out again, a scan does not look anew at a LUN it knows, a LUN taken away
//! at the array leaves its device behind, a delete asks nobody, a map outlives its paths.
//!
//! ```text
//!   array: target -> portals, LUNs          tests: add_lun, replace_lun, set_portal, hold, ...
//!        | login, scan, rescan
//!   kernel: sessions, disks, dm -> sysfs tree, uevents
//!        | add / remove
//!   multipathd: maps, wwids, bindings       iscsiadm: records
//! ```
//!
//! Points where [`Faults`] act, with the detail that a fault is matched against:
//! `sysfs.read`, `sysfs.list`, `sysfs.resolve`, `sysfs.write` (path); `cmd.run` (program and
//! arguments, joined by spaces; `exit N` as the text of a failure lets the program run and end with
//! that code); `iscsid` (`login` or `logout`, once iscsiadm has read the records); `multipathd.ask` (command), `multipathd.forget` (WWID); `blocks.flush`,
//! `blocks.exclusive`, `blocks.openers` (major:minor); `rundir.lock`, `rundir.load`,
//! `rundir.store`, `rundir.remove`, `rundir.list` (name); `iscsidb.records`, `iscsidb.remove`
//! (IQN), `iscsidb.chap` (IQN), `iscsidb.discovery` (portal), `iscsidb.lock`; `secrets.read` (name);
//! `resolver.resolve` (host:port); `local.block` (path). Writes to sysfs, flushes, logins and logouts that stall are carried out late
//! even though their caller has given up, as the kernel and iscsid do; other programs are ended at
//! their deadline.

mod array;
mod disks;
mod dm;
mod doors;
mod fc;
mod indexed;
mod iscsiadm;
mod iscsidb;
mod kernel;
mod local;
mod multipathd;
mod rundir;
#[cfg(test)]
mod tests;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use array::{PortalState, SimLun};
pub use fc::Appears;
use kernel::World;
pub use local::SimBlock;
pub use multipathd::FindMultipaths;
use rundir::{RunState, SimRunDir};

use crate::doctor::Service;
use crate::host::cmd::Tool;
use crate::host::lock::RunDir;
use crate::host::place::PlaceError;
use crate::host::sim::{Faults, SimFiles};
use crate::types::{Chap, DevNum, IfaceName, Iqn, Lun, Portal, SecretName, SecretText, Wwid};

/// Enough for the events of hundreds of disks at once; a slower reader is told that it lost some.
const EVENT_BUFFER: usize = 16 * 1024;

/// The simulated storage of one node. Clones share it.
#[derive(Clone)]
pub struct SimStorage {
    inner: Arc<Inner>,
}

struct Inner {
    faults: Arc<Faults>,
    files: SimFiles,
    world: Mutex<World>,
    run: Mutex<Arc<Mutex<RunState>>>,
    started: AtomicU64,
    missing_tools: Mutex<BTreeSet<Tool>>,
    iscsid_gone: AtomicBool,
    login_time: Mutex<Duration>,
    secrets: Mutex<BTreeMap<SecretName, BTreeMap<String, SecretText>>>,
    hosts: Mutex<BTreeMap<String, IpAddr>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A test that panicked leaves a model that the others can still look at.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// a, ..., z, aa, ...: how the kernel counts disks and multipath its maps.
fn letters(index: u32) -> String {
    let mut name = Vec::new();
    let mut rest = index + 1;
    while rest > 0 {
        rest -= 1;
        name.push(char::from(b'a' + u8::try_from(rest % 26).unwrap_or(0)));
        rest /= 26;
    }
    name.iter().rev().collect()
}

impl SimStorage {
    /// A node without targets, records or sessions, on which multipathd runs.
    pub fn new(faults: Arc<Faults>) -> Self {
        let (events, _) = tokio::sync::broadcast::channel(EVENT_BUFFER);
        Self {
            inner: Arc::new(Inner {
                faults,
                files: SimFiles::default(),
                world: Mutex::new(World::new(events)),
                run: Mutex::default(),
                started: AtomicU64::new(0),
                missing_tools: Mutex::default(),
                iscsid_gone: AtomicBool::default(),
                login_time: Mutex::new(Duration::from_secs(15)),
                secrets: Mutex::default(),
                hosts: Mutex::default(),
            }),
        }
    }

    /// The faults in force at its doors.
    pub fn faults(&self) -> &Arc<Faults> {
        &self.inner.faults
    }

    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.inner.world)
    }

    fn login_time(&self) -> Duration {
        *lock(&self.inner.login_time)
    }

    /// How long iscsiadm waits for a portal that does not answer; 15 s unless set.
    pub fn set_login_time(&self, time: Duration) {
        *lock(&self.inner.login_time) = time;
    }

    /// Takes a program away, or gives it back.
    pub fn set_tool_missing(&self, tool: Tool, missing: bool) {
        let mut tools = lock(&self.inner.missing_tools);
        if missing {
            tools.insert(tool);
        } else {
            tools.remove(&tool);
        }
    }

    /// The run directory's door of this boot.
    pub fn rundir(&self) -> Arc<dyn RunDir> {
        Arc::new(SimRunDir {
            faults: self.inner.faults.clone(),
            state: lock(&self.inner.run).clone(),
            boot_id: format!("00000000-0000-4000-8000-{:012}", self.world().boot),
        })
    }

    /// Restarts the node: sessions, devices and the run directory are gone; records, wwids and
    /// bindings stay. Doors to the run directory taken before are of the old boot.
    pub fn reboot(&self) {
        self.world().reboot();
        *lock(&self.inner.run) = Arc::default();
    }

    /// The files that are on the host.
    pub fn files(&self) -> &SimFiles {
        &self.inner.files
    }

    /// Has a target demand CHAP, and prove itself by `back` where there is one; or lets anybody in.
    pub fn set_chap(&self, target: &Iqn, chap: Option<Chap>) {
        self.world().targets.entry(target.clone()).or_default().chap = chap;
    }

    /// Lets only these initiators log in at a target; any, when there are none.
    pub fn set_initiators(&self, target: &Iqn, initiators: &[Iqn]) {
        let mut world = self.world();
        let entry = world.targets.entry(target.clone()).or_default();
        entry.initiators = initiators.iter().cloned().collect();
    }

    /// Somebody's iface record, with the node's initiator name.
    pub fn add_iface(&self, name: &IfaceName) {
        self.world().ifaces.insert(name.clone(), None);
    }

    /// Has the portals demand CHAP of who asks for their targets.
    pub fn set_discovery_chap(&self, chap: Option<Chap>) {
        self.world().discovery_chap = chap;
    }

    /// Somebody else's discovery record.
    pub fn add_discovery(&self, portal: Portal) {
        self.world().discoveries.insert(portal, None);
    }

    /// Puts a secret into the configured directory, or takes it away.
    pub fn set_secret(&self, name: &SecretName, values: Option<&[(&str, &str)]>) {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned().into());
        let mut secrets = lock(&self.inner.secrets);
        match values {
            Some(values) => drop(secrets.insert(name.clone(), values.iter().map(own).collect())),
            None => drop(secrets.remove(name)),
        }
    }

    /// Gives a host's name an address, or another one.
    pub fn set_host(&self, name: &str, ip: IpAddr) {
        lock(&self.inner.hosts).insert(name.to_owned(), ip);
    }

    /// Adds a target with its portals, all alive; known portals keep their state.
    pub fn add_target(&self, target: &Iqn, portals: &[Portal]) {
        let mut world = self.world();
        let entry = world.targets.entry(target.clone()).or_default();
        for portal in portals {
            entry.portals.entry(*portal).or_insert(PortalState::Alive);
        }
    }

    /// Maps a LUN to us, or another one at the same number. Nothing on the node notices until it
    /// scans, or rescans the device that it has.
    pub fn add_lun(&self, target: &Iqn, lun: Lun, what: SimLun) {
        self.world().targets.entry(target.clone()).or_default().luns.insert(lun, what);
    }

    /// Exports a LUN of `target` by `by` too, under another number perhaps: what is changed of it later is
    /// changed for one of them alone.
    pub fn export_lun(&self, target: &Iqn, lun: Lun, by: &Iqn, number: Lun) {
        let mut world = self.world();
        let what = world.targets.get(target).and_then(|t| t.luns.get(&lun)).cloned();
        if let Some(what) = what {
            world.targets.entry(by.clone()).or_default().luns.insert(number, what);
        }
    }

    /// Another LUN at the same number: see [`SimStorage::add_lun`].
    pub fn replace_lun(&self, target: &Iqn, lun: Lun, what: SimLun) {
        let mut world = self.world();
        let entry = world.targets.entry(target.clone()).or_default();
        entry.luns.insert(lun, what);
        entry.data.remove(&lun);
    }

    /// Unmaps a LUN at the array; its devices stay behind on the node.
    pub fn remove_lun(&self, target: &Iqn, lun: Lun) {
        if let Some(entry) = self.world().targets.get_mut(target) {
            entry.luns.remove(&lun);
        }
    }

    /// Lets a portal answer differently, for all targets behind it; sessions through it follow.
    pub fn set_portal(&self, portal: Portal, state: PortalState) {
        let mut world = self.world();
        for target in world.targets.values_mut() {
            if let Some(entry) = target.portals.get_mut(&portal) {
                *entry = state;
            }
        }
        world.follow_portals();
    }

    /// The container that iscsid ran in has ended, its database with it; or is back.
    pub fn set_iscsid_gone(&self, gone: bool) {
        self.inner.iscsid_gone.store(gone, Ordering::Relaxed);
    }

    /// Why open-iscsi cannot be used, if that is so.
    fn iscsid_place(&self) -> Result<(), PlaceError> {
        match self.inner.iscsid_gone.load(Ordering::Relaxed) {
            true => Err(PlaceError::Gone { service: Service::Iscsid, pid: 7 }),
            false => Ok(()),
        }
    }

    /// Another iscsid serves from now on, with a database of its own that has no record.
    pub fn replace_iscsid(&self) {
        self.world().records.clear();
    }

    /// Somebody else's node record, as a discovery makes it: with the tag of the portal's group.
    pub fn add_record(&self, target: &Iqn, portal: Portal, iface: &str) {
        self.put_record(target, portal, iface, Some(1));
    }

    /// The same as made by hand without one.
    pub fn add_untagged_record(&self, target: &Iqn, portal: Portal, iface: &str) {
        self.put_record(target, portal, iface, None);
    }

    fn put_record(&self, target: &Iqn, portal: Portal, iface: &str, group: Option<u16>) {
        let key = (target.clone(), portal, iface.to_owned());
        let record = iscsiadm::NodeRecord { group, ..iscsiadm::default_record(&key) };
        self.world().records.insert(key, record);
    }

    /// Empties a record's file, as a crash of iscsiadm does; makes it if need be.
    pub fn corrupt_record(&self, target: &Iqn, portal: Portal, iface: &str) {
        let key = (target.clone(), portal, iface.to_owned());
        self.world().records.entry(key).or_default().corrupt = true;
    }

    /// Locks open-iscsi's database, as one of these processes would; with none of them it is the
    /// lock of an iscsiadm that was killed.
    pub fn lock_records(&self, by: &[&str]) {
        self.world().db_lock = Some(by.iter().map(|b| (*b).to_owned()).collect());
    }

    /// Ends the lock, as its holder would.
    pub fn unlock_records(&self) {
        self.world().db_lock = None;
    }

    /// A setting of a node record.
    pub fn record_setting(&self, target: &Iqn, portal: Portal, name: &str) -> Option<String> {
        let key = (target.clone(), portal, "default".to_owned());
        self.world().records.get(&key)?.settings.get(name).cloned()
    }

    /// Somebody else's session; its number.
    pub fn add_session(&self, target: &Iqn, portal: Portal, iface: &str) -> u32 {
        self.world().login(target, portal, iface)
    }

    /// Somebody deletes the SCSI devices that a target has through a portal.
    pub fn delete_path(&self, target: &Iqn, portal: Portal) {
        let mut world = self.world();
        let through = |d: &&disks::ScsiDev| {
            world.sessions.get(&d.sid).is_some_and(|s| s.target == *target && s.portal == portal)
        };
        let hctls: Vec<_> = world.disks.values().filter(through).map(|d| d.hctl.clone()).collect();
        hctls.iter().for_each(|hctl| world.delete_disk(hctl));
    }

    /// Somebody logs out of a target at a portal.
    pub fn end_session(&self, target: &Iqn, portal: Portal) {
        let mut world = self.world();
        let mut sessions = world.sessions.values();
        let session = sessions.find(|s| s.target == *target && s.portal == portal);
        if let Some(sid) = session.map(|s| s.sid) {
            world.logout(sid);
        }
    }

    /// Starts or stops multipathd. Maps stay; disks that appear meanwhile wait for it.
    pub fn set_multipathd(&self, running: bool) {
        let mut world = self.world();
        world.multipath.running = running;
        world.multipathd_react();
    }

    /// multipath.conf: of which disks maps are made, and whether these have aliases.
    pub fn set_multipath_conf(&self, find_multipaths: FindMultipaths, friendly_names: bool) {
        let mut world = self.world();
        world.multipath.find_multipaths = find_multipaths;
        world.multipath.friendly_names = friendly_names;
    }

    /// Whether multipathd handles new disks at once (the default), or when
    /// [`SimStorage::settle_multipathd`] or a command tells it to.
    pub fn set_multipathd_auto(&self, auto: bool) {
        let mut world = self.world();
        world.multipath.auto = auto;
        world.multipathd_react();
    }

    /// Has multipathd come to a disk only in the moment in which that is deleted: it makes a map, and
    /// `takes_off` what it has made, or leaves it.
    pub fn set_multipathd_late(&self, takes_off: bool) {
        self.world().multipath.late = Some(takes_off);
    }

    /// So many times multipathd refuses a path that it is told of, for udev has not read its identity
    /// yet.
    pub fn set_udev_behind(&self, refusals: u32) {
        self.world().multipath.unread = refusals;
    }

    /// Whether multipathd answers `delayed` to removals. When it no longer does, it carries out those
    /// that it has put off.
    pub fn set_multipathd_delays(&self, delays: bool) {
        let mut world = self.world();
        world.multipath.delays = delays;
        if !delays {
            for command in std::mem::take(&mut world.multipath.delayed) {
                world.multipathd_command(&command);
            }
        }
    }

    /// Lets multipathd handle the disks that wait for it.
    pub fn settle_multipathd(&self) {
        self.world().multipathd_settle();
    }

    /// Claims a device exclusively, as a mount does. An exclusive open finds it busy and its map
    /// cannot be removed.
    pub fn hold(&self, dev: DevNum, by: &str) {
        self.world().claims.entry(dev).or_default().push(by.to_owned());
    }

    /// Opens a device without claiming it, as QEMU does, `by` in the form `command[pid]`.
    pub fn open(&self, dev: DevNum, by: &str) {
        self.world().opens.entry(dev).or_default().push(by.to_owned());
    }

    /// Ends all claims and opens of a device.
    pub fn release(&self, dev: DevNum) {
        let mut world = self.world();
        world.claims.remove(&dev);
        world.opens.remove(&dev);
    }

    /// Puts a dm device on top of another, as LVM does; it shows in `holders/`.
    pub fn stack_dm(&self, on: DevNum, name: &str, uuid: &str) -> DevNum {
        let mut world = self.world();
        let minor = world.create_dm(name, uuid, &[on]);
        dm::dev_of(minor)
    }

    /// Removes such a device; `false` when it is in use.
    pub fn unstack_dm(&self, dev: DevNum) -> bool {
        self.world().remove_dm(dev.minor)
    }

    /// Which LUN a device is, as the array has it now: what a guest that has it reaches.
    pub fn lun_of(&self, dev: DevNum) -> Option<(Iqn, Lun)> {
        let world = self.world();
        let slave = world.dm_at(dev).map(|d| d.slaves.first().copied());
        let path = slave.unwrap_or(Some(dev))?;
        let disk = world.disks.by_dev(path)?;
        let luns = &world.targets.get(&disk.target)?.luns;
        let lun = luns.keys().find(|lun| lun.scsi() == disk.scsi_lun)?;
        Some((disk.target.clone(), *lun))
    }

    /// How many bytes the kernel gives a device.
    pub fn size_of(&self, dev: DevNum) -> Option<u64> {
        let sectors = self.world().tree.read(&format!("dev/block/{dev}/size")).ok()?;
        String::from_utf8(sectors).ok()?.trim().parse::<u64>().ok()?.checked_mul(512)
    }

    /// The identity of a map or a disk as udev has it.
    pub fn identity_of(&self, dev: DevNum) -> Option<String> {
        let read = |file: &str| {
            let text = self.world().tree.read(&format!("dev/block/{dev}/{file}")).ok()?;
            Some(String::from_utf8(text).ok()?.trim().to_owned())
        };
        if let Some(uuid) = read("dm/uuid") {
            return uuid.strip_prefix("mpath-").map(str::to_owned);
        }
        Some(read("device/wwid")?.parse::<Wwid>().ok()?.multipath())
    }

    /// The array gives a LUN another size. Nothing on the node notices until it rescans the device
    /// that it has, unless the array announces it ([`SimStorage::announce_size`]).
    pub fn resize_lun(&self, target: &Iqn, lun: Lun, size: u64) {
        self.change_lun(target, lun, |known| known.size = size);
    }

    /// The array lets a LUN be written to, or not any more; noticed as another size is.
    pub fn protect_lun(&self, target: &Iqn, lun: Lun, read_only: bool) {
        self.change_lun(target, lun, |known| known.read_only = read_only);
    }

    fn change_lun(&self, target: &Iqn, lun: Lun, change: impl FnOnce(&mut SimLun)) {
        let mut world = self.world();
        let known = world.targets.get_mut(target).and_then(|t| t.luns.get_mut(&lun));
        if let Some(known) = known {
            change(known);
        }
    }

    /// The array tells by a unit attention that a LUN's capacity has changed, on each path that works:
    /// the kernel hands that on, and reads nothing anew.
    pub fn announce_size(&self, target: &Iqn, lun: Lun) {
        let world = self.world();
        let of_it = |d: &&disks::ScsiDev| d.target == *target && d.scsi_lun == lun.scsi();
        for disk in world.disks.values().filter(of_it).filter(|d| d.online) {
            if let Some(dir) = world.disk_dir(&disk.hctl) {
                let said = ("SDEV_UA", "CAPACITY_DATA_HAS_CHANGED".to_owned());
                let kind = ("DEVTYPE", "scsi_device".to_owned());
                world.emit("change", &dir, "scsi", &[kind, said]);
            }
        }
    }

    /// One path of a LUN is read anew, as by somebody else.
    pub fn rescan_path(&self, target: &Iqn, lun: Lun, portal: Portal) {
        let mut world = self.world();
        let of_it = |d: &&disks::ScsiDev| {
            let through = world.sessions.get(&d.sid).is_some_and(|s| s.portal == portal);
            through && d.target == *target && d.scsi_lun == lun.scsi()
        };
        let hctl = world.disks.values().find(of_it).map(|d| d.hctl.clone());
        if let Some(hctl) = hctl {
            world.rescan(&hctl);
        }
    }

    /// Writes a LUN's first bytes.
    pub fn write_data(&self, target: &Iqn, lun: Lun, bytes: &[u8]) {
        if let Some(entry) = self.world().targets.get_mut(target) {
            entry.data.insert(lun, bytes.to_vec());
        }
    }

    /// A LUN's first bytes, as they were written.
    pub fn data(&self, target: &Iqn, lun: Lun) -> Vec<u8> {
        let world = self.world();
        world.targets.get(target).and_then(|t| t.data.get(&lun)).cloned().unwrap_or_default()
    }

    /// A picture of all that an attach makes on the node, to compare with one taken before:
    /// sessions, records, disks, maps, multipath's files, run files. Counters are left out.
    pub fn snapshot(&self) -> String {
        let world = self.world();
        let mut lines = Vec::new();
        let mut line = |kind: &str, what: String| lines.push(format!("{kind} {what}\n"));
        for s in world.sessions.values() {
            let state = if s.failed { "FAILED" } else { "LOGGED_IN" };
            line("session", format!("{} {} {} {state}", s.target, s.portal, s.iface));
        }
        for ((target, portal, iface), record) in &world.records {
            let corrupt = if record.corrupt { " corrupt" } else { "" };
            let group = record.group.map_or(String::new(), |tag| format!(" group {tag}"));
            line("record", format!("{target} {portal} {iface}{group}{corrupt}"));
        }
        for (name, initiator) in &world.ifaces {
            let initiator = initiator.as_ref().map_or("-", |i| i.as_str());
            line("iface", format!("{name} {initiator}"));
        }
        for (portal, ours) in &world.discoveries {
            let whose = if ours.is_some() { "lunplug" } else { "somebody" };
            line("discovery", format!("{portal} {whose}"));
        }
        let fc = world.fc_lines();
        if world.db_lock.is_some() {
            line("lock", "of the records".into());
        }
        for d in world.disks.values() {
            let wwid = d.known.wwid.as_ref().map_or("-", |w| w.as_str());
            line("disk", format!("{} {} {wwid} {}", d.hctl, d.name, d.known.size));
        }
        for d in world.dm.values() {
            let error = if d.error { " error" } else { "" };
            let slaves: Vec<String> = d.slaves.iter().map(DevNum::to_string).collect();
            line(
                "dm",
                format!("{} {} {} [{}]{error}", d.kernel_name(), d.name, d.uuid, slaves.join(" ")),
            );
        }
        for wwid in &world.multipath.wwids {
            line("wwid", wwid.clone());
        }
        for (alias, wwid) in &world.multipath.bindings {
            line("binding", format!("{alias} {wwid}"));
        }
        let run = lock(&self.inner.run).clone();
        for (name, bytes) in lock(&run).files() {
            line("run", format!("{name} {}", String::from_utf8_lossy(bytes)));
        }
        lines.extend(fc);
        // Not in the order of their making, which may differ where the result does not.
        lines.sort();
        lines.concat()
    }
}
