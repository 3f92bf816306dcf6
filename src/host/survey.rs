//! Looks at the node for `lunplug doctor`. Changes nothing, and speaks to nobody but multipathd: a
//! connection to iscsid's socket would start it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::cmd::{Commands, RealCommands, Tool};
use super::facts::{self, System};
use super::multipathd::{InTurn, Multipathd, MultipathdError, RealMultipathd};
use super::place::{Pinned, Places, Root, Who, listening};
use crate::config::Config;
use crate::doctor::{Listener, Module, Namespaces, Process, RemotePort, Service, Survey};
use crate::preflight::{self, INITIATOR_NAME};

/// For each question to a program or daemon.
const DEADLINE: Duration = Duration::from_secs(10);

/// The host's first process.
const INIT: i32 = 1;

/// Where systemd has its units, the first first (systemd.unit(5)).
const UNIT_DIRS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

/// What an iSCSI volume with more than one path needs of the kernel.
const MODULES: [&str; 3] = ["iscsi_tcp", "dm_multipath", "sd_mod"];

/// Looks at everything.
pub async fn look(config: Config) -> Survey {
    let places = Places::default();
    let commands = RealCommands::new(std::env::var_os("PATH")).placed(places);
    let said = async |tool, args: &[&str]| {
        let output = commands.run(tool, args, DEADLINE).await.ok()?;
        (output.code == Some(0) || !output.stdout.is_empty()).then_some(output.stdout)
    };
    let iscsiadm = said(Tool::Iscsiadm, &["--version"]).await;
    // An older LVM knows no devices file, and prints the rest.
    let keys = ["--type", "full", "devices/global_filter", "devices/use_devicesfile"];
    let lvm = said(Tool::Lvmconfig, &keys).await;
    let multipathd = InTurn::new(Arc::new(RealMultipathd::new("/etc/multipath")), DEADLINE);
    let multipath = match multipathd.ask("show config local").await {
        Ok(text) => Some(Ok(text)),
        Err(MultipathdError::NotRunning) => None,
        Err(error) => Some(Err(error.to_string())),
    };
    let seen = tokio::task::spawn_blocking(move || files(&config)).await.unwrap_or_default();
    Survey { iscsiadm, lvm, multipath, ..seen }
}

/// What files tell.
fn files(config: &Config) -> Survey {
    let own = namespaces(Path::new("/proc/self"));
    let processes = processes();
    Survey {
        lacks: preflight::check(config, &System).iter().map(ToString::to_string).collect(),
        own,
        listeners: listeners(&processes),
        daemons: daemons(&processes),
        host_units: host_units(),
        modules: MODULES.map(|name| (name, module(name))).to_vec(),
        udev_rules: udev_rules(),
        hbas: hbas(),
        remote_ports: remote_ports(),
        scsi_scan: attribute(Path::new("/sys/module/scsi_mod/parameters"), "scan"),
        ..Survey::default()
    }
}

/// Directories of all processes.
fn processes() -> Vec<(i32, PathBuf)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| Some((e.file_name().to_str()?.parse().ok()?, e.path()))).collect()
}

fn namespaces(process: &Path) -> Namespaces {
    let inode = |name: &str| fs::metadata(process.join("ns").join(name)).map_or(0, |ns| ns.ino());
    Namespaces { mount: inode("mnt"), net: inode("net") }
}

fn comm(process: &Path) -> String {
    fs::read_to_string(process.join("comm")).unwrap_or_default().trim_end().to_owned()
}

fn listeners(processes: &[(i32, PathBuf)]) -> Vec<Listener> {
    let sockets = listening(&fs::read_to_string("/proc/net/unix").unwrap_or_default());
    let mut found = Vec::new();
    for (pid, dir) in processes {
        let fds = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten();
        let open: Vec<PathBuf> = fds.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        for (service, inode) in &sockets {
            let link = PathBuf::from(format!("socket:[{inode}]"));
            if open.contains(&link) {
                // One that has ended meanwhile is not the one to speak to.
                let Ok(Who { uid, comm, trusted }) = Who::read(dir) else { continue };
                found.push(Listener { service: *service, pid: *pid, uid, comm, trusted });
            }
        }
    }
    found
}

/// The daemons' processes. Any process may call itself so; only root's are meant.
fn daemons(processes: &[(i32, PathBuf)]) -> Vec<Process> {
    let host = Root::of(INIT).ok();
    let read = |(pid, dir): &(i32, PathBuf)| {
        let name = comm(dir);
        let service = Service::ALL.into_iter().find(|s| s.name() == name)?;
        fs::metadata(dir).ok().filter(|m| m.uid() == 0)?;
        let exe = fs::read_link(dir.join("exe")).ok()?;
        let root = Root::of(*pid).ok();
        let tool = match service {
            Service::Iscsid => Tool::Iscsiadm.name(),
            Service::Multipathd => Tool::Multipath.name(),
        };
        Some(Process {
            service,
            pid: *pid,
            namespaces: namespaces(dir),
            replaced: exe.to_string_lossy().ends_with(" (deleted)"),
            contained: match (&root, &host) {
                (Some(root), Some(host)) => !root.is_same(host),
                _ => false,
            },
            elsewhere: root.as_ref().is_some_and(|root| !root.is_ours()),
            has_tool: root.as_ref().is_some_and(|root| root.program(tool).is_some()),
            has_initiator_name: root.is_some_and(|root| root.text(INITIATOR_NAME).is_ok()),
        })
    };
    processes.iter().filter_map(read).collect()
}

/// The host's units of iscsid that are there and not masked.
fn host_units() -> Vec<&'static str> {
    let Ok(host) = Root::of(INIT) else { return Vec::new() };
    let can_be_started = |unit: &&str| {
        let mut places = UNIT_DIRS.iter().map(|dir| format!("{dir}/{unit}"));
        // The first place that has it counts; masked it is a link to /dev/null.
        places.find_map(|place| host.is_file(&place)).unwrap_or(false)
    };
    ["iscsid.socket", "iscsid.service"].into_iter().filter(can_be_started).collect()
}

/// Whether a kernel module is loaded or built in, or could be loaded.
fn module(name: &str) -> Module {
    if Path::new("/sys/module").join(name).exists() {
        return Module::Loaded;
    }
    // The host loads it, whatever is in a container's image.
    let host = Root::of(INIT).and_then(|host| host.dir("/lib/modules"));
    let modules = host.unwrap_or_else(|_| Pinned::ours("/lib/modules"));
    let dir = modules.path.join(facts::kernel());
    let listed = |list: &str| {
        let text = fs::read_to_string(dir.join(list)).unwrap_or_default();
        text.lines().any(|line| is_module(line.split(':').next().unwrap_or_default(), name))
    };
    if listed("modules.dep") || listed("modules.builtin") {
        Module::Available
    } else {
        Module::Missing
    }
}

/// Whether a path is that of a module: `kernel/drivers/scsi/sd_mod.ko.xz`.
fn is_module(path: &str, name: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().is_some_and(|stem| stem.replace('-', "_") == name)
}

fn attribute(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap_or_default().trim().to_owned()
}

/// The entries of a class of the kernel's, in the order of their names.
fn class(name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(Path::new("/sys/class").join(name)).into_iter().flatten().flatten();
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    all.sort();
    all
}

fn hbas() -> Vec<(String, String)> {
    let hba = |dir: &PathBuf| (attribute(dir, "port_name"), attribute(dir, "port_state"));
    class("fc_host").iter().map(hba).collect()
}

fn remote_ports() -> Vec<RemotePort> {
    let port = |dir: &PathBuf| RemotePort {
        name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        wwpn: attribute(dir, "port_name"),
        state: attribute(dir, "port_state"),
        dev_loss_tmo: attribute(dir, "dev_loss_tmo"),
        fast_io_fail_tmo: attribute(dir, "fast_io_fail_tmo"),
    };
    // -1 where it is no target.
    let is_target = |dir: &&PathBuf| attribute(dir, "scsi_target_id").parse::<u32>().is_ok();
    class("fc_remote_ports").iter().filter(is_target).map(port).collect()
}

fn udev_rules() -> Vec<PathBuf> {
    use preflight::{SG3_RULES, UDEV_RULE, UDEV_RULE_EARLY, UDEV_RULE_SPARING};
    let mut names = vec![UDEV_RULE, UDEV_RULE_EARLY, UDEV_RULE_SPARING, "13-dm-disk.rules"];
    names.extend(SG3_RULES);
    let dirs = preflight::UDEV_RULES_D.iter().map(Path::new);
    let all = dirs.flat_map(|dir| names.iter().map(|name| dir.join(name)));
    all.filter(|rule| rule.exists()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_known_by_their_file() {
        assert!(is_module("kernel/drivers/scsi/iscsi_tcp.ko.xz", "iscsi_tcp"));
        assert!(is_module("kernel/drivers/md/dm-multipath.ko", "dm_multipath"));
        assert!(!is_module("kernel/drivers/scsi/libiscsi_tcp.ko.xz", "iscsi_tcp"));
    }

    #[tokio::test]
    async fn any_machine_can_be_looked_at() {
        let survey = look(Config::default()).await;
        assert_ne!(survey.own.net, 0);
        assert_eq!(survey.modules.len(), MODULES.len());
    }
}
