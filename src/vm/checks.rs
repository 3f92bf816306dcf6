//! What is checked against the domain and the guest before a request is taken. Changes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use super::disk::{desired_disk, source_of};
use super::facade::Refusal;
use super::failure::Failure;
use super::file;
use super::media;
use super::plan::fc::Power;
use super::ways::Ways;
use crate::connector::local;
use crate::domain::{self, InGuest, Usage};
use crate::host::libvirt::{Definition, DomainState};
use crate::reason::Reason;
use crate::spec::{RemoveOptions, VmPlace, VolumeSpec};
use crate::types::{Bus, VolumeName};

/// Whether the domain could take the disk: its place is proven, its XML is understood, there is a free
/// address also with all that were taken on before, and nothing there has the name or the serial. Of one that
/// does not run nothing is known: the volume is wanted for when it does. Returns whether it runs.
pub(super) async fn add(
    ways: &Ways,
    spec: &VolumeSpec,
    leaving: &BTreeSet<VolumeName>,
) -> Result<Power, Refusal> {
    may_be_given(ways, spec)?;
    let place = match ways.place().await {
        Err(failure) if failure.reason == Reason::VmNotRunning => return Ok(Power::Off),
        // A VM that is off has no pod, mostly.
        Err(failure) if failure.reason == Reason::PodGone && ways.has_ended().await? => {
            return Ok(Power::Off);
        }
        place => place?,
    };
    if spec.device.is_cdrom() {
        return media::check(ways, spec, &place, leaving).await.map(|()| Power::On);
    }
    let source = source_of(ways, &place, spec);
    let connection = ways.libvirt().await?;
    let desired = desired_disk(ways, spec, source, place.pod.is_some());
    let leaving = ways.leaving();
    let ahead = ways.wanted(&spec.name).await;
    let limit = ways.settings().libvirt;
    let name = &ways.vm.domain;
    domain::check(&*connection, name, &desired, spec.persist, &leaving, &ahead, limit)
        .await
        .map(|()| Power::On)
        .map_err(|error| Refusal::from(Failure::from(error)))
}

/// Whether guests of this node may have what is on the host there. The connector asks again: by then the
/// configuration may be another one.
fn may_be_given(ways: &Ways, spec: &VolumeSpec) -> Result<(), Refusal> {
    let Some(path) = spec.source.host_path() else { return Ok(()) };
    let is_file = spec.source.as_file().is_some();
    if is_file && matches!(ways.vm.place, VmPlace::Host { .. }) {
        let refusal = Refusal::new(Reason::Unsupported, file::ONLY_IN_PODS);
        return Err(refusal.field("volume.source.file"));
    }
    if local::allowed(&ways.settings().local, &spec.source).is_some() {
        return Ok(());
    }
    let setting = local::roots_setting(&spec.source);
    let message = format!("{path} is beneath no directory that {setting} names");
    let field = if is_file { "volume.source.file.path" } else { "volume.source.block.path" };
    Err(Refusal::new(Reason::SourceNotAllowed, message).field(field))
}

/// Whether a volume may be taken from the guest; returns what that gives up, in words. By force it
/// always may, and what it would be refused for is given up: the guest is asked all the same, for as
/// long as its agent may take.
pub(super) async fn remove(
    ways: &Ways,
    name: &VolumeName,
    known: Option<&VolumeSpec>,
    options: RemoveOptions,
) -> Result<Vec<String>, Refusal> {
    let Some(spec) = known else { return Err(unknown(ways, name).await) };
    if !options.force {
        return may_go(ways, name, spec).await;
    }
    // libvirt may not answer at all: the agent's time is then not yet begun.
    let limit = ways.settings().agent + ASKING;
    match tokio::time::timeout(limit, may_go(ways, name, spec)).await {
        Ok(Ok(gave_up)) => Ok(gave_up),
        Ok(Err(refusal)) => Ok(vec![refusal.message]),
        Err(_) => {
            Ok(vec![format!("nobody said within {limit:?} whether the guest used volume {name}")])
        }
    }
}

/// How long libvirt may take for a removal by force, beside the guest's agent.
const ASKING: Duration = Duration::from_secs(5);

async fn may_go(ways: &Ways, name: &VolumeName, spec: &VolumeSpec) -> Result<Vec<String>, Refusal> {
    if spec.device.is_cdrom() {
        // A guest that uses a medium has locked the tray, and is asked by QEMU itself.
        return Ok(Vec::new());
    }
    let effects = ways.effects.get(&ways.key(name)).await.map_err(Failure::from)?;
    let (begun, device) = effects.map_or((None, None), |e| (e.disk, e.device));
    if begun.is_none() {
        return Ok(Vec::new());
    }
    let runs = match ways.domain_state().await {
        Ok(state) => matches!(state, Some(DomainState::Running | DomainState::Paused)),
        Err(failure) if failure.reason == Reason::PodGone => false,
        Err(failure) => return Err(failure.into()),
    };
    if !runs {
        return Ok(Vec::new());
    }
    if begun.is_some_and(|disk| disk.target.is_none()) && !ways.shows_disk(&spec.disk, None).await?
    {
        // Its attach has not come to the guest.
        return Ok(Vec::new());
    }
    let connection = ways.libvirt().await?;
    let limit = ways.settings().agent;
    let in_guest = match (&spec.serial, device) {
        (Some(serial), _) => Some(InGuest::Disk(serial.clone(), spec.bus)),
        (None, device) => device.map(|d| InGuest::Lun(d.device.wwid)),
    };
    let usage = match in_guest {
        Some(disk) => domain::usage(&*connection, &ways.vm.domain, &disk, limit).await,
        None => Usage::Unproven("its identity is not recorded".into()),
    };
    match usage {
        Usage::Free => Ok(Vec::new()),
        Usage::InUse(by) => {
            let message = format!("the guest uses volume {name}: {}", by.join(", "));
            Err(Refusal::new(Reason::InUseByGuest, message))
        }
        // On PCI the guest itself acknowledges or refuses the removal.
        Usage::Unproven(_) if spec.bus == Bus::Virtio => Ok(Vec::new()),
        Usage::Unproven(why) => {
            let message = format!("nobody can say whether the guest uses volume {name}: {why}");
            if ways.settings().allow_unproven {
                return Ok(vec![message]);
            }
            Err(Refusal::new(Reason::GuestUnproven, message))
        }
    }
}

/// The refusal for a name that the handler does not know: somebody else's disk, or nothing at all.
async fn unknown(ways: &Ways, name: &VolumeName) -> Refusal {
    if let Ok(Some(theirs)) = theirs(ways, name).await {
        let message = format!("disk {theirs} of that name was not hot-plugged by lunplug");
        return Refusal::new(Reason::NotHotplugged, message).field("volume");
    }
    let message = format!("VM {} has no volume {name}", ways.vm.id);
    Refusal::new(Reason::VolumeNotFound, message).field("volume")
}

/// The target name of somebody else's disk that goes by this name.
async fn theirs(ways: &Ways, name: &VolumeName) -> Result<Option<String>, Failure> {
    let connection = ways.libvirt().await?;
    let xml = connection.xml(&ways.vm.domain, Definition::Live, ways.settings().libvirt).await?;
    // What cannot be read has no disk that we know of.
    let Ok(domain) = domain::xml::recall(xml) else { return Ok(None) };
    Ok(domain::diff::not_ours(&domain, name).map(|disk| disk.target.clone()))
}
