//! A few clients of multipathd at once, and how long it may be silent.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Multipathd, MultipathdError};
use crate::types::{Outcome, Wwid};

/// Clients of ours at once. multipathd answers one after the other and lets a few wait, the next one's connect
/// fails at once: so the rest wait here, in their order.
const CLIENTS: usize = 4;

/// Asks in turn. Whoever waits for his turn waits as long as others are answered: the deadline is for multipathd's silence,
/// not for how many are before him.
pub struct InTurn {
    door: Arc<dyn Multipathd>,
    deadline: Duration,
    clients: Semaphore,
    /// When it answered anybody last.
    answered: Mutex<Option<Instant>>,
}

impl InTurn {
    /// `deadline` is for one command; the daemon's own is 4 s (`uxsock_timeout`).
    pub fn new(door: Arc<dyn Multipathd>, deadline: Duration) -> Self {
        Self { door, deadline, clients: Semaphore::new(CLIENTS), answered: Mutex::default() }
    }

    fn answered(&self) -> Option<Instant> {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller's turn; `None` where nobody was answered for as long as the deadline says.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        let begun = Instant::now();
        let mut turn = std::pin::pin!(self.clients.acquire());
        loop {
            let heard = self.answered().map_or(begun, |answered| answered.max(begun));
            let turn = timeout_at(heard + self.deadline, &mut turn).await;
            let still_silent = self.answered().is_none_or(|answered| answered <= heard);
            // Also for whom those make room who have waited in vain.
            if still_silent && Instant::now() >= heard + self.deadline {
                return None;
            }
            if let Ok(turn) = turn {
                return turn.ok();
            }
        }
    }
}

#[async_trait]
impl Multipathd for InTurn {
    async fn ask(&self, command: &str) -> Result<String, MultipathdError> {
        let silent = || MultipathdError::TimedOut { command: command.to_owned() };
        let _turn = self.turn().await.ok_or_else(silent)?;
        let answer = timeout(self.deadline, self.door.ask(command)).await.map_err(|_| silent())?;
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        answer
    }

    async fn forget(&self, wwid: &Wwid) -> Result<Outcome, MultipathdError> {
        let silent = || MultipathdError::TimedOut { command: format!("-w {wwid}") };
        timeout(self.deadline, self.door.forget(wwid)).await.unwrap_or_else(|_| Err(silent()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// One that works on each command for so long, and remembers how many it had at once.
    struct Slow {
        takes: Duration,
        now: AtomicUsize,
        most: AtomicUsize,
    }

    impl Slow {
        fn new(takes: Duration) -> Arc<Self> {
            Arc::new(Self { takes, now: AtomicUsize::new(0), most: AtomicUsize::new(0) })
        }
    }

    #[async_trait]
    impl Multipathd for Slow {
        async fn ask(&self, _: &str) -> Result<String, MultipathdError> {
            let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
            self.most.fetch_max(now, Ordering::Relaxed);
            tokio::time::sleep(self.takes).await;
            self.now.fetch_sub(1, Ordering::Relaxed);
            Ok("ok\n".into())
        }

        async fn forget(&self, _: &Wwid) -> Result<Outcome, MultipathdError> {
            Ok(Outcome::Already(()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_few_ask_at_once_and_a_long_queue_is_no_silence() {
        let slow = Slow::new(DEADLINE / 2);
        let door = InTurn::new(slow.clone(), DEADLINE);
        let begun = Instant::now();
        let answers = join_all((0..10 * CLIENTS).map(|_| door.ask("add path sda"))).await;
        assert!(answers.into_iter().all(|answer| answer.is_ok()));
        assert_eq!(slow.most.load(Ordering::Relaxed), CLIENTS);
        assert_eq!(begun.elapsed(), 5 * DEADLINE);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_silent_is_waited_for_once_by_all() {
        let door = InTurn::new(Slow::new(100 * DEADLINE), DEADLINE);
        let begun = Instant::now();
        for answer in join_all((0..10 * CLIENTS).map(|_| door.ask("add path sda"))).await {
            let silent = "multipathd did not answer \"add path sda\" in time";
            assert_eq!(answer.unwrap_err().to_string(), silent);
        }
        assert_eq!(begun.elapsed(), DEADLINE);
    }
}
