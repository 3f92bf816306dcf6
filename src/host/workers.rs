//! Threads for calls that the kernel may keep for ever.
//!
//! A write to a SCSI device's `delete`, a flush, a dm ioctl can enter uninterruptible sleep. On
//! tokio's own blocking pool such calls would eat one thread each, and the runtime would wait for
//! them when it stops. Here each key (a device, a host) has few places, the pool has an upper
//! bound, its threads are detached, and a call past its deadline is abandoned and counted.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use super::keyed::Keyed;
use super::priority;

pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// A bounded pool of detached threads.
#[derive(Clone)]
pub(crate) struct Workers {
    pool: Arc<Pool>,
    keys: Arc<Mutex<Keyed<Semaphore>>>,
    per_key: usize,
    stuck: Arc<AtomicU64>,
}

/// Detached threads that take jobs in their order, and stay for a while when there are none.
pub(crate) struct Pool {
    name: &'static str,
    max_threads: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// A pool of at most `max_threads`, of which one key may have `per_key`.
    pub(crate) fn new(name: &'static str, max_threads: usize, per_key: usize) -> Self {
        Self {
            pool: Pool::new(name, max_threads),
            keys: Arc::default(),
            per_key,
            stuck: Arc::default(),
        }
    }

    /// How many calls are past their deadline and have not come back.
    pub(crate) fn stuck(&self) -> u64 {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Runs `call` on a thread of the pool. After `deadline`, which counts the wait for a place as
    /// well, it fails with `TimedOut`; a call that has begun goes on by itself. One that has not
    /// begun when the caller is gone is not begun.
    pub(crate) async fn run<T, F>(&self, key: &str, deadline: Duration, call: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        let places = self.places(key);
        let (tx, rx) = oneshot::channel();
        let stuck = Stuck { counter: self.stuck.clone(), state: Arc::default() };
        let job_stuck = stuck.clone();
        // Also where the caller is dropped: its own deadline may be the first to pass.
        let _given_up = GivenUp(stuck);
        let work = async {
            // A semaphore that is never closed always gives a permit in the end.
            let permit = places.acquire_owned().await.map_err(io::Error::other)?;
            self.pool.submit(Box::new(move || {
                if tx.is_closed() || !job_stuck.begin() {
                    return;
                }
                let result = call();
                job_stuck.end();
                drop(permit);
                let _ = tx.send(result);
            }))?;
            rx.await.map_err(|_| io::Error::other("the worker thread ended"))?
        };
        let result = tokio::time::timeout(deadline, work).await;
        result.unwrap_or_else(|_| {
            Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the kernel has not answered within {deadline:?}"),
            ))
        })
    }

    fn places(&self, key: &str) -> Arc<Semaphore> {
        // Devices come and go.
        lock(&self.keys).get(key, || Semaphore::new(self.per_key))
    }
}

impl Pool {
    /// Threads of that name, at most so many.
    pub(crate) fn new(name: &'static str, max_threads: usize) -> Arc<Self> {
        Arc::new(Self { name, max_threads, state: Mutex::default(), wake: Condvar::new() })
    }

    /// Has a thread do it: at once, unless all of them are busy; an error where there is none and none can be had.
    pub(crate) fn submit(self: &Arc<Self>, job: Job) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.jobs.push_back(job);
        if state.idle < state.jobs.len() && state.threads < self.max_threads {
            let pool = self.clone();
            let spawned =
                std::thread::Builder::new().name(self.name.to_owned()).spawn(move || pool.work());
            match spawned {
                Ok(_) => state.threads += 1,
                // One of the threads that are there takes it later.
                Err(_) if state.threads > 0 => {}
                Err(e) => {
                    state.jobs.pop_back();
                    return Err(e);
                }
            }
        }
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    fn work(self: Arc<Self>) {
        priority::raise();
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A call that panics must not take the thread's place in the count with it.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let (next, timeout) =
                self.wake.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = next;
            state.idle -= 1;
            if timeout.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// Whether one call is running, and whether somebody still waits for it.
#[derive(Clone)]
struct Stuck {
    counter: Arc<AtomicU64>,
    state: Arc<Mutex<Progress>>,
}

#[derive(Default, PartialEq)]
enum Progress {
    #[default]
    Queued,
    Running,
    Abandoned,
    Over,
}

impl Stuck {
    fn begin(&self) -> bool {
        let mut state = lock(&self.state);
        if *state != Progress::Queued {
            return false;
        }
        *state = Progress::Running;
        true
    }

    fn end(&self) {
        let mut state = lock(&self.state);
        if *state == Progress::Abandoned {
            self.counter.fetch_sub(1, Ordering::Relaxed);
        }
        *state = Progress::Over;
    }

    fn give_up(&self) {
        let mut state = lock(&self.state);
        match *state {
            Progress::Running => {
                self.counter.fetch_add(1, Ordering::Relaxed);
                *state = Progress::Abandoned;
            }
            Progress::Queued => *state = Progress::Over,
            Progress::Abandoned | Progress::Over => {}
        }
    }
}

/// The caller's end: from then on a call that still runs is stuck.
struct GivenUp(Stuck);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(60);

    // Paused time stands still while `spawn_blocking` has something to do, and otherwise jumps to
    // the next deadline: the call has begun for certain before it is given up.
    #[tokio::test(start_paused = true)]
    async fn a_stuck_call_is_abandoned_and_stops_only_its_own_key() {
        let workers = Workers::new("test", 4, 1);
        let (release, gate) = mpsc::channel::<()>();
        let (begin, begun) = mpsc::channel();
        let (ended, end) = oneshot::channel();
        let stuck = tokio::spawn({
            let workers = workers.clone();
            async move {
                let call = move || {
                    let _ = begin.send(());
                    let _ = gate.recv();
                    let _ = ended.send(());
                    Ok(())
                };
                workers.run("sda", LONG, call).await
            }
        });
        tokio::task::spawn_blocking(move || begun.recv()).await.unwrap().unwrap();
        assert_eq!(stuck.await.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(workers.stuck(), 1);
        let same = workers.run("sda", LONG, || Ok(())).await;
        assert!(same.is_err(), "its place is taken");
        assert_eq!(workers.stuck(), 1, "what never began is not stuck");
        tokio::time::resume();
        assert_eq!(workers.run("sdb", LONG, || Ok(7)).await.unwrap(), 7);
        release.send(()).unwrap();
        end.await.unwrap();
        workers.run("sda", LONG, || Ok(())).await.unwrap();
        assert_eq!(workers.stuck(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_caller_is_gone_is_stuck_too() {
        let workers = Workers::new("test", 4, 1);
        let (release, gate) = mpsc::channel::<()>();
        let (begin, begun) = mpsc::channel();
        let caller = tokio::spawn({
            let workers = workers.clone();
            let call = move || {
                let _ = begin.send(());
                let _ = gate.recv();
                Ok(())
            };
            async move { workers.run("sda", LONG, call).await }
        });
        tokio::task::spawn_blocking(move || begun.recv()).await.unwrap().unwrap();
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        assert_eq!(workers.stuck(), 1);
        release.send(()).unwrap();
        tokio::time::resume();
        workers.run("sda", LONG, || Ok(())).await.unwrap();
        assert_eq!(workers.stuck(), 0);
    }

    #[tokio::test]
    async fn many_calls_go_through_few_threads() {
        let workers = Workers::new("test", 2, 8);
        let calls = (0..100).map(|n| {
            let workers = workers.clone();
            tokio::spawn(async move { workers.run("x", LONG, move || Ok(n)).await })
        });
        for (n, call) in calls.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(call.await.unwrap().unwrap(), n);
        }
        assert!(lock(&workers.pool.state).threads <= 2);
    }
}
