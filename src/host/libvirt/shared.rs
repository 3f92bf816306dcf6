//! Questions that several ask at once, asked once: libvirt answers those about a domain one after the other.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, timeout_at};

use super::{
    Affect, Calls, Connection, Definition, DomainEvents, DomainInfo, DomainState, IoThread,
    LibvirtError, Medium, Version,
};
use crate::types::IoLimits;

/// A connection whose answers serve all who asked before libvirt was asked: none is older than its question. What changes
/// something is passed on as it is.
pub struct Shared {
    connection: Arc<dyn Connection>,
    endpoint: String,
    states: Questions<Option<DomainState>>,
    infos: Questions<Option<DomainInfo>>,
    texts: Questions<String>,
}

impl Shared {
    /// Over a connection to that endpoint.
    pub fn new(connection: Arc<dyn Connection>, endpoint: &str) -> Self {
        Self {
            connection,
            endpoint: endpoint.into(),
            states: Questions::default(),
            infos: Questions::default(),
            texts: Questions::default(),
        }
    }

    /// Where others had the turn until the deadline.
    fn timed_out(&self, call: &'static str, deadline: Duration) -> LibvirtError {
        let (endpoint, stuck) = (self.endpoint.clone(), self.connection.stuck_calls());
        LibvirtError::TimedOut { endpoint, call, deadline, stuck }
    }
}

/// Questions of one kind that are being asked, by what they are about.
struct Questions<T>(Mutex<HashMap<String, Weak<Rounds<T>>>>);

impl<T> Default for Questions<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Questions<T> {
    /// The answer of the first round that is begun from now on; `None` where there was none within `deadline`. `ask` has what
    /// is left of it.
    async fn ask(
        &self,
        about: &str,
        deadline: Duration,
        ask: impl AsyncFnOnce(Duration) -> Result<T, LibvirtError>,
    ) -> Option<Result<T, LibvirtError>> {
        self.rounds(about).next(Instant::now() + deadline, ask).await
    }

    /// They are there for as long as somebody asks, and so is their last answer.
    fn rounds(&self, about: &str) -> Arc<Rounds<T>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rounds) = all.get(about).and_then(Weak::upgrade) {
            return rounds;
        }
        all.retain(|_, rounds| rounds.strong_count() > 0);
        let rounds = Arc::new(Rounds::default());
        all.insert(about.to_owned(), Arc::downgrade(&rounds));
        rounds
    }
}

/// Rounds of asking the same, one at a time.
struct Rounds<T> {
    /// How many were begun.
    begun: AtomicU64,
    /// The number of the last one that ended, and what came of it.
    last: tokio::sync::Mutex<Option<(u64, Result<T, LibvirtError>)>>,
}

impl<T> Default for Rounds<T> {
    fn default() -> Self {
        Self { begun: AtomicU64::default(), last: tokio::sync::Mutex::default() }
    }
}

impl<T: Clone> Rounds<T> {
    async fn next(
        &self,
        until: Instant,
        ask: impl AsyncFnOnce(Duration) -> Result<T, LibvirtError>,
    ) -> Option<Result<T, LibvirtError>> {
        let before = self.begun.load(Ordering::Acquire);
        let mut last = timeout_at(until, self.last.lock()).await.ok()?;
        match &*last {
            // Whoever asked may have had less time.
            Some((_, Err(LibvirtError::TimedOut { .. }))) | None => {}
            Some((round, answer)) if *round > before => return Some(answer.clone()),
            Some(_) => {}
        }
        let round = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let answer = ask(until.saturating_duration_since(Instant::now())).await;
        *last = Some((round, answer.clone()));
        Some(answer)
    }
}

#[async_trait]
impl Connection for Shared {
    async fn version(&self, deadline: Duration) -> Result<Version, LibvirtError> {
        self.connection.version(deadline).await
    }

    async fn info(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainInfo>, LibvirtError> {
        let ask = async |left| self.connection.info(domain, left).await;
        let answer = self.infos.ask(domain, deadline, ask).await;
        answer.unwrap_or_else(|| Err(self.timed_out("info", deadline)))
    }

    async fn state(
        &self,
        domain: &str,
        deadline: Duration,
    ) -> Result<Option<DomainState>, LibvirtError> {
        let ask = async |left| self.connection.state(domain, left).await;
        let answer = self.states.ask(domain, deadline, ask).await;
        answer.unwrap_or_else(|| Err(self.timed_out("state", deadline)))
    }

    async fn xml(
        &self,
        domain: &str,
        definition: Definition,
        deadline: Duration,
    ) -> Result<String, LibvirtError> {
        let ask = async |left| self.connection.xml(domain, definition, left).await;
        let about = format!("{definition:?} {domain}");
        let answer = self.texts.ask(&about, deadline, ask).await;
        answer.unwrap_or_else(|| Err(self.timed_out("xml", deadline)))
    }

    async fn attach_device(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.attach_device(domain, device, xml, affect, deadline).await
    }

    async fn detach_alias(
        &self,
        domain: &str,
        alias: &str,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.detach_alias(domain, alias, affect, deadline).await
    }

    async fn update_drive(
        &self,
        domain: &str,
        device: &str,
        xml: &str,
        how: Medium,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.update_drive(domain, device, xml, how, deadline).await
    }

    async fn block_capacity(
        &self,
        domain: &str,
        source: &str,
        deadline: Duration,
    ) -> Result<u64, LibvirtError> {
        self.connection.block_capacity(domain, source, deadline).await
    }

    async fn block_resize(
        &self,
        domain: &str,
        source: &str,
        bytes: u64,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.block_resize(domain, source, bytes, deadline).await
    }

    async fn set_io_limits(
        &self,
        domain: &str,
        source: &str,
        limits: &IoLimits,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.set_io_limits(domain, source, limits, affect, deadline).await
    }

    async fn change_io_thread(
        &self,
        domain: &str,
        device: &str,
        id: u32,
        how: IoThread,
        affect: Affect,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.change_io_thread(domain, device, id, how, affect, deadline).await
    }

    async fn landed(
        &self,
        domain: &str,
        device: &str,
        calls: Calls,
        deadline: Duration,
    ) -> Result<(), LibvirtError> {
        self.connection.landed(domain, device, calls, deadline).await
    }

    /// lunplug only asks by it: no command changes anything in the guest.
    async fn agent_command(
        &self,
        domain: &str,
        command: &str,
        deadline: Duration,
    ) -> Result<String, LibvirtError> {
        let ask = async |left| self.connection.agent_command(domain, command, left).await;
        let about = format!("agent {domain} {command}");
        let answer = self.texts.ask(&about, deadline, ask).await;
        answer.unwrap_or_else(|| Err(self.timed_out("agent", deadline)))
    }

    fn events(&self, domain: &str) -> DomainEvents {
        self.connection.events(domain)
    }

    fn is_alive(&self) -> bool {
        self.connection.is_alive()
    }

    fn stuck_calls(&self) -> usize {
        self.connection.stuck_calls()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::FutureExt as _;
    use futures_util::future::{join, join_all};
    use tokio::sync::oneshot;

    use super::*;

    type Asked = Questions<String>;
    type Answer = Option<Result<String, LibvirtError>>;

    const SOON: Duration = Duration::from_secs(5);

    fn said(words: &str) -> Answer {
        Some(Ok(words.into()))
    }

    fn timed_out() -> LibvirtError {
        let endpoint = "here".into();
        LibvirtError::TimedOut { endpoint, call: "xml", deadline: SOON, stuck: 1 }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_while_another_is_answered_shares_the_next_answer() {
        let asked = Asked::default();
        let (answers, first) = oneshot::channel();
        let mut first = Box::pin(asked.ask("vm", SOON, async |_| Ok(first.await.unwrap())));
        assert_eq!((&mut first).now_or_never(), None, "libvirt is asked");
        let count = AtomicUsize::new(0);
        let ask = async |_| {
            let n = count.fetch_add(1, Ordering::Relaxed);
            Ok(format!("later {n}"))
        };
        let mut later = Box::pin(join_all([(); 3].map(|()| asked.ask("vm", SOON, ask))));
        assert_eq!((&mut later).now_or_never(), None, "they wait");
        let other = asked.ask("other vm", SOON, async |_| Ok("other".into()));
        assert_eq!(other.now_or_never(), Some(said("other")), "they ask something else");
        answers.send("early".to_owned()).unwrap();
        let (early, later) = join(first, later).await;
        assert_eq!(early, said("early"));
        assert_eq!(later, [(); 3].map(|()| said("later 0")), "asked once for all");
        let fresh = asked.ask("vm", SOON, ask).await;
        assert_eq!(fresh, said("later 1"), "who asks afterwards is not told what was said before");
        assert_eq!(asked.0.lock().unwrap()["vm"].strong_count(), 0, "nothing is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_others_and_leaves_is_replaced() {
        let asked = Asked::default();
        let mut first = Box::pin(asked.ask("vm", SOON, async |_| std::future::pending().await));
        assert_eq!((&mut first).now_or_never(), None);
        let mut second = Box::pin(asked.ask("vm", SOON, async |_| Ok("second".into())));
        assert_eq!((&mut second).now_or_never(), None, "it waits");
        drop(first);
        assert_eq!(second.await, said("second"));
    }

    #[tokio::test(start_paused = true)]
    async fn each_has_its_own_time() {
        let asked = Asked::default();
        let mut first = Box::pin(asked.ask("vm", SOON, async |left| {
            assert_eq!(left, SOON);
            tokio::time::sleep(Duration::from_secs(2)).await;
            Err(timed_out())
        }));
        assert_eq!((&mut first).now_or_never(), None);
        let hasty = asked.ask("vm", Duration::from_secs(1), async |_| panic!("asked"));
        let patient = asked.ask("vm", SOON, async |left| {
            assert_eq!(left, Duration::from_secs(3));
            Ok("in time".into())
        });
        let (first, (hasty, patient)) = join(first, join(hasty, patient)).await;
        assert_eq!(first, Some(Err(timed_out())));
        assert_eq!(hasty, None);
        assert_eq!(patient, said("in time"), "another's end is not its own");
    }
}
