//! The storage doors as one bundle: real or simulated, the connector cannot tell.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::block::{Blocks, RealBlocks};
use super::cmd::{Commands, RealCommands};
use super::iscsidb::{IscsiDb, RealIscsiDb};
use super::killpoint::RealKillPoints;
use super::local::{LocalSources, RealLocalSources};
use super::lock::{RealRunDir, RunDir};
use super::multipathd::{InTurn, Multipathd, RealMultipathd};
use super::place::Places;
use super::resolver::{RealResolver, Resolver};
use super::secrets::{RealSecrets, Secrets};
use super::sim::SimStorage;
use super::sysfs::{RealSysfs, Sysfs};
use super::uevent::{RealUevents, Uevents};
use crate::reason::Reason;
use crate::step::Tracker;

/// Where things are on the real host, and how long its kernel and daemons may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealOptions {
    /// This boot's locks and leases, shared by a node daemon and sidecars.
    pub run_dir: PathBuf,
    /// Where sysfs is mounted.
    pub sysfs: PathBuf,
    /// open-iscsi's records; found by the distribution's places where `None`.
    pub iscsi_nodes: Option<PathBuf>,
    /// The directory of multipath's `wwids` and `bindings`.
    pub multipath: PathBuf,
    /// A directory of our own for device nodes that live for one open(2), not on a `nodev` mount.
    pub nodes: PathBuf,
    /// The directory of secrets that volumes refer to.
    pub secrets: PathBuf,
    /// For a write to sysfs (a scan of a slow target, a delete that waits for I/O), and for a flush.
    pub kernel_deadline: Duration,
    /// For one command of multipathd.
    pub multipathd_deadline: Duration,
}

impl Default for RealOptions {
    fn default() -> Self {
        Self {
            run_dir: "/run/lunplug".into(),
            sysfs: "/sys".into(),
            iscsi_nodes: None,
            multipath: "/etc/multipath".into(),
            // systemd mounts /run with nodev; /dev never is.
            nodes: "/dev/.lunplug".into(),
            secrets: "/etc/lunplug/secrets".into(),
            kernel_deadline: Duration::from_secs(30),
            multipathd_deadline: Duration::from_secs(10),
        }
    }
}

/// A door to the real host could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The run directory.
    #[error("the run directory {} cannot be used", .path.display())]
    RunDir {
        /// Where it was asked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's events.
    #[error("kernel events cannot be received (this needs the host's network namespace)")]
    Uevents(#[source] io::Error),
}

impl OpenError {
    /// The stable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::RunDir { .. } => Reason::StateStoreFailed,
            Self::Uevents(_) => Reason::Unsupported,
        }
    }
}

/// Every door that attaching storage needs.
#[derive(Clone)]
pub struct StorageDoors {
    /// /sys.
    pub sysfs: Arc<dyn Sysfs>,
    /// Kernel uevents.
    pub uevents: Arc<dyn Uevents>,
    /// Other programs.
    pub commands: Arc<dyn Commands>,
    /// multipathd's socket.
    pub multipathd: Arc<dyn Multipathd>,
    /// Block devices by number.
    pub blocks: Arc<dyn Blocks>,
    /// Locks and state of this boot.
    pub rundir: Arc<dyn RunDir>,
    /// open-iscsi's node records.
    pub iscsidb: Arc<dyn IscsiDb>,
    /// Secrets by reference.
    pub secrets: Arc<dyn Secrets>,
    /// Names of hosts.
    pub resolver: Arc<dyn Resolver>,
    /// What is on the host already.
    pub local: Arc<dyn LocalSources>,
    /// Runs the steps.
    pub tracker: Tracker,
    /// How many calls are past their deadline and still in the kernel.
    pub stuck: Arc<dyn Fn() -> u64 + Send + Sync>,
}

impl StorageDoors {
    /// The doors of the real host; to be called within the runtime. Programs that are missing, or
    /// a multipathd that does not run, show when they are needed.
    pub fn real(options: &RealOptions) -> Result<Self, OpenError> {
        let run_dir = |source| OpenError::RunDir { path: options.run_dir.clone(), source };
        let rundir = RealRunDir::open(&options.run_dir).map_err(run_dir)?;
        let deadline = options.kernel_deadline;
        let places = Places::default();
        let iscsidb = match &options.iscsi_nodes {
            Some(nodes) => RealIscsiDb::new(nodes),
            None => RealIscsiDb::placed(places.clone()),
        };
        let sysfs = Arc::new(RealSysfs::new(&options.sysfs, deadline));
        let blocks = Arc::new(RealBlocks::new(&options.nodes, deadline));
        let local = Arc::new(RealLocalSources::new(deadline));
        Ok(Self {
            stuck: Arc::new({
                let (sysfs, blocks, local) = (sysfs.clone(), blocks.clone(), local.clone());
                move || sysfs.stuck() + blocks.stuck() + local.stuck()
            }),
            local,
            sysfs,
            uevents: Arc::new(RealUevents::open().map_err(OpenError::Uevents)?),
            commands: Arc::new(RealCommands::new(std::env::var_os("PATH")).placed(places.clone())),
            multipathd: Arc::new(InTurn::new(
                Arc::new(RealMultipathd::new(&options.multipath).placed(places)),
                options.multipathd_deadline,
            )),
            blocks,
            rundir: Arc::new(rundir),
            iscsidb: Arc::new(iscsidb),
            secrets: Arc::new(RealSecrets::new(&options.secrets)),
            resolver: Arc::new(RealResolver),
            tracker: Tracker::new(Arc::new(RealKillPoints)),
        })
    }

    /// The doors of a simulated node, of its present boot.
    pub fn sim(sim: &SimStorage) -> Self {
        let sim_door = Arc::new(sim.clone());
        Self {
            sysfs: sim_door.clone(),
            uevents: sim_door.clone(),
            commands: sim_door.clone(),
            multipathd: Arc::new(InTurn::new(
                sim_door.clone(),
                RealOptions::default().multipathd_deadline,
            )),
            blocks: sim_door.clone(),
            rundir: sim.rundir(),
            iscsidb: sim_door.clone(),
            secrets: sim_door.clone(),
            resolver: sim_door.clone(),
            local: sim_door,
            tracker: Tracker::new(sim.faults().clone()),
            stuck: Arc::new(|| 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DevNum;

    #[tokio::test]
    async fn real_doors_open_on_other_places_and_leave_the_host_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let options = RealOptions {
            run_dir: at("run"),
            sysfs: at("sys"),
            iscsi_nodes: Some(at("nodes")),
            multipath: at("multipath"),
            nodes: at("dev"),
            ..RealOptions::default()
        };
        let doors = StorageDoors::real(&options).unwrap().clone();
        assert!(doors.sysfs.entries("class/iscsi_session").await.unwrap().is_empty());
        assert!(!doors.rundir.boot_id().is_empty());
        assert_eq!((doors.commands.started(), (doors.stuck)()), (0, 0));
        assert!(doors.blocks.exclusive(DevNum { major: 60, minor: 1 }).await.is_err());
        std::fs::write(at("file"), "").unwrap();
        let refused = RealOptions { run_dir: at("file"), ..options };
        assert!(matches!(StorageDoors::real(&refused), Err(OpenError::RunDir { .. })));
    }
}
