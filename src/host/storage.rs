//! The storage doors as one bundle: real or simulated, the connector cannot tell.

use std::sync::Arc;

use super::block::Blocks;
use super::cmd::Commands;
use super::iscsidb::IscsiDb;
use super::lock::RunDir;
use super::multipathd::Multipathd;
use super::sim::SimStorage;
use super::sysfs::Sysfs;
use super::uevent::Uevents;

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
}

impl StorageDoors {
    /// The doors of a simulated node, of its present boot.
    pub fn sim(sim: &SimStorage) -> Self {
        let sim_door = Arc::new(sim.clone());
        Self {
            sysfs: sim_door.clone(),
            uevents: sim_door.clone(),
            commands: sim_door.clone(),
            multipathd: sim_door.clone(),
            blocks: sim_door.clone(),
            rundir: sim.rundir(),
            iscsidb: sim_door,
        }
    }
}
