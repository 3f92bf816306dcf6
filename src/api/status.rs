//! The one place where a reason becomes a gRPC status.
//!
//! Every failed call carries ErrorInfo (code, domain, metadata), LocalizedMessage (what to do), and
//! as fits BadRequest (the field) and RetryInfo.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::v1;
use crate::reason::{Kind, Reason};
use crate::types::Malformed;
use crate::vm::facade::Refusal;

/// ErrorInfo's `domain`.
pub const DOMAIN: &str = "lunplug";

/// A message's longest form in bytes: it travels several times in HTTP/2 trailers, for which some
/// clients have no more than 8 KiB.
const MAX_MESSAGE: usize = 1000;

/// What a call is about, for ErrorInfo's metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// The VM as `namespace/name`; empty where there is none.
    pub vm: String,
    /// The volume's name; empty where there is none.
    pub volume: String,
}

/// The gRPC code of a reason.
pub fn code(reason: Reason) -> Code {
    match reason.kind() {
        Kind::Invalid => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        // Clients take ALREADY_EXISTS for "what you asked for is there"; that must not be said of a
        // removal.
        Kind::Conflict => match reason {
            Reason::VmExists | Reason::VolumeExists => Code::AlreadyExists,
            _ => Code::FailedPrecondition,
        },
        Kind::Precondition => Code::FailedPrecondition,
        Kind::Unavailable => Code::Unavailable,
        Kind::Denied => Code::PermissionDenied,
        Kind::Deadline => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::Internal => Code::Internal,
    }
}

/// When the same request may be sent again; `None` when that cannot help by itself.
pub fn retry_after(reason: Reason) -> Option<Duration> {
    match reason.kind() {
        Kind::Unavailable => Some(Duration::from_secs(2)),
        Kind::Deadline => Some(Duration::from_secs(5)),
        Kind::Invalid
        | Kind::NotFound
        | Kind::Conflict
        | Kind::Precondition
        | Kind::Denied
        | Kind::Cancelled
        | Kind::Internal => None,
    }
}

/// What a refusal tells, whichever way: the details of a failed call, or the result of one volume of many.
pub fn error(refusal: &Refusal) -> v1::VolumeError {
    let reason = refusal.reason;
    let retry_after = retry_after(reason);
    v1::VolumeError {
        reason: reason.code().into(),
        message: shortened(&refusal.message).into(),
        remedy: reason.remedy().into(),
        field: shortened(refusal.field.as_deref().unwrap_or_default()).into(),
        transient: retry_after.is_some(),
        retry_after: retry_after.and_then(|delay| delay.try_into().ok()),
    }
}

/// The status of a refusal, with all its details.
pub fn status(refusal: &Refusal, about: &About) -> Status {
    let error = error(refusal);
    let mut metadata = HashMap::new();
    for (key, value) in [("vm", &about.vm), ("volume", &about.volume), ("field", &error.field)] {
        if !value.is_empty() {
            metadata.insert(key.to_owned(), shortened(value).to_owned());
        }
    }
    let mut details = ErrorDetails::new();
    details.set_error_info(error.reason, DOMAIN, metadata);
    details.set_localized_message("en", error.remedy);
    if refusal.reason.kind() == Kind::Invalid && !error.field.is_empty() {
        details.add_bad_request_violation(error.field, error.message.as_str());
    }
    if let Some(delay) = retry_after(refusal.reason) {
        details.set_retry_info(Some(delay));
    }
    Status::with_error_details(code(refusal.reason), error.message, details)
}

/// The refusal of a malformed value in the named field.
pub fn malformed(field: impl Into<String>, error: &Malformed) -> Refusal {
    let field = field.into();
    let message = format!("{field}: {error}");
    Refusal::new(malformed_reason(error.what), message).field(field)
}

/// The reason for a malformed value, by the kind of value ([`Malformed::what`]).
pub fn malformed_reason(what: &str) -> Reason {
    match what {
        "VM namespace" | "VM name" | "volume name" => Reason::InvalidName,
        "serial" => Reason::InvalidSerial,
        "source" | "host path" => Reason::InvalidSource,
        "IQN" => Reason::InvalidIqn,
        "portal" | "portals" => Reason::InvalidPortal,
        "LUN" => Reason::InvalidLun,
        "WWPN" => Reason::InvalidWwpn,
        "WWID" => Reason::InvalidWwid,
        "path" => Reason::PathNotAllowed,
        _ => Reason::InvalidOption,
    }
}

fn shortened(text: &str) -> &str {
    let mut end = MAX_MESSAGE.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_why_about_what_which_field_and_what_to_do() {
        let about = About { vm: "default/a".into(), volume: "data".into() };
        for &reason in Reason::ALL {
            let refusal = Refusal::new(reason, "it went wrong").field("volume.serial");
            let status = status(&refusal, &about);
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason.code(), DOMAIN));
            assert_eq!(info.metadata["vm"], "default/a");
            assert_eq!(info.metadata["volume"], "data");
            assert_eq!(info.metadata["field"], "volume.serial");
            assert_eq!(details.localized_message().unwrap().message, reason.remedy());
            assert_eq!(details.bad_request().is_some(), reason.kind() == Kind::Invalid);
            assert_eq!(details.retry_info().is_some(), reason.is_transient());
            let error = error(&refusal);
            assert_eq!(
                (error.reason.as_str(), error.field.as_str()),
                (reason.code(), "volume.serial")
            );
            assert_eq!(
                (error.message.as_str(), error.remedy.as_str()),
                ("it went wrong", reason.remedy())
            );
            assert_eq!(
                (error.transient, error.retry_after.is_some()),
                (reason.is_transient(), reason.is_transient())
            );
        }
    }

    #[test]
    fn a_message_without_end_does_not_burst_the_trailers() {
        let refusal = Refusal::new(Reason::InvalidOption, "é".repeat(100_000)).field("f");
        let status = status(&refusal, &About::default());
        assert_eq!(status.message().len(), MAX_MESSAGE);
        assert!(status.details().len() < 4096);
    }

    #[test]
    fn every_kind_of_value_of_the_types_has_its_own_reason() {
        use crate::spec::Source;
        use crate::types::{Iqn, Lun, Portal, Serial, VmId, VolumeName, Wwid};
        let what = [
            ("A/a".parse::<VmId>().unwrap_err(), Reason::InvalidName),
            ("a/A".parse::<VmId>().unwrap_err(), Reason::InvalidName),
            ("A".parse::<VolumeName>().unwrap_err(), Reason::InvalidName),
            ("?".parse::<Serial>().unwrap_err(), Reason::InvalidSerial),
            ("?".parse::<Iqn>().unwrap_err(), Reason::InvalidIqn),
            ("?".parse::<Portal>().unwrap_err(), Reason::InvalidPortal),
            ("?".parse::<Lun>().unwrap_err(), Reason::InvalidLun),
            ("?".parse::<Wwid>().unwrap_err(), Reason::InvalidWwid),
            ("?".parse::<Source>().unwrap_err(), Reason::InvalidSource),
        ];
        for (error, reason) in what {
            assert_eq!(malformed_reason(error.what), reason, "{error}");
        }
    }
}
