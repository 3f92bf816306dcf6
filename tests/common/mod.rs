//! A façade in memory, and a server on a temporary socket.
#![allow(dead_code, unreachable_pub)] // each test uses its own part

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use clap::Parser;
use jiff::Timestamp;
use lunplug::api::auth::AllowedPeers;
use lunplug::api::server;
use lunplug::api::v1::lunplug_service_client::LunplugServiceClient;
use lunplug::cli::{self, Cli, Screen};
use lunplug::connector::{Discovered, Hba};
use lunplug::host::listen::Socket;
use lunplug::reason::Reason;
use lunplug::spec::*;
use lunplug::types::*;
use lunplug::vm::facade::*;
use lunplug::vm::resolve::Names;
use tokio::sync::{broadcast, watch};
use tonic::transport::{Channel, Endpoint};

/// Phases, with their reasons.
type Steps = Vec<(Phase, Option<Reason>)>;

/// A façade that remembers, and moves volumes along a script.
pub struct Memory {
    vms: Mutex<BTreeMap<VmId, VmSpec>>,
    volumes: Mutex<BTreeMap<VolumeKey, VolumeStatus>>,
    changes: broadcast::Sender<Arc<VolumeStatus>>,
    /// What follows the next add or remove; a volume's own comes first.
    script: Mutex<Steps>,
    scripts: Mutex<BTreeMap<String, Steps>>,
    /// The set of a VM's volumes that was accepted last.
    revisions: Mutex<BTreeMap<VmId, Revision>>,
    /// Of the last change, of whichever volume.
    generation: AtomicU64,
}

impl Memory {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            vms: Mutex::default(),
            volumes: Mutex::default(),
            changes: broadcast::channel(16).0,
            script: Mutex::default(),
            scripts: Mutex::default(),
            revisions: Mutex::default(),
            generation: AtomicU64::new(0),
        })
    }

    pub fn script(&self, steps: &[(Phase, Option<Reason>)]) {
        *self.script.lock().unwrap() = steps.to_vec();
    }

    /// What follows the next add or remove of that volume.
    pub fn script_of(&self, volume: &str, steps: &[(Phase, Option<Reason>)]) {
        self.scripts.lock().unwrap().insert(volume.into(), steps.to_vec());
    }

    /// Changes a volume and tells it.
    pub fn publish(&self, mut status: VolumeStatus, phase: Phase, reason: Option<Reason>) {
        status.phase = phase;
        status.reason = reason;
        status.message = reason.map(|_| "it is so".into()).unwrap_or_default();
        status.since = Timestamp::now();
        let mut volumes = self.volumes.lock().unwrap();
        status.generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        if phase == Phase::Gone {
            volumes.remove(&status.key);
        } else {
            volumes.insert(status.key.clone(), status.clone());
        }
        let _ = self.changes.send(Arc::new(status));
    }

    pub fn get(&self, key: &str) -> Option<VolumeStatus> {
        let (vm, volume) = key.rsplit_once('/').unwrap();
        let key = VolumeKey { vm: vm.parse().unwrap(), volume: volume.parse().unwrap() };
        self.volumes.lock().unwrap().get(&key).cloned()
    }

    fn play(self: &Arc<Self>, key: VolumeKey) {
        let own = self.scripts.lock().unwrap().remove(key.volume.as_str());
        let steps = own.unwrap_or_else(|| std::mem::take(&mut *self.script.lock().unwrap()));
        let memory = self.clone();
        tokio::spawn(async move {
            for (phase, reason) in steps {
                tokio::task::yield_now().await;
                let status = memory.volumes.lock().unwrap().get(&key).cloned();
                memory.publish(status.expect("the script knows the volume"), phase, reason);
            }
        });
    }
}

pub struct Facade(pub Arc<Memory>);

#[async_trait]
impl Volumes for Facade {
    async fn register_vm(&self, spec: VmSpec) -> Result<Outcome<VmInfo>, Refusal> {
        let mut vms = self.0.vms.lock().unwrap();
        let info = info(&spec);
        match vms.get(&spec.id) {
            Some(known) if *known == spec => Ok(Outcome::Already(info)),
            Some(_) => Err(Refusal::new(Reason::VmExists, "it is registered otherwise")),
            None => {
                vms.insert(spec.id.clone(), spec);
                Ok(Outcome::Done(info))
            }
        }
    }

    async fn unregister_vm(&self, id: &VmId) -> Result<Outcome, Refusal> {
        if self.0.volumes.lock().unwrap().keys().any(|key| key.vm == *id) {
            return Err(Refusal::new(Reason::VmHasVolumes, format!("VM {id} has volumes")));
        }
        let known = self.0.vms.lock().unwrap().remove(id).is_some();
        Ok(if known { Outcome::Done(()) } else { Outcome::Already(()) })
    }

    async fn list_vms(&self) -> Vec<VmInfo> {
        self.0.vms.lock().unwrap().values().map(info).collect()
    }

    async fn is_registered(&self, id: &VmId) -> bool {
        self.0.vms.lock().unwrap().contains_key(id)
    }

    async fn add_volume(
        &self,
        vm: &VmId,
        spec: VolumeSpec,
        options: AddOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        if !self.0.vms.lock().unwrap().contains_key(vm) {
            return Err(Refusal::new(Reason::VmNotFound, format!("no VM {vm}")).field("vm"));
        }
        let key = VolumeKey { vm: vm.clone(), volume: spec.name.clone() };
        if let Some(known) = self.0.volumes.lock().unwrap().get(&key) {
            return if *known.spec == spec {
                Ok(Outcome::Already(known.clone()))
            } else {
                let refusal = Refusal::new(Reason::VolumeExists, format!("{key} exists"));
                Err(refusal.field("volume.name"))
            };
        }
        let status = status(key.clone(), spec);
        if !options.dry_run {
            self.0.publish(status.clone(), Phase::Pending, None);
            self.0.play(key);
        }
        Ok(Outcome::Done(status))
    }

    async fn remove_volume(
        &self,
        key: &VolumeKey,
        options: RemoveOptions,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let status = self.get_volume(key).await?;
        if options.dry_run {
            return Ok(Outcome::Done(status));
        }
        self.0.publish(status, Phase::Detaching, None);
        let status = self.get_volume(key).await?;
        self.0.play(key.clone());
        Ok(Outcome::Done(status))
    }

    async fn change_volumes(&self, vm: &VmId, wishes: Vec<Wish>) -> Result<Vec<Answer>, Refusal> {
        if !self.0.vms.lock().unwrap().contains_key(vm) {
            return Err(Refusal::new(Reason::VmNotFound, format!("no VM {vm}")).field("vm"));
        }
        let mut answers = Vec::new();
        for wish in wishes {
            answers.push(match wish {
                Wish::Add { spec, options } => self.add_volume(vm, *spec, options).await,
                Wish::Remove { name, options } => {
                    let key = VolumeKey { vm: vm.clone(), volume: name };
                    self.remove_volume(&key, options).await
                }
            });
        }
        Ok(answers)
    }

    async fn sync_volumes(&self, vm: &VmId, set: Set) -> Result<Synced, Refusal> {
        let known = self.0.revisions.lock().unwrap().get(vm).cloned();
        lunplug::vm::plan::set::admit_set(known.as_ref(), &set.revision)?;
        if !set.removals.dry_run {
            self.0.revisions.lock().unwrap().insert(vm.clone(), set.revision);
        }
        let in_set = |name: &VolumeName| {
            set.others.contains(name) || set.volumes.iter().any(|(spec, _)| spec.name == *name)
        };
        let there = self.list_volumes(Some(vm)).await;
        let there = there.iter().map(|v| v.key.volume.clone());
        let gone: Vec<_> = there.filter(|name| !in_set(name)).collect();
        let wish = |(spec, options)| Wish::Add { spec: Box::new(spec), options };
        let volumes = self.change_volumes(vm, set.volumes.into_iter().map(wish).collect()).await?;
        let wish = |name: &VolumeName| Wish::Remove { name: name.clone(), options: set.removals };
        let removed = self.change_volumes(vm, gone.iter().map(wish).collect()).await?;
        Ok(Synced { volumes, removed: gone.into_iter().zip(removed).collect() })
    }

    async fn prepare_start(
        &self,
        vm: &VmId,
        _: Start,
    ) -> Result<Vec<(VolumeName, Answer)>, Refusal> {
        if !self.0.vms.lock().unwrap().contains_key(vm) {
            return Err(Refusal::new(Reason::VmNotFound, format!("no VM {vm}")).field("vm"));
        }
        let part = |status: VolumeStatus| {
            let name = status.key.volume.clone();
            match status.phase {
                Phase::Ready => (name, Ok(Outcome::Already(status))),
                _ => {
                    let refusal = Refusal::new(Reason::PortalUnreachable, "no portal answers");
                    (name, Err(refusal.field("volume")))
                }
            }
        };
        Ok(self
            .list_volumes(Some(vm))
            .await
            .into_iter()
            .map(Arc::unwrap_or_clone)
            .map(part)
            .collect())
    }

    async fn prepare_migration_target(
        &self,
        vm: &VmId,
        place: VmPlace,
        within: Option<Duration>,
    ) -> Result<Vec<(VolumeName, Answer)>, Refusal> {
        if matches!(place, VmPlace::Host { .. }) {
            let refusal = Refusal::new(Reason::Unsupported, "only from pod to pod");
            return Err(refusal.field("place"));
        }
        self.prepare_start(vm, Start { within, domain: None }).await
    }

    async fn finish_migration(&self, vm: &VmId) -> Result<Vec<(VolumeName, Answer)>, Refusal> {
        let refusal = Refusal::new(Reason::VmRunning, format!("VM {vm} still runs"));
        Err(refusal.field("vm"))
    }

    async fn cancel_migration(&self, _: &VmId) -> Result<Outcome, Refusal> {
        Ok(Outcome::Already(()))
    }

    fn max_batch(&self) -> usize {
        4
    }

    async fn expand_volume(
        &self,
        key: &VolumeKey,
        expected: Option<u64>,
    ) -> Result<Outcome<Expanded>, Refusal> {
        let mut status = self.get_volume(key).await?;
        let device = status.device.as_mut().expect("it has one");
        let (before, size) = (device.size, expected.unwrap_or(device.size));
        device.size = size;
        self.0.publish(status.clone(), status.phase, None);
        let expanded = Expanded { status, before, size };
        Ok(if size == before { Outcome::Already(expanded) } else { Outcome::Done(expanded) })
    }

    async fn set_io_limits(
        &self,
        key: &VolumeKey,
        limits: IoLimits,
    ) -> Result<Outcome<VolumeStatus>, Refusal> {
        let mut status = self.get_volume(key).await?;
        let spec = std::sync::Arc::make_mut(&mut status.spec);
        let same = std::mem::replace(&mut spec.limits, limits) == limits;
        self.0.publish(status.clone(), status.phase, None);
        Ok(if same { Outcome::Already(status) } else { Outcome::Done(status) })
    }

    async fn get_volume(&self, key: &VolumeKey) -> Result<VolumeStatus, Refusal> {
        let found = self.0.volumes.lock().unwrap().get(key).cloned();
        found.ok_or_else(|| {
            Refusal::new(Reason::VolumeNotFound, format!("no volume {key}")).field("volume")
        })
    }

    async fn list_volumes(&self, vm: Option<&VmId>) -> Vec<Arc<VolumeStatus>> {
        let volumes = self.0.volumes.lock().unwrap();
        let wanted = volumes.values().filter(|v| vm.is_none_or(|vm| v.key.vm == *vm));
        wanted.cloned().map(Arc::new).collect()
    }

    fn watch(&self) -> broadcast::Receiver<Arc<VolumeStatus>> {
        self.0.changes.subscribe()
    }

    async fn resolve(
        &self,
        _: Option<&VolumeKey>,
        names: &BTreeSet<HostPort>,
    ) -> Result<Names, Refusal> {
        let resolved = names.iter().map(|name| match name.host() {
            "san" => Ok((name.clone(), format!("10.0.0.9:{}", name.port()).parse().unwrap())),
            _ => Err(Refusal::new(Reason::PortalNotResolved, name.to_string())),
        });
        resolved.collect()
    }

    async fn discover(
        &self,
        portal: Portal,
        with: Option<DiscoverWith>,
    ) -> Result<Vec<Discovered>, Refusal> {
        if with.is_some() {
            return Err(Refusal::new(Reason::ChapRejected, "not these"));
        }
        let target = "iqn.2001-04.com.example:a".parse().unwrap();
        Ok(vec![Discovered { target, portals: vec![portal, "[fd00::1]".parse().unwrap()] }])
    }

    async fn node(&self) -> NodeInfo {
        NodeInfo {
            name: "node-1".into(),
            version: "0.0.0".into(),
            kernel: "6.12".into(),
            boot_id: "b".into(),
            initiator_name: Some("iqn.2001-04.com.example:node-1".into()),
            multipathd: true,
            grants: vec!["cgroup2-override".into()],
            simulated: true,
            only_vm: None,
            stuck_calls: 2,
            state_trouble: None,
            max_vms: 1,
            max_volumes_per_vm: 2,
            require_wwid: false,
            hbas: vec![Hba {
                host: 6,
                wwpn: "21000024ff3d2e5c".parse().unwrap(),
                wwnn: None,
                state: "Online".into(),
                speed: "16 Gbit".into(),
                fabric: "100000051e0a1234".parse().ok(),
                port_type: String::new(),
            }],
        }
    }
}

fn info(spec: &VmSpec) -> VmInfo {
    VmInfo {
        fc_marked: false,
        spec: spec.clone(),
        state: VmState::Running,
        since: Timestamp::now(),
        volumes: 0,
        revision: Some(7),
        pod_dir: None,
        cgroup: None,
        hotplug_dir: None,
        hotplug_dir_in_pod: None,
        reason: None,
        message: String::new(),
    }
}

fn status(key: VolumeKey, spec: VolumeSpec) -> VolumeStatus {
    VolumeStatus {
        vm_needs_hba: false,
        gave_up: Vec::new(),
        key,
        spec: spec.into(),
        phase: Phase::Pending,
        reason: None,
        message: String::new(),
        since: Timestamp::now(),
        retry_at: None,
        device: Some(DeviceStatus {
            dev: "253:7".parse().unwrap(),
            wwid: "naa.6001405123456789".parse().unwrap(),
            size: 1 << 30,
            map: Some("mpatha".into()),
            paths: 2,
        }),
        target: Some("sda".into()),
        generation: 0,
    }
}

/// A server on a temporary socket, stopped with the test.
pub struct Server {
    pub memory: Arc<Memory>,
    pub socket: PathBuf,
    pub stop: watch::Sender<bool>,
    pub task: tokio::task::JoinHandle<Result<(), server::Error>>,
    _dir: tempfile::TempDir,
    _socket: Socket,
}

impl Server {
    pub fn start() -> Self {
        Self::start_for(AllowedPeers::new([], nix::unistd::geteuid().as_raw()))
    }

    pub fn start_for(peers: AllowedPeers) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let (socket, listener) = Socket::bind(&path, None).unwrap();
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        let memory = Memory::new();
        let (stop, stopping) = watch::channel(false);
        let facade = Arc::new(Facade(memory.clone()));
        let task = tokio::spawn(server::serve(facade, peers, listener, stopping));
        Self { memory, socket: path, stop, task, _dir: dir, _socket: socket }
    }

    pub async fn channel(&self) -> Channel {
        channel(&self.socket).await
    }

    pub async fn client(&self) -> LunplugServiceClient<Channel> {
        LunplugServiceClient::new(self.channel().await)
    }

    /// Runs a command line; gives exit code, stdout and stderr.
    pub async fn run(&self, line: &str) -> (u8, String, String) {
        let socket = self.socket.to_str().unwrap();
        let words = ["lunplug", "--socket", socket].into_iter().chain(line.split_whitespace());
        let cli = Cli::try_parse_from(words).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut screen = Screen { out: &mut out, err: &mut err, live: false };
        let exit = cli::run(cli, &mut screen).await;
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (exit as u8, text(out), text(err))
    }
}

/// A connection to that socket.
pub async fn channel(socket: &Path) -> Channel {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://test").connect_with_connector(connector).await.unwrap()
}

pub const URL: &str = "iscsi://10.0.0.1,10.0.0.2/iqn.2001-04.com.example:a/3";

/// The pod of the tests' VMs.
pub const POD: &str = "0e6ab16c-2c4f-4b6f-9c0f-0123456789ab";
