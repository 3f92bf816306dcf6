use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::domain::guest::{InGuest, Usage, usage};
use crate::domain::{Detached, detach};
use crate::host::libvirt::DomainEvent;
use crate::host::libvirt::{Endpoint, Hypervisor, Instance};
use crate::host::sim::domain::{SimDomain, Unplug};
use crate::host::sim::hypervisor::SimHypervisor;
use crate::host::sim::{Fault, FaultAction, Faults};
use crate::types::{Bus, CacheMode, DiskType, IoLimits, Tuning};

const SOCK: &str = "/run/pod/libvirt-sock";
const SOON: Duration = Duration::from_secs(20);

struct World {
    host: SimHypervisor,
    faults: Arc<Faults>,
    connection: Arc<dyn Connection>,
}

async fn world(domain: SimDomain) -> World {
    let faults = Arc::new(Faults::default());
    let host = SimHypervisor::new(Arc::clone(&faults));
    host.add_domain(SOCK, domain);
    let endpoint = Endpoint::path(Path::new(SOCK), Instance::Session);
    let connection = host.connect(&endpoint, SOON).await.unwrap();
    World { host, faults, connection }
}

fn disk(volume: &str, bus: Bus) -> DesiredDisk {
    DesiredDisk {
        volume: volume.parse().unwrap(),
        source: format!("/hotplug/{volume}"),
        file: None,
        serial: format!("S-{volume}").parse().ok(),
        device: DiskType::Disk,
        reservations: None,
        bus,
        cache: CacheMode::None,
        read_only: false,
        shareable: false,
        error_policy: None,
        io_thread: None,
        tuning: Tuning::default(),
        limits: IoLimits::default(),
        keep_owner: true,
    }
}

impl World {
    async fn attach(&self, disk: &DesiredDisk, persist: bool) -> Result<Outcome<Attached>, Error> {
        attach(&*self.connection, "vm", disk, persist, &BTreeSet::new(), &[], SOON).await
    }

    async fn detach(&self, volume: &str) -> Result<Detached, Error> {
        detach(&*self.connection, "vm", &volume.parse().unwrap(), true, None, SOON).await
    }

    async fn used(&self, disk: &DesiredDisk) -> Usage {
        usage(&*self.connection, "vm", &InGuest::Disk(disk.serial.clone().unwrap(), disk.bus), SOON)
            .await
    }

    fn fault(&self, point: &str, action: FaultAction) {
        self.faults.inject(Fault {
            point: point.into(),
            detail: String::new(),
            skip: 0,
            times: Some(1),
            action,
        });
    }
}

#[tokio::test(start_paused = true)]
async fn attach_and_detach_on_both_buses_leave_nothing() {
    for persistent in [false, true] {
        let w = world(SimDomain::q35("vm", persistent)).await;
        let before = w.host.snapshot();
        for bus in [Bus::Scsi, Bus::Virtio] {
            let disk = disk("v", bus);
            let first = w.attach(&disk, persistent).await.unwrap();
            assert!(first.changed());
            let attached = first.into_inner();
            assert_eq!(attached.alias, "ua-lunplug-v");
            assert_eq!(attached.target, if bus == Bus::Scsi { "sda" } else { "vdb" });
            assert!(!attached.controller_added);
            let again = w.attach(&disk, persistent).await.unwrap();
            assert_eq!(again, Outcome::Already(attached));
            assert!(w.host.snapshot().contains("serial=S-v source=/hotplug/v"));
            assert_eq!(w.detach("v").await.unwrap(), Detached::Removed);
            assert_eq!(w.detach("v").await.unwrap(), Detached::Absent);
            assert_eq!(w.host.snapshot(), before);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_controller_is_added_and_stays() {
    let bare = include_str!("fixtures/bare-q35.xml");
    let w = world(SimDomain::from_xml("vm", bare, false)).await;
    let attached = w.attach(&disk("v", Bus::Scsi), false).await.unwrap().into_inner();
    assert!(attached.controller_added);
    w.detach("v").await.unwrap();
    let second = w.attach(&disk("w", Bus::Scsi), false).await.unwrap().into_inner();
    assert!(!second.controller_added);
}

#[tokio::test(start_paused = true)]
async fn persist_follows_the_domain() {
    let w = world(SimDomain::q35("vm", false)).await;
    let error = w.attach(&disk("v", Bus::Scsi), true).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidOption, "{error}");
    let w = world(SimDomain::q35("vm", true)).await;
    w.host.stop_domain(SOCK, "vm");
    let error = w.attach(&disk("v", Bus::Scsi), false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::VmNotRunning);
    assert!(w.attach(&disk("v", Bus::Scsi), true).await.unwrap().changed());
    w.host.start_domain(SOCK, "vm");
    assert!(!w.attach(&disk("v", Bus::Scsi), true).await.unwrap().changed(), "it came up with it");
    assert_eq!(w.detach("v").await.unwrap(), Detached::Removed);
    assert!(!w.host.snapshot().contains("ua-lunplug"), "{}", w.host.snapshot());
}

#[tokio::test(start_paused = true)]
async fn qemu_that_may_not_open_the_node_attaches_nothing() {
    let w = world(SimDomain::q35("vm", false)).await;
    let before = w.host.snapshot();
    w.host.set_open_check(Arc::new(|endpoint, path, _| {
        assert_eq!((endpoint, path), (SOCK, "/hotplug/v"));
        Err("Operation not permitted".into())
    }));
    let error = w.attach(&disk("v", Bus::Scsi), false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LibvirtFailed);
    let Error::Libvirt { source, .. } = &error else { panic!("{error:?}") };
    assert!(source.to_string().contains("Operation not permitted"), "{source}");
    assert_eq!(w.host.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn a_busy_domain_is_a_reason_of_its_own() {
    let w = world(SimDomain::q35("vm", false)).await;
    w.attach(&disk("v", Bus::Scsi), false).await.unwrap();
    w.host.set_job(SOCK, "vm", Some(Job::Migration));
    let error = w.attach(&disk("w", Bus::Scsi), false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DomainBusy);
    assert!(error.to_string().contains("a migration"), "{error}");
    assert_eq!(w.detach("v").await.unwrap_err().reason(), Reason::DomainBusy);
    w.host.set_job(SOCK, "vm", None);
    assert_eq!(w.detach("v").await.unwrap(), Detached::Removed);
}

#[tokio::test(start_paused = true)]
async fn on_virtio_the_guest_decides() {
    let w = world(SimDomain::q35("vm", false)).await;
    w.attach(&disk("v", Bus::Virtio), false).await.unwrap();
    w.host.with_domain(SOCK, "vm", |d| d.unplug = Unplug::Refuse).unwrap();
    assert_eq!(w.detach("v").await.unwrap_err().reason(), Reason::GuestRefusedUnplug);
    w.host.with_domain(SOCK, "vm", |d| d.unplug = Unplug::Silent).unwrap();
    assert_eq!(w.detach("v").await.unwrap_err().reason(), Reason::DetachUnacknowledged);
    assert!(w.host.snapshot().contains("ua-lunplug-v"), "still there and working");
    // Asked again while the first request is pending, and then the guest answers.
    let (done, ()) = tokio::join!(w.detach("v"), async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        w.host.acknowledge(SOCK, "vm", "ua-lunplug-v");
    });
    assert_eq!(done.unwrap(), Detached::Removed);
}

#[tokio::test(start_paused = true)]
async fn a_missed_event_and_a_stopped_domain_end_the_wait() {
    let silent = || async {
        let w = world(SimDomain::q35("vm", false)).await;
        w.attach(&disk("v", Bus::Virtio), false).await.unwrap();
        w.host.with_domain(SOCK, "vm", |d| d.unplug = Unplug::Silent).unwrap();
        w
    };
    let w = silent().await;
    let (done, ()) = tokio::join!(w.detach("v"), async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        // Without an event.
        w.host.with_domain(SOCK, "vm", |d| d.acknowledge("ua-lunplug-v")).unwrap();
    });
    assert_eq!(done.unwrap(), Detached::Removed);
    let w = silent().await;
    let (done, ()) = tokio::join!(w.detach("v"), async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        w.host.stop_domain(SOCK, "vm");
    });
    assert_eq!(done.unwrap(), Detached::DomainGone);
    assert_eq!(w.detach("v").await.unwrap(), Detached::DomainGone, "and again");
    let w = silent().await;
    let (done, ()) = tokio::join!(w.detach("v"), async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        w.host.restart(SOCK);
    });
    assert_eq!(done.unwrap_err().reason(), Reason::LibvirtUnreachable);
    assert!(!w.connection.is_alive());
    assert!(w.attach(&disk("w", Bus::Scsi), false).await.is_err(), "connect anew");
}

#[tokio::test(start_paused = true)]
async fn an_attach_that_took_effect_late_is_found_by_the_next() {
    let w = world(SimDomain::q35("vm", false)).await;
    w.fault("libvirt.attach", FaultAction::Stall);
    let disk = disk("v", Bus::Scsi);
    let error = w.attach(&disk, false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::LibvirtUnreachable, "it did not answer");
    assert_eq!(w.connection.stuck_calls(), 1);
    let mut events = w.connection.events("vm");
    w.faults.clear();
    assert_eq!(events.next().await, DomainEvent::DeviceAdded("ua-lunplug-v".into()));
    assert!(!w.attach(&disk, false).await.unwrap().changed(), "claimed");
}

#[tokio::test(start_paused = true)]
async fn faults_at_each_call_are_errors_with_reasons() {
    for (point, reason) in [
        ("libvirt.info", Reason::LibvirtFailed),
        ("libvirt.xml", Reason::LibvirtFailed),
        ("libvirt.attach", Reason::LibvirtFailed),
    ] {
        let w = world(SimDomain::q35("vm", false)).await;
        w.fault(point, FaultAction::Fail("out of order".into()));
        let error = w.attach(&disk("v", Bus::Scsi), false).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{point}");
        assert!(w.attach(&disk("v", Bus::Scsi), false).await.unwrap().changed(), "{point}");
        w.fault("libvirt.detach", FaultAction::Fail("out of order".into()));
        assert_eq!(w.detach("v").await.unwrap_err().reason(), Reason::LibvirtFailed);
    }
    let w = world(SimDomain::q35("vm", false)).await;
    w.fault("libvirt.connect", FaultAction::Hang);
    let endpoint = Endpoint::path(Path::new(SOCK), Instance::Session);
    let error = w.host.connect(&endpoint, SOON).await.err().unwrap();
    assert_eq!(error.reason(), Reason::LibvirtUnreachable);
    let nowhere = Endpoint::path(Path::new("/nowhere"), Instance::Session);
    assert!(w.host.connect(&nowhere, SOON).await.err().unwrap().is_disconnect());
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_cannot_be_read_is_refused() {
    let w = world(SimDomain::q35("vm", true)).await;
    w.attach(&disk("v", Bus::Scsi), true).await.unwrap();
    let odd = w.host.with_domain(SOCK, "vm", |d| d.xml(Definition::Live)).unwrap();
    let odd = odd.replacen("<disk ", "<disk><alias name='odd'/></disk><disk ", 1);
    w.host.add_domain(SOCK, SimDomain::from_xml("vm", &odd, false));
    let error = w.attach(&disk("w", Bus::Scsi), false).await.unwrap_err();
    assert_eq!(error.reason(), Reason::DomainXmlUnsupported);
}

#[tokio::test(start_paused = true)]
async fn the_guest_is_asked_about_its_use() {
    let w = world(SimDomain::q35("vm", false)).await;
    for bus in [Bus::Scsi, Bus::Virtio] {
        let disk = disk(bus.as_str(), bus);
        assert!(matches!(w.used(&disk).await, Usage::Unproven(_)), "not there yet");
        w.attach(&disk, false).await.unwrap();
        assert_eq!(w.used(&disk).await, Usage::Free);
        let serial = disk.serial.clone().unwrap().to_string();
        w.host.with_domain(SOCK, "vm", |d| {
            d.agent.mounted.insert(serial.clone(), "/mnt".into());
        });
        let Usage::InUse(why) = w.used(&disk).await else { panic!("mounted") };
        assert!(why[0].ends_with("is mounted at /mnt"), "{why:?}");
        w.host.with_domain(SOCK, "vm", |d| {
            d.agent.mounted.clear();
            d.agent.holders.insert(serial.clone(), "vg-lv".into());
        });
        let Usage::InUse(why) = w.used(&disk).await else { panic!("held") };
        assert!(why[0].contains("(vg-lv) is built on"), "{why:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_cannot_answer_proves_nothing() {
    let w = world(SimDomain::q35("vm", false)).await;
    let disk = disk("v", Bus::Scsi);
    w.attach(&disk, false).await.unwrap();
    let disabled = r#"{"error":{"class":"CommandNotFound","desc":"has been disabled"}}"#;
    w.host.with_domain(SOCK, "vm", |d| {
        d.agent.scripted.insert("guest-get-disks".into(), disabled.into());
    });
    assert!(matches!(w.used(&disk).await, Usage::Unproven(why) if why.contains("disabled")));
    w.host.with_domain(SOCK, "vm", |d| d.agent.connected = false);
    assert!(matches!(w.used(&disk).await, Usage::Unproven(why) if why.contains("not connected")));
    w.fault("libvirt.agent", FaultAction::Hang);
    assert!(matches!(w.used(&disk).await, Usage::Unproven(why) if why.contains("did not answer")));
}
