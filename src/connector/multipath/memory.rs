//! What multipath remembers of a LUN once it has gone: its lines in `wwids` and `bindings`.

use std::collections::BTreeSet;

use super::{by_uuid, remove};
use crate::connector::error::Error;
use crate::connector::scsi::Opens;
use crate::connector::settings::Settings;
use crate::host::multipathd::{Multipathd, MultipathdError};
use crate::host::storage::StorageDoors;
use crate::types::{Outcome, Wwid};

/// Waits until multipathd is done with the event that it is working on: it may be one of a path that
/// has gone meanwhile, at whose end it writes `wwids` and `bindings`. The answer needs the lock that
/// it works under; later events of such a path find no device. That it fails is not worse than not
/// trying.
pub(crate) async fn drain(multipathd: &dyn Multipathd) {
    match multipathd.ask(NO_PATH).await {
        // Its answer, which it gave under the lock.
        Err(MultipathdError::Refused { answer, .. }) if !answer.starts_with("timeout") => {}
        Ok(_) => {}
        Err(e) => tracing::debug!(error = %e, "multipathd was not waited for"),
    }
}

/// A question whose answer needs the lock (multipathd/callbacks.c, `set_handler_callback`) and no look at the paths of the
/// node, which may be thousands. There is no such path: the answer is `fail`.
const NO_PATH: &str = "show path none";

/// How often multipath is told again to forget a LUN that it has written down anew.
const FORGETS: usize = 4;

/// The LUN of a map, if it is one that could be attached.
fn wwid_of(uuid: &str) -> Option<Wwid> {
    uuid.strip_prefix("mpath-")?.parse().ok()
}

/// Has multipath forget the LUN of a map that was ours, in its own spelling.
///
/// multipathd writes `bindings` from what it has in memory, without a look at the file. Where it did so for another
/// map just then, before it had noticed that ours is gone from the file, ours is back. It notices before it
/// answers (its `uxlsnr` thread does both): so it is asked, and what came back meanwhile is removed once more.
pub(crate) async fn forget(multipathd: &dyn Multipathd, uuid: &str) -> Result<(), Error> {
    let Some(wwid) = wwid_of(uuid) else { return Ok(()) };
    for _ in 0..FORGETS {
        let forgotten = multipathd.forget(&wwid).await.map_err(Error::Multipathd)?;
        if matches!(forgotten, Outcome::Already(())) {
            break;
        }
        drain(multipathd).await;
    }
    Ok(())
}

/// Has multipath forget the LUNs of maps of ours that have gone, while their paths go: what then is left to
/// [`forget_deleted`], which also tells what does not work.
pub(crate) async fn forget_ahead(multipathd: &dyn Multipathd, uuids: &BTreeSet<String>) {
    for wwid in uuids.iter().filter_map(|uuid| wwid_of(uuid)) {
        if let Err(error) = multipathd.forget(&wwid).await {
            tracing::debug!(%wwid, %error, "multipath has not forgotten it yet");
        }
    }
}

/// The same once its paths are deleted. A map that multipathd made of them in their last moment goes, too;
/// one that has other paths is that of others, who have the LUN as well.
pub(crate) async fn forget_deleted(
    doors: &StorageDoors,
    settings: &Settings,
    uuid: &str,
) -> Result<(), Error> {
    if let Some(map) = by_uuid(doors, uuid, None).await? {
        for slave in &map.slaves {
            // A deleted disk stays listed for as long as the map is there.
            let there = doors.sysfs.text(&format!("block/{slave}/dev")).await;
            if there.map_err(Error::io(format!("reading block/{slave}")))?.is_some() {
                return Ok(());
            }
        }
        remove(doors, settings, uuid, Some(map.dev), Opens::Unknown).await?;
    }
    forget(&*doors.multipathd, uuid).await
}

/// The same, for a LUN that has no map now.
pub(crate) async fn forget_unused(doors: &StorageDoors, wwid: &Wwid) -> Result<(), Error> {
    let uuid = format!("mpath-{}", wwid.multipath());
    match by_uuid(doors, &uuid, None).await? {
        Some(_) => Ok(()),
        None => forget(&*doors.multipathd, &uuid).await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;

    use super::*;

    /// A multipathd that writes its file from memory some more times before it notices that it was changed.
    #[derive(Default)]
    struct Writing {
        listed: Mutex<bool>,
        late: Mutex<usize>,
        commands: Mutex<Vec<String>>,
    }

    impl Writing {
        fn with(late: usize) -> Self {
            Self { listed: Mutex::new(true), late: Mutex::new(late), ..Self::default() }
        }
    }

    #[async_trait]
    impl Multipathd for Writing {
        async fn ask(&self, command: &str) -> Result<String, MultipathdError> {
            self.commands.lock().unwrap().push(command.to_owned());
            let mut late = self.late.lock().unwrap();
            if *late > 0 && command == NO_PATH {
                *late -= 1;
                *self.listed.lock().unwrap() = true;
            }
            Ok("ok".into())
        }

        async fn forget(&self, _: &Wwid) -> Result<Outcome, MultipathdError> {
            let was = std::mem::take(&mut *self.listed.lock().unwrap());
            Ok(if was { Outcome::Done(()) } else { Outcome::Already(()) })
        }
    }

    const UUID: &str = "mpath-360014050000000000000000000000001";

    #[tokio::test]
    async fn what_multipathd_writes_down_anew_is_forgotten_once_more() {
        for late in [0, 1, 2] {
            let multipathd = Writing::with(late);
            forget(&multipathd, UUID).await.unwrap();
            assert!(!*multipathd.listed.lock().unwrap(), "{late}");
        }
        let unknown = Writing::default();
        forget(&unknown, UUID).await.unwrap();
        assert!(unknown.commands.lock().unwrap().is_empty(), "nothing to wait for");
    }

    #[tokio::test]
    async fn a_multipathd_that_never_stops_is_not_told_for_ever() {
        let multipathd = Writing::with(usize::MAX);
        forget(&multipathd, UUID).await.unwrap();
        assert_eq!(multipathd.commands.lock().unwrap().len(), FORGETS);
    }
}
