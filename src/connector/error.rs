//! What can go wrong between a LUN and a verified block device.

use std::io;

use crate::host::cmd::CmdError;
use crate::host::local::SourceError;
use crate::host::lock::LockError;
use crate::host::multipathd::MultipathdError;
use crate::host::place::is_place_error;
use crate::host::sysfs::ReadError;
use crate::reason::Reason;
use crate::types::{DevNum, IfaceName, Lun, Portal, Wwid};

pub use super::identity::IdentityError;
pub use super::iscsi::LoginError;
use super::local::HeaderError;
pub use super::size::SizeError;

/// An attach or detach did not succeed; nothing half done remains unless the message says so.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No portal gave a session.
    #[error("no session to {target}")]
    NoSession {
        /// The target.
        target: String,
        /// Of all portals' failures the one that says most.
        #[source]
        source: LoginError,
    },
    /// The guest's side of a removal ended before it had let go of the device.
    #[error("nothing was taken from the host: the guest's side did not let go of it")]
    NotReleased,
    /// The target has no such LUN for us.
    #[error("{target} shows no LUN {lun} to this node")]
    LunNotFound {
        /// The target.
        target: String,
        /// The LUN.
        lun: Lun,
    },
    /// There is a SCSI device, but no disk with a medium.
    #[error("the LUN at {at} ({target}, LUN {lun}) has no medium or is no disk")]
    NoMedium {
        /// SCSI address.
        at: String,
        /// The target.
        target: String,
        /// The LUN.
        lun: Lun,
    },
    /// It is not what it has to be.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It has not the size that it must have, or that cannot be known.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// It refuses writes, and the volume is to be written to.
    #[error("{device} is write-protected{hint}, but the volume is not read-only")]
    ReadOnly {
        /// The path, or the map.
        device: String,
        /// More of it.
        hint: &'static str,
    },
    /// The node has no such iface record.
    #[error("the node has no iface record {name}; it has {known}")]
    NoIface {
        /// Its name.
        name: IfaceName,
        /// Those that there are, the built-in ones among them.
        known: String,
    },
    /// Another record is where open-iscsi has room for one alone.
    #[error(
        "{target} has a record at {portal}, by iface {iface}, without a portal group tag, beside which open-iscsi keeps no other: make that anew with its tag (iscsiadm -m node -T {target} -p {portal},TAG -I {iface} -o new), or remove it"
    )]
    RecordInTheWay {
        /// The target.
        target: String,
        /// The portal.
        portal: Portal,
        /// The iface of the record that is there.
        iface: String,
    },
    /// No HBA of the node's may be used, or none is there.
    #[error(
        "{}{}",
        if has.is_empty() { "the node has no Fibre Channel HBA".into() } else { format!("the node's HBAs are {has}") },
        if has.is_empty() { String::new() } else { format!(": initiator_target_map has none of them for this source, but {wanted}") }
    )]
    NoHba {
        /// The node's HBAs.
        has: String,
        /// Those of the source's map.
        wanted: String,
    },
    /// No target port is online to any HBA.
    #[error("no HBA of the node sees {targets} online ({seen})")]
    PortNotFound {
        /// The ports.
        targets: String,
        /// What is seen of them, and the HBAs' states.
        seen: String,
    },
    /// Guests may not have what is on the host there.
    #[error("{path} is beneath no directory that {setting} names")]
    NotAllowed {
        /// The path.
        path: String,
        /// The setting.
        setting: &'static str,
    },
    /// What is on the host cannot be had.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A node of a device that there is not.
    #[error("{path} is a node of device {dev}, which is not there or has no medium")]
    NoDevice {
        /// The path.
        path: String,
        /// The node's number.
        dev: DevNum,
    },
    /// A partition is no whole device.
    #[error("{device} is a partition: only a whole device can be a volume")]
    Partition {
        /// Kernel name.
        device: String,
    },
    /// Nothing tells the device from others.
    #[error(
        "{device} has no unique identity, as a LUN, NVMe, device-mapper, md or RBD have; local.without_identity = \"path\" takes it by its path alone"
    )]
    NoIdentity {
        /// Path and kernel name.
        device: String,
    },
    /// A map was required of what is on the host.
    #[error("{path}: {rule}")]
    NoMapOfLocal {
        /// The path.
        path: String,
        /// What would be right.
        rule: &'static str,
    },
    /// A connector was given another's source: a mistake of ours.
    #[error("{source_key} is not of {transport}")]
    OtherTransport {
        /// The connector's.
        transport: &'static str,
        /// What makes the source.
        source_key: String,
    },
    /// There is nothing that could be expanded.
    #[error("nothing is attached for {owner}")]
    NotAttached {
        /// Whose it would be.
        owner: String,
    },
    /// The same LUN is held under another name.
    #[error("{wwid} is attached for {owner} already; both would have to be shareable")]
    SourceInUse {
        /// The LUN's identity.
        wwid: Wwid,
        /// Who has it.
        owner: String,
    },
    /// An old device is in the way.
    #[error("an old device at {at} shows {found}, and {holder} holds it")]
    StaleDeviceHeld {
        /// SCSI address.
        at: String,
        /// The identity that it was found with.
        found: String,
        /// Who holds it.
        holder: String,
    },
    /// Somebody on the host uses the device.
    #[error("{device} is held by {holder}")]
    DeviceHeld {
        /// Which device.
        device: String,
        /// Who holds it.
        holder: String,
    },
    /// A map was required.
    #[error("a multipath map is required, but multipathd cannot be asked")]
    MultipathUnavailable(#[source] MultipathdError),
    /// The map did not come about, or not as it has to be.
    #[error("the map of {wwid} {problem}")]
    Map {
        /// The LUN's identity.
        wwid: Wwid,
        /// What is wrong with it.
        problem: String,
    },
    /// multipathd did not do what it was asked for.
    #[error("multipathd could not be used")]
    Multipathd(#[source] MultipathdError),
    /// What the host had in its cache could not be written out.
    #[error("flushing {dev} failed; it stays attached")]
    Flush {
        /// The device.
        dev: DevNum,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The same of a file.
    #[error("flushing {path} failed; it stays attached")]
    FlushFile {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// A file is not the image that it is said to be.
    #[error("{path} cannot be given to a guest as a qcow2 image")]
    Image {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// A path could not be removed.
    #[error("the path at {at} could not be removed: {problem}")]
    Path {
        /// SCSI address.
        at: String,
        /// What was found.
        problem: String,
    },
    /// A path of ours shows another LUN by now, so that nothing may be written to it.
    #[error("the path at {at} was {was} and shows {found} now; nothing was flushed or removed")]
    Swapped {
        /// SCSI address.
        at: String,
        /// The identity that it was attached with.
        was: String,
        /// What it shows.
        found: String,
    },
    /// A program could not be run.
    #[error("{doing}")]
    Command {
        /// What was to be done by it.
        doing: String,
        /// Why not.
        #[source]
        source: CmdError,
    },
    /// A program failed.
    #[error("{doing} failed with code {code:?}: {stderr}")]
    Tool {
        /// What was to be done by it.
        doing: String,
        /// Its exit code; `None` when a signal ended it.
        code: Option<i32>,
        /// The last it said.
        stderr: String,
    },
    /// iscsiadm could not reach iscsid.
    #[error("{doing}: nobody serves as iscsid")]
    NoIscsid {
        /// What was to be done by it.
        doing: String,
    },
    /// A record of open-iscsi is damaged and could not be replaced.
    #[error("the record of {target} at {portal} is damaged and could not be replaced")]
    RecordCorrupt {
        /// The target.
        target: String,
        /// The portal.
        portal: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The credentials that are needed cannot be had.
    #[error("the CHAP credentials cannot be had: {0}")]
    SecretUnavailable(String),
    /// A portal did not list its targets.
    #[error("the targets of {portal} could not be had")]
    Discovery {
        /// The portal.
        portal: Portal,
        /// Why.
        #[source]
        source: LoginError,
    },
    /// Somebody else's discovery record is in the way of credentials.
    #[error(
        "there is a discovery record of {portal} already, which is not lunplug's and stays as it is: ask without credentials, or remove it with iscsiadm -m discoverydb -t st -p {portal} -o delete"
    )]
    DiscoveryRecord {
        /// The portal.
        portal: Portal,
    },
    /// The session to be shared was made with other credentials.
    #[error(
        "the session to {target} at {portal} was made with other CHAP credentials than this volume has"
    )]
    ChapDiffers {
        /// The target.
        target: String,
        /// The portal.
        portal: String,
    },
    /// A lock could not be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// One of our own files is damaged.
    #[error("the lease {name} is damaged")]
    LeaseCorrupt {
        /// Which file below the run directory.
        name: String,
        /// How.
        #[source]
        source: serde_json::Error,
    },
    /// The system refused a call.
    #[error("{doing} failed")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// One of our own files could not be read or written.
    #[error("{doing} failed")]
    Store {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It failed, and so did the undoing: something is left, and a detach will find it.
    #[error("{cause}; undoing what was begun failed too: {undo}")]
    Undo {
        /// What failed first.
        cause: Box<Error>,
        /// What failed in undoing it.
        undo: Box<Error>,
    },
}

impl Error {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoSession { source, .. } => source.reason(),
            Self::LunNotFound { .. } | Self::NoMedium { .. } => Reason::LunNotFound,
            Self::Identity(e) => e.reason(),
            Self::Size(e) => e.reason(),
            Self::ReadOnly { .. } => Reason::LunReadOnly,
            Self::NoIface { .. } => Reason::IfaceNotFound,
            Self::NoHba { .. } => Reason::NoFcHba,
            Self::PortNotFound { .. } => Reason::FcPortNotFound,
            Self::NotAllowed { .. }
            | Self::Source(SourceError::Leaves { .. } | SourceError::Symlink { .. }) => {
                Reason::SourceNotAllowed
            }
            Self::Source(SourceError::Exchanged(_)) => Reason::DeviceHeld,
            Self::Source(SourceError::Io { source, .. }) => match source.kind() {
                io::ErrorKind::TimedOut => Reason::DeadlineExceeded,
                _ => Reason::HostIoFailed,
            },
            Self::Source(SourceError::NotThere(_) | SourceError::Other { .. })
            | Self::NoDevice { .. }
            | Self::Partition { .. } => Reason::SourceNotFound,
            Self::NoIdentity { .. } => Reason::NoUniqueIdentity,
            Self::NoMapOfLocal { .. } => Reason::InvalidOption,
            Self::OtherTransport { .. } | Self::NotReleased => Reason::Internal,
            Self::NotAttached { .. } => Reason::VolumeNotReady,
            Self::SourceInUse { .. } => Reason::SourceInUse,
            Self::StaleDeviceHeld { .. } => Reason::StaleDeviceHeld,
            Self::DeviceHeld { .. } | Self::Path { .. } => Reason::DeviceHeld,
            Self::Swapped { .. } => Reason::IdentityChanged,
            Self::MultipathUnavailable(_) => Reason::MultipathUnavailable,
            Self::Map { .. } | Self::Multipathd(_) => Reason::MapFailed,
            Self::Flush { .. } | Self::FlushFile { .. } => Reason::FlushFailed,
            Self::Image { .. } => Reason::ImageRefused,
            Self::Command { source, .. } => match source {
                CmdError::Missing(_) => Reason::ToolMissing,
                CmdError::TimedOut { .. } => Reason::DeadlineExceeded,
                CmdError::Io { .. } => Reason::ToolFailed,
                CmdError::Place(_) => Reason::IscsidUnavailable,
            },
            Self::Tool { .. } => Reason::ToolFailed,
            Self::NoIscsid { .. } => Reason::IscsidUnavailable,
            Self::RecordCorrupt { .. } | Self::LeaseCorrupt { .. } => Reason::RecordCorrupt,
            Self::Discovery { source, .. } => source.reason(),
            Self::DiscoveryRecord { .. } | Self::RecordInTheWay { .. } => Reason::Unsupported,
            Self::SecretUnavailable(_) => Reason::SecretUnavailable,
            Self::ChapDiffers { .. } => Reason::ChapDiffers,
            Self::Lock(e) => match e {
                LockError::TimedOut { .. } => Reason::DeadlineExceeded,
                LockError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
                    Reason::DeadlineExceeded
                }
                LockError::Io { .. } => Reason::StateStoreFailed,
            },
            Self::Io { source, .. } if is_place_error(source) => Reason::IscsidUnavailable,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::TimedOut => Reason::DeadlineExceeded,
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::ReadOnlyFilesystem => Reason::StateStoreFailed,
                io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => Reason::Internal,
                // What the kernel says of a device or a file may be otherwise the next time.
                _ => Reason::HostIoFailed,
            },
            Self::Store { source, .. } => match source.kind() {
                io::ErrorKind::TimedOut => Reason::DeadlineExceeded,
                _ => Reason::StateStoreFailed,
            },
            Self::Undo { cause, .. } => cause.reason(),
        }
    }

    /// A failure of our own files, in words of what was being done.
    pub(crate) fn store(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Store { doing, source }
    }

    /// A system call's failure, in words of what was being done.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        Self::Io { doing: format!("reading {}", error.path), source: error.source }
    }
}

/// An error with its sources in one line, where it has to become text.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text += &format!(": {e}");
        source = e.source();
    }
    text
}
