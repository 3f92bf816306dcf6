//! The door to open-iscsi's database, on the simulated host.

use std::io;

use async_trait::async_trait;

use super::SimStorage;
use crate::host::iscsidb::{DbLockState, IscsiDb, Record, Setting};
use crate::types::{Chap, Iface, IfaceName, Iqn, Nexus, Outcome, Portal};

#[async_trait]
impl IscsiDb for SimStorage {
    async fn records(&self, target: &Iqn) -> io::Result<Vec<Record>> {
        self.pass("iscsidb.records", target.as_str()).await?;
        self.iscsid_place()?;
        let world = self.world();
        let of_target = world.records.iter().filter(|((t, _, _), _)| t == target);
        Ok(of_target
            .map(|((_, portal, iface), record)| Record {
                portal: *portal,
                iface: iface.clone(),
                group: record.group,
                corrupt: record.corrupt,
            })
            .collect())
    }

    async fn remove(&self, target: &Iqn, record: &Record) -> io::Result<()> {
        self.pass("iscsidb.remove", target.as_str()).await?;
        self.iscsid_place()?;
        let key = (target.clone(), record.portal, record.iface.clone());
        let mut world = self.world();
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match world.records.get(&key) {
            Some(found) if found.corrupt != record.corrupt => {
                Err(io::ErrorKind::InvalidInput.into())
            }
            _ => {
                world.records.remove(&key);
                Ok(())
            }
        }
    }

    async fn set(
        &self,
        nexus: &Nexus,
        portal: Portal,
        settings: &[Setting],
        chap: Option<&Chap>,
    ) -> io::Result<()> {
        self.pass("iscsidb.set", nexus.as_str()).await?;
        self.iscsid_place()?;
        let mut world = self.world();
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let key = (nexus.target().clone(), portal, nexus.iface().to_string());
        let record = world.records.get_mut(&key).ok_or(io::ErrorKind::NotFound)?;
        if record.corrupt {
            return Err(io::ErrorKind::InvalidData.into());
        }
        record.settings.extend(settings.iter().map(|(n, v)| ((*n).to_owned(), v.clone())));
        if let Some(chap) = chap {
            super::iscsiadm::put_chap(record, chap);
        }
        Ok(())
    }

    async fn set_group(&self, target: &Iqn, portal: Portal, group: u16) -> io::Result<()> {
        self.pass("iscsidb.group", target.as_str()).await?;
        self.iscsid_place()?;
        let mut world = self.world();
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut at_portal =
            world.records.iter_mut().filter(|((t, p, _), _)| t == target && *p == portal);
        let (_, record) =
            at_portal.find(|(_, r)| r.group.is_none()).ok_or(io::ErrorKind::NotFound)?;
        if record.corrupt {
            return Err(io::ErrorKind::InvalidData.into());
        }
        record.group = Some(group);
        Ok(())
    }

    async fn put_iface(&self, iface: &Iface) -> io::Result<Outcome> {
        self.pass("iscsidb.iface", iface.name.as_str()).await?;
        self.iscsid_place()?;
        let mut world = self.world();
        if !world.knows_iface(iface.name.as_str()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let name = iface.record();
        if iface.initiator.is_none() || world.ifaces.contains_key(&name) {
            return Ok(Outcome::Already(()));
        }
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        world.ifaces.insert(name, iface.initiator.clone());
        Ok(Outcome::Done(()))
    }

    async fn ifaces(&self) -> io::Result<Vec<IfaceName>> {
        self.pass("iscsidb.iface", "").await?;
        self.iscsid_place()?;
        Ok(self.world().ifaces.keys().cloned().collect())
    }

    async fn remove_iface(&self, name: &IfaceName) -> io::Result<bool> {
        self.pass("iscsidb.iface", name.as_str()).await?;
        self.iscsid_place()?;
        let mut world = self.world();
        if !name.is_own() || !world.ifaces.contains_key(name) {
            return Ok(false);
        }
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let used = world.records.keys().any(|(_, _, iface)| iface == name.as_str());
        Ok(!used && world.ifaces.remove(name).is_some())
    }

    async fn put_discovery(&self, portal: Portal, chap: &Chap) -> io::Result<()> {
        self.pass("iscsidb.discovery", &portal.to_string()).await?;
        self.iscsid_place()?;
        let mut world = self.world();
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if matches!(world.discoveries.get(&portal), Some(None)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        world.discoveries.insert(portal, Some(chap.clone()));
        Ok(())
    }

    async fn discoveries(&self) -> io::Result<Vec<Portal>> {
        self.pass("iscsidb.discovery", "").await?;
        self.iscsid_place()?;
        let world = self.world();
        Ok(world.discoveries.iter().filter(|(_, ours)| ours.is_some()).map(|(at, _)| *at).collect())
    }

    async fn remove_discovery(&self, portal: Portal) -> io::Result<()> {
        self.pass("iscsidb.discovery", &portal.to_string()).await?;
        self.iscsid_place()?;
        let mut world = self.world();
        if !matches!(world.discoveries.get(&portal), Some(Some(_))) {
            return Ok(());
        }
        if world.db_lock.is_some() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        world.discoveries.remove(&portal);
        Ok(())
    }

    async fn look_at_lock(&self) -> io::Result<DbLockState> {
        self.pass("iscsidb.lock", "").await?;
        self.iscsid_place()?;
        let mut world = self.world();
        Ok(match &world.db_lock {
            None => DbLockState::Free,
            Some(by) if !by.is_empty() => DbLockState::Held(by.clone()),
            Some(_) => {
                world.db_lock = None;
                DbLockState::Cleared
            }
        })
    }
}
