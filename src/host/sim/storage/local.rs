//! What is on the simulated host already: block devices of other kinds than LUNs, and the paths that lead to
//! devices.
//!
//! Points where faults act: `local.block` (path).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use super::SimStorage;
use super::kernel::{World, block_properties};
use crate::host::local::{FileSeen, HostFile, LocalSources, SourceError};
use crate::types::DevNum;

/// What kind of device one is, by which its identity is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SimBlock {
    /// A logical volume, by device-mapper's uuid.
    Lvm(String),
    /// An image of Ceph's, by its id.
    Rbd(String),
    /// A loop device, which has no identity.
    Loop,
}

/// Devices and paths.
#[derive(Debug, Default)]
pub(super) struct LocalModel {
    devices: BTreeMap<DevNum, (SimBlock, u64)>,
    paths: BTreeMap<PathBuf, DevNum>,
    made: u32,
}

impl SimBlock {
    /// The n-th device's name and number. They are out of the way of multipath's maps.
    fn names(&self, n: u32) -> (String, DevNum) {
        match self {
            Self::Lvm(_) => (format!("dm-{}", 200 + n), DevNum { major: 253, minor: 200 + n }),
            Self::Rbd(_) => (format!("rbd{n}"), DevNum { major: 251, minor: n << 4 }),
            Self::Loop => (format!("loop{n}"), DevNum { major: 7, minor: n }),
        }
    }
}

impl World {
    pub(super) fn has_local(&self, dev: DevNum) -> bool {
        self.local.devices.contains_key(&dev)
    }

    /// After a reboot they are there again.
    pub(super) fn boot_local(&mut self) {
        let all: Vec<_> =
            self.local.devices.iter().map(|(dev, what)| (*dev, what.clone())).collect();
        for (dev, (kind, size)) in all {
            self.show_local(dev, &kind, size);
        }
    }

    fn name_of_local(kind: &SimBlock, dev: DevNum) -> String {
        let of = |n: u32| kind.names(n).1 == dev;
        let n = (0..4096).find(|n| of(*n)).unwrap_or_default();
        kind.names(n).0
    }

    fn show_local(&mut self, dev: DevNum, kind: &SimBlock, size: u64) {
        let name = Self::name_of_local(kind, dev);
        let diskseq = self.next_diskseq();
        let dir = format!("devices/virtual/block/{name}");
        let tree = &mut self.tree;
        tree.put(&format!("{dir}/dev"), dev);
        tree.put(&format!("{dir}/diskseq"), diskseq);
        tree.put(&format!("{dir}/size"), size / 512);
        tree.put(&format!("{dir}/ro"), 0);
        tree.mkdir(&format!("{dir}/slaves"));
        tree.mkdir(&format!("{dir}/holders"));
        match kind {
            SimBlock::Lvm(uuid) => tree.put(&format!("{dir}/dm/uuid"), uuid),
            SimBlock::Rbd(image) => {
                let number = name.trim_start_matches("rbd");
                let of = |what: &str| format!("bus/rbd/devices/{number}/{what}");
                tree.put(&of("cluster_fsid"), "b2c1e3f0-0000-4000-8000-000000000001");
                tree.put(&of("pool_id"), 3);
                tree.put(&of("pool_ns"), "");
                tree.put(&of("image_id"), image);
                tree.put(&of("current_snap"), "-");
            }
            SimBlock::Loop => tree.put(&format!("{dir}/loop/backing_file"), "/srv/disk.img"),
        }
        for link in
            [format!("class/block/{name}"), format!("block/{name}"), format!("dev/block/{dev}")]
        {
            tree.link(&link, &dir);
        }
        self.emit("add", &dir, "block", &block_properties(&name, dev, diskseq));
    }

    fn hide_local(&mut self, dev: DevNum) -> Option<(SimBlock, u64)> {
        let (kind, size) = self.local.devices.remove(&dev)?;
        let name = Self::name_of_local(&kind, dev);
        let dir = format!("devices/virtual/block/{name}");
        let rbd = format!("bus/rbd/devices/{}", name.trim_start_matches("rbd"));
        for path in [
            format!("class/block/{name}"),
            format!("block/{name}"),
            format!("dev/block/{dev}"),
            rbd,
            dir.clone(),
        ] {
            self.tree.remove(&path);
        }
        self.claims.remove(&dev);
        self.opens.remove(&dev);
        self.emit("remove", &dir, "block", &block_properties(&name, dev, 0));
        Some((kind, size))
    }
}

impl SimStorage {
    /// A block device of the host's, and a path that leads to it.
    pub fn add_local(&self, path: &str, kind: SimBlock, size: u64) -> DevNum {
        let mut world = self.world();
        let n = world.local.made;
        world.local.made += 1;
        let (_, dev) = kind.names(n);
        world.local.devices.insert(dev, (kind.clone(), size));
        world.local.paths.insert(path.into(), dev);
        world.show_local(dev, &kind, size);
        dev
    }

    /// Another path to a device of any kind, or the same path to another device.
    pub fn lead_to(&self, path: &str, dev: DevNum) {
        self.world().local.paths.insert(path.into(), dev);
    }

    /// The device goes, and comes again by the same number as another one, `like` that where it says so.
    pub fn replace_local(&self, dev: DevNum, like: Option<SimBlock>) {
        let mut world = self.world();
        let Some((kind, size)) = world.hide_local(dev) else { return };
        let kind = like.unwrap_or(kind);
        world.local.devices.insert(dev, (kind.clone(), size));
        world.show_local(dev, &kind, size);
    }

    /// The device goes; what leads to it stays.
    pub fn remove_local(&self, dev: DevNum) {
        self.world().hide_local(dev);
    }

    /// Whoever it belongs to gives a device another size.
    pub fn resize_local(&self, dev: DevNum, size: u64) {
        let mut world = self.world();
        let Some((kind, known)) = world.local.devices.get_mut(&dev) else { return };
        *known = size;
        let name = World::name_of_local(&kind.clone(), dev);
        let dir = format!("devices/virtual/block/{name}");
        world.tree.put(&format!("{dir}/size"), size / 512);
        let resized = [block_properties(&name, dev, 0), vec![("RESIZE", "1".into())]].concat();
        world.emit("change", &dir, "block", &resized);
    }

    /// A partition that the kernel has found on a device, and a path that leads to it.
    pub fn add_partition(&self, on: DevNum, path: &str) -> DevNum {
        let mut world = self.world();
        let dev = DevNum { major: 259, minor: world.local.made };
        world.local.made += 1;
        if let Ok(disk) = world.tree.resolve(&format!("dev/block/{on}")) {
            let name = format!("{}p1", disk.rsplit('/').next().unwrap_or_default());
            let dir = format!("{disk}/{name}");
            world.tree.put(&format!("{dir}/dev"), dev);
            world.tree.put(&format!("{dir}/partition"), 1);
            world.tree.put(&format!("{dir}/size"), 2048);
            world.tree.mkdir(&format!("{dir}/holders"));
            world.tree.link(&format!("class/block/{name}"), &dir);
            world.tree.link(&format!("dev/block/{dev}"), &dir);
        }
        world.local.paths.insert(path.into(), dev);
        dev
    }

    /// Whether writes to it are refused.
    pub fn protect_local(&self, dev: DevNum, read_only: bool) {
        let mut world = self.world();
        let kind = world.local.devices.get(&dev).map(|(kind, _)| kind.clone());
        if let Some(kind) = kind {
            let name = World::name_of_local(&kind, dev);
            world.tree.put(&format!("devices/virtual/block/{name}/ro"), u8::from(read_only));
        }
    }
}

#[async_trait]
impl LocalSources for SimStorage {
    async fn block(&self, root: &Path, rest: &Path) -> Result<DevNum, SourceError> {
        let path = root.join(rest);
        if let Err(source) = self.pass("local.block", &path.to_string_lossy()).await {
            return Err(SourceError::Io { path, source });
        }
        let found = self.world().local.paths.get(&path).copied();
        found.ok_or(SourceError::NotThere(path))
    }

    async fn file(&self, root: &Path, rest: &Path) -> Result<FileSeen, SourceError> {
        let path = root.join(rest);
        if let Err(source) = self.pass("local.file", &path.to_string_lossy()).await {
            return Err(SourceError::Io { path, source });
        }
        self.files().seen(&path)
    }

    async fn sync(&self, file: &HostFile) -> Result<(), SourceError> {
        let path = file.path();
        if let Err(source) = self.pass("local.sync", &path.to_string_lossy()).await {
            return Err(SourceError::Io { path, source });
        }
        self.files().same(file).map(drop)
    }
}
