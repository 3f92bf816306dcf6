//! Free places in a domain: target names, SCSI addresses, PCI slots.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::types::Bus;

use super::diff::{DiskAddress, Needs, NewController, PlanError, Views};
use super::xml::{Domain, DriveAddress, PciAddress, PciController};

/// The highest SCSI target of a virtio-scsi controller (QEMU, `VIRTIO_SCSI_MAX_TARGET`).
const MAX_SCSI_TARGET: u32 = 255;
/// The highest LUN behind one (QEMU, `VIRTIO_SCSI_MAX_LUN`).
const MAX_SCSI_UNIT: u32 = 16_383;

/// The first target name that no disk has and none that is being removed.
pub(super) fn free_target(views: &Views, bus: Bus, pending: &BTreeSet<String>) -> String {
    let prefix = match bus {
        Bus::Scsi => "sd",
        Bus::Virtio => "vd",
    };
    let there = || views.all().flat_map(|v| &v.disks).map(|disk| &disk.target).chain(pending);
    // One of the first so many is free.
    let mut taken = vec![false; there().count() + 1];
    for name in there() {
        let number = name.strip_prefix(prefix).and_then(number);
        if let Some(taken) = number.and_then(|n| taken.get_mut(usize::try_from(n).ok()?)) {
            *taken = true;
        }
    }
    let free = taken.iter().position(|taken| !taken).unwrap_or(taken.len());
    format!("{prefix}{}", letters(u32::try_from(free).unwrap_or(u32::MAX)))
}

/// 0 is `a`, 25 `z`, 26 `aa`: as the kernel and libvirt number disks.
pub(super) fn letters(mut n: u32) -> String {
    let mut name = Vec::new();
    loop {
        name.push(char::from(b'a' + u8::try_from(n % 26).unwrap_or(0)));
        if n < 26 {
            return name.iter().rev().collect();
        }
        n = n / 26 - 1;
    }
}

/// The number of some letters; `None` where they are none, or too many.
fn number(letters: &str) -> Option<u32> {
    let digit = |c: u8| c.is_ascii_lowercase().then(|| u32::from(c - b'a') + 1);
    let mut all = 0_u32;
    for letter in letters.bytes() {
        all = all.checked_mul(26)?.checked_add(digit(letter)?)?;
    }
    all.checked_sub(1)
}

/// A free place on a virtio-scsi controller that all views have, or on one to be added.
pub(super) fn place_scsi(
    views: &Views,
    needs: Needs,
) -> Result<(DiskAddress, Option<NewController>), PlanError> {
    let mut virtio: BTreeSet<u32> = BTreeSet::new();
    let mut other: BTreeSet<u32> = BTreeSet::new();
    let mut unknown = None;
    for controller in views.all().flat_map(|v| &v.scsi) {
        match controller.is_virtio() {
            Some(true) => {
                virtio.insert(controller.index);
            }
            Some(false) => {
                other.insert(controller.index);
            }
            None => {
                other.insert(controller.index);
                unknown = Some(controller);
            }
        }
    }
    for &index in virtio.difference(&other) {
        let Some(address) = free_drive(views, index) else { continue };
        let lacks = |view: &Option<Arc<Domain>>| {
            view.as_ref().is_some_and(|v| v.scsi.iter().all(|c| c.index != index))
        };
        let missing = Needs { live: lacks(&views.live), config: lacks(&views.config) };
        let controller = if missing.any() {
            Some(NewController { index, address: free_slot(views, Bus::Scsi)?, needs: missing })
        } else {
            None
        };
        return Ok((DiskAddress::Drive(address), controller));
    }
    if let (true, Some(c)) = (virtio.is_empty(), unknown) {
        return Err(PlanError::UnknownController {
            index: c.index,
            model: c.model.clone().unwrap_or_default(),
        });
    }
    // Also none that a device refers to though it is not there.
    other.extend(views.all().flat_map(|v| &v.scsi_used).map(|a| a.controller));
    let index = (0..).find(|i| !virtio.contains(i) && !other.contains(i)).unwrap_or(u32::MAX);
    let controller = NewController { index, address: free_slot(views, Bus::Scsi)?, needs };
    let address = DriveAddress { controller: index, bus: 0, target: 0, unit: 0 };
    Ok((DiskAddress::Drive(address), Some(controller)))
}

/// A free place on a virtio-scsi controller: a target of its own and LUN 0, as long as there are
/// targets.
///
/// A guest scans that the most reliably: on a hotplug event for LUN 0 Linux scans the whole target
/// (`virtscsi_handle_transport_reset`), at boot it looks for LUN 0 of every target first, and a
/// driver that goes by REPORT LUNS of LUN 0 finds one that is never pulled from under a neighbour.
/// libvirt itself places disks at target 0, units 0 to 15, so those stay apart from ours. Only when
/// all 256 targets are taken do further LUNs of a target come into use.
fn free_drive(views: &Views, controller: u32) -> Option<DriveAddress> {
    let used = || views.all().flat_map(|v| &v.scsi_used).filter(|a| a.controller == controller);
    let mut busy = [false; MAX_SCSI_TARGET as usize + 1];
    for address in used() {
        if let Some(busy) = busy.get_mut(address.target as usize) {
            *busy = true;
        }
    }
    let at = |target, unit| DriveAddress { controller, bus: 0, target, unit };
    (0..=MAX_SCSI_TARGET).find(|t| !busy[*t as usize]).map(|t| at(t, 0)).or_else(|| {
        let used: BTreeSet<(u32, u32)> = used().map(|a| (a.target, a.unit)).collect();
        (1..=MAX_SCSI_UNIT)
            .flat_map(|unit| (0..=MAX_SCSI_TARGET).map(move |target| (target, unit)))
            .find(|place| !used.contains(place))
            .map(|(target, unit)| at(target, unit))
    })
}

/// A PCI slot that can be plugged into while the guest runs: the one slot of a PCIe root or
/// downstream port, or a slot of a conventional PCI bus. On pcie-root itself nothing can.
pub(super) fn free_slot(views: &Views, bus: Bus) -> Result<PciAddress, PlanError> {
    let used: BTreeSet<(u32, u32)> = views
        .all()
        .flat_map(|v| &v.pci_used)
        .filter(|a| a.domain == 0)
        .map(|a| (a.bus, a.slot))
        .collect();
    let mut slots: Option<BTreeSet<(u32, u32)>> = None;
    for view in views.all() {
        let here: BTreeSet<_> = view.pci.iter().flat_map(pluggable_slots).collect();
        slots = Some(match slots {
            None => here,
            Some(before) => before.intersection(&here).copied().collect(),
        });
    }
    let slots = slots.unwrap_or_default();
    match slots.iter().find(|slot| !used.contains(slot)) {
        Some(&(bus, slot)) => Ok(PciAddress { domain: 0, bus, slot, function: 0 }),
        None => Err(PlanError::NoFreeAddress {
            bus,
            what: "PCI slot or PCIe root port that can be plugged into",
            total: slots.len(),
            taken: slots.len(),
        }),
    }
}

fn pluggable_slots(controller: &PciController) -> Vec<(u32, u32)> {
    let slots = match controller.model.as_str() {
        _ if !controller.hotplug => 0..0,
        "pcie-root-port" | "pcie-switch-downstream-port" => 0..1,
        // Slot 1 is the PIIX3 and slot 2 the first video card's, also where the XML has none.
        "pci-root" => 3..32,
        "pci-bridge" => 1..32,
        _ => 0..0,
    };
    slots.map(|slot| (controller.index, slot)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_their_numbers_are_each_others() {
        for n in (0..20_000).chain([u32::MAX - 1]) {
            assert_eq!(number(&letters(n)), Some(n));
        }
        for none in ["", "A", "a1", "1", "ab ", "é", "zzzzzzzzzz"] {
            assert_eq!(number(none), None, "{none:?}");
        }
    }
}
