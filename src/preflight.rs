//! What must be there before lunplugd starts: each lack is one line that names the package or the
//! setting. Not asked of a simulated host, which needs none of it.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::Config;

/// What is looked at. The real one is [`crate::host::facts::System`].
pub trait Facts {
    /// The effective uid.
    fn euid(&self) -> u32;
    /// Whether iscsiadm can be run, where iscsid is or would be.
    fn has_iscsiadm(&self) -> bool;
    /// Whether the initiator has a name there.
    fn has_initiator_name(&self) -> bool;
    /// Whether a file or directory is there.
    fn exists(&self, path: &Path) -> bool;
    /// Makes the directory if it is missing, and says whether it can be written to.
    fn writable_dir(&self, path: &Path) -> io::Result<()>;
    /// A file's text; `None` when it cannot be read.
    fn text(&self, path: &Path) -> Option<String>;
    /// Whether files can be written on the filesystem of that path.
    fn writable_fs(&self, path: &Path) -> bool;
    /// Whether openat2(2) works.
    fn has_openat2(&self) -> bool;
    /// Whether this process is in the host's PID namespace.
    fn in_host_pid_namespace(&self) -> bool;
    /// Whether this process is in the network namespace of PID 1.
    fn in_net_namespace_of_pid_1(&self) -> bool;
}

/// Something is missing.
#[derive(Debug, thiserror::Error)]
pub enum Lack {
    /// Not root.
    #[error(
        "lunplugd must run as root, and is uid {0}: start it by systemd or sudo (or try --sim, which needs no root)"
    )]
    Root(u32),
    /// A directory.
    #[error(
        "{key} {path} cannot be written to ({why}): correct it, or set {key} to another directory"
    )]
    Directory {
        /// The configuration's key.
        key: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why not.
        why: io::Error,
    },
    /// A program.
    #[error(
        "{program} is missing: install the package {package}, or start the container that has iscsid"
    )]
    Program {
        /// The program.
        program: &'static str,
        /// What brings it.
        package: &'static str,
    },
    /// The initiator's name.
    #[error(
        "{INITIATOR_NAME} is missing where iscsid is: install the package open-iscsi (Fedora, RHEL: iscsi-initiator-utils), or mount /etc/iscsi into iscsid's container"
    )]
    InitiatorName,
    /// The PID namespace.
    #[error("lunplugd is not in the host's PID namespace: set hostPID: true in its pod")]
    PidNamespace,
    /// The network namespace.
    #[error("lunplugd is not in the host's network namespace: set hostNetwork: true in its pod")]
    NetNamespace,
    /// The udev rule.
    #[error(
        "{UDEV_RULE} is in none of {}: the host would look into guests' disks; install it from lunplug's dist directory (docs/operations.md)",
        UDEV_RULES_D.join(", ")
    )]
    UdevRule,
    /// The udev rule looks for the marks of guests' LUNs in another directory.
    #[error(
        "{rule} does not look into {} for guests' LUNs: set run_dir back to /run/lunplug, or correct the path in the rule and run udevadm control --reload",
        .run_dir.display()
    )]
    UdevRuleDir {
        /// The rule's file.
        rule: PathBuf,
        /// Where lunplugd leaves its marks.
        run_dir: PathBuf,
    },
    /// openat2.
    #[error(
        "openat2 does not work: use Linux 5.6 or newer, and no seccomp filter that denies it (systemd's RestrictSUIDSGID= does)"
    )]
    Openat2,
    /// sysfs.
    #[error("/sys is read-only: run the container privileged, or mount the host's /sys read-write")]
    Sysfs,
}

/// By which name this node logs in.
pub(crate) const INITIATOR_NAME: &str = "/etc/iscsi/initiatorname.iscsi";

/// The rule that keeps the host from interpreting guests' LUNs, and the name that it has where the
/// device-mapper rules have low numbers.
pub(crate) const UDEV_RULE: &str = "59-lunplug.rules";
pub(crate) const UDEV_RULE_EARLY: &str = "12-lunplug.rules";
/// The rule that spares udev work on guests' LUNs: nothing is amiss without it but speed.
pub(crate) const UDEV_RULE_SPARING: &str = "54-lunplug.rules";
/// The rules of sg3-utils that it comes before (Debian and Ubuntu, Fedora).
pub(crate) const SG3_RULES: [&str; 2] = ["55-scsi-sg3_id.rules", "61-scsi-sg3_id.rules"];
/// Where udev looks for rules (udev(7)).
pub(crate) const UDEV_RULES_D: [&str; 4] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
];

/// Everything that is missing.
pub fn check(config: &Config, facts: &dyn Facts) -> Vec<Lack> {
    let mut lacks = Vec::new();
    let euid = facts.euid();
    if euid != 0 {
        // Whatever else is missing may be for want of root: say only this.
        return vec![Lack::Root(euid)];
    }
    for (key, path) in [("state_dir", &config.state_dir), ("run_dir", &config.run_dir)] {
        if let Err(why) = facts.writable_dir(path) {
            if key == "state_dir" && facts.exists(path) {
                // What is stored there can be read, and volumes be removed; the store says it if not.
                continue;
            }
            lacks.push(Lack::Directory { key, path: path.clone(), why });
        }
    }
    if !facts.in_host_pid_namespace() {
        lacks.push(Lack::PidNamespace);
    } else if !facts.in_net_namespace_of_pid_1() {
        // Only now PID 1 is the host's: iSCSI's netlink and kernel uevents are the host network's.
        lacks.push(Lack::NetNamespace);
    }
    if !facts.writable_fs(Path::new("/sys")) {
        lacks.push(Lack::Sysfs);
    }
    if !facts.has_openat2() {
        lacks.push(Lack::Openat2);
    }
    lacks.extend(udev_rule(config, facts));
    if !facts.has_iscsiadm() {
        let package = "open-iscsi (Fedora, RHEL: iscsi-initiator-utils)";
        lacks.push(Lack::Program { program: "iscsiadm", package });
    } else if !facts.has_initiator_name() {
        lacks.push(Lack::InitiatorName);
    }
    lacks
}

/// The rule must be there, and look where lunplugd leaves its marks.
fn udev_rule(config: &Config, facts: &dyn Facts) -> Option<Lack> {
    let dirs = UDEV_RULES_D.iter().map(Path::new);
    let mut places = dirs.flat_map(|dir| [dir.join(UDEV_RULE), dir.join(UDEV_RULE_EARLY)]);
    let Some(rule) = places.find(|place| facts.exists(place)) else { return Some(Lack::UdevRule) };
    let marks = format!("\"{}/guest-luns/", config.run_dir.display());
    let looks_there = facts.text(&rule).is_some_and(|text| text.contains(&marks));
    (!looks_there).then(|| Lack::UdevRuleDir { rule, run_dir: config.run_dir.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with everything, less what is named.
    #[derive(Default)]
    struct Host {
        euid: u32,
        without: &'static [&'static str],
    }

    impl Host {
        fn has(&self, what: &str) -> bool {
            !self.without.contains(&what)
        }
    }

    impl Facts for Host {
        fn euid(&self) -> u32 {
            self.euid
        }
        fn has_iscsiadm(&self) -> bool {
            self.has("iscsiadm")
        }
        fn has_initiator_name(&self) -> bool {
            self.has(INITIATOR_NAME)
        }
        fn exists(&self, path: &Path) -> bool {
            self.has(path.file_name().and_then(|n| n.to_str()).unwrap())
                && self.has(path.to_str().unwrap())
        }
        fn text(&self, path: &Path) -> Option<String> {
            self.exists(path).then(|| include_str!("../dist/59-lunplug.rules").into())
        }
        fn has_openat2(&self) -> bool {
            self.has("openat2")
        }
        fn writable_dir(&self, path: &Path) -> io::Result<()> {
            let refused = || io::Error::from(io::ErrorKind::ReadOnlyFilesystem);
            self.has(path.to_str().unwrap()).then_some(()).ok_or_else(refused)
        }
        fn writable_fs(&self, path: &Path) -> bool {
            self.has(path.to_str().unwrap())
        }
        fn in_host_pid_namespace(&self) -> bool {
            self.has("pid")
        }
        fn in_net_namespace_of_pid_1(&self) -> bool {
            self.has("net")
        }
    }

    fn lines(euid: u32, without: &'static [&'static str]) -> Vec<String> {
        let host = Host { euid, without };
        check(&Config::default(), &host).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_host_with_everything_lacks_nothing() {
        assert_eq!(lines(0, &[]), Vec::<String>::new());
    }

    #[test]
    fn each_lack_is_one_line_that_says_what_to_do() {
        for (without, words) in [
            (&["iscsiadm"] as &[_], "install the package open-iscsi"),
            (&["/etc/iscsi/initiatorname.iscsi"], "initiatorname.iscsi is missing"),
            (&["/run/lunplug"], "set run_dir to another"),
            (&["/var/lib/lunplug"], "set state_dir to another"),
            (&["openat2"], "RestrictSUIDSGID"),
            (&["59-lunplug.rules", "12-lunplug.rules"], "install it from lunplug's dist"),
            (&["/sys"], "mount the host's /sys read-write"),
            (&["pid"], "hostPID: true"),
            (&["net"], "hostNetwork: true"),
            // Without the host's PID 1 there is nothing to compare the network with.
            (&["pid", "net"], "hostPID: true"),
        ] {
            let lines = lines(0, without);
            assert_eq!(lines.len(), 1, "{lines:?}");
            assert!(lines[0].contains(words), "{lines:?}");
            assert!(!lines[0].contains('\n'));
        }
        assert_eq!(lines(0, &["/sys", "iscsiadm", "net"]).len(), 3);
    }

    #[test]
    fn a_state_directory_that_is_only_readable_is_the_stores_affair() {
        struct ReadOnly(Host);
        impl Facts for ReadOnly {
            fn euid(&self) -> u32 {
                0
            }
            fn has_iscsiadm(&self) -> bool {
                self.0.has_iscsiadm()
            }
            fn has_initiator_name(&self) -> bool {
                self.0.has_initiator_name()
            }
            fn exists(&self, path: &Path) -> bool {
                self.0.exists(path)
            }
            fn text(&self, path: &Path) -> Option<String> {
                self.0.text(path)
            }
            fn has_openat2(&self) -> bool {
                true
            }
            fn writable_dir(&self, path: &Path) -> io::Result<()> {
                let fine = path != Path::new("/var/lib/lunplug");
                fine.then_some(()).ok_or_else(|| io::ErrorKind::ReadOnlyFilesystem.into())
            }
            fn writable_fs(&self, _: &Path) -> bool {
                true
            }
            fn in_host_pid_namespace(&self) -> bool {
                true
            }
            fn in_net_namespace_of_pid_1(&self) -> bool {
                true
            }
        }
        let lacks = check(&Config::default(), &ReadOnly(Host::default()));
        assert!(lacks.is_empty(), "{lacks:?}");
    }

    #[test]
    fn the_udev_rule_looks_where_the_marks_are() {
        let config = Config { run_dir: "/run/other".into(), ..Config::default() };
        let lacks = check(&config, &Host::default());
        let [Lack::UdevRuleDir { rule, .. }] = &lacks[..] else { panic!("{lacks:?}") };
        assert_eq!(rule, Path::new("/etc/udev/rules.d/59-lunplug.rules"));
        assert!(lacks[0].to_string().contains("look into /run/other for"), "{}", lacks[0]);
    }

    #[test]
    fn without_root_nothing_else_is_said() {
        let lines = lines(1000, &["iscsiadm", "/sys"]);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains("uid 1000"));
    }
}
