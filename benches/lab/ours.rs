//! lunplugd, as it is installed on a node, asked over its socket.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lunplug::api::v1::lunplug_service_client::LunplugServiceClient;
use lunplug::api::v1::watch_volumes_response::Event;
use lunplug::api::v1::{self, Phase};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

use crate::cases::{Case, Contender, Took, VMS};
use crate::node::{Lun, PORTALS, Pod, sh};

const SOCKET: &str = "/run/lunplug/lunplugd.sock";
const DEADLINE: Duration = Duration::from_secs(300);

/// When the first of several volumes came to a phase, and the last.
struct Times {
    first: Instant,
    last: Instant,
}

/// VMs of lunplugd's.
pub struct Ours {
    runtime: Runtime,
    client: LunplugServiceClient<Channel>,
    changes: mpsc::UnboundedReceiver<(Instant, v1::Volume)>,
    vms: [v1::VmId; VMS],
    iqn: String,
    luns: Vec<Lun>,
    troubles: usize,
}

impl Ours {
    pub fn new(iqn: &str, luns: Vec<Lun>, pods: &[Pod; VMS]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().unwrap();
        let vms = pods
            .each_ref()
            .map(|pod| v1::VmId { namespace: "default".into(), name: pod.name.clone() });
        let (client, changes) = runtime.block_on(async {
            let mut client = connect().await;
            let (sender, changes) = mpsc::unbounded_channel();
            for (vm, pod) in vms.iter().zip(pods) {
                register(&mut client, &sender, vm, pod).await;
            }
            (client, changes)
        });
        Self { runtime, client, changes, vms, iqn: iqn.into(), luns, troubles: 0 }
    }

    /// Adds volumes, all by requests of their own at once, and waits for the last. The host's part begins when
    /// lunplugd begins with the first of the LUNs: its request is checked and durable then, which is in the whole.
    pub fn add(&mut self, luns: &[Lun], portals: usize, vms: usize) -> Took {
        let begin = Instant::now();
        for (at, lun) in luns.iter().enumerate() {
            let vm = &self.vms[at % vms];
            let (mut client, request) = (self.client.clone(), self.request(vm, lun, portals));
            self.runtime.spawn(async move { client.add_volume(request).await.unwrap() });
        }
        let times = self.wait(luns, &[Phase::Bound, Phase::AttachedToNode, Phase::Ready]);
        Took { host: times[1].last - times[0].first, whole: times[2].last - begin }
    }

    /// Removes volumes in the same way. The host's part begins when the guest has let go of the first; of several at
    /// once it has the others' in it, as that of an add has.
    pub fn remove(&mut self, luns: &[Lun], vms: usize) -> Took {
        let begin = Instant::now();
        for (at, lun) in luns.iter().enumerate() {
            let mut client = self.client.clone();
            let request = v1::RemoveVolumeRequest {
                vm: Some(self.vms[at % vms].clone()),
                volume: name(lun),
                ..Default::default()
            };
            self.runtime.spawn(async move { client.remove_volume(request).await.unwrap() });
        }
        let times = self.wait(luns, &[Phase::UnmountedFromPod, Phase::Gone]);
        Took { host: times[1].last - times[0].first, whole: times[1].last - begin }
    }

    fn request(&self, vm: &v1::VmId, lun: &Lun, portals: usize) -> v1::AddVolumeRequest {
        let source = v1::IscsiSource {
            target: self.iqn.clone(),
            portals: PORTALS[..portals].iter().map(|p| (*p).to_owned()).collect(),
            lun: lun.number.into(),
            ..Default::default()
        };
        let policy = match portals {
            1 => v1::MultipathPolicy::Off,
            _ => v1::MultipathPolicy::Required,
        };
        let volume = v1::VolumeSpec {
            name: name(lun),
            source: Some(v1::Source { kind: Some(v1::source::Kind::Iscsi(source)) }),
            multipath: policy.into(),
            ..Default::default()
        };
        v1::AddVolumeRequest { vm: Some(vm.clone()), volume: Some(volume), ..Default::default() }
    }

    /// When the volumes were told to have come to each phase.
    fn wait(&mut self, luns: &[Lun], phases: &[Phase]) -> Vec<Times> {
        let mut came: HashMap<(String, Phase), Instant> = HashMap::new();
        let changes = &mut self.changes;
        let all = async {
            while came.len() < luns.len() * phases.len() {
                let (at, volume) = changes.recv().await.expect("the daemon ended");
                let name = volume.spec.as_ref().unwrap().name.clone();
                // The daemon tries again.
                if let Some(trouble) = &volume.trouble {
                    eprintln!("{name}: {}: {}", trouble.reason, trouble.message);
                    self.troubles += 1;
                }
                if luns.iter().any(|lun| self::name(lun) == name)
                    && phases.contains(&volume.phase())
                {
                    came.entry((name, volume.phase())).or_insert(at);
                }
            }
        };
        let ended = self.runtime.block_on(async { tokio::time::timeout(DEADLINE, all).await });
        assert!(ended.is_ok(), "not in {DEADLINE:?}: {phases:?} of {luns:?}; came: {came:?}");
        let times = |phase: &Phase| {
            let times = || came.iter().filter(|(of, _)| of.1 == *phase).map(|(_, at)| *at);
            Times { first: times().min().unwrap(), last: times().max().unwrap() }
        };
        phases.iter().map(times).collect()
    }
}

impl Contender for Ours {
    fn pid(&self) -> u32 {
        sh("systemctl show --property MainPID --value lunplugd").parse().unwrap()
    }

    fn attach(&mut self, case: &Case) -> Took {
        let luns = self.luns[..case.at_once.into()].to_vec();
        self.add(&luns, case.portals, case.vms)
    }

    fn detach(&mut self, case: &Case) -> Took {
        let luns = self.luns[..case.at_once.into()].to_vec();
        self.remove(&luns, case.vms)
    }

    fn troubles(&mut self) -> usize {
        std::mem::take(&mut self.troubles)
    }
}

fn name(lun: &Lun) -> String {
    format!("bench{}", lun.number)
}

async fn connect() -> LunplugServiceClient<Channel> {
    let connector = tower::service_fn(|_| async {
        let stream = tokio::net::UnixStream::connect(SOCKET).await?;
        Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
    });
    let channel = Endpoint::from_static("http://bench").connect_with_connector(connector).await;
    LunplugServiceClient::new(channel.unwrap())
}

/// Registers a VM, and has all changes of its volumes told.
async fn register(
    client: &mut LunplugServiceClient<Channel>,
    changes: &mpsc::UnboundedSender<(Instant, v1::Volume)>,
    vm: &v1::VmId,
    pod: &Pod,
) {
    let place = v1::PodPlace { uid: pod.uid.clone(), ..Default::default() };
    let spec = v1::VmSpec {
        id: Some(vm.clone()),
        domain: pod.domain.clone(),
        place: Some(v1::vm_spec::Place::Pod(place)),
        ..Default::default()
    };
    client.register_vm(v1::RegisterVmRequest { vm: Some(spec) }).await.unwrap();
    let request = v1::WatchVolumesRequest { vm: Some(vm.clone()) };
    let mut watched = client.watch_volumes(request).await.unwrap().into_inner();
    let sender = changes.clone();
    tokio::spawn(async move {
        while let Some(message) = watched.message().await.unwrap() {
            match message.event.unwrap() {
                Event::Changed(volume) => sender.send((Instant::now(), volume)).unwrap(),
                Event::Snapshot(snapshot) => assert!(!snapshot.events_lost, "watched too slowly"),
            }
        }
    });
}
