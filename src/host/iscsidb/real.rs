//! open-iscsi's node records on disk.
//!
//! `nodes/IQN/ADDRESS,PORT,TPGT/IFACE` is a record; older versions, and records whose portal group
//! is not known, have the file `nodes/IQN/ADDRESS,PORT`, whatever their iface (usr/idbm.c,
//! `idbm_rec_write`). IPv6 addresses stand without brackets.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::libc;
use zeroize::Zeroizing;

use super::discovery;
use super::iface;
use super::lock::{self, Watcher};
use super::text::{value_of, with_settings};
use super::{DbLockState, IscsiDb, Record, Setting};
use crate::doctor::Service;
use crate::host::place::{Pinned, Place, Places};
use crate::host::workers::Workers;
use crate::types::{Chap, Iface, IfaceName, Iqn, Nexus, Outcome, Portal};

/// A local file system; only one in trouble takes this long.
const DEADLINE: Duration = Duration::from_secs(10);
/// A record is a few kilobytes; nothing behind this is looked at.
const MAX_RECORD: u64 = 1 << 20;

/// The database's lock; the same in all distributions (`LOCK_DIR` in usr/idbm.h).
const LOCKS: &str = "/run/lock/iscsi";

/// The tag of the target's portal group in a record's text.
const GROUP: &str = "node.tpgt";

/// The directories with links to node records (`*_CONFIG_DIR` in usr/idbm.h).
const LINKING: [&str; 4] = ["send_targets", "static", "isns", "fw"];

/// The real database.
pub struct RealIscsiDb {
    whose: Whose,
    watcher: Arc<Mutex<Watcher>>,
    workers: Workers,
}

/// Which database it is.
#[derive(Clone)]
enum Whose {
    /// The one here.
    At { nodes: PathBuf, locks: PathBuf },
    /// That of whoever serves as iscsid, each time anew.
    Iscsids(Places),
}

/// The database's directories, as they can be used from here.
struct Dirs {
    nodes: Pinned,
    discovery: Pinned,
    /// Those with links to node records.
    linking: Vec<Pinned>,
    ifaces: Pinned,
    locks: Pinned,
}

impl RealIscsiDb {
    /// Where distributions have the records: Debian below /etc or /var/lib, the others below /var/lib.
    pub const PLACES: [&'static str; 2] = ["/etc/iscsi", "/var/lib/iscsi"];

    /// The records in `nodes`; it need not be there yet.
    pub fn new(nodes: impl Into<PathBuf>) -> Self {
        Self::of(Whose::At { nodes: nodes.into(), locks: LOCKS.into() })
    }

    /// The same with the database's lock in another directory.
    pub fn with_locks(self, locks: impl Into<PathBuf>) -> Self {
        let whose = match self.whose {
            Whose::At { nodes, .. } => Whose::At { nodes, locks: locks.into() },
            other @ Whose::Iscsids(_) => other,
        };
        Self { whose, ..self }
    }

    /// The records of whoever serves as iscsid, where its distribution has them.
    pub(crate) fn placed(places: Places) -> Self {
        Self::of(Whose::Iscsids(places))
    }

    fn of(whose: Whose) -> Self {
        let workers = Workers::new("lunplug-iscsidb", 4, 4);
        Self { whose, watcher: Arc::default(), workers }
    }

    /// Runs `call` on the database's directories.
    async fn run<T, F>(&self, key: &str, call: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Dirs) -> io::Result<T> + Send + 'static,
    {
        let whose = self.whose.clone();
        self.workers.run(key, DEADLINE, move || call(&whose.dirs()?)).await
    }
}

impl Whose {
    fn dirs(&self) -> io::Result<Dirs> {
        let places = match self {
            Self::At { nodes, locks } => {
                let base = nodes.parent().unwrap_or(nodes);
                return Ok(Dirs {
                    nodes: Pinned::ours(nodes),
                    discovery: Pinned::ours(base.join("send_targets")),
                    linking: LINKING.iter().map(|name| Pinned::ours(base.join(name))).collect(),
                    ifaces: Pinned::ours(base.join("ifaces")),
                    locks: Pinned::ours(locks),
                });
            }
            Self::Iscsids(places) => places,
        };
        let root = match places.of(Service::Iscsid)? {
            Place::Ours => None,
            Place::Other(root) => Some(root),
        };
        let pin = |path: &str| match &root {
            None => Ok(Pinned::ours(path)),
            Some(root) => root.dir(path),
        };
        let is_dir = |path: &str| pin(path).is_ok_and(|dir| dir.path.is_dir());
        // Before the first record there may be no directory: then the later place, if it is there.
        let [first, second] = RealIscsiDb::PLACES;
        let mut with_records =
            RealIscsiDb::PLACES.into_iter().filter(|b| is_dir(&format!("{b}/nodes")));
        let otherwise = if is_dir(second) { second } else { first };
        let base = with_records.next().unwrap_or(otherwise);
        Ok(Dirs {
            nodes: pin(&format!("{base}/nodes"))?,
            discovery: pin(&format!("{base}/send_targets"))?,
            linking: LINKING
                .iter()
                .map(|name| pin(&format!("{base}/{name}")))
                .collect::<io::Result<_>>()?,
            ifaces: pin(&format!("{base}/ifaces"))?,
            locks: pin(LOCKS)?,
        })
    }
}

/// One record and its file.
struct Found {
    record: Record,
    file: PathBuf,
}

/// `ADDRESS,PORT` with or without `,TPGT`.
pub(super) fn portal(name: &str) -> Option<Portal> {
    let mut fields = name.split(',');
    let ip: IpAddr = fields.next()?.trim_matches(['[', ']']).parse().ok()?;
    let port: u16 = fields.next()?.parse().ok()?;
    SocketAddr::new(ip, port).to_string().parse().ok()
}

/// The tag in `ADDRESS,PORT,TPGT`.
fn group(name: &str) -> Option<u16> {
    name.split(',').nth(2)?.parse().ok()
}

fn is_corrupt(file: &Path) -> bool {
    setting(file, "node.name").is_none()
}

/// The iface that a record names; `default` where it names none.
fn iface_of(file: &Path) -> String {
    setting(file, "iface.iscsi_ifacename").unwrap_or_else(|| "default".into())
}

/// A setting of a record that is a whole file, not empty.
fn setting(file: &Path, name: &str) -> Option<String> {
    let meta = fs::metadata(file).ok()?;
    if !meta.is_file() || meta.len() > MAX_RECORD {
        return None;
    }
    let bytes = Zeroizing::new(fs::read(file).ok()?);
    let text = Zeroizing::new(String::from_utf8_lossy(&bytes).into_owned());
    value_of(&text, name).map(str::to_owned)
}

pub(super) fn entries(dir: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let read = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in read {
        let entry = entry?;
        names.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    Ok(names)
}

fn find(nodes: &Path, target: &Iqn) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for (name, path) in entries(&nodes.join(target.as_str()))? {
        // Whatever else lies there is not a record.
        let Some(portal) = portal(&name) else { continue };
        let (group, files) = match path.is_dir() {
            true => (group(&name), entries(&path)?),
            false => (None, vec![(iface_of(&path), path)]),
        };
        for (iface, file) in files {
            let corrupt = is_corrupt(&file);
            found.push(Found { record: Record { portal, iface, group, corrupt }, file });
        }
    }
    found.sort_by(|a, b| {
        (&a.record.portal, &a.record.iface).cmp(&(&b.record.portal, &b.record.iface))
    });
    Ok(found)
}

/// As iscsiadm writes a record: in its place, under the lock. Cut off half way it is a damaged record,
/// which is replaced when it is met.
fn set(
    at: &Dirs,
    nexus: &Nexus,
    portal: Portal,
    settings: &[Setting],
    chap: Option<&Chap>,
) -> io::Result<()> {
    let _lock = lock::Held::take(&at.locks.path)?;
    let iface = nexus.iface().as_str();
    let of_it = |f: &Found| f.record.portal == portal && f.record.iface == iface;
    let mut found = find(&at.nodes.path, nexus.target())?.into_iter();
    let found = found.find(of_it).ok_or(io::ErrorKind::NotFound)?;
    if found.record.corrupt {
        return Err(io::ErrorKind::InvalidData.into());
    }
    rewrite(&found.file, |before| {
        // iscsiadm writes all that it knows, and reads over what it does not know (usr/idbm.c, `idbm_recinfo_config`).
        match settings.iter().find(|(name, _)| value_of(before, name).is_none()) {
            Some((name, _)) => {
                let message = format!("this open-iscsi knows no {name}: install 2.1.11 or newer");
                Err(io::Error::new(io::ErrorKind::Unsupported, message))
            }
            None => Ok(with_settings(before, settings, chap)),
        }
    })
}

/// First the tag in its text, which open-iscsi understands wherever the file lies; then its place.
fn set_group(
    nodes: &Path,
    locks: &Path,
    target: &Iqn,
    portal: Portal,
    group: u16,
) -> io::Result<()> {
    let _lock = lock::Held::take(locks)?;
    let of_it = |f: &Found| f.record.portal == portal && f.record.group.is_none();
    let found = find(nodes, target)?.into_iter().find(of_it).ok_or(io::ErrorKind::NotFound)?;
    if found.record.corrupt {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let tag = [(GROUP, group.to_string())];
    rewrite(&found.file, |before| Ok(with_settings(before, &tag, None)))?;
    let mut dir = found.file.clone().into_os_string();
    dir.push(format!(",{group}"));
    fs::create_dir_all(&dir)?;
    fs::rename(&found.file, Path::new(&dir).join(&found.record.iface))
}

/// Writes a record anew in its place, readable by its owner alone.
fn rewrite(
    path: &Path,
    change: impl FnOnce(&str) -> io::Result<Zeroizing<String>>,
) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let before = Zeroizing::new(fs::read_to_string(path)?);
    let text = change(&before)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.set_len(0)?;
    file.write_all(text.as_bytes())
}

fn remove(at: &Dirs, target: &Iqn, record: &Record) -> io::Result<()> {
    // While iscsiadm writes a record it is empty for a moment, and not corrupt.
    let _lock = lock::Held::take(&at.locks.path)?;
    let nodes = &at.nodes.path;
    for found in find(nodes, target)? {
        if (found.record.portal, &found.record.iface) != (record.portal, &record.iface) {
            continue;
        }
        if found.record.corrupt != record.corrupt {
            let (file, is) =
                (found.file.display(), if record.corrupt { "whole" } else { "corrupt" });
            let message = format!("{file} is {is} by now");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        if let Some(dir) =
            found.file.parent().and_then(Path::file_name).filter(|_| found.record.group.is_some())
        {
            unlink(&at.linking, &format!("{target},{},{}", dir.to_string_lossy(), record.iface))?;
        }
        fs::remove_file(&found.file)?;
        // The directories go when they are empty; one that is not stays.
        for dir in found.file.ancestors().skip(1).take_while(|d| d != nodes) {
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
    }
    Ok(())
}

/// Removes the links to a record: `IQN,ADDRESS,PORT,TPGT,IFACE`, where each way to make records keeps its own, or in a
/// directory of the portal that was asked there (usr/idbm.c, `setup_disc_to_node_link`). One without a tag has none.
fn unlink(linking: &[Pinned], name: &str) -> io::Result<()> {
    let mut dirs: Vec<PathBuf> = linking.iter().map(|dir| dir.path.clone()).collect();
    for dir in linking {
        let portals = entries(&dir.path)?.into_iter().map(|(_, path)| path);
        dirs.extend(portals.filter(|path| path.is_dir() && !path.is_symlink()));
    }
    for link in dirs.iter().map(|dir| dir.join(name)).filter(|link| link.is_symlink()) {
        fs::remove_file(link)?;
    }
    Ok(())
}

#[async_trait]
impl IscsiDb for RealIscsiDb {
    async fn records(&self, target: &Iqn) -> io::Result<Vec<Record>> {
        let target = target.clone();
        let records = |found: Vec<Found>| found.into_iter().map(|f| f.record).collect();
        self.run("nodes", move |at| Ok(records(find(&at.nodes.path, &target)?))).await
    }

    async fn remove(&self, target: &Iqn, record: &Record) -> io::Result<()> {
        let (target, record) = (target.clone(), record.clone());
        self.run("nodes", move |at: &Dirs| remove(at, &target, &record)).await
    }

    async fn set(
        &self,
        nexus: &Nexus,
        portal: Portal,
        settings: &[Setting],
        chap: Option<&Chap>,
    ) -> io::Result<()> {
        let (nexus, settings, chap) = (nexus.clone(), settings.to_vec(), chap.cloned());
        let call = move |at: &Dirs| set(at, &nexus, portal, &settings, chap.as_ref());
        self.run("nodes", call).await
    }

    async fn set_group(&self, target: &Iqn, portal: Portal, group: u16) -> io::Result<()> {
        let target = target.clone();
        let call =
            move |at: &Dirs| set_group(&at.nodes.path, &at.locks.path, &target, portal, group);
        self.run("nodes", call).await
    }

    async fn put_iface(&self, iface: &Iface) -> io::Result<Outcome> {
        let iface = iface.clone();
        let call = move |at: &Dirs| iface::put(&at.ifaces.path, &at.locks.path, &iface);
        self.run("ifaces", call).await
    }

    async fn ifaces(&self) -> io::Result<Vec<IfaceName>> {
        self.run("ifaces", |at| iface::all(&at.ifaces.path)).await
    }

    async fn remove_iface(&self, name: &IfaceName) -> io::Result<bool> {
        let name = name.clone();
        let call =
            move |at: &Dirs| iface::remove(&at.ifaces.path, &at.nodes.path, &at.locks.path, &name);
        self.run("ifaces", call).await
    }

    async fn discoveries(&self) -> io::Result<Vec<Portal>> {
        self.run("discovery", |at| discovery::ours(&at.discovery.path)).await
    }

    async fn put_discovery(&self, portal: Portal, chap: &Chap) -> io::Result<()> {
        let chap = chap.clone();
        let call =
            move |at: &Dirs| discovery::put(&at.discovery.path, &at.locks.path, portal, &chap);
        self.run("discovery", call).await
    }

    async fn remove_discovery(&self, portal: Portal) -> io::Result<()> {
        let call = move |at: &Dirs| discovery::remove(&at.discovery.path, &at.locks.path, portal);
        self.run("discovery", call).await
    }

    async fn look_at_lock(&self) -> io::Result<DbLockState> {
        let watcher = self.watcher.clone();
        let call = move |at: &Dirs| {
            let mut watcher = watcher.lock().unwrap_or_else(PoisonError::into_inner);
            // Processes are those of the host, wherever they run.
            watcher.look(&at.locks.path, Path::new("/proc"))
        };
        self.run("lock", call).await
    }
}
