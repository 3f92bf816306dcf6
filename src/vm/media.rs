//! A medium's part of the ways: into one of the domain's drives, and out of it.
//!
//! ```text
//! attach: drive free? ─ host ─ node ─ grant ─ insert       detach: eject ─ revoke ─ unlink ─ look again
//! ```
//! What the drive has decides: nothing, then the medium comes in; the medium of another volume, then it
//! waits until that is gone (so a swap is a removal and an addition, in any order); anybody else's, then
//! it is refused.

use std::collections::BTreeSet;

use super::attach::Way;
use super::detach::Unwind;
use super::discover::Place;
use super::disk::source_of;
use super::facade::Refusal;
use super::failure::Failure;
use super::ways::Ways;
use crate::domain;
use crate::domain::diff::Views;
use crate::domain::media::{self, DesiredMedium, Eject, Ejected};
use crate::host::libvirt::Connection;
use crate::journal::{DiskEffect, Effects};
use crate::reason::Reason;
use crate::spec::VolumeSpec;
use crate::step::Step;
use crate::types::VolumeName;

impl Way<'_> {
    /// Before anything is made: whether there is a drive that the medium can come into.
    pub(super) async fn drive_is_free(&self, place: &Place) -> Result<(), Failure> {
        if self.had_disk {
            return Ok(());
        }
        let (ways, spec) = (self.ways, self.spec);
        let desired = desired_at(ways, spec, place);
        let connection = ways.libvirt().await?;
        let limit = ways.settings().libvirt;
        match media::find(&*connection, &ways.vm.domain, &desired, limit).await {
            Ok(_) => Ok(()),
            Err(error) => Err(ways.drive_failure(&spec.name, error).await),
        }
    }

    /// The drive has it; returns the drive's target name.
    pub(super) async fn medium(
        &mut self,
        source: String,
        keep_owner: bool,
    ) -> Result<String, Failure> {
        let (ways, spec) = (self.ways, self.spec);
        let (alias, bus) = (domain::alias(&spec.disk), spec.bus);
        let target = self.effects.disk.take().and_then(|disk| disk.target);
        let desired = desired(spec, source, target.as_deref(), keep_owner);
        let medium = Some(desired.source.clone());
        self.effects.disk = Some(DiskEffect { alias, bus, target, io_thread: None, medium });
        self.announce(Step::Disk).await?;
        let connection = ways.libvirt().await?;
        let limit = ways.settings().libvirt;
        domain::settled(&*connection, &ways.vm.domain, &spec.disk, limit).await?;
        let _turn = ways.turn.lock().await;
        let insert = async {
            match media::insert(&*connection, &ways.vm.domain, &desired, limit).await {
                Ok(inserted) => Ok(inserted.into_inner()),
                Err(error) => Err(ways.drive_failure(&spec.name, error).await),
            }
        };
        ways.host.tracker.run(Step::Disk, insert).await
    }
}

/// The medium as it is to be in the domain; in the drive that it has, where it has one.
fn desired(
    spec: &VolumeSpec,
    source: String,
    has: Option<&str>,
    keep_owner: bool,
) -> DesiredMedium {
    let drive = spec.drive.clone().or_else(|| has.and_then(|has| has.parse().ok()));
    let file = spec.source.as_file().is_some();
    DesiredMedium { volume: spec.disk.clone(), source, file, drive, keep_owner }
}

/// The same of one that no drive has yet.
fn desired_at(ways: &Ways, spec: &VolumeSpec, place: &Place) -> DesiredMedium {
    desired(spec, source_of(ways, place, spec), None, place.pod.is_some())
}

/// What of a medium in its drive is not as it was made.
pub(super) fn wrong(
    views: &Views,
    spec: &VolumeSpec,
    effects: &Effects,
    source: String,
) -> Option<String> {
    let has = effects.disk.as_ref().and_then(|disk| disk.target.as_deref());
    let Some(live) = &views.live else { return Some("the domain does not run".into()) };
    match media::pick(live, &desired(spec, source, has, true)) {
        Ok(media::Pick::Has(_)) => None,
        Ok(media::Pick::Empty(drive)) => Some(format!("its medium is not in drive {drive} now")),
        Err(error) => Some(error.to_string()),
    }
}

/// Whether the domain has a drive for the medium now, with those media gone that are to go.
pub(super) async fn check(
    ways: &Ways,
    spec: &VolumeSpec,
    place: &Place,
    leaving: &BTreeSet<VolumeName>,
) -> Result<(), Refusal> {
    let connection = ways.libvirt().await?;
    let desired = desired_at(ways, spec, place);
    let limit = ways.settings().libvirt;
    let found = media::find(&*connection, &ways.vm.domain, &desired, limit).await;
    let Err(error) = found else { return Ok(()) };
    let owners = ways.owners(&spec.name, &error).await?;
    for owner in &owners {
        let marked = ways.effects.removal(&ways.key(owner)).await;
        if leaving.contains(owner) || marked.map_err(Failure::from)?.is_some() {
            return Ok(());
        }
    }
    let mut failure = Failure::from(error);
    if let Some(owner) = owners.first() {
        failure.message = format!("{}, which is that of volume {owner}", failure.message);
    }
    let of_drive = [Reason::DriveNotFound, Reason::DriveOccupied].contains(&failure.reason);
    let refusal = Refusal::from(failure);
    Err(if of_drive { refusal.field("volume.drive") } else { refusal })
}

impl Ways {
    /// The other volumes whose media are in the drives that stand in the way.
    async fn owners(
        &self,
        own: &VolumeName,
        error: &domain::Error,
    ) -> Result<Vec<VolumeName>, Failure> {
        let (sources, mut owners) = (error.in_drives(), Vec::new());
        if sources.is_empty() {
            return Ok(owners);
        }
        let begun = self.effects.volumes_begun(&self.vm.id).await?;
        for key in begun.into_iter().filter(|key| key.volume != *own) {
            let effects = self.effects.get(&key).await?;
            let medium = effects.and_then(|effects| effects.disk?.medium);
            if medium.is_some_and(|medium| sources.contains(&medium.as_str())) {
                owners.push(key.volume);
            }
        }
        Ok(owners)
    }

    /// Why a medium does not come into its drive: one that another volume has will be free.
    async fn drive_failure(&self, own: &VolumeName, error: domain::Error) -> Failure {
        let owners = match self.owners(own, &error).await {
            Ok(owners) => owners,
            Err(unread) => return unread,
        };
        let locked = matches!(error, domain::Error::TrayLocked { .. });
        let failure = Failure::from(error);
        if locked {
            // Nothing is in it that could be waited for, but the guest may let go of it.
            return Failure { reason: Reason::DriveBusy, ..failure };
        }
        match owners.first() {
            None => failure,
            Some(owner) => {
                let message = format!(
                    "{}, which is that of volume {owner}: it comes in when that is gone",
                    failure.message
                );
                Failure::new(Reason::DriveBusy, message)
            }
        }
    }
}

/// Takes a medium out, if its drive still has it; `confirm` once nothing can open the device any more.
pub(super) async fn eject(
    ways: &Ways,
    connection: &dyn Connection,
    disk: &VolumeName,
    source: &str,
    why: Unwind<'_>,
    confirm: bool,
) -> Result<(), Failure> {
    let (name, limit) = (&ways.vm.domain, ways.settings().guest_unplug);
    let how = match why {
        Unwind::Removed(options, _) if options.force => Eject::Forced,
        Unwind::Removed(..) | Unwind::Failed => Eject::Asked,
    };
    let Ejected { unlocked, .. } = if confirm {
        media::confirm_ejected(connection, name, disk, source, how, limit).await?
    } else {
        media::eject(connection, name, disk, source, how, limit).await?
    };
    if let (true, Unwind::Removed(_, gave_up)) = (unlocked, why) {
        gave_up.note("the guest had locked the tray, and may have been reading the medium".into());
    }
    Ok(())
}
