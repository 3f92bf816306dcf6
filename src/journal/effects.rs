//! Effects: what was begun for each volume in this boot, written before it is begun.

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Error;
use crate::cgroup::GrantRecord;
use crate::connector::Attachment;
use crate::host::lock::RunDir;
use crate::spec::{RemoveOptions, VmSpec, VolumeSpec};
use crate::step::Step;
use crate::types::{Bus, Chap, DevNum, VmId, VolumeKey};

/// A node that was, or was about to be, made in the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEffect {
    /// The device it stands for; `None` for one of an earlier boot, whose numbers say nothing now.
    pub dev: Option<DevNum>,
}

/// A disk that was, or was about to be, given to the domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskEffect {
    /// libvirt's alias of it.
    pub alias: String,
    /// Its bus.
    pub bus: Bus,
    /// Target name, once libvirt has it.
    pub target: Option<String>,
    /// The I/O thread of ours that is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u32>,
    /// Of a medium: the source by which it is known in a drive, whose target name the above is then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium: Option<String>,
}

/// A removal that was taken on. It is kept here as well as in the durable store, so that it holds
/// although that may be full, and in a file of its own, for the volume's effects may be being
/// written by an attach that it is about to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Removal {
    pub(super) boot_id: String,
    pub(super) options: RemoveOptions,
    /// What it gave up on, in words.
    #[serde(default)]
    pub(super) gave_up: Vec<String>,
}

impl Removal {
    /// Adds what it does not say yet; whether there was any.
    fn add(&mut self, more: &[String]) -> bool {
        let before = self.gave_up.len();
        for what in more {
            if !self.gave_up.contains(what) {
                self.gave_up.push(what.clone());
            }
        }
        self.gave_up.len() > before
    }
}

/// Credentials that came with a request.
#[derive(Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    chap: Chap,
}

/// What was begun for one volume. An absent field was not begun, or is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effects {
    /// The boot in which this was written.
    boot_id: String,
    /// The VM's incarnation (pod UID; empty on a plain host): another pod of the same name never
    /// inherits these.
    pub incarnation: String,
    /// The volume as it was when it was begun: a detach runs from this, whatever was asked since.
    pub spec: VolumeSpec,
    /// The host's side was begun; `device` says how far it came.
    pub host: bool,
    /// The verified device.
    pub device: Option<Attachment>,
    /// The node.
    pub node: Option<NodeEffect>,
    /// The grant.
    pub grant: Option<GrantRecord>,
    /// The disk.
    pub disk: Option<DiskEffect>,
    /// The last step that was begun, on the way back that was done, of those that the handler makes
    /// itself. For people.
    #[serde(default)]
    pub step: Option<Step>,
}

impl Effects {
    /// The boot in which this was written.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The same of another incarnation.
    #[must_use]
    pub fn of(self, incarnation: &str) -> Self {
        Self { incarnation: incarnation.to_owned(), ..self }
    }

    /// Whether nothing is left to undo.
    pub fn is_empty(&self) -> bool {
        let Self { host, device, node, grant, disk, .. } = self;
        !host && device.is_none() && node.is_none() && grant.is_none() && disk.is_none()
    }
}

/// A VM's start that was announced: until then its volumes are kept ready for it.
#[derive(Serialize, Deserialize)]
struct Announced {
    boot_id: String,
    until: Timestamp,
}

/// A migration that was prepared on this node: where the VM is to run next.
#[derive(Serialize, Deserialize)]
struct Migration {
    boot_id: String,
    vm: VmSpec,
}

/// The store of effects. Clones share it.
#[derive(Clone)]
pub struct EffectsStore {
    run: Arc<dyn RunDir>,
    /// The directory of volumes' effects.
    effects: &'static str,
}

impl EffectsStore {
    /// A store in `run`.
    pub fn new(run: Arc<dyn RunDir>) -> Self {
        Self { run, effects: "effects" }
    }

    /// The same for effects in the pods to which VMs are about to move.
    #[must_use]
    pub fn incoming(&self) -> Self {
        Self { run: self.run.clone(), effects: "incoming" }
    }

    /// A fresh value for a volume that is about to be begun.
    pub fn begin(&self, incarnation: &str, spec: &VolumeSpec) -> Effects {
        Effects {
            boot_id: self.run.boot_id().to_owned(),
            incarnation: incarnation.to_owned(),
            spec: spec.clone(),
            host: false,
            device: None,
            node: None,
            grant: None,
            disk: None,
            step: None,
        }
    }

    /// Writes a volume's effects. Called before each effect, and after each that was undone.
    pub async fn put(&self, key: &VolumeKey, effects: &Effects) -> Result<(), Error> {
        self.write(self.file(key), effects).await
    }

    /// A volume's effects of this boot.
    pub async fn get(&self, key: &VolumeKey) -> Result<Option<Effects>, Error> {
        self.read(self.file(key), |effects: &Effects| &effects.boot_id).await
    }

    /// The same of several volumes, read in one.
    pub async fn get_each(&self, keys: &[VolumeKey]) -> Vec<Result<Option<Effects>, Error>> {
        let files: Vec<String> = keys.iter().map(|key| self.file(key)).collect();
        let loaded = self.run.load_each(&files).await;
        let mut found = Vec::with_capacity(keys.len());
        for (file, loaded) in files.into_iter().zip(loaded) {
            found.push(self.decided(file, loaded, |effects: &Effects| &effects.boot_id).await);
        }
        found
    }

    /// Forgets a volume's effects: all are undone.
    pub async fn delete(&self, key: &VolumeKey) -> Result<(), Error> {
        self.forget(self.file(key)).await
    }

    /// Notes that a volume's removal was taken on, and what that gives up on.
    pub async fn put_removal(
        &self,
        key: &VolumeKey,
        options: RemoveOptions,
        gave_up: &[String],
    ) -> Result<(), Error> {
        let boot_id = self.run.boot_id().to_owned();
        let mut mark = Removal { boot_id, options, gave_up: self.gave_up(key).await? };
        mark.add(gave_up);
        self.write(removal(key), &mark).await
    }

    /// Adds to what a removal that was taken on gave up on. Kept, so that a successor can tell it.
    pub async fn add_gave_up(&self, key: &VolumeKey, more: &[String]) -> Result<(), Error> {
        if more.is_empty() {
            return Ok(());
        }
        let found = self.read(removal(key), |r: &Removal| &r.boot_id).await?;
        let Some(mut mark) = found else { return Ok(()) };
        if mark.add(more) { self.write(removal(key), &mark).await } else { Ok(()) }
    }

    /// What a removal has given up on so far.
    pub async fn gave_up(&self, key: &VolumeKey) -> Result<Vec<String>, Error> {
        let found = self.read(removal(key), |r: &Removal| &r.boot_id).await?;
        Ok(found.map(|r| r.gave_up).unwrap_or_default())
    }

    /// The removal that was taken on in this boot.
    pub async fn removal(&self, key: &VolumeKey) -> Result<Option<RemoveOptions>, Error> {
        let found = self.read(removal(key), |r: &Removal| &r.boot_id).await?;
        Ok(found.map(|r| r.options))
    }

    /// Forgets a removal: it is carried through, and the durable store knows.
    pub async fn delete_removal(&self, key: &VolumeKey) -> Result<(), Error> {
        self.forget(removal(key)).await
    }

    /// Keeps the credentials that came with a volume's request, for this boot: they are to be had
    /// again by nobody but whoever asked for the volume.
    pub async fn put_chap(&self, key: &VolumeKey, chap: &Chap) -> Result<(), Error> {
        let kept = Kept { boot_id: self.run.boot_id().to_owned(), chap: chap.clone() };
        // Of its full size from the start: one that grew would leave copies behind.
        let mut json = Zeroizing::new(Vec::with_capacity(4096));
        let what = secret(key);
        serde_json::to_writer(&mut *json, &kept)
            .map_err(|source| Error::Damaged { what: what.clone(), source })?;
        self.run.store(&what, &json).await.map_err(|source| Error::Io { what, source })
    }

    /// The credentials that are kept of a volume.
    pub async fn chap(&self, key: &VolumeKey) -> Result<Option<Chap>, Error> {
        let found = self.read(secret(key), |kept: &Kept| &kept.boot_id).await?;
        Ok(found.map(|kept| kept.chap))
    }

    /// The volumes of a VM of which credentials are kept.
    pub async fn kept_chaps(&self, vm: &VmId) -> Result<BTreeSet<VolumeKey>, Error> {
        self.names(vm, secrets(vm)).await
    }

    /// Forgets them.
    pub async fn delete_chap(&self, key: &VolumeKey) -> Result<(), Error> {
        self.forget(secret(key)).await
    }

    /// Notes that a VM is about to start, and until when that is believed.
    pub async fn put_start(&self, vm: &VmId, until: Timestamp) -> Result<(), Error> {
        let boot_id = self.run.boot_id().to_owned();
        self.write(announced(vm), &Announced { boot_id, until }).await
    }

    /// Until when a VM's start was announced, in this boot.
    pub async fn start(&self, vm: &VmId) -> Result<Option<Timestamp>, Error> {
        let found = self.read(announced(vm), |start: &Announced| &start.boot_id).await?;
        Ok(found.map(|start| start.until))
    }

    /// Forgets an announced start.
    pub async fn delete_start(&self, vm: &VmId) -> Result<(), Error> {
        self.forget(announced(vm)).await
    }

    /// Notes where a VM is about to move.
    pub async fn put_migration(&self, vm: &VmSpec) -> Result<(), Error> {
        let boot_id = self.run.boot_id().to_owned();
        self.write(migration(&vm.id), &Migration { boot_id, vm: vm.clone() }).await
    }

    /// Where a VM is about to move, noted in this boot.
    pub async fn migration(&self, vm: &VmId) -> Result<Option<VmSpec>, Error> {
        let found = self.read(migration(vm), |m: &Migration| &m.boot_id).await?;
        Ok(found.map(|m| m.vm))
    }

    /// Forgets that a VM is about to move.
    pub async fn delete_migration(&self, vm: &VmId) -> Result<(), Error> {
        self.forget(migration(vm)).await
    }

    async fn write<T: Serialize>(&self, what: String, value: &T) -> Result<(), Error> {
        let json = serde_json::to_vec(value)
            .map_err(|source| Error::Damaged { what: what.clone(), source })?;
        self.run.store(&what, &json).await.map_err(|source| Error::Io { what, source })
    }

    /// Reads a file; one of an earlier boot is void, and removed.
    async fn read<T: DeserializeOwned>(
        &self,
        what: String,
        boot_of: impl Fn(&T) -> &String + Send,
    ) -> Result<Option<T>, Error> {
        let loaded = self.run.load(&what).await;
        self.decided(what, loaded, boot_of).await
    }

    async fn decided<T: DeserializeOwned>(
        &self,
        what: String,
        loaded: std::io::Result<Option<Vec<u8>>>,
        boot_of: impl Fn(&T) -> &String + Send,
    ) -> Result<Option<T>, Error> {
        let io = |source| Error::Io { what: what.clone(), source };
        let Some(bytes) = loaded.map_err(io)? else { return Ok(None) };
        let bytes = Zeroizing::new(bytes);
        let value: T = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Damaged { what: what.clone(), source })?;
        if boot_of(&value) == self.run.boot_id() {
            return Ok(Some(value));
        }
        self.run.remove(&what).await.map_err(io)?;
        Ok(None)
    }

    fn dir(&self, vm: &VmId) -> String {
        format!("{}/{}/{}", self.effects, vm.namespace(), vm.name())
    }

    fn file(&self, key: &VolumeKey) -> String {
        format!("{}/{}.json", self.dir(&key.vm), key.volume)
    }

    async fn forget(&self, what: String) -> Result<(), Error> {
        self.run.remove(&what).await.map_err(|source| Error::Io { what, source })
    }

    /// The volumes of a VM for which something was begun or a removal taken on.
    pub async fn volumes(&self, vm: &VmId) -> Result<BTreeSet<VolumeKey>, Error> {
        let mut keys = self.names(vm, self.dir(vm)).await?;
        keys.extend(self.names(vm, removals(vm)).await?);
        Ok(keys)
    }

    /// The volumes of a VM for which something was begun.
    pub async fn volumes_begun(&self, vm: &VmId) -> Result<BTreeSet<VolumeKey>, Error> {
        self.names(vm, self.dir(vm)).await
    }

    async fn names(&self, vm: &VmId, what: String) -> Result<BTreeSet<VolumeKey>, Error> {
        let names = self.run.list(&what).await.map_err(|source| Error::Io { what, source })?;
        let key = |name: &str| {
            let volume = name.strip_suffix(".json")?.parse().ok()?;
            Some(VolumeKey { vm: vm.clone(), volume })
        };
        Ok(names.iter().filter_map(|name| key(name)).collect())
    }
}

fn announced(vm: &VmId) -> String {
    format!("starts/{}/{}.json", vm.namespace(), vm.name())
}

fn migration(vm: &VmId) -> String {
    format!("migrations/{}/{}.json", vm.namespace(), vm.name())
}

fn removals(vm: &VmId) -> String {
    format!("removals/{}/{}", vm.namespace(), vm.name())
}

fn removal(key: &VolumeKey) -> String {
    format!("{}/{}.json", removals(&key.vm), key.volume)
}

fn secrets(vm: &VmId) -> String {
    format!("secrets/{}/{}", vm.namespace(), vm.name())
}

fn secret(key: &VolumeKey) -> String {
    format!("{}/{}.json", secrets(&key.vm), key.volume)
}
