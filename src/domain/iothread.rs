//! An I/O thread of a disk's own (`<driver iothread='N'/>`): which id it has, and how it goes.
//!
//! libvirt knows I/O threads by a number alone: nothing else tells whose one is. Ours have numbers of a
//! range that nobody counts up to (libvirt and KubeVirt count from 1), and where in it follows from the
//! disk's alias. So one whose disk never came, or whose record went with a power cut, is found again by
//! the next attach or removal of that disk; and whatever a device of somebody else's uses is neither
//! taken nor removed.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::apply::{At, Error};
use super::diff::{Needs, Views};
use super::xml::Domain;
use crate::host::libvirt::{Affect, Connection, Definition, DomainState, IoThread, LibvirtError};
use crate::types::VolumeName;

/// The ids of our threads. All of them are positive as an `int`, which libvirt makes of them for the
/// names of cgroups (`virCgroupNewThread`).
pub const OURS: RangeInclusive<u32> = 1_000_000_000..=1_999_999_999;

/// How many ids there are in [`OURS`].
const ROOM: u32 = 1_000_000_000;

/// That a disk is to have an I/O thread of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnThread {
    /// The id that was written down for it.
    pub recorded: Option<u32>,
}

/// The I/O thread of a disk that is about to be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thread {
    /// Its id.
    pub id: u32,
    /// Where it has to be added first.
    pub needs: Needs,
}

/// The id of the disk's thread: that which the disk has, else that which was recorded, else one that is
/// free. Pure; the same for the same domain.
pub fn choose(views: &Views, volume: &VolumeName, recorded: Option<u32>) -> u32 {
    let alias = super::alias(volume);
    if let Some(id) = views.all().find_map(|view| view.disk(&alias)?.io_thread) {
        return id;
    }
    let first = preferred(&alias);
    let exists = |id: u32| views.all().any(|view| view.io_threads.ids.contains(&id));
    let used = |id: u32| views.all().any(|view| view.io_threads.users.contains_key(&id));
    // One of these that is there and that nothing uses was left by an attach that came no further.
    let own = recorded.into_iter().chain([first]).find(|id| !used(*id));
    own.unwrap_or_else(|| {
        let after = (1..ROOM).map(|n| OURS.start() + (first - OURS.start() + n) % ROOM);
        after.into_iter().find(|id| !used(*id) && !exists(*id)).unwrap_or(first)
    })
}

/// Where in the range a disk begins to look: FNV-1a of its alias, which never changes.
fn preferred(alias: &str) -> u32 {
    let hash = alias
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    OURS.start() + hash % ROOM
}

/// The thread for a disk that is missing where `needs` says. One that is not ours is not made.
pub(super) fn plan(views: &Views, volume: &VolumeName, own: OwnThread, needs: Needs) -> Thread {
    let id = choose(views, volume, own.recorded);
    let lacks = |view: &Option<Arc<Domain>>| {
        OURS.contains(&id) && view.as_ref().is_some_and(|v| !v.io_threads.ids.contains(&id))
    };
    let needs = Needs {
        live: needs.live && lacks(&views.live),
        config: needs.config && lacks(&views.config),
    };
    Thread { id, needs }
}

/// The id that a disk's own thread has or will have, to be recorded before it is made; `None` where it is
/// not ours to make or to remove. `persist` as for [`super::attach`].
pub async fn to_record(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    recorded: Option<u32>,
    persist: bool,
    deadline: Duration,
) -> Result<Option<u32>, Error> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let id = choose(&at.views(persist).await?, volume, recorded);
    Ok(Some(id).filter(|id| OURS.contains(id)))
}

/// The same of a disk that is about to go and of which nothing is recorded, as after a reboot: by its
/// XML, or where that says nothing by its name.
pub async fn found(
    connection: &dyn Connection,
    domain: &str,
    volume: &VolumeName,
    deadline: Duration,
) -> Option<u32> {
    let at = At { connection, domain, until: Instant::now() + deadline };
    let read = async {
        let info = at.info().await.ok()??;
        let runs = info.state != DomainState::Shutoff;
        let live = if runs { at.read(Definition::Live).await.ok() } else { None };
        let config = if info.persistent { at.read(Definition::Config).await.ok() } else { None };
        Some(Views { live, config })
    };
    let views = read.await.unwrap_or(Views { live: None, config: None });
    Some(choose(&views, volume, None)).filter(|id| OURS.contains(id))
}

/// Adds the thread where it is missing.
pub(super) async fn add(at: &At<'_>, alias: &str, thread: &Thread) -> Result<(), Error> {
    for (needed, affect) in
        [(thread.needs.live, Affect::LIVE), (thread.needs.config, Affect::CONFIG)]
    {
        if needed {
            let (how, left) = (IoThread::Add, at.left());
            let added =
                at.connection.change_io_thread(at.domain, alias, thread.id, how, affect, left);
            added.await.map_err(at.failed("addition of an I/O thread", alias))?;
        }
    }
    Ok(())
}

/// Removes a thread of ours whose disk has gone, from the running domain (`live`) and from its definition
/// (`config`), or finds it gone. One that a device of somebody else's has come to use stays with that.
pub(super) async fn remove(at: &At<'_>, alias: &str, id: u32, from: Needs) -> Result<(), Error> {
    if !OURS.contains(&id) {
        return Ok(());
    }
    for (wanted, affect) in [(from.live, Affect::LIVE), (from.config, Affect::CONFIG)] {
        if !wanted {
            continue;
        }
        let (how, left) = (IoThread::Remove, at.left());
        match at.connection.change_io_thread(at.domain, alias, id, how, affect, left).await {
            Ok(())
            | Err(
                LibvirtError::DeviceMissing { .. }
                | LibvirtError::NoDomain { .. }
                | LibvirtError::NotRunning { .. },
            ) => {}
            Err(LibvirtError::IoThreadUsed { message }) => {
                tracing::warn!(alias, id, message, "its I/O thread is used by another: it stays");
            }
            Err(source) => return Err(at.failed("removal of the I/O thread", alias)(source)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::xml;

    fn views(devices: &str, threads: &str) -> Views {
        let text = format!(
            "<domain><name>vm</name>{threads}<os><type machine='q35'>hvm</type></os><devices>{devices}</devices></domain>"
        );
        Views { live: Some(Arc::new(xml::parse(&text).unwrap())), config: None }
    }

    fn disk(alias: &str, id: u32) -> String {
        format!(
            "<disk type='block' device='disk'><driver name='qemu' iothread='{id}'/><source dev='/x'/>\
             <target dev='vda' bus='virtio'/><alias name='{alias}'/>\
             <address type='pci' bus='1' slot='0'/></disk>"
        )
    }

    fn ids(ids: &[u32]) -> String {
        let all: String = ids.iter().map(|id| format!("<iothread id='{id}'/>")).collect();
        format!("<iothreads>{}</iothreads><iothreadids>{all}</iothreadids>", ids.len())
    }

    #[test]
    fn an_id_is_that_of_the_disk_or_the_recorded_one_or_a_free_one() {
        let volume: VolumeName = "data".parse().unwrap();
        let own = preferred("ua-lunplug-data");
        assert!(OURS.contains(&own));
        let controller = |id: u32| {
            format!(
                "<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='{id}'/></controller>"
            )
        };
        let next = own + 1;
        for (devices, threads, recorded, chosen, why) in [
            (String::new(), String::new(), None, own, "nothing is there"),
            (String::new(), ids(&[own]), None, own, "it was left behind"),
            (String::new(), ids(&[7]), Some(7), 7, "what was recorded"),
            (disk("ua-lunplug-data", 3), ids(&[3]), Some(own), 3, "the disk has one"),
            (disk("other", own), ids(&[own]), None, next, "another disk has it"),
            (controller(own), ids(&[own, next]), None, next + 1, "a controller has it"),
            (disk("other", own), ids(&[own]), Some(own), next, "another disk has come to it"),
        ] {
            let views = views(&devices, &threads);
            assert_eq!(choose(&views, &volume, recorded), chosen, "{why}");
        }
    }

    #[test]
    fn a_thread_is_added_only_where_it_is_missing_and_ours() {
        let volume: VolumeName = "data".parse().unwrap();
        let needs = Needs { live: true, config: false };
        let own = OwnThread::default();
        let id = preferred("ua-lunplug-data");
        assert_eq!(plan(&views("", ""), &volume, own, needs), Thread { id, needs });
        let there = plan(&views("", &ids(&[id])), &volume, own, needs);
        assert!(!there.needs.any(), "{there:?}");
        let theirs = views(&disk("ua-lunplug-data", 3), "<iothreads>3</iothreads>");
        assert!(!plan(&theirs, &volume, own, needs).needs.any());
    }
}
