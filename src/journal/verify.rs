//! What is wrong with the stores, what it means, and what to do. Pure: it judges what was found.
//!
//! ```text
//!   vms ◄── volumes ◄── effects, removals ◄── leases ◄── claims
//!    ▲                   (this boot)          (users)    (wwid)
//!    └── identities
//! ```
//! Each arrow is a reference that has to hold. A lunplugd that works changes one file after the other,
//! so what is wrong for a moment may be work under way: see [`lasting`].

use std::collections::BTreeSet;
use std::fmt::Display;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::inspect::{self, File, Found, Json, StoreFound};
use crate::connector::facts;
use crate::spec::{RemoveOptions, VmSpec, VolumeSpec};
use crate::types::{VmId, VolumeKey, Wwid};

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which file, and which row of it.
    pub place: String,
    /// What is wrong.
    pub problem: String,
    /// What follows from it.
    pub means: String,
    /// What to do; for a note: nothing.
    pub remedy: String,
    /// Worth knowing, and no problem.
    pub note: bool,
}

const DAMAGED_RECORDS: &str =
    "Keep a copy, and see docs/operations.md, damaged records, before anything is deleted.";
const NEXT_START: &str =
    "Nothing: lunplugd undoes it at its next start. Restart it if it runs and this stays.";

/// The findings that are in both looks: what is in one only was work under way.
pub fn lasting(first: Vec<Finding>, second: &[Finding]) -> Vec<Finding> {
    first.into_iter().filter(|f| second.contains(f)).collect()
}

/// Judges everything that was found, or what concerns one VM only.
pub fn verify(found: &Found, only: Option<&VmId>) -> Vec<Finding> {
    let mut judge = Judge { found, only, known: Known::default(), findings: Vec::new() };
    if found.stores.is_empty() {
        judge.problem(
            "the state directory".into(),
            "has no database",
            "lunplugd was never started here, or its state was moved or deleted",
            "Name the right --state-dir; if the state is lost, see docs/operations.md, damaged records.",
        );
    }
    for store in &found.stores {
        judge.store(store);
    }
    judge.effects();
    judge.moves();
    judge.removals();
    judge.leases();
    judge.claims();
    judge.rest();
    judge.findings
}

/// What others may refer to.
#[derive(Default)]
struct Known {
    vms: BTreeSet<VmId>,
    volumes: BTreeSet<VolumeKey>,
    /// With effects of this boot, or damaged ones.
    begun: BTreeSet<VolumeKey>,
    /// With a place in a lease of this boot: whose, and at which target.
    users: BTreeSet<(VolumeKey, String)>,
    /// Leases that could not be read: what refers to them cannot be judged.
    blind: bool,
}

struct Judge<'a> {
    found: &'a Found,
    only: Option<&'a VmId>,
    known: Known,
    findings: Vec<Finding>,
}

impl Judge<'_> {
    fn problem(&mut self, place: String, problem: impl Display, means: &str, remedy: &str) {
        self.push(place, problem, means, remedy, false);
    }

    fn note(&mut self, place: String, problem: impl Display, means: &str) {
        self.push(place, problem, means, "Nothing.", true);
    }

    fn push(
        &mut self,
        place: String,
        problem: impl Display,
        means: &str,
        remedy: &str,
        note: bool,
    ) {
        let (problem, means, remedy) = (problem.to_string(), means.into(), remedy.into());
        self.findings.push(Finding { place, problem, means, remedy, note });
    }

    /// A file of the run directory, as people find it.
    fn file(&self, name: &str) -> String {
        self.found.run_dir.join(name).display().to_string()
    }

    fn skips(&self, vm: &VmId) -> bool {
        self.only.is_some_and(|only| only != vm)
    }

    // ---- the durable store ----------------------------------------------------------------------

    fn store(&mut self, store: &StoreFound) {
        let path = store.path.display().to_string();
        for damage in &store.damage {
            self.problem(
                path.clone(),
                damage,
                "lunplugd does not start with it; guests keep their disks",
                DAMAGED_RECORDS,
            );
        }
        let row = |table: &str, name: &str| format!("{path}: {table} {name}");
        for vm in &store.vms {
            let place = row("vms", &vm.vm);
            let means = "this VM is not served; its volumes stay as they are";
            match self.value::<VmSpec>(&place, &vm.spec, means) {
                Some(spec) if spec.id.to_string() != vm.vm => {
                    let problem = format!("the value is of {}", spec.id);
                    self.problem(place, problem, means, DAMAGED_RECORDS);
                }
                Some(spec) => drop(self.known.vms.insert(spec.id)),
                None => drop(vm.vm.parse().map(|id| self.known.vms.insert(id))),
            }
        }
        for volume in &store.volumes {
            self.volume(store, volume, row("volumes", &format!("{}/{}", volume.vm, volume.volume)));
        }
        for identity in &store.identities {
            let name = format!("{}/{} {}", identity.vm, identity.volume, identity.source);
            let place = row("identities", &name);
            if let Err(error) = identity.wwid.parse::<Wwid>() {
                let means =
                    "this volume cannot be attached: nobody can say whether it is the same LUN";
                self.problem(place.clone(), error, means, DAMAGED_RECORDS);
            }
            if !store.vms.iter().any(|vm| vm.vm == identity.vm) {
                let means = "it is used when a VM of that name is registered again";
                let remedy =
                    "Harmless; delete the row while lunplugd is stopped if it is not meant.";
                self.problem(place, "its VM is not registered", means, remedy);
            }
        }
    }

    fn volume(&mut self, store: &StoreFound, volume: &inspect::VolumeRow, place: String) {
        let means = "no volume of this VM is worked on; guests keep their disks";
        if let Some(spec) = self.value::<VolumeSpec>(&place, &volume.spec, means)
            && spec.name.as_str() != volume.volume
        {
            let problem = format!("the value is of {}", spec.name);
            self.problem(place.clone(), problem, means, DAMAGED_RECORDS);
        }
        if let Some(removing) = &volume.removing {
            self.value::<RemoveOptions>(&place, removing, means);
        }
        if !store.vms.iter().any(|vm| vm.vm == volume.vm) {
            let means = "nobody works on it, for lunplugd goes by VMs";
            let remedy = "Register the VM again with the same particulars, or delete the row while lunplugd is stopped.";
            self.problem(place, "its VM is not registered", means, remedy);
        }
        if let (Ok(vm), Ok(volume)) = (volume.vm.parse(), volume.volume.parse()) {
            self.known.volumes.insert(VolumeKey { vm, volume });
        }
    }

    fn value<T: DeserializeOwned>(&mut self, place: &str, json: &Json, means: &str) -> Option<T> {
        match serde_json::from_str(&json.0) {
            Ok(value) => Some(value),
            Err(error) => {
                let problem = format!("the value cannot be read: {error}");
                self.problem(place.to_owned(), problem, means, DAMAGED_RECORDS);
                None
            }
        }
    }

    // ---- the run directory ----------------------------------------------------------------------

    /// What a file says, if it is of this boot; what is wrong with it is told.
    fn current<'f, T>(
        &mut self,
        file: &'f File<T>,
        boot_of: impl Fn(&T) -> &str,
        means: &str,
    ) -> Option<&'f T> {
        let place = self.file(&file.name);
        match &file.value {
            Err(error) => {
                let problem = format!("it cannot be read: {error}");
                self.problem(place, problem, means, DAMAGED_RECORDS);
                None
            }
            Ok(value) if boot_of(value) != self.found.boot_id => {
                self.note(
                    place,
                    "it is of an earlier boot",
                    "it is void: that boot's end undid it",
                );
                None
            }
            Ok(value) => Some(value),
        }
    }

    /// The volume that a file's name says.
    fn named<T>(&mut self, file: &File<T>) -> Option<VolumeKey> {
        let key = inspect::volume_of(&file.name);
        if key.is_none() {
            let place = self.file(&file.name);
            let means = "lunplugd does not look at it";
            self.problem(place, "its name is no volume's", means, "Move it away.");
        }
        key
    }

    /// Whether a VM is of a lunplugd whose store was not looked at.
    fn elsewhere(&mut self, vm: &VmId, place: &str) -> bool {
        let theirs = !self.known.vms.contains(vm) && self.found.served.contains(&vm.to_string());
        if theirs {
            let means = "its store was not looked at, so this was not compared with it";
            self.note(place.to_owned(), format!("another lunplugd serves {vm}"), means);
        }
        theirs
    }

    fn effects(&mut self) {
        let found = self.found;
        for file in &found.effects {
            let Some(key) = self.named(file) else { continue };
            if self.skips(&key.vm) {
                continue;
            }
            let means =
                "lunplugd does not know what was done for this volume, and leaves it as it is";
            let place = self.file(&file.name);
            let effects = self.current(file, |e| e.boot_id(), means);
            if effects.is_some() || file.value.is_err() {
                self.known.begun.insert(key.clone());
            }
            let Some(effects) = effects else { continue };
            if effects.spec.name != key.volume {
                let problem = format!("it is of volume {}", effects.spec.name);
                self.problem(place.clone(), problem, means, DAMAGED_RECORDS);
            }
            if !self.known.volumes.contains(&key) && !self.elsewhere(&key.vm, &place) {
                let means = "something was done for it in this boot, and nobody wants it";
                let remedy = match self.known.vms.contains(&key.vm) {
                    true => NEXT_START,
                    false => {
                        "Register the VM again: lunplugd then undoes it. Or name its store with --vm or --state-dir."
                    }
                };
                self.problem(place, "no such volume is wanted", means, remedy);
            }
        }
    }

    fn moves(&mut self) {
        let found = self.found;
        for file in &found.moves {
            let means = "lunplugd does not know whether the VM was about to start or to move, and leaves it unserved";
            let _ = self.current(file, |m| &m.boot_id, means);
        }
        for file in &found.incoming {
            let means =
                "lunplugd does not know what was done for this volume where its VM is to move";
            let _ = self.current(file, |e| e.boot_id(), means);
        }
    }

    fn removals(&mut self) {
        let found = self.found;
        for file in &found.removals {
            let Some(key) = self.named(file) else { continue };
            if self.skips(&key.vm) {
                continue;
            }
            let means =
                "lunplugd does not know whether the volume is to go, and leaves its VM unserved";
            if self.current(file, |r| &r.boot_id, means).is_none() {
                continue;
            }
            let place = self.file(&file.name);
            let gone = !self.known.volumes.contains(&key) && !self.known.begun.contains(&key);
            if gone && !self.elsewhere(&key.vm, &place) {
                let means = "the mark of a removal that is done; it would take a new volume of that name away at the next start";
                self.problem(place, "there is no such volume", means, NEXT_START);
                continue;
            }
            let key = key.to_string();
            let wanted = |s: &StoreFound| {
                let row = s.volumes.iter().find(|v| format!("{}/{}", v.vm, v.volume) == key);
                row.is_some_and(|v| v.removing.is_none())
            };
            if found.stores.iter().any(wanted) {
                let means = "the durable store took no writes then; a reboot before the removal is done would bring the volume back";
                self.note(place, "the removal is noted here only", means);
            }
        }
    }

    fn leases(&mut self) {
        let found = self.found;
        let mut made = Vec::new();
        for file in &found.leases {
            let means = if facts::is_users(&file.name) {
                "the volume that it is of cannot be detached, nor the sessions of its target ended; the guest keeps its disk"
            } else {
                "no volume of this target can be attached or detached; guests keep their disks"
            };
            self.known.blind |= file.value.is_err();
            let Some(lease) = self.current(file, |l| &l.boot_id, means) else { continue };
            let place = self.file(&file.name);
            if lease.file != file.name {
                let problem = format!("what is in it belongs in {}", self.file(&lease.file));
                self.problem(place.clone(), problem, means, DAMAGED_RECORDS);
            }
            for user in &lease.users {
                self.known.users.insert((user.owner.clone(), lease.target.clone()));
                if self.skips(&user.owner.vm) {
                    continue;
                }
                self.user(&place, user);
            }
            if !lease.portals.is_empty() {
                made.push((place, lease));
            }
        }
        for (place, lease) in made {
            if !self.known.users.iter().any(|(_, target)| *target == lease.target) {
                let problem =
                    format!("nobody uses it, but lunplug has made {}", lease.portals.join(", "));
                let means = "records or sessions at these portals that nobody needs";
                self.problem(place, problem, means, NEXT_START);
            }
        }
    }

    fn user(&mut self, place: &str, user: &facts::UserFacts) {
        let owner = &user.owner;
        if !self.known.begun.contains(owner) && !self.known.volumes.contains(owner) {
            if self.elsewhere(&owner.vm, place) {
                return;
            }
            let means = "paths and sessions are kept for a volume that there is not";
            let remedy = "Add that volume again and remove it: that takes them down.";
            self.problem(place.to_owned(), format!("{owner} is nobody's"), means, remedy);
        }
        let Some(wwid) = &user.wwid else { return };
        let name = facts::claims_file(wwid);
        let claims = self.found.claims.iter().find(|c| c.name == name);
        let claimed = match claims.map(|c| &c.value) {
            None => false,
            Some(Ok((_, all))) => all.iter().any(|c| c.owner == *owner),
            Some(Err(_)) => true, // Told as damaged.
        };
        if !claimed {
            let place = format!("{place}: {owner}");
            let problem = format!("it has {wwid} without a claim in {}", self.file(&name));
            let means = "another volume could be given the same LUN by another target";
            self.problem(
                place,
                problem,
                means,
                "Remove the volume when it can be spared, and add it again: that claims it.",
            );
        }
    }

    fn claims(&mut self) {
        let found = self.found;
        for file in &found.claims {
            let means =
                "no volume with this LUN can be attached or detached; guests keep their disks";
            let Some((_, claims)) = self.current(file, |c| &c.0, means) else { continue };
            let place = self.file(&file.name);
            for claim in claims.iter().filter(|_| !self.known.blind) {
                let user = (claim.owner.clone(), claim.target.clone());
                if self.skips(&claim.owner.vm) || self.known.users.contains(&user) {
                    continue;
                }
                let problem = format!("{} has no lease at {}", claim.owner, claim.target);
                let means = "a detach that was cut short left it; it is void";
                self.findings.push(Finding {
                    place: place.clone(),
                    problem,
                    means: means.into(),
                    remedy: "Nothing: the next volume with this LUN takes it away.".into(),
                    note: false,
                });
            }
            if claims.len() > 1 && !claims.iter().all(|c| c.shareable) {
                let owners: Vec<_> = claims.iter().map(|c| c.owner.to_string()).collect();
                let problem = format!("not shareable, and claimed by {}", owners.join(", "));
                let means = "two guests may write to one LUN";
                let remedy = "Remove one of these volumes at once, and check its data.";
                self.problem(place, problem, means, remedy);
            }
        }
    }

    fn rest(&mut self) {
        for name in &self.found.others {
            let place = self.file(name);
            self.note(
                place,
                "not a file of lunplug's, or one that was being written",
                "a killed process left it",
            );
        }
    }
}
