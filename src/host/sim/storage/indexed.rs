//! The disks and dm devices of the simulated kernel, with what each is looked for by: a node may have
//! tens of thousands.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::disks::ScsiDev;
use super::dm::Dm;
use crate::types::{DevNum, Wwid};

/// Numbers of which the lowest that is free is given out, as the kernel does.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// Given back, and lower than `next`.
    free: BTreeSet<u32>,
    next: u32,
}

impl Numbers {
    pub(super) fn take(&mut self) -> u32 {
        self.free.pop_first().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    pub(super) fn give_back(&mut self, number: u32) {
        self.free.insert(number);
    }
}

/// SCSI disks by address.
#[derive(Debug, Default)]
pub(super) struct Disks {
    all: BTreeMap<String, ScsiDev>,
    by_dev: HashMap<DevNum, String>,
    by_name: HashMap<String, String>,
    /// By WWID as multipath writes it.
    by_wwid: HashMap<String, BTreeSet<String>>,
    pub(super) indexes: Numbers,
}

/// A disk's WWID as multipath writes it.
fn wwid_of(disk: &ScsiDev) -> Option<String> {
    disk.known.wwid.as_ref().map(Wwid::multipath)
}

impl Disks {
    pub(super) fn get(&self, hctl: &str) -> Option<&ScsiDev> {
        self.all.get(hctl)
    }

    pub(super) fn contains_key(&self, hctl: &str) -> bool {
        self.all.contains_key(hctl)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &ScsiDev> {
        self.all.values()
    }

    pub(super) fn by_dev(&self, dev: DevNum) -> Option<&ScsiDev> {
        self.by_dev.get(&dev).and_then(|hctl| self.get(hctl))
    }

    /// By its kernel name, or its number in words.
    pub(super) fn by_name(&self, name: &str) -> Option<&ScsiDev> {
        match self.by_name.get(name) {
            Some(hctl) => self.get(hctl),
            None => self.by_dev(name.parse().ok()?),
        }
    }

    /// Those of a WWID as multipath writes it, in the order of their addresses.
    pub(super) fn of_wwid(&self, wwid: &str) -> impl Iterator<Item = &ScsiDev> {
        self.by_wwid.get(wwid).into_iter().flatten().filter_map(|hctl| self.get(hctl))
    }

    /// A new disk, or what is known of one by now.
    pub(super) fn insert(&mut self, disk: ScsiDev) {
        self.unlink(&disk.hctl);
        self.by_dev.insert(disk.dev, disk.hctl.clone());
        self.by_name.insert(disk.name.clone(), disk.hctl.clone());
        if let Some(wwid) = wwid_of(&disk) {
            self.by_wwid.entry(wwid).or_default().insert(disk.hctl.clone());
        }
        self.all.insert(disk.hctl.clone(), disk);
    }

    pub(super) fn remove(&mut self, hctl: &str) -> Option<ScsiDev> {
        self.unlink(hctl);
        let disk = self.all.remove(hctl)?;
        self.indexes.give_back(disk.index);
        Some(disk)
    }

    fn unlink(&mut self, hctl: &str) {
        let Some(disk) = self.all.get(hctl) else { return };
        self.by_dev.remove(&disk.dev);
        self.by_name.remove(&disk.name);
        if let Some(wwid) = wwid_of(disk)
            && let Some(same) = self.by_wwid.get_mut(&wwid)
        {
            same.remove(hctl);
            if same.is_empty() {
                self.by_wwid.remove(&wwid);
            }
        }
    }

    pub(super) fn set_online(&mut self, hctl: &str, online: bool) {
        if let Some(disk) = self.all.get_mut(hctl) {
            disk.online = online;
        }
    }
}

/// dm devices by minor number.
#[derive(Debug, Default)]
pub(super) struct Maps {
    all: BTreeMap<u32, Dm>,
    by_uuid: HashMap<String, BTreeSet<u32>>,
    by_name: HashMap<String, BTreeSet<u32>>,
    /// What lies on a device.
    above: HashMap<DevNum, BTreeSet<u32>>,
    pub(super) minors: Numbers,
}

/// Takes a number out of an index.
fn drop_from<K: std::hash::Hash + Eq>(index: &mut HashMap<K, BTreeSet<u32>>, key: &K, minor: u32) {
    if let Some(same) = index.get_mut(key) {
        same.remove(&minor);
        if same.is_empty() {
            index.remove(key);
        }
    }
}

impl Maps {
    pub(super) fn get(&self, minor: u32) -> Option<&Dm> {
        self.all.get(&minor)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Dm> {
        self.all.values()
    }

    fn first<'a>(&'a self, found: Option<&'a BTreeSet<u32>>) -> Option<&'a Dm> {
        found?.first().and_then(|minor| self.get(*minor))
    }

    pub(super) fn by_uuid(&self, uuid: &str) -> Option<&Dm> {
        self.first(self.by_uuid.get(uuid))
    }

    pub(super) fn by_name(&self, name: &str) -> Option<&Dm> {
        self.first(self.by_name.get(name))
    }

    /// What lies on a device, in the order of their numbers.
    pub(super) fn above(&self, dev: DevNum) -> impl Iterator<Item = &Dm> {
        self.above.get(&dev).into_iter().flatten().filter_map(|minor| self.get(*minor))
    }

    pub(super) fn insert(&mut self, dm: Dm) {
        self.by_uuid.entry(dm.uuid.clone()).or_default().insert(dm.minor);
        self.by_name.entry(dm.name.clone()).or_default().insert(dm.minor);
        for slave in &dm.slaves {
            self.above.entry(*slave).or_default().insert(dm.minor);
        }
        self.all.insert(dm.minor, dm);
    }

    pub(super) fn remove(&mut self, minor: u32) -> Option<Dm> {
        let dm = self.all.remove(&minor)?;
        drop_from(&mut self.by_uuid, &dm.uuid, minor);
        drop_from(&mut self.by_name, &dm.name, minor);
        for slave in &dm.slaves {
            drop_from(&mut self.above, slave, minor);
        }
        self.minors.give_back(minor);
        Some(dm)
    }

    /// Puts a device upon others; returns those that it was on.
    pub(super) fn set_slaves(&mut self, minor: u32, slaves: Vec<DevNum>) -> Vec<DevNum> {
        let Some(dm) = self.all.get_mut(&minor) else { return Vec::new() };
        let before = std::mem::replace(&mut dm.slaves, slaves);
        for slave in &before {
            drop_from(&mut self.above, slave, minor);
        }
        for slave in &self.all[&minor].slaves {
            self.above.entry(*slave).or_default().insert(minor);
        }
        before
    }

    pub(super) fn set_error(&mut self, minor: u32, error: bool) {
        if let Some(dm) = self.all.get_mut(&minor) {
            dm.error = error;
        }
    }

    /// Whether it queues I/O while it has no path; `false` when there is none of that number.
    pub(super) fn set_queueing(&mut self, minor: u32, queueing: bool) -> bool {
        let dm = self.all.get_mut(&minor);
        dm.map(|dm| dm.queueing = queueing).is_some()
    }
}
