//! The gRPC service: validates, converts, maps errors, and nothing else.
//!
//! ```text
//! unix socket -> auth (who calls) -> service -> convert (wire to types) -> vm::facade::Volumes
//!                                       ^                                        |
//!                                       +------ status (refusal to gRPC) <-------+
//! ```

pub mod auth;
mod batch;
pub mod convert;
mod moves;
mod names;
pub mod server;
mod service;
pub mod status;
mod watch;

pub use service::Service;

/// What `proto/lunplug/v1` generates. Its documentation is the contract's own.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("lunplug.v1");

    impl std::fmt::Debug for ChapCredentials {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("ChapCredentials").finish_non_exhaustive()
        }
    }

    impl Drop for ChapCredentials {
        fn drop(&mut self) {
            use zeroize::Zeroize as _;
            self.password.zeroize();
            self.password_in.zeroize();
        }
    }

    /// The contract's descriptors, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lunplug.bin"));
}
