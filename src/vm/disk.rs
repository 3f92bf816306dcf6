//! A disk's part of the ways: what libvirt is to have, and its plugging. That of a medium is in [`super::media`].

use super::attach::Way;
use super::discover::Place;
use super::failure::Failure;
use super::ways::Ways;
use crate::devnode::host_node;
use crate::domain::{self, DesiredDisk, OwnThread, iothread};
use crate::host::libvirt::Connection;
use crate::journal::DiskEffect;
use crate::spec::VolumeSpec;
use crate::step::Step;
use crate::types::Bus;

impl Way<'_> {
    /// The domain has the disk; returns its target name.
    pub(super) async fn plug(
        &mut self,
        source: String,
        keep_owner: bool,
    ) -> Result<String, Failure> {
        let ahead = self.in_order().await;
        let (ways, spec) = (self.ways, self.spec);
        let before = self.effects.disk.take();
        let (target, io_thread) = before.map_or((None, None), |d| (d.target, d.io_thread));
        let alias = domain::alias(&spec.disk);
        self.effects.disk =
            Some(DiskEffect { alias, bus: spec.bus, target, io_thread, medium: None });
        self.announce(Step::Disk).await?;
        let connection = ways.libvirt().await?;
        let mut desired = desired_disk(ways, spec, source, keep_owner);
        let limit = ways.settings().libvirt;
        // Before the turn, which others need.
        domain::settled(&*connection, &ways.vm.domain, &spec.disk, limit).await?;
        let _turn = ways.turn.lock().await;
        if let Some(own) = &mut desired.io_thread {
            own.recorded = self.io_thread(&*connection).await?;
        }
        let leaving = ways.leaving();
        let (name, persist) = (&ways.vm.domain, spec.persist);
        let attach = domain::attach(&*connection, name, &desired, persist, &leaving, &ahead, limit);
        Ok(ways.host.tracker.run(Step::Disk, attach).await?.into_inner().target)
    }

    /// Waits for the volumes that were asked for before this one and come back with it. Returns the
    /// disks of those that are wanted: their places are left to them. A store that cannot be read now
    /// costs the order, not the volume.
    async fn in_order(&self) -> Vec<(String, Bus)> {
        let own = &self.spec.name;
        let mut before = self.ways.desired.disks(&self.ways.vm.id).await.unwrap_or_default();
        before.truncate(before.iter().take_while(|d| d.volume != own.as_str()).count());
        let has_it = self.effects.disk.as_ref().is_some_and(|disk| disk.target.is_some());
        if self.returns && !has_it {
            let names = before.iter().filter_map(|d| d.volume.parse().ok()).collect();
            self.ways.order.after(&names).await;
        }
        before.retain(|d| d.keeps_place);
        before.into_iter().map(|d| (d.disk, d.bus)).collect()
    }

    /// The id of the disk's own I/O thread, written down before that is made.
    async fn io_thread(&mut self, connection: &dyn Connection) -> Result<Option<u32>, Failure> {
        let (ways, spec) = (self.ways, self.spec);
        let recorded = self.effects.disk.as_ref().and_then(|disk| disk.io_thread);
        let (name, limit) = (&ways.vm.domain, ways.settings().libvirt);
        let chosen =
            iothread::to_record(connection, name, &spec.disk, recorded, spec.persist, limit)
                .await?;
        if chosen != recorded
            && let Some(disk) = &mut self.effects.disk
        {
            disk.io_thread = chosen;
            ways.effects.put(&self.key, &self.effects).await?;
        }
        Ok(chosen)
    }
}

/// The device as QEMU sees it.
pub(super) fn source_of(ways: &Ways, place: &Place, spec: &VolumeSpec) -> String {
    let node = match &place.pod {
        Some(pod) => pod.dir_in_pod.join(spec.disk.as_str()),
        // libvirt itself makes it accessible to QEMU. It is a node of our own and no link of udev's, which
        // may lead elsewhere by the time it is opened.
        None => host_node(&ways.vm.id, &spec.disk),
    };
    node.to_string_lossy().into_owned()
}

/// The disk as libvirt is to have it. In a pod the node's owner is right already (`keep_owner`).
pub(super) fn desired_disk(
    ways: &Ways,
    spec: &VolumeSpec,
    source: String,
    keep_owner: bool,
) -> DesiredDisk {
    let helper = ways.settings().pr_helper.clone();
    DesiredDisk {
        volume: spec.disk.clone(),
        source,
        file: spec.source.as_file().map(|file| file.format),
        serial: spec.serial.clone(),
        device: spec.device,
        // Admitted only where there is one; where it was taken away since, libvirt says what it lacks.
        reservations: spec.reservations.then(|| helper.unwrap_or_default()),
        bus: spec.bus,
        cache: spec.cache,
        read_only: spec.read_only,
        shareable: spec.shareable,
        error_policy: spec.error_policy,
        io_thread: spec.dedicated_io_thread.then(OwnThread::default),
        tuning: spec.tuning,
        limits: spec.limits,
        keep_owner,
    }
}
