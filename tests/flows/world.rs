//! A node on which everything but lunplug is simulated, and the daemon's lives on it.

use std::sync::Arc;
use std::time::Duration;

use lunplug::config::Config;
use lunplug::daemon::{self, Doors, Form};
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Appears, Fault, FaultAction, SimBlock, SimFile, SimHost, SimStorage};
use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{
    AddOptions, FcSupport, MultipathPolicy, Phase, RemoveOptions, Source, VmPlace, VmSpec,
    VolumeSpec, VolumeStatus,
};
use lunplug::types::{
    Bus, CacheMode, DiskType, IoLimits, Iqn, Lun, Outcome, Portal, Tuning, VmId, VolumeKey, Wwpn,
};
use lunplug::vm::facade::{Refusal, Volumes};
use lunplug::vm::registry::Registry;
use lunplug::vm::resolve::Names;

/// Longer than everything that goes on in the background.
const QUIET: Duration = Duration::from_secs(700);

pub(crate) fn target() -> Iqn {
    "iqn.2026-01.org.lunplug:sim".parse().unwrap()
}

/// Another target that exports LUN n of [`target`] as n + 100, by portals 3 and 4.
pub(crate) fn mirror() -> Iqn {
    "iqn.2026-01.org.lunplug:mirror".parse().unwrap()
}

/// The n-th portal, from 1.
pub(crate) fn portal(number: u8) -> Portal {
    format!("192.0.2.{number}").parse().unwrap()
}

pub(crate) fn lun(number: u64) -> Lun {
    number.try_into().unwrap()
}

/// The n-th VM, from 1.
pub(crate) fn vm(number: u8) -> VmId {
    format!("default/vm-{number}").parse().unwrap()
}

/// The pod of the n-th VM.
pub(crate) fn uid(number: u8) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// The n-th VM's domain.
pub(crate) fn domain(number: u8) -> String {
    format!("default_vm-{number}")
}

pub(crate) fn vm_spec(number: u8) -> VmSpec {
    let place = VmPlace::Pod {
        uid: uid(number),
        cgroup: None,
        hotplug_dir: None,
        hotplug_dir_in_pod: None,
        libvirt_socket: None,
    };
    VmSpec { id: vm(number), domain: domain(number), place, fc: FcSupport::default() }
}

/// How many VMs the node has.
const VMS: u8 = 3;

/// The n-th HBA's port, from 1.
pub(crate) fn hba(number: u8) -> Wwpn {
    format!("21000024ff3d2e{number:02x}").parse().unwrap()
}

/// The target port that the n-th HBA sees. It has LUN n of [`target`] as n + 200.
pub(crate) fn port(number: u8) -> Wwpn {
    format!("500a0982991b8d{number:02x}").parse().unwrap()
}

/// A node with VMs and a target of 16 LUNs behind two portals, its mirror, and two HBAs, each of which sees a
/// port of it; and 4 logical volumes and files of its own.
pub(crate) fn node() -> SimHost {
    let host = SimHost::default();
    host.add_target(&target(), &[portal(1), portal(2)], 16);
    host.add_target(&mirror(), &[portal(3), portal(4)], 0);
    (0..16).for_each(|n| host.storage.export_lun(&target(), lun(n), &mirror(), lun(n + 100)));
    host.storage.set_fc_scan(false);
    for number in [1, 2] {
        host.storage.add_hba(hba(number));
        host.storage.zone(hba(number), port(number), Appears::AtOnce);
        let by = SimStorage::fc_target(port(number));
        (0..16).for_each(|n| host.storage.export_lun(&target(), lun(n), &by, lun(n + 200)));
    }
    for number in 0..4 {
        let kind = SimBlock::Lvm(format!("LVM-data{number}"));
        host.storage.add_local(&lv(number), kind, 1 << 30);
        host.storage.files().put(&img(number), SimFile::raw(1 << 30));
    }
    (1..=VMS).for_each(|n| host.add_vm(&uid(n), &domain(n)));
    host
}

/// A volume with two paths on bus scsi.
pub(crate) fn volume(name: &str, lun: u64) -> VolumeSpec {
    let source = format!("iscsi://192.0.2.1,192.0.2.2/{}/{lun}", target());
    VolumeSpec {
        name: name.parse().unwrap(),
        source: source.parse().unwrap(),
        disk: name.parse().unwrap(),
        serial: Some(name.parse().unwrap()),
        device: DiskType::Disk,
        drive: None,
        reservations: false,
        dedicated_io_thread: false,
        bus: Bus::Scsi,
        cache: CacheMode::None,
        error_policy: None,
        read_only: false,
        shareable: false,
        persist: false,
        multipath: MultipathPolicy::Preferred,
        expect_wwid: None,
        expect_size: None,
        expect_unit_serial: None,
        tuning: Tuning::default(),
        limits: IoLimits::default(),
        names: Names::new(),
    }
}

/// A medium for the only drive that is empty.
pub(crate) fn medium(name: &str, lun: u64) -> VolumeSpec {
    let device = DiskType::Cdrom;
    VolumeSpec { serial: None, device, read_only: true, ..volume(name, lun) }
}

/// The same by both HBAs.
pub(crate) fn fibre(name: &str, lun: u64) -> VolumeSpec {
    let source = format!("fc://{},{}/{}", port(1), port(2), lun + 200);
    VolumeSpec { source: source.parse().unwrap(), ..volume(name, lun) }
}

/// What leads to the n-th logical volume, from 0.
pub(crate) fn lv(number: u64) -> String {
    format!("/dev/vg/data-{number}")
}

/// A logical volume of the node's own.
pub(crate) fn block(name: &str, number: u64) -> VolumeSpec {
    let source = format!("block://{}", lv(number));
    VolumeSpec { source: source.parse().unwrap(), ..volume(name, number) }
}

/// The n-th file, from 0.
pub(crate) fn img(number: u64) -> String {
    format!("/srv/guests/disk-{number}.img")
}

/// A raw file of the node's own.
pub(crate) fn file(name: &str, number: u64) -> VolumeSpec {
    let source = format!("file://{}", img(number));
    VolumeSpec { source: source.parse().unwrap(), ..volume(name, number) }
}

/// The same as an image.
pub(crate) fn image(name: &str, number: u64) -> VolumeSpec {
    let source = format!("file+qcow2://{}", img(number));
    VolumeSpec { source: source.parse().unwrap(), ..volume(name, number) }
}

/// The same with two paths more, by [`mirror`].
pub(crate) fn mirrored(name: &str, lun: u64) -> VolumeSpec {
    let spec = volume(name, lun);
    let more = format!("{}+192.0.2.3,192.0.2.4/{}/{}", spec.source, mirror(), lun + 100);
    VolumeSpec { source: more.parse().unwrap(), ..spec }
}

/// The same with one path by each of the two targets.
pub(crate) fn split(name: &str, lun: u64) -> VolumeSpec {
    let source =
        format!("iscsi://192.0.2.1/{}/{lun}+192.0.2.3/{}/{}", target(), mirror(), lun + 100);
    VolumeSpec { source: source.parse().unwrap(), ..volume(name, lun) }
}

/// The same with an initiator name of its own.
pub(crate) fn initiator(name: &str, lun: u64, number: u8) -> VolumeSpec {
    let mut spec = volume(name, lun);
    let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
    source.iface.initiator = Some(initiator_name(number));
    spec
}

pub(crate) fn initiator_name(number: u8) -> Iqn {
    format!("iqn.2026-01.org.lunplug:vm-{number}").parse().unwrap()
}

/// The same by the first portal alone.
pub(crate) fn single(name: &str, lun: u64) -> VolumeSpec {
    let mut spec = volume(name, lun);
    let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
    source.portals.truncate(1);
    spec
}

pub(crate) fn key(number: u8, name: &str) -> VolumeKey {
    VolumeKey { vm: vm(number), volume: name.parse().unwrap() }
}

pub(crate) const FORCE: RemoveOptions = RemoveOptions { force: true, dry_run: false };

/// The node, and what of lunplug outlives its daemon.
pub(crate) struct World {
    pub(crate) host: SimHost,
    pub(crate) config: Config,
    pub(crate) form: Form,
    pub(crate) desired: Desired,
    before: String,
}

impl World {
    /// A world over [`node`], with a store in memory.
    pub(crate) fn new() -> Self {
        Self::over(node(), Desired::in_memory().unwrap())
    }

    /// The same, each VM with such empty drives.
    pub(crate) fn with_drives(drives: &[&str]) -> Self {
        let host = node();
        for number in 1..=VMS {
            let add = |d: &mut SimDomain| drives.iter().for_each(|drive| d.add_drive(drive));
            host.hypervisor.with_domain(&Self::endpoint(number), &domain(number), add).unwrap();
        }
        Self::over(host, Desired::in_memory().unwrap())
    }

    /// The first two VMs are registered.
    pub(crate) fn over(host: SimHost, desired: Desired) -> Self {
        let mut config = Config::default();
        config.resolve(None, "node-1");
        // The sweeps count calls: those of the slow timer would come between them.
        config.reconcile.interval = Duration::from_secs(24 * 60 * 60);
        config.local.block_roots = vec!["/dev/vg".into()];
        config.local.file_roots = vec!["/srv/guests".into()];
        let before = host.snapshot();
        let form = Form { simulated: true, ..Form::default() };
        let world = Self { host, config, form, desired, before };
        world.life(async |daemon| {
            for number in [1, 2] {
                daemon.registry.register_vm(vm_spec(number)).await.unwrap();
            }
        });
        world
    }

    /// One life of the daemon, from its start to its `kill -9` when `story` is told.
    pub(crate) fn life<T>(&self, story: impl AsyncFnOnce(Daemon) -> T) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async { story(self.start().await.unwrap()).await })
    }

    /// Another daemon on this node, over a store.
    pub(crate) async fn start_over(&self, desired: Desired) -> Result<Daemon, daemon::Error> {
        let doors = Doors::sim(&self.host);
        let registry = daemon::compose(&self.config, &self.form, doors, desired).await?;
        Ok(Daemon { registry })
    }

    pub(crate) async fn start(&self) -> Result<Daemon, daemon::Error> {
        self.start_over(self.desired.clone()).await
    }

    /// Orders the call that comes after `skip` others at this point to fail or to hang.
    pub(crate) fn inject(&self, point: &str, skip: usize, action: FaultAction) {
        self.host.faults.inject(self.fault(point, skip, action));
    }

    /// All calls at this point fail.
    pub(crate) fn inject_all(&self, point: &str) {
        let action = FaultAction::Fail("ordered to fail".into());
        self.host.faults.inject(Fault { times: None, ..self.fault(point, 0, action) });
    }

    /// All calls that have to do with a LUN's device on its first path wait until faults are cleared.
    pub(crate) fn delay_scan(&self, lun: u64) {
        let fault = self.fault("rundir.store", 0, FaultAction::Stall);
        let detail = format!(":0:0:{lun}");
        self.host.faults.inject(Fault { detail, times: None, ..fault });
    }

    pub(crate) fn fault(&self, point: &str, skip: usize, action: FaultAction) -> Fault {
        let (detail, skip) = (String::new(), u32::try_from(skip).unwrap());
        Fault { point: point.into(), detail, skip, times: Some(1), action }
    }

    /// The node goes down: nothing of the kernel's is left, and no domain runs.
    pub(crate) fn shut_down(&self) {
        self.host.storage.reboot();
        self.host.pods.reboot();
        for number in 1..=VMS {
            self.host.hypervisor.stop_domain(&Self::endpoint(number), &domain(number));
        }
    }

    /// It comes up again: the pods' processes are new, the domains are as they are defined.
    pub(crate) fn boot(&self) {
        for number in 1..=VMS {
            self.host.pods.start_qemu(&uid(number), &domain(number));
            self.host.hypervisor.start_domain(&Self::endpoint(number), &domain(number));
        }
    }

    /// The node as it is, to compare with later.
    pub(crate) fn picture(&self) -> String {
        self.host.snapshot()
    }

    /// Nothing of any volume is left on the node.
    #[track_caller]
    pub(crate) fn assert_clean(&self, what: &str) {
        self.assert_clean_but(what, &[]);
    }

    /// The same, but for lines that begin so.
    #[track_caller]
    pub(crate) fn assert_clean_but(&self, what: &str, but: &[&str]) {
        let now = self.host.snapshot();
        let lines = |text: &str| -> Vec<String> {
            let counts = |l: &&str| !but.iter().any(|b| l.starts_with(b));
            text.lines().filter(counts).map(str::to_owned).collect()
        };
        let (now, before) = (lines(&now), lines(&self.before));
        let left: Vec<&String> = now.iter().filter(|l| !before.contains(l)).collect();
        let lost: Vec<&String> = before.iter().filter(|l| !now.contains(l)).collect();
        assert!(now == before, "{what}: left {left:#?}, lost {lost:#?}");
    }

    /// The name of the n-th VM's libvirt.
    pub(crate) fn endpoint(number: u8) -> String {
        SimHost::endpoint(&uid(number))
    }
}

/// A running daemon.
pub(crate) struct Daemon {
    pub(crate) registry: Arc<Registry>,
}

impl Daemon {
    /// Wants a volume of the n-th VM.
    pub(crate) async fn want(
        &self,
        number: u8,
        spec: &VolumeSpec,
    ) -> Result<VolumeStatus, Refusal> {
        let options = AddOptions::default();
        let added = self.registry.add_volume(&vm(number), spec.clone(), options).await;
        added.map(Outcome::into_inner)
    }

    /// Adds a volume and waits until it is ready, or in trouble.
    pub(crate) async fn add(&self, number: u8, spec: &VolumeSpec) -> VolumeStatus {
        self.want(number, spec).await.unwrap();
        self.comes_to(number, spec.name.as_str()).await
    }

    /// Adds a volume that does not come to be ready; says why.
    pub(crate) async fn add_fails(&self, number: u8, spec: &VolumeSpec) -> Reason {
        match self.want(number, spec).await {
            Err(refusal) => refusal.reason,
            Ok(_) => {
                let status = self.comes_to(number, spec.name.as_str()).await;
                status.reason.unwrap_or_else(|| panic!("{} came to be ready", spec.name))
            }
        }
    }

    pub(crate) async fn get(&self, number: u8, name: &str) -> Option<VolumeStatus> {
        self.registry.get_volume(&key(number, name)).await.ok()
    }

    /// Wants a volume no more.
    pub(crate) async fn drop_volume(
        &self,
        number: u8,
        name: &str,
        options: RemoveOptions,
    ) -> Result<VolumeStatus, Refusal> {
        let removed = self.registry.remove_volume(&key(number, name), options).await;
        removed.map(Outcome::into_inner)
    }

    /// Removes a volume and waits until it is gone, with all that goes on in the background.
    pub(crate) async fn remove(&self, number: u8, name: &str) {
        self.drop_volume(number, name, RemoveOptions::default()).await.unwrap();
        self.gone(number, name).await;
    }

    /// Waits until the volume is ready, has failed, or has a trouble to tell.
    pub(crate) async fn comes_to(&self, number: u8, name: &str) -> VolumeStatus {
        let end = |s: &VolumeStatus| s.phase == Phase::Ready || s.reason.is_some();
        self.until(number, name, end).await
    }

    /// Waits until the volume is ready, whatever trouble it has on the way.
    pub(crate) async fn ready(&self, number: u8, name: &str) -> VolumeStatus {
        let ready = |s: &VolumeStatus| s.phase == Phase::Ready && s.reason.is_none();
        self.until(number, name, ready).await
    }

    pub(crate) async fn until(
        &self,
        number: u8,
        name: &str,
        is: impl Fn(&VolumeStatus) -> bool,
    ) -> VolumeStatus {
        let mut changes = self.registry.watch();
        let waited = async {
            loop {
                match self.registry.get_volume(&key(number, name)).await {
                    Ok(status) if is(&status) => return status,
                    _ => drop(changes.recv().await.unwrap()),
                }
            }
        };
        let waited = tokio::time::timeout(QUIET, waited).await;
        match waited {
            Ok(status) => status,
            Err(_) => {
                panic!("{name} stays {:?}", self.registry.get_volume(&key(number, name)).await)
            }
        }
    }

    /// Waits until the volume is gone.
    pub(crate) async fn gone(&self, number: u8, name: &str) {
        let mut changes = self.registry.watch();
        let key = key(number, name);
        let waited = async {
            while self.registry.get_volume(&key).await.is_ok() {
                changes.recv().await.unwrap();
            }
        };
        if tokio::time::timeout(QUIET, waited).await.is_err() {
            panic!("{name} stays {:?}", self.registry.get_volume(&key).await);
        }
    }

    /// Lets everything that goes on in the background come to its end.
    pub(crate) async fn quiet(&self) {
        tokio::time::sleep(QUIET).await;
    }
}
