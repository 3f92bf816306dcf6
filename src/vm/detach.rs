//! The way back, from wherever an attach came to.
//!
//! ```text
//! disk (QEMU has let go) ─► grant ─► node ─► no disk ─► UnMountedFromPod ─► flush, map, paths, session ─► Gone
//! ```
//! Nothing later is touched before QEMU has let go; what the host's part has to read for it is read from then on, beside
//! the pod's part. That there is no disk is asked again once grant and
//! node are gone: an attach that was given up on, also by a daemon that was killed since, may have come
//! to the guest in between; from then on none can ([`domain::confirm_gone`]). Each effect is struck from the journal after it
//! was undone, grant and node together, so that a crash repeats little, and each step finds itself done.

use futures_util::future::try_join;
use tokio::sync::watch;

use super::discover::{self, DiscoverError};
use super::failure::Failure;
use super::file;
use super::incoming;
use super::media;
use super::ways::Ways;
use crate::connector::{DetachOptions, GaveUp};
use crate::domain::{self, iothread};
use crate::host::libvirt::Connection;
use crate::host::poddir::PathError;
use crate::journal::{DiskEffect, Effects, NodeEffect};
use crate::reason::Reason;
use crate::spec::{RemoveOptions, Source, VmPlace, VolumeSpec};
use crate::step::Step;
use crate::types::VolumeKey;

/// Why the way back is walked.
#[derive(Debug, Clone, Copy)]
pub(super) enum Unwind<'a> {
    /// The volume is wanted no more: phases are published, and what is given up.
    Removed(RemoveOptions, &'a GaveUp),
    /// Its attach failed: it goes back to where it was.
    Failed,
}

/// Detaches a volume; publishes each phase.
pub(super) async fn detach(
    ways: &Ways,
    volume: &VolumeSpec,
    options: RemoveOptions,
) -> Result<(), Failure> {
    let key = ways.key(&volume.name);
    let limit = ways.settings().detach + ways.settings().guest_unplug;
    let gave_up = GaveUp::default();
    let walked = async {
        let known = ways.desired.identity(&key, &volume.source.key()).await?;
        let mut effects = effects_of(ways, &key, volume, known.is_some()).await?;
        let unseen = effects.device.is_none();
        unwind(ways, &key, &mut effects, Unwind::Removed(options, &gave_up)).await?;
        // What multipath remembers of an earlier boot; an attach of this one has taken it over.
        match known.filter(|_| unseen) {
            Some(wwid) => Ok(ways.host.connector.forget(&volume.source, &wwid).await?),
            None => Ok(()),
        }
    };
    let result = tokio::time::timeout(limit, walked).await.unwrap_or_else(|_| {
        Err(Failure::new(
            Reason::DeadlineExceeded,
            format!("the detach took longer than {limit:?}"),
        ))
    });
    // Also what was given up by an attempt that failed then.
    let gave_up = gave_up.list();
    ways.board.gave_up(&key, &gave_up);
    if let Err(error) = ways.effects.add_gave_up(&key, &gave_up).await {
        // The log has it; whether the volume is gone is another matter.
        tracing::warn!(why = Failure::from(error).message, "what was given up could not be kept");
    }
    result
}

/// What there is to undo of a volume. One that was `attached`, be it in an earlier boot, has left its
/// records, its node, and the disk in the persistent definition.
async fn effects_of(
    ways: &Ways,
    key: &VolumeKey,
    volume: &VolumeSpec,
    attached: bool,
) -> Result<Effects, Failure> {
    let stored = ways.effects.get(key).await?;
    let mut effects = match stored.clone() {
        Some(effects) => incoming::taken_over(ways, key, effects).await?,
        None => {
            let mut effects = begin(ways, key, volume).await?;
            effects.host = true;
            effects
        }
    };
    if attached && volume.persist {
        let (alias, bus) = (domain::alias(&volume.disk), volume.bus);
        let disk = DiskEffect { alias, bus, target: None, io_thread: None, medium: None };
        effects.disk.get_or_insert(disk);
    }
    // From here on a successor knows it too.
    if stored.as_ref() != Some(&effects) {
        ways.effects.put(key, &effects).await?;
    }
    Ok(effects)
}

/// Effects to begin with in this boot. A node of an earlier one is there as long as the pod is.
pub(super) async fn begin(
    ways: &Ways,
    key: &VolumeKey,
    volume: &VolumeSpec,
) -> Result<Effects, Failure> {
    let known = ways.desired.identity(key, &volume.source.key()).await?;
    let mut effects = ways.effects.begin(ways.incarnation(), volume);
    effects.node = known.map(|_| NodeEffect { dev: None });
    Ok(effects)
}

/// Undoes everything in `effects`.
pub(super) async fn unwind(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    why: Unwind<'_>,
) -> Result<(), Failure> {
    let reached_guest = effects.disk.is_some();
    let tracker = &ways.host.tracker;
    if reached_guest {
        tracker.run(Step::Unplug, disk(ways, key, effects, why)).await?;
    }
    let (source, on_host) = (effects.spec.source.clone(), effects.host);
    let (release, released) = watch::channel(false);
    let pod = async {
        // Who waits for it hears, too, that it will not be.
        let release = release;
        let force = match why {
            Unwind::Removed(options, list) => options.force.then_some(list),
            Unwind::Failed => None,
        };
        leave_pod(ways, key, effects, force).await?;
        if reached_guest {
            tracker.run(Step::Confirm, no_disk(ways, key, effects, why)).await?;
        }
        if let Unwind::Removed(..) = why {
            ways.board.phase(key, Step::Confirm.phase());
        }
        release.send_replace(true);
        Ok::<_, Failure>(())
    };
    let (force, gave_up) = match why {
        Unwind::Removed(options, list) => (options.force, Some(list)),
        // No guest has written anything that a failed flush could lose.
        Unwind::Failed => (!reached_guest, None),
    };
    let options = DetachOptions { force, gave_up, released: Some(&released) };
    // What it has to read it reads meanwhile. Its trouble is no reason to leave the pod's part half done.
    let host = async { Ok(host(ways, key, &source, on_host, options).await) };
    let ((), host) = try_join(pod, host).await?;
    host?;
    ways.effects.delete(key).await?;
    *effects = ways.effects.begin(&effects.incarnation, &effects.spec);
    if let Unwind::Failed = why {
        ways.board.update(key, |status| {
            status.device = None;
            status.target = None;
        });
    }
    Ok(())
}

/// Whose definition it is decides: what is asked for with the volume goes with it, and what somebody
/// wrote there who starts the VM by it stays, until the volume is wanted no more.
fn definition(effects: &Effects, why: Unwind<'_>) -> bool {
    matches!(why, Unwind::Removed(..)) || effects.spec.persist
}

async fn disk(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    why: Unwind<'_>,
) -> Result<(), Failure> {
    if effects.disk.is_none() {
        return Ok(());
    }
    if effects.incarnation != ways.incarnation() {
        // It was another pod's, whose QEMU had ended when the VM was registered with this one.
        effects.disk = None;
        return Ok(ways.effects.put(key, effects).await?);
    }
    // Until then it is gone, or still in the XML, where every plan sees it.
    let target = effects.disk.as_ref().and_then(|disk| disk.target.as_deref());
    let leaving = target.map(|target| ways.set_leaving(target));
    match ways.libvirt().await {
        Ok(connection) if let Some(source) = medium_of(effects) => {
            media::eject(ways, &*connection, &effects.spec.disk, source, why, false).await?;
        }
        Ok(connection) => {
            let (definition, limit) = (definition(effects, why), ways.settings().guest_unplug);
            let io_thread = own_thread(ways, key, effects, &*connection).await?;
            let (name, disk) = (&ways.vm.domain, &effects.spec.disk);
            domain::detach(&*connection, name, disk, definition, io_thread, limit).await?;
        }
        Err(failure) => no_qemu(ways, failure).await?,
    }
    drop(leaving);
    // Not struck before it is confirmed; but the guest has it no more.
    if let Some(disk) = &mut effects.disk {
        disk.target = None;
    }
    strike(ways, key, effects, Step::Unplug).await
}

/// The source of a medium that may be in a drive.
fn medium_of(effects: &Effects) -> Option<&str> {
    effects.disk.as_ref()?.medium.as_deref()
}

/// The disk's own I/O thread, which goes with it. Where none is recorded (the disk came by the domain's
/// definition, or before a reboot) the domain is asked, and what it says is written down: once the disk
/// has gone, nothing else tells.
async fn own_thread(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    connection: &dyn Connection,
) -> Result<Option<u32>, Failure> {
    let Some(disk) = &mut effects.disk else { return Ok(None) };
    if disk.io_thread.is_none() && effects.spec.dedicated_io_thread {
        let (name, limit) = (&ways.vm.domain, ways.settings().libvirt);
        disk.io_thread = iothread::found(connection, name, &effects.spec.disk, limit).await;
        ways.effects.put(key, effects).await?;
    }
    Ok(effects.disk.as_ref().and_then(|disk| disk.io_thread))
}

/// Nothing came to the guest since, and nothing can any more.
async fn no_disk(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    why: Unwind<'_>,
) -> Result<(), Failure> {
    if effects.disk.is_none() {
        return Ok(());
    }
    match ways.libvirt().await {
        Ok(connection) if let Some(source) = medium_of(effects) => {
            media::eject(ways, &*connection, &effects.spec.disk, source, why, true).await?;
        }
        Ok(connection) => {
            let (definition, limit) = (definition(effects, why), ways.settings().guest_unplug);
            let io_thread = effects.disk.as_ref().and_then(|disk| disk.io_thread);
            let (name, disk) = (&ways.vm.domain, &effects.spec.disk);
            let gone = domain::confirm_gone(&*connection, name, disk, definition, io_thread, limit);
            gone.await?;
        }
        Err(failure) => no_qemu(ways, failure).await?,
    }
    effects.disk = None;
    strike(ways, key, effects, Step::Confirm).await
}

/// Without a libvirt to ask: a pod that is gone took its QEMU with it, once its last process has ended.
async fn no_qemu(ways: &Ways, failure: Failure) -> Result<(), Failure> {
    if failure.reason != Reason::PodGone {
        return Err(failure);
    }
    match discover::processes(&ways.host.pods, &ways.vm.place).await? {
        0 => Ok(()),
        left => {
            let message = format!(
                "{}, but {left} of its processes still run: nobody can say whether QEMU has let go",
                failure.message
            );
            Err(Failure::new(Reason::LibvirtUnreachable, message))
        }
    }
}

/// Takes what was made of a volume in a pod from there: the grant, then the node, or the file. With `force` also a file
/// that is open there.
pub(super) async fn leave_pod(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    force: Option<&GaveUp>,
) -> Result<(), Failure> {
    let tracker = &ways.host.tracker;
    if effects.grant.is_some() {
        tracker.run(Step::Revoke, grant(ways, key, effects)).await?;
    }
    if effects.node.is_some() {
        tracker.run(Step::Unlink, node(ways, key, effects, force)).await?;
    }
    Ok(())
}

async fn grant(ways: &Ways, key: &VolumeKey, effects: &mut Effects) -> Result<(), Failure> {
    let Some(record) = &effects.grant else { return Ok(()) };
    ways.host.grants.revoke(record).await?;
    effects.grant = None;
    if effects.node.is_some() {
        return Ok(()); // It is struck with the node, which goes next.
    }
    strike(ways, key, effects, Step::Revoke).await
}

async fn node(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    force: Option<&GaveUp>,
) -> Result<(), Failure> {
    let Some(node) = &effects.node else { return Ok(()) };
    // That of the pod for which it was made.
    let mut place = ways.vm.place.clone();
    if let VmPlace::Pod { uid, .. } = &mut place {
        uid.clone_from(&effects.incarnation);
    }
    let (pods, settings) = (&ways.host.pods, &ways.settings().discover);
    match discover::node_dir(pods, settings, &ways.vm.id, &place).await {
        Ok(dir) if effects.spec.source.as_file().is_some() => {
            file::unmount(ways, &place, &dir, &effects.spec.disk, force).await?;
        }
        Ok(dir) => {
            ways.nodes.remove(&dir, &effects.spec.disk, node.dev).await?;
        }
        Err(
            DiscoverError::Pod(PathError::PodGone(_))
            | DiscoverError::Hotplug(PathError::Missing(_) | PathError::PodGone(_)),
        ) => {}
        Err(error) => return Err(error.into()),
    }
    effects.node = None;
    strike(ways, key, effects, Step::Unlink).await
}

/// Writes down that a step was undone.
async fn strike(
    ways: &Ways,
    key: &VolumeKey,
    effects: &mut Effects,
    step: Step,
) -> Result<(), Failure> {
    effects.step = Some(step);
    Ok(ways.effects.put(key, effects).await?)
}

#[tracing::instrument(name = "host", skip_all)]
async fn host(
    ways: &Ways,
    key: &VolumeKey,
    source: &Source,
    on_host: bool,
    options: DetachOptions<'_>,
) -> Result<(), Failure> {
    if on_host {
        ways.host.connector.detach(key, source, options).await?;
    }
    Ok(())
}
