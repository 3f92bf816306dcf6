//! Where tests stop the process: right before and right after each step.
//!
//! Only a build with the feature `kill-points` can; any other has nothing there.

use async_trait::async_trait;

use crate::step::KillPoint;

/// What is there at a kill point.
#[async_trait]
pub trait KillPoints: Send + Sync {
    /// Returns, unless this is where the process is to end.
    async fn reach(&self, point: KillPoint);
}

/// Those of the real host.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealKillPoints;

#[cfg(not(feature = "kill-points"))]
#[async_trait]
impl KillPoints for RealKillPoints {
    async fn reach(&self, _point: KillPoint) {}
}

/// The process kills itself by SIGKILL, so that nothing of it runs any more, when the file named by
/// the environment's `LUNPLUGD_KILL_AT` holds the point's name. The file is removed before, so that
/// the next process gets past it.
#[cfg(feature = "kill-points")]
#[async_trait]
impl KillPoints for RealKillPoints {
    async fn reach(&self, point: KillPoint) {
        let Some(file) = std::env::var_os("LUNPLUGD_KILL_AT") else { return };
        let asked = std::fs::read_to_string(&file).unwrap_or_default();
        if asked.trim() != point.to_string() || std::fs::remove_file(&file).is_err() {
            return;
        }
        let own = nix::unistd::getpid();
        nix::sys::signal::kill(own, nix::sys::signal::Signal::SIGKILL)
            .expect("a process may kill itself");
        std::future::pending::<()>().await;
    }
}
