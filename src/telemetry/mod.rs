//! Logs, spans and metrics.
//!
//! Never logged: secrets, and whole requests (they may come to hold secrets).

pub mod metrics;

use std::io;
use std::os::fd::AsFd;

use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{Log, LogFormat};

/// Logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The level is not one.
    #[error(
        "log level {0:?} is malformed: give error, warn, info, debug, trace, or MODULE=LEVEL,..."
    )]
    Level(String, #[source] ParseError),
    /// No journal.
    #[error("the journal cannot be reached: set log.format to text or json")]
    Journal(#[source] io::Error),
    /// Called twice.
    #[error("logging was set up before")]
    Twice(#[source] TryInitError),
}

/// Reads a level or directives.
pub fn filter(level: &str) -> Result<EnvFilter, Error> {
    EnvFilter::builder().parse(level).map_err(|error| Error::Level(level.into(), error))
}

/// Sets up the process's logs; once, at start.
pub fn init(log: &Log) -> Result<(), Error> {
    let registry = tracing_subscriber::registry().with(filter(&log.level)?);
    let format = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match log.format {
        // The journal has the time itself. Its own fields would hide what a line is about from
        // whoever reads plain `journalctl -u lunplugd`.
        LogFormat::Auto if stderr_is_journal() => {
            registry.with(format.with_ansi(false).without_time()).try_init()
        }
        LogFormat::Auto | LogFormat::Text => registry.with(format.with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(format.json()).try_init(),
        LogFormat::Journald => {
            registry.with(tracing_journald::layer().map_err(Error::Journal)?).try_init()
        }
    }
    .map_err(Error::Twice)
}

/// systemd names the device and inode of the stream it connected (systemd.exec(5), JOURNAL_STREAM);
/// stderr may have been redirected since.
fn stderr_is_journal() -> bool {
    let Ok(stat) = nix::sys::stat::fstat(io::stderr().as_fd()) else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|v| v == format!("{}:{}", stat.st_dev, stat.st_ino))
}
