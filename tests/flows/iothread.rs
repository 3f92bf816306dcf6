//! I/O threads of disks' own: they come and go with their disks, and nobody else's are touched.

use lunplug::domain::iothread::{OURS, choose};
use lunplug::domain::xml::{self, Domain};
use lunplug::host::libvirt::{Affect, Definition};
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::reason::Reason;
use lunplug::spec::{Phase, VolumeSpec, VolumeStatus};
use lunplug::step::Step;
use lunplug::types::Bus;

use crate::faults::{Sweep, each};
use crate::world::{FORCE, World, domain, volume};

/// A volume whose disk has an I/O thread of its own.
fn threaded(name: &str, lun: u64) -> VolumeSpec {
    VolumeSpec { bus: Bus::Virtio, dedicated_io_thread: true, ..volume(name, lun) }
}

fn with<T>(world: &World, change: impl FnOnce(&mut SimDomain) -> T) -> T {
    world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), change).unwrap()
}

fn defined(world: &World, definition: Definition) -> Domain {
    xml::parse(&with(world, |d| d.xml(definition))).unwrap()
}

/// The thread of a volume's disk, which the domain must have.
#[track_caller]
fn thread(world: &World, definition: Definition, name: &str) -> u32 {
    let domain = defined(world, definition);
    let id = domain.disk(&format!("ua-lunplug-{name}")).unwrap().io_thread.unwrap();
    assert!(domain.io_threads.ids.contains(&id), "{domain:?}");
    assert!(OURS.contains(&id), "{id}");
    id
}

/// The id that the disk of that name takes first.
fn first(name: &str) -> u32 {
    let views = lunplug::domain::diff::Views { live: None, config: None };
    choose(&views, &name.parse().unwrap(), None)
}

#[test]
fn a_disk_has_a_thread_of_its_own_that_comes_and_goes_with_it() {
    for persist in [false, true] {
        let world = World::new();
        let spec = |name: &str, lun| VolumeSpec { persist, ..threaded(name, lun) };
        let had = world.life(async |daemon| {
            for (name, lun) in [("data", 1), ("more", 2)] {
                assert_eq!(daemon.add(1, &spec(name, lun)).await.phase, Phase::Ready);
            }
            let had = thread(&world, Definition::Live, "data");
            assert_ne!(had, thread(&world, Definition::Live, "more"));
            if persist {
                assert_eq!(thread(&world, Definition::Config, "data"), had);
            }
            had
        });
        world.life(async |daemon| {
            assert!(daemon.ready(1, "data").await.spec.dedicated_io_thread);
            daemon.quiet().await;
            assert_eq!(thread(&world, Definition::Live, "data"), had);
            let plain = VolumeSpec { dedicated_io_thread: false, ..spec("data", 1) };
            let refusal = daemon.want(1, &plain).await.unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("volume.dedicated_io_thread"));
            daemon.remove(1, "data").await;
            assert!(!defined(&world, Definition::Live).io_threads.ids.contains(&had));
            thread(&world, Definition::Live, "more");
            daemon.remove(1, "more").await;
            daemon.quiet().await;
            world.assert_clean("threaded");
        });
    }
}

#[test]
fn a_thread_of_its_own_needs_bus_virtio() {
    let world = World::new();
    world.life(async |daemon| {
        let spec = VolumeSpec { bus: Bus::Scsi, ..threaded("data", 1) };
        let refusal = daemon.want(1, &spec).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::InvalidOption);
        assert_eq!(refusal.field.as_deref(), Some("volume.dedicated_io_thread"));
        assert!(refusal.message.contains("bus virtio"), "{refusal}");
        world.assert_clean("refused");
    });
}

#[test]
fn a_thread_comes_back_with_its_disk() {
    for persist in [false, true] {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &VolumeSpec { persist, ..threaded("data", 1) }).await;
            let (endpoint, domain) = (World::endpoint(1), domain(1));
            world.host.hypervisor.stop_domain(&endpoint, &domain);
            let away = |s: &VolumeStatus| s.reason == Some(Reason::VmNotRunning);
            daemon.until(1, "data", away).await;
            world.host.hypervisor.start_domain(&endpoint, &domain);
            daemon.ready(1, "data").await;
            thread(&world, Definition::Live, "data");
            daemon.quiet().await;
        });
        // What was written down of it goes with the node.
        world.shut_down();
        world.boot();
        world.life(async |daemon| {
            daemon.ready(1, "data").await;
            thread(&world, Definition::Live, "data");
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("it came back and went");
        });
    }
}

#[test]
fn threads_of_others_are_neither_taken_nor_removed() {
    let world = World::new();
    world.life(async |daemon| {
        // Somebody's thread with the very id that ours would have, and a disk that uses it.
        let theirs = first("data");
        let disk = |alias: &str, target: &str, bus: u32, id: u32| {
            format!(
                "<disk type='block' device='disk'><driver name='qemu' type='raw' iothread='{id}'/>\
                 <source dev='/dev/{alias}'/><target dev='{target}' bus='virtio'/><alias name='{alias}'/>\
                 <address type='pci' domain='0' bus='{bus}' slot='0' function='0'/>\n</disk>"
            )
        };
        let attach = |d: &mut SimDomain, xml: &str| {
            d.attach(xml, Affect::LIVE, &|_, _| Ok(()), &|_| None).unwrap();
        };
        with(&world, |d| {
            [1, theirs].iter().for_each(|id| d.add_io_thread(*id, Affect::LIVE).unwrap());
            attach(d, &disk("theirs", "vdx", 9, theirs));
        });
        daemon.add(1, &threaded("data", 1)).await;
        let own = thread(&world, Definition::Live, "data");
        assert_eq!(own, theirs + 1);
        // Somebody puts a disk of his on ours.
        with(&world, |d| attach(d, &disk("guest-of-ours", "vdy", 10, own)));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        let left: Vec<u32> = defined(&world, Definition::Live).io_threads.ids.into_iter().collect();
        assert_eq!(left, [1, theirs, own]);
        world.assert_clean_but("theirs stay", &[&format!("{} ", World::endpoint(1))]);
    });
}

/// The kills right before and after the steps by which a thread is made and removed.
#[test]
fn no_thread_is_left_by_a_kill_around_its_steps() {
    let at = |step: Step, edge: &str| Fault {
        point: "kill".into(),
        detail: format!("{edge} {step}"),
        skip: 0,
        times: Some(1),
        action: FaultAction::Hang,
    };
    let sweep = Sweep { spec: threaded("data", 1), beside: false };
    for edge in ["before", "after"] {
        for step in [Step::Disk, Step::Ready] {
            sweep.add_goes_on(&sweep.world(), at(step, edge));
            sweep.add_is_given_up(&sweep.world(), at(step, edge));
        }
        for step in [Step::Unplug, Step::Confirm] {
            sweep.removal_goes_on(&sweep.world(), at(step, edge));
        }
    }
}

#[test]
fn an_add_with_a_thread_can_be_given_up_after_a_kill_at_any_call() {
    let sweep = Sweep { spec: threaded("data", 1), beside: false };
    each(sweep.calls().0, |at| {
        let world = sweep.world();
        sweep.add_is_given_up(&world, world.fault("", at, FaultAction::Hang));
    });
}

/// A libvirtd that hung makes the thread of a daemon that is no more, after all was undone. Nothing uses it,
/// and the next attach of that disk takes it over.
#[test]
fn a_thread_that_comes_when_all_is_undone_is_taken_over() {
    let world = World::new();
    let endpoint = World::endpoint(1);
    world.life(async |daemon| {
        world.host.hypervisor.hang(&endpoint, "iothreadadd");
        daemon.want(1, &threaded("data", 1)).await.unwrap();
        while !world.host.hypervisor.is_hung(&endpoint) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        daemon.drop_volume(1, "data", FORCE).await.unwrap();
    });
    world.host.hypervisor.disconnect(&endpoint);
    world.host.hypervisor.withhold(&endpoint);
    world.life(async |daemon| {
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("undone");
        world.host.hypervisor.deliver(&endpoint);
        assert!(world.picture().contains(&format!("live iothread {}", first("data"))));
        daemon.add(1, &threaded("data", 1)).await;
        assert_eq!(thread(&world, Definition::Live, "data"), first("data"));
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("taken over");
    });
}
