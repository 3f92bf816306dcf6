//! Waiting for the kernel: subscribe first, act, then read sysfs again on every notice until it
//! shows what is waited for or the deadline passes.
//!
//! ```text
//! let mut wait = Wait::new(uevents, deadline);   // what happens from now on is not missed
//! act();
//! loop {
//!     if let Some(found) = look() { return found }
//!     if !wait.next().await { return too_late }
//! }
//! ```

use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use crate::host::uevent::{Notice, Uevent, UeventStream, Uevents};

/// What is waited for, as far as events tell: a node that is busy has thousands of them a second, and many who wait.
#[derive(Debug)]
pub(crate) enum About {
    /// Any event may be about it.
    Any,
    /// Sessions: what is told of single devices is not about them.
    Sessions,
    /// Disks and maps.
    Blocks,
    /// What is in a directory below /sys, or comes there: `devices/platform/host3/session1/target3:0:0/3:0:0:1`.
    Below(String),
}

impl About {
    fn is(&self, event: &Uevent) -> bool {
        match self {
            Self::Any => true,
            Self::Sessions => match event.subsystem.as_str() {
                "scsi" => event.properties.get("DEVTYPE").is_none_or(|kind| kind != "scsi_device"),
                subsystem => subsystem == "scsi_host" || subsystem.starts_with("iscsi_"),
            },
            Self::Blocks => event.subsystem == "block",
            Self::Below(dir) => {
                let rest = event.devpath.strip_prefix(dir.as_str());
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

/// One wait.
pub(crate) struct Wait {
    stream: UeventStream,
    about: About,
    begun: Instant,
    /// When an event was heard last; the beginning, before the first.
    heard: Instant,
    deadline: Instant,
    /// Each event puts the deadline off, to so long after it, and no further than that.
    puts_off: Option<(Duration, Instant)>,
    over: bool,
}

/// Between two looks there is so much of the time that was waited already: where hundreds wait for what takes long,
/// each event of each would be a look of all of them. It adds 3 % at most.
const PAUSE: u32 = 32;

impl Wait {
    /// Subscribes to all events.
    pub(crate) fn new(uevents: &dyn Uevents, within: Duration) -> Self {
        Self::about(uevents, About::Any, within)
    }

    /// Subscribes to some events.
    pub(crate) fn about(uevents: &dyn Uevents, about: About, within: Duration) -> Self {
        let begun = Instant::now();
        let (stream, deadline) = (uevents.subscribe(), begun + within);
        Self { stream, about, begun, heard: begun, deadline, puts_off: None, over: false }
    }

    /// For what a queue has to be worked off before, of a length that nobody knows: ends when nothing was heard for
    /// `quiet`, and in `most` in any case.
    pub(crate) fn while_told(
        uevents: &dyn Uevents,
        about: About,
        quiet: Duration,
        most: Duration,
    ) -> Self {
        let wait = Self::about(uevents, about, quiet);
        Self { puts_off: Some((quiet, wait.begun + most)), ..wait }
    }

    /// Since when nothing was heard.
    pub(crate) fn quiet_since(&self) -> Instant {
        self.heard
    }

    /// For what comes of udev's rules: looks again whenever they have been run for a device.
    pub(crate) fn for_udev(uevents: &dyn Uevents, within: Duration) -> Self {
        Self { stream: uevents.subscribe_to_udev(), ..Self::new(uevents, within) }
    }

    /// Returns when it is time to look again; `false` when the deadline has passed and the last
    /// look was taken.
    pub(crate) async fn next(&mut self) -> bool {
        self.until(self.deadline).await
    }

    /// Like [`Wait::next`], but comes back at `soon` at the latest.
    pub(crate) async fn next_before(&mut self, soon: Instant) -> bool {
        if soon >= self.deadline {
            return self.next().await;
        }
        let _ = timeout_at(soon, self.woken()).await;
        true
    }

    /// Sets another deadline, counted from now: the act that is waited for has only just returned.
    pub(crate) fn restart(&mut self, within: Duration) {
        self.deadline = Instant::now() + within;
        self.over = false;
    }

    async fn until(&mut self, deadline: Instant) -> bool {
        if self.over {
            return false;
        }
        if timeout_at(deadline, self.woken()).await.is_err() {
            // One more look: the deadline and the event may have come together.
            self.over = true;
        }
        true
    }

    /// The next event that may be about it, or the time at which an event may have been missed. A login brings dozens at
    /// once: one look serves for all that are here by then.
    async fn woken(&mut self) {
        let looked = Instant::now();
        let told = async {
            loop {
                match self.stream.next().await {
                    Notice::Event(event) if !self.about.is(&event) => {}
                    Notice::Event(_) => return true,
                    Notice::Lost | Notice::Recheck => return false,
                }
            }
        };
        // What is told of others puts that time off no longer.
        let told = timeout(UeventStream::RECHECK, told).await.unwrap_or(false);
        tokio::time::sleep_until(looked + looked.duration_since(self.begun) / PAUSE).await;
        if self.drain().await || told {
            self.heard = Instant::now();
            if let Some((quiet, last)) = self.puts_off {
                self.deadline = self.deadline.max(last.min(self.heard + quiet));
            }
        }
    }

    /// Takes what is here by now; says whether some of it is about what is waited for.
    async fn drain(&mut self) -> bool {
        let mut told = false;
        loop {
            tokio::select! {
                biased;
                notice = self.stream.next() => {
                    told |= matches!(notice, Notice::Event(event) if self.about.is(&event));
                }
                () = std::future::ready(()) => return told,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::uevent::{Notice, Uevent};
    use tokio::sync::broadcast;

    struct Source(broadcast::Sender<Notice>);
    impl Uevents for Source {
        fn subscribe(&self) -> UeventStream {
            UeventStream::new(self.0.subscribe())
        }
    }

    fn event() -> Notice {
        of("block", "x")
    }

    fn of(subsystem: &str, devpath: &str) -> Notice {
        let event = Uevent {
            action: "add".into(),
            devpath: devpath.into(),
            subsystem: subsystem.into(),
            properties: Default::default(),
        };
        Notice::Event(event.into())
    }

    #[tokio::test(start_paused = true)]
    async fn many_events_are_one_look_and_the_deadline_gives_a_last_one() {
        let source = Source(broadcast::channel(16).0);
        let mut wait = Wait::new(&source, Duration::from_millis(500));
        for _ in 0..5 {
            source.0.send(event()).expect("subscribed");
        }
        assert!(wait.next().await, "the five events");
        assert!(wait.next().await, "the last look");
        assert!(!wait.next().await, "over");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_told_of_others_wakes_nobody_and_keeps_nobody_from_looking() {
        const DISK: &str = "devices/platform/host3/session1/target3:0:0/3:0:0:1";
        let source = Source(broadcast::channel(16).0);
        let long = Duration::from_secs(60);
        for (about, own) in [
            (About::Sessions, of("iscsi_session", "devices/platform/host3/session1/iscsi_session")),
            (About::Below(DISK.into()), of("block", &format!("{DISK}/block/sda"))),
            (About::Below(DISK.into()), Notice::Lost),
        ] {
            let mut wait = Wait::about(&source, about, long);
            let begin = Instant::now();
            let others = async {
                for n in 0.. {
                    let other = of("block", &format!("{DISK}{n}/block/sdb"));
                    source.0.send(other).expect("subscribed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::select! {
                () = others => {}
                more = wait.next() => assert!(more),
            }
            assert_eq!(begin.elapsed(), UeventStream::RECHECK, "it looked by itself");
            let begin = Instant::now();
            source.0.send(own).expect("subscribed");
            assert!(wait.next().await);
            assert!(begin.elapsed() < Duration::from_millis(100), "its own wakes it");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_long_looks_less_often() {
        let source = Source(broadcast::channel(16).0);
        let mut wait = Wait::new(&source, Duration::from_secs(60));
        let mut looks = 0;
        let storm = async {
            for _ in 0..10_000 {
                source.0.send(event()).expect("subscribed");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let looking = async {
            while wait.next().await {
                looks += 1;
            }
        };
        tokio::select! {
            () = storm => {}
            () = looking => {}
        }
        assert!((50..500).contains(&looks), "{looks} looks in 10 s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_for_what_is_queued_goes_on_while_there_are_events_but_not_for_ever() {
        let source = Source(broadcast::channel(16).0);
        let [second, quiet, most] = [1, 10, 40].map(Duration::from_secs);
        // Some events, one a second; then none.
        for (subsystem, events, ends) in
            [("block", 0, 10), ("block", 15, 25), ("net", 15, 10), ("block", 99, 40)]
        {
            let mut wait = Wait::while_told(&source, About::Blocks, quiet, most);
            let begin = Instant::now();
            let telling = async {
                for _ in 0..events {
                    tokio::time::sleep(second).await;
                    source.0.send(of(subsystem, "devices/virtual/block/dm-0")).expect("subscribed");
                }
                std::future::pending().await
            };
            let waiting = async { while wait.next().await {} };
            tokio::select! {
                () = telling => {}
                () = waiting => {}
            }
            let took = begin.elapsed();
            let ends = Duration::from_secs(ends);
            assert!((ends..=ends + second).contains(&took), "{events} of {subsystem}: {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_events_there_is_still_a_look_from_time_to_time() {
        let source = Source(broadcast::channel(16).0);
        let mut wait = Wait::new(&source, Duration::from_secs(10));
        let begin = Instant::now();
        assert!(wait.next().await);
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
