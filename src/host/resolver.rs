//! Names of hosts.

use std::io;
use std::net::SocketAddr;

use async_trait::async_trait;

use crate::types::HostPort;

/// The door to the host's resolver. The caller sets the deadline.
#[async_trait]
pub trait Resolver: Send + Sync {
    /// The addresses of a name, the one to be preferred first (RFC 6724); none is an error.
    async fn resolve(&self, name: &HostPort) -> io::Result<Vec<SocketAddr>>;
}

/// getaddrinfo(3): /etc/hosts, DNS, whatever nsswitch.conf says.
pub struct RealResolver;

#[async_trait]
impl Resolver for RealResolver {
    async fn resolve(&self, name: &HostPort) -> io::Result<Vec<SocketAddr>> {
        let found = tokio::net::lookup_host((name.host(), name.port())).await?;
        Ok(found.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_hosts_own_name_is_known_and_another_is_an_error() {
        let found = RealResolver.resolve(&"localhost:860".parse().unwrap()).await.unwrap();
        assert!(found.iter().all(|a| a.ip().is_loopback() && a.port() == 860), "{found:?}");
        assert!(!found.is_empty());
        // Never delegated (RFC 6761).
        RealResolver.resolve(&"no-such-host.invalid".parse().unwrap()).await.unwrap_err();
    }
}
