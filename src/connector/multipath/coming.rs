//! How a map comes about: multipathd makes it by itself when udev tells it of paths. That is waited for, multipathd is
//! told of them where it does not, and the map is proven.

use tokio::time::Instant;

use super::{Above, Map, above};
use crate::connector::error::Error;
use crate::connector::identity::Identity;
use crate::connector::scsi::{self, Hctl, ScsiPath};
use crate::connector::settings::{Settings, ms};
use crate::connector::wait::{About, Wait};
use crate::host::multipathd::{Multipathd, MultipathdError};
use crate::host::storage::StorageDoors;
use crate::host::sysfs::Sysfs;

/// multipathd's time for what it does by itself when udev tells it of paths.
struct OwnTime {
    wait: Wait,
    begun: Instant,
}

/// In all it is waited for multipathd for so many times what it may be silent for.
const SILENCES: u32 = 4;

impl OwnTime {
    fn begin(doors: &StorageDoors, settings: &Settings) -> Self {
        let quiet = ms(settings.map_ms);
        let wait = Wait::while_told(&*doors.uevents, About::Blocks, quiet, SILENCES * quiet);
        Self { wait, begun: Instant::now() }
    }

    /// When it is to be told of paths all the same. While udev's rules or itself are busy, also with the disks of
    /// others, the command would take that work's time: it has the same to do once more, and nobody else has it do
    /// anything meanwhile.
    fn ends(&self, doors: &StorageDoors, settings: &Settings, paths: &[ScsiPath]) -> Instant {
        let last = self.begun + ms(settings.map_ms);
        if paths.iter().all(|path| doors.uevents.is_ruled(path.disk.dev)) {
            last.min(self.wait.quiet_since() + ms(settings.map_nudge_ms))
        } else {
            last
        }
    }
}

/// Waits for the map above all of `paths` and proves it.
pub(crate) async fn ensure(
    doors: &StorageDoors,
    settings: &Settings,
    paths: &[ScsiPath],
) -> Result<Map, Error> {
    let mut time = OwnTime::begin(doors, settings);
    let mut nudged = false;
    loop {
        let found = above(&*doors.sysfs, paths).await?;
        if let Above::Whole(map) = found {
            prove(&*doors.sysfs, &map, paths).await?;
            return Ok(map);
        }
        let nudge_at = time.ends(doors, settings, paths);
        if !nudged && Instant::now() >= nudge_at {
            nudged = true;
            nudge(&*doors.multipathd, paths).await?;
            if found == Above::Nothing {
                insist(&*doors.multipathd, &paths[0].identity).await?;
            }
            time.wait.restart(ms(settings.map_ms));
            continue;
        }
        let wait = &mut time.wait;
        let more = if nudged { wait.next().await } else { wait.next_before(nudge_at).await };
        if !more {
            let problem = match found {
                Above::Partial(map) if paths.iter().all(|p| map.slaves.contains(&p.disk.name)) => {
                    let size = paths[0].disk.size;
                    format!(
                        "({}) has {} bytes and its paths {size}: expand the volume that has it",
                        map.name, map.size
                    )
                }
                Above::Partial(map) => format!(
                    "({}) has not all {} paths in it after {:.0?}",
                    map.name,
                    paths.len(),
                    time.begun.elapsed()
                ),
                _ => format!("was not made within {:.0?}", time.begun.elapsed()),
            };
            return Err(Error::Map { wwid: paths[0].identity.wwid.clone(), problem });
        }
    }
}

/// Whether multipathd takes a path that came after the others into a map, in its own time.
pub(crate) async fn joins(
    doors: &StorageDoors,
    settings: &Settings,
    path: &ScsiPath,
) -> Result<bool, Error> {
    let mut time = OwnTime::begin(doors, settings);
    let paths = std::slice::from_ref(path);
    while above(&*doors.sysfs, paths).await? == Above::Nothing {
        let ends = time.ends(doors, settings, paths);
        if Instant::now() >= ends {
            return Ok(false);
        }
        time.wait.next_before(ends).await;
    }
    Ok(true)
}

/// Tells multipathd of each path; says whether it took all of them. What it answers is a hint
/// (`blacklisted` comes as success).
pub(crate) async fn nudge(multipathd: &dyn Multipathd, paths: &[ScsiPath]) -> Result<bool, Error> {
    let mut taken = true;
    for path in paths {
        match multipathd.ask(&format!("add path {}", path.disk.name)).await {
            Ok(_) => {}
            Err(MultipathdError::Refused { command, answer }) => {
                tracing::debug!(%command, %answer, "multipathd did not take the path");
                taken = false;
            }
            Err(e) => return Err(Error::Multipathd(e)),
        }
    }
    Ok(taken)
}

/// Asks multipathd for the map of a WWID: that it makes whatever `find_multipaths` has it make by itself
/// (libmultipath/configure.c, coalesce_paths). Which of a LUN's designators it goes by is its affair.
async fn insist(multipathd: &dyn Multipathd, identity: &Identity) -> Result<(), Error> {
    for wwid in &identity.all {
        match multipathd.ask(&format!("add map {}", wwid.multipath())).await {
            Ok(_) => break,
            Err(MultipathdError::Refused { command, answer }) => {
                tracing::debug!(%command, %answer, "multipathd made no map");
            }
            Err(e) => return Err(Error::Multipathd(e)),
        }
    }
    Ok(())
}

/// Has multipathd decide now whether it makes a map of a single path, rather than a moment after
/// the path was given away. Before udev has read the path's identity it refuses it, and makes the map when
/// it has: so it is told again until it takes it.
pub(crate) async fn decide(
    doors: &StorageDoors,
    settings: &Settings,
    paths: &[ScsiPath],
) -> Result<(), Error> {
    let mut wait = Wait::for_udev(&*doors.uevents, ms(settings.map_ms));
    let is_ruled = |path: &ScsiPath| doors.uevents.is_ruled(path.disk.dev);
    // As long as udev may take: a multipathd that is told of a path before takes it, and makes its map only when udev is
    // done, when somebody may have been given the path. What it refuses takes it from the rules' own questions.
    while !paths.iter().all(is_ruled) && wait.next().await {}
    wait.restart(ms(settings.map_ms));
    while !nudge(&*doors.multipathd, paths).await? {
        // Where udev is not heard it is asked again in a while.
        let again = Instant::now() + ms(settings.map_nudge_ms);
        if above(&*doors.sysfs, paths).await? != Above::Nothing || !wait.next_before(again).await {
            break;
        }
    }
    Ok(())
}

/// Every slave must be one of the verified paths, or prove to be the same LUN: it may be another
/// session's path to it.
async fn prove(sysfs: &dyn Sysfs, map: &Map, paths: &[ScsiPath]) -> Result<(), Error> {
    let identity = &paths[0].identity;
    for slave in &map.slaves {
        if paths.iter().any(|p| p.disk.name == *slave) {
            continue;
        }
        let foreign = |problem: &str| Error::Map {
            wwid: identity.wwid.clone(),
            problem: format!("({}) has {slave} in it, which {problem}", map.name),
        };
        let device = format!("block/{slave}/device");
        let Ok(dir) = sysfs.resolve(&device).await else {
            return Err(foreign("cannot be identified"));
        };
        let Ok(hctl) = dir.rsplit('/').next().unwrap_or("").parse::<Hctl>() else {
            return Err(foreign("is no SCSI disk"));
        };
        scsi::rescan(sysfs, &dir).await?;
        match scsi::identity(sysfs, hctl, &dir).await?.1 {
            Ok(other) if other.wwid == identity.wwid && other.unit.agrees(&identity.unit) => {}
            Ok(other) => return Err(foreign(&format!("is {}, {}", other.wwid, other.unit))),
            Err(e) => return Err(foreign(&e.to_string())),
        }
    }
    Ok(())
}
