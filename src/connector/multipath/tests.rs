//! What is asked of multipathd, and when.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;

use super::*;
use crate::connector::identity::Unit;
use crate::connector::scsi::Disk;
use crate::host::sim::SimHost;
use crate::host::uevent::{Notice, Uevent, UeventStream, Uevents};
use crate::types::Wwid;

/// Hears the kernel and udev apart.
struct Events {
    kernel: broadcast::Sender<Notice>,
    udev: broadcast::Sender<Notice>,
    /// Whether udev's database is to be seen, and has no device in it.
    is_empty: AtomicBool,
}

impl Uevents for Events {
    fn subscribe(&self) -> UeventStream {
        UeventStream::new(self.kernel.subscribe())
    }

    fn subscribe_to_udev(&self) -> UeventStream {
        UeventStream::new(self.udev.subscribe())
    }

    fn is_ruled(&self, _: DevNum) -> bool {
        !self.is_empty.load(Ordering::Relaxed)
    }
}

/// A multipathd that refuses a path until udev has told of it.
#[derive(Default)]
struct Listening {
    told: AtomicBool,
    asked: AtomicUsize,
}

#[async_trait]
impl Multipathd for Listening {
    async fn ask(&self, command: &str) -> Result<String, MultipathdError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.told.load(Ordering::Relaxed) {
            return Ok("ok".into());
        }
        Err(MultipathdError::Refused { command: command.into(), answer: "fail".into() })
    }

    async fn forget(&self, _: &Wwid) -> Result<Outcome, MultipathdError> {
        Ok(Outcome::Already(()))
    }
}

fn path() -> ScsiPath {
    let wwid: Wwid = "naa.60014050000000000000000000000001".parse().unwrap();
    ScsiPath {
        hctl: "3:0:0:1".parse().unwrap(),
        dir: "devices/platform/host3/session1/target3:0:0/3:0:0:1".into(),
        disk: Disk {
            name: "sda".into(),
            dev: DevNum { major: 8, minor: 0 },
            diskseq: 1,
            size: 1 << 30,
        },
        raw_wwid: wwid.to_string(),
        identity: Identity { wwid: wwid.clone(), all: vec![wwid], unit: Unit::default() },
    }
}

#[tokio::test(start_paused = true)]
async fn a_path_that_multipathd_does_not_know_yet_is_told_again_at_udevs_word() {
    // Where udev's database is to be seen, multipathd is not asked in vain.
    for (is_empty, asked) in [(false, 2), (true, 1)] {
        let (kernel, udev) = (broadcast::channel(8).0, broadcast::channel(8).0);
        let events =
            Arc::new(Events { kernel, udev: udev.clone(), is_empty: AtomicBool::new(is_empty) });
        let multipathd = Arc::new(Listening::default());
        let doors = StorageDoors {
            uevents: events.clone(),
            multipathd: multipathd.clone(),
            ..StorageDoors::sim(&SimHost::default().storage)
        };
        let begin = Instant::now();
        let in_udev = Duration::from_millis(300);
        let udevs_word = async {
            tokio::time::sleep(in_udev).await;
            multipathd.told.store(true, Ordering::Relaxed);
            events.is_empty.store(false, Ordering::Relaxed);
            udev.send(Notice::Recheck).unwrap();
        };
        let settings = Settings::default();
        let paths = [path()];
        let (decided, ()) = tokio::join!(decide(&doors, &settings, &paths), udevs_word);
        decided.unwrap();
        assert_eq!(begin.elapsed(), in_udev, "time is simulated: nothing else was waited for");
        assert_eq!(multipathd.asked.load(Ordering::Relaxed), asked);
    }
}

#[tokio::test(start_paused = true)]
async fn a_udev_that_never_comes_to_a_path_keeps_nobody() {
    let (kernel, udev) = (broadcast::channel(8).0, broadcast::channel(8).0);
    let multipathd = Arc::new(Listening::default());
    multipathd.told.store(true, Ordering::Relaxed);
    let doors = StorageDoors {
        uevents: Arc::new(Events { kernel, udev, is_empty: AtomicBool::new(true) }),
        multipathd: multipathd.clone(),
        ..StorageDoors::sim(&SimHost::default().storage)
    };
    let settings = Settings::default();
    decide(&doors, &settings, &[path()]).await.unwrap();
    assert_eq!(multipathd.asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_multipathd_that_is_busy_is_not_told_of_paths_before_it_is_done() {
    let seconds = Duration::from_secs;
    // Until when udev's rules have not come to the path, and until when the kernel tells of disks; when it is told.
    for (ruled, events, told) in [(0, 0, 1.5), (4, 0, 4.0), (0, 10, 11.5), (99, 99, 15.0)] {
        let (kernel, udev) = (broadcast::channel(8).0, broadcast::channel(8).0);
        let is_empty = AtomicBool::new(ruled > 0);
        let events_door = Arc::new(Events { kernel: kernel.clone(), udev, is_empty });
        let multipathd = Arc::new(Listening::default());
        multipathd.told.store(true, Ordering::Relaxed);
        let doors = StorageDoors {
            uevents: events_door.clone(),
            multipathd: multipathd.clone(),
            ..StorageDoors::sim(&SimHost::default().storage)
        };
        let begin = Instant::now();
        let busy = async {
            for second in 1.. {
                tokio::time::sleep(seconds(1)).await;
                events_door.is_empty.store(second < ruled, Ordering::Relaxed);
                if second <= events {
                    let disk = uevent("block", "devices/virtual/block/dm-7");
                    kernel.send(Notice::Event(disk.into())).unwrap();
                }
            }
        };
        let asked = async {
            while multipathd.asked.load(Ordering::Relaxed) == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            begin.elapsed()
        };
        let (settings, paths) = (Settings::default(), [path()]);
        let at = tokio::select! {
            () = busy => unreachable!(),
            ended = ensure(&doors, &settings, &paths) => panic!("{ended:?}"),
            at = asked => at,
        };
        let late = at.as_secs_f64() - told;
        assert!((0.0..2.0).contains(&late), "told after {at:?}: {ruled}, {events}");
    }
}

fn uevent(subsystem: &str, devpath: &str) -> Uevent {
    Uevent {
        action: "change".into(),
        devpath: devpath.into(),
        subsystem: subsystem.into(),
        properties: Default::default(),
    }
}
