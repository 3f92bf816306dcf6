//! `lunplug doctor`: what on this node would hurt hot-plugged volumes, found before it does.
//!
//! A [`Survey`] is what was seen (see [`crate::host::survey`]); [`examine`] judges it, and is pure.

mod fc;
mod hygiene;
mod multipath;
mod services;

use std::path::PathBuf;

use serde::Serialize;

/// What was seen of the node.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// What lunplugd would not start without, a line each.
    pub lacks: Vec<String>,
    /// The namespaces of whoever looked.
    pub own: Namespaces,
    /// Who listens on the sockets of iscsid and multipathd, as far as this network namespace shows.
    pub listeners: Vec<Listener>,
    /// All processes of iscsid and multipathd.
    pub daemons: Vec<Process>,
    /// The host's units of iscsid that could be started.
    pub host_units: Vec<&'static str>,
    /// What `iscsiadm --version` printed.
    pub iscsiadm: Option<String>,
    /// multipathd's own word on its configuration; why there is none.
    pub multipath: Option<Result<String, String>>,
    /// What `lvmconfig` printed of the filters; `None` without LVM.
    pub lvm: Option<String>,
    /// Kernel modules, and whether they can be had.
    pub modules: Vec<(&'static str, Module)>,
    /// Fibre Channel HBAs: name of the port, and its state.
    pub hbas: Vec<(String, String)>,
    /// What they see of target ports.
    pub remote_ports: Vec<RemotePort>,
    /// When the kernel scans by itself (`scsi_mod.scan`); empty where that is not known.
    pub scsi_scan: String,
    /// udev's rules of the names that matter.
    pub udev_rules: Vec<PathBuf>,
}

/// A Fibre Channel target port, as one HBA sees it; all as sysfs has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RemotePort {
    /// `rport-H:B-R`.
    pub name: String,
    /// Its WWPN.
    pub wwpn: String,
    /// `port_state`.
    pub state: String,
    /// After how many seconds of its absence its devices are removed.
    pub dev_loss_tmo: String,
    /// After how many seconds of its absence I/O by it fails, so that another path is tried; `off` where that
    /// is not before `dev_loss_tmo`.
    pub fast_io_fail_tmo: String,
}

/// Inode numbers of namespaces; 0 where they could not be read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Mounts.
    pub mount: u64,
    /// Network, abstract sockets and netlink among it.
    pub net: u64,
}

/// A daemon that lunplug relies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// open-iscsi's.
    Iscsid,
    /// multipath-tools'.
    Multipathd,
}

impl Service {
    /// All.
    pub const ALL: [Self; 2] = [Self::Iscsid, Self::Multipathd];

    /// The name of its process.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iscsid => "iscsid",
            Self::Multipathd => "multipathd",
        }
    }

    /// The abstract socket that it listens on, without the leading NUL.
    pub const fn socket(self) -> &'static str {
        match self {
            Self::Iscsid => "ISCSIADM_ABSTRACT_NAMESPACE",
            Self::Multipathd => "/org/kernel/linux/storage/multipathd",
        }
    }
}

/// A listening socket, and a process that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Whose socket it is by its name.
    pub service: Service,
    /// The process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its name.
    pub comm: String,
    /// It is root and may administer the node; whoever may not is not spoken to.
    pub trusted: bool,
}

/// A daemon's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Which.
    pub service: Service,
    /// Its number.
    pub pid: i32,
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Its program's file was replaced since it was started.
    pub replaced: bool,
    /// Its root is not that of whoever looked: it is in a container, or lunplug is.
    pub elsewhere: bool,
    /// Its root is not the host's.
    pub contained: bool,
    /// Beneath its root is the program that lunplug runs for it.
    pub has_tool: bool,
    /// Beneath its root is the initiator's name.
    pub has_initiator_name: bool,
}

/// Whether a kernel module can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    /// It is there.
    Loaded,
    /// It would be loaded when it is needed.
    Available,
    /// The kernel has none.
    Missing,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Fine,
    /// It works, and will hurt one day.
    Warning,
    /// It does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; stable.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// What to do about it; empty when all is well.
    pub what_to_do: String,
}

impl Finding {
    fn fine(check: &'static str, what: impl Into<String>) -> Self {
        let severity = Severity::Fine;
        Self { check, severity, what: what.into(), what_to_do: String::new() }
    }

    fn warning(check: &'static str, what: impl Into<String>, todo: impl Into<String>) -> Self {
        let severity = Severity::Warning;
        Self { check, severity, what: what.into(), what_to_do: todo.into() }
    }

    fn problem(check: &'static str, what: impl Into<String>, todo: impl Into<String>) -> Self {
        let severity = Severity::Problem;
        Self { check, severity, what: what.into(), what_to_do: todo.into() }
    }
}

/// Judges what was seen: at least one finding of each thing that was looked at.
pub fn examine(survey: &Survey) -> Vec<Finding> {
    let mut findings = start(survey);
    findings.extend(services::examine(survey));
    findings.extend(multipath::examine(survey));
    findings.extend(fc::examine(survey));
    findings.extend(hygiene::examine(survey));
    findings
}

/// What lunplugd itself asks for at its start.
fn start(survey: &Survey) -> Vec<Finding> {
    if survey.lacks.is_empty() {
        return vec![Finding::fine("start", "lunplugd has all that it needs to start")];
    }
    // Each line says what to do, too.
    let lack = |line: &String| Finding::problem("start", "lunplugd would not start", line.clone());
    survey.lacks.iter().map(lack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node with nothing to complain of.
    pub(super) fn healthy() -> Survey {
        let own = Namespaces { mount: 1, net: 2 };
        let daemon = |service, pid| Process {
            service,
            pid,
            namespaces: own,
            replaced: false,
            elsewhere: false,
            contained: false,
            has_tool: true,
            has_initiator_name: true,
        };
        let listener = |service: Service, pid, comm: &str| Listener {
            service,
            pid,
            uid: 0,
            comm: comm.to_owned(),
            trusted: true,
        };
        Survey {
            lacks: Vec::new(),
            own,
            listeners: vec![
                listener(Service::Iscsid, 1, "systemd"),
                listener(Service::Iscsid, 100, "iscsid"),
                listener(Service::Multipathd, 200, "multipathd"),
            ],
            daemons: vec![daemon(Service::Iscsid, 100), daemon(Service::Multipathd, 200)],
            host_units: vec!["iscsid.socket", "iscsid.service"],
            iscsiadm: Some("iscsiadm version 2.1.11".into()),
            multipath: Some(Ok("defaults {\n\tfind_multipaths \"off\"\n\tno_path_retry 12\n\tskip_kpartx \"yes\"\n}\n".into())),
            lvm: Some("global_filter=\"r|^/dev/lunplug/|\"\nfilter=[\"a|.*|\"]\nuse_devicesfile=0\n".into()),
            modules: vec![("iscsi_tcp", Module::Loaded), ("dm_multipath", Module::Available)],
            hbas: Vec::new(),
            remote_ports: Vec::new(),
            scsi_scan: "sync".into(),
            udev_rules: vec!["/etc/udev/rules.d/59-lunplug.rules".into()],
        }
    }

    /// The findings that are not fine.
    pub(super) fn complaints(survey: &Survey) -> Vec<Finding> {
        examine(survey).into_iter().filter(|f| f.severity != Severity::Fine).collect()
    }

    #[test]
    fn a_healthy_node_has_nothing_to_complain_of_and_every_check_speaks() {
        assert_eq!(complaints(&healthy()), []);
        let checks: std::collections::BTreeSet<_> =
            examine(&healthy()).iter().map(|f| f.check).collect();
        let all = ["fc", "iscsi.service", "iscsi.version", "lvm", "modules", "multipath.config"];
        let more = ["multipath.service", "start", "udev"];
        assert_eq!(checks, all.into_iter().chain(more).collect());
    }

    #[test]
    fn what_keeps_lunplugd_from_starting_is_a_problem() {
        let survey = Survey { lacks: vec!["iscsiadm is missing: install it".into()], ..healthy() };
        let found = complaints(&survey);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].check, found[0].severity), ("start", Severity::Problem));
        assert!(found[0].what_to_do.contains("install it"));
    }

    #[test]
    fn whatever_is_wrong_something_can_be_done() {
        let blank = Survey::default();
        for finding in complaints(&blank) {
            assert!(!finding.what.is_empty() && !finding.what_to_do.is_empty(), "{finding:?}");
        }
    }
}
