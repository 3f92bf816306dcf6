//! Fibre Channel sources as people write them: `fc://WWPN[,WWPN]/LUN`, and after a `+` each further group of
//! target ports at which the same LUN has another number. Which HBA is to come to which port, and what may be
//! done where no port is seen, come last: `?map=HBA/WWPN[,HBA/WWPN]&wildcard_scan&lip`.

use std::collections::{BTreeMap, BTreeSet};

use super::MAX_TARGETS;
use crate::spec::{FcSource, FcTarget};
use crate::types::{Lun, Malformed, Wwpn};

const RULE: &str = "fc://WWPN[,WWPN]/LUN, e.g. fc://500a0982991b8dc5,500a0982891b8dc5/1 (+WWPN/LUN for ports at which the same LUN has another number; ?map=HBA/WWPN[,HBA/WWPN]&wildcard_scan&lip where HBAs are to be chosen, all may be scanned, or links initialized anew)";

/// Reads a URL. Errors of a part name that part (`WWPN`, `LUN`); anything else is a `source`.
pub(super) fn read(url: &str) -> Result<FcSource, Malformed> {
    let malformed = || Malformed::new("source", url, RULE);
    let (_, rest) = url.split_once("://").ok_or_else(malformed)?;
    let (ports, query) = rest.split_once('?').map_or((rest, None), |(p, query)| (p, Some(query)));
    let mut targets = Vec::new();
    for group in ports.split('+') {
        let (wwpns, lun) = group.split_once('/').ok_or_else(malformed)?;
        let lun: Lun = lun.parse()?;
        for wwpn in wwpns.split(',') {
            targets.push(FcTarget { wwpn: wwpn.parse()?, lun });
        }
    }
    let mut source = FcSource::default();
    let mut seen = Vec::new();
    for part in query.into_iter().flat_map(|query| query.split('&')) {
        let (key, value) = part.split_once('=').map_or((part, None), |(k, v)| (k, Some(v)));
        match (key, value) {
            _ if seen.contains(&key) => return Err(malformed()),
            ("map", Some(pairs)) => source.initiator_targets = map_of(pairs, &malformed)?,
            ("wildcard_scan", None) => source.wildcard_scan = true,
            ("lip", None) => source.lip = true,
            _ => return Err(malformed()),
        }
        seen.push(key);
    }
    fc_source(FcSource { targets, ..source })
}

fn map_of(
    pairs: &str,
    malformed: &dyn Fn() -> Malformed,
) -> Result<BTreeMap<Wwpn, BTreeSet<Wwpn>>, Malformed> {
    let mut map: BTreeMap<Wwpn, BTreeSet<Wwpn>> = BTreeMap::new();
    for pair in pairs.split(',') {
        let (initiator, target) = pair.split_once('/').ok_or_else(malformed)?;
        map.entry(initiator.parse()?).or_default().insert(target.parse()?);
    }
    Ok(map)
}

/// A source as it may be: at least one target port, at most [`MAX_TARGETS`], none twice; a map with one of
/// them.
pub fn fc_source(source: FcSource) -> Result<FcSource, Malformed> {
    let FcSource { targets, initiator_targets: map, .. } = &source;
    if targets.is_empty() {
        return Err(Malformed::new("WWPN", "", "at least one target port"));
    }
    for (n, target) in targets.iter().enumerate() {
        let wwpn = target.wwpn.to_string();
        if targets[..n].iter().any(|other| other.wwpn == target.wwpn) {
            return Err(Malformed::new("WWPN", &wwpn, "each target port once"));
        }
        if n == MAX_TARGETS {
            return Err(Malformed::new("WWPN", &wwpn, "at most 16 target ports"));
        }
    }
    let maps = |t: &FcTarget| map.values().any(|mapped| mapped.contains(&t.wwpn));
    if !map.is_empty() && !targets.iter().any(maps) {
        let mapped: Vec<String> = map.values().flatten().map(Wwpn::to_string).collect();
        let rule = "it has to have one of the source's target ports";
        return Err(Malformed::new("initiator_target_map", &mapped.join(", "), rule));
    }
    Ok(source)
}

/// The URL that reads back as the same source.
pub(super) fn write(source: &FcSource) -> String {
    let mut ports = String::new();
    let mut rest = source.targets.iter().peekable();
    while let Some(target) = rest.next() {
        ports += &target.wwpn.to_string();
        ports += &match rest.peek() {
            Some(next) if next.lun == target.lun => ",".to_owned(),
            Some(_) => format!("/{}+", target.lun),
            None => format!("/{}", target.lun),
        };
    }
    let map = &source.initiator_targets;
    let pairs = map.iter().flat_map(|(hba, to)| to.iter().map(move |to| format!("{hba}/{to}")));
    let pairs: Vec<String> = pairs.collect();
    let mut query = Vec::new();
    if !pairs.is_empty() {
        query.push(format!("map={}", pairs.join(",")));
    }
    query.extend(source.wildcard_scan.then(|| "wildcard_scan".to_owned()));
    query.extend(source.lip.then(|| "lip".to_owned()));
    let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    format!("fc://{ports}{query}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::Source;

    const A: &str = "500a0982991b8dc5";
    const B: &str = "500a0982891b8dc5";

    #[test]
    fn a_url_gives_ports_and_lun_in_any_spelling() {
        let url = "FC://50:0A:09:82:99:1B:8D:C5,0x500a0982891b8dc5/7+500a0982891b8dc6/flat:9";
        let source: Source = url.parse().unwrap();
        let written = format!("fc://{A},{B}/7+500a0982891b8dc6/flat:9");
        assert_eq!(source.to_string(), written);
        let turned: Source = format!("fc://500a0982891b8dc6/flat:9+{B}/7+{A}/7").parse().unwrap();
        assert_eq!(source.key(), turned.key(), "whatever their order");
        let one: Source = format!("fc://{B}/7").parse().unwrap();
        assert_eq!(source.shared_with(&one).as_deref(), Some(&*format!("fc://{B}/7")));
        let iscsi: Source = "iscsi://10.0.0.1/iqn.2001-04.com.example:a/7".parse().unwrap();
        assert_eq!(source.shared_with(&iscsi), None);
    }

    #[test]
    fn hbas_are_chosen_and_more_is_allowed_behind_a_question_mark() {
        let url =
            format!("fc://{A}/7?map=21000024ff3d2e5c/{A},21000024ff3d2e5d/{A}&wildcard_scan&lip");
        let source: Source = url.parse().unwrap();
        let Source::Fc(fc) = &source else { panic!("{source:?}") };
        assert!(fc.wildcard_scan && fc.lip && fc.initiator_targets.len() == 2);
        assert_eq!(source.to_string(), url);
    }

    #[test]
    fn each_wrong_part_is_named() {
        let twice = format!("fc://{A},0x{A}/1");
        for (url, what) in [
            ("fc://", "source"),
            ("fc://500a0982991b8dc5", "source"),
            ("fc:///1", "WWPN"),
            ("fc://500a0982991b8dc/1", "WWPN"),
            ("fc://500a0982991b8dc5,/1", "WWPN"),
            ("fc://500a0982991b8dc5/", "LUN"),
            ("fc://500a0982991b8dc5/1/2", "LUN"),
            ("fc://500a0982991b8dc5/1+", "source"),
            (twice.as_str(), "WWPN"),
            ("fc://500a0982991b8dc5/1?", "source"),
            ("fc://500a0982991b8dc5/1?lip=1", "source"),
            ("fc://500a0982991b8dc5/1?lip&lip", "source"),
            ("fc://500a0982991b8dc5/1?map=21000024ff3d2e5c", "source"),
            ("fc://500a0982991b8dc5/1?map=x/500a0982991b8dc5", "WWPN"),
            (
                "fc://500a0982991b8dc5/1?map=21000024ff3d2e5c/500a0982891b8dc5",
                "initiator_target_map",
            ),
        ] {
            let error = url.parse::<Source>().unwrap_err();
            assert_eq!(error.what, what, "{url}: {error}");
        }
    }

    prop_compose! {
        fn sources()(
            ports in proptest::collection::btree_map(1u64..u64::MAX, 0u64..=16383, 1..9),
            hbas in proptest::collection::vec(1u64..u64::MAX, 0..3),
            wildcard_scan: bool,
            lip: bool,
        ) -> FcSource {
            let wwpn = |n: u64| format!("{n:016x}").parse::<Wwpn>().unwrap();
            let target = |(n, lun): (&u64, &u64)| FcTarget {
                wwpn: wwpn(*n),
                lun: (*lun).try_into().unwrap(),
            };
            let to: BTreeSet<Wwpn> = ports.keys().map(|n| wwpn(*n)).collect();
            FcSource {
                targets: ports.iter().map(target).collect(),
                initiator_targets: hbas.into_iter().map(|n| (wwpn(n), to.clone())).collect(),
                wildcard_scan,
                lip,
            }
        }
    }

    proptest! {
        #[test]
        fn a_source_written_reads_back_the_same(source in sources()) {
            let source = Source::Fc(source);
            prop_assert_eq!(source.to_string().parse::<Source>().unwrap(), source.clone());
            let stored = serde_json::to_string(&source).unwrap();
            prop_assert_eq!(serde_json::from_str::<Source>(&stored).unwrap(), source);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            let _ = format!("fc://{text}").parse::<Source>();
        }
    }
}
