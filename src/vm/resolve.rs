//! Portals by the names of their hosts: each name is resolved once, and a volume keeps what it was
//! resolved to for as long as it is there. A name that moves takes no volume with it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::host::resolver::Resolver;
use crate::reason::Reason;
use crate::types::{HostPort, Portal};

use super::failure::Failure;

/// What names were resolved to.
pub type Names = BTreeMap<HostPort, Portal>;

/// Resolves `wanted`, less what is `recorded` already, within `limit` in all.
pub(super) async fn resolve(
    resolver: &dyn Resolver,
    limit: Duration,
    wanted: &BTreeSet<HostPort>,
    mut recorded: Names,
) -> Result<Names, Failure> {
    recorded.retain(|name, _| wanted.contains(name));
    let all = async {
        for name in wanted {
            if !recorded.contains_key(name) {
                let portal = one(resolver, name).await?;
                recorded.insert(name.clone(), portal);
            }
        }
        Ok(recorded)
    };
    let late = |_| Err(failure(format!("names of portals were not resolved within {limit:?}")));
    tokio::time::timeout(limit, all).await.unwrap_or_else(late)
}

/// A name is one portal: the address that the host prefers, as iscsiadm would take it.
async fn one(resolver: &dyn Resolver, name: &HostPort) -> Result<Portal, Failure> {
    let found =
        resolver.resolve(name).await.map_err(|error| failure(format!("{name}: {error}")))?;
    let usable = found.first().and_then(|address| address.to_string().parse().ok());
    usable.ok_or_else(|| failure(format!("{name} has no address that can be a portal: {found:?}")))
}

fn failure(message: String) -> Failure {
    Failure::new(Reason::PortalNotResolved, message)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::SocketAddr;

    use async_trait::async_trait;

    use super::*;

    struct Table(Vec<(&'static str, &'static [&'static str])>);

    #[async_trait]
    impl Resolver for Table {
        async fn resolve(&self, name: &HostPort) -> io::Result<Vec<SocketAddr>> {
            if name.host() == "silent" {
                std::future::pending::<()>().await;
            }
            let found = self.0.iter().find(|(host, _)| *host == name.host());
            let (_, ips) = found.ok_or(io::ErrorKind::NotFound)?;
            Ok(ips
                .iter()
                .map(|ip| (ip.parse::<std::net::IpAddr>().unwrap(), name.port()).into())
                .collect())
        }
    }

    fn names(texts: &[&str]) -> BTreeSet<HostPort> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    async fn of(texts: &[&str], recorded: Names) -> Result<Vec<String>, Failure> {
        let table =
            Table(vec![("san", &["fd00::7", "10.0.0.7"]), ("none", &[]), ("any", &["0.0.0.0"])]);
        let found = resolve(&table, Duration::from_secs(1), &names(texts), recorded).await?;
        Ok(found.iter().map(|(name, portal)| format!("{name}={portal}")).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_the_address_that_is_preferred_and_stays_what_it_was() {
        let found = of(&["san", "san:860"], Names::new()).await.unwrap();
        assert_eq!(found, ["san:860=[fd00::7]:860", "san:3260=[fd00::7]:3260"]);
        let recorded: Names = [
            ("san".parse().unwrap(), "10.0.0.9".parse().unwrap()),
            ("left".parse().unwrap(), "10.0.0.1".parse().unwrap()),
        ]
        .into();
        assert_eq!(of(&["san"], recorded).await.unwrap(), ["san:3260=10.0.0.9:3260"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_resolved_is_told_by_its_name() {
        for (name, words) in [
            ("unknown", "unknown:3260"),
            ("none", "none:3260 has no address"),
            ("any", "0.0.0.0"),
            ("silent", "within 1s"),
        ] {
            let failure = of(&["san", name], Names::new()).await.unwrap_err();
            assert_eq!(failure.reason, Reason::PortalNotResolved);
            assert!(failure.message.contains(words), "{}", failure.message);
        }
    }
}
