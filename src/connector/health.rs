//! How an attached volume is on the host: told by what can be read, changing nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::Attachment;
use crate::host::multipathd::Multipathd;

/// How an attached volume is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is not what was attached, in these words.
    Differs(String),
    /// It is what was attached.
    Right {
        /// What that was.
        attachment: Attachment,
        /// How its paths are.
        paths: Paths,
    },
}

/// How the paths of a volume are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// How many there should be.
    pub wanted: u32,
    /// How many are there and in use, dead ones included.
    pub present: u32,
    /// How many work.
    pub living: u32,
    /// One shows more bytes than were handed out.
    pub grown: bool,
    /// Writes to the device are refused.
    pub protected: bool,
    /// Those that do not, `3:0:0:1 (sda) is offline`, in the order of their addresses.
    pub dead: Vec<String>,
}

/// What multipathd thinks of the node's paths. It tells of all at once, so of a node with thousands it is asked once for
/// all who look at about the same time.
#[derive(Default)]
pub(crate) struct Checks {
    last: tokio::sync::Mutex<Option<Answer>>,
    /// How often something has happened to the node's devices; 0 while nobody listens.
    doubts: AtomicU64,
}

struct Answer {
    asked: Instant,
    answered: Instant,
    /// As of when it was asked: what happened since may not be in it.
    doubts: u64,
    checked: Arc<Checked>,
}

/// For how long an answer counts while nothing happens. The kernel tells of each path that fails or comes back
/// (dm-mpath, `DM_ACTION=PATH_FAILED`).
const FRESH: Duration = Duration::from_secs(60);

impl Checks {
    /// Something happened, or somebody begins to listen: what was answered before counts no more.
    pub(super) fn doubt(&self) {
        self.doubts.fetch_add(1, Ordering::AcqRel);
    }

    /// As of now, or of a moment ago since which nothing happened.
    pub(super) async fn get(&self, multipathd: &dyn Multipathd) -> Arc<Checked> {
        let came = Instant::now();
        let mut last = self.last.lock().await;
        let doubts = self.doubts.load(Ordering::Acquire);
        if let Some(answer) = &*last {
            // Somebody asked while this one waited: of those who wait for one that hangs, not each asks again.
            let is_new = answer.asked > came;
            let is_fresh =
                answer.answered.elapsed() < FRESH && answer.doubts == doubts && doubts > 0;
            if is_new || is_fresh {
                return answer.checked.clone();
            }
        }
        let asked = Instant::now();
        let checked = Arc::new(checked(multipathd).await);
        *last = Some(Answer { asked, answered: Instant::now(), doubts, checked: checked.clone() });
        checked
    }
}

/// Its answer.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// The addresses of those that do not work; those that do are many.
    failed: BTreeSet<String>,
}

impl Checked {
    /// Whether it says that a path does not work.
    pub(crate) fn is_failed(&self, hctl: &str) -> bool {
        self.failed.contains(hctl)
    }
}

/// Asks multipathd once for all paths: a LUN that was unmapped at the array leaves a device that the
/// kernel calls running, and only the path checker knows. Empty when it does not answer.
pub(super) async fn checked(multipathd: &dyn Multipathd) -> Checked {
    // %i: address; %t: device-mapper's state of it, `active`, `failed` or `undef` (multipath-tools,
    // print.c, snprint_dm_path_state).
    match multipathd.ask("show paths raw format \"%i %t\"").await {
        Ok(answer) => {
            let lines = answer.lines().filter_map(|line| line.split_once(' '));
            let failed = lines.filter(|(_, state)| state.trim() == "failed");
            Checked { failed: failed.map(|(address, _)| address.to_owned()).collect() }
        }
        Err(error) => {
            tracing::debug!(%error, "multipathd does not tell how paths are; /sys alone counts");
            Checked::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use async_trait::async_trait;

    use super::*;
    use crate::host::multipathd::MultipathdError;
    use crate::types::{Outcome, Wwid};

    /// A multipathd that takes a second to answer.
    #[derive(Default)]
    struct Slow(AtomicUsize);

    #[async_trait]
    impl Multipathd for Slow {
        async fn ask(&self, _: &str) -> Result<String, MultipathdError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok("3:0:0:1 active\n4:0:0:1 failed\n".into())
        }

        async fn forget(&self, _: &Wwid) -> Result<Outcome, MultipathdError> {
            unreachable!("nothing is changed")
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_look_ask_once_until_something_happens() {
        let (multipathd, checks) = (Slow::default(), Checks::default());
        let asked = || multipathd.0.load(Ordering::Relaxed);
        let look = async || {
            let looks = (0..100).map(|_| checks.get(&multipathd));
            for checked in futures_util::future::join_all(looks).await {
                assert!(checked.is_failed("4:0:0:1") && !checked.is_failed("3:0:0:1"));
            }
        };
        checks.get(&multipathd).await;
        checks.get(&multipathd).await;
        assert_eq!(asked(), 2, "nobody listens to what happens");
        checks.doubt();
        look().await;
        look().await;
        assert_eq!(asked(), 3);
        checks.doubt();
        look().await;
        assert_eq!(asked(), 4);
        tokio::time::sleep(FRESH).await;
        look().await;
        assert_eq!(asked(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_long_in_a_storm_keeps_nobody_for_longer_than_two_answers() {
        let (multipathd, checks) = (Slow::default(), Checks::default());
        checks.doubt();
        let begin = Instant::now();
        let look = async |n| {
            tokio::time::sleep(Duration::from_millis(n)).await;
            checks.get(&multipathd).await;
        };
        let looks = futures_util::future::join_all((0..100).map(look));
        let storm = async {
            loop {
                checks.doubt();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            _ = looks => {}
            () = storm => {}
        }
        assert_eq!(multipathd.0.load(Ordering::Relaxed), 2);
        assert_eq!(begin.elapsed(), Duration::from_secs(2));
    }
}
