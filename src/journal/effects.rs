//! Effects: what was begun for each volume in this boot, written before it is begun.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::cgroup::GrantRecord;
use crate::connector::Attachment;
use crate::host::lock::RunDir;
use crate::spec::{RemoveOptions, VolumeSpec};
use crate::types::{Bus, DevNum, VmId, VolumeKey};

/// A node that was, or was about to be, made in the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEffect {
    /// The device it stands for.
    pub dev: DevNum,
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
}

/// A removal that was begun and has to be carried through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// How.
    pub options: RemoveOptions,
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
    /// The removal. Here as well as in the durable store: it holds although that may be full.
    pub removal: Option<Removal>,
}

impl Effects {
    /// Whether nothing is left to undo.
    pub fn is_empty(&self) -> bool {
        let Self { host, device, node, grant, disk, .. } = self;
        !host && device.is_none() && node.is_none() && grant.is_none() && disk.is_none()
    }
}

/// The store of effects. Clones share it.
#[derive(Clone)]
pub struct EffectsStore(Arc<dyn RunDir>);

impl EffectsStore {
    /// A store in `run`.
    pub fn new(run: Arc<dyn RunDir>) -> Self {
        Self(run)
    }

    /// A fresh value for a volume that is about to be begun.
    pub fn begin(&self, incarnation: &str, spec: &VolumeSpec) -> Effects {
        Effects {
            boot_id: self.0.boot_id().to_owned(),
            incarnation: incarnation.to_owned(),
            spec: spec.clone(),
            host: false,
            device: None,
            node: None,
            grant: None,
            disk: None,
            removal: None,
        }
    }

    /// Writes a volume's effects. Called before each effect, and after each that was undone.
    pub async fn put(&self, key: &VolumeKey, effects: &Effects) -> Result<(), Error> {
        let what = file(key);
        let json = serde_json::to_vec(effects)
            .map_err(|source| Error::Damaged { what: what.clone(), source })?;
        self.0.store(&what, &json).await.map_err(|source| Error::Io { what, source })
    }

    /// A volume's effects of this boot; those of an earlier one are void and removed.
    pub async fn get(&self, key: &VolumeKey) -> Result<Option<Effects>, Error> {
        let what = file(key);
        let io = |source| Error::Io { what: what.clone(), source };
        let Some(bytes) = self.0.load(&what).await.map_err(io)? else { return Ok(None) };
        let effects: Effects = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Damaged { what: what.clone(), source })?;
        if effects.boot_id == self.0.boot_id() {
            return Ok(Some(effects));
        }
        self.0.remove(&what).await.map_err(io)?;
        Ok(None)
    }

    /// Forgets a volume's effects: all are undone.
    pub async fn delete(&self, key: &VolumeKey) -> Result<(), Error> {
        let what = file(key);
        self.0.remove(&what).await.map_err(|source| Error::Io { what, source })
    }

    /// The volumes of a VM for which something was begun.
    pub async fn volumes(&self, vm: &VmId) -> Result<Vec<VolumeKey>, Error> {
        let what = dir(vm);
        let names = self.0.list(&what).await.map_err(|source| Error::Io { what, source })?;
        let key = |name: &str| {
            let volume = name.strip_suffix(".json")?.parse().ok()?;
            Some(VolumeKey { vm: vm.clone(), volume })
        };
        Ok(names.iter().filter_map(|name| key(name)).collect())
    }
}

fn dir(vm: &VmId) -> String {
    format!("effects/{}/{}", vm.namespace(), vm.name())
}

fn file(key: &VolumeKey) -> String {
    format!("{}/{}.json", dir(&key.vm), key.volume)
}
