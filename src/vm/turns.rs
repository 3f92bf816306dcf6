//! How many volumes of the node are worked on at once.
//!
//! A restart, or a burst of requests, has thousands to work on, each of which reads what its target's
//! other users have and asks the host. All at once they would take memory without bound, and would wait for
//! each other within the deadlines of single calls. So each waits for its turn first.
//!
//! Work that is slow, as behind a dead portal, mostly waits itself: it goes on, but gives its turn to the
//! next, so that it holds up nobody for long.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Volumes that are worked on at once, those that have become slow not counted.
const AT_ONCE: usize = 64;
/// Work that takes longer is slow: more than a full set of turns takes on a busy machine, or the number at once
/// would grow there after all.
const SLOW: Duration = Duration::from_secs(5);

/// Whose turn it is. Clones share it.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE)))
    }
}

impl Turns {
    /// Does the work when its turn has come.
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> T {
        // It is never closed.
        let turn = self.0.acquire().await;
        let mut work = pin!(work);
        let done = timeout(SLOW, &mut work).await;
        drop(turn);
        match done {
            Ok(done) => done,
            Err(_) => work.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn so_many_at_once_and_no_more() {
        let (turns, now, most) = (Turns::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        let work = async || {
            let at_once = now.fetch_add(1, Ordering::Relaxed) + 1;
            most.fetch_max(at_once, Ordering::Relaxed);
            tokio::time::sleep(SLOW / 2).await;
            now.fetch_sub(1, Ordering::Relaxed);
        };
        join_all((0..10 * AT_ONCE).map(|_| turns.run(work()))).await;
        assert_eq!(most.into_inner(), AT_ONCE);
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_holds_up_nobody_for_long() {
        let turns = Turns::default();
        let hung = join_all((0..AT_ONCE).map(|_| turns.run(pending::<()>())));
        tokio::select! {
            biased;
            _ = hung => unreachable!("it hangs"),
            done = timeout(2 * SLOW, turns.run(async { 7 })) => assert_eq!(done, Ok(7)),
        }
    }
}
