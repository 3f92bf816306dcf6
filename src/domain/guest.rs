//! Whether the guest uses a disk, by what its agent says.
//!
//! The agent is asked for its mounted filesystems (`guest-get-fsinfo`) and its block devices
//! (`guest-get-disks`); shapes are those of QEMU's qga/qapi-schema.json. On Linux a disk's serial
//! there is udev's ID_SERIAL.
//!
//! What the agent cannot see: swap, and programs that have the raw device open. [`Usage::Free`]
//! means that nothing is mounted from the disk and no device (LVM, md, dm-crypt, bcache) is built
//! on it or its partitions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use crate::host::libvirt::{Connection, LibvirtError};
use crate::types::{Bus, Serial, Wwid};

/// Whether the guest uses a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Usage {
    /// It does, for these reasons, each in words.
    InUse(Vec<String>),
    /// The agent knows the disk and nothing uses it.
    Free,
    /// Nobody could say, and why.
    Unproven(String),
}

/// By what the guest's agent knows a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InGuest {
    /// An emulated disk, by its serial.
    Disk(Serial, Bus),
    /// A LUN that is passed through, by its identity: the guest's udev reads it from the LUN's own VPD
    /// page 0x83, in the spelling that the host's multipath has too (scsi_id).
    Lun(Wwid),
}

impl InGuest {
    /// Whether a serial that the agent reports is this disk's: exactly, never as a part of another.
    ///
    /// On scsi udev's scsi_id puts designator type, vendor and model of the INQUIRY before it, and
    /// QEMU's are `QEMU` and `QEMU HARDDISK`; an agent without udev may say the serial alone.
    fn is(&self, reported: &str) -> bool {
        match self {
            Self::Disk(serial, bus) => {
                reported == serial.as_str()
                    || (*bus == Bus::Scsi
                        && reported.strip_prefix("0QEMU_QEMU_HARDDISK_") == Some(serial.as_str()))
            }
            Self::Lun(wwid) => reported == wwid.multipath(),
        }
    }
}

impl fmt::Display for InGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(serial, _) => write!(f, "serial {serial}"),
            Self::Lun(wwid) => write!(f, "identity {}", wwid.multipath()),
        }
    }
}

/// How often a guest is asked again that cannot say yet: its udev may still be at work on a disk that
/// was just plugged in, and its agent starts, or starts again. Only the latter has an event, and not in
/// all versions of libvirt.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq)]
enum Unsaid {
    /// There may be one a moment later.
    Yet(String),
    /// It would be the same again.
    Ever(String),
}

/// Asks the guest's agent about this disk, until it can say or the time is over.
/// Never fails: what went wrong is the reason of [`Usage::Unproven`].
pub async fn usage(
    connection: &dyn Connection,
    domain: &str,
    wanted: &InGuest,
    deadline: Duration,
) -> Usage {
    let until = Instant::now() + deadline;
    loop {
        let said = ask_both(connection, domain, wanted, until).await;
        let next = Instant::now() + ASK_AGAIN;
        match said {
            Err(Unsaid::Yet(_)) if next < until => tokio::time::sleep_until(next).await,
            Err(Unsaid::Yet(why) | Unsaid::Ever(why)) => return Usage::Unproven(why),
            Ok(usage) => return usage,
        }
    }
}

async fn ask_both(
    connection: &dyn Connection,
    domain: &str,
    wanted: &InGuest,
    until: Instant,
) -> Result<Usage, Unsaid> {
    let filesystems = ask(connection, domain, "guest-get-fsinfo", until).await?;
    let by_mount = mounted(&filesystems, wanted);
    if !by_mount.is_empty() {
        return Ok(Usage::InUse(by_mount));
    }
    let disks = ask(connection, domain, "guest-get-disks", until).await?;
    judge(&filesystems, &disks, wanted)
}

async fn ask<T: DeserializeOwned>(
    connection: &dyn Connection,
    domain: &str,
    command: &'static str,
    until: Instant,
) -> Result<Vec<T>, Unsaid> {
    let left = until.saturating_duration_since(Instant::now());
    let request = format!(r#"{{"execute":"{command}"}}"#);
    let answer = connection.agent_command(domain, &request, left).await.map_err(|e| match e {
        LibvirtError::AgentUnresponsive { .. } => Unsaid::Yet(format!("{command}: {e}")),
        other => Unsaid::Ever(format!("{command}: {other}")),
    })?;
    parse_answer(command, &answer).map_err(Unsaid::Ever)
}

/// Reads the answer to a command: `{"return": [...]}`, or the agent's error.
fn parse_answer<T: DeserializeOwned>(command: &str, answer: &str) -> Result<Vec<T>, String> {
    let answer: Answer<T> = serde_json::from_str(answer)
        .map_err(|e| format!("{command}: the agent's answer cannot be read: {e}"))?;
    match answer {
        Answer { list: Some(list), .. } => Ok(list),
        Answer { error: Some(error), .. } => Err(format!("{command}: {}", error.desc)),
        Answer { .. } => Err(format!("{command}: the agent's answer has no result")),
    }
}

#[derive(Deserialize)]
struct Answer<T> {
    #[serde(rename = "return", default = "Option::default")]
    list: Option<Vec<T>>,
    error: Option<AgentError>,
}

#[derive(Deserialize)]
struct AgentError {
    #[serde(default)]
    desc: String,
}

/// `GuestFilesystemInfo`.
#[derive(Debug, Clone, Deserialize)]
struct Filesystem {
    /// The device's name, e.g. `sda1` or `dm-0`.
    name: String,
    mountpoint: String,
    /// The real devices that it lies on.
    #[serde(default)]
    disk: Vec<Address>,
}

/// `GuestDiskAddress`.
#[derive(Debug, Clone, Deserialize)]
struct Address {
    serial: Option<String>,
    dev: Option<String>,
}

/// `GuestDiskInfo`.
#[derive(Debug, Clone, Deserialize)]
struct DiskInfo {
    /// Its node, e.g. `/dev/sda1`.
    name: String,
    #[serde(default)]
    partition: bool,
    /// The nodes that it is made of.
    #[serde(default)]
    dependencies: Vec<String>,
    address: Option<Address>,
    /// device-mapper's name.
    alias: Option<String>,
}

/// Why the disk is in use, by its mounted filesystems.
fn mounted(filesystems: &[Filesystem], wanted: &InGuest) -> Vec<String> {
    let mut reasons = Vec::new();
    for fs in filesystems {
        let on = fs.disk.iter().find(|d| d.serial.as_deref().is_some_and(|s| wanted.is(s)));
        if let Some(on) = on {
            let name = if fs.name.starts_with('/') {
                fs.name.clone()
            } else {
                format!("/dev/{}", fs.name)
            };
            let through = match &on.dev {
                Some(dev) if *dev != name => format!(" (on {dev})"),
                _ => String::new(),
            };
            reasons.push(format!("{name}{through} is mounted at {}", fs.mountpoint));
        }
    }
    reasons
}

/// Puts both answers together.
fn judge(
    filesystems: &[Filesystem],
    disks: &[DiskInfo],
    wanted: &InGuest,
) -> Result<Usage, Unsaid> {
    let mut reasons = mounted(filesystems, wanted);
    let ours: BTreeSet<&str> = disks
        .iter()
        .filter(|d| !d.partition && d.dependencies.is_empty())
        .filter(|d| {
            let reported = d.address.as_ref().and_then(|a| a.serial.as_deref());
            reported.is_some_and(|s| wanted.is(s))
        })
        .map(|d| d.name.as_str())
        .collect();
    let mut on_ours = built_on(disks, &ours);
    // A filesystem may be known by its device alone.
    for fs in filesystems {
        let dev =
            if fs.name.starts_with('/') { fs.name.clone() } else { format!("/dev/{}", fs.name) };
        if ours.contains(dev.as_str()) || on_ours.contains_key(dev.as_str()) {
            let reason = format!("{dev} is mounted at {}", fs.mountpoint);
            if !reasons.iter().any(|r| r.starts_with(&dev)) {
                reasons.push(reason);
            }
        }
    }
    on_ours.retain(|_, disk| !disk.partition);
    for (name, disk) in on_ours {
        let alias = disk.alias.as_deref().map(|a| format!(" ({a})")).unwrap_or_default();
        reasons.push(format!("{name}{alias} is built on {}", disk.dependencies.join(", ")));
    }
    match (reasons.is_empty(), ours.len()) {
        (false, _) => Ok(Usage::InUse(reasons)),
        (true, 1) => Ok(Usage::Free),
        (true, 0) => Err(Unsaid::Yet(format!(
            "the guest's agent shows no disk with {wanted} (it needs udev in the guest)"
        ))),
        (true, n) => Err(Unsaid::Ever(format!("the guest's agent shows {n} disks with {wanted}"))),
    }
}

/// Everything that lies on these devices, at whatever depth.
fn built_on<'a>(
    disks: &'a [DiskInfo],
    base: &BTreeSet<&'a str>,
) -> BTreeMap<&'a str, &'a DiskInfo> {
    let mut found: BTreeMap<&str, &DiskInfo> = BTreeMap::new();
    loop {
        let before = found.len();
        for disk in disks {
            let on = |d: &String| base.contains(d.as_str()) || found.contains_key(d.as_str());
            if disk.dependencies.iter().any(on) {
                found.insert(&disk.name, disk);
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISKS: &str = r#"{"return":[
        {"name":"/dev/vda","partition":false,"dependencies":[],
         "address":{"serial":"boot","bus-type":"virtio","bus":0,"unit":0,"target":0,"dev":"/dev/vda",
                    "pci-controller":{"bus":5,"slot":0,"domain":0,"function":0}}},
        {"name":"/dev/vda1","partition":true,"dependencies":["/dev/vda"]},
        {"name":"/dev/sda","partition":false,"dependencies":[],
         "address":{"serial":"0QEMU_QEMU_HARDDISK_vol-1","bus-type":"scsi","bus":0,"unit":0,"target":1,
                    "pci-controller":{"bus":6,"slot":0,"domain":0,"function":0},"dev":"/dev/sda"}},
        {"name":"/dev/sda1","partition":true,"dependencies":["/dev/sda"]},
        {"name":"/dev/sdb","partition":false,"dependencies":[],
         "address":{"serial":"0QEMU_QEMU_HARDDISK_vol-11","bus-type":"scsi","bus":0,"unit":0,"target":2,
                    "pci-controller":{"bus":6,"slot":0,"domain":0,"function":0},"dev":"/dev/sdb"}},
        {"name":"/dev/dm-0","partition":false,"dependencies":["/dev/sdb"],"alias":"vg-lv"},
        {"name":"/dev/sr0","partition":false,"dependencies":[]}]}"#;
    const FS: &str = r#"{"return":[
        {"name":"vda1","mountpoint":"/","type":"ext4","used-bytes":1,"total-bytes":2,
         "disk":[{"serial":"boot","bus-type":"virtio","bus":0,"unit":0,"target":0,"dev":"/dev/vda1",
                  "pci-controller":{"bus":5,"slot":0,"domain":0,"function":0}}]}]}"#;

    fn serial(s: &str) -> Serial {
        s.parse().unwrap()
    }

    fn asked(fs: &str, disks: &str, s: &str, bus: Bus) -> Usage {
        let said = judge(
            &parse_answer::<Filesystem>("fs", fs).unwrap(),
            &parse_answer::<DiskInfo>("disks", disks).unwrap(),
            &InGuest::Disk(serial(s), bus),
        );
        match said {
            Ok(usage) => usage,
            Err(Unsaid::Yet(why) | Unsaid::Ever(why)) => Usage::Unproven(why),
        }
    }

    #[test]
    fn a_disk_with_nothing_on_it_is_free() {
        assert_eq!(asked(FS, DISKS, "vol-1", Bus::Scsi), Usage::Free);
    }

    #[test]
    fn a_mounted_partition_is_use() {
        assert_eq!(
            asked(FS, DISKS, "boot", Bus::Virtio),
            Usage::InUse(vec!["/dev/vda1 is mounted at /".into()])
        );
        let no_serial = FS.replace(r#""serial":"boot","#, "");
        assert_eq!(
            asked(&no_serial, DISKS, "boot", Bus::Virtio),
            Usage::InUse(vec!["/dev/vda1 is mounted at /".into()]),
            "found by the device's name"
        );
    }

    #[test]
    fn a_volume_group_on_it_is_use_mounted_or_not() {
        assert_eq!(
            asked(FS, DISKS, "vol-11", Bus::Scsi),
            Usage::InUse(vec!["/dev/dm-0 (vg-lv) is built on /dev/sdb".into()])
        );
        let fs = r#"{"return":[{"name":"dm-0","mountpoint":"/srv","type":"xfs",
            "disk":[{"serial":"0QEMU_QEMU_HARDDISK_vol-11","bus-type":"scsi","dev":"/dev/sdb"}]}]}"#;
        let list = parse_answer::<Filesystem>("fs", fs).unwrap();
        assert_eq!(
            mounted(&list, &InGuest::Disk(serial("vol-11"), Bus::Scsi)),
            ["/dev/dm-0 (on /dev/sdb) is mounted at /srv"]
        );
        assert!(
            mounted(&list, &InGuest::Disk(serial("vol-1"), Bus::Scsi)).is_empty(),
            "not a prefix of it"
        );
        assert!(
            mounted(&list, &InGuest::Disk(serial("ol-11"), Bus::Scsi)).is_empty(),
            "nor a suffix"
        );
        assert!(
            mounted(&list, &InGuest::Disk(serial("vol-11"), Bus::Virtio)).is_empty(),
            "scsi's form"
        );
    }

    #[test]
    fn a_lun_is_known_by_its_own_identity() {
        let identity = "36001405abcdef0123456789abcdef012";
        let disks = DISKS.replace("0QEMU_QEMU_HARDDISK_vol-11", identity);
        let lun = |text: &str| InGuest::Lun(text.parse().unwrap());
        let judged = |wanted| {
            let disks = parse_answer::<DiskInfo>("disks", &disks).unwrap();
            judge(&parse_answer::<Filesystem>("fs", FS).unwrap(), &disks, &wanted)
        };
        let used = judged(lun("naa.6001405ABCDEF0123456789abcdef012")).unwrap();
        assert_eq!(used, Usage::InUse(vec!["/dev/dm-0 (vg-lv) is built on /dev/sdb".into()]));
        let other = judged(lun("naa.6001405abcdef0123456789abcdef013"));
        assert!(matches!(other, Err(Unsaid::Yet(why)) if why.contains("identity 3600")));
    }

    #[test]
    fn deep_stacks_are_followed() {
        let disks = r#"{"return":[
            {"name":"/dev/dm-1","partition":false,"dependencies":["/dev/md0"],"alias":"crypt"},
            {"name":"/dev/md0","partition":false,"dependencies":["/dev/sda1","/dev/sdz1"]},
            {"name":"/dev/sda1","partition":true,"dependencies":["/dev/sda"]},
            {"name":"/dev/sda","partition":false,"address":{"serial":"0QEMU_QEMU_HARDDISK_a"}}]}"#;
        let Usage::InUse(reasons) = asked(r#"{"return":[]}"#, disks, "a", Bus::Scsi) else {
            panic!("in use")
        };
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        assert!(reasons[0].contains("/dev/dm-1 (crypt) is built on /dev/md0"), "{reasons:?}");
    }

    #[test]
    fn what_nobody_can_say_is_unproven() {
        let unproven = |u: Usage| matches!(u, Usage::Unproven(_));
        assert!(unproven(asked(FS, DISKS, "other", Bus::Scsi)), "unknown to the guest");
        assert!(unproven(asked(FS, DISKS, "VOL-1", Bus::Scsi)), "case counts");
        let twice = DISKS.replace("HARDDISK_vol-11", "HARDDISK_vol-1");
        assert!(unproven(asked(FS, &twice.replace("/dev/dm-0", "/dev/x"), "vol-1", Bus::Virtio)));
        let disabled = r#"{"error":{"class":"CommandNotFound","desc":"Command guest-get-disks has been disabled"}}"#;
        let error = parse_answer::<DiskInfo>("guest-get-disks", disabled).unwrap_err();
        assert!(error.contains("has been disabled"), "{error}");
        assert!(parse_answer::<DiskInfo>("x", "{}").is_err());
        assert!(parse_answer::<DiskInfo>("x", "garbage").is_err());
    }
}
