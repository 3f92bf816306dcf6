//! Who asks the daemon, over its socket.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use lunplug::api::convert::{wire_spec, wire_vm_id};
use lunplug::api::v1::lunplug_service_client::LunplugServiceClient;
use lunplug::api::v1::watch_volumes_response::Event;
use lunplug::api::v1::{self, Phase};
use prost::Message as _;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use crate::common::{vm, vm_spec, volume};

type Client = LunplugServiceClient<Channel>;

/// As many connections that a request of each VM is under way at once: the server takes 64 on each.
const CONNECTIONS: usize = 16;

async fn connect(socket: &Path) -> Client {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let channel =
        Endpoint::from_static("http://bench").connect_with_connector(connector).await.unwrap();
    LunplugServiceClient::new(channel).max_decoding_message_size(usize::MAX)
}

/// Some connections that share the requests.
pub struct Clients {
    connections: Vec<Client>,
}

impl Clients {
    pub async fn connect(socket: &Path) -> Self {
        let connections = join_all((0..CONNECTIONS).map(|_| connect(socket))).await;
        Self { connections }
    }

    fn of(&self, vm: u32) -> Client {
        self.connections[vm as usize % CONNECTIONS].clone()
    }

    pub async fn register(&self, vms: u32) {
        let register = |n: u32| async move {
            let spec = vm_spec(n);
            let lunplug::spec::VmPlace::Pod { uid, .. } = spec.place else { unreachable!() };
            let pod = v1::PodPlace { uid, ..v1::PodPlace::default() };
            let vm = v1::VmSpec {
                id: Some(wire_vm_id(&spec.id)),
                domain: spec.domain,
                place: Some(v1::vm_spec::Place::Pod(pod)),
                ..v1::VmSpec::default()
            };
            self.of(n).register_vm(v1::RegisterVmRequest { vm: Some(vm) }).await.unwrap();
        };
        stream::iter(0..vms).for_each_concurrent(64, register).await;
    }

    /// Adds these volumes to each VM, a batch for each.
    pub async fn add_to_each(&self, vms: u32, numbers: Range<u32>) {
        let add = |n: u32| {
            let spec = |number| Some(wire_spec(&volume(n, number)));
            let entry = |number| v1::VolumeEntry { spec: spec(number), ..Default::default() };
            let request = v1::AddVolumesRequest {
                vm: Some(wire_vm_id(&vm(n))),
                volumes: numbers.clone().map(entry).collect(),
                dry_run: false,
            };
            async move {
                let results = self.of(n).add_volumes(request).await.unwrap().into_inner().results;
                assert!(results.iter().all(|r| r.changed), "{results:?}");
            }
        };
        stream::iter(0..vms).for_each_concurrent(64, add).await;
    }

    /// Adds this volume to each VM, all at once; returns how long the slowest answer took.
    pub async fn add_one_to_each(&self, vms: u32, number: u32) -> Duration {
        let add = |n: u32| async move {
            let begin = Instant::now();
            let request = v1::AddVolumeRequest {
                vm: Some(wire_vm_id(&vm(n))),
                volume: Some(wire_spec(&volume(n, number))),
                ..Default::default()
            };
            assert!(self.of(n).add_volume(request).await.unwrap().into_inner().changed);
            begin.elapsed()
        };
        join_all((0..vms).map(add)).await.into_iter().max().unwrap_or_default()
    }

    pub async fn remove_one_of_each(&self, vms: u32, number: u32) {
        let remove = |n: u32| async move {
            let volume = volume(n, number).name.to_string();
            let request = v1::RemoveVolumeRequest {
                vm: Some(wire_vm_id(&vm(n))),
                volume,
                ..Default::default()
            };
            self.of(n).remove_volume(request).await.unwrap();
        };
        join_all((0..vms).map(remove)).await;
    }

    /// One change of one volume.
    pub async fn limit(&self, n: u32, number: u32) {
        let request = v1::SetIoLimitsRequest {
            vm: Some(wire_vm_id(&vm(n))),
            volume: volume(n, number).name.to_string(),
            limits: Some(v1::IoLimits { total_iops_sec: 1000, ..Default::default() }),
        };
        self.of(n).set_io_limits(request).await.unwrap();
    }

    /// Waits until so many volumes are there, each ready and well; returns how often one was in trouble.
    pub async fn all_ready(&self, volumes: u32) -> u32 {
        let mut stream = self.watch().await;
        let (mut ready, mut troubles) = (HashSet::new(), 0);
        while let Some(event) = stream.message().await.unwrap().and_then(|m| m.event) {
            for volume in volumes_of(event) {
                let troubled = volume.trouble.as_ref();
                troubles += u32::from(troubled.is_some());
                if troubles == 1
                    && let Some(trouble) = troubled
                {
                    eprintln!("in trouble: {trouble:?}");
                }
                if volume.phase() == Phase::Ready && troubled.is_none() {
                    ready.insert(key(&volume));
                } else {
                    ready.remove(&key(&volume));
                }
            }
            if ready.len() == volumes as usize {
                return troubles;
            }
        }
        panic!("the watch ended");
    }

    async fn watch(&self) -> tonic::Streaming<v1::WatchVolumesResponse> {
        let request = v1::WatchVolumesRequest::default();
        self.of(0).watch_volumes(request).await.unwrap().into_inner()
    }
}

fn key(volume: &v1::Volume) -> (String, String) {
    let name = volume.spec.as_ref().map(|s| s.name.clone()).unwrap_or_default();
    (volume.vm.as_ref().map(|vm| vm.name.clone()).unwrap_or_default(), name)
}

fn volumes_of(event: Event) -> Vec<v1::Volume> {
    match event {
        Event::Snapshot(snapshot) => snapshot.volumes,
        Event::Changed(volume) => vec![volume],
    }
}

/// What a watcher has seen.
#[derive(Clone, Copy, Default)]
struct Seen {
    changes: usize,
    known: usize,
}

/// Clients that watch all volumes, each on a connection of its own.
pub struct Watchers {
    seen: Vec<watch::Receiver<Seen>>,
    lists_anew: Arc<AtomicUsize>,
    list_bytes: usize,
    _tasks: JoinSet<()>,
}

impl Watchers {
    /// Returns when each has a list of so many volumes.
    pub async fn connect(socket: &Path, count: usize, volumes: u32) -> Self {
        let (mut tasks, lists_anew) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
        let bytes = Arc::new(AtomicUsize::new(0));
        let mut seen = Vec::new();
        for _ in 0..count {
            let (tell, told) = watch::channel(Seen::default());
            seen.push(told);
            let mut client = connect(socket).await;
            let (lists, bytes) = (lists_anew.clone(), bytes.clone());
            tasks.spawn(async move {
                let request = v1::WatchVolumesRequest::default();
                let mut stream = client.watch_volumes(request).await.unwrap().into_inner();
                let mut known = HashSet::new();
                let mut list = 0;
                while let Ok(Some(message)) = stream.message().await {
                    let size = message.encoded_len();
                    let Some(event) = message.event else { continue };
                    let changed = match &event {
                        Event::Changed(_) => 1,
                        Event::Snapshot(snapshot) => {
                            lists.fetch_add(usize::from(snapshot.events_lost), Ordering::Relaxed);
                            if list == 0 {
                                known.clear();
                            }
                            list += size;
                            if !snapshot.more {
                                bytes.store(std::mem::take(&mut list), Ordering::Relaxed);
                            }
                            0
                        }
                    };
                    for volume in volumes_of(event) {
                        match volume.phase() {
                            Phase::Gone => known.remove(&key(&volume)),
                            _ => known.insert(key(&volume)),
                        };
                    }
                    tell.send_modify(|seen| {
                        seen.changes += changed;
                        seen.known = known.len();
                    });
                }
            });
        }
        let mut watchers = Self { seen, lists_anew, list_bytes: 0, _tasks: tasks };
        watchers.all_know(volumes).await;
        watchers.list_bytes = bytes.load(Ordering::Relaxed);
        watchers
    }

    async fn all(&mut self, is: impl Fn(&Seen) -> bool) {
        for seen in &mut self.seen {
            seen.wait_for(&is).await.unwrap();
        }
    }

    /// Waits until each knows of exactly so many volumes.
    pub async fn all_know(&mut self, volumes: u32) {
        self.all(|seen| seen.known == volumes as usize).await;
    }

    /// Waits until each has seen so many changes.
    pub async fn all_saw(&mut self, changes: usize) {
        self.all(|seen| seen.changes >= changes).await;
    }

    /// How often one lost changes and got a list anew.
    pub fn lists_anew(&self) -> f64 {
        self.lists_anew.load(Ordering::Relaxed) as f64
    }

    pub fn list_bytes(&self) -> f64 {
        self.list_bytes as f64
    }
}
