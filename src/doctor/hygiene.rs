//! What would look into a guest's LUN on the host, and kernel modules.

use super::{Finding, Module, Survey};
use crate::preflight::{SG3_RULES, UDEV_RULE, UDEV_RULE_EARLY, UDEV_RULE_SPARING};

pub(super) fn examine(survey: &Survey) -> Vec<Finding> {
    let mut findings = modules(survey);
    findings.push(lvm(survey));
    findings.push(udev(survey));
    findings
}

fn modules(survey: &Survey) -> Vec<Finding> {
    let missing = survey.modules.iter().filter(|(_, state)| *state == Module::Missing);
    let mut findings: Vec<Finding> = missing
        .map(|(name, _)| {
            let what = format!("the running kernel has no module {name}");
            let todo = "Install the kernel's module package, or boot the kernel that is installed.";
            Finding::problem("modules", what, todo)
        })
        .collect();
    if findings.is_empty() {
        let names: Vec<&str> = survey.modules.iter().map(|(name, _)| *name).collect();
        findings
            .push(Finding::fine("modules", format!("there or to be had: {}", names.join(", "))));
    }
    findings
}

/// The patterns of a filter as `lvmconfig` prints it: `global_filter="r|x|"` or `=["r|x|","a|y|"]`.
fn patterns<'a>(lvm: &'a str, key: &str) -> Vec<&'a str> {
    let value = lvm.lines().find_map(|l| l.trim().strip_prefix(key)?.strip_prefix('='));
    value.map(|v| v.split('"').skip(1).step_by(2).collect()).unwrap_or_default()
}

/// LVM's scans by hand: only with a devices file, or a global filter that rejects our links before it
/// accepts anything (lvm.conf(5): the first pattern that matches any of a device's names counts).
fn lvm(survey: &Survey) -> Finding {
    const CHECK: &str = "lvm";
    let Some(text) = &survey.lvm else { return Finding::fine(CHECK, "LVM is not installed") };
    if text.lines().any(|l| l.trim() == "use_devicesfile=1") {
        return Finding::fine(CHECK, "LVM looks at the devices of its devices file alone");
    }
    let filter = patterns(text, "global_filter");
    let rejects = filter.iter().position(|p| p.starts_with('r') && p.contains("/dev/lunplug/"));
    let accepts = filter.iter().position(|p| p.starts_with('a'));
    match (rejects, accepts) {
        (Some(reject), accept) if accept.is_none_or(|accept| reject < accept) => {
            Finding::fine(CHECK, "LVM's global_filter leaves guests' LUNs alone")
        }
        (Some(_), _) => Finding::warning(
            CHECK,
            "LVM's global_filter accepts before it rejects /dev/lunplug/",
            "Put \"r|^/dev/lunplug/|\" in front of every \"a\" pattern of global_filter.",
        ),
        (None, _) => Finding::warning(
            CHECK,
            "LVM's global_filter does not know guests' LUNs: a vgscan by hand reads them",
            "Install dist/lunplug.lvm.conf as /etc/lvm/lvmlocal.conf (docs/operations.md).",
        ),
    }
}

/// Our rule must run after those that set device-mapper's flags and before the one that probes
/// (13-dm-disk.rules where there is one).
fn udev(survey: &Survey) -> Finding {
    const CHECK: &str = "udev";
    let has = |name: &str| survey.udev_rules.iter().any(|rule| rule.ends_with(name));
    if has("13-dm-disk.rules") && !has(UDEV_RULE_EARLY) {
        let what = "13-dm-disk.rules probes maps before lunplug's rule can keep it from that";
        let todo = format!("Install {UDEV_RULE} as {UDEV_RULE_EARLY}.");
        return Finding::warning(CHECK, what, todo);
    }
    if !has(UDEV_RULE) && !has(UDEV_RULE_EARLY) {
        let todo = format!("Install dist/{UDEV_RULE} on the host, then udevadm control --reload.");
        return Finding::problem(CHECK, "lunplug's udev rule is not installed", todo);
    }
    if !has(UDEV_RULE_SPARING)
        && let Some(sg3) = SG3_RULES.into_iter().find(|name| has(name))
    {
        let what = format!("{sg3} runs six processes for each path of a guest's LUN in vain");
        let todo = format!("Install dist/{UDEV_RULE_SPARING} on the host beside {UDEV_RULE}.");
        return Finding::warning(CHECK, what, todo);
    }
    Finding::fine(CHECK, "lunplug's rules are in their places")
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::super::tests::{complaints, healthy};
    use super::*;

    fn only(survey: &Survey) -> Finding {
        let mut found = complaints(survey);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn a_missing_module_is_named() {
        let mut survey = healthy();
        survey.modules[1].1 = Module::Missing;
        let found = only(&survey);
        assert!(found.severity == Severity::Problem && found.what.contains("dm_multipath"));
    }

    #[test]
    fn lvm_must_reject_before_it_accepts() {
        for (lvm, fine) in [
            (None, true),
            (Some("use_devicesfile=1\n"), true),
            (Some("global_filter=[\"r|^/dev/lunplug/|\",\"a|.*|\"]\n"), true),
            (Some("global_filter=[\"r|^/dev/zd|\",\"r|^/dev/lunplug/|\"]\n"), true),
            (Some("global_filter=[\"a|.*|\",\"r|^/dev/lunplug/|\"]\n"), false),
            (Some("global_filter=[\"a|.*|\"]\nuse_devicesfile=0\n"), false),
            (Some("filter=[\"r|^/dev/lunplug/|\"]\n"), false),
            (Some(""), false),
        ] {
            let survey = Survey { lvm: lvm.map(str::to_owned), ..healthy() };
            assert_eq!(complaints(&survey).is_empty(), fine, "{lvm:?}");
        }
    }

    #[test]
    fn the_rules_order_counts() {
        let rules = |names: &[&str]| Survey {
            udev_rules: names.iter().map(|n| format!("/usr/lib/udev/rules.d/{n}").into()).collect(),
            ..healthy()
        };
        assert_eq!(only(&rules(&[])).severity, Severity::Problem);
        let late = rules(&["59-lunplug.rules", "13-dm-disk.rules"]);
        assert!(only(&late).what_to_do.contains("12-lunplug.rules"));
        assert_eq!(complaints(&rules(&["12-lunplug.rules", "13-dm-disk.rules"])), []);
        let slow = rules(&["59-lunplug.rules", "55-scsi-sg3_id.rules"]);
        assert!(only(&slow).what_to_do.contains("dist/54-lunplug.rules"));
        let quick = ["54-lunplug.rules", "59-lunplug.rules", "55-scsi-sg3_id.rules"];
        assert_eq!(complaints(&rules(&quick)), []);
    }
}
