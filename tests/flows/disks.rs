//! How a disk is run: what was asked for is in the domain, and stays so.

use lunplug::host::libvirt::{Affect, Definition};
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::step::{KillPoint, Way};
use lunplug::types::{
    BlockSize, Blocks, Bus, CacheMode, DetectZeroes, Discard, DiskType, IoLimits, IoMode, Outcome,
    Tuning,
};
use lunplug::vm::facade::{Refusal, Volumes};

use crate::faults::each;
use crate::world::{Daemon, World, domain, key, volume};

/// The first VM's domain as its libvirt shows it.
fn live(world: &World) -> String {
    let endpoint = World::endpoint(1);
    let xml = |d: &mut lunplug::host::sim::domain::SimDomain| d.xml(Definition::Live);
    world.host.hypervisor.with_domain(&endpoint, &domain(1), xml).unwrap()
}

fn tuned(tuning: Tuning) -> VolumeSpec {
    VolumeSpec { tuning, ..volume("data", 1) }
}

#[test]
fn a_disk_is_run_as_asked_and_another_life_finds_it_so() {
    let size = |bytes: u32| BlockSize::try_from(bytes).ok();
    let tuning = Tuning {
        io: Some(IoMode::IoUring),
        discard: Some(Discard::Ignore),
        detect_zeroes: Some(DetectZeroes::On),
        blocks: Blocks::new(size(512), size(4096)).unwrap(),
    };
    for bus in [Bus::Scsi, Bus::Virtio] {
        let world = World::new();
        let spec = VolumeSpec { bus, ..tuned(tuning) };
        let before = world.life(async |daemon| {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            let xml = live(&world);
            for part in [
                "io='io_uring' discard='ignore' detect_zeroes='on'",
                "<blockio logical_block_size='512' physical_block_size='4096'/>",
            ] {
                assert!(xml.contains(part), "{part} in {xml}");
            }
            xml
        });
        world.life(async |daemon| {
            assert_eq!(daemon.ready(1, "data").await.spec.tuning, tuning);
            assert_eq!(live(&world), before, "nothing was done anew");
            let other = tuned(Tuning { io: None, ..tuning });
            let refusal = daemon.want(1, &VolumeSpec { bus, ..other }).await.unwrap_err();
            assert_eq!(refusal.reason, Reason::VolumeExists);
            assert_eq!(refusal.field.as_deref(), Some("volume.io"));
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("tuned");
        });
    }
}

#[test]
fn options_that_exclude_each_other_are_refused_before_anything_is_touched() {
    let world = World::new();
    world.life(async |daemon| {
        let native = Tuning { io: Some(IoMode::Native), ..Tuning::default() };
        let spec = VolumeSpec { cache: CacheMode::Writeback, ..tuned(native) };
        let refusal = daemon.want(1, &spec).await.unwrap_err();
        assert_eq!(
            (refusal.reason, refusal.field.as_deref()),
            (Reason::InvalidOption, Some("volume.io"))
        );
        assert!(refusal.message.contains("cache writeback"), "{refusal}");
        world.assert_clean("refused");
    });
}

const IOPS: IoLimits = IoLimits {
    total_iops_sec: 100,
    total_bytes_sec: 0,
    read_bytes_sec: 0,
    write_bytes_sec: 0,
    read_iops_sec: 0,
    write_iops_sec: 0,
};
const BYTES: IoLimits =
    IoLimits { read_bytes_sec: 5, write_iops_sec: 6, total_iops_sec: 0, ..IOPS };
const NONE: IoLimits = IoLimits { total_iops_sec: 0, ..IOPS };

impl Daemon {
    async fn limit(&self, limits: IoLimits) -> Result<Outcome<VolumeStatus>, Refusal> {
        self.registry.set_io_limits(&key(1, "data"), limits).await
    }
}

/// The limits of the first VM's disk in one of its definitions.
fn limits(world: &World, definition: Definition) -> IoLimits {
    let endpoint = World::endpoint(1);
    let xml = |d: &mut lunplug::host::sim::domain::SimDomain| d.xml(definition);
    let xml = world.host.hypervisor.with_domain(&endpoint, &domain(1), xml).unwrap();
    lunplug::domain::xml::parse(&xml).unwrap().disk("ua-lunplug-data").unwrap().limits
}

#[test]
fn limits_come_with_the_disk_and_are_changed_while_the_guest_has_it() {
    for persist in [false, true] {
        let world = World::new();
        let spec = VolumeSpec { limits: IOPS, persist, ..volume("data", 1) };
        let definitions: &[Definition] =
            if persist { &[Definition::Live, Definition::Config] } else { &[Definition::Live] };
        let all = |wanted| definitions.iter().all(|d| limits(&world, *d) == wanted);
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            assert!(all(IOPS));
            assert!(!daemon.limit(IOPS).await.unwrap().changed());
            let set = daemon.limit(BYTES).await.unwrap();
            assert!(set.changed() && set.into_inner().spec.limits == BYTES);
            assert!(all(BYTES));
            assert!(!daemon.limit(BYTES).await.unwrap().changed());
            let refusal = daemon.want(1, &spec).await.unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("volume.io_limits"));
        });
        world.life(async |daemon| {
            assert_eq!(daemon.ready(1, "data").await.spec.limits, BYTES);
            assert!(daemon.limit(NONE).await.unwrap().changed());
            assert!(all(NONE));
            daemon.remove(1, "data").await;
            assert_eq!(daemon.limit(IOPS).await.unwrap_err().reason, Reason::VolumeNotFound);
            daemon.quiet().await;
            world.assert_clean("limited");
        });
    }
}

#[test]
fn limits_that_somebody_else_changed_are_put_back() {
    let mut world = World::new();
    world.config.reconcile.interval = std::time::Duration::from_secs(60);
    world.life(async |daemon| {
        daemon.add(1, &VolumeSpec { limits: IOPS, ..volume("data", 1) }).await;
        daemon.quiet().await;
        let by_hand = |d: &mut lunplug::host::sim::domain::SimDomain| {
            let domain = lunplug::domain::xml::parse(&d.xml(Definition::Live)).unwrap();
            let source = domain.disk("ua-lunplug-data").unwrap().source.clone().unwrap();
            d.limit(&source, &BYTES, Affect::LIVE).unwrap();
        };
        world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), by_hand).unwrap();
        assert_eq!(limits(&world, Definition::Live), BYTES);
        daemon.quiet().await;
        assert_eq!(limits(&world, Definition::Live), IOPS);
        assert_eq!(daemon.get(1, "data").await.unwrap().phase, Phase::Ready);
    });
}

#[test]
fn limits_that_are_set_while_the_vm_is_away_come_with_the_disk() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        let (endpoint, domain) = (World::endpoint(1), domain(1));
        world.host.hypervisor.stop_domain(&endpoint, &domain);
        let away = |s: &VolumeStatus| s.reason == Some(Reason::VmNotRunning);
        daemon.until(1, "data", away).await;
        assert!(daemon.limit(IOPS).await.unwrap().changed());
        world.host.hypervisor.start_domain(&endpoint, &domain);
        daemon.ready(1, "data").await;
        assert_eq!(limits(&world, Definition::Live), IOPS);
    });
}

#[test]
fn a_change_of_limits_waits_for_the_attach_and_a_removal_refuses_it() {
    let world = World::new();
    world.life(async |daemon| {
        world.inject("libvirt.attach", 0, FaultAction::Stall);
        daemon.want(1, &volume("data", 1)).await.unwrap();
        let go_on = async {
            world.host.faults.meeting().await;
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            world.host.faults.clear();
        };
        let (set, ()) = tokio::join!(daemon.limit(IOPS), go_on);
        assert!(set.unwrap().changed());
        assert_eq!(limits(&world, Definition::Live), IOPS);
        world.inject("libvirt.detach", 0, FaultAction::Stall);
        daemon.drop_volume(1, "data", RemoveOptions::default()).await.unwrap();
        world.host.faults.meeting().await;
        let refusal = daemon.limit(BYTES).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::VolumeNotReady, "{refusal}");
        world.host.faults.clear();
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("limited on the way");
    });
}

/// Kills a change of limits by this order; the next life has the limits of before or after, and goes on.
fn goes_on_after(world: &World, kill: Fault, what: &str) {
    world.life(async |daemon| {
        daemon.add(1, &VolumeSpec { limits: IOPS, ..volume("data", 1) }).await;
        daemon.quiet().await;
        world.host.faults.inject(kill);
        tokio::select! {
            () = world.host.faults.meeting() => {}
            _ = daemon.limit(BYTES) => {}
        }
        world.host.faults.clear();
    });
    world.life(async |daemon| {
        let wanted = daemon.ready(1, "data").await.spec.limits;
        daemon.quiet().await;
        assert_eq!(limits(world, Definition::Live), wanted, "{what}");
        daemon.limit(BYTES).await.unwrap();
        assert_eq!(limits(world, Definition::Live), BYTES, "{what}");
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean(what);
    });
}

#[test]
fn a_change_of_limits_goes_on_after_a_kill_at_any_step_or_call() {
    for point in KillPoint::of(Way::Retune) {
        let world = World::new();
        let what = point.to_string();
        let kill = Fault { detail: what.clone(), ..world.fault("kill", 0, FaultAction::Hang) };
        goes_on_after(&world, kill, &what);
    }
    let calls = {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &VolumeSpec { limits: IOPS, ..volume("data", 1) }).await;
            daemon.quiet().await;
            let begin = world.host.faults.calls();
            daemon.limit(BYTES).await.unwrap();
            world.host.faults.calls() - begin
        })
    };
    each(calls, |at| {
        let world = World::new();
        goes_on_after(&world, world.fault("", at, FaultAction::Hang), &format!("call {at}"));
    });
}

#[test]
fn limits_that_libvirt_refused_are_wanted_all_the_same() {
    let mut world = World::new();
    world.config.reconcile.interval = std::time::Duration::from_secs(60);
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        world.inject("libvirt.limit", 0, FaultAction::Fail("ordered to fail".into()));
        let refusal = daemon.limit(IOPS).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::LibvirtFailed, "{refusal}");
        assert_eq!(daemon.get(1, "data").await.unwrap().spec.limits, IOPS);
        daemon.quiet().await;
        assert_eq!(limits(&world, Definition::Live), IOPS);
    });
}

#[test]
fn the_root_ports_that_are_left_are_counted_with_the_volumes_on_their_way() {
    let world = World::new();
    world.life(async |daemon| {
        let spec = |n: u64| VolumeSpec { bus: Bus::Virtio, ..volume(&format!("v{n}"), n) };
        // Of the ten ports the boot disk and the controller have two.
        world.delay_scan(8);
        for n in 1..=8 {
            daemon.want(1, &spec(n)).await.unwrap();
        }
        for n in 1..=7 {
            daemon.ready(1, &format!("v{n}")).await;
        }
        let refusal = daemon.want(1, &spec(9)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::NoFreeAddress);
        assert!(refusal.message.contains("10 of 10 are taken"), "{refusal}");
        assert!(refusal.message.contains("pcie-root-port"), "{refusal}");
        world.host.faults.clear();
        daemon.ready(1, "v8").await;
        daemon.add(1, &volume("scsi", 9)).await;
    });
}

/// A LUN that is passed through.
fn passed(name: &str, lun: u64) -> VolumeSpec {
    VolumeSpec { serial: None, device: DiskType::Lun, ..volume(name, lun) }
}

#[test]
fn a_lun_is_passed_through_and_found_in_the_guest_by_its_own_identity() {
    let world = World::new();
    world.life(async |daemon| {
        let status = daemon.add(1, &passed("data", 1)).await;
        assert_eq!((status.phase, status.reason), (Phase::Ready, None));
        let xml = live(&world);
        assert!(xml.contains("device='lun'") && !xml.contains("<serial>data"), "{xml}");
        let refusal = daemon.limit(IOPS).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::InvalidOption, "{refusal}");
        // A second one beside it: neither has a serial that could clash.
        daemon.add(1, &passed("more", 2)).await;
        let identity = status.device.unwrap().wwid.multipath();
        let mount = |d: &mut lunplug::host::sim::domain::SimDomain| {
            d.agent.mounted.insert(identity.clone(), "/mnt".into());
        };
        let (endpoint, domain) = (World::endpoint(1), domain(1));
        world.host.hypervisor.with_domain(&endpoint, &domain, mount);
        let remove = daemon.drop_volume(1, "data", RemoveOptions::default()).await;
        let refusal = remove.unwrap_err();
        assert_eq!(refusal.reason, Reason::InUseByGuest);
        assert!(refusal.message.contains("/mnt"), "{refusal}");
        daemon.remove(1, "more").await;
        world.host.hypervisor.with_domain(&endpoint, &domain, |d| d.agent.mounted.clear());
    });
    world.life(async |daemon| {
        daemon.ready(1, "data").await;
        let other = volume("data", 1);
        let refusal = daemon.want(1, &other).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::VolumeExists, "{refusal}");
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("passed through");
    });
}

#[test]
fn a_guest_without_an_agent_proves_nothing_of_a_lun() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &passed("data", 1)).await;
        let (endpoint, domain) = (World::endpoint(1), domain(1));
        world.host.hypervisor.with_domain(&endpoint, &domain, |d| d.agent.connected = false);
        let remove = daemon.drop_volume(1, "data", RemoveOptions::default()).await;
        assert_eq!(remove.unwrap_err().reason, Reason::GuestUnproven);
        daemon.drop_volume(1, "data", crate::world::FORCE).await.unwrap();
        daemon.gone(1, "data").await;
    });
}

#[test]
fn persistent_reservations_go_to_the_configured_helper_or_are_refused() {
    let mut world = World::new();
    let spec = VolumeSpec { reservations: true, ..passed("data", 1) };
    world.life(async |daemon| {
        let refusal = daemon.want(1, &spec).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported);
        assert_eq!(refusal.field.as_deref(), Some("volume.persistent_reservations"));
        assert!(refusal.message.contains("pr_helper_socket"), "{refusal}");
        world.assert_clean("refused");
    });
    world.config.pr_helper_socket = "/var/run/pr-helper.sock".into();
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
        let xml = live(&world);
        let source = "<source type='unix' path='/var/run/pr-helper.sock' mode='client'/>";
        assert!(xml.contains("<reservations managed='no'>") && xml.contains(source), "{xml}");
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("reserved");
    });
}
