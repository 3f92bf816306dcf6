//! Blocking calls, off the async runtime and with a deadline.

use std::io;
use std::time::Duration;

/// How long a call on a pod's directory, /proc, a cgroup or bpf(2) may take. All of them are local
/// and take microseconds; only a hung file system makes them slow.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `work` on a blocking thread. A call that is not back in time is abandoned, not waited for:
/// its thread ends when the kernel lets it.
pub(in crate::host) async fn blocking<T, E>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<io::Error> + Send + 'static,
{
    match tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(join)) => Err(io::Error::other(join).into()),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{what} did not return within {DEADLINE:?}"),
        )
        .into()),
    }
}
