//! Configuration: file, environment, flags.
//!
//! One precedence: built-in defaults, then the file (`/etc/lunplug/lunplugd.toml`), then the
//! environment (`LUNPLUG_` and the key in capitals, `.` as `_`: `LUNPLUG_LOG_LEVEL`), then flags;
//! the later wins, key by key. `lunplugd --check-config` prints what came of it.
//! `dist/lunplugd.toml` documents every key.

mod layers;

use std::net::{AddrParseError, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::connector::settings as connector;
use crate::types::VmId;
use crate::vm::plan::fc::AfterLast;

pub use layers::{DEFAULT_PATH, Error, Layers, Loaded};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The API's socket. Unless set: `lunplugd.sock` in `run_dir`, in the sidecar's form
    /// `NAMESPACE_NAME.sock`.
    pub socket: PathBuf,
    /// The group that the socket belongs to; empty: that of the process.
    pub socket_group: String,
    /// Uids that may call, besides root and the daemon's own.
    pub allowed_uids: Vec<u32>,
    /// Durable state: what is wanted, and identities.
    pub state_dir: PathBuf,
    /// State of this boot: effects, locks, ownership.
    pub run_dir: PathBuf,
    /// Secrets that volumes refer to: a directory each, with a file for each value, as Kubernetes
    /// mounts them.
    pub secrets_dir: PathBuf,
    /// kubelet's directory, where the pods' volumes are.
    pub kubelet_root: PathBuf,
    /// This node's name; the host's unless set.
    pub node_name: String,
    /// What becomes of a removal when nobody can say whether the guest uses the disk.
    pub guest_unproven: GuestUnproven,
    /// Take only volumes whose request says which identity the LUN must have.
    pub require_wwid: bool,
    /// The socket of qemu-pr-helper as QEMU sees it (in a pod: in its mounts), for persistent reservations;
    /// empty: there is none.
    pub pr_helper_socket: PathBuf,
    /// What becomes of the mark of a VM that was made able to have Fibre Channel volumes, once the last of
    /// them is gone.
    pub fc_mark_after_last: AfterLast,
    /// Where metrics are served for Prometheus over HTTP, as `127.0.0.1:9464`; empty: nowhere.
    pub metrics_listen: String,
    /// Logs.
    pub log: Log,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// How volumes are looked at.
    pub reconcile: Reconcile,
    /// What becomes of a volume whose LUN grows.
    pub expand: Expand,
    /// iSCSI sessions that lunplug makes.
    pub iscsi: Iscsi,
    /// What of the host's own may be given to guests.
    pub local: connector::LocalSettings,
    /// How much there may be.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: PathBuf::new(),
            socket_group: String::new(),
            allowed_uids: Vec::new(),
            state_dir: "/var/lib/lunplug".into(),
            run_dir: "/run/lunplug".into(),
            secrets_dir: "/etc/lunplug/secrets".into(),
            kubelet_root: "/var/lib/kubelet".into(),
            node_name: String::new(),
            guest_unproven: GuestUnproven::default(),
            require_wwid: false,
            pr_helper_socket: PathBuf::new(),
            fc_mark_after_last: AfterLast::default(),
            metrics_listen: String::new(),
            log: Log::default(),
            deadlines: Deadlines::default(),
            reconcile: Reconcile::default(),
            expand: Expand::default(),
            iscsi: Iscsi::default(),
            local: connector::LocalSettings::default(),
            limits: Limits::default(),
        }
    }
}

/// What becomes of a removal when nobody can say whether the guest uses the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestUnproven {
    /// It is refused with GUEST_UNPROVEN unless forced.
    #[default]
    Refuse,
    /// It goes on, and the result says that it was unproven.
    Allow,
}

/// Logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Where and in which form.
    pub format: LogFormat,
    /// What: a level, or directives as `info,lunplug::connector=debug`.
    pub level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: "info".into() }
    }
}

/// Where logs go and in which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text; without the time when systemd connected stderr to the journal.
    #[default]
    Auto,
    /// Lines for people, to stderr.
    Text,
    /// One JSON object a line, to stderr.
    Json,
    /// To the journal, with fields.
    Journald,
}

/// How long things may take. After that they are abandoned, with DEADLINE_EXCEEDED, and tried
/// again where that can help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Deadlines {
    /// One attempt to attach a volume, from login to the guest.
    #[serde(with = "friendly")]
    pub attach: Duration,
    /// One attempt to detach a volume, the guest's answer not counted.
    #[serde(with = "friendly")]
    pub detach: Duration,
    /// One call to libvirt.
    #[serde(with = "friendly")]
    pub libvirt_call: Duration,
    /// The whole of a check of a request, or of a look at a VM's volumes.
    #[serde(with = "friendly")]
    pub check: Duration,
    /// One child process, e.g. iscsiadm.
    #[serde(with = "friendly")]
    pub command: Duration,
    /// The names of the portals of one request.
    #[serde(with = "friendly")]
    pub resolve: Duration,
    /// The guest agent's answer.
    #[serde(with = "friendly")]
    pub agent: Duration,
    /// The guest's answer to the request to let a disk go; after that the volume waits in
    /// Detaching with DETACH_UNACKNOWLEDGED, and the answer still counts when it comes.
    #[serde(with = "friendly")]
    pub guest_unplug: Duration,
    /// One call into the kernel that can get stuck: scan, delete, flush.
    #[serde(with = "friendly")]
    pub kernel_call: Duration,
    /// How long multipathd may be silent: one exchange with it. The wait for a turn to ask is as long as others are
    /// answered.
    #[serde(with = "friendly")]
    pub multipathd: Duration,
    /// From the announcement of a VM's start, or of its coming from another node, to that start, unless the
    /// request says: after that what was made ready for it is undone.
    #[serde(with = "friendly")]
    pub start: Duration,
    /// A Fibre Channel target port that is not online, to an attach that has no other.
    #[serde(with = "friendly")]
    pub fc_port: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            attach: s(120),
            detach: s(120),
            libvirt_call: s(30),
            check: s(60),
            command: s(60),
            resolve: s(10),
            agent: s(5),
            guest_unplug: s(30),
            kernel_call: s(30),
            multipathd: s(10),
            start: s(300),
            fc_port: s(10),
        }
    }
}

/// How volumes are looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reconcile {
    /// How often when nothing happens; events make it look at once.
    #[serde(with = "friendly")]
    pub interval: Duration,
}

impl Default for Reconcile {
    fn default() -> Self {
        Self { interval: Duration::from_secs(60) }
    }
}

/// What becomes of a volume whose LUN grows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Expand {
    /// The guest is told as soon as the array has announced it, or somebody else has had a path read
    /// anew; otherwise only when it is asked for.
    pub auto: bool,
}

/// iSCSI sessions that lunplug makes. Other sessions are never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Iscsi {
    /// With more than one path: how long a dead path holds its I/O before it is failed over.
    #[serde(with = "friendly")]
    pub replacement_timeout_multipath: Duration,
    /// With a single path: how long I/O waits for the path to come back before it fails.
    #[serde(with = "friendly")]
    pub replacement_timeout_single: Duration,
    /// One login.
    #[serde(with = "friendly")]
    pub login_timeout: Duration,
    /// How often a first login is tried.
    pub login_retries: u32,
    /// Between two NOP-Outs.
    #[serde(with = "friendly")]
    pub noop_interval: Duration,
    /// Waiting for the answer to one.
    #[serde(with = "friendly")]
    pub noop_timeout: Duration,
}

impl Default for Iscsi {
    fn default() -> Self {
        let s = Duration::from_secs;
        Self {
            replacement_timeout_multipath: s(10),
            replacement_timeout_single: s(120),
            login_timeout: s(10),
            login_retries: 2,
            noop_interval: s(5),
            noop_timeout: s(5),
        }
    }
}

/// How much there may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Registered VMs.
    pub max_vms: u32,
    /// Volumes of one VM, and of one request.
    pub max_volumes_per_vm: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_vms: 500, max_volumes_per_vm: 256 }
    }
}

impl Config {
    /// Fills in what depends on the host and on the daemon's form.
    pub fn resolve(&mut self, only_vm: Option<&VmId>, hostname: &str) {
        if self.socket.as_os_str().is_empty() {
            self.socket = self.run_dir.join(match only_vm {
                // '_' cannot be in a name, so no two VMs meet.
                Some(vm) => format!("{}_{}.sock", vm.namespace(), vm.name()),
                None => "lunplugd.sock".into(),
            });
        }
        if self.node_name.is_empty() {
            hostname.trim().clone_into(&mut self.node_name);
        }
    }

    /// What the connector is told: its own defaults, but for what people may set.
    pub fn connector(&self) -> connector::Settings {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        // iscsid counts in whole seconds; less than one would mean none.
        let seconds = |d: Duration| u32::try_from(d.as_secs().max(1)).unwrap_or(u32::MAX);
        connector::Settings {
            command_ms: millis(self.deadlines.command),
            flush_ms: millis(self.deadlines.kernel_call),
            sysfs_write_ms: millis(self.deadlines.kernel_call),
            iscsi: connector::IscsiSettings {
                replacement_timeout_multipath: seconds(self.iscsi.replacement_timeout_multipath),
                replacement_timeout_single: seconds(self.iscsi.replacement_timeout_single),
                noop_interval: seconds(self.iscsi.noop_interval),
                noop_timeout: seconds(self.iscsi.noop_timeout),
                login_timeout: seconds(self.iscsi.login_timeout),
                login_retries: self.iscsi.login_retries,
            },
            fc: connector::FcSettings { port_ms: millis(self.deadlines.fc_port) },
            local: self.local.clone(),
            ..connector::Settings::default()
        }
    }

    /// Where metrics are served, if they are.
    pub fn metrics_listen(&self) -> Result<Option<SocketAddr>, AddrParseError> {
        match self.metrics_listen.as_str() {
            "" => Ok(None),
            text => text.parse().map(Some),
        }
    }

    /// What no single value's type can express.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let paths = [
            ("state_dir", &self.state_dir),
            ("run_dir", &self.run_dir),
            ("secrets_dir", &self.secrets_dir),
            ("kubelet_root", &self.kubelet_root),
            ("socket", &self.socket),
            ("pr_helper_socket", &self.pr_helper_socket),
        ];
        for (key, path) in paths {
            let may_be_unset = ["socket", "pr_helper_socket"].contains(&key);
            let unset = may_be_unset && path.as_os_str().is_empty();
            if !unset && !path.is_absolute() {
                return Err((key, format!("{path:?} is not an absolute path")));
            }
        }
        let roots = [
            ("local.block_roots", &self.local.block_roots),
            ("local.file_roots", &self.local.file_roots),
        ];
        for (key, root) in roots.iter().flat_map(|(key, all)| all.iter().map(move |r| (*key, r))) {
            let plain = |c: std::path::Component<'_>| {
                !matches!(c, std::path::Component::ParentDir | std::path::Component::CurDir)
            };
            if !root.is_absolute() || !root.components().all(plain) {
                let message = format!("{root:?} is not an absolute path without '..'");
                return Err((key, message));
            }
        }
        // What the kernel reports for every uid that has no mapping (user_namespaces(7)).
        if let Some(uid) = self.allowed_uids.iter().find(|&&uid| [65534, u32::MAX].contains(&uid)) {
            let message = format!("uid {uid} stands for any unknown user and cannot be allowed");
            return Err(("allowed_uids", message));
        }
        for (key, limit) in [
            ("limits.max_vms", self.limits.max_vms),
            ("limits.max_volumes_per_vm", self.limits.max_volumes_per_vm),
        ] {
            if limit == 0 {
                return Err((key, "0 allows nothing: give at least 1".into()));
            }
        }
        if self.metrics_listen().is_err() {
            let message = format!(
                "{:?} is not an address with a port: write it as 127.0.0.1:9464 or [::1]:9464",
                self.metrics_listen
            );
            return Err(("metrics_listen", message));
        }
        if let Err(error) = crate::telemetry::filter(&self.log.level) {
            return Err(("log.level", error.to_string()));
        }
        Ok(())
    }
}

/// Durations as people write them: `30s`, `1m 30s`, `500ms`; whole milliseconds, more than 0 and at
/// most a day.
mod friendly {
    use std::time::Duration;

    use jiff::SignedDuration;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        let value = SignedDuration::try_from(*value).map_err(serde::ser::Error::custom)?;
        to.collect_str(&format_args!("{value:#}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        let day = Duration::from_secs(24 * 60 * 60);
        text.parse::<SignedDuration>()
            .ok()
            .and_then(|value| Duration::try_from(value).ok())
            .filter(|value| !value.is_zero() && *value <= day)
            .ok_or_else(|| {
                D::Error::custom(format!(
                    "duration {text:?} is malformed: write it as 30s, 500ms or 1m 30s, more than 0 and at most a day"
                ))
            })
    }
}
