//! Media: LUNs in cdrom drives that the domain has.

use std::time::Duration;

use lunplug::domain::xml;
use lunplug::host::libvirt::Definition;
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, Phase, RemoveOptions, Revision, VolumeSpec, VolumeStatus};
use lunplug::step::{KillPoint, Way};
use lunplug::vm::facade::{Set, Volumes};

use crate::faults::{Sweep, each};
use crate::world::{Daemon, FORCE, World, domain, key, medium, vm, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

fn with<T>(world: &World, change: impl FnOnce(&mut SimDomain) -> T) -> T {
    world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), change).unwrap()
}

/// What the first VM's drive has.
fn drive(world: &World, target: &str) -> Option<String> {
    let live = xml::parse(&with(world, |d| d.xml(Definition::Live))).unwrap();
    let drive = live.disks.into_iter().find(|disk| disk.target == target).unwrap();
    assert_eq!(drive.alias, Some(format!("ua-cd-{target}")), "the drive keeps its own alias");
    drive.source.clone()
}

fn lock(world: &World, locked: bool) {
    with(world, |d| d.lock_tray("sda", locked));
}

const PATH: &str = "/var/run/kubevirt/hotplug-disks/iso";

fn named(name: &str, lun: u64, drive: &str) -> VolumeSpec {
    VolumeSpec { drive: drive.parse().ok(), ..medium(name, lun) }
}

#[test]
fn a_medium_comes_into_the_drive_and_another_life_takes_it_out() {
    let world = World::with_drives(&["sda"]);
    world.life(async |daemon| {
        let status = daemon.add(1, &medium("iso", 1)).await;
        assert_eq!((status.phase, status.target.as_deref()), (Phase::Ready, Some("sda")));
        assert_eq!(drive(&world, "sda").as_deref(), Some(PATH));
        // A disk beside it is not disturbed, nor does it take the drive's name.
        let disk = daemon.add(1, &volume("data", 2)).await;
        assert_eq!(disk.target.as_deref(), Some("sdb"));
        daemon.quiet().await;
        let status = daemon.get(1, "iso").await.unwrap();
        assert_eq!((status.phase, status.reason), (Phase::Ready, None));
    });
    world.life(async |daemon| {
        let status = daemon.ready(1, "iso").await;
        assert!(status.spec.read_only);
        daemon.remove(1, "iso").await;
        assert_eq!(drive(&world, "sda"), None);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("ejected");
    });
}

#[test]
fn the_device_of_a_medium_can_be_read_alone() {
    let world = World::with_drives(&["sda"]);
    world.life(async |daemon| {
        daemon.add(1, &medium("iso", 1)).await;
        let open = |read_only| world.host.hypervisor.may_open(&World::endpoint(1), PATH, read_only);
        open(true).unwrap();
        open(false).unwrap_err();
    });
}

#[test]
fn two_media_are_in_two_drives() {
    let world = World::with_drives(&["sda", "sdb"]);
    world.life(async |daemon| {
        let refusal = daemon.want(1, &medium("iso", 1)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::DriveNotFound);
        assert_eq!(refusal.field.as_deref(), Some("volume.drive"));
        for part in ["sda (empty)", "sdb (empty)", "name one"] {
            assert!(refusal.message.contains(part), "{refusal}");
        }
        daemon.add(1, &named("iso", 1, "sdb")).await;
        assert_eq!(drive(&world, "sdb").as_deref(), Some(PATH));
        // Now there is but one that can be meant.
        let status = daemon.add(1, &medium("more", 2)).await;
        assert_eq!((status.phase, status.target.as_deref()), (Phase::Ready, Some("sda")));
        daemon.remove(1, "iso").await;
        assert!(drive(&world, "sda").is_some() && drive(&world, "sdb").is_none());
        daemon.remove(1, "more").await;
        daemon.quiet().await;
        world.assert_clean("two drives");
    });
}

#[test]
fn a_drive_that_is_not_there_or_has_a_medium_is_refused_before_anything_is_touched() {
    let world = World::with_drives(&["sda"]);
    with(&world, |d| d.change_medium("sda", Some("/their.iso")));
    let refused = async |daemon: &Daemon, spec: &VolumeSpec, reason, says: &str| {
        let refusal = daemon.want(1, spec).await.unwrap_err();
        assert_eq!(refusal.reason, reason, "{refusal}");
        assert_eq!(refusal.field.as_deref(), Some("volume.drive"));
        assert!(refusal.message.contains(says), "{refusal}");
    };
    world.life(async |daemon| {
        let occupied = Reason::DriveOccupied;
        refused(&daemon, &medium("iso", 1), occupied, "/their.iso").await;
        refused(&daemon, &named("iso", 1, "sda"), occupied, "/their.iso").await;
        refused(&daemon, &named("iso", 1, "sdq"), Reason::DriveNotFound, "sdq").await;
        refused(&daemon, &named("iso", 1, "vda"), Reason::DriveNotFound, "vda is a disk").await;
        with(&world, |d| d.change_medium("sda", None));
        world.assert_clean("refused");
        daemon.add(1, &medium("iso", 1)).await;
        // Neither by its drive nor by there being no other is a second one taken.
        let held = "volume iso";
        refused(&daemon, &named("more", 2, "sda"), occupied, held).await;
        refused(&daemon, &medium("more", 2), occupied, PATH).await;
        daemon.remove(1, "iso").await;
    });
    let world = World::new();
    world.life(async |daemon| {
        refused(&daemon, &medium("iso", 1), Reason::DriveNotFound, "no cdrom drive").await;
    });
}

#[test]
fn a_guest_that_has_locked_the_tray_keeps_the_medium_until_it_lets_go_or_is_not_heeded() {
    for force in [false, true] {
        let world = World::with_drives(&["sda"]);
        world.life(async |daemon| {
            daemon.add(1, &medium("iso", 1)).await;
            daemon.quiet().await;
            lock(&world, true);
            daemon.drop_volume(1, "iso", PLAIN).await.unwrap();
            let status = daemon.until(1, "iso", |s| s.reason.is_some()).await;
            assert_eq!(
                (status.phase, status.reason),
                (Phase::Detaching, Some(Reason::InUseByGuest)),
                "{}",
                status.message
            );
            assert!(status.message.contains("sda"), "{}", status.message);
            // All of it works on.
            world.host.hypervisor.may_open(&World::endpoint(1), PATH, true).unwrap();
            assert_eq!(drive(&world, "sda").as_deref(), Some(PATH));
        });
        world.life(async |daemon| {
            if force {
                let mut changes = daemon.registry.watch();
                daemon.drop_volume(1, "iso", FORCE).await.unwrap();
                let gave_up = loop {
                    let status = changes.recv().await.unwrap();
                    if status.phase == Phase::Gone {
                        break status.gave_up.join("; ");
                    }
                };
                assert!(gave_up.contains("locked"), "{gave_up}");
            } else {
                daemon.until(1, "iso", |s| s.reason.is_some()).await;
                lock(&world, false);
            }
            daemon.gone(1, "iso").await;
            daemon.quiet().await;
            world.assert_clean("it let go");
        });
    }
}

#[test]
fn a_medium_that_somebody_took_out_comes_back_and_one_that_he_put_in_stays() {
    let mut world = World::with_drives(&["sda"]);
    world.config.reconcile.interval = Duration::from_secs(60);
    world.life(async |daemon| {
        daemon.add(1, &medium("iso", 1)).await;
        with(&world, |d| d.change_medium("sda", None));
        daemon.quiet().await;
        assert_eq!(drive(&world, "sda").as_deref(), Some(PATH));
        with(&world, |d| d.change_medium("sda", Some("/their.iso")));
        let status = daemon.until(1, "iso", |s| s.reason.is_some()).await;
        assert_eq!((status.phase, status.reason), (Phase::Ready, Some(Reason::DriveOccupied)));
        assert!(status.message.contains("/their.iso"), "{}", status.message);
        daemon.drop_volume(1, "iso", FORCE).await.unwrap();
        daemon.gone(1, "iso").await;
        daemon.quiet().await;
        assert_eq!(drive(&world, "sda").as_deref(), Some("/their.iso"));
        with(&world, |d| d.change_medium("sda", None));
        world.assert_clean("theirs stayed");
    });
}

#[test]
fn a_medium_comes_back_into_its_drive_with_the_vm() {
    let world = World::with_drives(&["sda"]);
    world.life(async |daemon| {
        daemon.add(1, &medium("iso", 1)).await;
        let (endpoint, domain) = (World::endpoint(1), domain(1));
        world.host.hypervisor.stop_domain(&endpoint, &domain);
        let away = |s: &VolumeStatus| s.reason == Some(Reason::VmNotRunning);
        daemon.until(1, "iso", away).await;
        world.host.hypervisor.start_domain(&endpoint, &domain);
        daemon.ready(1, "iso").await;
        assert_eq!(drive(&world, "sda").as_deref(), Some(PATH));
    });
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        daemon.ready(1, "iso").await;
        assert_eq!(drive(&world, "sda").as_deref(), Some(PATH));
        daemon.remove(1, "iso").await;
        daemon.quiet().await;
        world.assert_clean("it came back and went");
    });
}

/// Makes these the whole of the first VM's volumes.
async fn sync(daemon: &Daemon, number: i64, volumes: &[VolumeSpec]) {
    let asked = volumes.iter().map(|v| v.name.to_string()).collect::<Vec<_>>().join(",");
    let set = Set {
        revision: Revision { number, asked: asked.into() },
        volumes: volumes.iter().map(|v| (v.clone(), AddOptions::default())).collect(),
        others: Default::default(),
        removals: PLAIN,
    };
    let synced = daemon.registry.sync_volumes(&vm(1), set).await.unwrap();
    let answers = synced.volumes.into_iter().chain(synced.removed.into_iter().map(|(_, r)| r));
    answers.for_each(|answer| drop(answer.unwrap()));
}

#[test]
fn media_are_swapped_and_the_next_one_waits_for_the_guest_to_let_go_of_the_last() {
    for drive_name in ["", "sda"] {
        let world = World::with_drives(&["sda"]);
        world.life(async |daemon| {
            sync(&daemon, 1, &[named("iso", 1, drive_name)]).await;
            daemon.ready(1, "iso").await;
            sync(&daemon, 2, &[named("next", 2, drive_name)]).await;
            daemon.ready(1, "next").await;
            daemon.gone(1, "iso").await;
            let next = "/var/run/kubevirt/hotplug-disks/next";
            assert_eq!(drive(&world, "sda").as_deref(), Some(next));
            lock(&world, true);
            sync(&daemon, 3, &[named("last", 3, drive_name)]).await;
            let busy = |s: &VolumeStatus| s.reason == Some(Reason::DriveBusy);
            let status = daemon.until(1, "last", busy).await;
            assert_eq!(status.phase, Phase::Pending);
            assert!(status.message.contains("volume next"), "{}", status.message);
            daemon.until(1, "next", |s| s.reason == Some(Reason::InUseByGuest)).await;
            assert_eq!(drive(&world, "sda").as_deref(), Some(next));
            lock(&world, false);
            daemon.ready(1, "last").await;
            daemon.gone(1, "next").await;
            daemon.remove(1, "last").await;
            daemon.quiet().await;
            world.assert_clean("swapped");
        });
    }
}

#[test]
fn a_medium_that_grows_is_told_to_no_guest() {
    let world = World::with_drives(&["sda"]);
    world.life(async |daemon| {
        daemon.add(1, &medium("iso", 1)).await;
        let same = daemon.registry.expand_volume(&key(1, "iso"), None).await.unwrap();
        assert!(!same.changed());
        let lun = crate::world::lun(1);
        world.host.storage.resize_lun(&crate::world::target(), lun, 2 << 30);
        let refusal = daemon.registry.expand_volume(&key(1, "iso"), None).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::Unsupported, "{refusal}");
        daemon.remove(1, "iso").await;
    });
}

/// The daemon is killed while libvirtd hangs with an insert in its queue, which is carried out at any
/// moment of the removal that the successor takes up.
#[test]
fn an_insert_of_nobody_is_undone_at_whatever_moment_it_comes() {
    let endpoint = World::endpoint(1);
    let sweep = Sweep { spec: medium("iso", 1), beside: false };
    each(sweep.calls().1, |at| {
        let world = sweep.world();
        world.life(async |daemon| {
            daemon.quiet().await;
            world.host.hypervisor.hang(&endpoint, "update");
            daemon.want(1, &sweep.spec).await.unwrap();
            while !world.host.hypervisor.is_hung(&endpoint) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            daemon.drop_volume(1, "iso", FORCE).await.unwrap();
        });
        world.host.hypervisor.disconnect(&endpoint);
        world.host.hypervisor.withhold(&endpoint);
        world.life(async |daemon| {
            world.inject("", at, FaultAction::Stall);
            let gone = daemon.gone(1, "iso");
            let deliver = async {
                tokio::select! {
                    () = world.host.faults.meeting() => {}
                    () = daemon.quiet() => {}
                }
                world.host.hypervisor.deliver(&endpoint);
                world.host.faults.clear();
            };
            tokio::join!(gone, deliver);
            daemon.quiet().await;
            world.assert_clean(&format!("delivered at call {at}"));
        });
    });
}

#[test]
fn media_go_on_after_a_kill_on_either_side_of_any_step() {
    let sweep = Sweep { spec: medium("iso", 1), beside: false };
    let kill = |point: &KillPoint| Fault {
        point: "kill".into(),
        detail: point.to_string(),
        skip: 0,
        times: Some(1),
        action: FaultAction::Hang,
    };
    let added: Vec<KillPoint> = KillPoint::of(Way::Attach).collect();
    each(added.len(), |at| sweep.add_goes_on(&sweep.world(), kill(&added[at])));
    each(added.len(), |at| sweep.add_is_given_up(&sweep.world(), kill(&added[at])));
    let removed: Vec<KillPoint> = KillPoint::of(Way::Detach).collect();
    each(removed.len(), |at| sweep.removal_goes_on(&sweep.world(), kill(&removed[at])));
}

#[test]
fn media_go_on_after_a_kill_at_any_call() {
    let sweep = Sweep { spec: medium("iso", 1), beside: false };
    let (adds, removals) = sweep.calls();
    let kill = |world: &World, at| world.fault("", at, FaultAction::Hang);
    each(adds, |at| {
        let world = sweep.world();
        sweep.add_goes_on(&world, kill(&world, at));
    });
    each(removals, |at| {
        let world = sweep.world();
        sweep.removal_goes_on(&world, kill(&world, at));
    });
}
