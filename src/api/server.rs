//! Puts the service, health and reflection on one socket, and ends them cleanly.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::InterceptorLayer;

use super::Service;
use super::auth::AllowedPeers;
use super::v1::{self, lunplug_service_server::LunplugServiceServer};
use crate::vm::facade::Volumes;

/// After being told to stop, calls have so long to end. None needs it: all return when a wish is
/// durable.
const GRACE: Duration = Duration::from_secs(10);

/// Serving failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The contract's own descriptors are damaged.
    #[error("gRPC reflection cannot be offered")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The server could not go on.
    #[error("the gRPC server failed")]
    Serve(#[source] tonic::transport::Error),
}

/// Serves until `stopping` turns true; then ends streams with SHUTTING_DOWN and lets calls finish.
pub async fn serve(
    volumes: Arc<dyn Volumes>,
    peers: AllowedPeers,
    listener: UnixListener,
    stopping: watch::Receiver<bool>,
) -> Result<(), Error> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<LunplugServiceServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(Error::Reflection)?;
    let (mut told, mut late) = (stopping.clone(), stopping.clone());
    let server = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(64)
        .layer(InterceptorLayer::new(peers.interceptor()))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(LunplugServiceServer::new(Service::new(volumes, stopping)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            let _ = told.wait_for(|stop| *stop).await;
            health.set_not_serving::<LunplugServiceServer<Service>>().await;
        });
    let overdue = async move {
        let _ = late.wait_for(|stop| *stop).await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = server => served.map_err(Error::Serve),
        () = overdue => {
            tracing::warn!("calls did not end within {GRACE:?}: leaving them");
            Ok(())
        }
    }
}
