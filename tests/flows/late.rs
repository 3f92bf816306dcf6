//! Calls to libvirt that take effect after their caller gave up, or died.

use std::time::Duration;

use lunplug::host::sim::FaultAction;
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions};
use lunplug::vm::facade::{VmState, Volumes};

use crate::faults::{each, kinds};
use crate::world::{FORCE, World, domain, uid, vm, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

/// The attach of [`World`]'s first VM stalls in libvirt while all other calls are answered.
fn stall_attach(world: &World) {
    world.host.faults.inject(world.fault("libvirt.attach", 0, FaultAction::Stall));
}

/// The disk's way is whole: what QEMU is about to open is there.
#[track_caller]
fn assert_untouched(world: &World) {
    let picture = world.picture();
    for part in ["  node data ", "grant ", "dm ", "session "] {
        assert!(picture.contains(part), "{part:?} is not in {picture}");
    }
}

/// Whether the call passed its own deadline or that of the whole attach.
fn cut_off_by_either() -> [World; 2] {
    let (mut whole, mut call) = (World::new(), World::new());
    whole.config.deadlines.attach = Duration::from_secs(3);
    call.config.deadlines.libvirt_call = Duration::from_secs(3);
    [whole, call]
}

#[test]
fn an_attach_that_may_still_take_effect_is_not_undone_behind_its_back() {
    for world in cut_off_by_either() {
        world.life(async |daemon| {
            stall_attach(&world);
            daemon.want(1, &volume("data", 1)).await.unwrap();
            let status = daemon.until(1, "data", |s| s.reason.is_some()).await;
            assert_eq!(status.phase, Phase::Pending, "{status:?}");
            assert_eq!(status.reason, Some(Reason::LibvirtUnreachable), "{}", status.message);
            assert!(status.message.contains("may still take effect"), "{}", status.message);
            assert_untouched(&world);
            // Nor is it by somebody who wants it no more, by force or not.
            daemon.drop_volume(1, "data", FORCE).await.unwrap();
            daemon.quiet().await;
            assert_eq!(daemon.get(1, "data").await.unwrap().phase, Phase::Detaching);
            assert_untouched(&world);
            world.host.faults.clear();
            daemon.gone(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("it came late and went");
        });
    }
}

#[test]
fn an_attach_that_comes_late_is_the_volumes() {
    for world in cut_off_by_either() {
        world.life(async |daemon| {
            stall_attach(&world);
            daemon.want(1, &volume("data", 1)).await.unwrap();
            daemon.until(1, "data", |s| s.reason.is_some()).await;
            world.host.faults.clear();
            daemon.ready(1, "data").await;
            daemon.quiet().await;
            assert_eq!(world.picture().matches("live sda ua-lunplug-data").count(), 1);
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("it came late and stayed");
        });
    }
}

/// A detach that was given up on would take the disk that comes after it.
#[test]
fn a_name_is_not_used_anew_while_its_old_detach_may_take_effect() {
    let world = World::new();
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        world.host.faults.inject(world.fault("libvirt.detach", 0, FaultAction::Stall));
        daemon.remove(1, "data").await;
        daemon.want(1, &volume("data", 2)).await.unwrap();
        let status = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!(status.reason, Some(Reason::LibvirtUnreachable), "{}", status.message);
        assert!(!world.picture().contains("ua-lunplug-data"), "it was attached");
        world.host.faults.clear();
        daemon.ready(1, "data").await;
        daemon.quiet().await;
        assert!(world.picture().contains("live sda ua-lunplug-data"));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("a late detach");
    });
}

/// The daemon is killed while libvirtd hangs with an attach in its queue, which is carried out at any
/// moment of the removal that the successor takes up.
#[test]
fn an_attach_of_nobody_is_undone_at_whatever_moment_it_comes() {
    let endpoint = World::endpoint(1);
    let [plain, _, virtio, ..] = kinds();
    for sweep in [plain, virtio] {
        let delivered = |at: usize| {
            let world = sweep.world();
            world.life(async |daemon| {
                daemon.quiet().await;
                world.host.hypervisor.hang(&endpoint, "attach");
                daemon.want(1, &sweep.spec).await.unwrap();
                while !world.host.hypervisor.is_hung(&endpoint) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                daemon.drop_volume(1, sweep.name(), FORCE).await.unwrap();
            });
            world.host.hypervisor.disconnect(&endpoint);
            world.host.hypervisor.withhold(&endpoint);
            world.inject("", at, FaultAction::Stall);
            let before = world.host.faults.calls();
            let what = world.life(async |daemon| {
                tokio::select! {
                    () = world.host.faults.meeting() => {}
                    () = daemon.gone(1, sweep.name()) => {}
                }
                world.host.hypervisor.deliver(&endpoint);
                let met = world.host.faults.met();
                world.host.faults.clear();
                daemon.gone(1, sweep.name()).await;
                format!("delivered at call {at}, {met:?}")
            });
            let calls = world.host.faults.calls() - before;
            // One that could not read its stores did not serve the VM.
            world.life(async |daemon| {
                daemon.gone(1, sweep.name()).await;
                sweep.end(&world, &daemon, &what).await;
            });
            calls
        };
        let count = delivered(100_000);
        each(count, |at| {
            delivered(at);
        });
    }
}

/// One VM's libvirtd hangs: that VM waits and says so, others do not notice.
#[test]
fn a_libvirtd_that_hangs_holds_up_its_own_vm_alone() {
    let world = World::new();
    let endpoint = World::endpoint(1);
    world.life(async |daemon| {
        daemon.add(1, &volume("old", 1)).await;
        daemon.quiet().await;
        world.host.hypervisor.hang(&endpoint, "");
        let refusal = daemon.want(1, &volume("data", 2)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::LibvirtUnreachable);
        assert_eq!(daemon.add(2, &volume("other", 3)).await.phase, Phase::Ready);
        daemon.drop_volume(1, "old", FORCE).await.unwrap();
        let status = daemon.until(1, "old", |s| s.reason.is_some()).await;
        assert_eq!(
            (status.phase, status.reason),
            (Phase::Detaching, Some(Reason::LibvirtUnreachable))
        );
        let vms = daemon.registry.list_vms().await;
        let state = |id| vms.iter().find(|v| v.spec.id == id).map(|v| v.state);
        assert_eq!(state(vm(1)), Some(VmState::Unreachable));
        assert_eq!(state(vm(2)), Some(VmState::Running));
        daemon.remove(2, "other").await;
        world.host.hypervisor.go_on(&endpoint);
        daemon.gone(1, "old").await;
        daemon.want(1, &volume("data", 2)).await.unwrap();
        daemon.ready(1, "data").await;
        let _ = daemon.drop_volume(1, "data", PLAIN).await;
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("hung and back");
    });
}

/// Its directory is gone, but QEMU runs on with the disk open.
#[test]
fn a_pod_without_a_directory_keeps_its_disks_while_it_runs() {
    let world = World::new();
    let endpoint = World::endpoint(1);
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        world.host.pods.remove_dir(&uid(1));
        // The socket went with it, and the connection for whatever reason.
        world.host.hypervisor.disconnect(&endpoint);
        daemon.quiet().await;
        let status = daemon.get(1, "data").await.unwrap();
        assert_eq!((status.phase, status.reason), (Phase::Ready, Some(Reason::PodGone)));
        let kept =
            |picture: String| ["grant ", "dm ", "session "].iter().all(|p| picture.contains(p));
        assert!(kept(world.picture()), "{}", world.picture());
        daemon.drop_volume(1, "data", FORCE).await.unwrap();
        let status = daemon.until(1, "data", |s| s.phase == Phase::Detaching && s.reason.is_some());
        assert_eq!(status.await.reason, Some(Reason::LibvirtUnreachable));
        daemon.quiet().await;
        assert!(kept(world.picture()), "{}", world.picture());
        world.host.pods.kill_qemu(&uid(1));
        world.host.hypervisor.stop_domain(&endpoint, &domain(1));
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.host.pods.edit(&uid(1), |pod| pod.dir_gone = false);
        let left = world.picture();
        assert!(
            !["grant ", "dm ", "session ", "record "].iter().any(|p| left.contains(p)),
            "{left}"
        );
    });
}
