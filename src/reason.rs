//! The stable codes that say why: in errors of the API, in phases, in metrics and in exit codes.
//!
//! A code never changes its meaning. docs/errors.md has a section for each (a test compares them).

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of trouble a reason is, which decides the gRPC status and who has to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong as such.
    Invalid,
    /// What it names does not exist.
    NotFound,
    /// It clashes with what exists.
    Conflict,
    /// The system is not in a state for it; someone has to act first.
    Precondition,
    /// It may work later, unchanged.
    Unavailable,
    /// The caller may not.
    Denied,
    /// It took too long.
    Deadline,
    /// It was called off.
    Cancelled,
    /// Data is damaged, or a bug.
    Internal,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $code:literal, $kind:ident, $todo:literal;)*) => {
        /// Why something did not happen.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[$doc])* #[serde(rename = $code)] $variant,)*
        }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The stable code, as ErrorInfo carries it.
            pub const fn code(self) -> &'static str {
                match self { $(Self::$variant => $code,)* }
            }

            /// The kind of trouble.
            pub const fn kind(self) -> Kind {
                match self { $(Self::$variant => Kind::$kind,)* }
            }

            /// What to do about it, one sentence.
            pub const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $todo,)* }
            }
        }
    };
}

reasons! {
    /// A name is not a DNS-1123 label.
    InvalidName = "INVALID_NAME", Invalid, "Use 1 to 63 of a-z, 0-9 and '-'.";
    /// A serial has other characters or is too long for its bus.
    InvalidSerial = "INVALID_SERIAL", Invalid, "Give a shorter or plainer serial with --serial.";
    /// A source as a whole cannot be read.
    InvalidSource = "INVALID_SOURCE", Invalid, "Write it as iscsi://PORTAL[,PORTAL]/IQN/LUN or fc://WWPN[,WWPN]/LUN, further targets of the same LUN after a +, or block:///dev/NAME.";
    /// An iSCSI name is malformed.
    InvalidIqn = "INVALID_IQN", Invalid, "Use the target's name as the array shows it.";
    /// A portal is malformed.
    InvalidPortal = "INVALID_PORTAL", Invalid, "Use IP:PORT, IPv6 in brackets, or HOST:PORT.";
    /// The name of a portal's host could not be resolved.
    PortalNotResolved = "PORTAL_NOT_RESOLVED", Unavailable, "See what the node makes of the name (getent ahosts NAME), or give the portal's address.";
    /// A LUN is malformed or out of range.
    InvalidLun = "INVALID_LUN", Invalid, "Use a decimal number from 0 to 16383; flat:NUMBER and plain:NUMBER address it otherwise.";
    /// A Fibre Channel port's name is malformed.
    InvalidWwpn = "INVALID_WWPN", Invalid, "Use 16 hex digits, as the array or the switch shows the port's name.";
    /// A WWID is malformed.
    InvalidWwid = "INVALID_WWID", Invalid, "Use naa.<hex>, eui.<hex> or t10.<text>.";
    /// Another option has a value that it cannot have.
    InvalidOption = "INVALID_OPTION", Invalid, "See the field's rule in the message.";
    /// A path leaves the place where it must be, or has `..` or a symlink in it.
    PathNotAllowed = "PATH_NOT_ALLOWED", Invalid, "Give a plain path beneath the pod's directory, without symlinks.";
    /// No VM of that name is registered here.
    VmNotFound = "VM_NOT_FOUND", NotFound, "Register it first: lunplug vm register.";
    /// No volume of that name is known.
    VolumeNotFound = "VOLUME_NOT_FOUND", NotFound, "See lunplug list.";
    /// A VM of that name is registered with other particulars.
    VmExists = "VM_EXISTS", Conflict, "Unregister it first, or register the same.";
    /// The VM still has volumes.
    VmHasVolumes = "VM_HAS_VOLUMES", Conflict, "Remove its volumes first.";
    /// Another process on this node serves this VM.
    VmServedElsewhere = "VM_SERVED_ELSEWHERE", Conflict, "Stop the other lunplugd for this VM, or ask it.";
    /// A volume of that name exists with other particulars.
    VolumeExists = "VOLUME_EXISTS", Conflict, "Choose another --volume-name, or remove the other first.";
    /// Only a volume that is ready can do it.
    VolumeNotReady = "VOLUME_NOT_READY", Unavailable, "Wait until it is Ready (lunplug describe says why it is not), then ask again.";
    /// The source is attached to this VM under another name, or held by another VM.
    SourceInUse = "SOURCE_IN_USE", Conflict, "Remove the volume that has it first.";
    /// This node takes only volumes whose request says which identity the LUN must have.
    WwidRequired = "WWID_REQUIRED", Invalid, "Give the identity that the array shows with --wwid, or unset require_wwid in the configuration.";
    /// The serial is in the domain already.
    SerialInUse = "SERIAL_IN_USE", Conflict, "Choose another with --serial.";
    /// A disk of that name is in the domain, but lunplug did not put it there.
    NotHotplugged = "NOT_HOTPLUGGED", Conflict, "Remove it where it was defined.";
    /// As many as a setting allows are there already.
    LimitReached = "LIMIT_REACHED", Precondition, "Remove what is not needed, or raise the limit in the configuration.";
    /// A newer set of the VM's volumes was accepted before.
    RevisionOutdated = "REVISION_OUTDATED", Conflict, "Drop the request if its set is the older; send the newest set under a higher revision.";
    /// Another set of the VM's volumes was accepted under the same revision.
    RevisionReused = "REVISION_REUSED", Conflict, "Send the set under a higher revision.";
    /// The domain does not run.
    VmNotRunning = "VM_NOT_RUNNING", Precondition, "Start the VM.";
    /// The VM runs where it must have ended.
    VmRunning = "VM_RUNNING", Precondition, "Wait until the VM has ended there, then ask again.";
    /// The VM is about to move to another pod.
    VmMigrating = "VM_MIGRATING", Conflict, "Say how the migration went first: lunplug migration finish, or cancel.";
    /// The VM runs, and was registered as one that cannot have Fibre Channel volumes.
    FcNotSupported = "FC_NOT_SUPPORTED", Precondition, "Power the VM off, add the volume, and have its pod scheduled with an HBA; or register it with --fc supported where it has one.";
    /// The guest is paused because one of its I/Os failed; only told of a VM that is served.
    VmPausedIoError = "VM_PAUSED_IO_ERROR", Precondition, "Mend the disk's paths or space, then resume the VM (virsh resume); lunplug does not.";
    /// The pod's directory is gone.
    PodGone = "POD_GONE", Precondition, "Register the VM with its new pod.";
    /// libvirt does not answer.
    LibvirtUnreachable = "LIBVIRT_UNREACHABLE", Unavailable, "See that libvirtd runs in the pod and that the socket's path is right.";
    /// A libvirt socket is not what it should be.
    SocketUntrusted = "SOCKET_UNTRUSTED", Precondition, "The socket must be a socket beneath the pod's directory, not a symlink.";
    /// No QEMU process of that VM could be proven.
    QemuNotFound = "QEMU_NOT_FOUND", Precondition, "See that the VM runs and that lunplugd shares the host's PID namespace.";
    /// The cgroup found for the VM may not be touched.
    CgroupRefused = "CGROUP_REFUSED", Precondition, "The VM's container needs a cgroup of its own below the pod's.";
    /// The hotplug directory is on a nodev mount.
    NodevMount = "NODEV_MOUNT", Precondition, "Mount the hotplug directory without nodev (an emptyDir is fine).";
    /// The hotplug directory is missing or is not a plain directory beneath the pod's.
    HotplugDirUnsafe = "HOTPLUG_DIR_UNSAFE", Precondition, "The pod needs a plain directory there; see docs/operations.md.";
    /// No portal answered.
    PortalUnreachable = "PORTAL_UNREACHABLE", Unavailable, "Check network and target; lunplug tries again.";
    /// The target refused the login.
    LoginRefused = "LOGIN_REFUSED", Precondition, "Check the target's ACL for this initiator and its credentials.";
    /// The target does not accept the CHAP credentials.
    ChapRejected = "CHAP_REJECTED", Precondition, "Correct the name and the secret, or the target's ACL for this initiator.";
    /// CHAP credentials were given for a target that asks for none.
    ChapNotWanted = "CHAP_NOT_WANTED", Precondition, "Add the volume without credentials, or have the target demand them.";
    /// The target did not prove itself by mutual CHAP.
    ChapTargetUnproven = "CHAP_TARGET_UNPROVEN", Precondition, "Set username_in and password_in as the target has them, or leave them out if it has none.";
    /// The session to be shared was made with other credentials.
    ChapDiffers = "CHAP_DIFFERS", Conflict, "Give the credentials of the volumes that use the session, or remove those first.";
    /// CHAP credentials that a volume refers to cannot be had.
    SecretUnavailable = "SECRET_UNAVAILABLE", Precondition, "Put the secret into secrets_dir, or add the volume again with its credentials.";
    /// The portal knows no such target.
    TargetNotFound = "TARGET_NOT_FOUND", Precondition, "Check the IQN and that the target is exported at this portal.";
    /// The node has no iface record of that name.
    IfaceNotFound = "IFACE_NOT_FOUND", Precondition, "Name one that iscsiadm -m iface lists on the node, or make it there.";
    /// The node has no Fibre Channel HBA by which the source may be had.
    NoFcHba = "NO_FC_HBA", Precondition, "See lunplug node for the node's HBAs; correct initiator_target_map, or use another node.";
    /// No target port is online to any HBA of the node's.
    FcPortNotFound = "FC_PORT_NOT_FOUND", Unavailable, "Check the WWPNs, the zoning and the links; a port that logs in later is found by itself.";
    /// The target does not export that LUN to us.
    LunNotFound = "LUN_NOT_FOUND", Precondition, "Map the LUN to this initiator at the array.";
    /// What is on the host is not beneath a directory from which volumes may be had.
    SourceNotAllowed = "SOURCE_NOT_ALLOWED", Precondition, "Name a directory above it in local.block_roots (files: local.file_roots) of the node's configuration, if guests may have what is there.";
    /// What is on the host is not there, or is something else.
    SourceNotFound = "SOURCE_NOT_FOUND", Precondition, "Give the path of a whole block device, or of a file with something in it, once that is there.";
    /// A file is not the disk image that it is said to be, or one that refers to other files.
    ImageRefused = "IMAGE_REFUSED", Precondition, "Make it a whole image of its own with qemu-img convert -O qcow2, or give the format that it has.";
    /// QEMU's user cannot open a file, or not as the volume's options need.
    FileNotAccessible = "FILE_NOT_ACCESSIBLE", Precondition, "Give the file to QEMU's user, or add the volume read-only, or with another cache mode, as the message says.";
    /// The LUN is not the one that this volume was.
    IdentityChanged = "IDENTITY_CHANGED", Precondition, "If the change is meant, add it with --accept-new-identity.";
    /// The LUN is not the one that was expected.
    IdentityMismatch = "IDENTITY_MISMATCH", Precondition, "Correct the expected WWID or size, or the mapping at the array.";
    /// The LUN has no unique designator.
    NoUniqueIdentity = "NO_UNIQUE_IDENTITY", Precondition, "Give the LUN a serial number at the array; for a device of the node's that has none see local.without_identity.";
    /// Two paths claim the same LUN but are different devices.
    PathsDisagree = "PATHS_DISAGREE", Precondition, "The portals, or the targets, have different LUNs there; correct the source or the array.";
    /// An old device at that address is still held by someone.
    StaleDeviceHeld = "STALE_DEVICE_HELD", Precondition, "Release the holder that is named, then try again.";
    /// Something else on the host holds the device.
    DeviceHeld = "DEVICE_HELD", Precondition, "Release the holder that is named, then try again.";
    /// A map was required and could not be had.
    MultipathUnavailable = "MULTIPATH_UNAVAILABLE", Precondition, "Start multipathd, or ask for multipath preferred or off.";
    /// Fewer paths work than there should be.
    PathsDegraded = "PATHS_DEGRADED", Unavailable, "Bring the portal or path back that the message names; it joins by itself.";
    /// No path works.
    NoPaths = "NO_PATHS", Unavailable, "Bring a portal back; the guest's I/O goes on, or has failed, as its timeouts say.";
    /// A path that an expand has to read anew is down.
    PathDown = "PATH_DOWN", Unavailable, "Bring the path back that the message names, or delete it, and expand again.";
    /// Paths of one LUN show different sizes.
    SizesDisagree = "SIZES_DISAGREE", Unavailable, "See at the array why the ports differ (it may need a moment after the growth); expand again.";
    /// The LUN has not the size that the expand was told to expect.
    SizeUnexpected = "SIZE_UNEXPECTED", Unavailable, "Grow the LUN at the array, or expand with its right size or none.";
    /// The LUN has become smaller than it was when it was given to the guest.
    LunShrunk = "LUN_SHRUNK", Precondition, "Give the LUN its size back at the array before the guest writes where nothing is any more.";
    /// The LUN refuses writes, and the volume is not read-only.
    LunReadOnly = "LUN_READ_ONLY", Precondition, "Make the LUN writable at the array, or add the volume with --read-only.";
    /// multipathd did not make or remove the map.
    MapFailed = "MAP_FAILED", Unavailable, "See multipathd's log; lunplug tries again.";
    /// Data could not be flushed.
    FlushFailed = "FLUSH_FAILED", Unavailable, "Bring the paths back, or remove with --force and lose what was not written.";
    /// A needed program is missing.
    ToolMissing = "TOOL_MISSING", Precondition, "Install the package that is named.";
    /// A program failed in a way that we do not know.
    ToolFailed = "TOOL_FAILED", Unavailable, "See the message; lunplug tries again.";
    /// Nobody serves as iscsid, so no session can be made or ended.
    IscsidUnavailable = "ISCSID_UNAVAILABLE", Unavailable, "Start iscsid, on the host or in its container; lunplug doctor tells who serves.";
    /// The kernel refused a read or write of the host's own.
    HostIoFailed = "HOST_IO_FAILED", Unavailable, "See the message and the kernel's log; lunplug tries again.";
    /// A record or lease on the host is damaged.
    RecordCorrupt = "RECORD_CORRUPT", Internal, "See docs/operations.md, damaged records.";
    /// Something that is not our node is at the node's place and cannot be replaced.
    NodeRefused = "NODE_REFUSED", Precondition, "Remove what is in the hotplug directory under this name.";
    /// The device could not be allowed in the VM's cgroup.
    GrantRefused = "GRANT_REFUSED", Precondition, "See the message; docs/operations.md, grants.";
    /// The kernel cannot do it.
    KernelTooOld = "KERNEL_TOO_OLD", Precondition, "Use Linux 5.18 or newer with CONFIG_CGROUP_BPF, or cgroup v1.";
    /// The domain's XML has something that we do not understand.
    DomainXmlUnsupported = "DOMAIN_XML_UNSUPPORTED", Precondition, "See the message for the element.";
    /// No free address or no controller that can take one more.
    NoFreeAddress = "NO_FREE_ADDRESS", Precondition, "Give the domain another controller or PCIe root port.";
    /// The domain has no cdrom drive that can be meant.
    DriveNotFound = "DRIVE_NOT_FOUND", Precondition, "Name one of the drives that the message lists with --drive, or give the domain one.";
    /// Somebody else's medium, or another volume's, is in the cdrom drive.
    DriveOccupied = "DRIVE_OCCUPIED", Conflict, "Take out what the message names, or name another drive with --drive.";
    /// The cdrom drive cannot take the medium yet: another volume's is in it, or the guest has locked the tray.
    DriveBusy = "DRIVE_BUSY", Unavailable, "Remove the volume that is named, or have the guest let go of the drive; then the medium comes in.";
    /// Another job has the domain.
    DomainBusy = "DOMAIN_BUSY", Unavailable, "Wait for the migration, backup or snapshot; lunplug tries again.";
    /// libvirt or QEMU refused.
    LibvirtFailed = "LIBVIRT_FAILED", Unavailable, "See the message; lunplug tries again.";
    /// The guest uses the disk.
    InUseByGuest = "IN_USE_BY_GUEST", Precondition, "Unmount it in the guest, or remove with --force.";
    /// Nobody could say whether the guest uses the disk.
    GuestUnproven = "GUEST_UNPROVEN", Precondition, "Start qemu-guest-agent in the guest, allow it by setting, or remove with --force.";
    /// The guest refused to let the device go.
    GuestRefusedUnplug = "GUEST_REFUSED_UNPLUG", Precondition, "See the guest's log; the disk stays attached and working.";
    /// The guest has not answered the request to let the device go.
    DetachUnacknowledged = "DETACH_UNACKNOWLEDGED", Unavailable, "See whether the guest runs; lunplug waits on.";
    /// It took longer than its deadline.
    DeadlineExceeded = "DEADLINE_EXCEEDED", Deadline, "See what is slow; deadlines are settings.";
    /// It was called off.
    Cancelled = "CANCELLED", Cancelled, "Ask again if it is still wanted.";
    /// The daemon is stopping.
    ShuttingDown = "SHUTTING_DOWN", Unavailable, "Ask again when it is back.";
    /// The state could not be read or written.
    StateStoreFailed = "STATE_STORE_FAILED", Unavailable, "Check the state directory's disk.";
    /// The state was written by a newer version.
    StateStoreNewer = "STATE_STORE_NEWER", Precondition, "Install that version or a newer one; nothing was changed.";
    /// The caller is not among the configured users.
    PeerNotAllowed = "PEER_NOT_ALLOWED", Denied, "Add the uid to allowed_uids in the configuration.";
    /// Not offered by this build or this form of the daemon.
    Unsupported = "UNSUPPORTED", Precondition, "See the message.";
    /// A bug of lunplug's own.
    Internal = "INTERNAL", Internal, "Report it with the daemon's log.";
}

impl Reason {
    /// The reason of that code; `None` for one of a newer version.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.code() == code)
    }

    /// Whether it is about the VM being away: stopped, its pod gone or not there yet. It may come
    /// back, and what was wanted for it is still wanted then.
    pub const fn is_vm_away(self) -> bool {
        matches!(self, Self::VmNotRunning | Self::PodGone | Self::QemuNotFound)
    }

    /// Whether it tells how a ready volume's paths and LUN are, as a look at them found.
    pub const fn is_of_paths(self) -> bool {
        matches!(self, Self::PathsDegraded | Self::NoPaths | Self::LunReadOnly)
    }

    /// Whether trying again, unchanged, can help by itself.
    pub const fn is_transient(self) -> bool {
        matches!(self.kind(), Kind::Unavailable | Kind::Deadline)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}
