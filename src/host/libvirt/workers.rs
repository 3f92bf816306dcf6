//! Threads for calls that may never return.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use super::LibvirtError;
use crate::host::workers::Pool;

/// Threads for the calls of all connections. What bounds them is that each connection has few places.
pub(super) fn threads() -> Arc<Pool> {
    Pool::new("lunplug-libvirt", usize::MAX)
}

/// A bounded number of threads at a time for one connection.
///
/// Not the runtime's own blocking pool: that is waited for when the runtime ends, and a stuck call
/// would hold up the end of the process.
#[derive(Clone)]
pub(super) struct Workers {
    endpoint: Arc<str>,
    threads: Arc<Pool>,
    places: Arc<Semaphore>,
    stuck: Stuck,
}

/// How many calls are stuck: here, and at all connections.
#[derive(Debug, Clone)]
struct Stuck {
    here: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
}

impl Stuck {
    fn one_more(&self) {
        self.here.fetch_add(1, Ordering::AcqRel);
        self.all.fetch_add(1, Ordering::AcqRel);
    }

    fn one_less(&self) {
        self.here.fetch_sub(1, Ordering::AcqRel);
        self.all.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Counts a call as stuck from when its caller gave up until it returns.
struct Call {
    stuck: Stuck,
    abandoned: Arc<std::sync::atomic::AtomicBool>,
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.abandoned.swap(true, Ordering::AcqRel) {
            self.stuck.one_less();
        }
    }
}

impl Workers {
    /// `all` counts what is stuck at this connection and others.
    pub(super) fn new(
        endpoint: &str,
        threads: Arc<Pool>,
        places: usize,
        all: Arc<AtomicUsize>,
    ) -> Self {
        Self {
            endpoint: endpoint.into(),
            threads,
            places: Arc::new(Semaphore::new(places)),
            stuck: Stuck { here: Arc::default(), all },
        }
    }

    pub(super) fn stuck(&self) -> usize {
        self.stuck.here.load(Ordering::Acquire)
    }

    /// Runs `work` on a thread that does nothing else meanwhile. When `deadline` passes first, the thread is left to
    /// itself and keeps its place until the call returns, whatever it then returns.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        call: &'static str,
        deadline: Duration,
        work: impl FnOnce() -> Result<T, LibvirtError> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let until = Instant::now() + deadline;
        let timed_out = || LibvirtError::TimedOut {
            endpoint: self.endpoint.to_string(),
            call,
            deadline,
            stuck: self.stuck(),
        };
        let place = timeout_at(until, Arc::clone(&self.places).acquire_owned())
            .await
            .map_err(|_| timed_out())?
            .map_err(|_| timed_out())?;
        let (sender, receiver) = oneshot::channel();
        let abandoned = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let running = Call { stuck: self.stuck.clone(), abandoned: Arc::clone(&abandoned) };
        self.threads
            .submit(Box::new(move || {
                let result = work();
                drop(running);
                drop(place);
                // The caller may have given up.
                let _ = sender.send(result);
            }))
            .map_err(|e| LibvirtError::Other { code: 0, message: format!("no thread: {e}") })?;
        // Also runs when the caller drops this future: then, too, the call is abandoned.
        let guard = Abandon { stuck: &self.stuck, abandoned: &abandoned };
        let result = timeout_at(until, receiver).await;
        drop(guard);
        match result {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(LibvirtError::Other { code: 0, message: format!("{call} panicked") }),
            Err(_) => Err(timed_out()),
        }
    }
}

/// The caller's half of the count.
struct Abandon<'a> {
    stuck: &'a Stuck,
    abandoned: &'a std::sync::atomic::AtomicBool,
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        // Whoever comes second undoes what the first did: a call that has returned is not stuck.
        self.stuck.one_more();
        if self.abandoned.swap(true, Ordering::AcqRel) {
            self.stuck.one_less();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[tokio::test]
    async fn a_stuck_call_is_left_behind_and_counted() {
        let workers = Workers::new("here", threads(), 2, Arc::default());
        let (release, held) = mpsc::channel::<()>();
        let (done, returned) = mpsc::channel::<()>();
        let stuck = workers
            .run("xml", Duration::from_millis(20), move || {
                let _ = held.recv();
                let _done = done;
                Ok(())
            })
            .await;
        assert!(matches!(stuck, Err(LibvirtError::TimedOut { stuck: 1, .. })), "{stuck:?}");
        let other = workers.run("xml", Duration::from_secs(30), || Ok(7)).await;
        assert_eq!(other, Ok(7), "another call goes on beside it");
        assert_eq!(workers.stuck(), 1);
        drop(release);
        assert!(returned.recv().is_err(), "it came back");
        // Its place is free again once its thread is at its end; both places are needed here.
        let a = workers.run("a", Duration::from_secs(30), || Ok(()));
        let both = Arc::clone(&workers.places).acquire_many_owned(2).await;
        assert!(both.is_ok());
        drop(both);
        assert_eq!(a.await, Ok(()));
        assert_eq!(workers.stuck(), 0);
    }

    #[tokio::test]
    async fn when_all_places_are_stuck_a_call_fails_and_says_so() {
        let workers = Workers::new("here", threads(), 1, Arc::default());
        let (release, held) = mpsc::channel::<()>();
        let _ = workers
            .run("attach", Duration::from_millis(20), move || {
                let _ = held.recv();
                Ok(())
            })
            .await;
        let second = workers.run("xml", Duration::from_millis(20), || Ok(())).await;
        assert!(matches!(second, Err(LibvirtError::TimedOut { call: "xml", stuck: 1, .. })));
        drop(release);
    }

    #[tokio::test]
    async fn a_panic_is_an_error() {
        let workers = Workers::new("here", threads(), 1, Arc::default());
        let result: Result<(), _> =
            workers.run("xml", Duration::from_secs(30), || panic!("on purpose")).await;
        assert!(matches!(result, Err(LibvirtError::Other { .. })));
        assert_eq!(workers.run("xml", Duration::from_secs(30), || Ok(1)).await, Ok(1));
    }
}
