//! The connection to lunplugd.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use super::failure::{Exit, Failure};
use crate::api::v1::lunplug_service_client::LunplugServiceClient;

/// A client of the contract.
pub type Client = LunplugServiceClient<Channel>;

/// A call has so long at least. None needs it: all return when wishes are durable, but for an expand; the
/// guest may be asked about each of many volumes before.
pub(super) const CALL: Duration = Duration::from_secs(60);

/// A request with the deadline of a call.
pub(super) fn timed<T>(message: T) -> Request<T> {
    timed_for(CALL, message)
}

/// A request with a deadline of its own.
pub(super) fn timed_for<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Connects; an error says what to do.
pub(super) async fn connect(socket: &Path) -> Result<Client, Failure> {
    // Once by hand, for the sake of the error.
    UnixStream::connect(socket).await.map_err(|error| unreachable(socket, &error))?;
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is not used, but HTTP/2 wants one.
    let channel =
        Endpoint::from_static("http://lunplugd").connect_with_connector(connector).await.map_err(
            |error| Failure::plain(Exit::Unavailable, format!("cannot speak to lunplugd: {error}")),
        )?;
    // lunplugd is no stranger: a node's list may be larger than what gRPC takes from one (4 MiB).
    Ok(LunplugServiceClient::new(channel).max_decoding_message_size(usize::MAX))
}

fn unreachable(socket: &Path, error: &std::io::Error) -> Failure {
    let (exit, remedy) = match error.kind() {
        ErrorKind::PermissionDenied => {
            (Exit::Denied, "Run it as root, or as a member of the socket's group.")
        }
        ErrorKind::NotFound => {
            (Exit::Unavailable, "Start lunplugd, or name its socket with --socket.")
        }
        _ => (Exit::Unavailable, "Start lunplugd: systemctl start lunplugd."),
    };
    let message = format!("cannot connect to lunplugd at {}: {error}", socket.display());
    Failure { remedy: remedy.into(), ..Failure::plain(exit, message) }
}
