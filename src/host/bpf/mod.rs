//! Device grants of cgroup v2, by one program at the host's cgroup root that has the last word.
//!
//! A container runtime attaches its own device program to a container's cgroup, and systemd replaces
//! that at each reload. Ours is attached once, at the root, beside theirs (`BPF_F_ALLOW_MULTI`). The
//! kernel runs programs from the cgroup upwards, so ours comes last; it lifts a refusal (-EPERM)
//! where its map has a grant for the caller's cgroup, or one above it, and the device.
//!
//! ```text
//! open(/dev in pod) -> runtime's program: -EPERM -> ours: map[cgroup, 8:16] covers rw? -> 0 : -EPERM
//! ```
//!
//! A grant is an entry of the map. The program stays attached when lunplug ends; the next one finds
//! it at the root by its name, and its map by the program's particulars: no pins. When the program
//! differs (another version), the new one is attached with the same map before the old is detached,
//! so that no grant lapses in between.

mod asm;
mod btf;
mod openfiles;
mod program;
mod root;
mod sys;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::blocking::blocking;
use super::grants::{Access, CgroupRef, Entry, GrantStoreError, OverrideStatus, Overrides};
use crate::types::{DevNum, Outcome};
pub use openfiles::{OpenFiles, Opened};
use program::{ACC_READ, ACC_WRITE, KEY_SIZE, NAME, VALUE_SIZE};
use root::Root;

type Key = sys::Bytes<KEY_SIZE>;
type Value = sys::Bytes<VALUE_SIZE>;
type Result<T> = std::result::Result<T, GrantStoreError>;

/// How many grants there can be on a host.
const MAX_ENTRIES: u32 = 65536;

/// The override program of this host.
pub struct BpfOverrides {
    shared: Arc<Shared>,
}

struct Shared {
    root: Option<Root>,
    /// The program as last found. Another process may replace it at any time.
    ours: Mutex<Option<Ours>>,
}

/// Our program, attached.
struct Ours {
    id: u32,
    tag: [u8; 8],
    prog: OwnedFd,
    map: OwnedFd,
}

impl BpfOverrides {
    /// For the host whose cgroup2 root is among the mounts of this process. Changes nothing.
    pub fn new() -> Self {
        Self::with_root(Root::find())
    }

    fn with_root(root: Option<Root>) -> Self {
        Self { shared: Arc::new(Shared { root, ours: Mutex::new(None) }) }
    }

    async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Shared) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let shared = Arc::clone(&self.shared);
        blocking(what, move || work(&shared)).await
    }
}

impl Default for BpfOverrides {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Overrides for BpfOverrides {
    async fn install(&self) -> Result<Outcome<OverrideStatus>> {
        self.run("installing the device program", Shared::install).await
    }

    async fn put(&self, cgroup: &CgroupRef, dev: DevNum, access: Access) -> Result<Outcome> {
        let cgroup = cgroup.clone();
        self.run("granting a device", move |s| s.put(&cgroup, dev, access)).await
    }

    async fn take(&self, cgroup: u64, dev: DevNum) -> Result<Outcome> {
        self.run("revoking a device", move |s| s.take(cgroup, dev)).await
    }

    async fn look_up(&self, cgroup: u64, devs: &[DevNum]) -> Result<Vec<Access>> {
        let devs = devs.to_vec();
        self.run("looking up device grants", move |s| s.look_up(cgroup, &devs)).await
    }

    async fn entries(&self) -> Result<Vec<Entry>> {
        self.run("listing device grants", Shared::entries).await
    }

    async fn uninstall(&self) -> Result<Outcome> {
        self.run("detaching the device program", Shared::uninstall).await
    }
}

fn io_error(what: &str) -> impl FnOnce(io::Error) -> GrantStoreError {
    let what = what.to_owned();
    move |source| GrantStoreError::Io { what, source }
}

impl Shared {
    fn root(&self) -> Result<&Root> {
        self.root.as_ref().ok_or(GrantStoreError::NoRoot)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Ours>> {
        // What a panicking thread left is at worst out of date, and each use checks that.
        self.ours.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Our programs at the root, in the order of their attachment; none on a host without cgroup2.
    fn find(&self) -> Result<Vec<Ours>> {
        let Some(root) = &self.root else { return Ok(Vec::new()) };
        let root = root.open().map_err(io_error("opening the cgroup root"))?;
        let ids = sys::prog_query(&root, false)
            .map_err(io_error("querying the device programs at the cgroup root"))?;
        let mut found = Vec::new();
        for id in ids {
            found.extend(adopt(id)?);
        }
        Ok(found)
    }

    /// Makes `ours` the program that is attached, if there is one.
    fn refresh<'a>(&self, ours: &'a mut Option<Ours>) -> Result<Option<&'a Ours>> {
        let mut found = self.find()?;
        let same = ours.as_ref().is_some_and(|o| found.iter().any(|f| f.id == o.id));
        if !same {
            *ours = (!found.is_empty()).then(|| found.swap_remove(0));
        }
        Ok(ours.as_ref())
    }

    /// Loads this version's program over `map`, or over a new map.
    fn load(map: Option<OwnedFd>) -> Result<Ours> {
        let map = match map {
            Some(map) => map,
            None => {
                sys::map_create(sys::name(NAME), KEY_SIZE as u32, VALUE_SIZE as u32, MAX_ENTRIES)
                    .map_err(io_error("creating the map of device grants"))?
            }
        };
        let insns = program::assemble(map.as_raw_fd())
            .ok_or_else(|| io::Error::other("the device program does not assemble"))?;
        let prog = sys::prog_load(sys::name(NAME), &insns, c"Apache-2.0", sys::ProgKind::DEVICE)
            .map_err(load_error)?;
        let info = sys::prog_info(&prog).map_err(io_error("reading the device program's id"))?;
        Ok(Ours { id: info.id, tag: info.tag, prog, map })
    }

    fn install(&self) -> Result<Outcome<OverrideStatus>> {
        let mut ours = self.lock();
        self.install_locked(&mut ours, true)
    }

    /// With `upgrade`, a program of another version is replaced; otherwise it serves as well.
    fn install_locked(
        &self,
        ours: &mut Option<Ours>,
        upgrade: bool,
    ) -> Result<Outcome<OverrideStatus>> {
        let mut found = self.find()?;
        let existing = (!found.is_empty()).then(|| found.swap_remove(0));
        let current = match existing {
            Some(old) if !upgrade => Outcome::Already(old),
            Some(old) => self.upgrade(old)?,
            None => Outcome::Done(self.attach_first()?),
        };
        let changed = current.changed();
        let current = current.into_inner();
        let status = OverrideStatus { program: current.id, after_ours: self.after(current.id)? };
        if !status.after_ours.is_empty() {
            tracing::warn!(
                programs = ?status.after_ours,
                "device programs of others run after ours at the cgroup root and may overrule grants"
            );
        }
        *ours = Some(current);
        Ok(if changed { Outcome::Done(status) } else { Outcome::Already(status) })
    }

    /// Replaces `old` by this version's program where they differ, the new one first.
    fn upgrade(&self, old: Ours) -> Result<Outcome<Ours>> {
        let shared_map = old.map.try_clone()?;
        let new = Self::load(Some(shared_map))?;
        if new.tag == old.tag {
            return Ok(Outcome::Already(old));
        }
        let root = self.root()?.open()?;
        sys::prog_attach(&root, &new.prog).map_err(io_error("attaching the device program"))?;
        sys::prog_detach(&root, &old.prog).map_err(io_error("detaching the old device program"))?;
        Ok(Outcome::Done(new))
    }

    /// Attaches a program where there was none. Another process may do so at the same moment: the
    /// first in the kernel's order stays, and the other takes its own away again.
    fn attach_first(&self) -> Result<Ours> {
        let root = self.root()?.open()?;
        let new = Self::load(None)?;
        sys::prog_attach(&root, &new.prog).map_err(io_error("attaching the device program"))?;
        let mut found = self.find()?;
        match found.first() {
            Some(first) if first.id != new.id => {
                sys::prog_detach(&root, &new.prog)
                    .map_err(io_error("detaching the device program"))?;
                Ok(found.swap_remove(0))
            }
            _ => Ok(new),
        }
    }

    /// Programs that run after `id` at the root.
    fn after(&self, id: u32) -> Result<Vec<u32>> {
        let root = self.root()?.open()?;
        Ok(after(sys::prog_query(&root, true)?, id))
    }

    fn put(&self, cgroup: &CgroupRef, dev: DevNum, access: Access) -> Result<Outcome> {
        let dir = self.root()?.open_cgroup(cgroup)?;
        let mut ours = self.lock();
        if self.refresh(&mut ours)?.is_none() {
            // Never installed, or uninstalled under us by another process.
            self.install_locked(&mut ours, false)?;
        }
        let Some(ours) = ours.as_ref() else { return Err(GrantStoreError::NoRoot) };
        let later = after(sys::prog_query(&dir, true)?, ours.id);
        if !later.is_empty() {
            tracing::warn!(%cgroup, programs = ?later, "device programs of others run after ours");
        }
        let (key, value) = (key(cgroup.id, dev), value(access));
        if sys::map_get::<KEY_SIZE, VALUE_SIZE>(&ours.map, &key)? == Some(value) {
            return Ok(Outcome::Already(()));
        }
        sys::map_put(&ours.map, &key, &value).map_err(io_error("putting a device grant"))?;
        Ok(Outcome::Done(()))
    }

    fn take(&self, cgroup: u64, dev: DevNum) -> Result<Outcome> {
        let mut ours = self.lock();
        let Some(ours) = self.refresh(&mut ours)? else { return Ok(Outcome::Already(())) };
        let deleted = sys::map_delete(&ours.map, &key(cgroup, dev))
            .map_err(io_error("taking a device grant away"))?;
        Ok(if deleted { Outcome::Done(()) } else { Outcome::Already(()) })
    }

    fn look_up(&self, cgroup: u64, devs: &[DevNum]) -> Result<Vec<Access>> {
        let mut ours = self.lock();
        let Some(ours) = self.refresh(&mut ours)? else {
            return Ok(vec![Access::NONE; devs.len()]);
        };
        let look = |dev: &DevNum| {
            let value = sys::map_get::<KEY_SIZE, VALUE_SIZE>(&ours.map, &key(cgroup, *dev))?;
            Ok(value.map_or(Access::NONE, read_value))
        };
        devs.iter().map(look).collect()
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let mut ours = self.lock();
        let Some(ours) = self.refresh(&mut ours)? else { return Ok(Vec::new()) };
        let mut entries = Vec::new();
        for key in sys::map_keys::<KEY_SIZE>(&ours.map)? {
            let Some(value) = sys::map_get::<KEY_SIZE, VALUE_SIZE>(&ours.map, &key)? else {
                continue; // taken away meanwhile
            };
            let (cgroup, dev) = read_key(&key);
            let path = self.root()?.path_of(cgroup)?;
            entries.push(Entry { cgroup, dev, access: read_value(value), path });
        }
        Ok(entries)
    }

    fn uninstall(&self) -> Result<Outcome> {
        let mut ours = self.lock();
        *ours = None;
        let found = self.find()?;
        if found.is_empty() {
            return Ok(Outcome::Already(()));
        }
        let root = self.root()?.open()?;
        for program in &found {
            sys::prog_detach(&root, &program.prog)
                .map_err(io_error("detaching the device program"))?;
        }
        Ok(Outcome::Done(()))
    }
}

/// The program `id` with its map, if it is one of ours.
fn adopt(id: u32) -> Result<Option<Ours>> {
    let Some(prog) = sys::prog_by_id(id).map_err(io_error("opening a device program"))? else {
        return Ok(None);
    };
    let info = sys::prog_info(&prog).map_err(io_error("reading a device program"))?;
    if info.name != sys::name(NAME) {
        return Ok(None);
    }
    for map in info.maps {
        let Some(map) = sys::map_by_id(map).map_err(io_error("opening a program's map"))? else {
            continue;
        };
        let shape = sys::map_info(&map).map_err(io_error("reading a program's map"))?;
        if shape.name == sys::name(NAME)
            && shape.key_size == KEY_SIZE as u32
            && shape.value_size == VALUE_SIZE as u32
        {
            return Ok(Some(Ours { id, tag: info.tag, prog, map }));
        }
    }
    Err(GrantStoreError::OtherShape { id })
}

/// What comes behind `id` in the order in which programs run; all of it when `id` is not there.
fn after(order: Vec<u32>, id: u32) -> Vec<u32> {
    let behind = order.iter().position(|&p| p == id).map_or(0, |at| at + 1);
    order[behind..].to_vec()
}

/// EINVAL is the verifier's answer to a helper that it does not know, ENOSYS and EOPNOTSUPP that of
/// a kernel without cgroup programs.
fn load_error((source, log): (io::Error, String)) -> GrantStoreError {
    use nix::libc::{EINVAL, ENOSYS, EOPNOTSUPP};
    let verdict = log
        .lines()
        .rfind(|l| !l.is_empty() && !l.starts_with("processed "))
        .unwrap_or("no verifier log")
        .to_owned();
    match source.raw_os_error() {
        Some(EINVAL | ENOSYS | EOPNOTSUPP) => {
            GrantStoreError::KernelTooOld { log: verdict, source }
        }
        _ => GrantStoreError::Io { what: format!("loading the device program: {verdict}"), source },
    }
}

fn key(cgroup: u64, dev: DevNum) -> Key {
    let mut key = [0; KEY_SIZE];
    key[..8].copy_from_slice(&cgroup.to_ne_bytes());
    key[8..12].copy_from_slice(&dev.major.to_ne_bytes());
    key[12..].copy_from_slice(&dev.minor.to_ne_bytes());
    key
}

fn read_key(key: &Key) -> (u64, DevNum) {
    let word = |at: usize| u32::from_ne_bytes([key[at], key[at + 1], key[at + 2], key[at + 3]]);
    let mut id = [0; 8];
    id.copy_from_slice(&key[..8]);
    (u64::from_ne_bytes(id), DevNum { major: word(8), minor: word(12) })
}

fn value(access: Access) -> Value {
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    (bit(access.read, ACC_READ) | bit(access.write, ACC_WRITE)).to_ne_bytes()
}

fn read_value(value: Value) -> Access {
    let bits = u32::from_ne_bytes(value);
    Access { read: bits & ACC_READ != 0, write: bits & ACC_WRITE != 0 }
}

/// Whether a directory's path is too deep for the program to see (for the message up front).
fn too_deep(root: &Path, path: &Path) -> bool {
    let depth = path.strip_prefix(root).map_or(usize::MAX, |rest| rest.components().count());
    depth > program::MAX_DEPTH as usize
}
