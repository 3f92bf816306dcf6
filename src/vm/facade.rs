//! What the API asks of the handlers.

use crate::reason::Reason;

/// A request that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The stable code.
    pub reason: Reason,
    /// The field at fault, in the request's own terms.
    pub field: Option<String>,
    /// What is wrong, with the value.
    pub message: String,
}

impl Refusal {
    /// A refusal that is not about one field.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, field: None, message: message.into() }
    }

    /// Names the field at fault.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }
}
