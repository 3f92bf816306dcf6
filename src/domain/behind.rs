//! Places of disks that are to come: a volume is planned behind those that were added before it, so that
//! each gets the same place whichever of them is the first to be there. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::ALIAS_PREFIX;
use super::diff::{
    CONTROLLER_MODEL, DesiredDisk, DiskAddress, Needs, NewController, Plan, PlanError, Views, plan,
};
use super::place::{free_slot, free_target, place_scsi};
use super::xml::{Disk, Domain, ScsiController, Written};
use crate::types::{Bus, IoLimits};

/// Takes the places that disks added earlier will have and do not have yet, in their order: so a disk
/// gets the same place whichever of them is the first to be there, and volumes come back to a
/// restarted VM in the order in which they were added. Returns the controllers that are to be added
/// for that.
pub(super) fn keep_places(
    views: &mut Views,
    ahead: &[(String, Bus)],
    pending: &BTreeSet<String>,
) -> Vec<NewController> {
    let mut controllers = Vec::new();
    for (disk, bus) in missing(views, ahead) {
        let alias = format!("{ALIAS_PREFIX}{disk}");
        let needs = Needs { live: views.live.is_some(), config: views.config.is_some() };
        let target = free_target(views, *bus, pending);
        let placed = match bus {
            Bus::Scsi => place_scsi(views, needs),
            Bus::Virtio => free_slot(views, *bus).map(|slot| (DiskAddress::Pci(slot), None)),
        };
        // Where there is no place left, whoever comes first has it.
        let Ok((address, controller)) = placed else { continue };
        for view in views.live.iter_mut().chain(&mut views.config) {
            Arc::make_mut(view).keep(&alias, &target, *bus, address, controller.as_ref());
        }
        controllers.extend(controller);
    }
    controllers
}

/// Those that no view has.
fn missing<'a>(views: &Views, ahead: &'a [(String, Bus)]) -> Vec<&'a (String, Bus)> {
    let aliases = views.all().flat_map(|view| &view.disks).filter_map(|disk| disk.alias.as_deref());
    let there: Vec<&str> = aliases.filter_map(|a| a.strip_prefix(ALIAS_PREFIX)).collect();
    let mut next = 0;
    let is_missing = |(disk, _): &&(String, Bus)| {
        // Mostly they came to the domain in this order.
        let is_next = there.get(next).is_some_and(|name| name == disk);
        let at = if is_next { Some(next) } else { there.iter().position(|name| name == disk) };
        next = at.map_or(next, |at| at + 1);
        at.is_none()
    };
    ahead.iter().filter(is_missing).collect()
}

impl Domain {
    /// Enters a disk, and the controller that it needs, that are not there yet.
    fn keep(
        &mut self,
        alias: &str,
        target: &str,
        bus: Bus,
        address: DiskAddress,
        controller: Option<&NewController>,
    ) {
        if let Some(new) = controller
            && self.scsi.iter().all(|c| c.index != new.index)
        {
            let model = Some(CONTROLLER_MODEL.to_owned());
            self.scsi.push(ScsiController { index: new.index, model });
            self.pci_used.insert(new.address);
        }
        let (mut drive, mut pci) = (None, None);
        match address {
            DiskAddress::Drive(address) => {
                self.scsi_used.insert(address);
                drive = Some(address);
            }
            DiskAddress::Pci(address) => {
                self.pci_used.insert(address);
                pci = Some(address);
            }
        }
        self.disks.push(Arc::new(Disk {
            alias: Some(alias.to_owned()),
            target: target.to_owned(),
            bus: bus.to_string(),
            device: "disk".into(),
            serial: Some(format!("kept for {alias}")),
            source: None,
            format: None,
            medium: None,
            readonly: false,
            shareable: false,
            io_thread: None,
            reservations: false,
            error_policy: None,
            tuning: Written::default(),
            limits: IoLimits::default(),
            drive,
            pci,
        }));
    }
}

/// Plans one disk behind those that were added before it; where that leaves no place for it, as if
/// they were not.
pub(super) fn plan_behind(
    views: &Views,
    desired: &DesiredDisk,
    pending: &BTreeSet<String>,
    ahead: &[(String, Bus)],
) -> Result<Plan, PlanError> {
    let mut kept = views.clone();
    let controllers = keep_places(&mut kept, ahead, pending);
    let Ok(Plan::Attach(mut placement)) = plan(&kept, desired, pending) else {
        return plan(views, desired, pending);
    };
    // It may be the first to come to a controller that was to be another's.
    if let DiskAddress::Drive(address) = placement.address
        && placement.controller.is_none()
        && let Some(new) = controllers.into_iter().find(|c| c.index == address.controller)
    {
        placement.controller = Some(new);
    }
    Ok(Plan::Attach(placement))
}
