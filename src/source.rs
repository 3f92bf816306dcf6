//! Sources as people write them: `iscsi://PORTAL[,PORTAL]/IQN/LUN`.
//!
//! A further transport is a further scheme here.

use std::fmt;
use std::str::FromStr;

use crate::spec::{IscsiSource, Source};
use crate::types::{Iqn, Lun, Malformed};

const RULE: &str = "iscsi://PORTAL[,PORTAL]/IQN/LUN, e.g. iscsi://10.0.0.1,san-b:3260/iqn.2001-04.com.example:disk/1 (IPv6 in brackets, port 3260 unless given)";

/// At most so many portals of one target: more are a mistake, and each costs a login.
pub const MAX_PORTALS: usize = 16;

impl FromStr for Source {
    type Err = Malformed;

    /// Errors of a part name that part (`portal`, `IQN`, `LUN`); anything else is a `source`.
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let IscsiUrl { target, portals, lun } = s.parse()?;
        Ok(Self::Iscsi(IscsiSource { target, portals, lun, chap: None }))
    }
}

/// What a URL says, portals by address ([`Portal`]) or also by name ([`Endpoint`](crate::types::Endpoint)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiUrl<P> {
    /// The target.
    pub target: Iqn,
    /// Its portals.
    pub portals: Vec<P>,
    /// The LUN.
    pub lun: Lun,
}

impl<P: FromStr<Err = Malformed> + PartialEq> FromStr for IscsiUrl<P> {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed::new("source", s, RULE);
        let (scheme, rest) = s.split_once("://").ok_or_else(malformed)?;
        // Neither portals nor IQN nor LUN has a slash.
        let parts: Vec<&str> = rest.split('/').collect();
        let ([portals, target, lun], true) = (&parts[..], scheme.eq_ignore_ascii_case("iscsi"))
        else {
            return Err(malformed());
        };
        let portals = portals_of(portals.split(','))?;
        Ok(Self { portals, target: target.parse()?, lun: lun.parse()? })
    }
}

/// Reads portals: at least one, at most [`MAX_PORTALS`], none twice.
pub fn portals_of<'a, P: FromStr<Err = Malformed> + PartialEq>(
    texts: impl Iterator<Item = &'a str>,
) -> Result<Vec<P>, Malformed> {
    let mut portals: Vec<P> = Vec::new();
    for text in texts {
        let portal = text.parse()?;
        if portals.contains(&portal) {
            return Err(Malformed::new("portal", text, "each portal once"));
        }
        if portals.len() == MAX_PORTALS {
            return Err(Malformed::new("portal", text, "at most 16 portals"));
        }
        portals.push(portal);
    }
    if portals.is_empty() {
        return Err(Malformed::new("portal", "", "at least one portal"));
    }
    Ok(portals)
}

impl fmt::Display for Source {
    /// The URL that reads back as the same source.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iscsi(s) => {
                let portals: Vec<String> = s.portals.iter().map(ToString::to_string).collect();
                write!(f, "iscsi://{}/{}/{}", portals.join(","), s.target, s.lun)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Endpoint;
    use proptest::prelude::*;

    fn iscsi(url: &str) -> IscsiSource {
        let Source::Iscsi(source) = url.parse().unwrap();
        source
    }

    #[test]
    fn a_url_gives_portals_target_and_lun() {
        let source = iscsi("iscsi://10.0.0.1,[fd00::2]:3261/iqn.2001-04.com.example:a/7");
        assert_eq!(
            source.portals.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.1:3260", "[fd00::2]:3261"]
        );
        assert_eq!(source.target.as_str(), "iqn.2001-04.com.example:a");
        assert_eq!(source.lun.get(), 7);
    }

    #[test]
    fn a_url_may_name_the_hosts_of_portals() {
        let url = "iscsi://San-A,10.0.0.1,san-a:860/iqn.2001-04.com.example:a/flat:7";
        let read: IscsiUrl<Endpoint> = url.parse().unwrap();
        let portals: Vec<String> = read.portals.iter().map(ToString::to_string).collect();
        assert_eq!(portals, ["san-a:3260", "10.0.0.1:3260", "san-a:860"]);
        assert_eq!(read.lun.to_string(), "flat:7");
        // A source has addresses: names are resolved before.
        assert_eq!(url.parse::<Source>().unwrap_err().what, "portal");
        let twice = url.replace("10.0.0.1", "san-a:3260");
        assert_eq!(twice.parse::<IscsiUrl<Endpoint>>().unwrap_err().rule, "each portal once");
    }

    #[test]
    fn each_wrong_part_is_named() {
        for (url, what) in [
            ("", "source"),
            ("iqn.2001-04.com.example:a", "source"),
            ("nfs://10.0.0.1/iqn.2001-04.com.example:a/1", "source"),
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a", "source"),
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a/1/2", "source"),
            ("iscsi:///iqn.2001-04.com.example:a/1", "portal"),
            ("iscsi://10.0.0.1,/iqn.2001-04.com.example:a/1", "portal"),
            ("iscsi://10.0.0.1,10.0.0.1:3260/iqn.2001-04.com.example:a/1", "portal"),
            ("iscsi://fd00::2:x/iqn.2001-04.com.example:a/1", "portal"),
            ("iscsi://10.0.0.1/example:a/1", "IQN"),
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a/", "LUN"),
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a/16384", "LUN"),
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a/0x1", "LUN"),
        ] {
            let error = url.parse::<Source>().unwrap_err();
            assert_eq!(error.what, what, "{url}: {error}");
        }
        let many: Vec<String> = (1..=17).map(|n| format!("10.0.0.{n}")).collect();
        let error = format!("iscsi://{}/iqn.2001-04.com.example:a/1", many.join(","))
            .parse::<Source>()
            .unwrap_err();
        assert_eq!(error.rule, "at most 16 portals");
    }

    prop_compose! {
        fn sources()(
            v4 in proptest::collection::btree_set((1u32..0xdfff_ffff, 1u16..), 1..8),
            v6 in proptest::collection::btree_set((1u128..0xfe00 << 112, 1u16..), 0..8),
            name in "[a-z0-9][a-z0-9.:-]{0,60}",
            lun in 0u64..=16383,
        ) -> Source {
            let portals = v4.iter().map(|&(ip, port)| {
                format!("{}:{port}", std::net::Ipv4Addr::from(ip))
            }).chain(v6.iter().map(|&(ip, port)| {
                format!("[{}]:{port}", std::net::Ipv6Addr::from(ip))
            }));
            Source::Iscsi(IscsiSource {
                portals: portals.map(|p| p.parse().unwrap()).collect(),
                target: format!("iqn.2001-04.{name}").parse().unwrap(),
                lun: lun.try_into().unwrap(),
                chap: None,
            })
        }
    }

    proptest! {
        #[test]
        fn a_source_written_reads_back_the_same(source in sources()) {
            prop_assert_eq!(source.to_string().parse::<Source>().unwrap(), source);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,200}") {
            let _ = text.parse::<Source>();
            let _ = format!("iscsi://{text}").parse::<Source>();
        }
    }
}
