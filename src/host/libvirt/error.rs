//! libvirt's errors, sorted by what a caller can do about them.

use std::time::Duration;

use crate::reason::Reason;

/// A call to libvirt did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// There is no domain of that name.
    #[error("libvirt has no such domain: {message}")]
    NoDomain {
        /// libvirt's words.
        message: String,
    },
    /// The domain is not in a state for it, mostly: it does not run.
    #[error("the domain is not in a state for this: {message}")]
    NotRunning {
        /// libvirt's words.
        message: String,
    },
    /// Another job has the domain (migration, backup, snapshot), or libvirt waited 30 s for its
    /// state change lock in vain.
    #[error("another job has the domain: {message}")]
    Busy {
        /// libvirt's words.
        message: String,
    },
    /// The guest agent is configured but is not connected, does not answer, or answered in error.
    #[error("the guest agent does not answer: {message}")]
    AgentUnresponsive {
        /// libvirt's words.
        message: String,
    },
    /// The domain has no guest agent.
    #[error("the domain has no guest agent: {message}")]
    NoAgent {
        /// libvirt's words.
        message: String,
    },
    /// libvirt or QEMU cannot do what the XML asks for.
    #[error("libvirt does not support this device here: {message}")]
    ConfigUnsupported {
        /// libvirt's words.
        message: String,
    },
    /// The domain has no device of that alias.
    #[error("the domain has no such device: {message}")]
    DeviceMissing {
        /// libvirt's words.
        message: String,
    },
    /// The guest has locked a drive's tray.
    #[error("the guest has locked the tray: {message}")]
    TrayLocked {
        /// libvirt's words.
        message: String,
    },
    /// Devices of the domain use the I/O thread.
    #[error("the I/O thread is in use: {message}")]
    IoThreadUsed {
        /// libvirt's words.
        message: String,
    },
    /// The guest refused to let the device go.
    #[error("the guest refused to release the device: {message}")]
    UnplugRejected {
        /// libvirt's words.
        message: String,
    },
    /// The guest has been asked already and has not answered.
    #[error("the guest is asked to release the device and has not answered: {message}")]
    UnplugPending {
        /// libvirt's words.
        message: String,
    },
    /// Nobody answers at the socket, or the connection broke.
    #[error("no connection to libvirt at {endpoint}: {message}")]
    NoConnect {
        /// The endpoint's name.
        endpoint: String,
        /// libvirt's words.
        message: String,
    },
    /// The call did not return in time, or could not start because too many before it have not.
    #[error(
        "libvirt at {endpoint} did not answer {call} within {deadline:?} ({stuck} calls stuck)"
    )]
    TimedOut {
        /// The endpoint's name.
        endpoint: String,
        /// The call.
        call: &'static str,
        /// The deadline it had.
        deadline: Duration,
        /// Abandoned calls of this connection that have not returned.
        stuck: usize,
    },
    /// A call that was given up on may still take effect.
    #[error(
        "an earlier change of {device} has not returned from libvirt at {endpoint} after another {waited:?} and may still take effect"
    )]
    InFlight {
        /// The endpoint's name.
        endpoint: String,
        /// The device.
        device: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Something else.
    #[error("libvirt error {code}: {message}")]
    Other {
        /// `virErrorNumber`, 0 when the error is not libvirt's own.
        code: u32,
        /// libvirt's words.
        message: String,
    },
}

impl LibvirtError {
    /// The stable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoDomain { .. } | Self::NotRunning { .. } => Reason::VmNotRunning,
            Self::Busy { .. } => Reason::DomainBusy,
            Self::AgentUnresponsive { .. } | Self::NoAgent { .. } => Reason::GuestUnproven,
            Self::ConfigUnsupported { .. }
            | Self::DeviceMissing { .. }
            | Self::IoThreadUsed { .. }
            | Self::Other { .. } => Reason::LibvirtFailed,
            Self::UnplugRejected { .. } => Reason::GuestRefusedUnplug,
            Self::TrayLocked { .. } => Reason::InUseByGuest,
            Self::UnplugPending { .. } => Reason::DetachUnacknowledged,
            Self::NoConnect { .. } => Reason::LibvirtUnreachable,
            Self::TimedOut { .. } | Self::InFlight { .. } => Reason::LibvirtUnreachable,
        }
    }

    /// Whether the connection is of no more use: connect anew.
    pub fn is_disconnect(&self) -> bool {
        matches!(self, Self::NoConnect { .. })
    }

    /// Whether the socket belongs to the other instance than was asked for (`qemu_driver.c`:
    /// "unexpected QEMU URI path '/system', try qemu:///session").
    pub(crate) fn is_other_instance(&self) -> bool {
        matches!(self, Self::Other { message, .. } if message.contains("try qemu:///"))
    }

    /// Sorts what libvirt reported: `code` and `domain` are `virErrorNumber` and `virErrorDomain`.
    pub(crate) fn from_parts(endpoint: &str, code: u32, domain: u32, message: String) -> Self {
        use virt::sys;
        // These are known by their words alone, in the daemon's locale, which is C for services: they
        // come as OPERATION_FAILED or INTERNAL_ERROR (qemu_hotplug.c, domain_conf.c and QEMU's
        // qdev-monitor.c; seen with libvirt 11.3).
        if message.contains("rejected by the guest") {
            return Self::UnplugRejected { message };
        }
        if message.contains("in the process of unplug") {
            return Self::UnplugPending { message };
        }
        if message.contains("no device found with alias")
            || message.contains("cannot find IOThread")
        {
            return Self::DeviceMissing { message };
        }
        // qemuHotplugWaitForTrayEject: the guest was asked to open it (QEMU's blockdev-open-tray) and has
        // not; an older libvirt hands on QEMU's own refusal.
        if message.contains("timed out waiting to open tray")
            || message.contains("waiting for disk tray status update")
            || message.contains("is locked and force was not specified")
        {
            return Self::TrayLocked { message };
        }
        // qemuDomainDelIOThreadCheck: "cannot remove IOThread 1 since it is being used by disk 'vda'".
        if message.contains("cannot remove IOThread") {
            return Self::IoThreadUsed { message };
        }
        match code {
            sys::VIR_ERR_NO_DOMAIN => Self::NoDomain { message },
            sys::VIR_ERR_OPERATION_TIMEOUT | sys::VIR_ERR_RESOURCE_BUSY => Self::Busy { message },
            // "Guest agent disappeared while executing command" (qemu_agent.c).
            sys::VIR_ERR_OPERATION_INVALID if message.to_lowercase().contains("guest agent") => {
                Self::AgentUnresponsive { message }
            }
            sys::VIR_ERR_OPERATION_INVALID => Self::NotRunning { message },
            sys::VIR_ERR_AGENT_UNRESPONSIVE
            | sys::VIR_ERR_AGENT_UNSYNCED
            | sys::VIR_ERR_AGENT_COMMAND_TIMEOUT
            | sys::VIR_ERR_AGENT_COMMAND_FAILED => Self::AgentUnresponsive { message },
            // "QEMU guest agent is not configured" comes as ARGUMENT_UNSUPPORTED.
            sys::VIR_ERR_ARGUMENT_UNSUPPORTED | sys::VIR_ERR_CONFIG_UNSUPPORTED
                if message.contains("agent") =>
            {
                Self::NoAgent { message }
            }
            sys::VIR_ERR_CONFIG_UNSUPPORTED
            | sys::VIR_ERR_ARGUMENT_UNSUPPORTED
            | sys::VIR_ERR_OPERATION_UNSUPPORTED
            | sys::VIR_ERR_XML_ERROR
            | sys::VIR_ERR_XML_DETAIL
            | sys::VIR_ERR_NO_SUPPORT => Self::ConfigUnsupported { message },
            sys::VIR_ERR_DEVICE_MISSING => Self::DeviceMissing { message },
            sys::VIR_ERR_NO_CONNECT
            | sys::VIR_ERR_INVALID_CONN
            | sys::VIR_ERR_RPC
            | sys::VIR_ERR_NO_SERVER
            | sys::VIR_ERR_AUTH_FAILED
            | sys::VIR_ERR_AUTH_CANCELLED
            | sys::VIR_ERR_AUTH_UNAVAILABLE => {
                Self::NoConnect { endpoint: endpoint.to_owned(), message }
            }
            // The client side of a socket that cannot be reached or that closed.
            sys::VIR_ERR_SYSTEM_ERROR
                if matches!(
                    domain,
                    sys::VIR_FROM_REMOTE | sys::VIR_FROM_RPC | sys::VIR_FROM_NONE
                ) =>
            {
                Self::NoConnect { endpoint: endpoint.to_owned(), message }
            }
            // The client library's own: "client socket is closed", "connection closed due to
            // keepalive timeout", "received hangup event on socket" (virnetclient.c).
            sys::VIR_ERR_INTERNAL_ERROR if domain == sys::VIR_FROM_RPC => {
                Self::NoConnect { endpoint: endpoint.to_owned(), message }
            }
            code => Self::Other { code, message },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virt::sys;

    #[test]
    fn errors_are_sorted_by_what_can_be_done() {
        let sort = |code, domain, text: &str| {
            LibvirtError::from_parts("sock", code, domain, text.to_owned()).reason()
        };
        let q = sys::VIR_FROM_QEMU;
        for (code, domain, text, reason) in [
            (sys::VIR_ERR_NO_DOMAIN, q, "Domain not found", Reason::VmNotRunning),
            (sys::VIR_ERR_OPERATION_INVALID, q, "domain is not running", Reason::VmNotRunning),
            (
                sys::VIR_ERR_OPERATION_TIMEOUT,
                q,
                "cannot acquire state change lock (held by monitor=remoteDispatchDomainMigrate)",
                Reason::DomainBusy,
            ),
            (
                sys::VIR_ERR_OPERATION_FAILED,
                q,
                "unplug of device was rejected by the guest",
                Reason::GuestRefusedUnplug,
            ),
            (
                sys::VIR_ERR_INTERNAL_ERROR,
                q,
                "unable to execute QEMU command 'device_del': Device ua-x is already in the process of unplug",
                Reason::DetachUnacknowledged,
            ),
            (sys::VIR_ERR_AGENT_UNRESPONSIVE, q, "not responding", Reason::GuestUnproven),
            (
                sys::VIR_ERR_OPERATION_INVALID,
                q,
                "guest agent disappeared while executing command",
                Reason::GuestUnproven,
            ),
            (
                sys::VIR_ERR_ARGUMENT_UNSUPPORTED,
                q,
                "QEMU guest agent is not configured",
                Reason::GuestUnproven,
            ),
            (
                sys::VIR_ERR_SYSTEM_ERROR,
                sys::VIR_FROM_RPC,
                "Failed to connect socket",
                Reason::LibvirtUnreachable,
            ),
            (
                sys::VIR_ERR_SYSTEM_ERROR,
                q,
                "Unable to open '/x': Operation not permitted",
                Reason::LibvirtFailed,
            ),
            (sys::VIR_ERR_DEVICE_MISSING, q, "no device found", Reason::LibvirtFailed),
            (
                sys::VIR_ERR_INTERNAL_ERROR,
                sys::VIR_FROM_RPC,
                "client socket is closed",
                Reason::LibvirtUnreachable,
            ),
            (
                sys::VIR_ERR_INTERNAL_ERROR,
                sys::VIR_FROM_DEVICE,
                "internal error: no device found with alias ua-lunplug-x",
                Reason::LibvirtFailed,
            ),
        ] {
            assert_eq!(sort(code, domain, text), reason, "{text}");
        }
    }

    #[test]
    fn words_of_libvirt_that_have_no_code_are_known() {
        let read = |text: &str| LibvirtError::from_parts("sock", 1, 10, text.to_owned());
        let missing = read("internal error: no device found with alias ua-lunplug-a");
        assert!(matches!(missing, LibvirtError::DeviceMissing { .. }));
        let missing = read("invalid argument: cannot find IOThread '7' in iothreadids list");
        assert!(matches!(missing, LibvirtError::DeviceMissing { .. }));
        let used =
            read("invalid argument: cannot remove IOThread 7 since it is being used by disk 'vda'");
        assert!(matches!(used, LibvirtError::IoThreadUsed { .. }));
        for words in ["to open tray of 'sdz'", "for disk tray status update"] {
            let locked = read(&format!("operation failed: timed out waiting {words}"));
            assert!(matches!(locked, LibvirtError::TrayLocked { .. }), "{words}");
        }
        let other = read("internal error: unexpected qemu URI path '/system', try qemu:///session");
        assert!(other.is_other_instance());
        assert!(!missing.is_other_instance());
    }
}
