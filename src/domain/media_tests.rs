use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::domain::confirm_gone;
use crate::host::libvirt::{Endpoint, Hypervisor, Instance};
use crate::host::sim::Faults;
use crate::host::sim::domain::SimDomain;
use crate::host::sim::hypervisor::SimHypervisor;
use crate::reason::Reason;

const SOCK: &str = "/run/pod/libvirt-sock";
const SOON: Duration = Duration::from_secs(20);

fn drive(target: &str, source: &str) -> String {
    format!("<disk device='cdrom'>{source}<target dev='{target}' bus='sata'/></disk>")
}

fn domain(devices: &str) -> Domain {
    let text = format!(
        "<domain><name>vm</name><os><type machine='q35'>hvm</type></os><devices>{devices}</devices></domain>"
    );
    xml::parse(&text).unwrap()
}

fn medium(drive: &str) -> DesiredMedium {
    DesiredMedium {
        volume: "iso".parse().unwrap(),
        source: "/hotplug/iso".into(),
        file: false,
        drive: drive.parse().ok(),
        keep_owner: true,
    }
}

#[test]
fn a_drive_is_the_named_one_or_the_only_one_that_can_be_meant() {
    let ours = drive("sdb", "<source dev='/hotplug/iso'/>");
    let theirs = drive("sda", "<source file='/their.iso'/>");
    let net = drive("sda", "<source protocol='https' name='their.iso'/>");
    let (one, two) = (drive("sda", ""), drive("sdb", "<source startupPolicy='optional'/>"));
    let disk = "<disk device='disk'><source dev='/x'/><target dev='vda' bus='virtio'/></disk>";
    let clash =
        "<disk device='disk'><source dev='/hotplug/iso'/><target dev='vda' bus='virtio'/></disk>";
    let empty = |target: &str| Ok(Pick::Empty(target.to_owned()));
    let has = |target: &str| Ok(Pick::Has(target.to_owned()));
    let (missing, occupied) = (Err(Reason::DriveNotFound), Err(Reason::DriveOccupied));
    for (devices, named, result) in [
        (one.clone(), "", empty("sda")),
        (one.clone(), "sda", empty("sda")),
        (format!("{one}{two}"), "", missing.clone()),
        (format!("{one}{two}"), "sdb", empty("sdb")),
        (format!("{theirs}{two}"), "", empty("sdb")),
        (format!("{theirs}{two}"), "sda", occupied.clone()),
        (format!("{one}{ours}"), "", has("sdb")),
        (format!("{one}{ours}"), "sdb", has("sdb")),
        (format!("{one}{ours}"), "sda", Err(Reason::SourceInUse)),
        (theirs.clone(), "", occupied.clone()),
        (net.clone(), "", occupied.clone()),
        (net, "sda", occupied),
        (disk.into(), "", missing.clone()),
        (disk.into(), "vda", missing.clone()),
        (format!("{theirs}{disk}"), "sdq", missing),
        (format!("{one}{clash}"), "", Err(Reason::SourceInUse)),
    ] {
        let picked = pick(&domain(&devices), &medium(named));
        let told = picked.as_ref().map(|_| String::new()).unwrap_or_else(ToString::to_string);
        assert_eq!(picked.map_err(|e| e.reason()), result, "{named:?} of {devices}: {told}");
    }
    let lists = pick(&domain(&format!("{theirs}{two}{}", drive("sdc", ""))), &medium(""));
    let told = lists.unwrap_err().to_string();
    for part in ["sda (with /their.iso)", "sdb (empty)", "sdc (empty)"] {
        assert!(told.contains(part), "{told}");
    }
}

struct World {
    host: SimHypervisor,
    connection: Arc<dyn Connection>,
}

impl World {
    async fn new() -> Self {
        let host = SimHypervisor::new(Arc::new(Faults::default()));
        let mut domain = SimDomain::q35("vm", true);
        domain.add_drive("sda");
        host.add_domain(SOCK, domain);
        let endpoint = Endpoint::path(Path::new(SOCK), Instance::Session);
        let connection = host.connect(&endpoint, SOON).await.unwrap();
        Self { host, connection }
    }

    async fn insert(&self) -> Result<Outcome<String>, Error> {
        insert(&*self.connection, "vm", &medium("sda"), SOON).await
    }

    async fn eject(&self, how: Eject) -> Result<Ejected, Error> {
        let DesiredMedium { volume, source, .. } = medium("");
        eject(&*self.connection, "vm", &volume, &source, how, SOON).await
    }

    fn with<T>(&self, change: impl FnOnce(&mut SimDomain) -> T) -> T {
        self.host.with_domain(SOCK, "vm", change).unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn a_medium_comes_and_goes_and_the_drive_stays_as_it_was() {
    let w = World::new().await;
    let before = w.with(|d| d.xml(Definition::Live));
    assert_eq!(w.insert().await.unwrap(), Outcome::Done("sda".into()));
    assert_eq!(w.insert().await.unwrap(), Outcome::Already("sda".into()));
    let live = xml::parse(&w.with(|d| d.xml(Definition::Live))).unwrap();
    let drive = live.drive_with("/hotplug/iso").unwrap();
    assert_eq!(drive.alias.as_deref(), Some("ua-cd-sda"), "its own");
    assert!(drive.readonly);
    let ejected = w.eject(Eject::Asked).await.unwrap();
    assert_eq!(ejected, Ejected { end: Detached::Removed, unlocked: false });
    assert_eq!(w.eject(Eject::Asked).await.unwrap().end, Detached::Absent);
    let after = w.with(|d| d.xml(Definition::Live));
    let mut expected = xml::parse(&before).unwrap();
    let drive = expected.disks.iter_mut().find(|disk| disk.target == "sda").unwrap();
    // That media are raw and not to be guessed at stays.
    std::sync::Arc::make_mut(drive).format = Some("raw".into());
    assert_eq!(xml::parse(&after).unwrap(), expected);
    assert_eq!(w.with(|d| d.xml(Definition::Config)), before, "the definition is left alone");
}

#[tokio::test(start_paused = true)]
async fn a_locked_tray_is_opened_by_force_alone() {
    let w = World::new().await;
    w.insert().await.unwrap();
    w.with(|d| d.lock_tray("sda", true));
    let error = w.eject(Eject::Asked).await.unwrap_err();
    assert_eq!(error.reason(), Reason::InUseByGuest, "{error}");
    let ejected = w.eject(Eject::Forced).await.unwrap();
    assert_eq!(ejected, Ejected { end: Detached::Removed, unlocked: true });
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_only_looks_at_a_medium_keeps_it_no_longer_than_that() {
    let w = World::new().await;
    w.insert().await.unwrap();
    w.with(|d| d.look_at_medium("sda"));
    let ejected = w.eject(Eject::Asked).await.unwrap();
    assert_eq!(ejected, Ejected { end: Detached::Removed, unlocked: false });
}

#[tokio::test(start_paused = true)]
async fn a_medium_of_somebody_elses_is_never_taken_out() {
    let w = World::new().await;
    w.insert().await.unwrap();
    w.with(|d| d.change_medium("sda", Some("/their.iso")));
    assert_eq!(w.eject(Eject::Forced).await.unwrap().end, Detached::Absent);
    let DesiredMedium { volume, source, .. } = medium("");
    let how = Eject::Forced;
    let confirmed =
        confirm_ejected(&*w.connection, "vm", &volume, &source, how, SOON).await.unwrap();
    assert_eq!(confirmed.end, Detached::Absent);
    let gone = confirm_gone(&*w.connection, "vm", &volume, true, None, SOON).await.unwrap();
    assert_eq!(gone, Detached::Absent);
    assert!(w.host.snapshot().contains("source=/their.iso"));
    assert_eq!(w.insert().await.unwrap_err().reason(), Reason::DriveOccupied);
}
