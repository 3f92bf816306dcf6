//! The priority of the daemon's own threads (ADR 19).
#![allow(unsafe_code)]

use std::io;
use std::sync::Once;

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};

/// The lowest of the real-time ones: before all ordinary threads, and after all else that is real-time.
const PRIORITY: libc::c_int = 1;

/// Has the calling thread come before ordinary ones (`SCHED_RR`), where the process may have real-time priorities:
/// RLIMIT_RTPRIO says so (`LimitRTPRIO=` of the unit), as it does for multipathd. What the thread begins, programs above all,
/// is ordinary again.
/// Where the kernel refuses they stay ordinary, and the log says so once.
pub fn raise() {
    static TOLD: Once = Once::new();
    if let Err(error) = raised() {
        TOLD.call_once(|| {
            tracing::warn!(%error, "the kernel refuses the real-time priority that LimitRTPRIO= allows: on a busy node volumes come and go slower; 0 there says that it is not wanted");
        });
    }
}

fn raised() -> io::Result<()> {
    let (limit, _) = getrlimit(Resource::RLIMIT_RTPRIO)?;
    if limit == 0 {
        return Ok(()); // Nobody wants it; root might all the same.
    }
    let parameter = libc::sched_param { sched_priority: PRIORITY };
    let policy = libc::SCHED_RR | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 is the calling thread, and the parameter is read during the call alone.
    nix::errno::Errno::result(unsafe {
        libc::sched_setscheduler(0, policy, &raw const parameter)
    })?;
    Ok(())
}
