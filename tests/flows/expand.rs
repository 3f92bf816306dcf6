//! A LUN grows, and so do its paths, its map and the guest's disk; or nothing does, and it is told why.

use std::time::Duration;

use lunplug::host::libvirt::Job;
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction, PortalState};
use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{MultipathPolicy, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::step::{KillPoint, Way};
use lunplug::types::{Bus, Outcome};
use lunplug::vm::facade::{Expanded, Refusal, Volumes};

use crate::faults::each;
use crate::world::{Daemon, World, domain, key, lun, node, portal, single, target, volume};

const GIB: u64 = 1 << 30;

impl Daemon {
    async fn expand(&self, number: u8, name: &str) -> Result<Outcome<Expanded>, Refusal> {
        self.registry.expand_volume(&key(number, name), None).await
    }
}

/// The array gives LUN 1 another size.
fn resize(world: &World, size: u64) {
    world.host.storage.resize_lun(&target(), lun(1), size);
}

/// How many bytes the n-th VM's guest sees of its disk.
pub(crate) fn seen(world: &World, number: u8, name: &str) -> Option<u64> {
    let alias = format!("ua-lunplug-{name}");
    let endpoint = World::endpoint(number);
    world.host.hypervisor.with_domain(&endpoint, &domain(number), |d| d.shown(&alias)).unwrap()
}

/// The sizes that the volume has: as told, of its device, and in the guest.
async fn sizes(world: &World, daemon: &Daemon) -> [u64; 3] {
    let device = daemon.get(1, "data").await.unwrap().device.unwrap();
    let of_device = world.host.storage.size_of(device.dev).unwrap();
    [device.size, of_device, seen(world, 1, "data").unwrap()]
}

pub(crate) fn kinds() -> [VolumeSpec; 4] {
    let off = VolumeSpec { multipath: MultipathPolicy::Off, ..volume("data", 1) };
    let virtio = VolumeSpec { bus: Bus::Virtio, ..volume("data", 1) };
    [volume("data", 1), single("data", 1), off, virtio]
}

#[test]
fn a_grown_lun_grows_the_map_and_the_guests_disk() {
    for spec in kinds() {
        let world = World::new();
        world.life(async |daemon| {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
            resize(&world, 2 * GIB);
            let grown = daemon.expand(1, "data").await.unwrap();
            assert!(grown.changed());
            let grown = grown.into_inner();
            assert_eq!((grown.before, grown.size), (GIB, 2 * GIB));
            assert_eq!(grown.status.device.unwrap().size, 2 * GIB);
            assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
            let again = daemon.expand(1, "data").await.unwrap();
            assert!(!again.changed(), "{again:?}");
            daemon.quiet().await;
            let status = daemon.ready(1, "data").await;
            assert_eq!(status.device.unwrap().size, 2 * GIB);
        });
        // The next life finds it as it is.
        world.life(async |daemon| {
            let status = daemon.ready(1, "data").await;
            assert_eq!(status.device.unwrap().size, 2 * GIB);
            assert!(!daemon.expand(1, "data").await.unwrap().changed());
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("grown and removed");
        });
    }
}

#[test]
fn a_path_that_is_down_is_named_and_nothing_is_changed() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        world.host.storage.set_portal(portal(2), PortalState::Dead);
        resize(&world, 2 * GIB);
        let refusal = daemon.expand(1, "data").await.unwrap_err();
        assert_eq!(refusal.reason, Reason::PathDown, "{refusal}");
        assert!(refusal.message.contains("3:0:0:1 (sdb)"), "{refusal}");
        assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
        world.host.storage.set_portal(portal(2), PortalState::Alive);
        assert!(daemon.expand(1, "data").await.unwrap().changed());
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a path was down");
    });
}

#[test]
fn a_path_that_went_down_while_it_was_read_does_not_pass_for_unchanged() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        resize(&world, 2 * GIB);
        let stall = Fault {
            detail: "3:0:0:1/rescan".into(),
            ..world.fault("sysfs.write", 0, FaultAction::Stall)
        };
        world.host.faults.inject(stall);
        let cut = async {
            world.host.faults.meeting().await;
            world.host.storage.set_portal(portal(2), PortalState::Dead);
            world.host.faults.clear();
        };
        let (expanded, ()) = tokio::join!(daemon.expand(1, "data"), cut);
        assert_eq!(expanded.unwrap_err().reason, Reason::PathDown);
        assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
    });
}

#[test]
fn paths_of_two_sizes_are_named() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        resize(&world, 2 * GIB);
        // The array's second port has not taken it over when it is asked.
        let stall = Fault {
            detail: "3:0:0:1/rescan".into(),
            ..world.fault("sysfs.write", 0, FaultAction::Stall)
        };
        world.host.faults.inject(stall);
        let lag = async {
            world.host.faults.meeting().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
            resize(&world, GIB);
            world.host.faults.clear();
        };
        let (expanded, ()) = tokio::join!(daemon.expand(1, "data"), lag);
        let refusal = expanded.unwrap_err();
        assert_eq!(refusal.reason, Reason::SizesDisagree, "{refusal}");
        for part in ["2:0:0:1 (sda)", "3:0:0:1 (sdb)", "2147483648", "1073741824"] {
            assert!(refusal.message.contains(part), "{refusal}");
        }
        assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
        resize(&world, 2 * GIB);
        assert!(daemon.expand(1, "data").await.unwrap().changed());
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
    });
}

#[test]
fn a_lun_that_shrank_is_told_and_left() {
    for spec in kinds() {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &spec).await;
            resize(&world, GIB / 2);
            let refusal = daemon.expand(1, "data").await.unwrap_err();
            assert_eq!(refusal.reason, Reason::LunShrunk, "{refusal}");
            assert_eq!(seen(&world, 1, "data"), Some(GIB));
            resize(&world, GIB);
            assert!(!daemon.expand(1, "data").await.unwrap().changed());
            assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
        });
    }
}

#[test]
fn a_size_that_is_expected_must_be_reached() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        let expand = async |size| daemon.registry.expand_volume(&key(1, "data"), Some(size)).await;
        let refusal = expand(2 * GIB).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::SizeUnexpected, "{refusal}");
        resize(&world, 2 * GIB);
        assert_eq!(expand(3 * GIB).await.unwrap_err().reason, Reason::SizeUnexpected);
        assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
        assert!(expand(2 * GIB).await.unwrap().changed());
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
    });
}

/// The size that was asked for at the add does not stand in the way of the grown volume's return.
#[test]
fn an_expected_size_grows_with_the_volume() {
    let world = World::new();
    let sized = VolumeSpec { expect_size: Some(GIB), ..volume("data", 1) };
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &sized).await.reason, None);
        resize(&world, 2 * GIB);
        let grown = daemon.expand(1, "data").await.unwrap().into_inner();
        assert_eq!(grown.status.spec.expect_size, Some(2 * GIB));
        // Whoever keeps asking for it as it was finds it.
        assert_eq!(daemon.add(1, &sized).await.phase, Phase::Ready);
        // The VM is started again, so that it is attached anew.
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        daemon.until(1, "data", |s| s.phase == Phase::Pending && s.reason.is_some()).await;
        world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
        daemon.ready(1, "data").await;
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
    });
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        daemon.ready(1, "data").await;
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
        daemon.remove(1, "data").await;
        // A new volume is judged by what is asked for it.
        assert_eq!(daemon.add_fails(1, &sized).await, Reason::IdentityMismatch);
    });
}

#[test]
fn only_a_ready_volume_of_a_running_vm_can_be_expanded() {
    let world = World::new();
    world.life(async |daemon| {
        let reason = async |name| daemon.expand(1, name).await.unwrap_err().reason;
        assert_eq!(reason("none").await, Reason::VolumeNotFound);
        world.delay_scan(1);
        daemon.want(1, &volume("data", 1)).await.unwrap();
        world.host.faults.meeting().await;
        assert_eq!(reason("data").await, Reason::VolumeNotReady);
        world.host.faults.clear();
        daemon.ready(1, "data").await;
        let with = |change: fn(&mut SimDomain)| {
            world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), change)
        };
        with(|d| d.job = Some(Job::Backup));
        resize(&world, 2 * GIB);
        assert_eq!(reason("data").await, Reason::DomainBusy);
        with(|d| d.job = None);
        assert!(daemon.expand(1, "data").await.unwrap().changed());
        with(|d| d.paused = true);
        resize(&world, 3 * GIB);
        assert!(daemon.expand(1, "data").await.unwrap().changed(), "a paused guest is told too");
        // The daemon has not noticed yet that the VM has stopped.
        with(|d| assert!(d.stop()));
        assert_eq!(reason("data").await, Reason::VmNotRunning);
    });
}

#[test]
fn a_read_only_disk_cannot_be_told_and_says_so() {
    let world = World::new();
    let spec = VolumeSpec { read_only: true, ..volume("data", 1) };
    world.life(async |daemon| {
        daemon.add(1, &spec).await;
        resize(&world, 2 * GIB);
        let refusal = daemon.expand(1, "data").await.unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported, "{refusal}");
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB, 2 * GIB, GIB]);
        daemon.remove(1, "data").await;
        daemon.add(1, &spec).await;
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
        assert!(!daemon.expand(1, "data").await.unwrap().changed());
    });
}

#[test]
fn each_guest_of_a_shared_lun_is_told_by_its_own_expand() {
    let world = World::new();
    let shared = VolumeSpec { shareable: true, ..volume("data", 1) };
    world.life(async |daemon| {
        for vm in [1, 2] {
            assert_eq!(daemon.add(vm, &shared).await.phase, Phase::Ready);
        }
        resize(&world, 2 * GIB);
        assert!(daemon.expand(1, "data").await.unwrap().changed());
        assert_eq!((seen(&world, 1, "data"), seen(&world, 2, "data")), (Some(2 * GIB), Some(GIB)));
        // The map has grown; a grant, a node and a disk are the other's own.
        let second = daemon.expand(2, "data").await.unwrap();
        assert!(second.changed(), "its guest was told");
        assert_eq!(seen(&world, 2, "data"), Some(2 * GIB));
        assert!(!daemon.expand(2, "data").await.unwrap().changed());
        daemon.remove(1, "data").await;
        daemon.remove(2, "data").await;
        daemon.quiet().await;
        world.assert_clean("shared and grown");
    });
}

#[test]
fn a_removal_calls_an_expand_off() {
    for point in ["sysfs.write", "multipathd.ask", "libvirt.resize"] {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &volume("data", 1)).await;
            daemon.quiet().await;
            resize(&world, 2 * GIB);
            world.inject(point, 0, FaultAction::Hang);
            let remove = async {
                world.host.faults.meeting().await;
                daemon.drop_volume(1, "data", RemoveOptions::default()).await.unwrap();
            };
            let expand = || daemon.expand(1, "data");
            let (first, behind, ()) = tokio::join!(expand(), expand(), remove);
            assert_eq!(first.unwrap_err().reason, Reason::Cancelled, "{point}");
            assert_eq!(behind.unwrap_err().reason, Reason::VolumeNotReady, "{point}");
            world.host.faults.clear();
            daemon.gone(1, "data").await;
            daemon.quiet().await;
            world.assert_clean(point);
        });
    }
}

#[test]
fn expands_of_a_volume_take_turns() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        resize(&world, 2 * GIB);
        let both = tokio::join!(daemon.expand(1, "data"), daemon.expand(1, "data"));
        assert!(both.0.unwrap().changed() && !both.1.unwrap().changed());
    });
}

/// Expands a volume that must have its size, is killed, and is asked again in the next life.
fn goes_on_after(world: &World, kill: Fault) {
    let spec = VolumeSpec { expect_size: Some(GIB), ..volume("data", 1) };
    let what = format!("{kill:?}");
    world.life(async |daemon| {
        daemon.add(1, &spec).await;
        daemon.quiet().await;
        resize(world, 2 * GIB);
        world.host.faults.inject(kill);
        tokio::select! {
            () = world.host.faults.meeting() => {}
            _ = daemon.expand(1, "data") => {}
        }
        world.host.faults.clear();
    });
    world.life(async |daemon| {
        let status = daemon.ready(1, "data").await;
        assert_eq!(status.device.unwrap().paths, 2, "{what}");
        daemon.expand(1, "data").await.unwrap();
        assert_eq!(sizes(world, &daemon).await, [2 * GIB; 3], "{what}");
        assert_eq!(daemon.ready(1, "data").await.spec.expect_size, Some(2 * GIB), "{what}");
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean(&what);
    });
}

#[test]
fn an_expand_goes_on_after_a_kill_on_either_side_of_any_step() {
    let world = World::new();
    let faults = world.host.faults.clone();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        resize(&world, 2 * GIB);
        faults.reached();
        daemon.expand(1, "data").await.unwrap();
        let names = |p: Vec<KillPoint>| p.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(names(faults.reached()), names(KillPoint::of(Way::Expand).collect()));
    });
    for point in KillPoint::of(Way::Expand) {
        let world = World::new();
        let kill = Fault { detail: point.to_string(), ..world.fault("kill", 0, FaultAction::Hang) };
        goes_on_after(&world, kill);
    }
}

/// How many calls an expand makes.
fn calls() -> usize {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &VolumeSpec { expect_size: Some(GIB), ..volume("data", 1) }).await;
        daemon.quiet().await;
        resize(&world, 2 * GIB);
        let begin = world.host.faults.calls();
        daemon.expand(1, "data").await.unwrap();
        world.host.faults.calls() - begin
    })
}

#[test]
fn an_expand_goes_on_after_a_kill_at_any_call() {
    each(calls(), |at| {
        let world = World::new();
        goes_on_after(&world, world.fault("", at, FaultAction::Hang));
    });
}

/// A reboot after the kill: the volume comes back with the size that its LUN has.
#[test]
fn an_expand_that_a_reboot_cut_off_does_not_keep_the_volume_away() {
    for point in KillPoint::of(Way::Expand).skip(2) {
        let world = World::over(node(), Desired::in_memory().unwrap());
        let spec = VolumeSpec { expect_size: Some(GIB), ..volume("data", 1) };
        let kill = Fault { detail: point.to_string(), ..world.fault("kill", 0, FaultAction::Hang) };
        world.life(async |daemon| {
            daemon.add(1, &spec).await;
            resize(&world, 2 * GIB);
            world.host.faults.inject(kill);
            tokio::select! {
                () = world.host.faults.meeting() => {}
                _ = daemon.expand(1, "data") => {}
            }
        });
        world.host.faults.clear();
        world.shut_down();
        world.boot();
        world.life(async |daemon| {
            daemon.ready(1, "data").await;
            assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3], "{point}");
        });
    }
}

#[test]
fn any_call_that_fails_or_hangs_leaves_a_working_volume_and_the_next_expand_goes_on() {
    for action in [FaultAction::Fail("ordered to fail".into()), FaultAction::Hang] {
        each(calls(), |at| {
            let world = World::new();
            world.life(async |daemon| {
                let spec = VolumeSpec { expect_size: Some(GIB), ..volume("data", 1) };
                daemon.add(1, &spec).await;
                daemon.quiet().await;
                resize(&world, 2 * GIB);
                world.inject("", at, action.clone());
                let expanded = daemon.expand(1, "data").await;
                let met = world.host.faults.met();
                world.host.faults.clear();
                let status = daemon.get(1, "data").await.unwrap();
                assert_eq!(status.phase, Phase::Ready, "{met:?} {expanded:?}");
                daemon.expand(1, "data").await.unwrap();
                assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3], "{met:?}");
                daemon.remove(1, "data").await;
                daemon.quiet().await;
                world.assert_clean(&format!("{met:?}"));
            });
        });
    }
}

#[test]
fn growth_that_is_announced_is_followed_only_where_configured() {
    for auto in [false, true] {
        let mut world = World::new();
        world.config.expand.auto = auto;
        world.life(async |daemon| {
            daemon.add(1, &volume("data", 1)).await;
            daemon.quiet().await;
            resize(&world, 2 * GIB);
            world.host.storage.announce_size(&target(), lun(1));
            tokio::time::sleep(Duration::from_secs(30)).await;
            let size = if auto { 2 * GIB } else { GIB };
            assert_eq!(sizes(&world, &daemon).await, [size; 3]);
        });
    }
}

#[test]
fn announced_growth_with_a_path_down_is_told_and_followed_when_it_is_back() {
    let mut world = World::new();
    world.config.expand.auto = true;
    world.config.reconcile.interval = Duration::from_secs(60);
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        resize(&world, 2 * GIB);
        let stuck = Fault {
            detail: "3:0:0:1/rescan".into(),
            times: None,
            ..world.fault("sysfs.write", 0, FaultAction::Fail("I/O error".into()))
        };
        world.host.faults.inject(stuck);
        // Somebody reads one path anew: the kernel tells of it.
        world.host.storage.rescan_path(&target(), lun(1), portal(1));
        let told = daemon.until(1, "data", |s| s.reason == Some(Reason::PathDown)).await;
        assert_eq!(told.phase, Phase::Ready);
        assert!(told.message.contains("3:0:0:1 (sdb)"), "{}", told.message);
        assert_eq!(sizes(&world, &daemon).await, [GIB; 3]);
        world.host.faults.clear();
        let grown = |s: &VolumeStatus| {
            s.reason.is_none() && s.device.as_ref().is_some_and(|d| d.size == 2 * GIB)
        };
        daemon.until(1, "data", grown).await;
        daemon.quiet().await;
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
    });
}

#[test]
fn who_comes_to_a_shared_lun_that_has_grown_waits_for_the_expand_of_who_has_it() {
    let world = World::new();
    let shared = VolumeSpec { shareable: true, ..volume("data", 1) };
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &shared).await.phase, Phase::Ready);
        resize(&world, 2 * GIB);
        let status = daemon.add(2, &shared).await;
        assert_eq!((status.phase, status.reason), (Phase::Pending, Some(Reason::MapFailed)));
        assert!(status.message.contains("1073741824 bytes and its paths 2147483648"), "{status:?}");
        assert_eq!(seen(&world, 1, "data"), Some(GIB));
        daemon.expand(1, "data").await.unwrap();
        daemon.ready(2, "data").await;
        assert_eq!(seen(&world, 2, "data"), Some(2 * GIB));
        assert!(!daemon.expand(2, "data").await.unwrap().changed());
    });
}

/// The LUN is grown while the VM is away: the volume that comes back has the new size, and one that
/// shrank does not come back.
#[test]
fn a_lun_that_grew_while_the_vm_was_away_comes_back_grown() {
    let world = World::new();
    let sized = VolumeSpec { expect_size: Some(GIB), ..volume("data", 1) };
    world.life(async |daemon| {
        assert_eq!(daemon.add(1, &sized).await.reason, None);
        let (endpoint, domain) = (World::endpoint(1), domain(1));
        let away =
            |s: &VolumeStatus| s.phase == Phase::Pending && s.reason == Some(Reason::VmNotRunning);
        world.host.hypervisor.stop_domain(&endpoint, &domain);
        daemon.until(1, "data", away).await;
        resize(&world, 2 * GIB);
        world.host.hypervisor.start_domain(&endpoint, &domain);
        daemon.ready(1, "data").await;
        assert_eq!(sizes(&world, &daemon).await, [2 * GIB; 3]);
        world.host.hypervisor.stop_domain(&endpoint, &domain);
        daemon.until(1, "data", away).await;
        resize(&world, GIB / 2);
        world.host.hypervisor.start_domain(&endpoint, &domain);
        let refused = |s: &VolumeStatus| s.reason == Some(Reason::IdentityMismatch);
        daemon.until(1, "data", refused).await;
    });
}
