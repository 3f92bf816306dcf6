//! The way of an attach, and its undoing when it fails.
//!
//! ```text
//! place ─► host ─► node ─► grant ─► disk ─► Ready
//!   │        │       │        │       │
//!   └────────┴───────┴────────┴───────┴──► failed: detach::unwind, from wherever it came to
//! ```
//! Each step is written to the effects before it is made, and each finds itself done when it was: so
//! this same way is walked after a restart.

use super::detach::{self, Unwind};
use super::discover::{self, Place, PodPlace};
use super::disk::source_of;
use super::failure::Failure;
use super::incoming;
use super::plan::Left;
use super::steps::{AttachFailure, Came, Circumstances};
use super::ways::Ways;
use crate::cgroup::{Access, GrantRecord};
use crate::connector::{AttachRequest, Attachment, Expect};
use crate::domain;
use crate::journal::{DiskEffect, Effects, NodeEffect, StoredVolume};
use crate::reason::Reason;
use crate::spec::{Phase, VolumeSpec};
use crate::step::Step;
use crate::types::{DevNum, VolumeKey};

/// Attaches a volume, or finds it attached; publishes each phase.
pub(super) async fn attach(
    ways: &Ways,
    volume: &StoredVolume,
    how: Circumstances,
) -> Result<Came, AttachFailure> {
    let failed = |failure| AttachFailure { failure, left: Left::Unknown };
    let on_the_way = ways.order.set_out(&volume.spec.name);
    let key = ways.key(&volume.spec.name);
    let effects = begun(ways, &key, &volume.spec).await.map_err(failed)?;
    let had_disk = !how.libvirt_waits && had_disk(ways, &effects).await;
    let spec = &volume.spec;
    let mut way = Way { ways, key, spec, effects, had_disk, returns: false, off: false };
    let limit = ways.settings().attach;
    let failure = match tokio::time::timeout(limit, way.walk(volume, how)).await {
        Ok(Ok(came)) => return Ok(came),
        Ok(Err(failure)) => failure,
        // Cut off half way, as a crash would: the effects say how far it came.
        Err(_) => {
            Failure::new(Reason::DeadlineExceeded, format!("the attach took longer than {limit:?}"))
        }
    };
    // Those behind it need not wait for what goes back.
    drop(on_the_way);
    ways.doubt_place();
    if way.off && (had_disk || how.libvirt_waits) {
        // No guest has it, but a definition may; and a libvirt that waits cannot be asked.
        return Err(AttachFailure { failure, left: Left::Off });
    }
    if had_disk && !has_ended(ways, &failure, &volume.spec).await {
        // The guest has used the disk; whatever is wrong now, it is not taken away for that.
        return Err(AttachFailure { failure, left: Left::Disk });
    }
    tracing::info!(reason = %failure.reason, why = failure.message, "undoing the attach");
    let limit = ways.settings().detach + ways.settings().guest_unplug;
    let undone = detach::unwind(ways, &way.key, &mut way.effects, Unwind::Failed);
    let undone = tokio::time::timeout(limit, undone).await.unwrap_or_else(|_| {
        Err(Failure::new(Reason::DeadlineExceeded, format!("it took longer than {limit:?}")))
    });
    match undone {
        Ok(()) => Err(AttachFailure { failure, left: Left::Nothing }),
        Err(undo) => {
            // What is left is in the effects; the next try, or the removal, goes on from there.
            let failure = Failure { reason: undo.reason, ..failure.and_undo(&undo) };
            Err(AttachFailure { failure, left: Left::Unknown })
        }
    }
}

/// Whether the guest had the disk before this attach. Killed between libvirt's attach and the note
/// of it, only the domain itself knows; a domain that does not answer may have it.
async fn had_disk(ways: &Ways, effects: &Effects) -> bool {
    match &effects.disk {
        None => false,
        Some(disk) if disk.target.is_some() => true,
        Some(disk) => {
            let shown = ways.shows_disk(&effects.spec.disk, disk.medium.as_deref());
            shown.await.unwrap_or(true)
        }
    }
}

/// Whether there is no guest any more that could have the disk, nor one that is defined with it.
async fn has_ended(ways: &Ways, failure: &Failure, spec: &VolumeSpec) -> bool {
    match failure.reason {
        // Its directory says nothing of QEMU.
        Reason::PodGone => {
            discover::processes(&ways.host.pods, &ways.vm.place).await.is_ok_and(|left| left == 0)
        }
        Reason::VmNotRunning => !spec.persist,
        _ => false,
    }
}

/// The effects to go on from: those of this incarnation, once any of an earlier one are undone.
async fn begun(ways: &Ways, key: &VolumeKey, spec: &VolumeSpec) -> Result<Effects, Failure> {
    let Some(effects) = ways.effects.get(key).await? else {
        return detach::begin(ways, key, spec).await;
    };
    let mut effects = incoming::taken_over(ways, key, effects).await?;
    if effects.incarnation == ways.incarnation() {
        return Ok(effects);
    }
    detach::unwind(ways, key, &mut effects, Unwind::Failed).await?;
    ways.effects.delete(key).await?;
    detach::begin(ways, key, spec).await
}

/// One attach on its way.
pub(super) struct Way<'a> {
    pub(super) ways: &'a Ways,
    pub(super) key: VolumeKey,
    pub(super) spec: &'a VolumeSpec,
    pub(super) effects: Effects,
    /// The guest has the disk already.
    pub(super) had_disk: bool,
    /// It was attached before.
    pub(super) returns: bool,
    /// The VM does not run: it is about to start.
    pub(super) off: bool,
}

impl Way<'_> {
    async fn walk(&mut self, volume: &StoredVolume, how: Circumstances) -> Result<Came, Failure> {
        let (place, came) = match self.guests_place(how).await? {
            Some(place) => (place, Came::ToGuest),
            None => {
                (self.off, self.had_disk) = (true, false);
                (self.ways.place_to_be().await?, Came::ToPod)
            }
        };
        if came == Came::ToGuest && self.spec.device.is_cdrom() {
            self.drive_is_free(&place).await?;
        }
        let attachment = self.host(volume, how.returns).await?;
        let place = self.still_there(place).await?;
        self.show(&place, &attachment).await?;
        self.reached(Step::Grant.phase());
        match came {
            Came::ToGuest => self.disk(&place, source_of(self.ways, &place, self.spec)).await?,
            Came::ToPod => self.may_be_taken(source_of(self.ways, &place, self.spec)).await?,
        }
        Ok(came)
    }

    /// The place of the guest; `None` while there is none and one is about to start.
    async fn guests_place(&self, how: Circumstances) -> Result<Option<Place>, Failure> {
        if how.libvirt_waits {
            return Ok(None);
        }
        match self.ways.checked_place().await {
            Err(failure) if how.starting && failure.reason == Reason::VmNotRunning => Ok(None),
            place => place.map(Some),
        }
    }

    /// From here on QEMU can take the device by the domain's definition, unseen: whoever goes back from here
    /// asks the domain first.
    async fn may_be_taken(&mut self, source: String) -> Result<(), Failure> {
        let (alias, bus) = (domain::alias(&self.spec.disk), self.spec.bus);
        let medium = self.spec.device.is_cdrom().then_some(source);
        let disk = DiskEffect { alias, bus, target: None, io_thread: None, medium };
        self.effects.disk.get_or_insert(disk);
        Ok(self.ways.effects.put(&self.key, &self.effects).await?)
    }

    /// The place, found anew if what it was found by was replaced while the host's side took its time.
    async fn still_there(&self, place: Place) -> Result<Place, Failure> {
        match &place.pod {
            Some(pod) if !pod.is_current(&self.ways.host.pods).await? => self.ways.place().await,
            _ => Ok(place),
        }
    }

    /// Publishes how far it is. A volume that is looked at again stays ready meanwhile.
    fn reached(&self, phase: Phase) {
        let shown = self.ways.board.get(&self.key).map(|status| status.phase);
        if shown != Some(Phase::Ready) {
            self.ways.board.phase(&self.key, phase);
        }
    }

    /// Writes the effects down before a step makes the next of them.
    pub(super) async fn announce(&mut self, step: Step) -> Result<(), Failure> {
        // A disk that is looked at again stays as far as it came.
        let came = self.effects.step.filter(|came| came.way() == step.way());
        self.effects.step = came.max(Some(step));
        Ok(self.ways.effects.put(&self.key, &self.effects).await?)
    }

    /// One verified block device on the host, and its identity remembered.
    #[tracing::instrument(name = "host", skip_all)]
    async fn host(&mut self, volume: &StoredVolume, lasting: bool) -> Result<Attachment, Failure> {
        let spec = self.spec;
        let source = spec.source.key();
        let recorded = self.ways.desired.identity(&self.key, &source).await?;
        self.returns = recorded.is_some();
        self.effects.host = true;
        self.announce(Step::Lease).await?;
        self.reached(Step::Lease.phase());
        let authentication = self.ways.authentication(&self.key, &spec.source).await?;
        let request = AttachRequest {
            authentication,
            owner: self.key.clone(),
            source: spec.source.clone(),
            expect: Expect {
                wwid: spec.expect_wwid.clone(),
                unit_serial: spec.expect_unit_serial.clone(),
                size: spec.expect_size,
                // The array may have grown it while it was away. For a first attach the size is strict.
                may_have_grown: lasting && recorded.is_some(),
                recorded: recorded.clone(),
                accept_new_identity: volume.accept_new_identity,
            },
            multipath: spec.multipath,
            shareable: spec.shareable,
            read_only: spec.read_only,
        };
        let attachment = self.ways.host.connector.attach(&request).await?.into_inner();
        self.refuse_exchanged(&attachment)?;
        self.effects.device = Some(attachment.clone());
        self.announce(Step::Remember).await?;
        let wwid = &attachment.device.wwid;
        if recorded.as_ref() != Some(wwid) || volume.accept_new_identity {
            let remember = self.ways.desired.put_identity(&self.key, &source, wwid);
            self.ways.host.tracker.run(Step::Remember, remember).await?;
        }
        self.ways.board.update(&self.key, |status| {
            let mut device = attachment.device.clone();
            // How many of a ready volume's paths live is told by looks at it.
            if let Some(known) = status.device.as_ref().filter(|d| d.dev == device.dev)
                && status.phase == Phase::Ready
            {
                device.paths = known.paths;
            }
            status.device = Some(device);
        });
        self.reached(Step::Remember.phase());
        Ok(attachment)
    }

    /// A guest that has the disk has it by the device that it was given then: a device that was made
    /// anew since cannot be put under it.
    fn refuse_exchanged(&self, now: &Attachment) -> Result<(), Failure> {
        let Some(then) = self.effects.device.as_ref().filter(|_| self.had_disk) else {
            return Ok(());
        };
        if then.is_same(now) {
            return Ok(());
        }
        let which = |a: &Attachment| match &a.file {
            Some(file) => format!("file {} (inode {})", file.path().display(), file.inode.ino),
            None => format!("device {}", a.device.dev),
        };
        let message = format!(
            "the guest was given {} and that is {} now: remove the volume and add it again",
            which(then),
            which(now)
        );
        Err(Failure::new(Reason::DeviceHeld, message))
    }

    /// The block node in the pod's hotplug directory.
    pub(super) async fn node(&mut self, pod: &PodPlace, dev: DevNum) -> Result<(), Failure> {
        self.effects.node = Some(NodeEffect { dev: Some(dev) });
        self.announce(Step::Node).await?;
        let ensure = self.ways.nodes.ensure(&pod.hotplug, &self.spec.disk, dev, pod.owner);
        self.ways.host.tracker.run(Step::Node, ensure).await?;
        Ok(())
    }

    /// The block node on a plain host: by a path that stays the same, so that a definition can have it.
    pub(super) async fn host_node(&mut self, dev: DevNum) -> Result<(), Failure> {
        let dir = self.ways.host.pods.dirs.host_nodes(&self.ways.vm.id, true).await;
        let dir = dir.map_err(discover::DiscoverError::Hotplug)?;
        self.effects.node = Some(NodeEffect { dev: Some(dev) });
        self.announce(Step::Node).await?;
        let ensure = self.ways.nodes.ensure_on_host(&dir, &self.spec.disk, dev);
        self.ways.host.tracker.run(Step::Node, ensure).await?;
        Ok(())
    }

    /// The container may open it.
    pub(super) async fn grant(&mut self, pod: &PodPlace, dev: DevNum) -> Result<(), Failure> {
        let grants = &self.ways.host.grants;
        let other = |g: &&GrantRecord| g.cgroup != pod.cgroup || g.dev != dev;
        if let Some(old) = self.effects.grant.as_ref().filter(other) {
            // The container was made anew in its pod. The record goes only when the grant has gone.
            grants.revoke(old).await?;
            self.effects.grant = None;
        }
        let record = match self.effects.grant.take() {
            Some(record) => record,
            None => {
                let access = if self.spec.read_only { Access::READ } else { Access::READ_WRITE };
                grants.prepare(&pod.cgroup, dev, access).await?
            }
        };
        self.effects.grant = Some(record.clone());
        self.announce(Step::Grant).await?;
        self.ways.host.tracker.run(Step::Grant, grants.grant(&record)).await?;
        Ok(())
    }

    /// The guest has it.
    async fn disk(&mut self, place: &Place, source: String) -> Result<(), Failure> {
        let ways = self.ways;
        let target = if self.spec.device.is_cdrom() {
            self.medium(source, place.pod.is_some()).await?
        } else {
            self.plug(source, place.pod.is_some()).await?
        };
        if let Some(disk) = &mut self.effects.disk {
            disk.target = Some(target.clone());
        }
        ways.host.tracker.run(Step::Ready, self.announce(Step::Ready)).await?;
        ways.board.update(&self.key, |status| {
            status.target = Some(target);
            status.retry_at = None;
            // How its paths are is told by looks at it.
            if status.phase != Phase::Ready || !status.reason.is_some_and(Reason::is_of_paths) {
                status.reason = None;
                status.message.clear();
            }
            status.phase = Step::Ready.phase();
        });
        Ok(())
    }
}
