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

use tokio::time::{Instant, timeout_at};

use crate::host::uevent::{UeventStream, Uevents};

/// One wait.
pub(crate) struct Wait {
    stream: UeventStream,
    deadline: Instant,
    over: bool,
}

impl Wait {
    /// Subscribes.
    pub(crate) fn new(uevents: &dyn Uevents, within: Duration) -> Self {
        Self { stream: uevents.subscribe(), deadline: Instant::now() + within, over: false }
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
        let _ = timeout_at(soon, self.stream.next()).await;
        self.drain().await;
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
        if timeout_at(deadline, self.stream.next()).await.is_err() {
            // One more look: the deadline and the event may have come together.
            self.over = true;
            return true;
        }
        self.drain().await;
        true
    }

    /// A login brings dozens of events at once; one look serves for all that are here already.
    async fn drain(&mut self) {
        loop {
            tokio::select! {
                biased;
                _ = self.stream.next() => {}
                () = std::future::ready(()) => return,
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
        Notice::Event(Uevent {
            action: "add".into(),
            devpath: "x".into(),
            subsystem: "block".into(),
            properties: Default::default(),
        })
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
    async fn without_events_there_is_still_a_look_from_time_to_time() {
        let source = Source(broadcast::channel(16).0);
        let mut wait = Wait::new(&source, Duration::from_secs(10));
        let begin = Instant::now();
        assert!(wait.next().await);
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
