//! Why a command failed, and with which exit code.

use std::io::{self, Write};

use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::output::{self, Format};
use crate::api::status::malformed_reason;
use crate::api::v1;
use crate::reason::{Kind, Reason};
use crate::types::Malformed;

/// The exit codes, as --help has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done, or found done.
    Ok = 0,
    /// Damaged data, or a bug.
    Failed = 1,
    /// The request is wrong.
    Usage = 2,
    /// No such VM or volume.
    NotFound = 3,
    /// It clashes with what exists.
    Conflict = 4,
    /// Somebody has to act first.
    Precondition = 5,
    /// Not now, or not in time.
    Unavailable = 6,
    /// Not allowed.
    Denied = 7,
    /// Called off.
    Cancelled = 8,
    /// `journal verify` found problems.
    Problems = 9,
}

impl From<Kind> for Exit {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Invalid => Self::Usage,
            Kind::NotFound => Self::NotFound,
            Kind::Conflict => Self::Conflict,
            Kind::Precondition => Self::Precondition,
            Kind::Unavailable | Kind::Deadline => Self::Unavailable,
            Kind::Denied => Self::Denied,
            Kind::Cancelled => Self::Cancelled,
            Kind::Internal => Self::Failed,
        }
    }
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The exit code.
    #[serde(skip)]
    pub exit: Exit,
    /// The reason's code; empty where there is none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The field to blame; empty where there is none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What happened.
    pub message: String,
    /// What to do; empty where nothing is known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Failure {
    /// One without a reason of the daemon's.
    pub fn plain(exit: Exit, message: impl Into<String>) -> Self {
        let (reason, field, remedy) = (String::new(), String::new(), String::new());
        Self { exit, reason, field, message: message.into(), remedy }
    }

    /// lunplugd's configuration cannot be used.
    pub(super) fn config(error: &crate::config::Error) -> Self {
        let cause = std::error::Error::source(error).map(|c| format!(": {c}"));
        Self::plain(Exit::Usage, format!("{error}{}", cause.unwrap_or_default()))
    }

    /// One with a reason.
    pub fn of(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason: reason.code().into(),
            remedy: reason.remedy().into(),
            ..Self::plain(reason.kind().into(), message)
        }
    }

    /// A value that is wrong before it was sent.
    pub fn malformed(field: &str, error: &Malformed) -> Self {
        Self { field: field.into(), ..Self::of(malformed_reason(error.what), error.to_string()) }
    }

    /// A volume in trouble that does not go away by itself.
    pub fn trouble(trouble: &v1::Trouble) -> Self {
        Self {
            exit: Reason::from_code(&trouble.reason).map_or(Exit::Failed, |r| r.kind().into()),
            reason: trouble.reason.clone(),
            field: String::new(),
            message: trouble.message.clone(),
            remedy: trouble.remedy.clone(),
        }
    }

    /// A volume of many that was refused.
    pub fn refused(error: &v1::VolumeError) -> Self {
        Self {
            exit: Reason::from_code(&error.reason).map_or(Exit::Failed, |r| r.kind().into()),
            reason: error.reason.clone(),
            field: error.field.clone(),
            message: error.message.clone(),
            remedy: error.remedy.clone(),
        }
    }

    /// Writes it for a person, or in the form that results have.
    pub fn write(&self, format: Format, to: &mut dyn Write) -> io::Result<()> {
        #[derive(Serialize)]
        struct Wrapped<'a> {
            error: &'a Failure,
        }
        match format {
            Format::Json | Format::Yaml => output::document(format, &Wrapped { error: self }, to),
            Format::Table => {
                let reason = match self.reason.as_str() {
                    "" => String::new(),
                    reason => format!("{reason}: "),
                };
                writeln!(to, "error: {reason}{}", output::clean(&self.message))?;
                if !self.remedy.is_empty() {
                    writeln!(to, "  what to do: {}", output::clean(&self.remedy))?;
                }
                Ok(())
            }
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info();
        let reason = info.map(|info| info.reason.clone()).unwrap_or_default();
        let known = Reason::from_code(&reason);
        Self {
            exit: known.map_or_else(|| exit_of(status.code()), |r| r.kind().into()),
            field: info.and_then(|i| i.metadata.get("field").cloned()).unwrap_or_default(),
            message: status.message().to_owned(),
            remedy: details.localized_message().map(|m| m.message.clone()).unwrap_or_default(),
            reason,
        }
    }
}

/// For a status without a reason that we know: of the transport, or of a newer daemon.
fn exit_of(code: Code) -> Exit {
    match code {
        Code::Ok => Exit::Ok,
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists | Code::Aborted => Exit::Conflict,
        Code::FailedPrecondition | Code::Unimplemented => Exit::Precondition,
        Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted => Exit::Unavailable,
        Code::PermissionDenied | Code::Unauthenticated => Exit::Denied,
        Code::Cancelled => Exit::Cancelled,
        Code::Unknown | Code::Internal | Code::DataLoss => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status::{About, error, status};
    use crate::vm::facade::Refusal;

    #[test]
    fn what_the_daemon_refuses_arrives_whole() {
        for &reason in Reason::ALL {
            let refusal = Refusal::new(reason, "no").field("volume.name");
            let failure = Failure::from(status(&refusal, &About::default()));
            let expected = Failure { field: "volume.name".into(), ..Failure::of(reason, "no") };
            assert_eq!(failure, expected);
            assert_eq!(Failure::refused(&error(&refusal)), expected);
            assert_ne!(failure.exit, Exit::Ok);
        }
    }

    #[test]
    fn a_person_reads_what_and_what_to_do_and_no_escape_sequences() {
        let failure = Failure::of(Reason::LoginRefused, "target said \x1b[31mno\n");
        let mut text = Vec::new();
        failure.write(Format::Table, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("error: LOGIN_REFUSED: target said "), "{text}");
        assert!(text.contains("\n  what to do: Check the target's ACL"), "{text}");
        assert!(!text.contains('\x1b'));
        let mut json = Vec::new();
        failure.write(Format::Json, &mut json).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["error"]["reason"], "LOGIN_REFUSED");
    }
}
