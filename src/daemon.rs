//! The daemon from start to end.
//!
//! ```text
//! configuration -> logs -> preflight -> socket (one daemon only) -> doors -> registry
//!     -> serving, READY=1 ... SIGTERM or SIGINT -> STOPPING=1 -> calls end -> doors close
//! ```
//! Stopping detaches nothing: the next start goes on from the journal.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::api::auth::AllowedPeers;
use crate::api::server;
use crate::cgroup::{Grants, Hierarchy};
use crate::config::{Config, GuestUnproven};
use crate::connector::Connectors;
use crate::host::facts::{self, System};
use crate::host::libvirt::{Hypervisor, RealHypervisor};
use crate::host::listen::{self, Socket};
use crate::host::pods::PodDoors;
use crate::host::sim::{Fault, SimHost};
use crate::host::storage::{OpenError, RealOptions, StorageDoors};
use crate::journal::Desired;
use crate::preflight::{self, Facts as _};
use crate::telemetry;
use crate::types::VmId;
use crate::vm::backoff::Backoff;
use crate::vm::discover;
use crate::vm::facade::{NodeInfo, Volumes};
use crate::vm::failure::Failure;
use crate::vm::registry::{Registry, RegistrySettings};
use crate::vm::ways::{Host, WaySettings};

/// In which form the daemon runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Form {
    /// Serve this VM only (the sidecar).
    pub only_vm: Option<VmId>,
    /// On a simulated host.
    pub simulated: bool,
    /// A file of faults for the simulated host, see [`read_faults`].
    pub faults: Option<PathBuf>,
}

/// The daemon did not start, or ended by an error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something is missing, one line each.
    #[error("{}", lines(.0))]
    Lacks(Vec<preflight::Lack>),
    /// The directory of the socket cannot be made.
    #[error("cannot make the socket's directory {path}: set `socket` to another path")]
    SocketDir {
        /// The directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot listen")]
    Listen(#[from] listen::Error),
    /// The runtime refused the socket or the signals.
    #[error("cannot set up the runtime")]
    Runtime(#[source] io::Error),
    /// The server failed.
    #[error("serving failed")]
    Serve(#[from] server::Error),
    /// The file of faults cannot be read.
    #[error("cannot read the faults in {path}")]
    Faults {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Metrics cannot be served.
    #[error(transparent)]
    Metrics(#[from] telemetry::metrics::MetricsError),
    /// A door of the host cannot be opened.
    #[error("cannot use the host")]
    Doors(#[from] OpenError),
    /// Stores, grants or what is stored in them.
    #[error("{} ({}). {}", .0.message, .0.reason, .0.reason.remedy())]
    Open(Failure),
}

fn lines(lacks: &[preflight::Lack]) -> String {
    lacks.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Runs the daemon until it is told to stop.
pub async fn run(config: Config, form: Form) -> Result<(), Error> {
    if !form.simulated {
        let lacks = preflight::check(&config, &System);
        if !lacks.is_empty() {
            return Err(Error::Lacks(lacks));
        }
    }
    if let Ok(Some(at)) = config.metrics_listen() {
        telemetry::metrics::serve(at)?;
    }
    // The socket first: its lock keeps a second daemon from the stores.
    let (_socket, listener) = bind(&config)?;
    let registry = open(&config, &form).await?;
    let stop = stop_signal().map_err(Error::Runtime)?;
    let served = serve(&config, registry.clone(), listener, stop).await;
    registry.stop(GRACE).await;
    served
}

/// How long work that is under way may take to end by itself when the daemon stops.
const GRACE: Duration = Duration::from_secs(10);

/// The doors to the host.
pub struct Doors {
    /// SAN and SCSI layer, multipathd, the run directory.
    pub storage: StorageDoors,
    /// Pods, nodes, grants and processes.
    pub pods: PodDoors,
    /// libvirt.
    pub hypervisor: Arc<dyn Hypervisor>,
}

impl Doors {
    /// Those of the machine that we run on.
    fn real(config: &Config) -> Result<Self, OpenError> {
        let options = RealOptions {
            run_dir: config.run_dir.clone(),
            secrets: config.secrets_dir.clone(),
            kernel_deadline: config.deadlines.kernel_call,
            multipathd_deadline: config.deadlines.multipathd,
            ..RealOptions::default()
        };
        Ok(Self {
            storage: StorageDoors::real(&options)?,
            pods: PodDoors::real(Path::new("/proc")),
            hypervisor: Arc::new(RealHypervisor::default()),
        })
    }

    /// Those of a simulated host.
    pub fn sim(host: &SimHost) -> Self {
        Self {
            storage: StorageDoors::sim(&host.storage),
            pods: host.pods.doors(),
            hypervisor: Arc::new(host.hypervisor.clone()),
        }
    }
}

/// Opens the doors (real or simulated, by `form`) and the registry behind them. The one place that
/// knows which is which.
async fn open(config: &Config, form: &Form) -> Result<Arc<Registry>, Error> {
    let (doors, desired) = if form.simulated {
        let host = SimHost::demo();
        if let Some(path) = &form.faults {
            read_faults(path)?.into_iter().for_each(|fault| host.faults.inject(fault));
        }
        (Doors::sim(&host), Desired::in_memory())
    } else {
        (Doors::real(config)?, Desired::open_beside(&store_path(config, form), &config.run_dir))
    };
    compose(config, form, doors, desired.map_err(|e| Error::Open(e.into()))?).await
}

/// The registry over these doors and this store, which takes up what it finds in them.
pub async fn compose(
    config: &Config,
    form: &Form,
    doors: Doors,
    desired: Desired,
) -> Result<Arc<Registry>, Error> {
    let Doors { storage, pods, hypervisor } = doors;
    let grants = Grants::new(pods.overrides.clone(), pods.lists.clone());
    let mechanisms = install_grants(&grants, &pods).await?;
    let connector = Connectors::new(storage.clone(), config.connector());
    // What a killed daemon's login left and nobody wants. One target's trouble is not every VM's.
    if let Err(error) = connector.sweep().await {
        tracing::error!(
            why = Failure::from(error).message,
            "what was left behind could not be swept"
        );
    }
    if let Some(fault) = connector.tool_fault().await {
        tracing::warn!("{fault}");
    }
    let host = Host {
        pods,
        hypervisor,
        connector: Arc::new(connector),
        grants,
        secrets: storage.secrets.clone(),
        tracker: storage.tracker.clone(),
        settings: Arc::new(way_settings(config)),
    };
    let settings = RegistrySettings {
        node: node_info(config, form, &storage, mechanisms),
        look_interval: config.reconcile.interval,
        auto_expand: config.expand.auto,
        after_last_fc: config.fc_mark_after_last,
        reservations: !config.pr_helper_socket.as_os_str().is_empty(),
        backoff: Backoff { first: Duration::from_secs(2), cap: Duration::from_secs(60) },
        start: config.deadlines.start,
    };
    Registry::start(settings, host, storage, desired).await.map_err(Error::Open)
}

/// A sidecar's store is its own: the node's daemon does not have its VM.
fn store_path(config: &Config, form: &Form) -> PathBuf {
    config.state_dir.join(match &form.only_vm {
        Some(vm) => format!("{}_{}.db", vm.namespace(), vm.name()),
        None => "lunplug.db".into(),
    })
}

/// Finds or attaches the override program; returns what grants are made with. A host that has only
/// cgroup v1 needs none.
async fn install_grants(grants: &Grants, pods: &PodDoors) -> Result<Vec<String>, Error> {
    let has = |hierarchy| pods.procs.roots().iter().any(|root| root.hierarchy == hierarchy);
    let mut mechanisms = Vec::new();
    if has(Hierarchy::V1) {
        mechanisms.push("cgroup1-devices".to_owned());
    }
    match grants.install().await {
        Ok(installed) => {
            let status = installed.into_inner();
            if !status.after_ours.is_empty() {
                tracing::warn!(
                    programs = ?status.after_ours,
                    "other device programs at the cgroup root run after lunplug's and may deny what it grants; see docs/operations.md, grants"
                );
            }
            mechanisms.push("cgroup2-override".to_owned());
            match grants.collect_dead().await {
                Ok(0) => {}
                Ok(count) => tracing::info!(count, "grants of cgroups that are gone collected"),
                Err(error) => tracing::warn!(
                    why = Failure::from(error).message,
                    "grants of cgroups that are gone could not be collected"
                ),
            }
        }
        Err(error) if has(Hierarchy::V1) => {
            tracing::warn!(
                why = Failure::from(error).message,
                "no grants on cgroup v2; v1 goes on"
            );
        }
        Err(error) => return Err(Error::Open(error.into())),
    }
    Ok(mechanisms)
}

fn way_settings(config: &Config) -> WaySettings {
    WaySettings {
        discover: discover::Settings { kubelet_root: config.kubelet_root.clone() },
        attach: config.deadlines.attach,
        detach: config.deadlines.detach,
        libvirt: config.deadlines.libvirt_call,
        check: config.deadlines.check,
        resolve: config.deadlines.resolve,
        agent: config.deadlines.agent,
        guest_unplug: config.deadlines.guest_unplug,
        allow_unproven: config.guest_unproven == GuestUnproven::Allow,
        pr_helper: Some(&config.pr_helper_socket)
            .filter(|path| !path.as_os_str().is_empty())
            .map(|path| path.to_string_lossy().into_owned()),
        local: config.local.clone(),
    }
}

fn node_info(
    config: &Config,
    form: &Form,
    storage: &StorageDoors,
    grants: Vec<String>,
) -> NodeInfo {
    NodeInfo {
        name: config.node_name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: facts::kernel(),
        boot_id: storage.rundir.boot_id().to_owned(),
        initiator_name: if form.simulated { None } else { facts::initiator_name() },
        multipathd: false,
        grants,
        simulated: form.simulated,
        only_vm: form.only_vm.clone(),
        stuck_calls: 0,
        state_trouble: None,
        max_vms: config.limits.max_vms,
        max_volumes_per_vm: config.limits.max_volumes_per_vm,
        require_wwid: config.require_wwid,
        hbas: Vec::new(),
    }
}

/// Reads the faults to inject into the simulated host: a list of [`Fault`], e.g.
/// `[{point: libvirt.attach, times: 1, action: {fail: "no"}}, {point: sysfs.write, action: hang}]`.
pub fn read_faults(path: &Path) -> Result<Vec<Fault>, Error> {
    let text = std::fs::read_to_string(path);
    // By way of JSON's model, in which an action is a map and needs no YAML tag.
    let faults = text.and_then(|text| {
        serde_yaml_ng::from_str::<serde_json::Value>(&text)
            .map_err(io::Error::other)
            .and_then(|value| serde_json::from_value(value).map_err(io::Error::other))
    });
    faults.map_err(|source| Error::Faults { path: path.into(), source })
}

/// Makes the API's socket and its directory.
pub fn bind(config: &Config) -> Result<(Socket, tokio::net::UnixListener), Error> {
    if let Some(directory) = config.socket.parent() {
        System
            .writable_dir(directory)
            .map_err(|source| Error::SocketDir { path: directory.into(), source })?;
    }
    let group = Some(config.socket_group.as_str()).filter(|group| !group.is_empty());
    let (socket, listener) = Socket::bind(&config.socket, group)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(Error::Runtime)?;
    Ok((socket, listener))
}

/// Serves until `stop` is over, telling systemd how it is.
pub async fn serve(
    config: &Config,
    volumes: Arc<dyn Volumes>,
    listener: tokio::net::UnixListener,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    let (stopping, told) = watch::channel(false);
    let peers = AllowedPeers::new(config.allowed_uids.iter().copied(), System.euid());
    let waiting = tokio::spawn(async move {
        stop.await;
        tracing::info!("stopping; volumes stay attached");
        notify(NotifyState::Stopping);
        let _ = stopping.send(true);
    });
    let watchdog = sd_notify::watchdog_enabled().map(|period| tokio::spawn(feed_watchdog(period)));
    tracing::info!(socket = %config.socket.display(), node = config.node_name, "serving");
    // The socket listens already: whoever connects now is served in a moment.
    notify(NotifyState::Ready);
    let served = server::serve(volumes, peers, listener, told).await;
    waiting.abort();
    if let Some(watchdog) = watchdog {
        watchdog.abort();
    }
    Ok(served?)
}

/// Over when SIGTERM or SIGINT came.
fn stop_signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Says that the runtime still turns, twice a period (sd_watchdog_enabled(3)).
async fn feed_watchdog(period: Duration) {
    let mut ticks = tokio::time::interval(period / 2);
    loop {
        ticks.tick().await;
        notify(NotifyState::Watchdog);
    }
}

fn notify(state: NotifyState<'_>) {
    // Without systemd this does nothing.
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("systemd could not be told: {error}");
    }
}
