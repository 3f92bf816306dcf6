//! `lunplug journal dump` and `lunplug journal verify`: the stores themselves, not by way of lunplugd.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::Value;

use super::Screen;
use super::failure::{Exit, Failure};
use super::output::{self, Format};
use crate::config::Layers;
use crate::host::facts;
use crate::journal::inspect::{self, File, Found, MoveFound};
use crate::journal::verify::{self, Finding};
use crate::types::VmId;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show VMs, wanted volumes, identities, revisions, effects, removals, leases and claims as they are stored.
    Dump(Place),
    /// Check that all of it can be read and fits together; changes nothing.
    Verify(Place),
}

/// Where the stores are.
#[derive(Debug, clap::Args)]
pub(super) struct Place {
    /// lunplugd's configuration [default: /etc/lunplug/lunplugd.toml, if there].
    #[arg(long, env = "LUNPLUG_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of durable state.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// Directory of this boot's state.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<String>,
    /// Only this VM, and the store of the sidecar that serves it.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    vm: Option<VmId>,
}

impl Place {
    async fn look(&self) -> Result<Found, Failure> {
        let flag = |name: &str, key: &str, value: &Option<String>| {
            value.clone().map(|value| (name.to_owned(), key.to_owned(), value))
        };
        let flags = [
            flag("--state-dir", "state_dir", &self.state_dir),
            flag("--run-dir", "run_dir", &self.run_dir),
        ];
        let flags = flags.into_iter().flatten().collect();
        let layers = Layers::from_system(self.config.as_deref(), flags);
        let config = layers.and_then(Layers::load).map_err(|error| Failure::config(&error))?;
        let config = config.config;
        let sidecar =
            |vm: &VmId| config.state_dir.join(format!("{}_{}.db", vm.namespace(), vm.name()));
        let only = self.vm.as_ref().map(sidecar);
        if let Some(store) = only.as_ref().filter(|store| !facts::is_there(store)) {
            let message = format!("there is no sidecar's store {}", store.display());
            let remedy = "Leave --vm out for the node's daemon, or name its --state-dir.";
            let failure = Failure::plain(Exit::NotFound, message);
            return Err(Failure { remedy: remedy.into(), ..failure });
        }
        let found = inspect::look(&config.state_dir, only.as_deref(), &config.run_dir).await;
        found.map_err(|error| cannot_look(&error, &config.state_dir, &config.run_dir))
    }
}

fn cannot_look(error: &io::Error, state: &std::path::Path, run: &std::path::Path) -> Failure {
    let (exit, remedy) = match error.kind() {
        ErrorKind::PermissionDenied => (Exit::Denied, "Run it as root."),
        ErrorKind::NotFound => (Exit::NotFound, "Name the right --state-dir."),
        _ => (Exit::Failed, ""),
    };
    let message = format!("cannot read {} and {}: {error}", state.display(), run.display());
    Failure { remedy: remedy.into(), ..Failure::plain(exit, message) }
}

/// Between the two looks of a verification that found something.
const SETTLE: Duration = Duration::from_secs(1);

pub(super) async fn run(
    command: Command,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    match command {
        Command::Dump(place) => {
            let found = place.look().await?;
            match format {
                Format::Table => Ok(dump(&found, screen)?),
                Format::Json | Format::Yaml => Ok(output::document(format, &found, screen.out)?),
            }
        }
        Command::Verify(place) => {
            let found = place.look().await?;
            let mut findings = verify::verify(&found, place.vm.as_ref());
            if findings.iter().any(|f| !f.note) && !found.served.is_empty() {
                // A lunplugd may have been at work.
                tokio::time::sleep(SETTLE).await;
                let again = verify::verify(&place.look().await?, place.vm.as_ref());
                findings = verify::lasting(findings, &again);
            }
            report(&findings, format, screen)
        }
    }
}

fn report(findings: &[Finding], format: Format, screen: &mut Screen<'_>) -> Result<(), Failure> {
    let problems = findings.iter().filter(|f| !f.note).count();
    if format == Format::Table {
        for finding in findings {
            let kind = if finding.note { "note" } else { "problem" };
            writeln!(screen.out, "{kind}: {}", output::clean(&finding.place))?;
            writeln!(screen.out, "  what: {}", output::clean(&finding.problem))?;
            writeln!(screen.out, "  means: {}", output::clean(&finding.means))?;
            if !finding.note {
                writeln!(screen.out, "  what to do: {}", output::clean(&finding.remedy))?;
            }
        }
        if problems == 0 {
            writeln!(screen.out, "no problems found")?;
        }
    } else {
        output::document(format, &findings, screen.out)?;
    }
    match problems {
        0 => Ok(()),
        1 => Err(Failure::plain(Exit::Problems, "1 problem found")),
        n => Err(Failure::plain(Exit::Problems, format!("{n} problems found"))),
    }
}

/// A value's field as text; empty where there is none.
fn text(value: &Value, path: &[&str]) -> String {
    match path.iter().try_fold(value, |value, key| value.get(key)) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn shown(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

/// The tables, one a store.
fn dump(found: &Found, screen: &mut Screen<'_>) -> io::Result<()> {
    let out = &mut *screen.out;
    let mut section = |title: &str, header: &[&str], rows: Vec<Vec<String>>| {
        writeln!(out, "{title}: {}", rows.len())?;
        if !rows.is_empty() {
            output::table(header, rows, out)?;
        }
        writeln!(out)
    };
    for store in &found.stores {
        let state = match store.damage.first() {
            Some(damage) => format!("damaged: {damage}"),
            None => format!("schema {}", store.schema.unwrap_or_default()),
        };
        let title = format!("VMs in {} ({state})", store.path.display());
        let vm = |vm: &inspect::VmRow| {
            let spec = shown(&vm.spec);
            let marked = if vm.fc_marked { "marked" } else { "" };
            let shown = [text(&spec, &["domain"]), text(&spec, &["place"]), marked.to_owned()];
            std::iter::once(vm.vm.clone()).chain(shown).collect()
        };
        section(&title, &["VM", "DOMAIN", "PLACE", "FC"], store.vms.iter().map(vm).collect())?;
        let volume = |v: &inspect::VolumeRow| {
            let wish = match v.removing.as_ref().map(shown) {
                None => "wanted",
                Some(options) if options["force"] == true => "removing by force",
                Some(_) => "removing",
            };
            let spec = shown(&v.spec);
            let mut row = vec![v.vm.clone(), v.volume.clone(), wish.to_owned()];
            row.extend([text(&spec, &["source"]), text(&spec, &["serial"])]);
            row
        };
        let header = ["VM", "VOLUME", "WISH", "SOURCE", "SERIAL"];
        section("Volumes", &header, store.volumes.iter().map(volume).collect())?;
        let identity = |i: &inspect::IdentityRow| {
            vec![i.vm.clone(), i.volume.clone(), i.source.clone(), i.wwid.clone()]
        };
        let header = ["VM", "VOLUME", "SOURCE", "WWID"];
        section("Identities", &header, store.identities.iter().map(identity).collect())?;
        let revision = |r: &inspect::RevisionRow| vec![r.vm.clone(), r.revision.to_string()];
        let rows = store.revisions.iter().map(revision).collect();
        section("Revisions", &["VM", "REVISION"], rows)?;
    }
    let title = format!("Effects in {} (boot {})", found.run_dir.display(), found.boot_id);
    let header = ["FILE", "BOOT", "STEP", "HOST", "DEVICE", "NODE", "GRANT", "DISK"];
    section(&title, &header, found.effects.iter().map(|f| effects(f, &found.boot_id)).collect())?;
    if !found.incoming.is_empty() {
        let rows = found.incoming.iter().map(|f| effects(f, &found.boot_id));
        section("Effects where VMs are to move", &header, rows.collect())?;
    }
    if !found.moves.is_empty() {
        let row = |file: &File<MoveFound>| {
            let value = shown(&file.text);
            let uid = text(&value, &["vm", "place", "pod", "uid"]);
            vec![
                file.name.clone(),
                boot(file, &value, &found.boot_id),
                text(&value, &["until"]),
                uid,
            ]
        };
        let header = ["FILE", "BOOT", "STARTS UNTIL", "MOVES TO POD"];
        section("Starts and moves", &header, found.moves.iter().map(row).collect())?;
    }
    let rows = found.removals.iter().map(|file| {
        let value = shown(&file.text);
        let forced = text(&value, &["options", "force"]);
        vec![file.name.clone(), boot(file, &value, &found.boot_id), forced]
    });
    section("Removals", &["FILE", "BOOT", "FORCE"], rows.collect())?;
    section("Leases", &["FILE", "WHO", "LUN", "WWID", "PATHS", "MAP"], leases(found))?;
    section("Claims", &["FILE", "WHO", "TARGET", "SHAREABLE"], claims(found))?;
    let marks = found.marks.iter().map(|mark| vec![mark.clone()]);
    section("Marks for udev", &["ADDRESS"], marks.collect())
}

/// Of which boot a file is.
fn boot<T>(file: &File<T>, value: &Value, now: &str) -> String {
    let boot = text(value, &["boot_id"]);
    match &file.value {
        Err(_) => "damaged".into(),
        Ok(_) if boot == now => "this".into(),
        Ok(_) => boot,
    }
}

fn effects<T>(file: &File<T>, now: &str) -> Vec<String> {
    let value = shown(&file.text);
    let field = |path: &[&str]| text(&value, path);
    vec![
        file.name.clone(),
        boot(file, &value, now),
        field(&["step"]),
        field(&["host"]),
        field(&["device", "device", "dev"]),
        field(&["node", "dev"]),
        field(&["grant", "cgroup", "path"]),
        field(&["disk", "target"]),
    ]
}

fn leases(found: &Found) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for file in &found.leases {
        let name = file.name.clone();
        let lease = match &file.value {
            Err(error) => {
                rows.push(vec![name, format!("damaged: {error}")]);
                continue;
            }
            Ok(lease) => lease,
        };
        rows.extend(lease.users.iter().map(|u| {
            let wwid = u.wwid.as_ref().map(ToString::to_string);
            vec![
                name.clone(),
                u.owner.to_string(),
                u.lun.map(|lun| lun.to_string()).unwrap_or_default(),
                wwid.unwrap_or_default(),
                u.paths.join(" "),
                u.map.clone().unwrap_or_default(),
            ]
        }));
        if !lease.portals.is_empty() {
            rows.push(vec![name, format!("made: {}", lease.portals.join(" "))]);
        }
    }
    rows
}

fn claims(found: &Found) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for file in &found.claims {
        match &file.value {
            Err(error) => rows.push(vec![file.name.clone(), format!("damaged: {error}")]),
            Ok((_, claims)) => rows.extend(claims.iter().map(|c| {
                let (owner, target) = (c.owner.to_string(), c.target.clone());
                vec![file.name.clone(), owner, target, c.shareable.to_string()]
            })),
        }
    }
    rows
}
