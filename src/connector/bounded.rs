//! The doors with a deadline around every call (invariant 6), so that the flows behind cannot
//! forget one. A call that is given up on is abandoned, not waited for.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use crate::host::block::{Blocks, Exclusive, listed};
use crate::host::cmd::{CmdError, Commands, Output, Tool};
use crate::host::iscsidb::{DbLockState, IscsiDb, Record, Setting};
use crate::host::lock::{LockError, LockGuard, RunDir};
use crate::host::storage::StorageDoors;
use crate::host::sysfs::{Guard, Guarded, Look, Looked, ReadError, Sysfs};
use crate::types::{Chap, DevNum, Iface, IfaceName, Iqn, Nexus, Outcome, Portal};

use super::settings::{Settings, ms};

/// Puts the deadlines of `settings` around `doors`.
pub(crate) fn bounded(doors: StorageDoors, settings: &Settings) -> StorageDoors {
    StorageDoors {
        sysfs: Arc::new(BoundedSysfs {
            door: doors.sysfs,
            read: ms(settings.sysfs_read_ms),
            write: ms(settings.sysfs_write_ms),
        }),
        uevents: doors.uevents,
        stuck: doors.stuck,
        tracker: doors.tracker,
        commands: Arc::new(BoundedCommands(doors.commands)),
        // Bounded where it is asked in turn, for all who ask ([`crate::host::multipathd::InTurn`]).
        multipathd: doors.multipathd,
        blocks: Arc::new(BoundedBlocks {
            door: doors.blocks,
            probe: ms(settings.probe_ms),
            flush: ms(settings.flush_ms),
        }),
        rundir: Arc::new(BoundedRunDir(doors.rundir, ms(settings.file_ms))),
        iscsidb: Arc::new(BoundedIscsiDb(doors.iscsidb, ms(settings.file_ms))),
        secrets: doors.secrets,
        resolver: doors.resolver,
        // It has a deadline of its own.
        local: doors.local,
    }
}

/// The run directory alone, with `limit` around each call.
pub(crate) fn bounded_rundir(door: Arc<dyn RunDir>, limit: Duration) -> Arc<dyn RunDir> {
    Arc::new(BoundedRunDir(door, limit))
}

async fn within<T>(
    limit: Duration,
    what: impl FnOnce() -> String,
    call: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    timeout(limit, call).await.unwrap_or_else(|_| {
        let text = format!("{} did not return within {limit:?}", what());
        Err(io::Error::new(io::ErrorKind::TimedOut, text))
    })
}

struct BoundedSysfs {
    door: Arc<dyn Sysfs>,
    read: Duration,
    write: Duration,
}

#[async_trait]
impl Sysfs for BoundedSysfs {
    async fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        within(self.read, || format!("reading {path}"), self.door.read(path)).await
    }
    async fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        within(self.read, || format!("listing {dir}"), self.door.list(dir)).await
    }
    async fn resolve(&self, path: &str) -> io::Result<String> {
        within(self.read, || format!("resolving {path}"), self.door.resolve(path)).await
    }
    async fn look_with(&self, about: &str, look: Look) -> Looked {
        let call = async { Ok(self.door.look_with(about, look).await) };
        let looked = within(self.read, || format!("reading {about}"), call).await;
        looked.map_err(ReadError::at(about))?
    }
    async fn write(&self, path: &str, value: &str) -> io::Result<()> {
        within(self.write, || format!("writing {path}"), self.door.write(path, value)).await
    }
    async fn write_guarded(
        &self,
        path: &str,
        value: &str,
        guards: &[Guard],
    ) -> io::Result<Guarded> {
        let call = self.door.write_guarded(path, value, guards);
        within(self.write, || format!("writing {path}"), call).await
    }
}

struct BoundedCommands(Arc<dyn Commands>);

#[async_trait]
impl Commands for BoundedCommands {
    async fn run(&self, tool: Tool, args: &[&str], deadline: Duration) -> Result<Output, CmdError> {
        // The door ends the program at its deadline; two seconds more are for its SIGTERM.
        timeout(deadline + Duration::from_secs(2), self.0.run(tool, args, deadline))
            .await
            .unwrap_or(Err(CmdError::TimedOut { tool, deadline }))
    }
    fn started(&self) -> u64 {
        self.0.started()
    }
}

struct BoundedBlocks {
    door: Arc<dyn Blocks>,
    probe: Duration,
    flush: Duration,
}

#[async_trait]
impl Blocks for BoundedBlocks {
    async fn flush(&self, dev: DevNum) -> io::Result<()> {
        within(self.flush, || format!("flushing {dev}"), self.door.flush(dev)).await
    }
    async fn flush_unclaimed(&self, dev: DevNum) -> io::Result<Exclusive> {
        let flush = self.door.flush_unclaimed(dev);
        within(self.flush, || format!("flushing {dev}"), flush).await
    }
    async fn exclusive(&self, dev: DevNum) -> io::Result<Exclusive> {
        within(self.probe, || format!("opening {dev}"), self.door.exclusive(dev)).await
    }
    async fn mapped(&self, uuid: &str) -> io::Result<Option<DevNum>> {
        within(self.probe, || format!("looking for {uuid}"), self.door.mapped(uuid)).await
    }
    async fn failed_paths(&self, maps: &[DevNum]) -> io::Result<Vec<BTreeSet<DevNum>>> {
        let doing = || format!("reading the status of {}", listed(maps));
        within(self.probe, doing, self.door.failed_paths(maps)).await
    }
    async fn openers(&self, devs: &[DevNum]) -> io::Result<Vec<Vec<String>>> {
        let doing = || format!("looking who has {} open", listed(devs));
        within(self.probe, doing, self.door.openers(devs)).await
    }
}

struct BoundedRunDir(Arc<dyn RunDir>, Duration);

#[async_trait]
impl RunDir for BoundedRunDir {
    async fn lock(&self, name: &str, deadline: Duration) -> Result<Box<dyn LockGuard>, LockError> {
        timeout(deadline + self.1, self.0.lock(name, deadline))
            .await
            .unwrap_or_else(|_| Err(LockError::TimedOut { name: name.into(), deadline }))
    }
    async fn load(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        within(self.1, || format!("reading {name}"), self.0.load(name)).await
    }
    async fn load_each(&self, names: &[String]) -> Vec<io::Result<Option<Vec<u8>>>> {
        let load = async { Ok(self.0.load_each(names).await) };
        let doing = || format!("reading {}", names.join(", "));
        let failed = |e: io::Error| {
            let again = |_| Err(io::Error::new(e.kind(), e.to_string()));
            names.iter().map(again).collect()
        };
        within(self.1, doing, load).await.unwrap_or_else(failed)
    }
    async fn store(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        within(self.1, || format!("writing {name}"), self.0.store(name, bytes)).await
    }
    async fn remove(&self, name: &str) -> io::Result<()> {
        within(self.1, || format!("removing {name}"), self.0.remove(name)).await
    }
    async fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        within(self.1, || format!("listing {dir}"), self.0.list(dir)).await
    }
    fn boot_id(&self) -> &str {
        self.0.boot_id()
    }
}

struct BoundedIscsiDb(Arc<dyn IscsiDb>, Duration);

#[async_trait]
impl IscsiDb for BoundedIscsiDb {
    async fn records(&self, target: &Iqn) -> io::Result<Vec<Record>> {
        within(self.1, || format!("reading the records of {target}"), self.0.records(target)).await
    }
    async fn remove(&self, target: &Iqn, record: &Record) -> io::Result<()> {
        let call = self.0.remove(target, record);
        within(self.1, || format!("removing a record of {target}"), call).await
    }
    async fn set(
        &self,
        nexus: &Nexus,
        portal: Portal,
        settings: &[Setting],
        chap: Option<&Chap>,
    ) -> io::Result<()> {
        let call = self.0.set(nexus, portal, settings, chap);
        within(self.1, || format!("writing a record of {nexus}"), call).await
    }
    async fn set_group(&self, target: &Iqn, portal: Portal, group: u16) -> io::Result<()> {
        let call = self.0.set_group(target, portal, group);
        within(self.1, || format!("writing a record of {target}"), call).await
    }
    async fn put_iface(&self, iface: &Iface) -> io::Result<Outcome> {
        let doing = || format!("writing iface {}", iface.record());
        within(self.1, doing, self.0.put_iface(iface)).await
    }
    async fn ifaces(&self) -> io::Result<Vec<IfaceName>> {
        within(self.1, || "listing the ifaces".into(), self.0.ifaces()).await
    }
    async fn remove_iface(&self, name: &IfaceName) -> io::Result<bool> {
        within(self.1, || format!("removing iface {name}"), self.0.remove_iface(name)).await
    }
    async fn put_discovery(&self, portal: Portal, chap: &Chap) -> io::Result<()> {
        let call = self.0.put_discovery(portal, chap);
        within(self.1, || format!("writing a discovery record of {portal}"), call).await
    }
    async fn discoveries(&self) -> io::Result<Vec<Portal>> {
        within(self.1, || "reading the discovery records".into(), self.0.discoveries()).await
    }
    async fn remove_discovery(&self, portal: Portal) -> io::Result<()> {
        let call = self.0.remove_discovery(portal);
        within(self.1, || format!("removing the discovery record of {portal}"), call).await
    }
    async fn look_at_lock(&self) -> io::Result<DbLockState> {
        let doing = || "looking at open-iscsi's lock".to_owned();
        within(self.1, doing, self.0.look_at_lock()).await
    }
}
