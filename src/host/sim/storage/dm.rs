//! Device-mapper devices, of which multipath maps are one kind.

use std::collections::BTreeSet;

use super::kernel::{World, block_properties};
use crate::types::DevNum;

/// device-mapper's major number here; it is dynamic on a real node.
const DM_MAJOR: u32 = 253;

/// One dm device.
#[derive(Debug, Clone)]
pub(super) struct Dm {
    pub(super) minor: u32,
    pub(super) name: String,
    pub(super) uuid: String,
    /// What it lies on.
    pub(super) slaves: Vec<DevNum>,
    /// Its table is `error`: all I/O fails.
    pub(super) error: bool,
    /// It queues I/O when it has no path.
    pub(super) queueing: bool,
}

impl Dm {
    pub(super) fn dev(&self) -> DevNum {
        dev_of(self.minor)
    }

    pub(super) fn kernel_name(&self) -> String {
        format!("dm-{}", self.minor)
    }

    fn dir(&self) -> String {
        format!("devices/virtual/block/dm-{}", self.minor)
    }
}

/// The number of the dm device with that minor.
pub(super) fn dev_of(minor: u32) -> DevNum {
    DevNum { major: DM_MAJOR, minor }
}

impl World {
    /// The dm device of that number.
    pub(super) fn dm_at(&self, dev: DevNum) -> Option<&Dm> {
        self.dm.get(dev.minor).filter(|_| dev.major == DM_MAJOR)
    }

    /// Makes a dm device on `slaves`; its number is the lowest that is free.
    pub(super) fn create_dm(&mut self, name: &str, uuid: &str, slaves: &[DevNum]) -> u32 {
        let minor = self.dm.minors.take();
        let diskseq = self.next_diskseq();
        let dm = Dm {
            minor,
            name: name.into(),
            uuid: uuid.into(),
            slaves: Vec::new(),
            error: false,
            queueing: false,
        };
        let (dir, kernel, dev) = (dm.dir(), dm.kernel_name(), dm.dev());
        let tree = &mut self.tree;
        tree.put(&format!("{dir}/dev"), dev);
        tree.put(&format!("{dir}/diskseq"), diskseq);
        tree.put(&format!("{dir}/size"), 0);
        tree.put(&format!("{dir}/ro"), 0);
        tree.put(&format!("{dir}/dm/name"), name);
        tree.put(&format!("{dir}/dm/uuid"), uuid);
        tree.put(&format!("{dir}/dm/suspended"), 0);
        tree.mkdir(&format!("{dir}/slaves"));
        tree.mkdir(&format!("{dir}/holders"));
        for link in
            [format!("class/block/{kernel}"), format!("block/{kernel}"), format!("dev/block/{dev}")]
        {
            tree.link(&link, &dir);
        }
        self.dm.insert(dm);
        self.emit("add", &dir, "block", &block_properties(&kernel, dev, diskseq));
        self.set_slaves(minor, slaves.to_vec());
        minor
    }

    /// Loads a table with other slaves and resumes. The first one gives the device its size, and keeps
    /// it: a table is reloaded with the size that it has ([`World::resize_dm`] is for another). It is
    /// for reading only when a slave is.
    pub(super) fn set_slaves(&mut self, minor: u32, slaves: Vec<DevNum>) {
        let Some(dm) = self.dm.get(minor) else { return };
        let (dir, kernel, dev) = (dm.dir(), dm.kernel_name(), dm.dev());
        for slave in self.dm.set_slaves(minor, slaves.clone()) {
            if let Some((name, block)) = self.block_dir(slave) {
                self.tree.remove(&format!("{dir}/slaves/{name}"));
                self.tree.remove(&format!("{block}/holders/{kernel}"));
            }
        }
        for (n, slave) in slaves.iter().enumerate() {
            let Some((name, block)) = self.block_dir(*slave) else { continue };
            self.tree.link(&format!("{dir}/slaves/{name}"), &block);
            self.tree.link(&format!("{block}/holders/{kernel}"), &dir);
            if n == 0 && self.tree.read(&format!("{dir}/size")).is_ok_and(|size| size == b"0\n") {
                self.take_size(&dir, &block);
            }
        }
        let protected = slaves.iter().any(|slave| {
            let ro = self.tree.read(&format!("dev/block/{slave}/ro"));
            ro.is_ok_and(|ro| ro == b"1\n")
        });
        self.tree.put(&format!("{dir}/ro"), u8::from(protected));
        self.emit("change", &dir, "block", &block_properties(&kernel, dev, 0));
    }

    /// Loads a table of the size that the first slave has now; `false` when there is none.
    pub(super) fn resize_dm(&mut self, minor: u32) -> bool {
        let Some(dm) = self.dm.get(minor) else { return false };
        let (dir, kernel, dev) = (dm.dir(), dm.kernel_name(), dm.dev());
        let Some((_, block)) = dm.slaves.first().and_then(|slave| self.block_dir(*slave)) else {
            return false;
        };
        self.take_size(&dir, &block);
        let resized = [block_properties(&kernel, dev, 0), vec![("RESIZE", "1".into())]].concat();
        self.emit("change", &dir, "block", &resized);
        true
    }

    fn take_size(&mut self, dir: &str, slave: &str) {
        if let Ok(size) = self.tree.read(&format!("{slave}/size")) {
            self.tree.put_bytes(&format!("{dir}/size"), size);
        }
    }

    /// Removes a dm device; `false` when somebody uses it.
    pub(super) fn remove_dm(&mut self, minor: u32) -> bool {
        let Some(dm) = self.dm.get(minor).cloned() else { return true };
        if !self.users(dm.dev()).is_empty() {
            return false;
        }
        self.set_slaves(minor, Vec::new());
        self.dm.remove(minor);
        let (dir, kernel, dev) = (dm.dir(), dm.kernel_name(), dm.dev());
        for path in [
            format!("class/block/{kernel}"),
            format!("block/{kernel}"),
            format!("dev/block/{dev}"),
            dir.clone(),
        ] {
            self.tree.remove(&path);
        }
        self.emit("remove", &dir, "block", &block_properties(&kernel, dev, 0));
        true
    }

    /// Takes a device that goes away out of whatever lies on it. A map stays, even without paths.
    pub(super) fn drop_path(&mut self, dev: DevNum, name: &str) {
        let above: Vec<(u32, Vec<DevNum>)> = self
            .dm
            .above(dev)
            .map(|d| (d.minor, d.slaves.iter().copied().filter(|s| *s != dev).collect()))
            .collect();
        for (minor, slaves) in above {
            self.set_slaves(minor, slaves);
            self.tree.remove(&format!("devices/virtual/block/dm-{minor}/slaves/{name}"));
        }
    }

    /// Everybody who uses a device: claims, opens, and dm devices on top of it.
    pub(super) fn users(&self, dev: DevNum) -> Vec<String> {
        let placed = [&self.claims, &self.opens];
        let stacked = self.dm.above(dev).map(|d| d.name.clone());
        placed.into_iter().filter_map(|m| m.get(&dev)).flatten().cloned().chain(stacked).collect()
    }

    /// Whether an exclusive open would find it busy.
    pub(super) fn claimed(&self, dev: DevNum) -> bool {
        self.claims.get(&dev).is_some_and(|c| !c.is_empty()) || self.dm.above(dev).next().is_some()
    }

    /// The paths of a map to which I/O fails: in here each is tried all the time.
    pub(super) fn failed_paths(&self, map: DevNum) -> BTreeSet<DevNum> {
        let map = self.dm_at(map).filter(|dm| dm.uuid.starts_with("mpath-") && !dm.error);
        let slaves = map.map(|dm| dm.slaves.clone()).unwrap_or_default();
        slaves.into_iter().filter(|slave| self.io_works(*slave) != Some(true)).collect()
    }

    /// Whether I/O to it can succeed; `None` when there is no such device.
    pub(super) fn io_works(&self, dev: DevNum) -> Option<bool> {
        if let Some(disk) = self.disks.by_dev(dev) {
            let dir = self.disk_dir(&disk.hctl)?;
            if self.is_offline(&dir) {
                return None;
            }
            let there = self.targets.get(&disk.target).and_then(|t| t.by_scsi(disk.scsi_lun));
            return Some(disk.online && there.is_some());
        }
        if self.has_local(dev) {
            return Some(true);
        }
        let dm = self.dm_at(dev)?;
        Some(!dm.error && dm.slaves.iter().any(|s| self.io_works(*s) == Some(true)))
    }

    /// Whether a disk was set offline by hand: it cannot be opened (ENXIO), and who has it open gets
    /// errors.
    pub(super) fn is_offline(&self, dir: &str) -> bool {
        self.tree.read(&format!("{dir}/state")).is_ok_and(|state| state.trim_ascii() == b"offline")
    }

    /// A device's kernel name and its directory below /sys.
    fn block_dir(&self, dev: DevNum) -> Option<(String, String)> {
        let dir = self.tree.resolve(&format!("dev/block/{dev}")).ok()?;
        let name = dir.rsplit_once('/')?.1.to_owned();
        Some((name, dir))
    }
}
