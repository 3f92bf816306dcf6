use proptest::prelude::*;
use std::sync::Arc;

use super::*;
use crate::domain::place::letters;
use crate::domain::{template, xml};
use crate::types::{BlockSize, Blocks, Discard, IoMode};

const KUBEVIRT: &str = include_str!("fixtures/kubevirt-q35.xml");
const I440FX: &str = include_str!("fixtures/plain-i440fx.xml");
const BARE: &str = include_str!("fixtures/bare-q35.xml");

fn live(xml: &str) -> Views {
    Views { live: Some(Arc::new(xml::parse(xml).unwrap())), config: None }
}

fn desired(volume: &str, bus: Bus) -> DesiredDisk {
    DesiredDisk {
        volume: volume.parse().unwrap(),
        source: format!("/hotplug/{volume}"),
        file: None,
        serial: volume.parse().ok(),
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

fn attach(plan: Plan) -> Placement {
    match plan {
        Plan::Attach(placement) => placement,
        other => panic!("{other:?}"),
    }
}

fn none() -> BTreeSet<String> {
    BTreeSet::new()
}

/// Adds what a plan says to the XML, as libvirt would.
fn apply(xml: &str, desired: &DesiredDisk, placement: &Placement) -> String {
    let mut new = template::disk(desired, placement).unwrap();
    if let Some(controller) = &placement.controller {
        new += &template::controller(controller).unwrap();
    }
    xml.replacen("</devices>", &format!("{new}</devices>"), 1)
}

#[test]
fn a_disk_gets_the_first_free_name_and_target() {
    let pending = BTreeSet::from(["sdd".to_owned()]);
    let p = attach(plan(&live(KUBEVIRT), &desired("new", Bus::Scsi), &pending).unwrap());
    assert_eq!(p.target, "sde", "sda to sdc are taken, sdd is on its way out");
    let at = DriveAddress { controller: 0, bus: 0, target: 3, unit: 0 };
    assert_eq!(p.address, DiskAddress::Drive(at), "target 2 is a host device's");
    assert_eq!((p.controller, p.needs.live, p.needs.config), (None, true, false));
    assert!(p.dac_keep, "libvirt's DAC driver is at work there");
}

#[test]
fn the_owner_is_mentioned_only_where_libvirt_would_change_it() {
    let mut disk = desired("new", Bus::Scsi);
    let p = attach(plan(&live(BARE), &disk, &none()).unwrap());
    assert!(!p.dac_keep, "no DAC driver");
    disk.keep_owner = false;
    let p = attach(plan(&live(KUBEVIRT), &disk, &none()).unwrap());
    assert!(!p.dac_keep, "libvirt has to do it");
}

#[test]
fn a_disk_that_is_there_has_its_own_error_policy() {
    let [none_given, stop, report] = [None, Some(ErrorPolicy::Stop), Some(ErrorPolicy::Report)];
    for (has, wants, same) in [
        (none_given, none_given, true),
        (stop, stop, true),
        (none_given, stop, false),
        (stop, none_given, false),
        (stop, report, false),
    ] {
        let with = |policy| DesiredDisk { error_policy: policy, ..desired("new", Bus::Scsi) };
        let p = attach(plan(&live(BARE), &with(has), &none()).unwrap());
        let there = live(&apply(BARE, &with(has), &p));
        match plan(&there, &with(wants), &none()) {
            Ok(Plan::Already { .. }) => assert!(same, "{has:?} {wants:?}"),
            Err(PlanError::Differs { field: "error_policy", .. }) => assert!(!same),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_disk_that_is_there_is_run_as_it_was_made() {
    let size = |bytes: u32| BlockSize::try_from(bytes).ok();
    let plain = Tuning::default();
    let cases = [
        ("io", Tuning { io: Some(IoMode::Threads), ..plain }),
        ("discard", Tuning { discard: Some(Discard::Ignore), ..plain }),
        ("detect_zeroes", Tuning { detect_zeroes: Some(DetectZeroes::On), ..plain }),
        (
            "physical_block_size",
            Tuning { blocks: Blocks::new(size(512), size(4096)).unwrap(), ..plain },
        ),
    ];
    let with = |tuning| DesiredDisk { tuning, ..desired("new", Bus::Scsi) };
    for (has, (field, tuning)) in [plain; 4].into_iter().zip(cases) {
        for (there, wanted) in [(has, tuning), (tuning, has)] {
            let p = attach(plan(&live(BARE), &with(there), &none()).unwrap());
            let xml = apply(BARE, &with(there), &p);
            assert!(matches!(plan(&live(&xml), &with(there), &none()), Ok(Plan::Already { .. })));
            let error = plan(&live(&xml), &with(wanted), &none()).unwrap_err();
            let PlanError::Differs { field: differs, .. } = error else { panic!("{error:?}") };
            assert!(differs == field || differs == "logical_block_size", "{differs}");
        }
    }
}

#[test]
fn a_lun_has_no_serial_and_takes_nobodys() {
    let lun = |volume| DesiredDisk {
        device: DiskType::Lun,
        serial: None,
        reservations: Some("/pr.sock".into()),
        ..desired(volume, Bus::Scsi)
    };
    let p = attach(plan(&live(BARE), &lun("a"), &none()).unwrap());
    let xml = apply(BARE, &lun("a"), &p);
    assert!(matches!(plan(&live(&xml), &lun("a"), &none()), Ok(Plan::Already { .. })));
    let p = attach(plan(&live(&xml), &lun("b"), &none()).unwrap());
    assert!(plan(&live(&apply(&xml, &lun("b"), &p)), &lun("b"), &none()).is_ok());
    // Not what libvirt makes up for an emulated disk without a serial.
    let named = "drive-ua-lunplug-a".parse().ok();
    plan(&live(&xml), &DesiredDisk { serial: named, ..desired("c", Bus::Scsi) }, &none()).unwrap();
    for (field, other) in [
        ("disk_type", desired("a", Bus::Scsi)),
        ("persistent_reservations", DesiredDisk { reservations: None, ..lun("a") }),
    ] {
        let error = plan(&live(&xml), &other, &none()).unwrap_err();
        let PlanError::Differs { field: differs, .. } = error else { panic!("{error:?}") };
        assert_eq!(differs, field);
    }
}

#[test]
fn a_virtio_disk_takes_a_free_root_port() {
    let p = attach(plan(&live(KUBEVIRT), &desired("new", Bus::Virtio), &none()).unwrap());
    assert_eq!(p.target, "vdb");
    let at = PciAddress { domain: 0, bus: 10, slot: 0, function: 0 };
    assert_eq!(p.address, DiskAddress::Pci(at), "port 8 is not hot-pluggable, the rest is taken");
    let with = apply(KUBEVIRT, &desired("new", Bus::Virtio), &p);
    let error = plan(&live(&with), &desired("next", Bus::Virtio), &none()).unwrap_err();
    assert!(matches!(error, PlanError::NoFreeAddress { total: 6, taken: 6, .. }), "{error:?}");
    assert_eq!(error.reason(), Reason::NoFreeAddress);
}

#[test]
fn conventional_pci_is_used_beside_what_is_reserved() {
    let p = attach(plan(&live(I440FX), &desired("new", Bus::Virtio), &none()).unwrap());
    let at = PciAddress { domain: 0, bus: 0, slot: 6, function: 0 };
    assert_eq!(p.address, DiskAddress::Pci(at));
    assert_eq!(p.target, "vda");
}

#[test]
fn a_controller_is_added_where_there_is_none_that_serves() {
    for (xml, index, bus, slot) in [(BARE, 0, 1, 0), (I440FX, 1, 0, 6)] {
        let p = attach(plan(&live(xml), &desired("new", Bus::Scsi), &none()).unwrap());
        let c = p.controller.clone().unwrap();
        assert_eq!((c.index, c.needs.live), (index, true));
        assert_eq!(c.address, PciAddress { domain: 0, bus, slot, function: 0 });
        let at = DriveAddress { controller: index, bus: 0, target: 0, unit: 0 };
        assert_eq!(p.address, DiskAddress::Drive(at));
        let with = apply(xml, &desired("new", Bus::Scsi), &p);
        let second = attach(plan(&live(&with), &desired("next", Bus::Scsi), &none()).unwrap());
        assert_eq!(second.controller, None, "the next disk has it already");
    }
    let full = BARE.replace(
        "</devices>",
        "<rng><address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></rng></devices>",
    );
    let error = plan(&live(&full), &desired("new", Bus::Scsi), &none()).unwrap_err();
    assert_eq!(error.reason(), Reason::NoFreeAddress);
    let odd =
        BARE.replace("</devices>", "<controller type='scsi' index='0' model='x9'/></devices>");
    let error = plan(&live(&odd), &desired("new", Bus::Scsi), &none()).unwrap_err();
    assert_eq!(error.reason(), Reason::DomainXmlUnsupported);
    assert!(error.to_string().contains("x9"), "{error}");
}

#[test]
fn a_disk_that_is_there_is_found_or_told_apart() {
    let views = live(KUBEVIRT);
    let mut disk = desired("vol1", Bus::Scsi);
    disk.source = "/var/run/kubevirt/hotplug-disks/vol1".into();
    disk.serial = Some("Vol-1.A".parse().unwrap());
    assert_eq!(
        plan(&views, &disk, &none()).unwrap(),
        Plan::Already { target: "sdb".into(), limits: Needs::default() }
    );
    type Change = fn(&mut DesiredDisk);
    let changes: [(&str, Change); 4] = [
        ("source", |d| d.source = "/elsewhere".into()),
        ("serial", |d| d.serial = Some("vol-1.a".parse().unwrap())),
        ("bus", |d| d.bus = Bus::Virtio),
        ("readonly", |d| d.read_only = true),
    ];
    for (what, change) in changes {
        let mut other = disk.clone();
        change(&mut other);
        match plan(&views, &other, &none()) {
            Err(PlanError::Differs { field, .. }) => assert_eq!(field, what),
            unexpected => panic!("{what}: {unexpected:?}"),
        }
    }
}

#[test]
fn clashes_with_other_peoples_disks_are_refused() {
    let refused = |xml: &str, change: fn(&mut DesiredDisk)| {
        let mut disk = desired("new", Bus::Scsi);
        change(&mut disk);
        plan(&live(xml), &disk, &none()).unwrap_err().reason()
    };
    assert_eq!(
        refused(KUBEVIRT, |d| d.serial = Some("KeepThisCASE-01".parse().unwrap())),
        Reason::SerialInUse
    );
    assert_eq!(
        refused(KUBEVIRT, |d| d.source = "/var/run/kubevirt/hotplug-disks/data-a".into()),
        Reason::SourceInUse
    );
    assert_eq!(
        refused(KUBEVIRT, |d| d.volume = "rootdisk".parse().unwrap()),
        Reason::NotHotplugged
    );
    // The guest sees the first 20 characters of that one.
    assert_eq!(
        refused(I440FX, |d| d.serial = Some("SHARED-0123456789-AB".parse().unwrap())),
        Reason::SerialInUse
    );
    let no_serial = KUBEVIRT.replace("<serial>KeepThisCASE-01</serial>", "");
    assert_eq!(
        refused(&no_serial, |d| d.serial = Some("drive-ua-data-a".parse().unwrap())),
        Reason::SerialInUse,
        "what libvirt writes where there is no serial"
    );
    assert_eq!(
        refused(KUBEVIRT, |d| {
            d.bus = Bus::Virtio;
            d.serial = Some("123456789012345678901".parse().unwrap());
        }),
        Reason::InvalidSerial
    );
    assert!(
        plan(&live(KUBEVIRT), &desired("keepthiscase-01", Bus::Scsi), &none()).is_ok(),
        "another case is another serial"
    );
    let nobody = not_ours(&xml::parse(KUBEVIRT).unwrap(), &"vol1".parse().unwrap()).is_none();
    assert!(nobody, "ours is ours");
    assert!(not_ours(&xml::parse(KUBEVIRT).unwrap(), &"data-a".parse().unwrap()).is_some());
}

#[test]
fn both_definitions_get_the_same_place() {
    let live_doc = xml::parse(KUBEVIRT).unwrap();
    let disk = desired("new", Bus::Scsi);
    // Its definition has sdd and no controller.
    let config = xml::parse(&BARE.replace(
        "</devices>",
        "<disk><target dev='sdd' bus='sata'/></disk><controller type='pci' index='10' model='pcie-root-port'/></devices>",
    ))
    .unwrap();
    let views = Views { live: Some(Arc::new(live_doc)), config: Some(Arc::new(config)) };
    let p = attach(plan(&views, &disk, &none()).unwrap());
    assert_eq!(p.target, "sde");
    assert_eq!(p.needs, Needs { live: true, config: true });
    let c = p.controller.clone().unwrap();
    assert_eq!(c.needs, Needs { live: false, config: true });
    assert_eq!(c.address.bus, 10, "free in both");
    // Half done: the running domain has it, the definition does not.

    let half = Views {
        config: views.config.clone(),
        ..live(&apply(KUBEVIRT, &disk, &Placement { controller: None, ..p.clone() }))
    };
    let rest = attach(plan(&half, &disk, &none()).unwrap());
    assert_eq!((&rest.target, rest.address), (&p.target, p.address));
    assert_eq!(rest.needs, Needs { live: false, config: true });
    // Not running: the definition alone.
    let off = Views { live: None, config: views.config };
    assert!(attach(plan(&off, &disk, &none()).unwrap()).needs.config);
    let neither = Views { live: None, config: None };
    let error = plan(&neither, &disk, &none()).unwrap_err();
    assert_eq!(error.reason(), Reason::VmNotRunning);
}

#[test]
fn names_are_numbered_as_the_kernel_does() {
    for (n, name) in [(0, "a"), (25, "z"), (26, "aa"), (701, "zz"), (702, "aaa")] {
        assert_eq!(letters(n), name);
    }
}

#[test]
fn hundreds_of_disks_are_planned_without_clash() {
    let mut xml = KUBEVIRT.to_owned();
    let (mut targets, mut places) = (BTreeSet::new(), BTreeSet::new());
    for n in 0..300 {
        let disk = desired(&format!("v{n}"), Bus::Scsi);
        let p = attach(plan(&live(&xml), &disk, &none()).unwrap());
        let DiskAddress::Drive(at) = p.address else { panic!("{:?}", p.address) };
        assert!(at.target <= 255 && at.unit <= 16383, "{at:?}");
        assert!(targets.insert(p.target.clone()), "{} twice", p.target);
        assert!(places.insert(at), "{at:?} twice");
        xml = apply(&xml, &disk, &p);
    }
    let own = places.iter().filter(|a| a.unit == 0).count();
    assert_eq!(own, 253, "each its own target while there are any: three were taken");
    assert_eq!(xml::parse(&xml).unwrap().disks.len(), 304);
}

prop_compose! {
    fn arb_disk()(
        n in 0u32..40, bus in 0..3usize, target in 0u32..6, unit in 0u32..3,
        serial in proptest::option::of("[A-Za-z0-9]{1,4}"), slot in 3u32..32,
    ) -> (u32, String) {
        let serial = serial.map(|s| format!("<serial>{s}</serial>")).unwrap_or_default();
        let (prefix, bus, address) = match bus {
            0 => ("sd", "scsi", format!("<address type='drive' controller='{}' bus='0' target='{target}' unit='{unit}'/>", n % 2)),
            1 => ("vd", "virtio", format!("<address type='pci' domain='0x0000' bus='0x00' slot='{slot:#04x}' function='0x0'/>")),
            _ => ("sd", "sata", format!("<address type='drive' controller='0' bus='0' target='0' unit='{unit}'/>")),
        };
        (n, format!("<disk device='disk'><source dev='/d/{n}'/><target dev='{prefix}{}' bus='{bus}'/>{serial}<alias name='x{n}'/>{address}</disk>", letters(n)))
    }
}

prop_compose! {
    fn arb_domain()(
        disks in proptest::collection::vec(arb_disk(), 0..20),
        controllers in proptest::collection::btree_map(0u32..3, 0..4usize, 0..3),
    ) -> String {
        let models = ["virtio-scsi", "lsilogic", "virtio-non-transitional", "virtio-transitional"];
        let disks: String = disks.into_iter().map(|(_, xml)| xml).collect();
        let controllers: String = controllers
            .into_iter()
            .map(|(i, m)| format!("<controller type='scsi' index='{i}' model='{}'/>", models[m]))
            .collect();
        format!("<domain><name>p</name><os><type machine='pc'>hvm</type></os><devices>{disks}{controllers}<controller type='pci' index='0' model='pci-root'/></devices></domain>")
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_plan_never_clashes(
        mut xml in arb_domain(),
        wanted in proptest::collection::vec(("[a-z]{1,3}", any::<bool>()), 1..12),
        pending in proptest::collection::btree_set("[sv]d[a-f]", 0..4),
    ) {
        for (name, virtio) in wanted {
            let disk = desired(&name, if virtio { Bus::Virtio } else { Bus::Scsi });
            let views = live(&xml);
            let before = views.live.clone().unwrap();
            match plan(&views, &disk, &pending) {
                Ok(Plan::Attach(p)) => {
                    prop_assert!(!pending.contains(&p.target));
                    prop_assert!(before.disks.iter().all(|d| d.target != p.target));
                    prop_assert!(before.disks.iter().all(|d| !shows(d, disk.serial.as_ref().unwrap().as_str())));
                    let slot = match p.address {
                        DiskAddress::Pci(at) => Some(at),
                        DiskAddress::Drive(at) => {
                            prop_assert!(!before.scsi_used.contains(&at));
                            let there = before.scsi.iter().find(|c| c.index == at.controller);
                            match &p.controller {
                                None => prop_assert_eq!(there.and_then(|c| c.is_virtio()), Some(true)),
                                Some(new) => prop_assert!(there.is_none() && new.index == at.controller),
                            }
                            p.controller.as_ref().map(|c| c.address)
                        }
                    };
                    if let Some(slot) = slot {
                        prop_assert!(slot.slot > 2);
                        prop_assert!(!before.pci_used.iter().any(|u| (u.bus, u.slot) == (slot.bus, slot.slot)));
                    }
                    xml = apply(&xml, &disk, &p);
                    let after = live(&xml);
                    prop_assert_eq!(plan(&after, &disk, &pending), Ok(Plan::Already { target: p.target, limits: Needs::default() }));
                }
                Ok(Plan::Already { .. }) => prop_assert!(before.disk(&crate::domain::alias(&disk.volume)).is_some()),
                Err(error) => prop_assert!(matches!(
                    error.reason(),
                    Reason::SerialInUse | Reason::NoFreeAddress | Reason::VolumeExists | Reason::NotHotplugged
                ), "{error}"),
            }
        }
    }
}
