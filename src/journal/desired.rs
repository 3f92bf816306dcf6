//! Desired state and identities: SQLite, durable before anything is done about it.
//!
//! An operator can read it with `sqlite3`; the values are JSON. Every write is one transaction with
//! `synchronous=FULL`, so that a call that returned is on disk.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde::de::Error as _;

use super::Error;
use super::store::Store;
use crate::spec::{RemoveOptions, Revision, VmSpec, VolumeSpec};
use crate::types::{Bus, VmId, VolumeKey, VolumeName, Wwid};

/// When a write is on the disk.
#[derive(Debug, Clone, Copy)]
enum Durable {
    /// Once it returns.
    Now,
    /// With what is written next, which takes it to the disk before.
    Later,
}

impl Durable {
    /// `synchronous` of a WAL, <https://www.sqlite.org/pragma.html#pragma_synchronous>.
    fn level(self) -> &'static str {
        match self {
            Self::Now => "FULL",
            Self::Later => "NORMAL",
        }
    }
}

/// A volume as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredVolume {
    /// As asked for; its status has the same.
    pub spec: Arc<VolumeSpec>,
    /// The request allowed another identity than the recorded one; cleared once one is recorded.
    pub accept_new_identity: bool,
    /// It is wanted no more, but not gone yet.
    pub removing: Option<RemoveOptions>,
}

/// What a volume is to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDisk {
    /// The volume's name, as it is stored.
    pub volume: String,
    /// Its disk's name, as it is stored.
    pub disk: String,
    /// The bus that it is plugged into.
    pub bus: Bus,
    /// It has a place of its own, and stays: no medium, which comes into a drive that is there, nor being removed.
    pub keeps_place: bool,
}

/// Proven identities, by volume and source ([`crate::spec::Source::key`]).
pub type Identities = HashMap<(VolumeName, String), Wwid>;

/// The durable store. Clones share one connection, used by one blocking call at a time.
#[derive(Debug, Clone)]
pub struct Desired(Arc<Store>);

impl Desired {
    /// Opens the database at `path`, or makes it (its directory with mode 0700).
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_beside(path, &std::env::temp_dir())
    }

    /// The same. While its disk is full or read-only the store is read by way of a copy below
    /// `scratch`, and every write is refused; it becomes whole with the first write that succeeds.
    pub fn open_beside(path: &Path, scratch: &Path) -> Result<Self, Error> {
        Store::open(path, scratch).map(|store| Self(Arc::new(store)))
    }

    /// A store in memory, for the simulated host.
    pub fn in_memory() -> Result<Self, Error> {
        Store::in_memory().map(|store| Self(Arc::new(store)))
    }

    /// Why nothing can be written, if that is so.
    pub async fn trouble(&self) -> Option<String> {
        let store = self.0.clone();
        tokio::task::spawn_blocking(move || store.trouble()).await.ok().flatten()
    }

    /// Ends all use; every later call is [`Error::Closed`].
    pub async fn close(&self) {
        let store = self.0.clone();
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
    }

    /// Reads on a blocking worker.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = self.0.clone();
        tokio::task::spawn_blocking(move || store.read(work)).await.map_err(|_| Error::Closed)?
    }

    /// Writes on a blocking worker; it is on the disk then.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.write_as(Durable::Now, work).await
    }

    async fn write_as<T: Send + 'static>(
        &self,
        durable: Durable,
        work: impl FnOnce(&mut Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = self.0.clone();
        let work = move |c: &mut Connection| {
            // Each says so for itself: what the one before has left is nobody's trouble.
            c.pragma_update(None, "synchronous", durable.level())?;
            work(c)
        };
        tokio::task::spawn_blocking(move || store.write(work)).await.map_err(|_| Error::Closed)?
    }

    /// All VMs, ordered by name; one whose value is damaged is an error of its own, with its name.
    pub async fn vms(&self) -> Result<Vec<Result<VmSpec, (String, Error)>>, Error> {
        let rows = self
            .read(|c| {
                c.prepare("SELECT vm, spec FROM vms ORDER BY vm")?
                    .query_map([], |r| Ok((r.get::<_, String>(0)?, r.get::<_, String>(1)?)))?
                    .collect::<Result<Vec<_>, _>>()
            })
            .await?;
        let read = |(vm, json): (String, String)| {
            parse(&format!("VM {vm}"), &json).map_err(|error| (vm, error))
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// Stores a VM.
    pub async fn put_vm(&self, spec: &VmSpec) -> Result<(), Error> {
        let (vm, json) = (spec.id.to_string(), render(spec)?);
        self.write(move |c| {
            c.execute(
                "INSERT INTO vms (vm, spec) VALUES (?1, ?2)
                 ON CONFLICT (vm) DO UPDATE SET spec = excluded.spec",
                params![vm, json],
            )
        })
        .await
        .map(drop)
    }

    /// Whether a VM is marked: it is to be able to have Fibre Channel volumes ([`crate::vm::plan::fc`]).
    pub async fn fc_marked(&self, vm: &VmId) -> Result<bool, Error> {
        let vm = vm.to_string();
        let marked = self
            .read(move |c| {
                c.query_row("SELECT fc_marked FROM vms WHERE vm = ?1", [vm], |r| r.get(0))
                    .optional()
            })
            .await?;
        Ok(marked.unwrap_or(false))
    }

    /// Forgets a VM, its volumes, their identities and its revision.
    pub async fn delete_vm(&self, vm: &VmId) -> Result<(), Error> {
        let vm = vm.to_string();
        self.write(move |c| {
            let tx = c.transaction()?;
            for table in ["volumes", "identities", "revisions", "vms"] {
                tx.execute(&format!("DELETE FROM {table} WHERE vm = ?1"), [&vm])?;
            }
            tx.commit()
        })
        .await
    }

    /// A VM's volumes in the order in which they were added.
    pub async fn volumes(&self, vm: &VmId) -> Result<Vec<StoredVolume>, Error> {
        let id = vm.to_string();
        let rows = self
            .read(move |c| {
                c.prepare(
                    "SELECT volume, spec, accept_new_identity, removing FROM volumes
                     WHERE vm = ?1 ORDER BY position",
                )?
                .query_map([id], |r| {
                    let (name, spec): (String, String) = (r.get(0)?, r.get(1)?);
                    let (accept, removing): (bool, Option<String>) = (r.get(2)?, r.get(3)?);
                    Ok((name, spec, accept, removing))
                })?
                .collect::<Result<Vec<_>, _>>()
            })
            .await?;
        rows.into_iter()
            .map(|(name, json, accept_new_identity, removing)| {
                let what = format!("volume {vm}/{name}");
                let spec = Arc::new(parse(&what, &json)?);
                let removing = removing.map(|json| parse(&what, &json)).transpose()?;
                Ok(StoredVolume { spec, accept_new_identity, removing })
            })
            .collect()
    }

    /// Stores a volume; a new one goes behind the others.
    pub async fn put_volume(&self, vm: &VmId, volume: &StoredVolume) -> Result<(), Error> {
        self.put_volumes(vm, std::slice::from_ref(volume), false).await
    }

    /// Stores volumes of a VM, all of them or none; new ones go behind the others in their order. With
    /// `mark_fc` the VM is marked, too.
    pub async fn put_volumes(
        &self,
        vm: &VmId,
        volumes: &[StoredVolume],
        mark_fc: bool,
    ) -> Result<(), Error> {
        let vm = vm.to_string();
        let row = |volume: &StoredVolume| {
            let removing = volume.removing.as_ref().map(render).transpose()?;
            let (name, json) = (volume.spec.name.to_string(), render(&*volume.spec)?);
            Ok((name, json, volume.accept_new_identity, removing))
        };
        let rows = volumes.iter().map(row).collect::<Result<Vec<_>, Error>>()?;
        self.write(move |c| {
            let tx = c.transaction()?;
            if mark_fc {
                tx.execute("UPDATE vms SET fc_marked = 1 WHERE vm = ?1", [&vm])?;
            }
            for (name, json, accept, removing) in rows {
                tx.execute(
                    "INSERT INTO volumes (vm, volume, position, spec, accept_new_identity, removing)
                     VALUES (?1, ?2, (SELECT coalesce(max(position), 0) + 1 FROM volumes WHERE vm = ?1), ?3, ?4, ?5)
                     ON CONFLICT (vm, volume) DO UPDATE
                     SET spec = excluded.spec, accept_new_identity = excluded.accept_new_identity,
                         removing = excluded.removing",
                    params![vm, name, json, accept, removing],
                )?;
            }
            tx.commit()
        })
        .await
    }

    /// A volume's LUN has grown: it must have that size (bytes) from now on. Nothing else of the volume is
    /// written, and nothing where there is no such volume (any more): its removal may have come in between.
    pub async fn raise_size(&self, key: &VolumeKey, size: u64) -> Result<(), Error> {
        let (vm, name) = (key.vm.to_string(), key.volume.to_string());
        self.write(move |c| {
            c.execute(
                "UPDATE volumes SET spec = json_set(spec, '$.expect_size', json(?3))
                 WHERE vm = ?1 AND volume = ?2",
                params![vm, name, size.to_string()],
            )
        })
        .await
        .map(drop)
    }

    /// Volumes of a VM are wanted no more. They stay known until they are gone, whatever boots come in
    /// between.
    pub async fn put_removals(
        &self,
        vm: &VmId,
        removals: &[(VolumeName, RemoveOptions)],
    ) -> Result<(), Error> {
        let vm = vm.to_string();
        let row = |(name, options): &(VolumeName, RemoveOptions)| {
            Ok((name.to_string(), render(options)?))
        };
        let rows = removals.iter().map(row).collect::<Result<Vec<_>, Error>>()?;
        self.write(move |c| {
            let tx = c.transaction()?;
            for (name, json) in rows {
                tx.execute(
                    "UPDATE volumes SET removing = ?3 WHERE vm = ?1 AND volume = ?2",
                    params![vm, name, json],
                )?;
            }
            tx.commit()
        })
        .await
    }

    /// The set of a VM's volumes that was accepted last.
    pub async fn revision(&self, vm: &VmId) -> Result<Option<Revision>, Error> {
        let vm = vm.to_string();
        self.read(move |c| {
            c.query_row("SELECT revision, asked FROM revisions WHERE vm = ?1", [vm], |r| {
                Ok(Revision { number: r.get(0)?, asked: r.get(1)? })
            })
            .optional()
        })
        .await
    }

    /// Records that a set was accepted, in the place of the one before.
    pub async fn put_revision(&self, vm: &VmId, revision: &Revision) -> Result<(), Error> {
        let (vm, revision) = (vm.to_string(), revision.clone());
        self.write(move |c| {
            c.execute(
                "INSERT INTO revisions (vm, revision, asked) VALUES (?1, ?2, ?3)
                 ON CONFLICT (vm) DO UPDATE
                 SET revision = excluded.revision, asked = excluded.asked",
                params![vm, revision.number, revision.asked],
            )
        })
        .await
        .map(drop)
    }

    /// Forgets a volume, with `unmark_fc` the VM's mark as well. Its identity stays: a LUN that was swapped is
    /// noticed when a volume of that name and source comes back.
    ///
    /// That is not waited for to be on the disk: after a loss of power the volume may be there, still being removed,
    /// and its removal finds nothing left to do.
    pub async fn delete_volume(&self, key: &VolumeKey, unmark_fc: bool) -> Result<(), Error> {
        let (vm, name) = (key.vm.to_string(), key.volume.to_string());
        self.write_as(Durable::Later, move |c| {
            let tx = c.transaction()?;
            if unmark_fc {
                tx.execute("UPDATE vms SET fc_marked = 0 WHERE vm = ?1", [&vm])?;
            }
            tx.execute("DELETE FROM volumes WHERE vm = ?1 AND volume = ?2", params![vm, name])?;
            tx.commit()
        })
        .await
    }

    /// The identity proven at the first attach of this volume from this source.
    pub async fn identity(&self, key: &VolumeKey, source: &str) -> Result<Option<Wwid>, Error> {
        let (vm, name, source) = (key.vm.to_string(), key.volume.to_string(), source.to_owned());
        let found = self
            .read(move |c| {
                c.query_row(
                    "SELECT wwid FROM identities WHERE vm = ?1 AND volume = ?2 AND source = ?3",
                    params![vm, name, source],
                    |r| r.get::<_, String>(0),
                )
                .optional()
            })
            .await?;
        found.map(|text| parse(&format!("identity of {key}"), &format!("{text:?}"))).transpose()
    }

    /// What a VM's volumes are to the guest, in their order; nothing else is read of them.
    pub async fn disks(&self, vm: &VmId) -> Result<Vec<StoredDisk>, Error> {
        let vm = vm.to_string();
        self.read(move |c| {
            c.prepare(
                "SELECT volume, spec ->> '$.disk', spec ->> '$.bus',
                     removing IS NULL AND coalesce(spec ->> '$.device', '') <> 'cdrom'
                 FROM volumes WHERE vm = ?1 ORDER BY position",
            )?
            .query_map([&vm], |r| stored_disk(&vm, r))?
            .collect::<Result<Result<Vec<_>, _>, _>>()
        })
        .await?
    }

    /// The identities of all of a VM's volumes. One that is damaged is left out: whoever attaches its volume
    /// says so.
    pub async fn identities(&self, vm: &VmId) -> Result<Identities, Error> {
        let id = vm.to_string();
        let rows = self
            .read(move |c| {
                c.prepare("SELECT volume, source, wwid FROM identities WHERE vm = ?1")?
                    .query_map([id], |r| {
                        Ok((r.get::<_, String>(0)?, r.get(1)?, r.get::<_, String>(2)?))
                    })?
                    .collect::<Result<Vec<_>, _>>()
            })
            .await?;
        let read = |(name, source, wwid): (String, String, String)| {
            Some(((name.parse().ok()?, source), wwid.parse().ok()?))
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    /// Records a proven identity, and that the permission to change it is used up.
    pub async fn put_identity(
        &self,
        key: &VolumeKey,
        source: &str,
        wwid: &Wwid,
    ) -> Result<(), Error> {
        let (vm, name, source) = (key.vm.to_string(), key.volume.to_string(), source.to_owned());
        let wwid = wwid.to_string();
        self.write(move |c| {
            let tx = c.transaction()?;
            tx.execute(
                "INSERT INTO identities (vm, volume, source, wwid) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (vm, volume, source) DO UPDATE SET wwid = excluded.wwid",
                params![vm, name, source, wwid],
            )?;
            tx.execute(
                "UPDATE volumes SET accept_new_identity = 0 WHERE vm = ?1 AND volume = ?2",
                params![vm, name],
            )?;
            tx.commit()
        })
        .await
    }
}

fn parse<T: serde::de::DeserializeOwned>(what: &str, json: &str) -> Result<T, Error> {
    serde_json::from_str(json).map_err(|source| Error::Damaged { what: what.to_owned(), source })
}

fn stored_disk(vm: &str, row: &Row<'_>) -> rusqlite::Result<Result<StoredDisk, Error>> {
    let volume: String = row.get(0)?;
    let (disk, bus): (Option<String>, Option<String>) = (row.get(1)?, row.get(2)?);
    let lacks = serde_json::Error::missing_field;
    let read = disk.ok_or_else(|| lacks("disk")).and_then(|disk| {
        let bus: Bus =
            bus.ok_or_else(|| lacks("bus"))?.parse().map_err(serde_json::Error::custom)?;
        Ok((disk, bus))
    });
    let keeps_place = row.get(3)?;
    Ok(match read {
        Ok((disk, bus)) => Ok(StoredDisk { volume, disk, bus, keeps_place }),
        Err(source) => Err(Error::Damaged { what: format!("volume {vm}/{volume}"), source }),
    })
}

fn render<T: serde::Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value)
        .map_err(|source| Error::Damaged { what: "a value to be stored".into(), source })
}

#[cfg(test)]
mod tests;
