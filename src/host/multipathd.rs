//! The multipath daemon, spoken to over its socket.

mod files;
mod real;
mod turns;

use std::io;

use async_trait::async_trait;

use crate::types::{Outcome, Wwid};

pub use real::RealMultipathd;
pub use turns::InTurn;

/// multipathd could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum MultipathdError {
    /// Nobody listens.
    #[error("multipathd does not run")]
    NotRunning,
    /// Somebody other than root has bound its name.
    #[error("multipathd's socket is served by uid {uid}, not by root")]
    Untrusted {
        /// Who serves it.
        uid: u32,
    },
    /// It did not answer in time.
    #[error("multipathd did not answer {command:?} in time")]
    TimedOut {
        /// What it was asked.
        command: String,
    },
    /// It answered `fail`, `timeout` or the like. (`blacklisted` and `delayed` come as success.)
    #[error("multipathd refused {command:?}: {answer}")]
    Refused {
        /// What it was asked.
        command: String,
        /// What it answered.
        answer: String,
    },
    /// The socket failed.
    #[error("multipathd's socket failed")]
    Io(#[source] io::Error),
}

/// The door to multipathd. Its answers are hints; sysfs is the truth.
#[async_trait]
pub trait Multipathd: Send + Sync {
    /// Sends one command (at most 512 bytes), for whose answer the caller has a deadline ([`InTurn`]), and returns the answer without the closing NUL.
    async fn ask(&self, command: &str) -> Result<String, MultipathdError>;

    /// Removes a LUN's entries from multipath's `wwids` and `bindings` files.
    async fn forget(&self, wwid: &Wwid) -> Result<Outcome, MultipathdError>;
}

/// Tells an answer that is a refusal from one that is not.
pub(super) fn judge(command: &str, answer: String) -> Result<String, MultipathdError> {
    let text = answer.trim();
    if ["fail", "timeout", "permission deny"].iter().any(|refusal| text.starts_with(refusal)) {
        return Err(MultipathdError::Refused { command: command.into(), answer: text.into() });
    }
    Ok(answer)
}
