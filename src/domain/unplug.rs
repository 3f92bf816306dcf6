//! Detaching a disk from a domain, as libvirt and the guest let us.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::host::libvirt::{
    Affect, Calls, Connection, Definition, DomainEvent, DomainEvents, DomainState, LibvirtError,
    Lifecycle,
};
use crate::types::VolumeName;

use super::apply::{At, Error};
use super::diff::Needs;
use super::iothread;

/// How a detach came to its end. In each case QEMU has let go of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// The domain has let go of it.
    Removed,
    /// It was not there.
    Absent,
    /// The domain does not run (any more).
    DomainGone,
}

/// Detaches a volume's disk from the running domain and, where `definition` says so, from its persistent
/// definition, wherever it is; only ever a disk of our alias.
///
/// The device counts as gone when libvirt says so by its event, which it sends after everything of
/// the device is torn down, or when a further request finds none (that request waits for the
/// domain's lock, so for a teardown that is under way). A guest's refusal, and its silence until the
/// deadline, are errors that leave the disk working. Its own I/O thread (`io_thread`, one of ours) goes
/// after it. libvirt's own call waits up to 5 s for the guest
/// (`qemuDomainRemoveDeviceWaitTime`), so a deadline should be longer than that.
///
/// An attach of ours for that disk that was given up on is waited for first: it could put the disk into
/// the domain after this has found none.
pub async fn detach(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    definition: bool,
    io_thread: Option<u32>,
    deadline: Duration,
) -> Result<Detached, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let alias = super::alias(volume);
    landed(&at, &alias, Calls::Attach).await?;
    let mut events = connection.events(domain);
    let Some(info) = at.info().await? else { return Ok(Detached::DomainGone) };
    if let Some(job) = info.job {
        return Err(Error::Busy { domain: domain.to_owned(), job });
    }
    let live = if info.state == DomainState::Shutoff {
        Detached::DomainGone
    } else {
        match request(&at, &alias).await? {
            Requested::Asked => wait_gone(&at, &alias, &mut events, deadline).await?,
            Requested::Missing => Detached::Absent,
            Requested::NoDomain => Detached::DomainGone,
        }
    };
    let definition = definition && info.persistent;
    let forgotten = definition && forget(&at, &alias).await?;
    if let Some(id) = io_thread {
        let live = live != Detached::DomainGone;
        iothread::remove(&at, &alias, id, Needs { live, config: definition }).await?;
    }
    Ok(if forgotten && live == Detached::Absent { Detached::Removed } else { live })
}

/// Waits until no earlier call of ours for that disk may still take effect: an old detach would take
/// away the disk that is attached after it.
pub async fn settled(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    deadline: Duration,
) -> Result<(), Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    landed(&at, &super::alias(volume), Calls::All).await
}

async fn landed(at: &At<'_>, alias: &str, calls: Calls) -> Result<(), Error> {
    let landed = at.connection.landed(at.domain, alias, calls, at.left()).await;
    landed.map_err(at.failed("change", alias))
}

/// Looks once more, after a detach, when QEMU can no longer open the device: whatever put the disk into
/// the domain meanwhile is undone; `definition` and `io_thread` as in [`detach`].
///
/// This ends what nobody's word can: a libvirtd that hung, or that went on after its client was killed,
/// may carry out an old attach at any time. One that opened the device before that became impossible
/// has the domain's job since before then, and this request waits for that job (`VIR_JOB_MODIFY`,
/// `qemuDomainDetachDeviceAlias`); any later one fails at QEMU's open and leaves nothing.
pub async fn confirm_gone(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    definition: bool,
    io_thread: Option<u32>,
    deadline: Duration,
) -> Result<Detached, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let alias = super::alias(volume);
    match request(&at, &alias).await {
        Ok(Requested::Missing) => {
            if let Some(id) = io_thread {
                let from = Needs { live: true, config: definition };
                iothread::remove(&at, &alias, id, from).await?;
            }
            Ok(Detached::Absent)
        }
        Ok(Requested::NoDomain) => Ok(Detached::DomainGone),
        Ok(Requested::Asked) | Err(Error::GuestRefused { .. }) => {
            tracing::warn!(alias, "an old attach came to the guest late: it is undone");
            detach(connection, domain, volume, definition, io_thread, at.left()).await
        }
        Err(error) => Err(error),
    }
}

/// What came of asking libvirt for a removal.
enum Requested {
    /// The guest is asked, or was before.
    Asked,
    /// There is no such disk.
    Missing,
    /// The domain does not run.
    NoDomain,
}

async fn request(at: &At<'_>, alias: &str) -> Result<Requested, Error> {
    let result = at.connection.detach_alias(at.domain, alias, Affect::LIVE, at.left()).await;
    match result {
        Ok(()) | Err(LibvirtError::UnplugPending { .. }) => Ok(Requested::Asked),
        Err(LibvirtError::DeviceMissing { .. }) => Ok(Requested::Missing),
        Err(LibvirtError::NoDomain { .. } | LibvirtError::NotRunning { .. }) => {
            Ok(Requested::NoDomain)
        }
        Err(LibvirtError::UnplugRejected { .. }) => {
            Err(Error::GuestRefused { alias: alias.to_owned() })
        }
        Err(source) => Err(at.failed("detach", alias)(source)),
    }
}

async fn wait_gone(
    at: &At<'_>,
    alias: &str,
    events: &mut DomainEvents,
    waited: Duration,
) -> Result<Detached, Error> {
    loop {
        let unacknowledged = || Error::Unacknowledged { alias: alias.to_owned(), waited };
        match timeout_at(at.until, events.next()).await.map_err(|_| unacknowledged())? {
            DomainEvent::DeviceRemoved(gone) if gone == alias => return Ok(Detached::Removed),
            DomainEvent::DeviceRemovalFailed(kept) if kept == alias => {
                return Err(Error::GuestRefused { alias: alias.to_owned() });
            }
            DomainEvent::Lifecycle(Lifecycle::Stopped) => return Ok(Detached::DomainGone),
            DomainEvent::Disconnected => {
                return Err(at.failed("detach", alias)(LibvirtError::NoConnect {
                    endpoint: at.domain.to_owned(),
                    message: "the connection broke while the guest was asked".into(),
                }));
            }
            DomainEvent::Recheck => {
                if let Some(end) = look(at, alias).await? {
                    return Ok(end);
                }
            }
            DomainEvent::Lifecycle(_)
            | DomainEvent::DeviceAdded(_)
            | DomainEvent::DeviceRemoved(_)
            | DomainEvent::DeviceRemovalFailed(_) => {}
        }
    }
}

/// Looks for itself when no event came; `None` when the disk is still there, or cannot be seen now.
async fn look(at: &At<'_>, alias: &str) -> Result<Option<Detached>, Error> {
    match at.connection.state(at.domain, at.left()).await {
        Ok(None | Some(DomainState::Shutoff)) => return Ok(Some(Detached::DomainGone)),
        Ok(Some(DomainState::Running | DomainState::Paused)) => {}
        Err(source) if source.is_disconnect() => return Err(at.failed("query", at.domain)(source)),
        // Slow or odd just now: the deadline of the whole ends it.
        Err(_) => return Ok(None),
    }
    match at.read(Definition::Live).await {
        Ok(domain) if domain.disk(alias).is_none() => {}
        Ok(_) | Err(_) => return Ok(None),
    }
    // Only now that the XML no longer has it: to ask a guest again and again would be rude.
    Ok(match request(at, alias).await? {
        Requested::Missing => Some(Detached::Removed),
        Requested::NoDomain => Some(Detached::DomainGone),
        Requested::Asked => None,
    })
}

/// Takes the disk out of the persistent definition; whether it was there. Not by way of its XML: one
/// that cannot be read must not keep a disk from going.
async fn forget(at: &At<'_>, alias: &str) -> Result<bool, Error> {
    match at.connection.detach_alias(at.domain, alias, Affect::CONFIG, at.left()).await {
        Ok(()) => Ok(true),
        // A definition that was undefined meanwhile has no disk either.
        Err(
            LibvirtError::DeviceMissing { .. }
            | LibvirtError::NoDomain { .. }
            | LibvirtError::NotRunning { .. },
        ) => Ok(false),
        Err(source) => Err(at.failed("detach from the definition", alias)(source)),
    }
}
