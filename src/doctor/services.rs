//! Who serves: iscsid and multipathd, which may run on the host, in a container, twice, or not at all.

use super::{Finding, Process, Service, Survey};

pub(super) fn examine(survey: &Survey) -> Vec<Finding> {
    let mut findings = Vec::new();
    for service in Service::ALL {
        findings.extend(served(survey, service));
    }
    findings.push(version(survey));
    findings
}

fn check_of(service: Service) -> &'static str {
    match service {
        Service::Iscsid => "iscsi.service",
        Service::Multipathd => "multipath.service",
    }
}

/// One process of each: a daemon may have several (iscsid has one beside it that writes its log), all in one
/// place.
fn daemons(survey: &Survey, service: Service) -> Vec<&Process> {
    let mut found: Vec<&Process> = Vec::new();
    for process in survey.daemons.iter().filter(|p| p.service == service) {
        if !found.iter().any(|other| other.namespaces == process.namespaces) {
            found.push(process);
        }
    }
    found
}

fn served(survey: &Survey, service: Service) -> Vec<Finding> {
    let check = check_of(service);
    let name = service.name();
    let daemons = daemons(survey, service);
    let mut findings = Vec::new();
    let holders: Vec<_> = survey.listeners.iter().filter(|l| l.service == service).collect();
    if let Some(stranger) = holders.iter().find(|l| !l.trusted) {
        let what = format!(
            "{name}'s socket @{} is held by {} (pid {}) of uid {}, which may not administer this node",
            service.socket(),
            stranger.comm,
            stranger.pid,
            stranger.uid
        );
        let todo = format!("End that process and start {name}; find out who made it.");
        findings.push(Finding::problem(check, what, todo));
    } else if holders.is_empty() {
        findings.push(nobody(survey, service, &daemons));
    }
    if daemons.len() > 1 {
        let pids: Vec<String> = daemons.iter().map(|p| p.pid.to_string()).collect();
        let what = format!("{} of {name} run: pids {}", daemons.len(), pids.join(", "));
        let todo = format!(
            "Let one {name} serve the node: mask the host's units, or stop the container's."
        );
        findings.push(Finding::warning(check, what, todo));
    }
    findings.extend(daemons.iter().flat_map(|process| complete(survey, process)));
    if findings.is_empty() {
        let by = holders.iter().map(|l| format!("{} ({})", l.comm, l.pid)).collect::<Vec<_>>();
        let place = if daemons.iter().any(|p| p.elsewhere) {
            "; its root is not the one here: lunplug uses its programs and files"
        } else {
            ""
        };
        let what = format!("{name} is served by {}{place}", by.join(", "));
        findings.push(Finding::fine(check, what));
    }
    findings
}

fn nobody(survey: &Survey, service: Service, daemons: &[&Process]) -> Finding {
    let check = check_of(service);
    let name = service.name();
    if let Some(elsewhere) = daemons.iter().find(|p| p.namespaces.net != survey.own.net) {
        let what = format!("{name} (pid {}) runs in another network namespace", elsewhere.pid);
        return Finding::problem(check, what, "Run it and lunplugd with hostNetwork: true.");
    }
    let what = format!("nobody listens on {name}'s socket @{}", service.socket());
    match service {
        Service::Iscsid => Finding::problem(
            check,
            what,
            "systemctl enable --now iscsid.socket (Fedora, RHEL, SUSE: iscsid), or start iscsid's container.",
        ),
        Service::Multipathd => Finding::warning(
            check,
            format!("{what}: every volume gets a single path"),
            "Install multipath-tools and systemctl enable --now multipathd.",
        ),
    }
}

/// Whether the daemon has what belongs to it.
fn complete(survey: &Survey, process: &Process) -> Vec<Finding> {
    let check = check_of(process.service);
    let (name, pid) = (process.service.name(), process.pid);
    let mut findings = Vec::new();
    if process.replaced {
        let what =
            format!("{name} (pid {pid}) is older than its program: it was upgraded and runs on");
        let todo = format!("Restart {name}: sessions and maps outlive that.");
        findings.push(Finding::warning(check, what, todo));
    }
    if process.service != Service::Iscsid {
        return findings;
    }
    if process.contained && !survey.host_units.is_empty() {
        let units = survey.host_units.join(" ");
        let what = format!(
            "iscsid (pid {pid}) is in a container, and the host's could be started in its place: {units}"
        );
        let todo = format!("systemctl mask --now {units}, on the host.");
        findings.push(Finding::warning(check, what, todo));
    }
    if !process.elsewhere {
        return findings;
    }
    if !process.has_tool {
        let what = format!("iscsid (pid {pid}) is in a container that has no iscsiadm");
        let todo = "Put iscsid and iscsiadm of one version into its image.";
        findings.push(Finding::problem(check, what, todo));
    }
    if !process.has_initiator_name {
        let what = format!("iscsid (pid {pid}) has no /etc/iscsi/initiatorname.iscsi");
        let todo = "Mount /etc/iscsi with the initiator's name into its container.";
        findings.push(Finding::problem(check, what, todo));
    }
    findings
}

fn version(survey: &Survey) -> Finding {
    let check = "iscsi.version";
    let Some(text) = survey.iscsiadm.as_deref().map(str::trim) else {
        let todo = "Install the package open-iscsi (Fedora, RHEL: iscsi-initiator-utils).";
        return Finding::problem(check, "iscsiadm cannot be asked for its version", todo);
    };
    if text.split_whitespace().last() == Some("2.1.10") {
        let what = format!("{text}: each login of lunplug's hangs until its deadline");
        let todo = "Install open-iscsi 2.1.11 or newer (open-iscsi issue 484).";
        return Finding::warning(check, what, todo);
    }
    Finding::fine(check, text)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{complaints, healthy};
    use super::super::{Listener, Namespaces, Severity};
    use super::*;

    fn only(survey: &Survey) -> Finding {
        let mut found = complaints(survey);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn nobody_serves() {
        let mut survey = healthy();
        survey.listeners.retain(|l| l.service != Service::Iscsid);
        survey.daemons.retain(|p| p.service != Service::Iscsid);
        let found = only(&survey);
        assert_eq!((found.check, found.severity), ("iscsi.service", Severity::Problem));
        assert!(found.what_to_do.contains("iscsid.socket"), "{found:?}");

        let mut survey = healthy();
        survey.listeners.retain(|l| l.service != Service::Multipathd);
        survey.daemons.retain(|p| p.service != Service::Multipathd);
        let found = only(&survey);
        assert_eq!((found.check, found.severity), ("multipath.service", Severity::Warning));
        assert!(found.what.contains("single path"), "{found:?}");
    }

    #[test]
    fn a_daemon_in_another_network_cannot_be_reached() {
        let mut survey = healthy();
        survey.listeners.retain(|l| l.service != Service::Iscsid);
        survey.daemons[0].namespaces = Namespaces { mount: 1, net: 9 };
        assert!(only(&survey).what.contains("(pid 100) runs in another network namespace"));
    }

    #[test]
    fn a_squatter_is_named() {
        let mut survey = healthy();
        survey.listeners = vec![
            Listener {
                service: Service::Multipathd,
                pid: 7,
                uid: 1000,
                comm: "nc".into(),
                trusted: false,
            },
            survey.listeners[0].clone(),
        ];
        let found = only(&survey);
        assert_eq!(found.severity, Severity::Problem);
        assert!(found.what.contains("nc (pid 7) of uid 1000"), "{found:?}");
    }

    #[test]
    fn two_are_one_too_many_and_a_helper_is_none() {
        let mut survey = healthy();
        let helper = Process { pid: 101, ..survey.daemons[0].clone() };
        survey.daemons.push(helper);
        assert_eq!(complaints(&survey), []);

        let elsewhere = Namespaces { net: 9, ..survey.own };
        let second = Process { pid: 300, namespaces: elsewhere, ..survey.daemons[0].clone() };
        survey.daemons.push(second);
        let found = only(&survey);
        assert_eq!(found.severity, Severity::Warning);
        assert!(found.what.contains("pids 100, 300"), "{found:?}");
    }

    #[test]
    fn an_iscsid_in_a_container_needs_what_belongs_to_it() {
        let mut survey = healthy();
        let iscsid = &mut survey.daemons[0];
        iscsid.namespaces.mount = 9;
        iscsid.elsewhere = true;
        assert_eq!(complaints(&survey), [], "lunplug is in the container");
        let told = examine(&survey).into_iter().find(|f| f.check == "iscsi.service");
        assert!(told.is_some_and(|f| f.what.contains("uses its programs and files")));

        survey.daemons[0].has_tool = false;
        survey.daemons[0].has_initiator_name = false;
        let found = complaints(&survey);
        let severities: Vec<_> = found.iter().map(|f| f.severity).collect();
        assert_eq!(severities, [Severity::Problem, Severity::Problem], "{found:?}");
        assert!(found[0].what.contains("no iscsiadm"), "{found:?}");
    }

    #[test]
    fn the_hosts_units_are_masked_where_a_container_serves() {
        let mut survey = healthy();
        survey.daemons[0].contained = true;
        let found = only(&survey);
        assert_eq!(found.severity, Severity::Warning);
        assert!(found.what_to_do.contains("mask --now iscsid.socket iscsid.service"), "{found:?}");
        survey.host_units.clear();
        assert_eq!(complaints(&survey), []);
    }

    #[test]
    fn one_on_the_host_and_one_in_a_container_are_two() {
        let mut survey = healthy();
        let there = Namespaces { mount: 9, ..survey.own };
        let second =
            Process { pid: 300, namespaces: there, elsewhere: true, ..survey.daemons[0].clone() };
        survey.daemons.push(second);
        let found = only(&survey);
        assert!(found.what.contains("pids 100, 300"), "{found:?}");
        assert!(found.what_to_do.contains("mask the host's units"), "{found:?}");
    }

    #[test]
    fn skew_is_told() {
        let mut survey = healthy();
        survey.daemons[0].replaced = true;
        assert!(only(&survey).what_to_do.contains("Restart iscsid"));

        let survey = Survey { iscsiadm: Some("iscsiadm version 2.1.10\n".into()), ..healthy() };
        assert!(only(&survey).what.contains("hangs until its deadline"));
        let survey = Survey { iscsiadm: None, ..healthy() };
        assert_eq!(only(&survey).severity, Severity::Problem);
    }
}
