//! As many disks as a VM may have: each with a place and a name of its own.

use std::collections::BTreeSet;

use lunplug::domain::xml;
use lunplug::host::sim::domain::SimDomain;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, RemoveOptions, VolumeSpec};
use lunplug::types::Bus;
use lunplug::vm::facade::{Answer, Volumes, Wish};

use crate::world::{Daemon, World, domain, node, single, target, vm, volume};

/// As many volumes as a VM may have by the default configuration.
const MOST: u64 = 256;

/// A node with so many LUNs.
fn wide() -> World {
    let host = node();
    let portals = [1, 2].map(crate::world::portal);
    host.add_target(&target(), &portals, u16::try_from(MOST).unwrap() + 1);
    World::over(host, lunplug::journal::Desired::in_memory().unwrap())
}

fn name(lun: u64) -> String {
    format!("v{lun}")
}

impl Daemon {
    async fn add_all(&self, luns: impl Iterator<Item = u64>, spec: fn(&str, u64) -> VolumeSpec) {
        let luns: Vec<u64> = luns.collect();
        let add = |lun: &u64| {
            let spec = Box::new(spec(&name(*lun), *lun));
            Wish::Add { spec, options: AddOptions::default() }
        };
        let wishes = luns.iter().map(add).collect();
        all_taken(&self.registry.change_volumes(&vm(1), wishes).await.unwrap());
        for lun in luns {
            self.ready(1, &name(lun)).await;
        }
    }

    async fn remove_all(&self, luns: impl Iterator<Item = u64>) {
        let luns: Vec<u64> = luns.collect();
        let remove = |lun: &u64| {
            let name = name(*lun).parse().unwrap();
            Wish::Remove { name, options: RemoveOptions::default() }
        };
        let wishes = luns.iter().map(remove).collect();
        all_taken(&self.registry.change_volumes(&vm(1), wishes).await.unwrap());
        for lun in luns {
            self.gone(1, &name(lun)).await;
        }
    }
}

fn all_taken(answers: &[Answer]) {
    for answer in answers {
        assert!(answer.as_ref().is_ok_and(lunplug::types::Outcome::changed), "{answer:?}");
    }
}

/// How many disks of ours the domain has; no two of them, nor any other, share a name or a place.
fn disks(world: &World) -> usize {
    let live = |d: &mut SimDomain| d.live().expect("it runs").to_owned();
    let xml = world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), live).unwrap();
    let domain = xml::parse(&xml).unwrap();
    let targets: BTreeSet<&String> = domain.disks.iter().map(|d| &d.target).collect();
    assert_eq!(targets.len(), domain.disks.len(), "a target name is there twice");
    let serials: BTreeSet<_> = domain.disks.iter().filter_map(|d| d.serial.clone()).collect();
    assert!(serials.len() + 1 >= domain.disks.len(), "a serial is there twice");
    domain
        .disks
        .iter()
        .filter(|d| d.alias.as_deref().is_some_and(|a| a.starts_with("ua-lunplug-")))
        .count()
}

#[test]
fn seventy_five_at_once_and_256_in_all_and_names_are_given_again_only_when_free() {
    let world = wide();
    world.life(async |daemon| {
        let system = disks(&world);
        daemon.add_all(0..75, volume).await;
        assert_eq!(disks(&world), system + 75);
        daemon.add_all(75..MOST, single).await;
        assert_eq!(disks(&world), system + 256);
        let over = daemon.want(1, &volume("over", MOST)).await.unwrap_err();
        assert_eq!(over.reason, Reason::LimitReached, "{over}");
        // Gaps are filled; what stays keeps its name.
        let before = daemon.get(1, "v1").await.unwrap().target;
        daemon.remove_all((0..MOST).step_by(8)).await;
        assert_eq!(disks(&world), system + 224);
        daemon.add_all((0..MOST).step_by(8), volume).await;
        assert_eq!(disks(&world), system + 256);
        assert_eq!(daemon.get(1, "v1").await.unwrap().target, before);
        daemon.remove_all(0..MOST).await;
        daemon.quiet().await;
        world.assert_clean("256 volumes");
    });
}

/// virtio-blk needs a PCIe root port a disk, and the error says how many there are.
#[test]
fn root_ports_are_counted_and_disks_on_scsi_need_none() {
    let world = wide();
    world.life(async |daemon| {
        let virtio = |lun: u64| VolumeSpec { bus: Bus::Virtio, ..volume(&name(lun), lun) };
        let mut lun = 0;
        let refusal = loop {
            match daemon.want(1, &virtio(lun)).await {
                Ok(_) => drop(daemon.ready(1, &name(lun)).await),
                Err(refusal) => break refusal,
            }
            lun += 1;
        };
        assert_eq!(refusal.reason, Reason::NoFreeAddress, "{refusal}");
        assert!(lun > 0 && refusal.message.contains(&lun.to_string()), "{refusal}");
        daemon.add_all(100..110, volume).await;
        daemon.remove_all((0..lun).chain(100..110)).await;
        daemon.quiet().await;
        world.assert_clean("all root ports were taken");
    });
}
