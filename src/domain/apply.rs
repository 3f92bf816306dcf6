//! Attaching a disk to a domain, as libvirt lets us; and what can go wrong with it and on the way back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::host::libvirt::{
    Affect, Connection, Definition, DomainInfo, DomainState, Job, LibvirtError,
};
use crate::reason::Reason;
use crate::types::{Bus, Outcome, VolumeName};

use super::behind;
use super::diff::{self, DesiredDisk, Needs, Placement, Plan, PlanError, Views};
use super::iothread;
use super::limits;
use super::template::{self, TemplateError};
use super::xml::{self, Domain, XmlError};

/// A disk as it is in the domain now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its target name, e.g. `sda`.
    pub target: String,
    /// Its alias.
    pub alias: String,
    /// Whether a controller had to be added for it. That stays when the disk goes: it is part of
    /// the domain then, other disks may come to lie on it, and removing it takes a guest's
    /// acknowledgement.
    pub controller_added: bool,
}

/// A disk could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libvirt did not do it.
    #[error("{step} of {what} failed")]
    Libvirt {
        /// What was being done.
        step: &'static str,
        /// To what.
        what: String,
        /// Why not.
        #[source]
        source: LibvirtError,
    },
    /// Something else has the domain.
    #[error("domain {domain} is busy with {job}")]
    Busy {
        /// The domain.
        domain: String,
        /// What it is busy with.
        job: Job,
    },
    /// The domain does not run.
    #[error("domain {domain} does not run")]
    NotRunning {
        /// The domain.
        domain: String,
    },
    /// A transient domain has no definition to change.
    #[error(
        "domain {domain} is transient: it has no persistent definition, so attach without persist"
    )]
    Transient {
        /// The domain.
        domain: String,
    },
    /// The domain's XML cannot be used.
    #[error("domain {domain} cannot be read")]
    Xml {
        /// The domain.
        domain: String,
        /// Why not.
        #[source]
        source: XmlError,
    },
    /// The disk has no place there.
    #[error("volume {volume} cannot be attached to domain {domain}")]
    Plan {
        /// The volume.
        volume: VolumeName,
        /// The domain.
        domain: String,
        /// Why not.
        #[source]
        source: PlanError,
    },
    /// The XML to send could not be made.
    #[error("volume {volume} cannot be written as XML")]
    Template {
        /// The volume.
        volume: VolumeName,
        /// Why not.
        #[source]
        source: TemplateError,
    },
    /// libvirt said that it was done, but the disk is not there as it should be.
    #[error("libvirt reported success, but domain {domain} does not show {alias} as asked for")]
    NotConfirmed {
        /// The disk's alias.
        alias: String,
        /// The domain.
        domain: String,
    },
    /// The domain has lost the disk.
    #[error("domain {domain} has no disk {alias} now")]
    NoDisk {
        /// The disk's alias.
        alias: String,
        /// The domain.
        domain: String,
    },
    /// QEMU cannot take over the size of a disk that it has opened for reading only.
    #[error(
        "the host's device has {size} bytes now, but QEMU cannot tell a guest so of the read-only disk {alias}: remove the volume and add it again"
    )]
    ReadOnlyDisk {
        /// The disk's alias.
        alias: String,
        /// Bytes that the device has.
        size: u64,
    },
    /// libvirt said that it told the guest, but QEMU shows another size.
    #[error("libvirt resized {alias} to {size} bytes, but QEMU shows {shown}")]
    NotResized {
        /// The disk's alias.
        alias: String,
        /// Bytes that QEMU shows.
        shown: u64,
        /// Bytes that were asked for.
        size: u64,
    },
    /// The guest refused to let the disk go; it stays attached and working.
    #[error("the guest refused to release disk {alias}; it stays attached and working")]
    GuestRefused {
        /// The disk's alias.
        alias: String,
    },
    /// The guest has locked a drive's tray; the medium stays in it and works.
    #[error(
        "the guest of domain {domain} has locked the tray of drive {drive}; what is in it stays"
    )]
    TrayLocked {
        /// The drive's target name.
        drive: String,
        /// The domain.
        domain: String,
    },
    /// The guest has not answered; the disk stays attached and working, and may still go later.
    #[error(
        "the guest has not acknowledged the removal of disk {alias} within {waited:?}; it stays attached and working"
    )]
    Unacknowledged {
        /// The disk's alias.
        alias: String,
        /// How long was waited.
        waited: Duration,
    },
}

impl Error {
    /// The stable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Libvirt { source, .. } => source.reason(),
            Self::Busy { .. } => Reason::DomainBusy,
            Self::NotRunning { .. } => Reason::VmNotRunning,
            Self::Transient { .. } => Reason::InvalidOption,
            Self::Xml { .. } => Reason::DomainXmlUnsupported,
            Self::Plan { source, .. } => source.reason(),
            Self::Template { .. } => Reason::Internal,
            Self::NotConfirmed { .. } | Self::NotResized { .. } => Reason::LibvirtFailed,
            Self::NoDisk { .. } => Reason::VolumeNotReady,
            Self::ReadOnlyDisk { .. } => Reason::Unsupported,
            Self::TrayLocked { .. } => Reason::InUseByGuest,
            Self::GuestRefused { .. } => Reason::GuestRefusedUnplug,
            Self::Unacknowledged { .. } => Reason::DetachUnacknowledged,
        }
    }
}

impl Error {
    /// The sources in the drives that stand in a medium's way.
    pub fn in_drives(&self) -> Vec<&str> {
        match self {
            Self::Plan { source: PlanError::DriveOccupied { drives }, .. } => {
                drives.iter().map(|(_, source)| source.as_str()).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// One domain, and until when all of it must be done.
pub(super) struct At<'a> {
    pub(super) connection: &'a dyn Connection,
    pub(super) domain: &'a str,
    pub(super) until: Instant,
}

impl At<'_> {
    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    pub(super) fn failed(
        &self,
        step: &'static str,
        what: &str,
    ) -> impl FnOnce(LibvirtError) -> Error {
        let what = what.to_owned();
        move |source| Error::Libvirt { step, what, source }
    }

    pub(super) async fn info(&self) -> Result<Option<DomainInfo>, Error> {
        let info = self.connection.info(self.domain, self.left()).await;
        info.map_err(self.failed("query", self.domain))
    }

    pub(super) async fn read(&self, definition: Definition) -> Result<Arc<Domain>, Error> {
        let text = self.connection.xml(self.domain, definition, self.left()).await;
        let text = text.map_err(self.failed("reading", self.domain))?;
        xml::recall(text).map_err(self.unreadable())
    }

    pub(super) fn unreadable(&self) -> impl FnOnce(XmlError) -> Error {
        let domain = self.domain.to_owned();
        move |source| Error::Xml { domain, source }
    }

    /// The definitions that a disk is to be in.
    pub(super) async fn views(&self, persist: bool) -> Result<Views, Error> {
        let gone = || Error::NotRunning { domain: self.domain.to_owned() };
        let info = self.info().await?.ok_or_else(gone)?;
        if persist && !info.persistent {
            return Err(Error::Transient { domain: self.domain.to_owned() });
        }
        // libvirt itself would wait half a minute for its lock before it said so.
        if let Some(job) = info.job {
            return Err(Error::Busy { domain: self.domain.to_owned(), job });
        }
        let runs = info.state != DomainState::Shutoff;
        if !runs && !persist {
            return Err(gone());
        }
        Ok(Views {
            live: if runs { Some(self.read(Definition::Live).await?) } else { None },
            config: if persist { Some(self.read(Definition::Config).await?) } else { None },
        })
    }

    /// The same definitions, as they are now.
    async fn again(&self, before: &Views) -> Result<Views, Error> {
        let read = async |was: &Option<Arc<Domain>>, definition| match was {
            Some(_) => self.read(definition).await.map(Some),
            None => Ok(None),
        };
        Ok(Views {
            live: read(&before.live, Definition::Live).await?,
            config: read(&before.config, Definition::Config).await?,
        })
    }
}

/// Attaches a disk, or finds it attached. With `persist` the persistent definition gets it too, and
/// a domain that does not run gets it there alone.
///
/// `pending` are target names that are being removed. When the call is cut off half way, calling it
/// again finds what is there and does the rest: everything goes by the disk's alias. libvirt's attach
/// is done when it returns, so no event is waited for; the XML, read anew, is what confirms it.
/// `ahead` are disks that were added before and may not be there yet: their places are left to them.
pub async fn attach(
    connection: &dyn Connection,
    domain: &str,
    desired: &DesiredDisk,
    persist: bool,
    pending: &BTreeSet<String>,
    ahead: &[(String, Bus)],
    deadline: Duration,
) -> Result<Outcome<Attached>, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let alias = super::alias(&desired.volume);
    let plan_error =
        |source| Error::Plan { volume: desired.volume.clone(), domain: domain.to_owned(), source };
    let views = at.views(persist).await?;
    let planned = behind::plan_behind(&views, desired, pending, ahead).map_err(plan_error)?;
    let placement = match planned {
        Plan::Already { target, limits: differing } => {
            let found = Attached { target, alias, controller_added: false };
            if !differing.any() {
                return Ok(Outcome::Already(found));
            }
            limits::give(&at, persist, &views, &found.alias, &desired.limits).await?;
            return Ok(Outcome::Done(found));
        }
        Plan::Attach(placement) => placement,
    };
    send(&at, desired, &alias, &placement).await?;
    // libvirt's word is not enough: the disk must be there as it was asked for.
    let views = at.again(&views).await?;
    match diff::plan(&views, desired, pending).map_err(plan_error)? {
        Plan::Already { target, limits: differing } if target == placement.target => {
            if differing.any() {
                // The definition that had it already.
                limits::give(&at, persist, &views, &alias, &desired.limits).await?;
            }
            let controller_added = placement.controller.is_some();
            Ok(Outcome::Done(Attached { target, alias, controller_added }))
        }
        Plan::Already { .. } | Plan::Attach(_) => {
            Err(Error::NotConfirmed { alias, domain: domain.to_owned() })
        }
    }
}

/// Whether a disk could be attached now, by its plan, with those `ahead` of it in their places; changes
/// nothing.
pub async fn check(
    connection: &dyn Connection,
    domain: &str,
    desired: &DesiredDisk,
    persist: bool,
    pending: &BTreeSet<String>,
    ahead: &[(String, Bus)],
    deadline: Duration,
) -> Result<(), Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let mut views = at.views(persist).await?;
    behind::keep_places(&mut views, ahead, pending);
    let planned = diff::plan(&views, desired, pending);
    planned.map(drop).map_err(|source| Error::Plan {
        volume: desired.volume.clone(),
        domain: domain.to_owned(),
        source,
    })
}

/// What a running domain is now, and with `persist` its definition too where it has one. Looking does
/// not disturb a job that has the domain.
pub async fn observe(
    connection: &dyn Connection,
    domain: &str,
    persist: bool,
    deadline: Duration,
) -> Result<Views, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let (state, persistent) = if persist {
        at.info().await?.map_or((None, false), |info| (Some(info.state), info.persistent))
    } else {
        let state = connection.state(domain, at.left()).await;
        (state.map_err(at.failed("query", domain))?, false)
    };
    match state {
        Some(DomainState::Running | DomainState::Paused) => Ok(Views {
            live: Some(at.read(Definition::Live).await?),
            config: if persistent { Some(at.read(Definition::Config).await?) } else { None },
        }),
        Some(DomainState::Shutoff) | None => Err(Error::NotRunning { domain: domain.to_owned() }),
    }
}

const fn affect(needs: Needs) -> Affect {
    Affect { live: needs.live, config: needs.config }
}

/// Hands a placement to libvirt: controller and I/O thread first, then the disk.
async fn send(
    at: &At<'_>,
    desired: &DesiredDisk,
    alias: &str,
    placement: &Placement,
) -> Result<(), Error> {
    let written = |source| Error::Template { volume: desired.volume.clone(), source };
    if let Some(new) = &placement.controller {
        let xml = template::controller(new).map_err(written)?;
        at.connection
            .attach_device(at.domain, alias, &xml, affect(new.needs), at.left())
            .await
            .map_err(at.failed("attach", "a virtio-scsi controller"))?;
    }
    if let Some(thread) = &placement.io_thread {
        iothread::add(at, alias, thread).await?;
    }
    let xml = template::disk(desired, placement).map_err(written)?;
    at.connection
        .attach_device(at.domain, alias, &xml, affect(placement.needs), at.left())
        .await
        .map_err(at.failed("attach", alias))
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
