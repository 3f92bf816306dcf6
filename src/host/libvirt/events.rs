//! A domain's events, handed from libvirt's event loop to whoever waits.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;

/// Changes of a domain's life (`virDomainEventType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// Defined, or its definition changed.
    Defined,
    /// Its definition was removed.
    Undefined,
    /// Started, also by migration or restore.
    Started,
    /// Held.
    Suspended,
    /// Goes on.
    Resumed,
    /// QEMU is gone.
    Stopped,
    /// The guest has shut down; QEMU is about to go.
    Shutdown,
    /// One that we do not know.
    Other,
}

/// Something that happened to a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainEvent {
    /// Its life changed.
    Lifecycle(Lifecycle),
    /// A device was added.
    DeviceAdded(String),
    /// A device is gone and everything of it torn down (libvirt sends this last; `qemu_hotplug.c`).
    DeviceRemoved(String),
    /// The guest refused to let a device go.
    DeviceRemovalFailed(String),
    /// The connection is gone: no further event will come.
    Disconnected,
    /// Events may have been missed, or none came for a while: look for yourself.
    Recheck,
}

/// What goes over the channel: the domain's name (`None`: all of the connection) and the event.
type Message = (Option<Arc<str>>, DomainEvent);

/// The sending end, one for each connection.
#[derive(Debug, Clone)]
pub struct EventSender(broadcast::Sender<Message>);

/// Events kept for a listener that is slow; who missed some looks for itself. Each connection has so many
/// places from the start, and a node a connection for each VM.
const BACKLOG: usize = 64;

impl Default for EventSender {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl EventSender {
    /// Tells all that listen to this domain.
    pub fn send(&self, domain: &str, event: DomainEvent) {
        // Nobody listening is fine.
        let _ = self.0.send((Some(domain.into()), event));
    }

    /// Tells everybody that the connection is gone.
    pub fn disconnected(&self) {
        let _ = self.0.send((None, DomainEvent::Disconnected));
    }

    /// Whether both send to the same listeners.
    pub fn same(&self, other: &Self) -> bool {
        self.0.same_channel(&other.0)
    }

    /// A subscription to one domain's events from now on.
    pub fn subscribe(&self, domain: &str) -> DomainEvents {
        DomainEvents { domain: domain.into(), messages: self.0.subscribe() }
    }
}

/// A subscription to one domain's events.
#[derive(Debug)]
pub struct DomainEvents {
    domain: Arc<str>,
    messages: broadcast::Receiver<Message>,
}

impl DomainEvents {
    /// How long without an event before a waiter is told to look for itself: events are what drives
    /// a wait, this is for one that got lost.
    const RECHECK: Duration = Duration::from_secs(2);

    /// The next event of this domain; [`DomainEvent::Recheck`] when none came for a while. Safe to
    /// cancel.
    pub async fn next(&mut self) -> DomainEvent {
        let event = tokio::time::timeout(Self::RECHECK, self.event()).await;
        event.unwrap_or(DomainEvent::Recheck)
    }

    /// The next event of this domain, however long it takes; [`DomainEvent::Recheck`] when some were
    /// missed. Safe to cancel.
    pub async fn event(&mut self) -> DomainEvent {
        loop {
            match self.messages.recv().await {
                Ok((Some(domain), event)) if domain == self.domain => return event,
                Ok((Some(_), _)) => {}
                Ok((None, event)) => return event,
                Err(broadcast::error::RecvError::Lagged(_)) => return DomainEvent::Recheck,
                Err(broadcast::error::RecvError::Closed) => return DomainEvent::Disconnected,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_subscriber_sees_its_own_domain_only() {
        let sender = EventSender::default();
        let mut events = sender.subscribe("a");
        sender.send("b", DomainEvent::DeviceAdded("x".into()));
        sender.send("a", DomainEvent::DeviceRemoved("y".into()));
        sender.disconnected();
        assert_eq!(events.next().await, DomainEvent::DeviceRemoved("y".into()));
        assert_eq!(events.next().await, DomainEvent::Disconnected);
        assert_eq!(events.next().await, DomainEvent::Recheck, "silence");
        drop(sender);
        assert_eq!(events.next().await, DomainEvent::Disconnected);
    }
}
