//! VMs that start with volumes made ready for them.

use std::time::Duration;

use lunplug::host::grants::Access;
use lunplug::host::sim::domain::SimDomain;
use lunplug::host::sim::{Fault, FaultAction};
use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, FcSupport, Phase, VmPlace, VmSpec, VolumeStatus};
use lunplug::types::{Outcome, VmId, VolumeKey, VolumeName};
use lunplug::vm::facade::{Answer, Refusal, Start, Volumes};

use crate::moves::hosts_side;
use crate::world::{Daemon, World, domain, file, node, single, uid, vm, volume};

/// The first VM does not run; its pod and libvirt are there.
pub(crate) fn powered_off() -> World {
    let host = node();
    host.add_pod(&uid(1));
    host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
    World::over(host, lunplug::journal::Desired::in_memory().unwrap())
}

pub(crate) fn power_on(world: &World) {
    world.host.pods.start_qemu(&uid(1), &domain(1));
    world.host.hypervisor.start_domain(&World::endpoint(1), &domain(1));
}

/// Nothing of any volume is on the node, wherever the VM may be.
pub(crate) fn nothing_left(world: &World, what: &str) {
    world.assert_clean_but(what, &["pod ", "/var/lib/kubelet/pods/"]);
    let left = world.host.hypervisor.snapshot();
    assert!(!left.contains("ua-lunplug"), "{what}: {left}");
}

/// What became of each volume: nothing where all is well, otherwise why not.
pub(crate) fn reasons(parts: Parts) -> Vec<(String, Option<Reason>)> {
    let reason = |answer: Answer| answer.err().map(|refusal| refusal.reason);
    let parts = parts.unwrap().into_iter();
    parts.map(|(name, answer)| (name.to_string(), reason(answer))).collect()
}

/// Whether a pod could open the volume's device by its path, as QEMU would.
pub(crate) fn opens(world: &World, uid: &str, name: &str) -> bool {
    let path = format!("/var/run/kubevirt/hotplug-disks/{name}");
    world.host.pods.open(uid, path.as_ref(), Access::READ_WRITE).is_ok()
}

fn waits(status: &VolumeStatus) -> bool {
    (status.phase, status.reason) == (Phase::MountedToPod, Some(Reason::VmNotRunning))
}

pub(crate) type Parts = Result<Vec<(VolumeName, Answer)>, Refusal>;

impl Daemon {
    pub(crate) async fn prepare_start(&self) -> Parts {
        self.registry.prepare_start(&vm(1), Start::default()).await
    }
}

#[test]
fn volumes_are_ready_for_a_vm_before_it_starts() {
    let world = powered_off();
    world.life(async |daemon| {
        for spec in [volume("a", 1), single("b", 2), file("f", 1)] {
            let status = daemon.add(1, &spec).await;
            assert_eq!((status.phase, status.reason), (Phase::Pending, Some(Reason::VmNotRunning)));
        }
        assert!(!opens(&world, &uid(1), "a"));
        let all = ["a", "b", "f"].map(|name| (name.to_owned(), None));
        assert_eq!(reasons(daemon.prepare_start().await), all);
        for name in ["a", "b", "f"] {
            assert!(waits(&daemon.get(1, name).await.unwrap()));
            assert!(
                opens(&world, &uid(1), name),
                "{name}: a disk of the definition could be opened"
            );
        }
        let again = daemon.prepare_start().await.unwrap();
        assert!(again.iter().all(|(_, answer)| matches!(answer, Ok(Outcome::Already(_)))));

        power_on(&world);
        for name in ["a", "b", "f"] {
            daemon.ready(1, name).await;
        }
        let again = daemon.prepare_start().await.unwrap();
        assert!(again.iter().all(|(_, answer)| matches!(answer, Ok(Outcome::Already(_)))));
        for name in ["a", "b", "f"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        nothing_left(&world, "started");
    });
}

/// The start is announced while what the VM had before is still being taken from the host.
#[test]
fn a_start_that_is_announced_right_after_the_end_is_prepared() {
    let world = powered_off();
    power_on(&world);
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.quiet().await;
        world.inject("nodes.remove", 0, FaultAction::Stall);
        world.host.pods.kill_qemu(&uid(1));
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        while world.host.faults.met().is_none() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let goes_on = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            world.host.faults.clear();
        };
        let (told, ()) = tokio::join!(daemon.prepare_start(), goes_on);
        assert_eq!(reasons(told), [("a".into(), None)]);
        assert!(waits(&daemon.get(1, "a").await.unwrap()));
        assert!(opens(&world, &uid(1), "a"));
    });
}

/// The domain with the volume's disk in its definition, as a controller writes it.
fn defined_with(name: &str) -> SimDomain {
    let source = format!("/var/run/kubevirt/hotplug-disks/{name}");
    let xml = with_disk(&SimDomain::q35(&domain(1), true), &source, name);
    SimDomain::from_xml(&domain(1), &xml, true)
}

fn with_disk(domain: &SimDomain, source: &str, name: &str) -> String {
    let disk = format!(
        "<disk type='block' device='disk'>
           <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
           <source dev='{source}'/>
           <target dev='sda' bus='scsi'/><serial>{name}</serial><alias name='ua-lunplug-{name}'/>
           <address type='drive' controller='0' bus='0' target='0' unit='1'/>
         </disk></devices>"
    );
    domain.live().unwrap().replace("</devices>", &disk)
}

/// A guest that has started with its disk keeps it, whatever keeps lunplug from seeing that.
#[test]
fn a_disk_that_a_guest_has_started_with_is_not_taken_from_it() {
    let world = powered_off();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.prepare_start().await.unwrap();
        let host = hosts_side(&world);
        world.inject_all("libvirt.info");
        world.host.hypervisor.add_domain(&World::endpoint(1), defined_with("a"));
        power_on(&world);
        daemon.quiet().await;
        assert!(opens(&world, &uid(1), "a"), "the guest has it open");
        assert_eq!(hosts_side(&world), host);
        world.host.faults.clear();
        daemon.ready(1, "a").await;

        // It ends, and is to start again: its definition is its owner's.
        world.host.pods.kill_qemu(&uid(1));
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        daemon.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert!(world.host.hypervisor.snapshot().contains("config sda ua-lunplug-a"));
        daemon.prepare_start().await.unwrap();
        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "started with its disk");
    });
}

#[test]
fn a_vm_that_does_not_start_in_time_gives_its_volumes_back() {
    let world = powered_off();
    let before = world.picture();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        let soon = Start { within: Some(Duration::from_secs(20)), domain: None };
        daemon.registry.prepare_start(&vm(1), soon).await.unwrap();
        assert!(opens(&world, &uid(1), "a"));
        daemon.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert!(!opens(&world, &uid(1), "a"));
        assert_eq!(world.picture(), before, "nobody needs the LUN here now");
        // It is wanted still, and comes with the VM however late that is.
        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "late");
    });
}

#[test]
fn a_start_that_was_announced_is_remembered_after_a_kill() {
    let world = powered_off();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.prepare_start().await.unwrap();
    });
    world.life(async |daemon| {
        daemon.until(1, "a", waits).await;
        assert!(opens(&world, &uid(1), "a"));
        // Called off: the host has nothing of it, and it stays wanted.
        assert!(daemon.cancel().await.unwrap().changed());
        daemon.until(1, "a", |s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
        assert!(!opens(&world, &uid(1), "a"));
    });
    world.life(async |daemon| {
        daemon.quiet().await;
        assert!(!opens(&world, &uid(1), "a"), "nothing is announced any more");
        daemon.remove(1, "a").await;
        daemon.quiet().await;
        nothing_left(&world, "called off");
    });
}

/// One volume's trouble is told, keeps no other, and is tried on.
#[test]
fn what_cannot_be_made_ready_is_told_and_comes_later() {
    let world = powered_off();
    world.life(async |daemon| {
        daemon.add(1, &volume("a", 1)).await;
        daemon.add(1, &volume("lost", 99)).await;
        let told = reasons(daemon.prepare_start().await);
        assert_eq!(told, [("a".into(), None), ("lost".into(), Some(Reason::LunNotFound))]);
        power_on(&world);
        daemon.ready(1, "a").await;
        daemon.remove(1, "a").await;
    });
}

/// A volume of a VM that is off can be had and given up without the VM ever running.
#[test]
fn a_vm_that_is_off_can_be_changed() {
    let world = powered_off();
    world.life(async |daemon| {
        let dry_run = AddOptions { dry_run: true, ..AddOptions::default() };
        daemon.registry.add_volume(&vm(1), volume("a", 1), dry_run).await.unwrap();
        assert!(daemon.get(1, "a").await.is_none());
        daemon.add(1, &volume("a", 1)).await;
        daemon.add(1, &volume("b", 2)).await;
        daemon.remove(1, "a").await;
    });
    power_on(&world);
    world.life(async |daemon| {
        daemon.ready(1, "b").await;
        assert!(daemon.get(1, "a").await.is_none());
        daemon.remove(1, "b").await;
        daemon.quiet().await;
        nothing_left(&world, "off and on");
    });
}

const HOST: &str = "/run/libvirt/libvirt-sock";

/// A VM of the host's own libvirt that does not run, defined with a disk of volume `data`.
fn plain() -> World {
    let host = node();
    let xml = with_disk(&SimDomain::q35("plain", true), "/dev/lunplug/default_plain/data", "data");
    host.hypervisor.add_domain(HOST, SimDomain::from_xml("plain", &xml, true));
    host.hypervisor.stop_domain(HOST, "plain");
    World::over(host, Desired::in_memory().unwrap())
}

fn plain_vm() -> VmId {
    "default/plain".parse().unwrap()
}

impl Daemon {
    async fn register_plain(&self) {
        let place = VmPlace::Host { libvirt_socket: None };
        let fc = FcSupport::default();
        let spec = VmSpec { id: plain_vm(), domain: "plain".into(), place, fc };
        self.registry.register_vm(spec).await.unwrap();
    }

    /// As libvirt's hook asks: libvirt answers nobody meanwhile.
    async fn hook(&self, world: &World) -> Parts {
        for call in
            ["libvirt.connect", "libvirt.info", "libvirt.xml", "libvirt.attach", "libvirt.detach"]
        {
            world.inject_all(call);
        }
        let start = Start { within: None, domain: Some("plain".into()) };
        let parts = self.registry.prepare_start(&plain_vm(), start).await;
        world.host.faults.clear();
        parts
    }

    async fn plain_is(&self, holds: impl Fn(&VolumeStatus) -> bool) {
        let key = VolumeKey { vm: plain_vm(), volume: "data".parse().unwrap() };
        let mut changes = self.registry.watch();
        while !self.registry.get_volume(&key).await.is_ok_and(|status| holds(&status)) {
            changes.recv().await.unwrap();
        }
    }
}

#[test]
fn a_domain_of_the_hosts_libvirt_starts_with_the_disk_of_its_definition() {
    let world = plain();
    world.life(async |daemon| {
        daemon.register_plain().await;
        let options = AddOptions::default();
        daemon.registry.add_volume(&plain_vm(), volume("data", 1), options).await.unwrap();
        daemon.plain_is(|s| s.reason == Some(Reason::VmNotRunning)).await;
    });
    // The second time after a reboot, which leaves neither node nor device.
    for _ in 0..2 {
        world.life(async |daemon| {
            assert_eq!(reasons(daemon.hook(&world).await), [("data".into(), None)]);
            let picture = world.picture();
            assert!(picture.contains("host default_plain\n  node data "), "{picture}");
            world.host.hypervisor.start_domain(HOST, "plain");
            daemon.plain_is(|s| s.phase == Phase::Ready).await;
            let disks = world.host.hypervisor.snapshot();
            assert_eq!(disks.matches("live sda ua-lunplug-data").count(), 1, "{disks}");
            assert!(!disks.contains("live sdb"), "{disks}");

            world.host.hypervisor.stop_domain(HOST, "plain");
            daemon.plain_is(|s| s.phase == Phase::Pending && s.retry_at.is_some()).await;
            daemon.quiet().await;
            let picture = world.picture();
            assert!(!picture.contains("session ") && !picture.contains("  node "), "{picture}");
        });
        world.shut_down();
        world.boot();
    }
}

#[test]
fn a_domain_whose_disk_does_not_come_is_not_to_be_started_and_nothing_stays() {
    let world = plain();
    world.life(async |daemon| {
        daemon.register_plain().await;
        let before = world.picture();
        let options = AddOptions::default();
        daemon.registry.add_volume(&plain_vm(), volume("data", 1), options).await.unwrap();
        daemon.plain_is(|s| s.reason == Some(Reason::VmNotRunning)).await;
        world.inject("nodes.create", 0, FaultAction::Fail("no room".into()));
        let told = reasons(daemon.hook(&world).await);
        assert_eq!(told, [("data".into(), Some(Reason::NodeRefused))]);
        daemon.plain_is(|s| s.phase == Phase::MountedToPod).await;
        daemon
            .plain_is(|s| s.phase == Phase::Pending && s.reason == Some(Reason::VmNotRunning))
            .await;
        daemon.quiet().await;
        assert!(!world.picture().contains("session "), "it did not start in time: {before}");
    });
}

#[test]
fn a_start_is_announced_by_libvirt_for_the_vm_of_that_domain_alone() {
    let world = plain();
    world.life(async |daemon| {
        daemon.register_plain().await;
        for (vm, domain, why) in [
            (plain_vm(), "other", "is registered as domain plain, not other"),
            (vm(1), "plain", "is registered in a pod"),
        ] {
            let start = Start { within: None, domain: Some(domain.into()) };
            let refusal = daemon.registry.prepare_start(&vm, start).await.unwrap_err();
            assert_eq!(
                (refusal.reason, refusal.field.as_deref()),
                (Reason::InvalidOption, Some("domain"))
            );
            assert!(refusal.message.contains(why), "{}", refusal.message);
        }
    });
}

/// That it was ready before its VM ended does not make it ready for the next start, whether that it ended was
/// seen or not.
#[test]
fn a_disk_that_was_ready_and_does_not_come_again_is_told_as_such() {
    let refused = [("data".to_owned(), Some(Reason::NodeRefused))];
    let world = plain();
    world.life(async |daemon| {
        daemon.register_plain().await;
        let options = AddOptions::default();
        daemon.registry.add_volume(&plain_vm(), volume("data", 1), options).await.unwrap();
        daemon.plain_is(|s| s.reason == Some(Reason::VmNotRunning)).await;
        daemon.hook(&world).await.unwrap();
        world.host.hypervisor.start_domain(HOST, "plain");
        daemon.plain_is(|s| s.phase == Phase::Ready).await;
        daemon.quiet().await;
        world.host.hypervisor.stop_domain(HOST, "plain");
        world.inject_all("nodes.observe");
        assert_eq!(reasons(daemon.hook(&world).await), refused);
    });
    let world = powered_off();
    power_on(&world);
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.quiet().await;
        world.host.pods.kill_qemu(&uid(1));
        world.host.hypervisor.stop_domain(&World::endpoint(1), &domain(1));
        world.inject_all("nodes.create");
        assert_eq!(reasons(daemon.prepare_start().await), refused);
    });
}

/// A controller that announces the start as well does not make lunplugd ask a libvirt that waits.
#[test]
fn a_start_may_be_announced_by_others_while_libvirt_waits() {
    let world = plain();
    world.life(async |daemon| {
        daemon.register_plain().await;
        for (name, lun) in [("data", 1), ("other", 2)] {
            let options = AddOptions::default();
            daemon.registry.add_volume(&plain_vm(), volume(name, lun), options).await.unwrap();
        }
        daemon.plain_is(|s| s.reason == Some(Reason::VmNotRunning)).await;
        daemon.quiet().await;
        let stall = world.fault("nodes.create", 0, FaultAction::Stall);
        world.host.faults.inject(Fault { detail: "other".into(), ..stall });
        world.host.hypervisor.hang(HOST, "");
        let start = Start { within: None, domain: Some("plain".into()) };
        let vm = plain_vm();
        let hook = daemon.registry.prepare_start(&vm, start);
        let controller = async {
            daemon.plain_is(|s| s.phase == Phase::MountedToPod).await;
            let goes_on = async { world.host.faults.clear() };
            let announced = daemon.registry.prepare_start(&vm, Start::default());
            tokio::join!(announced, goes_on).0
        };
        let (hook, controller) = tokio::join!(hook, controller);
        let all = [("data".to_owned(), None), ("other".to_owned(), None)];
        assert_eq!(reasons(hook), all);
        assert_eq!(reasons(controller), all);
        for status in daemon.registry.list_volumes(Some(&vm)).await {
            assert_eq!(status.phase, Phase::MountedToPod, "{}: {}", status.key, status.message);
        }
        world.host.hypervisor.go_on(HOST);
    });
}
