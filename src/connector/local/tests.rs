//! Flows on the simulated host.

use std::sync::Arc;

use super::*;
use crate::connector::settings::WithoutIdentity;
use crate::connector::{Connectors, Expect};
use crate::host::sim::{Fault, FaultAction, Faults, SimBlock, SimLun, SimStorage};
use crate::reason::Reason;
use crate::spec::MultipathPolicy;
use crate::types::{DevNum, Iqn, Lun};

const GIB: u64 = 1 << 30;

struct Node {
    sim: SimStorage,
    connector: Connectors,
}

fn owner(volume: &str) -> VolumeKey {
    VolumeKey { vm: "ns/vm".parse().expect("vm"), volume: volume.parse().expect("volume") }
}

fn source(path: &str) -> Source {
    format!("block://{path}").parse().expect("a source")
}

fn request(volume: &str, source: Source) -> AttachRequest {
    AttachRequest {
        owner: owner(volume),
        source,
        expect: Expect::default(),
        multipath: MultipathPolicy::Preferred,
        shareable: false,
        read_only: false,
        authentication: Authentication::None,
    }
}

fn data(volume: &str) -> AttachRequest {
    request(volume, source("/dev/vg/data"))
}

fn lvm(name: &str) -> SimBlock {
    SimBlock::Lvm(format!("LVM-{name}"))
}

impl Node {
    /// /dev/vg/data is a logical volume.
    fn new() -> (Self, DevNum) {
        Self::with(WithoutIdentity::Refuse)
    }

    fn with(without_identity: WithoutIdentity) -> (Self, DevNum) {
        let sim = SimStorage::new(Arc::new(Faults::default()));
        let dev = sim.add_local("/dev/vg/data", lvm("data"), GIB);
        let block_roots = vec!["/dev".into()];
        let file_roots = vec!["/srv".into()];
        let local = LocalSettings { block_roots, file_roots, without_identity };
        let settings = Settings { local, ..Settings::default() };
        let connector = Connectors::new(StorageDoors::sim(&sim), settings);
        (Self { sim, connector }, dev)
    }

    async fn attach(&self, request: &AttachRequest) -> Attachment {
        self.connector.attach(request).await.expect("attached").into_inner()
    }

    /// Attaches in vain: nothing may be left of it.
    async fn refused(&self, request: &AttachRequest) -> Error {
        let before = self.sim.snapshot();
        let error = self.connector.attach(request).await.expect_err("refused");
        assert_eq!(self.sim.snapshot(), before, "{error}");
        error
    }

    async fn detach(&self, request: &AttachRequest) -> Result<Outcome, Error> {
        let options = DetachOptions::default();
        self.connector.detach(&request.owner, &request.source, options).await
    }

    async fn health(&self, request: &AttachRequest) -> Health {
        let volume = (request.owner.clone(), request.source.clone());
        self.connector.inspect(&[volume]).await.remove(0).expect("seen")
    }

    /// Somebody scans for all LUNs.
    async fn scan(&self) {
        let sysfs = StorageDoors::sim(&self.sim).sysfs;
        for host in sysfs.entries("class/scsi_host").await.expect("hosts") {
            let scan = format!("class/scsi_host/{host}/scan");
            sysfs.write(&scan, "- - -").await.expect("scanned");
        }
    }

    /// A target with one LUN.
    fn target(&self) -> Iqn {
        let target: Iqn = "iqn.2026-01.org.lunplug:t".parse().expect("IQN");
        self.sim.add_target(&target, &["192.0.2.1".parse().expect("portal")]);
        let wwid = "naa.60014050000000000000000000000001".parse().expect("WWID");
        self.sim.add_lun(&target, Lun::try_from(1).expect("LUN"), SimLun::new(wwid, GIB));
        target
    }
}

fn lun(volume: &str, target: &Iqn) -> AttachRequest {
    let source = format!("iscsi://192.0.2.1/{target}/1").parse().expect("a source");
    request(volume, source)
}

#[tokio::test(start_paused = true)]
async fn a_device_is_had_as_it_is_and_left_as_it_was() {
    let (node, dev) = Node::new();
    let before = node.sim.snapshot();
    let attachment = node.attach(&data("a")).await;
    assert_eq!((attachment.device.dev, attachment.device.size), (dev, GIB));
    assert_eq!(attachment.device.wwid.as_str(), "dm.LVM-data");
    assert_eq!((attachment.device.paths, attachment.paths.len()), (1, 0));
    let again = node.connector.attach(&data("a")).await.expect("attached");
    assert_eq!(again, Outcome::Already(attachment.clone()));
    let seen = node.connector.observe(&owner("a"), &data("a").source).await.expect("seen");
    assert_eq!(seen, Some(attachment));
    assert_eq!(node.connector.owners().await.expect("owners"), [owner("a")]);
    assert!(node.detach(&data("a")).await.expect("detached").changed());
    assert!(!node.detach(&data("a")).await.expect("detached").changed());
    assert_eq!(node.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn each_kind_of_device_has_the_identity_that_its_driver_gives_it() {
    let (node, _) = Node::new();
    let rbd = node.sim.add_local("/dev/rbd/p/i", SimBlock::Rbd("1022".into()), GIB);
    let attachment = node.attach(&request("r", source("/dev/rbd/p/i"))).await;
    assert_eq!(attachment.device.dev, rbd);
    let wwid = "rbd.b2c1e3f0-0000-4000-8000-000000000001/3/1022";
    assert_eq!(attachment.device.wwid.as_str(), wwid);
    node.sim.add_local("/dev/loop0", SimBlock::Loop, GIB);
    let error = node.refused(&request("l", source("/dev/loop0"))).await;
    assert_eq!(error.reason(), Reason::NoUniqueIdentity);
    assert!(error.to_string().contains("local.without_identity"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_device_without_an_identity_is_had_by_its_path_where_that_is_set_and_once() {
    let (node, _) = Node::with(WithoutIdentity::Path);
    let dev = node.sim.add_local("/dev/loop0", SimBlock::Loop, GIB);
    node.sim.lead_to("/dev/alias", dev);
    let one = request("l", source("/dev/loop0"));
    let attachment = node.attach(&one).await;
    assert_eq!(attachment.device.wwid.as_str(), "path./dev/loop0");
    let other = request("m", source("/dev/alias"));
    assert_eq!(node.refused(&other).await.reason(), Reason::SourceInUse);
    node.detach(&one).await.expect("detached");
    node.attach(&other).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_not_allowed_not_there_or_no_device_is_refused() {
    let (node, dev) = Node::new();
    node.sim.lead_to("/srv/data", dev);
    let error = node.refused(&request("a", source("/srv/data"))).await;
    assert_eq!(error.reason(), Reason::SourceNotAllowed);
    assert!(error.to_string().contains("local.block_roots"), "{error}");
    let error = node.refused(&request("a", source("/dev/none"))).await;
    assert_eq!(error.reason(), Reason::SourceNotFound);
    node.sim.lead_to("/dev/stale", DevNum { major: 60, minor: 1 });
    let error = node.refused(&request("a", source("/dev/stale"))).await;
    assert_eq!(error.reason(), Reason::SourceNotFound);
    let required = AttachRequest { multipath: MultipathPolicy::Required, ..data("a") };
    assert_eq!(node.refused(&required).await.reason(), Reason::InvalidOption);
}

#[tokio::test(start_paused = true)]
async fn it_must_be_what_is_expected_and_what_it_was() {
    let (node, dev) = Node::new();
    let expect = |wwid: &str| Expect { wwid: wwid.parse().ok(), ..Expect::default() };
    let other = AttachRequest { expect: expect("dm.LVM-other"), ..data("a") };
    assert_eq!(node.refused(&other).await.reason(), Reason::IdentityMismatch);
    let size = Expect { size: Some(2 * GIB), ..Expect::default() };
    let larger = AttachRequest { expect: size, ..data("a") };
    assert_eq!(node.refused(&larger).await.reason(), Reason::IdentityMismatch);
    let right = AttachRequest { expect: expect("dm.LVM-data"), ..data("a") };
    node.attach(&right).await;
    node.detach(&right).await.expect("detached");
    node.sim.replace_local(dev, Some(lvm("new")));
    let recorded = Expect { recorded: "dm.LVM-data".parse().ok(), ..Expect::default() };
    let was = AttachRequest { expect: recorded.clone(), ..data("a") };
    assert_eq!(node.refused(&was).await.reason(), Reason::IdentityChanged);
    let accept_new_identity = true;
    let accepted =
        AttachRequest { expect: Expect { accept_new_identity, ..recorded }, ..data("a") };
    assert_eq!(node.attach(&accepted).await.device.wwid.as_str(), "dm.LVM-new");
}

#[tokio::test(start_paused = true)]
async fn whoever_looks_at_the_stores_can_read_a_lease() {
    let (node, _) = Node::new();
    node.attach(&data("a")).await;
    let rundir = node.sim.rundir();
    let names = rundir.list("leases/local").await.expect("listed");
    let [name] = &names[..] else { panic!("{names:?}") };
    let file = format!("leases/local/{name}");
    let bytes = rundir.load(&file).await.expect("read").expect("there");
    let lease = crate::connector::facts::read_lease(&file, &bytes).expect("a lease");
    assert_eq!((&lease.file, lease.target.as_str()), (&file, "block:///dev/vg/data"));
    let [user] = &lease.users[..] else { panic!("{lease:?}") };
    assert_eq!((&user.owner, user.lun, user.attached), (&owner("a"), None, true));
    assert_eq!(user.wwid.as_ref().map(Wwid::as_str), Some("dm.LVM-data"));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_somebody_holds_is_refused() {
    let (node, dev) = Node::new();
    node.sim.hold(dev, "mount of /srv");
    let error = node.refused(&data("a")).await;
    assert_eq!(error.reason(), Reason::DeviceHeld);
    node.sim.release(dev);
    node.sim.open(dev, "mkfs.ext4[12]");
    let error = node.refused(&data("a")).await;
    assert!(error.to_string().contains("mkfs.ext4[12]"), "{error}");
    node.sim.release(dev);
    let above = node.sim.stack_dm(dev, "crypt", "CRYPT-LUKS2-x");
    let error = node.refused(&data("a")).await;
    assert!(error.to_string().contains("crypt"), "{error}");
    assert!(node.sim.unstack_dm(above));
    node.attach(&data("a")).await;
}

#[tokio::test(start_paused = true)]
async fn a_removal_waits_for_who_holds_it_unless_forced_and_leaves_the_device() {
    let (node, dev) = Node::new();
    node.attach(&data("a")).await;
    node.sim.open(dev, "qemu-system-x86[7]");
    let error = node.detach(&data("a")).await.expect_err("held");
    assert_eq!(error.reason(), Reason::DeviceHeld);
    let gave_up = crate::connector::GaveUp::default();
    let force = DetachOptions { force: true, gave_up: Some(&gave_up), released: None };
    node.connector.detach(&owner("a"), &data("a").source, force).await.expect("forced");
    assert!(gave_up.list()[0].contains("qemu-system-x86[7]"), "{:?}", gave_up.list());
    assert_eq!(node.sim.size_of(dev), Some(GIB));
}

#[tokio::test(start_paused = true)]
async fn a_write_protected_device_is_for_reading_only() {
    let (node, dev) = Node::new();
    node.sim.protect_local(dev, true);
    assert_eq!(node.refused(&data("a")).await.reason(), Reason::LunReadOnly);
    node.attach(&AttachRequest { read_only: true, ..data("a") }).await;
    let Health::Right { paths, .. } = node.health(&data("a")).await else { panic!("differs") };
    assert!(paths.protected);
}

#[tokio::test(start_paused = true)]
async fn one_device_is_one_volumes_unless_all_of_them_share_it() {
    let (node, dev) = Node::new();
    node.sim.lead_to("/dev/mapper/vg-data", dev);
    let by_mapper = |volume| request(volume, source("/dev/mapper/vg-data"));
    node.attach(&data("a")).await;
    assert_eq!(node.refused(&by_mapper("b")).await.reason(), Reason::SourceInUse);
    assert_eq!(node.refused(&data("b")).await.reason(), Reason::SourceInUse);
    node.detach(&data("a")).await.expect("detached");
    let share = |request| AttachRequest { shareable: true, ..request };
    node.attach(&share(data("a"))).await;
    node.sim.open(dev, "qemu-system-x86[7]");
    node.attach(&share(by_mapper("b"))).await;
    // The other one has it open still.
    node.detach(&share(data("a"))).await.expect("detached");
    assert_eq!(node.connector.owners().await.expect("owners"), [owner("b")]);
}

#[tokio::test(start_paused = true)]
async fn what_lunplug_has_by_a_transport_is_not_given_as_what_is_on_the_host() {
    let (node, _) = Node::new();
    let target = node.target();
    let share = |request| AttachRequest { shareable: true, ..request };
    let attached = node.attach(&share(lun("a", &target))).await;
    node.sim.lead_to("/dev/sda", attached.device.dev);
    // Not even shared: it goes with the volume that has brought it.
    let by_path = share(request("b", source("/dev/sda")));
    assert_eq!(node.refused(&by_path).await.reason(), Reason::SourceInUse);
    // Nor what lies on it.
    let above = node.sim.stack_dm(attached.device.dev, "vg-x", "LVM-x");
    node.sim.lead_to("/dev/vg/x", above);
    let error = node.refused(&request("b", source("/dev/vg/x"))).await;
    assert_eq!(error.reason(), Reason::DeviceHeld);
    assert!(error.to_string().contains("ns/vm/a"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn partitions_are_no_volumes_and_count_as_their_disk() {
    let (node, dev) = Node::new();
    let part = node.sim.add_partition(dev, "/dev/part");
    let error = node.refused(&request("a", source("/dev/part"))).await;
    assert_eq!(error.reason(), Reason::SourceNotFound);
    assert!(error.to_string().contains("is a partition"), "{error}");
    // A disk with partitions is given: they may be the guest's own. Not so when one of them is in use.
    let above = node.sim.stack_dm(part, "vg-x", "LVM-x");
    let error = node.refused(&data("a")).await;
    assert_eq!(error.reason(), Reason::DeviceHeld);
    assert!(node.sim.unstack_dm(above));
    node.attach(&data("a")).await;
    // What lies on a partition of what another volume has.
    let above = node.sim.stack_dm(part, "vg-y", "LVM-y");
    node.sim.lead_to("/dev/vg/y", above);
    let error = node.refused(&request("b", source("/dev/vg/y"))).await;
    assert!(error.to_string().contains("ns/vm/a"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_device_that_cannot_be_opened_is_told() {
    let (node, _) = Node::new();
    let fail = FaultAction::Fail("no medium".into());
    let (point, detail) = ("blocks.exclusive".into(), String::new());
    node.sim.faults().inject(Fault { point, detail, skip: 1, times: Some(1), action: fail });
    let error = node.refused(&data("a")).await;
    assert_eq!(error.reason(), Reason::HostIoFailed);
    assert!(error.to_string().contains("/dev/vg/data (dm-200)"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_lun_of_somebody_elses_session_is_had_by_its_path_and_by_no_transport_then() {
    let (node, _) = Node::new();
    let target = node.target();
    node.sim.set_multipathd(false);
    node.sim.add_session(&target, "192.0.2.1".parse().expect("portal"), "default");
    node.scan().await;
    let dev: DevNum = "8:0".parse().expect("number");
    node.sim.lead_to("/dev/disk/by-id/wwn-0x6001405", dev);
    let by_path = request("a", source("/dev/disk/by-id/wwn-0x6001405"));
    let attachment = node.attach(&by_path).await;
    assert_eq!(attachment.device.wwid.as_str(), "naa.60014050000000000000000000000001");
    assert_eq!(node.refused(&lun("b", &target)).await.reason(), Reason::SourceInUse);
    node.detach(&by_path).await.expect("detached");
    assert_eq!(node.sim.size_of(dev), Some(GIB), "it is left as it was");
}

#[tokio::test(start_paused = true)]
async fn a_multipath_map_is_the_lun_of_its_paths() {
    let (node, _) = Node::new();
    let target = node.target();
    node.sim.set_multipathd(false);
    node.sim.add_session(&target, "192.0.2.1".parse().expect("portal"), "default");
    node.scan().await;
    let path: DevNum = "8:0".parse().expect("number");
    let map = node.sim.stack_dm(path, "mpatha", "mpath-360014050000000000000000000000001");
    node.sim.lead_to("/dev/mapper/mpatha", map);
    node.sim.lead_to("/dev/sda", path);
    let error = node.refused(&request("a", source("/dev/sda"))).await;
    assert!(error.to_string().contains("mpatha"), "{error}");
    let attachment = node.attach(&request("a", source("/dev/mapper/mpatha"))).await;
    assert_eq!(attachment.device.dev, map);
    assert_eq!(attachment.device.wwid.as_str(), "naa.60014050000000000000000000000001");
}

#[tokio::test(start_paused = true)]
async fn a_look_sees_a_device_that_is_gone_or_another_one() {
    let (node, dev) = Node::new();
    node.attach(&data("a")).await;
    assert!(matches!(node.health(&data("a")).await, Health::Right { .. }));
    // The same identity by the same number, but it was made anew.
    node.sim.replace_local(dev, None);
    assert!(matches!(node.health(&data("a")).await, Health::Differs(_)));
    assert!(node.connector.attach(&data("a")).await.expect("attached").changed());
    node.sim.remove_local(dev);
    assert!(matches!(node.health(&data("a")).await, Health::Differs(_)));
    // Nothing of it is there to be flushed.
    node.detach(&data("a")).await.expect("detached");
}

#[tokio::test(start_paused = true)]
async fn a_device_that_has_grown_is_measured_and_followed() {
    let (node, dev) = Node::new();
    node.attach(&data("a")).await;
    let (whose, what) = (owner("a"), data("a").source);
    let mut changes = node.connector.changes();
    // Whoever reads the events has to have begun.
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    node.sim.resize_local(dev, 2 * GIB);
    let touched = changes.recv().await.expect("told");
    let Health::Right { attachment, paths } = node.health(&data("a")).await else { panic!() };
    assert!(paths.grown && touched.announces_size(Some(&attachment)));
    let measured = node.connector.measure(&whose, &what, Some(2 * GIB)).await.expect("measured");
    assert_eq!(measured, Measured { before: GIB, now: 2 * GIB });
    let grown = node.connector.grow(&whose, &what, 2 * GIB).await.expect("grown");
    assert!(grown.changed() && grown.into_inner().device.size == 2 * GIB);
    assert!(!node.connector.grow(&whose, &what, 2 * GIB).await.expect("grown").changed());
    let error = node.connector.measure(&whose, &what, Some(3 * GIB)).await.expect_err("not so");
    assert_eq!(error.reason(), Reason::SizeUnexpected);
    node.sim.resize_local(dev, GIB);
    let error = node.connector.measure(&whose, &what, None).await.expect_err("shrunk");
    assert_eq!(error.reason(), Reason::LunShrunk);
    assert!(error.to_string().contains("/dev/vg/data"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn what_another_boot_wrote_is_void() {
    let (mut node, dev) = Node::new();
    node.attach(&data("a")).await;
    node.sim.reboot();
    let local = LocalSettings { block_roots: vec!["/dev".into()], ..LocalSettings::default() };
    let settings = Settings { local, ..Settings::default() };
    node.connector = Connectors::new(StorageDoors::sim(&node.sim), settings);
    assert!(node.connector.owners().await.expect("owners").is_empty());
    assert_eq!(node.attach(&data("b")).await.device.dev, dev);
}
