//! All VMs of a node: their handlers, by name; and the node itself.

mod moves;
mod served;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use jiff::Timestamp;
use tokio::sync::{Mutex, broadcast};

use super::actor::Tools;
use super::backoff::Backoff;
use super::credentials;
use super::facade::{
    Answer, DiscoverWith, Expanded, NodeInfo, Refusal, Set, Start, Synced, VmInfo, VmState,
    Volumes, Wish,
};
use super::failure::Failure;
use super::handler::Handler;
use super::plan::Rules;
use super::plan::fc::AfterLast;
use super::publish::Board;
use super::resolve::{self, Names};
use super::ways::{Host, Ways};
use crate::connector::bounded::bounded_rundir;
use crate::connector::{Authentication, Discovered, Hba};
use crate::host::lock::{LockError, LockGuard};
use crate::host::storage::StorageDoors;
use crate::journal::{Desired, EffectsStore};
use crate::reason::Reason;
use crate::spec::{AddOptions, Phase, RemoveOptions, VmPlace, VmSpec, VolumeSpec, VolumeStatus};
use crate::types::{HostPort, IoLimits, Outcome, Portal, VmId, VolumeKey, VolumeName};
use served::{Served, may_take_over, unserved_info};

/// What a registry is told.
#[derive(Debug, Clone)]
pub struct RegistrySettings {
    /// What is told of the node, less what is asked of the host each time.
    pub node: NodeInfo,
    /// How often a VM's volumes are looked at when nothing happens.
    pub look_interval: Duration,
    /// A volume whose LUN has grown follows it unasked.
    pub auto_expand: bool,
    /// There is a qemu-pr-helper for persistent reservations.
    pub reservations: bool,
    /// What becomes of a VM's mark once its last Fibre Channel volume is gone.
    pub after_last_fc: AfterLast,
    /// When a volume in trouble is tried again.
    pub backoff: Backoff,
    /// How long an announced start of a VM is waited for, unless the request says.
    pub start: Duration,
}

/// How long a look at one VM may take when all are listed.
const LOOK: Duration = Duration::from_secs(5);
/// How long a call on the effects under /run may take: a file system in memory.
const EFFECTS: Duration = Duration::from_secs(5);
/// How long a VM's lock is waited for: a predecessor that is just ending still has it.
const TAKE_OVER: Duration = Duration::from_secs(5);

/// All VMs that this process serves.
pub struct Registry {
    settings: RegistrySettings,
    host: Host,
    storage: StorageDoors,
    desired: Desired,
    board: Board,
    vms: std::sync::Mutex<BTreeMap<VmId, Arc<Served>>>,
    /// VMs that are stored but could not be taken up, and why and since when.
    unserved: std::sync::Mutex<BTreeMap<VmId, (VmSpec, Failure, Timestamp)>>,
    /// The lock of a sidecar's VM from its start on, until that is registered.
    reserved: std::sync::Mutex<Option<Box<dyn LockGuard>>>,
    /// Held while a VM is registered or unregistered; requests to others go on meanwhile.
    changing: Mutex<()>,
}

impl Registry {
    /// Those that can be read.
    async fn hbas(&self) -> Vec<Hba> {
        self.host.connector.hbas().await.unwrap_or_else(|error| {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the HBAs could not be read");
            Vec::new()
        })
    }

    /// Takes up every VM that is stored. One that cannot be (another process serves it, its state is
    /// damaged) is told, listed, and not served; a store that cannot be read at all stops the start.
    pub async fn start(
        settings: RegistrySettings,
        host: Host,
        storage: StorageDoors,
        desired: Desired,
    ) -> Result<Arc<Self>, Failure> {
        let stored = desired.vms().await?;
        let registry = Arc::new(Self {
            settings,
            host,
            storage,
            desired,
            board: Board::default(),
            vms: std::sync::Mutex::default(),
            unserved: std::sync::Mutex::default(),
            reserved: std::sync::Mutex::default(),
            changing: Mutex::default(),
        });
        if let Some(only) = &registry.settings.node.only_vm {
            let lock = registry.lock(only).await?;
            *registry.reserved() = Some(lock);
        }
        let mut wanted = Vec::new();
        for stored in stored {
            match stored {
                Ok(spec) if registry.serves(&spec.id) => wanted.push(spec),
                Ok(_) => {}
                // Its volumes go on as they are; nobody else has to suffer for it.
                Err((vm, error)) => {
                    let why = Failure::from(error).message;
                    tracing::error!(
                        vm,
                        why,
                        "a VM's stored registration is damaged: it is not served"
                    );
                }
            }
        }
        let started = join_all(wanted.into_iter().map(|spec| async {
            let result = registry.serve(spec.clone()).await;
            (spec, result)
        }));
        for (spec, served) in started.await {
            match served {
                Ok(served) => drop(registry.vms().insert(spec.id, Arc::new(served))),
                Err(failure) => {
                    tracing::error!(vm = %spec.id, reason = %failure.reason, why = failure.message, "a VM is not served");
                    registry.unserved().insert(spec.id.clone(), (spec, failure, Timestamp::now()));
                }
            }
        }
        Ok(registry)
    }

    /// Ends all handlers, and then the use of the store; no volume is detached. What still runs after
    /// `grace` is left behind, and so is a store whose disk hangs.
    pub async fn stop(&self, grace: Duration) {
        let vms = std::mem::take(&mut *self.vms());
        join_all(vms.values().map(|served| served.handler.stop(grace))).await;
        let _ = tokio::time::timeout(grace, self.desired.close()).await;
    }

    fn vms(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, Arc<Served>>> {
        // Held for single changes of the map only.
        self.vms.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn unserved(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, (VmSpec, Failure, Timestamp)>> {
        self.unserved.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn reserved(&self) -> std::sync::MutexGuard<'_, Option<Box<dyn LockGuard>>> {
        self.reserved.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn serves(&self, id: &VmId) -> bool {
        self.settings.node.only_vm.as_ref().is_none_or(|only| only == id)
    }

    fn effects(&self) -> EffectsStore {
        EffectsStore::new(bounded_rundir(self.storage.rundir.clone(), EFFECTS))
    }

    fn ways(&self, spec: VmSpec) -> Ways {
        self.ways_over(spec, self.effects())
    }

    fn ways_over(&self, spec: VmSpec, effects: EffectsStore) -> Ways {
        let (board, desired) = (self.board.clone(), self.desired.clone());
        Ways::new(spec, self.host.clone(), board, desired, effects)
    }

    async fn serve(&self, spec: VmSpec) -> Result<Served, Failure> {
        let id = spec.id.clone();
        let reserved = self.reserved().take();
        let lock = match reserved {
            Some(lock) => lock,
            None => self.lock(&id).await?,
        };
        let incoming = self.resume_move(&spec).await?;
        let ways = Arc::new(self.ways(spec));
        let tools = Tools {
            tracker: self.storage.tracker.clone(),
            steps: ways.clone(),
            board: self.board.clone(),
            desired: self.desired.clone(),
            effects: self.effects(),
            backoff: self.settings.backoff,
            look_interval: self.settings.look_interval,
            auto_expand: self.settings.auto_expand,
            rules: Rules {
                max_volumes: self.settings.node.max_volumes_per_vm as usize,
                require_wwid: self.settings.node.require_wwid,
                reservations: self.settings.reservations,
                fc: ways.spec().fc,
                after_last_fc: self.settings.after_last_fc,
            },
            moving: incoming.is_some(),
        };
        let handler = Handler::start(id, tools).await?;
        let since = std::sync::Mutex::new((VmState::Unknown, Timestamp::now()));
        Ok(Served { ways, incoming: Mutex::new(incoming), handler, since, _lock: lock })
    }

    async fn lock(&self, id: &VmId) -> Result<Box<dyn LockGuard>, Failure> {
        let name = format!("vms/{}/{}", id.namespace(), id.name());
        self.storage.rundir.lock(&name, TAKE_OVER).await.map_err(|error| {
            let reason = match &error {
                LockError::TimedOut { .. } => Reason::VmServedElsewhere,
                LockError::Io { .. } => Reason::StateStoreFailed,
            };
            let what = match &error {
                LockError::TimedOut { .. } => {
                    format!("VM {id} is served by another lunplugd on this node")
                }
                LockError::Io { .. } => Failure::of(reason, &error).message,
            };
            Failure::new(reason, what)
        })
    }

    fn served(&self, id: &VmId) -> Result<Arc<Served>, Refusal> {
        let found = self.vms().get(id).cloned();
        found.ok_or_else(|| {
            if let Some((_, failure, _)) = self.unserved().get(id) {
                return failure.clone().into();
            }
            let message = match &self.settings.node.only_vm {
                Some(only) if only != id => {
                    format!("this lunplugd serves only VM {only}, not {id}")
                }
                _ => format!("VM {id} is not registered on this node"),
            };
            Refusal::new(Reason::VmNotFound, message).field("vm")
        })
    }
}

#[async_trait]
impl Volumes for Registry {
    async fn register_vm(&self, spec: VmSpec) -> Result<Outcome<VmInfo>, Refusal> {
        if let Some(only) = self.settings.node.only_vm.as_ref().filter(|only| **only != spec.id) {
            let message = format!("this lunplugd serves only VM {only}, not {}", spec.id);
            return Err(Refusal::new(Reason::Unsupported, message).field("vm"));
        }
        let changing = self.changing.lock().await;
        if let Some((_, failure, _)) = self.unserved().get(&spec.id) {
            return Err(failure.clone().into());
        }
        let old = self.vms().get(&spec.id).cloned();
        let mut has_volumes = false;
        if let Some(served) = &old {
            if *served.ways.spec() == spec {
                drop(changing);
                return Ok(Outcome::Already(served.info().await));
            }
            served.stays()?;
            has_volumes = served.handler.count().await? > 0;
            if has_volumes {
                may_take_over(&served.ways, &spec).await?;
            }
        } else if self.vms().len() >= self.settings.node.max_vms as usize {
            let most = self.settings.node.max_vms;
            let message = format!("this node has {most} VMs, as many as limits.max_vms allows");
            return Err(Refusal::new(Reason::LimitReached, message));
        }
        // Checked before the old registration goes, so that a refusal changes nothing.
        self.ways(spec.clone()).check().await?;
        self.desired.put_vm(&spec).await.map_err(Failure::from)?;
        if let Some(old) = old {
            old.handler.stop(Duration::ZERO).await;
            self.vms().remove(&spec.id);
        }
        let served = match self.serve(spec.clone()).await {
            Ok(served) => Arc::new(served),
            Err(failure) if has_volumes => {
                // They are still wanted: the next start takes them up.
                let unserved = (spec.clone(), failure.clone(), Timestamp::now());
                self.unserved().insert(spec.id, unserved);
                return Err(failure.into());
            }
            Err(failure) => {
                self.desired.delete_vm(&spec.id).await.map_err(Failure::from)?;
                return Err(failure.into());
            }
        };
        tracing::info!(vm = %spec.id, domain = spec.domain, "VM registered");
        self.vms().insert(spec.id, served.clone());
        drop(changing);
        Ok(Outcome::Done(served.info().await))
    }

    async fn unregister_vm(&self, id: &VmId) -> Result<Outcome, Refusal> {
        let _changing = self.changing.lock().await;
        let served = match self.served(id) {
            Ok(served) => served,
            Err(refusal) if refusal.reason == Reason::VmNotFound => {
                return Ok(Outcome::Already(()));
            }
            Err(refusal) => return Err(refusal),
        };
        served.stays()?;
        let volumes = served.handler.count().await?;
        if volumes > 0 {
            let message = format!("VM {id} still has volumes: {volumes}");
            return Err(Refusal::new(Reason::VmHasVolumes, message).field("vm"));
        }
        // Nothing is added from here on.
        served.handler.stop(Duration::ZERO).await;
        self.vms().remove(id);
        if let Err(error) = self.desired.delete_vm(id).await {
            // It is registered still, so it is served on.
            let spec = served.ways.spec().clone();
            drop(served);
            match self.serve(spec.clone()).await {
                Ok(served) => drop(self.vms().insert(spec.id, Arc::new(served))),
                Err(failure) => {
                    let unserved = (spec, failure, Timestamp::now());
                    self.unserved().insert(id.clone(), unserved);
                }
            }
            return Err(Failure::from(error).into());
        }
        for failed in self.board.list(Some(id)) {
            self.board.close(&failed.key);
        }
        if let VmPlace::Host { .. } = served.ways.spec().place {
            self.host.pods.dirs.drop_host_nodes(id).await;
        }
        tracing::info!(vm = %id, "VM unregistered");
        Ok(Outcome::Done(()))
    }

    async fn list_vms(&self) -> Vec<VmInfo> {
        let vms: Vec<_> = self.vms().values().cloned().collect();
        let mut infos = join_all(vms.iter().map(|served| served.info())).await;
        infos.extend(self.unserved().values().map(unserved_info));
        infos.sort_by(|a, b| a.spec.id.cmp(&b.spec.id));
        infos
    }

    async fn is_registered(&self, id: &VmId) -> bool {
        self.vms().contains_key(id) || self.unserved().contains_key(id)
    }

    async fn add_volume(
        &self,
        vm: &VmId,
        spec: VolumeSpec,
        options: AddOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        self.served(vm)?.handler.add(spec, options).await
    }

    async fn remove_volume(
        &self,
        key: &VolumeKey,
        options: RemoveOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let served = self.served(&key.vm)?;
        served.handler.remove(key.volume.clone(), options).await
    }

    async fn change_volumes(&self, vm: &VmId, wishes: Vec<Wish>) -> Result<Vec<Answer>, Refusal> {
        self.served(vm)?.handler.change(wishes).await
    }

    async fn sync_volumes(&self, vm: &VmId, set: Set) -> Result<Synced, Refusal> {
        self.served(vm)?.handler.sync(set).await
    }

    async fn prepare_start(
        &self,
        vm: &VmId,
        start: Start,
    ) -> Result<Vec<(VolumeName, Answer)>, Refusal> {
        Registry::prepare_start(self, vm, start).await
    }

    async fn prepare_migration_target(
        &self,
        vm: &VmId,
        place: VmPlace,
        within: Option<Duration>,
    ) -> Result<Vec<(VolumeName, Answer)>, Refusal> {
        let within = within.unwrap_or(self.settings.start);
        self.prepare_target(vm, place, within).await
    }

    async fn finish_migration(&self, vm: &VmId) -> Result<Vec<(VolumeName, Answer)>, Refusal> {
        self.finish_move(vm).await
    }

    async fn cancel_migration(&self, vm: &VmId) -> Result<Outcome, Refusal> {
        self.cancel_move(vm).await
    }

    fn max_batch(&self) -> usize {
        self.settings.node.max_volumes_per_vm as usize
    }

    async fn expand_volume(
        &self,
        key: &VolumeKey,
        expected: Option<u64>,
    ) -> Result<Outcome<Expanded>, Refusal> {
        self.served(&key.vm)?.handler.expand(key.volume.clone(), expected).await
    }

    async fn set_io_limits(
        &self,
        key: &VolumeKey,
        limits: IoLimits,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        self.served(&key.vm)?.handler.set_limits(key.volume.clone(), limits).await
    }

    async fn get_volume(&self, key: &VolumeKey) -> Result<VolumeStatus, Refusal> {
        self.served(&key.vm)?;
        self.board.get(key).ok_or_else(|| {
            let message = format!("VM {} has no volume {}", key.vm, key.volume);
            Refusal::new(Reason::VolumeNotFound, message).field("volume")
        })
    }

    async fn list_volumes(&self, vm: Option<&VmId>) -> Vec<Arc<VolumeStatus>> {
        self.board.list(vm)
    }

    fn watch(&self) -> broadcast::Receiver<Arc<VolumeStatus>> {
        self.board.watch()
    }

    async fn resolve(
        &self,
        volume: Option<&VolumeKey>,
        names: &BTreeSet<HostPort>,
    ) -> Result<Names, Refusal> {
        let known = volume.and_then(|key| self.board.get(key));
        // A failed add left nothing: it starts anew.
        let recorded = known.filter(|status| status.phase != Phase::Failed);
        let recorded = recorded.map(|status| status.spec.names.clone()).unwrap_or_default();
        let (resolver, limit) = (&*self.storage.resolver, self.host.settings.resolve);
        Ok(resolve::resolve(resolver, limit, names, recorded).await?)
    }

    async fn discover(
        &self,
        portal: Portal,
        with: Option<DiscoverWith>,
    ) -> Result<Vec<Discovered>, Refusal> {
        let authentication = match with {
            None => Authentication::None,
            Some(DiscoverWith::Chap(chap)) => Authentication::Chap(chap),
            Some(DiscoverWith::Secret(name)) => {
                credentials::secret(&*self.host.secrets, &name, credentials::DISCOVERY).await
            }
        };
        let found = self.host.connector.discover(portal, authentication).await;
        Ok(found.map_err(Failure::from)?)
    }

    async fn node(&self) -> NodeInfo {
        let asked = tokio::time::timeout(LOOK, self.storage.multipathd.ask("show daemon")).await;
        let multipathd = asked.is_ok_and(|answer| answer.is_ok());
        let libvirt = u64::try_from(self.host.hypervisor.stuck_calls()).unwrap_or(u64::MAX);
        NodeInfo {
            multipathd,
            stuck_calls: (self.storage.stuck)().saturating_add(libvirt),
            state_trouble: self.desired.trouble().await,
            hbas: tokio::time::timeout(LOOK, self.hbas()).await.unwrap_or_default(),
            ..self.settings.node.clone()
        }
    }
}
