//! WatchVolumes: a list, then changes; a client that is too slow is told so and gets a new list.
//!
//! ```text
//! subscribe -> list -> [part, more]... -> [part] -> changes newer than the list -> ... -> stopping: error
//!                ^                                          |
//!                +----------- too slow (lagged) ------------+
//! ```
//! A node's list is megabytes, and after a burst or a restart many clients want theirs at once. So a list is shared,
//! and nothing of it is made for a client before the client takes it, part by part: the connection asks for the next
//! message when it has sent the one before.

use std::sync::Arc;

use futures_util::stream::{self, Stream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tonic::Status;

use super::convert;
use super::status::{self, About};
use super::v1::{self, watch_volumes_response::Event};
use crate::reason::Reason;
use crate::spec::VolumeStatus;
use crate::types::VmId;
use crate::vm::facade::{Refusal, Volumes};

/// Volumes in one message of a list: some 13 KiB, far from what gRPC's clients take unasked (4 MiB). A message that was
/// made is in memory twice until its client has it, for each of the clients.
const PART: usize = 64;

type Item = Result<v1::WatchVolumesResponse, Status>;

/// One client's stream. It ends with the client, or when `stopping` turns true.
pub(super) fn stream(
    volumes: Arc<dyn Volumes>,
    vm: Option<VmId>,
    mut stopping: watch::Receiver<bool>,
) -> impl Stream<Item = Item> + Send {
    let feed = Feed { changes: volumes.watch(), volumes, vm, list: None, known: 0 };
    let stopped = async move {
        // An error means that the server is gone: the same.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let state = Some((feed, Box::pin(stopped)));
    stream::unfold(state, |state| async {
        let (mut feed, mut stopped) = state?;
        tokio::select! {
            biased;
            () = &mut stopped => {
                let refusal = Refusal::new(Reason::ShuttingDown, "lunplugd is stopping");
                Some((Err(status::status(&refusal, &About::default())), None))
            }
            event = feed.next() => {
                let message = v1::WatchVolumesResponse { event: Some(event?) };
                Some((Ok(message), Some((feed, stopped))))
            }
        }
    })
}

/// What one client is sent.
struct Feed {
    volumes: Arc<dyn Volumes>,
    vm: Option<VmId>,
    changes: broadcast::Receiver<Arc<VolumeStatus>>,
    /// The list that is being sent; `None` before the first.
    list: Option<List>,
    /// The newest generation of the last list. One counter is for all volumes, and a change is in the list before
    /// it is sent: what is not newer, the list had.
    known: u64,
}

struct List {
    volumes: Vec<Arc<VolumeStatus>>,
    sent: usize,
    events_lost: bool,
    over: bool,
}

impl Feed {
    /// The next message; `None` when nothing will come any more.
    async fn next(&mut self) -> Option<Event> {
        if self.list.is_none() {
            self.list_anew(false).await;
        }
        loop {
            if let Some(part) = self.list.as_mut().and_then(List::part) {
                return Some(Event::Snapshot(part));
            }
            match self.changes.recv().await {
                Ok(volume) if self.is_news(&volume) => {
                    return Some(Event::Changed(convert::wire_volume(&volume)));
                }
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => self.list_anew(true).await,
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn is_news(&self, volume: &VolumeStatus) -> bool {
        let wanted = self.vm.as_ref().is_none_or(|vm| volume.key.vm == *vm);
        wanted && volume.generation > self.known
    }

    async fn list_anew(&mut self, events_lost: bool) {
        let volumes = self.volumes.list_volumes(self.vm.as_ref()).await;
        let newest = volumes.iter().map(|volume| volume.generation).max();
        self.known = newest.unwrap_or_default().max(self.known);
        self.list = Some(List { volumes, sent: 0, events_lost, over: false });
    }
}

impl List {
    /// The next message of it, of which an empty list has one too.
    fn part(&mut self) -> Option<v1::VolumeSnapshot> {
        if self.over {
            return None;
        }
        let rest = &self.volumes[self.sent..];
        let part = &rest[..rest.len().min(PART)];
        let snapshot = v1::VolumeSnapshot {
            volumes: part.iter().map(|volume| convert::wire_volume(volume)).collect(),
            events_lost: self.events_lost && self.sent == 0,
            more: part.len() < rest.len(),
        };
        self.sent += part.len();
        if !snapshot.more {
            (self.over, self.volumes) = (true, Vec::new());
        }
        Some(snapshot)
    }
}
