//! Both stores as somebody finds them who only looks: beside a running lunplugd, when it is down, on a
//! read-only disk, and damaged. Nothing is made, locked or changed.

use std::io;
use std::path::{Path, PathBuf};

use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::store::{self, SCHEMA};
use super::{Effects, effects::Removal};
use crate::connector::facts::{self, ClaimFacts, LeaseFacts};
use crate::host::runtree;
use crate::types::{VmId, VolumeKey};

/// Everything that is stored.
#[derive(Debug, Default, Serialize)]
pub struct Found {
    /// The boot in which it was looked at.
    pub boot_id: String,
    /// The run directory.
    pub run_dir: PathBuf,
    /// The durable stores: the daemon's and sidecars'.
    pub stores: Vec<StoreFound>,
    /// What was done for each volume.
    pub effects: Vec<File<Effects>>,
    /// What was done for volumes in the pods to which their VMs are about to move.
    pub incoming: Vec<File<Effects>>,
    /// VMs that are about to start or to move.
    pub moves: Vec<File<MoveFound>>,
    /// Removals that were taken on.
    pub removals: Vec<File<RemovalFound>>,
    /// Who uses which target.
    pub leases: Vec<File<LeaseFacts>>,
    /// Who has which LUN.
    pub claims: Vec<File<(String, Vec<ClaimFacts>)>>,
    /// Addresses that are marked for udev.
    pub marks: Vec<String>,
    /// VMs that a lunplugd serves at this moment, as `NAMESPACE/NAME`.
    pub served: Vec<String>,
    /// Files that are none of these.
    pub others: Vec<String>,
}

/// A durable store.
#[derive(Debug, Default, Serialize)]
pub struct StoreFound {
    /// The database.
    pub path: PathBuf,
    /// Its schema, where it could be read.
    pub schema: Option<i64>,
    /// What is wrong with the file as a whole.
    pub damage: Vec<String>,
    /// VMs: name and value.
    pub vms: Vec<VmRow>,
    /// Wanted volumes.
    pub volumes: Vec<VolumeRow>,
    /// Identities once proven.
    pub identities: Vec<IdentityRow>,
    /// The sets of volumes that were accepted last.
    pub revisions: Vec<RevisionRow>,
}

/// A row of `vms`.
#[derive(Debug, Clone, Serialize)]
pub struct VmRow {
    /// `NAMESPACE/NAME`.
    pub vm: String,
    /// Its value, as it is.
    pub spec: Json,
    /// It is to be able to have Fibre Channel volumes.
    pub fc_marked: bool,
}

/// A row of `volumes`.
#[derive(Debug, Clone, Serialize)]
pub struct VolumeRow {
    /// `NAMESPACE/NAME`.
    pub vm: String,
    /// The volume's name.
    pub volume: String,
    /// Its place in the order in which the VM's were added.
    pub position: i64,
    /// Its value, as it is.
    pub spec: Json,
    /// Another identity than the recorded one is allowed.
    pub accept_new_identity: bool,
    /// How it is being removed; `None` for one that is wanted.
    pub removing: Option<Json>,
}

/// A row of `identities`.
#[derive(Debug, Clone, Serialize)]
pub struct IdentityRow {
    /// `NAMESPACE/NAME`.
    pub vm: String,
    /// The volume's name.
    pub volume: String,
    /// The source at which it was proven.
    pub source: String,
    /// The identity.
    pub wwid: String,
}

/// A row of `revisions`, without the set.
#[derive(Debug, Clone, Serialize)]
pub struct RevisionRow {
    /// `NAMESPACE/NAME`.
    pub vm: String,
    /// The revision.
    pub revision: i64,
}

/// A text that should be JSON. Shown as JSON where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json(pub String);

impl Serialize for Json {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match serde_json::from_str::<Value>(&self.0) {
            Ok(value) => value.serialize(to),
            Err(_) => self.0.serialize(to),
        }
    }
}

/// A file below the run directory.
#[derive(Debug)]
pub struct File<T> {
    /// Its name below it.
    pub name: String,
    /// Its text, as it is.
    pub text: Json,
    /// What it says, or why that cannot be read.
    pub value: Result<T, String>,
}

impl<T> Serialize for File<T> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut file = to.serialize_struct("File", 3)?;
        file.serialize_field("file", &self.name)?;
        file.serialize_field("error", &self.value.as_ref().err())?;
        file.serialize_field("value", &self.text)?;
        file.end()
    }
}

/// A removal's mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovalFound {
    /// The boot in which it was taken on.
    pub boot_id: String,
    /// By force.
    pub force: bool,
}

/// A VM that is about to start or to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveFound {
    /// The boot in which it was noted.
    pub boot_id: String,
}

/// The volume of a file `effects/NAMESPACE/VM/VOLUME.json`, `incoming/...` or `removals/...`.
pub fn volume_of(file: &str) -> Option<VolumeKey> {
    let mut parts = file.strip_suffix(".json")?.split('/').skip(1);
    let vm = VmId::new(parts.next()?, parts.next()?).ok()?;
    let volume = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(VolumeKey { vm, volume })
}

/// Reads everything: the databases of `state_dir` (or only the one named), and `run_dir`.
pub async fn look(state_dir: &Path, only: Option<&Path>, run_dir: &Path) -> io::Result<Found> {
    let paths = match only {
        Some(path) => vec![path.to_owned()],
        None => runtree::databases(state_dir.to_owned()).await?,
    };
    // Where there is no run directory there is no need of one for a moment's copy.
    let scratch = if run_dir.is_dir() { run_dir.to_owned() } else { std::env::temp_dir() };
    let mut found = Found { run_dir: run_dir.to_owned(), ..Found::default() };
    for path in paths {
        let scratch = scratch.clone();
        let look = tokio::task::spawn_blocking(move || store_at(&path, &scratch));
        found.stores.push(look.await.map_err(io::Error::other)?);
    }
    let tree = runtree::run_tree(run_dir.to_owned()).await?;
    (found.boot_id, found.served) = (tree.boot_id, tree.served);
    for file in tree.files {
        found.sort_in(file);
    }
    Ok(found)
}

impl Found {
    fn sort_in(&mut self, file: runtree::RunFile) {
        let runtree::RunFile { name, content } = file;
        let last = name.rsplit('/').next().unwrap_or_default();
        if last.starts_with(".tmp-") {
            return self.others.push(name);
        }
        match name.split('/').next().unwrap_or_default() {
            "effects" => self.effects.push(read(name, content, json)),
            "incoming" => self.incoming.push(read(name, content, json)),
            "starts" | "migrations" => self.moves.push(read(name, content, json)),
            "removals" => self.removals.push(read(name, content, |b| {
                let mark: Removal = serde_json::from_slice(b).map_err(|e| e.to_string())?;
                Ok(RemovalFound { boot_id: mark.boot_id, force: mark.options.force })
            })),
            "leases" => {
                let lease = read(name.clone(), content, |b| facts::read_lease(&name, b));
                self.leases.push(lease);
            }
            "claims" => self.claims.push(read(name, content, facts::read_claims)),
            "guest-luns" => self.marks.push(last.to_owned()),
            _ => self.others.push(name),
        }
    }
}

fn json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|e| e.to_string())
}

fn read<T>(
    name: String,
    content: Result<Vec<u8>, String>,
    parse: impl FnOnce(&[u8]) -> Result<T, String>,
) -> File<T> {
    let text = content.as_ref().map(|b| String::from_utf8_lossy(b).into_owned());
    let text = Json(text.unwrap_or_default());
    File { name, text, value: content.and_then(|bytes| parse(&bytes)) }
}

/// One database, as far as it can be read.
fn store_at(path: &Path, scratch: &Path) -> StoreFound {
    let mut found = StoreFound { path: path.to_owned(), ..StoreFound::default() };
    let read = store::with_copy(path, scratch, |copy| {
        let damage = match std::fs::metadata(copy) {
            Ok(file) if file.len() == 0 => Err("the file is empty: it was cut off".to_owned()),
            _ => Connection::open(copy).map_err(|e| e.to_string()),
        };
        match damage.and_then(|c| rows(&c, &mut found).map_err(|e| e.to_string())) {
            Ok(()) => {}
            Err(damage) if found.damage.contains(&damage) => {}
            Err(damage) => found.damage.push(damage),
        }
        Ok(())
    });
    if let Err(error) = read {
        let cause = std::error::Error::source(&error).map(|c| format!(": {c}"));
        found.damage.push(format!("{error}{}", cause.unwrap_or_default()));
    }
    found
}

/// How many lines of damage are told.
const LINES: u32 = 20;

fn rows(c: &Connection, found: &mut StoreFound) -> Result<(), rusqlite::Error> {
    let schema: i64 = c.query_row("PRAGMA user_version", [], |r| r.get(0))?;
    found.schema = Some(schema);
    found.damage = store::integrity(c, LINES)?;
    if schema > SCHEMA {
        let newer = format!("it has schema {schema}, this version knows schemas up to {SCHEMA}");
        found.damage.push(newer);
        return Ok(());
    }
    let vm = |r: &rusqlite::Row<'_>| {
        Ok(VmRow { vm: r.get(0)?, spec: Json(r.get(1)?), fc_marked: r.get(2)? })
    };
    let marked = if schema < 4 { "0" } else { "fc_marked" };
    let select = format!("SELECT vm, spec, {marked} FROM vms ORDER BY vm");
    for row in c.prepare(&select)?.query_map([], vm)? {
        found.vms.push(row?);
    }
    let volume = |r: &rusqlite::Row<'_>| {
        Ok(VolumeRow {
            vm: r.get(0)?,
            volume: r.get(1)?,
            position: r.get(2)?,
            spec: Json(r.get(3)?),
            accept_new_identity: r.get(4)?,
            removing: r.get::<_, Option<String>>(5)?.map(Json),
        })
    };
    let select = "SELECT vm, volume, position, spec, accept_new_identity, removing FROM volumes
                  ORDER BY vm, position";
    for row in c.prepare(select)?.query_map([], volume)? {
        found.volumes.push(row?);
    }
    let identity = |r: &rusqlite::Row<'_>| {
        Ok(IdentityRow { vm: r.get(0)?, volume: r.get(1)?, source: r.get(2)?, wwid: r.get(3)? })
    };
    let select = "SELECT vm, volume, source, wwid FROM identities ORDER BY vm, volume, source";
    for row in c.prepare(select)?.query_map([], identity)? {
        found.identities.push(row?);
    }
    if schema < 2 {
        return Ok(());
    }
    let revision = |r: &rusqlite::Row<'_>| Ok(RevisionRow { vm: r.get(0)?, revision: r.get(1)? });
    let select = "SELECT vm, revision FROM revisions ORDER BY vm";
    for row in c.prepare(select)?.query_map([], revision)? {
        found.revisions.push(row?);
    }
    Ok(())
}
