//! Changes of a multipath map that is there: multipathd is asked, sysfs is believed.

use super::error::Error;
use super::multipath::{Map, by_uuid};
use super::scsi;
use super::settings::{Settings, ms};
use super::wait::{About, Wait};
use crate::host::multipathd::MultipathdError;
use crate::host::storage::StorageDoors;
use crate::types::Wwid;

/// Has multipathd make a map writable whose paths are: it made it when they were not. (When a path's
/// write protection changes it reloads the map by itself.)
pub(crate) async fn make_writable(
    doors: &StorageDoors,
    settings: &Settings,
    map: &Map,
) -> Result<(), Error> {
    let mut wait = Wait::about(&*doors.uevents, About::Blocks, ms(settings.map_ms));
    let mut asked = false;
    while scsi::is_protected(&*doors.sysfs, &map.dir()).await? {
        if !asked {
            asked = true;
            let reload = doors.multipathd.ask(&format!("reload map {}", map.name)).await;
            reload.map(drop).map_err(Error::Multipathd)?;
        } else if !wait.next().await {
            let device = format!("{} ({})", map.kernel, map.name);
            return Err(Error::ReadOnly { device, hint: ", although its paths are not" });
        }
    }
    Ok(())
}

/// Has multipathd grow a map to the size of its paths. sysfs is the truth: multipathd may carry it out
/// after it has answered, and may have done so by itself already (`auto_resize`). It waits for the I/O
/// under way, and so must not be asked for a map without paths.
pub(crate) async fn resize(
    doors: &StorageDoors,
    settings: &Settings,
    map: &Map,
    wwid: &Wwid,
    size: u64,
) -> Result<(), Error> {
    let mut wait = Wait::about(&*doors.uevents, About::Blocks, ms(settings.map_ms));
    let asked = doors.multipathd.ask(&format!("resize map {}", map.name)).await;
    // A refusal is final; only what has not answered yet may still do it.
    let late = match &asked {
        Ok(_) | Err(MultipathdError::TimedOut { .. }) => true,
        Err(MultipathdError::Refused { answer, .. }) => answer.starts_with("timeout"),
        Err(_) => false,
    };
    let now = loop {
        let now = by_uuid(doors, &map.uuid, Some(map.dev)).await?.map_or(0, |now| now.size);
        if now == size {
            return Ok(());
        }
        if !late || !wait.next().await {
            break now;
        }
    };
    let said = match asked {
        Ok(_) => "ok".to_owned(),
        Err(MultipathdError::Refused { answer, .. }) => answer,
        Err(error) => return Err(Error::Multipathd(error)),
    };
    let problem = format!(
        "({}) has {now} bytes and was not resized to {size}: multipathd said {:?}",
        map.name,
        said.trim()
    );
    Err(Error::Map { wwid: wwid.clone(), problem })
}
