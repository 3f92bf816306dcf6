//! Media in cdrom drives that the domain has: put in, and taken out, by an update of the drive.
//!
//! ```text
//! insert: live XML ── pick a drive (pure) ── the drive's own XML with our source ── libvirt ── read back
//! eject:  live XML ── a drive with our source? ── its XML without one ── libvirt ── read back
//! ```
//! The drive is not ours, and keeps its alias: a medium is known by its source alone, a path that no
//! other volume of the VM has. A drive in which somebody has put another medium since is left alone.

use std::time::Duration;

use tokio::time::Instant;

use super::apply::{At, Error};
use super::diff::PlanError;
use super::template;
use super::unplug::{self, Detached};
use super::xml::{self, Disk, Domain, DriveSource};
use crate::host::libvirt::{
    Calls, Connection, Definition, DomainInfo, DomainState, LibvirtError, Medium,
};
use crate::types::{Outcome, TargetName, VolumeName};

/// A medium as it should be in one of the domain's drives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredMedium {
    /// The volume that it is.
    pub volume: VolumeName,
    /// The path of the block device or file as QEMU sees it.
    pub source: String,
    /// It is a file.
    pub file: bool,
    /// The drive; the one that can take it where `None`.
    pub drive: Option<TargetName>,
    /// As for a disk.
    pub keep_owner: bool,
}

/// A drive for a medium.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    /// It has the medium.
    Has(String),
    /// It is empty.
    Empty(String),
}

impl Pick {
    /// Its target name.
    pub fn target(&self) -> &str {
        match self {
            Self::Has(target) | Self::Empty(target) => target,
        }
    }
}

impl Domain {
    /// The drive that has this medium.
    pub fn drive_with(&self, source: &str) -> Option<&Disk> {
        self.drives().find(|drive| drive.source.as_deref() == Some(source))
    }

    fn drives(&self) -> impl Iterator<Item = &Disk> {
        self.disks.iter().map(|disk| &**disk).filter(|disk| disk.device == "cdrom")
    }
}

/// The drive for a medium: where none is named, that which has it, or the only one that is empty. Pure.
pub fn pick(domain: &Domain, desired: &DesiredMedium) -> Result<Pick, PlanError> {
    let source = desired.source.as_str();
    let is_ours = |disk: &Disk| disk.source.as_deref() == Some(source);
    if let Some(disk) = domain.disks.iter().find(|d| is_ours(d) && d.device != "cdrom") {
        return Err(PlanError::SourceInUse { path: source.into(), target: disk.target.clone() });
    }
    let has = domain.drive_with(source).map(|drive| drive.target.clone());
    let no_drive = |why: String| PlanError::NoDrive { why, drives: describe(domain) };
    let Some(wanted) = &desired.drive else {
        if let Some(target) = has {
            return Ok(Pick::Has(target));
        }
        let empty: Vec<&Disk> = domain.drives().filter(|drive| drive.medium.is_none()).collect();
        return match empty.as_slice() {
            [one] => Ok(Pick::Empty(one.target.clone())),
            [] if domain.drives().next().is_none() => {
                Err(no_drive("the domain has no cdrom drive".into()))
            }
            [] => Err(occupied(domain.drives())),
            _ => Err(no_drive("it has several empty cdrom drives: name one with drive".into())),
        };
    };
    let wanted = wanted.as_str();
    if let Some(target) = has.filter(|target| target != wanted) {
        return Err(PlanError::SourceInUse { path: source.into(), target });
    }
    match domain.disks.iter().find(|disk| disk.target == wanted) {
        None => Err(no_drive(format!("it has no drive {wanted}"))),
        Some(disk) if disk.device != "cdrom" => {
            Err(no_drive(format!("its {wanted} is a {}, not a cdrom drive", disk.device)))
        }
        Some(drive) if is_ours(drive) => Ok(Pick::Has(wanted.into())),
        Some(drive) if drive.medium.is_some() => Err(occupied([&**drive].into_iter())),
        Some(_) => Ok(Pick::Empty(wanted.into())),
    }
}

fn occupied<'a>(drives: impl Iterator<Item = &'a Disk>) -> PlanError {
    let one = |d: &Disk| (d.target.clone(), d.medium.clone().unwrap_or_default());
    PlanError::DriveOccupied { drives: drives.map(one).collect() }
}

/// The drives in words.
fn describe(domain: &Domain) -> String {
    let one = |drive: &Disk| match &drive.medium {
        Some(medium) => format!("{} (with {medium})", drive.target),
        None => format!("{} (empty)", drive.target),
    };
    let all: Vec<String> = domain.drives().map(one).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

/// The running domain, with its XML; an error where it does not run or something else has it.
async fn running(at: &At<'_>) -> Result<(Domain, String), Error> {
    match at.info().await? {
        Some(info) if info.state != DomainState::Shutoff => match busy(at, info) {
            Some(busy) => Err(busy),
            None => read(at).await,
        },
        _ => Err(Error::NotRunning { domain: at.domain.to_owned() }),
    }
}

fn busy(at: &At<'_>, info: DomainInfo) -> Option<Error> {
    info.job.map(|job| Error::Busy { domain: at.domain.to_owned(), job })
}

async fn read(at: &At<'_>) -> Result<(Domain, String), Error> {
    let text = at.connection.xml(at.domain, Definition::Live, at.left()).await;
    let text = text.map_err(at.failed("reading", at.domain))?;
    let domain = xml::parse(&text).map_err(at.unreadable())?;
    Ok((domain, text))
}

fn unplanned(at: &At<'_>, desired: &DesiredMedium) -> impl FnOnce(PlanError) -> Error {
    let (volume, domain) = (desired.volume.clone(), at.domain.to_owned());
    move |source| Error::Plan { volume, domain, source }
}

/// The drive that the medium has or would come into; changes nothing.
pub async fn find(
    connection: &dyn Connection,
    domain: &str,
    desired: &DesiredMedium,
    deadline: Duration,
) -> Result<Pick, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let (live, _) = running(&at).await?;
    pick(&live, desired).map_err(unplanned(&at, desired))
}

/// Puts a medium into its drive, or finds it there; returns the drive's target name.
pub async fn insert(
    connection: &dyn Connection,
    domain: &str,
    desired: &DesiredMedium,
    deadline: Duration,
) -> Result<Outcome<String>, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let (live, text) = running(&at).await?;
    let target = match pick(&live, desired).map_err(unplanned(&at, desired))? {
        Pick::Has(target) => return Ok(Outcome::Already(target)),
        Pick::Empty(target) => target,
    };
    let written = |source| Error::Template { volume: desired.volume.clone(), source };
    let dac_keep = desired.keep_owner && live.dac_relabels;
    let source = template::medium(&desired.source, desired.file, dac_keep).map_err(written)?;
    let alias = super::alias(&desired.volume);
    change(&at, &alias, &text, &target, &source, Medium::Insert).await?;
    let (live, _) = read(&at).await?;
    match live.drive_with(&desired.source) {
        Some(drive) if drive.target == target => Ok(Outcome::Done(target)),
        _ => Err(Error::NotConfirmed { alias, domain: domain.to_owned() }),
    }
}

/// Updates a drive; a guest that has locked its tray is told as such.
async fn change(
    at: &At<'_>,
    alias: &str,
    text: &str,
    target: &str,
    source: &DriveSource,
    how: Medium,
) -> Result<(), Error> {
    let drive = xml::with_medium(text, target, source).map_err(at.unreadable())?;
    let missing = || Error::NoDisk { alias: target.to_owned(), domain: at.domain.to_owned() };
    let drive = drive.ok_or_else(missing)?;
    match at.connection.update_drive(at.domain, alias, &drive, how, at.left()).await {
        Ok(()) => Ok(()),
        Err(LibvirtError::TrayLocked { .. }) => {
            Err(Error::TrayLocked { drive: target.to_owned(), domain: at.domain.to_owned() })
        }
        Err(source) => Err(at.failed("update of the drive", target)(source)),
    }
}

/// How a medium is to be taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eject {
    /// Unless the guest has locked the tray.
    Asked,
    /// Also then.
    Forced,
}

/// What came of an eject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejected {
    /// How it ended.
    pub end: Detached,
    /// The guest had locked the tray, and was not heeded.
    pub unlocked: bool,
}

/// Takes a volume's medium out of whichever drive has it. Nothing is done where none has: somebody else has
/// taken it out, or put in another. The medium counts as gone when the domain's XML, read anew, has it in
/// no drive: libvirt takes it from there once QEMU has let go (`qemuDomainChangeMediaBlockdev`).
///
/// An insert of ours that was given up on is waited for first.
pub async fn eject(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    source: &str,
    how: Eject,
    deadline: Duration,
) -> Result<Ejected, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let alias = super::alias(volume);
    let landed = connection.landed(domain, &alias, Calls::Attach, at.left()).await;
    landed.map_err(at.failed("change", &alias))?;
    take_out(&at, &alias, source, how).await
}

/// How often a guest is asked to open a locked tray before that is told. It is locked while anything in the guest
/// has the drive open, as its udev has for a moment to look at a new medium; nobody there may hear the request,
/// and libvirt waits 5 s for the tray to open, not for the lock to go.
const ASKED: usize = 3;

/// What of the deadline must be left to ask once more: libvirt's 5 s, and some to spare.
const TO_ASK: Duration = Duration::from_secs(7);

async fn take_out(at: &At<'_>, alias: &str, source: &str, how: Eject) -> Result<Ejected, Error> {
    let asked = if how == Eject::Forced { 1 } else { ASKED };
    let mut result = take_out_once(at, alias, source, Medium::Eject).await;
    for _ in 1..asked {
        if !matches!(result, Err(Error::TrayLocked { .. })) || at.left() < TO_ASK {
            break;
        }
        result = take_out_once(at, alias, source, Medium::Eject).await;
    }
    let unlocked = how == Eject::Forced && matches!(result, Err(Error::TrayLocked { .. }));
    if unlocked {
        result = take_out_once(at, alias, source, Medium::EjectByForce).await;
    }
    result.map(|end| Ejected { end, unlocked })
}

/// The drive is looked for anew each time: what is in it now may be somebody else's.
async fn take_out_once(
    at: &At<'_>,
    alias: &str,
    source: &str,
    how: Medium,
) -> Result<Detached, Error> {
    match at.info().await? {
        Some(info) if info.state != DomainState::Shutoff => {
            if let Some(busy) = busy(at, info) {
                return Err(busy);
            }
        }
        _ => return Ok(Detached::DomainGone),
    }
    let (live, text) = match read(at).await {
        Err(Error::Libvirt { source: LibvirtError::NoDomain { .. }, .. }) => {
            return Ok(Detached::DomainGone);
        }
        read => read?,
    };
    let Some(drive) = live.drive_with(source) else {
        return Ok(Detached::Absent);
    };
    match change(at, alias, &text, &drive.target, &DriveSource::default(), how).await {
        Err(Error::Libvirt {
            source: LibvirtError::NoDomain { .. } | LibvirtError::NotRunning { .. },
            ..
        }) => return Ok(Detached::DomainGone),
        result => result?,
    }
    match at.info().await? {
        Some(info) if info.state != DomainState::Shutoff => {}
        _ => return Ok(Detached::DomainGone),
    }
    let (live, _) = read(at).await?;
    match live.drive_with(source) {
        None => Ok(Detached::Removed),
        Some(_) => {
            let (alias, domain) = (alias.to_owned(), at.domain.to_owned());
            Err(Error::NotConfirmed { alias, domain })
        }
    }
}

/// Looks once more, when QEMU can no longer open the device, as [`super::confirm_gone`] does for a disk: the
/// request by the volume's alias, which no device has, waits for the job of an insert that is under way.
pub async fn confirm_ejected(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    source: &str,
    how: Eject,
    deadline: Duration,
) -> Result<Ejected, Error> {
    let until = Instant::now() + deadline;
    let no_disk = unplug::confirm_gone(connection, domain, volume, false, None, deadline).await?;
    if no_disk == Detached::DomainGone {
        return Ok(Ejected { end: no_disk, unlocked: false });
    }
    let at = At { connection, domain, until };
    take_out(&at, &super::alias(volume), source, how).await
}

#[cfg(test)]
#[path = "media_tests.rs"]
mod tests;
