//! A VM's whole set of volumes: whether it is the newest, and what is there beside it. Pure.
//!
//! ```text
//! known revision   none     lower     the same, this set   the same, another   higher
//! a set asked for  accept   accept    ignore (goes on)     deny: reused        deny: outdated
//! ```
//! What of a set is missing, there already or there otherwise, [`super::admit_add`] tells for each volume.

use std::collections::BTreeSet;

use super::{Admission, Known};
use crate::reason::Reason;
use crate::spec::Revision;
use crate::types::VolumeName;
use crate::vm::facade::Refusal;

/// Whether a set is to be made so, where `known` was accepted last.
pub fn admit_set(known: Option<&Revision>, asked: &Revision) -> Result<Admission, Refusal> {
    let Some(known) = known else { return Ok(Admission::Accept) };
    if asked.number > known.number {
        return Ok(Admission::Accept);
    }
    if asked.number < known.number {
        return Err(outdated(asked.number, known.number));
    }
    if asked.asked == known.asked {
        return Ok(Admission::Ignore);
    }
    let message = format!("revision {} was accepted with another set of volumes", known.number);
    Err(Refusal::new(Reason::RevisionReused, message).field("revision"))
}

/// Whether what belongs to revision `of` (`None`: to none) may still be taken on.
pub fn admit_of(known: Option<&Revision>, of: Option<i64>) -> Result<(), Refusal> {
    match (known, of) {
        (Some(known), Some(of)) if of < known.number => Err(outdated(of, known.number)),
        _ => Ok(()),
    }
}

fn outdated(asked: i64, known: i64) -> Refusal {
    let message = format!("revision {asked} is older than {known}, which was accepted already");
    Refusal::new(Reason::RevisionOutdated, message).field("revision")
}

/// The volumes that are there and not in the set, by name: those being removed already and the memory of
/// failed adds as well.
pub fn surplus(known: &[Known], set: &BTreeSet<VolumeName>) -> Vec<VolumeName> {
    let names: BTreeSet<_> = known.iter().map(|k| &k.spec.name).collect();
    names.into_iter().filter(|name| !set.contains(*name)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::{RemoveOptions, Source, VolumeSpec, volume_fixture};
    use crate::types::Lun;
    use crate::vm::plan::{Rules, admit_add, admit_remove};

    fn revision(number: i64, set: &str) -> Revision {
        Revision { number, asked: set.into() }
    }

    #[test]
    fn only_a_newer_set_is_accepted_and_the_same_goes_on() {
        let known = revision(5, "a,b");
        let reason = |asked: &Revision| {
            let refusal = admit_set(Some(&known), asked).unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("revision"));
            (refusal.reason, refusal.message)
        };
        assert_eq!(admit_set(None, &revision(1, "")).unwrap(), Admission::Accept);
        assert_eq!(admit_set(Some(&known), &revision(6, "a,b")).unwrap(), Admission::Accept);
        assert_eq!(admit_set(Some(&known), &known).unwrap(), Admission::Ignore);
        assert_eq!(reason(&revision(5, "a")).0, Reason::RevisionReused);
        for set in ["a,b", "a"] {
            let (reason, message) = reason(&revision(4, set));
            assert_eq!(reason, Reason::RevisionOutdated);
            assert!(message.contains('4') && message.contains('5'), "{message}");
        }
    }

    const RULES: Rules = Rules { max_volumes: 64, ..crate::vm::plan::tests::RULES };

    fn volume(name: u64, lun: u64) -> VolumeSpec {
        let mut spec = volume_fixture(&format!("v{name}"));
        let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
        source.lun = Lun::try_from(lun).unwrap();
        spec
    }

    fn names(set: &[VolumeSpec]) -> BTreeSet<VolumeName> {
        set.iter().map(|spec| spec.name.clone()).collect()
    }

    /// A set in which each name is once, with sources of its own.
    fn any_set() -> impl Strategy<Value = Vec<VolumeSpec>> {
        let one = |(name, other)| volume(name, name + if other { 100 } else { 0 });
        prop::collection::btree_map(0u64..8, any::<bool>(), 0..8)
            .prop_map(move |set| set.into_iter().map(one).collect())
    }

    fn any_known() -> impl Strategy<Value = Vec<Known>> {
        let states = vec![(false, None), (false, Some(RemoveOptions::default())), (true, None)];
        (any_set(), prop::collection::vec(prop::sample::select(states), 8)).prop_map(
            |(set, states)| {
                let known = |(spec, (failed, removing)): (VolumeSpec, _)| Known {
                    spec: spec.into(),
                    failed,
                    removing,
                };
                set.into_iter().zip(states).map(known).collect()
            },
        )
    }

    /// What is there once everything that was taken on has come about.
    fn settled(mut known: Vec<Known>, set: &[VolumeSpec]) -> Vec<Known> {
        let gone = surplus(&known, &names(set));
        for spec in set {
            if let Ok(Admission::Accept) = admit_add(&known, spec, RULES) {
                known.retain(|k| k.spec.name != spec.name);
                known.push(Known { spec: spec.clone().into(), failed: false, removing: None });
            }
        }
        known.retain(|k| k.removing.is_none() && !gone.contains(&k.spec.name));
        known
    }

    proptest! {
        /// Whatever is in the set is never removed, and everything else is.
        #[test]
        fn the_surplus_is_the_difference(known in any_known(), set in any_set()) {
            let (set, gone) = (names(&set), surplus(&known, &names(&set)));
            prop_assert!(gone.is_sorted());
            for k in &known {
                prop_assert_ne!(gone.contains(&k.spec.name), set.contains(&k.spec.name));
                if gone.contains(&k.spec.name) {
                    prop_assert!(admit_remove(Some(k), RemoveOptions::default()).is_some());
                }
            }
            prop_assert!(gone.iter().all(|name| known.iter().any(|k| k.spec.name == *name)));
        }

        /// Asked for often enough, each set comes about but for volumes that are there with another spec,
        /// and then asking again changes nothing.
        #[test]
        fn a_set_comes_about_and_stays(known in any_known(), set in any_set()) {
            let mut now = known;
            for _ in 0..3 {
                now = settled(now, &set);
            }
            prop_assert_eq!(names(&now.iter().map(|k| (*k.spec).clone()).collect::<Vec<_>>()), names(&set));
            prop_assert!(surplus(&now, &names(&set)).is_empty());
            for spec in &set {
                match admit_add(&now, spec, RULES) {
                    Ok(admission) => prop_assert_eq!(admission, Admission::Ignore),
                    Err(refusal) => prop_assert_eq!(refusal.reason, Reason::VolumeExists),
                }
            }
        }

        /// However requests come, what is accepted never goes back, and a set that was accepted is refused
        /// from the next on.
        #[test]
        fn accepted_revisions_only_grow(asked in prop::collection::vec((1i64..6, 0u8..2), 0..20)) {
            let mut known: Option<Revision> = None;
            for (number, set) in asked {
                let asked = Revision { number, asked: vec![set] };
                match admit_set(known.as_ref(), &asked) {
                    Ok(Admission::Accept) => {
                        prop_assert!(known.as_ref().is_none_or(|k| k.number < number));
                        if let Some(before) = known {
                            prop_assert!(admit_of(Some(&asked), Some(before.number)).is_err());
                        }
                        prop_assert!(admit_of(Some(&asked), Some(number)).is_ok());
                        prop_assert!(admit_of(Some(&asked), None).is_ok());
                        known = Some(asked);
                    }
                    Ok(_) => prop_assert_eq!(known.as_ref(), Some(&asked)),
                    Err(_) => prop_assert!(known.as_ref().is_some_and(|k| k.number >= number && *k != asked)),
                }
            }
        }
    }
}
