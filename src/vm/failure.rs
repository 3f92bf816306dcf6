//! A step that did not succeed, as the handler sees it: one shape for the errors of all modules.

use std::error::Error;

use super::facade::Refusal;
use crate::reason::Reason;

/// Why a step did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The stable code.
    pub reason: Reason,
    /// The chain of causes in one line, outermost first.
    pub message: String,
}

impl Failure {
    /// A failure of the handler's own.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }

    /// From a module's error: its causes are joined, for each Display speaks of itself alone.
    pub fn of(reason: Reason, error: &dyn Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        Self { reason, message }
    }

    /// The same failure, when undoing what was done failed as well: both are kept.
    #[must_use]
    pub fn and_undo(mut self, undo: &Failure) -> Self {
        self.message = format!("{}; undoing it failed too: {}", self.message, undo.message);
        self
    }

    /// Counts it, by metric `lunplug_failures_total` with labels `way` and `reason`.
    pub fn count(&self, way: &'static str) {
        let reason = self.reason.code();
        metrics::counter!("lunplug_failures_total", "way" => way, "reason" => reason).increment(1);
    }

    /// Whether the same step may succeed later, unchanged.
    pub fn is_transient(&self) -> bool {
        self.reason.is_transient()
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::new(failure.reason, failure.message)
    }
}

/// Implements the conversion from errors that know their reason.
macro_rules! failures {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::of(error.reason(), &error)
            }
        })*
    };
}

failures!(
    crate::journal::Error,
    crate::connector::Error,
    crate::devnode::DevNodeError,
    crate::cgroup::CgroupError,
    crate::domain::Error,
    crate::host::libvirt::LibvirtError,
    crate::host::podfiles::FileError,
    super::discover::DiscoverError,
);
