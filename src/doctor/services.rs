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

/// One process of each: a daemon may have several (iscsid has one beside it that writes its log), and only
/// one can listen in a network namespace.
fn daemons(survey: &Survey, service: Service) -> Vec<&Process> {
    let mut found: Vec<&Process> = Vec::new();
    for process in survey.daemons.iter().filter(|p| p.service == service) {
        if !found.iter().any(|other| other.namespaces.net == process.namespaces.net) {
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
    if let Some(stranger) = holders.iter().find(|l| l.uid != 0) {
        let what = format!(
            "{name}'s socket @{} is held by {} (pid {}) of uid {}: lunplug would speak to it",
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
        let todo =
            format!("Let one {name} serve the node: stop the one on the host or the container's.");
        findings.push(Finding::warning(check, what, todo));
    }
    findings.extend(daemons.iter().flat_map(|process| same_world(survey, process)));
    if findings.is_empty() {
        let by = holders.iter().map(|l| format!("{} ({})", l.comm, l.pid)).collect::<Vec<_>>();
        findings.push(Finding::fine(check, format!("{name} is served by {}", by.join(", "))));
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

/// Whether the daemon is the one that its files on this side are of.
fn same_world(survey: &Survey, process: &Process) -> Vec<Finding> {
    let check = check_of(process.service);
    let (name, pid) = (process.service.name(), process.pid);
    let mut findings = Vec::new();
    if process.replaced {
        let what =
            format!("{name} (pid {pid}) is older than its program: it was upgraded and runs on");
        let todo = format!("Restart {name}: sessions and maps outlive that.");
        findings.push(Finding::warning(check, what, todo));
    }
    if process.service != Service::Iscsid || process.namespaces.mount == survey.own.mount {
        return findings;
    }
    if process.same_initiator == Some(false) {
        let what = format!("iscsid (pid {pid}) has another /etc/iscsi than lunplugd");
        let todo = "Mount the same /etc/iscsi and /var/lib/iscsi into both containers.";
        findings.push(Finding::problem(check, what, todo));
    }
    if process.same_iscsiadm == Some(false) {
        let what = format!("the iscsiadm here is not of the same build as iscsid (pid {pid})");
        let todo =
            "Use the same version of open-iscsi in both: a wrong pair can hang on every call.";
        findings.push(Finding::warning(check, what, todo));
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
            Listener { service: Service::Multipathd, pid: 7, uid: 1000, comm: "nc".into() },
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
    fn skew_is_told() {
        let mut survey = healthy();
        survey.daemons[0].replaced = true;
        assert!(only(&survey).what_to_do.contains("Restart iscsid"));

        let mut survey = healthy();
        survey.daemons[0].same_initiator = Some(false);
        survey.daemons[0].same_iscsiadm = Some(false);
        assert_eq!(complaints(&survey), [], "in the same mount namespace there is one of each");
        survey.daemons[0].namespaces.mount = 9;
        let found = complaints(&survey);
        let severities: Vec<_> = found.iter().map(|f| f.severity).collect();
        assert_eq!(severities, [Severity::Problem, Severity::Warning], "{found:?}");

        let survey = Survey { iscsiadm: Some("iscsiadm version 2.1.10\n".into()), ..healthy() };
        assert!(only(&survey).what.contains("hangs until its deadline"));
        let survey = Survey { iscsiadm: None, ..healthy() };
        assert_eq!(only(&survey).severity, Severity::Problem);
    }
}
