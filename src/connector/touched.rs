//! Which attached volumes the kernel's events may be about.
//!
//! ```text
//! uevents ─► filter ─► gathered for a moment ─► Touched ─► handlers: is that one of mine?
//! ```
//! One task reads for all handlers, and thousands of events become a few messages.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::time::{Instant, timeout_at};

use super::Attachment;
use super::scsi::Hctl;
use crate::host::uevent::{Notice, Uevent, Uevents};
use crate::types::DevNum;

/// For how long events are gathered: those of one cause come within this.
const GATHER: Duration = Duration::from_millis(300);
/// With more devices than this the answer is "any".
const MANY: usize = 4096;
/// Messages kept for a handler that is slow; it looks for itself when it missed some.
const BACKLOG: usize = 64;

/// What kernel events were about. Empty when they were about nothing that could be a volume's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Events were lost, or there were too many: any volume.
    any: bool,
    /// SCSI hosts that have gone, or whose session or connection has changed.
    hosts: BTreeSet<u32>,
    /// SCSI addresses.
    addresses: BTreeSet<String>,
    /// Those at which there is a new disk.
    added: BTreeSet<String>,
    /// Disks and maps.
    numbers: BTreeSet<DevNum>,
    /// A remote port has come: any volume may have a path by it.
    ports: bool,
    /// SCSI addresses of LUNs that have another size, by the array's word or the kernel's.
    resized: BTreeSet<String>,
    /// Numbers of devices that have another size, by the kernel's word.
    resized_numbers: BTreeSet<DevNum>,
}

impl Touched {
    /// What may be about any volume.
    pub fn any() -> Self {
        Self { any: true, ..Self::default() }
    }

    /// Whether it may be about this one.
    pub fn concerns(&self, volume: &Attachment) -> bool {
        let path = |p: &super::PathStatus| {
            let host = p.hctl.split(':').next().and_then(|host| host.parse().ok());
            self.addresses.contains(&p.hctl)
                || self.numbers.contains(&p.dev)
                || host.is_some_and(|host| self.hosts.contains(&host))
        };
        self.any
            || self.ports
            || self.numbers.contains(&volume.device.dev)
            || volume.paths.iter().any(path)
    }

    /// Whether it says that this one's LUN has another size. Not more than a hint: the array's
    /// announcements are lost where nothing is read or written, and where events are.
    /// `volume` is `None` for one whose paths are not known yet.
    pub fn announces_size(&self, volume: Option<&Attachment>) -> bool {
        match volume {
            // What is on the host already has no paths of ours.
            Some(volume) if volume.paths.is_empty() => {
                self.resized_numbers.contains(&volume.device.dev)
            }
            Some(volume) => volume.paths.iter().any(|path| self.resized.contains(&path.hctl)),
            None => !self.resized.is_empty() || !self.resized_numbers.is_empty(),
        }
    }

    /// Whether it says that a path may have come to be that this one misses: by a port that has come, or as a
    /// disk that is there again (a remote port that comes back sends no event of its own). `volume` is
    /// `None` for one whose paths are not known yet.
    pub fn brings_paths(&self, volume: Option<&Attachment>) -> bool {
        let again = |path: &super::PathStatus| self.added.contains(&path.hctl);
        self.any || self.ports || volume.is_some_and(|volume| volume.paths.iter().any(again))
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn take(&mut self, notice: &Notice) {
        match notice {
            Notice::Event(event) => self.take_event(event),
            Notice::Lost => self.any = true,
            Notice::Recheck => {}
        }
        if self.hosts.len() + self.addresses.len() + self.numbers.len() > MANY {
            *self = Self::any();
        }
    }

    fn take_event(&mut self, event: &Uevent) {
        let parts = || event.devpath.split('/');
        match event.subsystem.as_str() {
            "block" | "scsi" | "scsi_device" => {
                let address = parts().find(|part| part.parse::<Hctl>().is_ok());
                // The array's unit attention (scsi_lib.c, scsi_evt_emit), and the kernel's own word when
                // it has read another size (genhd.c, set_capacity_and_notify).
                let says = |key: &str, value: &str| {
                    event.properties.get(key).is_some_and(|said| said == value)
                };
                if says("SDEV_UA", "CAPACITY_DATA_HAS_CHANGED") || says("RESIZE", "1") {
                    self.resized.extend(address.map(str::to_owned));
                }
                self.addresses.extend(address.map(str::to_owned));
                if event.action == "add" && event.subsystem == "block" {
                    self.added.extend(address.map(str::to_owned));
                }
                let number = |key: &str| event.properties.get(key).and_then(|n| n.parse().ok());
                if let (Some(major), Some(minor)) = (number("MAJOR"), number("MINOR")) {
                    self.numbers.insert(DevNum { major, minor });
                    if says("RESIZE", "1") {
                        self.resized_numbers.insert(DevNum { major, minor });
                    }
                }
            }
            // A host that is new is nobody's yet.
            "iscsi_session" | "iscsi_connection" | "scsi_host" | "fc_host" | "fc_remote_ports"
                if event.action != "add" =>
            {
                self.hosts.extend(
                    parts().find_map(|part| part.strip_prefix("host")?.parse::<u32>().ok()),
                );
            }
            "fc_remote_ports" | "fc_host" => self.ports = true,
            _ => {}
        }
    }
}

/// Reads events for ever and tells what they were about.
pub(super) async fn tell(uevents: Arc<dyn Uevents>, listeners: broadcast::Sender<Arc<Touched>>) {
    let mut events = uevents.subscribe();
    loop {
        let mut touched = Touched::default();
        touched.take(&events.event().await);
        if touched.is_empty() {
            continue;
        }
        let until = Instant::now() + GATHER;
        while let Ok(notice) = timeout_at(until, events.event()).await {
            touched.take(&notice);
        }
        // Nobody listening is fine.
        let _ = listeners.send(Arc::new(touched));
    }
}

/// A channel for [`tell`].
pub(super) fn channel() -> broadcast::Sender<Arc<Touched>> {
    broadcast::channel(BACKLOG).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::PathStatus;
    use crate::host::uevent::UeventStream;
    use crate::spec::DeviceStatus;

    fn volume() -> Attachment {
        let path = |hctl: &str, dev: &str, name: &str| PathStatus {
            hctl: hctl.into(),
            dev: dev.parse().unwrap(),
            name: name.into(),
        };
        Attachment {
            device: DeviceStatus {
                dev: "253:7".parse().unwrap(),
                wwid: "naa.6001405000000000000000000000000a".parse().unwrap(),
                size: 512,
                map: Some("mpatha".into()),
                paths: 2,
            },
            diskseq: 9,
            paths: vec![path("3:0:0:1", "8:0", "sda"), path("4:0:0:1", "8:16", "sdb")],
            file: None,
        }
    }

    fn event(action: &str, subsystem: &str, devpath: &str, number: Option<(u32, u32)>) -> Notice {
        let mut properties = std::collections::BTreeMap::new();
        if let Some((major, minor)) = number {
            properties.insert("MAJOR".into(), major.to_string());
            properties.insert("MINOR".into(), minor.to_string());
        }
        let event = Uevent {
            action: action.into(),
            devpath: devpath.into(),
            subsystem: subsystem.into(),
            properties,
        };
        Notice::Event(event.into())
    }

    #[test]
    fn an_event_is_about_the_volumes_whose_devices_it_names() {
        const SESSION: &str = "devices/platform/host3/session1/iscsi_session/session1";
        const DISK: &str = "devices/platform/host3/session1/target3:0:0/3:0:0:1/block/sda";
        const OTHER: &str = "devices/platform/host3/session1/target3:0:0/3:0:0:11/block/sdk";
        const PORT: &str = "devices/pci0000:00/host6/rport-6:0-1/fc_remote_ports/rport-6:0-1";
        for (notice, concerns) in [
            (event("remove", "iscsi_session", SESSION, None), true),
            (event("add", "iscsi_session", SESSION, None), false),
            (event("remove", "block", DISK, Some((8, 0))), true),
            (event("remove", "block", OTHER, Some((8, 160))), false),
            (event("change", "block", "devices/virtual/block/dm-7", Some((253, 7))), true),
            (event("change", "block", "devices/virtual/block/dm-8", Some((253, 8))), false),
            (event("add", "fc_remote_ports", PORT, None), true),
            (event("remove", "fc_remote_ports", PORT, None), false),
            (event("change", "net", "devices/virtual/net/host3", None), false),
            (Notice::Lost, true),
        ] {
            let mut touched = Touched::default();
            touched.take(&notice);
            assert_eq!(touched.concerns(&volume()), concerns, "{notice:?}");
        }
    }

    #[test]
    fn another_size_is_announced_by_the_array_or_told_by_the_kernel() {
        const DEVICE: &str = "devices/platform/host3/session1/target3:0:0/3:0:0:1";
        const OTHER: &str = "devices/platform/host3/session1/target3:0:0/3:0:0:11";
        const DISK: &str = "devices/platform/host4/session2/target4:0:0/4:0:0:1/block/sdb";
        for (subsystem, path, said, announces) in [
            ("scsi", DEVICE, ("SDEV_UA", "CAPACITY_DATA_HAS_CHANGED"), true),
            ("scsi", OTHER, ("SDEV_UA", "CAPACITY_DATA_HAS_CHANGED"), false),
            ("scsi", DEVICE, ("SDEV_UA", "INQUIRY_DATA_HAS_CHANGED"), false),
            ("block", DISK, ("RESIZE", "1"), true),
            ("block", DISK, ("DISK_RO", "1"), false),
        ] {
            let mut notice = event("change", subsystem, path, None);
            if let Notice::Event(event) = &mut notice {
                Arc::make_mut(event).properties.insert(said.0.into(), said.1.into());
            }
            let mut touched = Touched::default();
            touched.take(&notice);
            assert_eq!(touched.announces_size(Some(&volume())), announces, "{notice:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_storm_is_one_message() {
        struct Source(broadcast::Sender<Notice>);
        impl Uevents for Source {
            fn subscribe(&self) -> UeventStream {
                UeventStream::new(self.0.subscribe())
            }
        }
        let (events, listeners) = (broadcast::channel(16384).0, channel());
        let mut told = listeners.subscribe();
        let task = tokio::spawn(tell(Arc::new(Source(events.clone())), listeners));
        tokio::task::yield_now().await;
        for n in 0..10_000 {
            let path = format!("devices/virtual/block/dm-{n}");
            events.send(event("change", "block", &path, Some((253, n)))).unwrap();
        }
        assert!(told.recv().await.unwrap().concerns(&volume()));
        tokio::time::sleep(GATHER * 10).await;
        assert!(told.try_recv().is_err(), "the rest came with it");
        task.abort();
    }
}
