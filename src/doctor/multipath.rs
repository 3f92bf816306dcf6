//! multipathd's configuration, as it has it (`show config local`: of the built-in devices only those
//! that are here).

use super::{Finding, Survey};

const CHECK: &str = "multipath.config";

/// One setting, with the sections that it is in: `devices`, `device`.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    sections: Vec<String>,
    /// Counts the blocks, for there are many of the name `device`.
    block: usize,
    key: String,
    value: String,
}

/// Reads what multipathd prints: `name {`, `key value` or `key "value"`, `}`.
fn parse(text: &str) -> Vec<Setting> {
    let mut sections: Vec<(String, usize)> = Vec::new();
    let mut blocks = 0;
    let mut settings = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some(name) = line.strip_suffix('{') {
            blocks += 1;
            sections.push((name.trim().to_owned(), blocks));
        } else if line == "}" {
            sections.pop();
        } else if let Some((key, value)) = line.split_once(char::is_whitespace) {
            settings.push(Setting {
                sections: sections.iter().map(|(name, _)| name.clone()).collect(),
                block: sections.last().map_or(0, |(_, block)| *block),
                key: key.to_owned(),
                value: value.trim().trim_matches('"').to_owned(),
            });
        }
    }
    settings
}

pub(super) fn examine(survey: &Survey) -> Vec<Finding> {
    let text = match &survey.multipath {
        // Who serves is another check.
        None => return vec![Finding::fine(CHECK, "multipathd is not there to be asked")],
        Some(Err(why)) => {
            let what = format!("multipathd does not tell its configuration: {why}");
            return vec![Finding::warning(CHECK, what, "See journalctl -u multipathd.")];
        }
        Some(Ok(text)) => text,
    };
    let settings = parse(text);
    let mut findings = Vec::new();
    findings.extend(queues(&settings));
    findings.extend(settings.iter().filter_map(looks_inside));
    findings.extend(settings.iter().filter_map(hides_all));
    if findings.is_empty() {
        findings.push(Finding::fine(CHECK, "nothing in it that would hang or hide a guest's LUN"));
    }
    findings
}

/// Whether a setting lets I/O wait for ever when no path is left.
fn is_endless(setting: &Setting) -> bool {
    match setting.key.as_str() {
        "no_path_retry" => setting.value == "queue",
        "features" => setting.value.contains("queue_if_no_path"),
        _ => false,
    }
}

/// Endless queueing: of `overrides` first, then a device's own, then the default (multipath.conf(5)).
fn queues(settings: &[Setting]) -> Vec<Finding> {
    let of = |section: &str| {
        let mut there = settings.iter().filter(|s| s.sections == [section]);
        there.find(|s| s.key == "no_path_retry").map(is_endless)
    };
    let told = |whose: &str| {
        let what = format!(
            "{whose}: I/O waits for ever when no path is left, and with it the guest, and what removes its disk"
        );
        let todo = "Set no_path_retry to a number of polling intervals in overrides, e.g. 12.";
        Finding::warning(CHECK, what, todo)
    };
    match of("overrides") {
        Some(true) => return vec![told("no_path_retry queue in overrides")],
        Some(false) => return Vec::new(),
        None => {}
    }
    let mut findings = Vec::new();
    if settings.iter().any(|s| s.sections == ["defaults"] && is_endless(s)) {
        findings.push(told("no_path_retry queue in defaults"));
    }
    for endless in settings.iter().filter(|s| s.sections == ["devices", "device"] && is_endless(s))
    {
        let bounded =
            |s: &&Setting| s.block == endless.block && s.key == "no_path_retry" && !is_endless(s);
        // no_path_retry wins over the feature of the same block.
        if settings.iter().any(|s| bounded(&s)) {
            continue;
        }
        let name = |key: &str| {
            let mut block = settings.iter().filter(|s| s.block == endless.block);
            block.find(|s| s.key == key).map_or("any", |s| s.value.as_str()).to_owned()
        };
        let whose = format!("{} for {} {}", endless.key, name("vendor"), name("product"));
        findings.push(told(&whose));
    }
    findings
}

fn looks_inside(setting: &Setting) -> Option<Finding> {
    let partitions = setting.key == "skip_kpartx" && setting.value == "no";
    (partitions && setting.sections == ["defaults"]).then(|| {
        let what = "skip_kpartx no: partition mappings are made over LUNs";
        Finding::warning(CHECK, what, "Set skip_kpartx yes in the section defaults.")
    })
}

fn hides_all(setting: &Setting) -> Option<Finding> {
    let all = matches!(setting.value.as_str(), "*" | ".*" | "^.*");
    let hides = setting.sections == ["blacklist"] && all;
    hides.then(|| {
        let what = format!("the blacklist has every {}: no map is made", setting.key);
        Finding::problem(CHECK, what, "Take it out, or name the LUNs in blacklist_exceptions.")
    })
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::super::tests::{complaints, healthy};
    use super::*;

    fn of(config: &str) -> Vec<(Severity, String)> {
        let survey = Survey { multipath: Some(Ok(config.to_owned())), ..healthy() };
        complaints(&survey).into_iter().map(|f| (f.severity, f.what)).collect()
    }

    const QUEUE_IN_A_DEVICE: &str = "\
defaults {
\tno_path_retry 12
}
devices {
\tdevice {
\t\tvendor \"ACME\"
\t\tproduct \"Array\"
\t\tno_path_retry \"queue\"
\t}
\tdevice {
\t\tvendor \"OTHER\"
\t\tproduct \".*\"
\t\tfeatures \"1 queue_if_no_path\"
\t\tno_path_retry 5
\t}
}
";

    #[test]
    fn settings_are_read_with_their_sections() {
        let read = parse(QUEUE_IN_A_DEVICE);
        assert_eq!(read.len(), 8);
        assert_eq!(read[1].sections, ["devices", "device"]);
        assert_eq!((read[1].key.as_str(), read[1].value.as_str()), ("vendor", "ACME"));
        assert_ne!(read[1].block, read[4].block);
    }

    #[test]
    fn queueing_that_has_no_end_is_told_with_whose_it_is() {
        let found = of(QUEUE_IN_A_DEVICE);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].1.starts_with("no_path_retry for ACME Array"), "{found:?}");
        assert_eq!(of(&format!("{QUEUE_IN_A_DEVICE}overrides {{\n\tno_path_retry 12\n}}\n")), []);
        let all = of(&format!("{QUEUE_IN_A_DEVICE}overrides {{\n\tno_path_retry \"queue\"\n}}\n"));
        assert!(all.len() == 1 && all[0].1.contains("in overrides"), "{all:?}");
        let default = of("defaults {\n\tfeatures \"1 queue_if_no_path\"\n}\n");
        assert!(default[0].1.contains("in defaults"), "{default:?}");
    }

    #[test]
    fn what_makes_no_map_is_a_problem() {
        for config in ["blacklist {\n\twwid \".*\"\n}\n", "blacklist {\n\tdevnode \"*\"\n}\n"] {
            let found = of(config);
            assert!(found.len() == 1 && found[0].0 == Severity::Problem, "{config}: {found:?}");
        }
        assert_eq!(of("blacklist {\n\tdevnode \"^vd\"\n}\n"), []);
        assert_eq!(of("defaults {\n\tskip_kpartx \"no\"\n}\n").len(), 1);
    }

    #[test]
    fn a_multipathd_that_does_not_answer_is_told() {
        let survey = Survey { multipath: Some(Err("timeout".into())), ..healthy() };
        assert!(complaints(&survey)[0].what.contains("timeout"));
        assert_eq!(complaints(&Survey { multipath: None, ..healthy() }), []);
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(defaults|[{} \"\n\ta-z])*") {
            parse(&text);
        }
    }
}
