//! WatchVolumes: a list, then changes; a client that is too slow is told so and gets a new list.
//!
//! ```text
//! subscribe -> list -> [snapshot] -> changes newer than the list -> ... -> stopping: error
//!                 ^                          |
//!                 +---- too slow (lagged) ---+
//! ```
//! A node's list is megabytes, and after a burst or a restart many clients want theirs at once: they are
//! made in turn, each when the ones before have been taken, or their clients had [`TURN`] for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, broadcast, mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert;
use super::status::{self, About};
use super::v1::{self, watch_volumes_response::Event};
use crate::reason::Reason;
use crate::spec::{Phase, VolumeStatus};
use crate::types::{VmId, VolumeKey};
use crate::vm::facade::{Refusal, Volumes};

/// Messages under way to one client. What is more stays in the broadcast's own buffer, and is lost,
/// and said to be, when that overflows.
const IN_FLIGHT: usize = 16;

/// How long a client may keep the others from their lists by not taking its own.
const TURN: Duration = Duration::from_secs(1);

/// Whose turn it is to have a list made. Clones share it.
#[derive(Clone)]
pub(super) struct Turns(Arc<Semaphore>);

impl Default for Turns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(2)))
    }
}

type Item = Result<v1::WatchVolumesResponse, Status>;

/// One client's stream. Its task ends with the client, or when `stopping` turns true.
pub(super) fn stream(
    volumes: Arc<dyn Volumes>,
    vm: Option<VmId>,
    turns: Turns,
    mut stopping: watch::Receiver<bool>,
) -> impl Stream<Item = Item> + Send {
    let (client, receiver) = mpsc::channel(IN_FLIGHT);
    tokio::spawn(async move {
        let stopped = async {
            // An error means that the server is gone: the same.
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        tokio::select! {
            () = feed(&*volumes, vm, &turns, &client) => {}
            () = stopped => {
                let refusal = Refusal::new(Reason::ShuttingDown, "lunplugd is stopping");
                // A client whose buffer is full learns it from the connection's end.
                let _ = client.try_send(Err(status::status(&refusal, &About::default())));
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Sends until the client is gone.
async fn feed(volumes: &dyn Volumes, vm: Option<VmId>, turns: &Turns, client: &mpsc::Sender<Item>) {
    let mut changes = volumes.watch();
    let mut seen = Seen::default();
    let mut events_lost = false;
    loop {
        // It is never closed.
        let turn = turns.0.acquire().await;
        let list = volumes.list_volumes(vm.as_ref()).await;
        seen.replace(&list);
        let volumes = list.iter().map(convert::wire_volume).collect();
        drop(list);
        let snapshot = Event::Snapshot(v1::VolumeSnapshot { volumes, events_lost });
        if send(client, snapshot).await.is_err() {
            return;
        }
        // An error means that the client is gone, which is seen next.
        let _ = tokio::time::timeout(TURN, client.reserve_many(client.max_capacity())).await;
        drop(turn);
        if follow(&mut changes, vm.as_ref(), &mut seen, client).await.is_err() {
            return;
        }
        events_lost = true;
    }
}

/// The client went away, or the source did.
struct Over;

/// Sends changes until some were lost.
async fn follow(
    changes: &mut broadcast::Receiver<Arc<VolumeStatus>>,
    vm: Option<&VmId>,
    seen: &mut Seen,
    client: &mpsc::Sender<Item>,
) -> Result<(), Over> {
    loop {
        let change = tokio::select! {
            change = changes.recv() => change,
            () = client.closed() => return Err(Over),
        };
        match change {
            Ok(volume) => {
                let wanted = vm.is_none_or(|vm| volume.key.vm == *vm);
                if wanted && seen.is_news(&volume) {
                    send(client, Event::Changed(convert::wire_volume(&volume))).await?;
                }
            }
            Err(RecvError::Lagged(_)) => return Ok(()),
            Err(RecvError::Closed) => return Err(Over),
        }
    }
}

async fn send(client: &mpsc::Sender<Item>, event: Event) -> Result<(), Over> {
    let message = v1::WatchVolumesResponse { event: Some(event) };
    client.send(Ok(message)).await.map_err(|_| Over)
}

/// The generations that the client has been sent.
#[derive(Default)]
struct Seen(HashMap<VolumeKey, u64>);

impl Seen {
    fn replace(&mut self, list: &[VolumeStatus]) {
        self.0 = list.iter().map(|v| (v.key.clone(), v.generation)).collect();
    }

    /// Whether the client does not know it yet; notes that it will.
    fn is_news(&mut self, volume: &VolumeStatus) -> bool {
        if self.0.get(&volume.key).is_some_and(|&known| volume.generation <= known) {
            return false;
        }
        if volume.phase == Phase::Gone {
            self.0.remove(&volume.key);
        } else {
            self.0.insert(volume.key.clone(), volume.generation);
        }
        true
    }
}
