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
use crate::config::Config;
use crate::host::facts::System;
use crate::host::listen::{self, Socket};
use crate::host::sim::Fault;
use crate::preflight::{self, Facts as _};
use crate::types::VmId;
use crate::vm::facade::Volumes;

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
    /// This build cannot serve volumes.
    #[error("this build has no handler for volumes")]
    NoVolumes,
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
    // The socket first: its lock keeps a second daemon from the stores.
    let (_socket, listener) = bind(&config)?;
    let volumes = open(&config, &form).await?;
    let stop = stop_signal().map_err(Error::Runtime)?;
    serve(&config, volumes, listener, stop).await
}

/// Opens the doors (real or simulated, by `form`) and the registry behind them. The one place that
/// knows which is which.
async fn open(_config: &Config, _form: &Form) -> Result<Arc<dyn Volumes>, Error> {
    Err(Error::NoVolumes)
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
