//! Requests about many volumes of one VM: each volume has a result of its own.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use prost::Message as _;

use super::service::{Service, split};
use super::status::{self, malformed};
use super::{convert, v1};
use crate::reason::Reason;
use crate::spec::{AddOptions, RemoveOptions, Revision, VolumeSpec};
use crate::types::{Malformed, VmId, VolumeName};
use crate::vm::facade::{Answer, Refusal, Set, Wish};

/// Where a volume's spec is in an entry of a request.
const SPEC: &str = ".spec";

impl Service {
    pub(super) async fn add_many(
        &self,
        request: v1::AddVolumesRequest,
    ) -> Result<v1::AddVolumesResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let names = names(&request.volumes);
        self.check(&names, ".spec.name")?;
        let entries = self.entries(&vm, request.volumes, request.dry_run).await;
        let (entries, rest) = parted(entries);
        let wish = |(spec, options)| Wish::Add { spec: Box::new(spec), options };
        let wishes = entries.into_iter().map(wish).collect();
        let answers = self.volumes.change_volumes(&vm, wishes).await?;
        let results = results(&names, merged(rest, answers), SPEC);
        Ok(v1::AddVolumesResponse { results })
    }

    pub(super) async fn remove_many(
        &self,
        request: v1::RemoveVolumesRequest,
    ) -> Result<v1::RemoveVolumesResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        self.check(&request.volumes, "")?;
        let options = RemoveOptions { force: request.force, dry_run: request.dry_run };
        let wish = |name: &String| {
            let key = convert::volume_key(request.vm.as_ref(), name)?;
            Ok(Wish::Remove { name: key.volume, options })
        };
        let (wishes, rest) = parted(request.volumes.iter().map(wish).collect());
        let answers = self.volumes.change_volumes(&vm, wishes).await?;
        let results = results(&request.volumes, merged(rest, answers), "");
        Ok(v1::RemoveVolumesResponse { results })
    }

    pub(super) async fn sync(
        &self,
        request: v1::SyncVolumesRequest,
    ) -> Result<v1::SyncVolumesResponse, Refusal> {
        let vm = convert::vm_id("vm", request.vm.as_ref())?;
        let names = names(&request.volumes);
        self.check(&names, ".spec.name")?;
        let revision = revision(request.revision, &request.volumes)?;
        let mut others = readable(&names)?;
        let entries = self.entries(&vm, request.volumes, request.dry_run).await;
        let (volumes, rest) = parted(entries);
        for (spec, _) in &volumes {
            others.remove(&spec.name);
        }
        let removals = RemoveOptions { force: request.force, dry_run: request.dry_run };
        let set = Set { revision, volumes, others, removals };
        let synced = self.volumes.sync_volumes(&vm, set).await?;
        let removed = synced.removed.into_iter();
        Ok(v1::SyncVolumesResponse {
            volumes: results(&names, merged(rest, synced.volumes), SPEC),
            removed: removed.map(|(name, answer)| result(name.as_str(), unasked(answer))).collect(),
        })
    }

    /// Checks a list of volumes as such: how many they are, and that no name is there twice. `place` is that
    /// of the name in an entry.
    fn check(&self, names: &[String], place: &str) -> Result<(), Refusal> {
        let (many, most) = (names.len(), self.volumes.max_batch());
        if many > most {
            let message = format!(
                "volumes: the request has {many}, and may have {most} (limits.max_volumes_per_vm)"
            );
            return Err(Refusal::new(Reason::LimitReached, message).field("volumes"));
        }
        let mut seen = BTreeMap::new();
        for (n, name) in names.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
            if let Some(before) = seen.insert(name, n) {
                let field = format!("volumes[{n}]{place}");
                let rule = "a name that no other volume of the request has";
                let error = Malformed::new("volume", name, rule);
                let Refusal { message, .. } = malformed(&field, &error);
                let message = format!("{message} (volumes[{before}] has it)");
                return Err(Refusal::new(Reason::InvalidOption, message).field(field));
            }
        }
        Ok(())
    }

    /// Reads the volumes of a request, side by side: names of portals may have to be resolved.
    async fn entries(
        &self,
        vm: &VmId,
        entries: Vec<v1::VolumeEntry>,
        dry_run: bool,
    ) -> Vec<Result<(VolumeSpec, AddOptions), Refusal>> {
        join_all(entries.into_iter().map(|entry| self.wanted(vm, entry, dry_run))).await
    }
}

/// The volumes' names as they were written.
fn names(entries: &[v1::VolumeEntry]) -> Vec<String> {
    let name = |entry: &v1::VolumeEntry| entry.spec.as_ref().map(|spec| spec.name.clone());
    entries.iter().map(|entry| name(entry).unwrap_or_default()).collect()
}

/// The names of a set, each of which must be one: what is not in the set is removed.
fn readable(names: &[String]) -> Result<BTreeSet<VolumeName>, Refusal> {
    let name = |(n, name): (usize, &String)| {
        name.parse().map_err(|error| malformed(format!("volumes[{n}].spec.name"), &error))
    };
    names.iter().enumerate().map(name).collect()
}

/// Which set it is: its volumes as they are written, in the order of their names. Not of it are credentials
/// and options, which may be others when it is asked for again; nor what only answers have.
fn revision(number: u64, entries: &[v1::VolumeEntry]) -> Result<Revision, Refusal> {
    let number = i64::try_from(number).ok().filter(|number| *number > 0).ok_or_else(|| {
        let rule = "a number from 1 to 9223372036854775807, higher than that of the set before";
        malformed("revision", &Malformed::new("revision", &number.to_string(), rule))
    })?;
    let mut specs: Vec<_> = entries.iter().filter_map(|entry| entry.spec.clone()).collect();
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    let mut asked = Vec::new();
    for mut spec in specs {
        // A map is written in any order.
        spec.resolved_portals.clear();
        asked.extend(spec.encode_length_delimited_to_vec());
    }
    Ok(Revision { number, asked })
}

/// What could be read of a request's entries, and for each of them why it could not.
fn parted<T>(entries: Vec<Result<T, Refusal>>) -> (Vec<T>, Vec<Result<(), Refusal>>) {
    let mut read = Vec::new();
    let rest = entries.into_iter().map(|entry| entry.map(|entry| read.push(entry))).collect();
    (read, rest)
}

/// The answers about all entries, in their order.
fn merged(rest: Vec<Result<(), Refusal>>, answers: Vec<Answer>) -> Vec<Answer> {
    let mut answers = answers.into_iter();
    let lost = || Err(Refusal::new(Reason::Internal, "there is no answer about this volume"));
    let answer =
        |entry: Result<(), Refusal>| entry.and_then(|()| answers.next().unwrap_or_else(lost));
    rest.into_iter().map(answer).collect()
}

fn results(names: &[String], answers: Vec<Answer>, spec: &str) -> Vec<v1::VolumeResult> {
    let of_entry = |n, answer: Answer| answer.map_err(|refusal| in_entry(refusal, n, spec));
    let all = names.iter().zip(answers).enumerate();
    all.map(|(n, (name, answer))| result(name, of_entry(n, answer))).collect()
}

pub(super) fn result(name: &str, answer: Answer) -> v1::VolumeResult {
    let name = name.to_owned();
    match answer {
        Ok(outcome) => {
            let (volume, changed) = split(outcome);
            let volume = Some(convert::wire_volume(&volume));
            v1::VolumeResult { name, volume, changed, error: None }
        }
        Err(refusal) => {
            let (reason, field) = (refusal.reason.code(), refusal.field.as_deref());
            tracing::info!(volume = name, reason, field, "refused: {refusal}");
            let error = Some(status::error(&refusal));
            v1::VolumeResult { name, volume: None, changed: false, error }
        }
    }
}

/// The same refusal with the field of the n-th entry, in which the volume is at `spec`.
fn in_entry(mut refusal: Refusal, n: usize, spec: &str) -> Refusal {
    let Some(field) = refusal.field.take() else { return refusal };
    let place = match field.strip_prefix("volume") {
        Some(rest) if rest.is_empty() || rest.starts_with('.') => {
            format!("volumes[{n}]{spec}{rest}")
        }
        _ if field.starts_with("chap") => format!("volumes[{n}].{field}"),
        _ => return refusal.field(field),
    };
    // Many a message begins with its field.
    let rest = refusal.message.strip_prefix(&field);
    if let Some(rest) = rest.filter(|rest| rest.starts_with([':', ' '])) {
        refusal.message = format!("{place}{rest}");
    }
    refusal.field(place)
}

/// A refusal about a volume that the request does not name: none of its fields is to blame but the revision.
fn unasked(answer: Answer) -> Answer {
    answer.map_err(|refusal| Refusal {
        field: refusal.field.filter(|field| field == "revision"),
        ..refusal
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(name: &str, serial: &str) -> v1::VolumeEntry {
        let (name, serial) = (name.to_owned(), serial.to_owned());
        let spec = v1::VolumeSpec { name, serial, ..v1::VolumeSpec::default() };
        v1::VolumeEntry { spec: Some(spec), ..v1::VolumeEntry::default() }
    }

    #[test]
    fn a_field_of_an_entry_is_named_by_its_place() {
        for (field, message, spec, there, words) in [
            (
                "volume.serial",
                "volume.serial: no",
                SPEC,
                "volumes[3].spec.serial",
                "volumes[3].spec.serial: no",
            ),
            (
                "volume",
                "volume is missing: give it",
                SPEC,
                "volumes[3].spec",
                "volumes[3].spec is missing: give it",
            ),
            (
                "volume.source",
                "iscsi://x is attached",
                SPEC,
                "volumes[3].spec.source",
                "iscsi://x is attached",
            ),
            (
                "chap.password",
                "chap.password: no",
                SPEC,
                "volumes[3].chap.password",
                "volumes[3].chap.password: no",
            ),
            ("volume", "volume: no", "", "volumes[3]", "volumes[3]: no"),
            ("volume", "volumes are many", "", "volumes[3]", "volumes are many"),
            ("revision", "revision 3 is older", SPEC, "revision", "revision 3 is older"),
        ] {
            let refusal = Refusal::new(Reason::InvalidOption, message).field(field);
            let refusal = in_entry(refusal, 3, spec);
            assert_eq!((refusal.field.as_deref(), refusal.message.as_str()), (Some(there), words));
        }
        let none = Refusal::new(Reason::LimitReached, "volume: full");
        assert_eq!(in_entry(none.clone(), 3, SPEC), none);
    }

    #[test]
    fn a_revision_is_a_positive_number() {
        for number in [0, u64::MAX, 1 << 63] {
            let refusal = revision(number, &[]).unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("revision"));
            assert!(refusal.message.contains(&number.to_string()), "{refusal}");
        }
        assert_eq!(revision((1 << 63) - 1, &[]).unwrap().number, i64::MAX);
    }

    #[test]
    fn credentials_and_options_make_no_other_set() {
        let asked = |entry: v1::VolumeEntry| revision(1, &[entry]).unwrap();
        let mut other = entry("a", "s");
        other.accept_new_identity = true;
        let mut chap = v1::ChapCredentials::default();
        chap.password = "hush".into();
        other.chap = Some(chap);
        other
            .spec
            .as_mut()
            .unwrap()
            .resolved_portals
            .insert("san:3260".into(), "10.0.0.1:3260".into());
        assert_eq!(asked(other), asked(entry("a", "s")));
        assert_ne!(asked(entry("a", "t")), asked(entry("a", "s")));
    }

    proptest! {
        /// The same volumes in any order are the same set, and no other volumes are.
        #[test]
        fn a_set_is_its_volumes(
            set in prop::collection::btree_map("[a-c]{1,2}", "[a-c]{0,2}", 0..6),
            other in prop::collection::btree_map("[a-c]{1,2}", "[a-c]{0,2}", 0..6),
        ) {
            let entries = |set: &BTreeMap<String, String>| -> Vec<_> {
                set.iter().map(|(name, serial)| entry(name, serial)).collect()
            };
            let asked = revision(1, &entries(&set)).unwrap();
            let mut turned = entries(&set);
            turned.reverse();
            prop_assert_eq!(&revision(1, &turned).unwrap(), &asked);
            prop_assert_eq!(revision(1, &entries(&other)).unwrap() == asked, set == other);
        }

        /// Each entry has its own answer, whichever of them could be read.
        #[test]
        fn answers_go_to_their_entries(readable in prop::collection::vec(any::<bool>(), 0..10)) {
            let refusal = |n: usize| Refusal::new(Reason::InvalidOption, n.to_string());
            let entries = readable.iter().enumerate();
            let entries = entries.map(|(n, read)| if *read { Ok(n) } else { Err(refusal(n)) }).collect();
            let (read, rest) = parted(entries);
            let answers = read.into_iter().map(|n| Err(refusal(n))).collect();
            for (n, answer) in merged(rest, answers).into_iter().enumerate() {
                prop_assert_eq!(answer.unwrap_err(), refusal(n));
            }
        }
    }
}
