//! Sources as people write them: `iscsi://PORTAL[,PORTAL]/IQN/LUN`, and after a `+` each further target at
//! which the same LUN is to be had: `iscsi://PORTAL/IQN/LUN+PORTAL/IQN/LUN`. The iface record and the
//! initiator name, where they are not the node's own, come last: `?iface=NAME&initiator=IQN`.
//!
//! By Fibre Channel: `fc://WWPN[,WWPN]/LUN`, and more behind a `?` ([`fc_source`] has the rules).
//!
//! What is on the host already: `block:///dev/NAME`, `file:///PATH` and `file+qcow2:///PATH`, the path as it is.
//!
//! A further transport is a further scheme here.

mod fc;
mod local;

use std::fmt;
use std::str::FromStr;

use crate::spec::{IscsiSource, IscsiTarget, Source};
use crate::types::{Iface, Malformed};

const RULE: &str = "iscsi://PORTAL[,PORTAL]/IQN/LUN, e.g. iscsi://10.0.0.1,san-b:3260/iqn.2001-04.com.example:disk/1 (IPv6 in brackets, port 3260 unless given; +PORTAL[,PORTAL]/IQN/LUN for each further target of the same LUN; ?iface=NAME&initiator=IQN where they are not the node's own)";

/// At most so many portals of one target: more are a mistake, and each costs a login.
pub const MAX_PORTALS: usize = 16;

/// And so many targets of one LUN.
pub const MAX_TARGETS: usize = 16;

pub use fc::fc_source;

impl FromStr for Source {
    type Err = Malformed;

    /// Errors of a part name that part (`portal`, `IQN`, `LUN`); anything else is a `source`.
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let is =
            |kind: &str| s.split_once("://").is_some_and(|(k, _)| k.eq_ignore_ascii_case(kind));
        if is("fc") {
            return fc::read(s).map(Self::Fc);
        }
        if is("block") {
            return local::read_block(s).map(Self::Block);
        }
        if let Some(format) = local::file_format(s) {
            return local::read_file(s, format).map(Self::File);
        }
        let IscsiUrl { first, more, iface } = s.parse()?;
        let source = source_of(first, more, s)?;
        Ok(Self::Iscsi(IscsiSource { iface, ..source }))
    }
}

/// What a URL says: targets, portals by address ([`Portal`](crate::types::Portal)) or also by name
/// ([`Endpoint`](crate::types::Endpoint)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiUrl<P> {
    /// The first target.
    pub first: IscsiTarget<P>,
    /// Further ones.
    pub more: Vec<IscsiTarget<P>>,
    /// By what they are come to.
    pub iface: Iface,
}

impl<P: FromStr<Err = Malformed> + PartialEq> FromStr for IscsiUrl<P> {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed::new("source", s, RULE);
        let (scheme, rest) = s.split_once("://").ok_or_else(malformed)?;
        if !scheme.eq_ignore_ascii_case("iscsi") {
            return Err(malformed());
        }
        // No part has a slash, a plus, a question mark or an ampersand.
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, iface_of(query, s)?),
            None => (rest, Iface::default()),
        };
        let target = |text: &str| {
            let parts: Vec<&str> = text.split('/').collect();
            let [portals, target, lun] = parts[..] else { return Err(malformed()) };
            let portals = portals_of(portals.split(','))?;
            Ok(IscsiTarget { portals, target: target.parse()?, lun: lun.parse()? })
        };
        let mut targets = rest.split('+').map(target);
        let first = targets.next().ok_or_else(malformed)??;
        Ok(Self { first, more: targets.collect::<Result<_, _>>()?, iface: query })
    }
}

/// Reads `iface=NAME&initiator=IQN`, either of them once.
fn iface_of(query: &str, whole: &str) -> Result<Iface, Malformed> {
    let mut iface = Iface::default();
    let mut seen = Vec::new();
    for part in query.split('&') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match key {
            "iface" if !seen.contains(&key) => iface.name = value.parse()?,
            "initiator" if !seen.contains(&key) => iface.initiator = Some(value.parse()?),
            _ => return Err(Malformed::new("source", whole, RULE)),
        }
        seen.push(key);
    }
    Ok(iface)
}

/// What a URL says of it, with the question mark; nothing for the node's own.
pub fn query_of(iface: &Iface) -> String {
    let name = iface.name.unless_default();
    let name = (!name.is_empty()).then(|| format!("iface={name}"));
    let initiator = iface.initiator.iter().map(|initiator| format!("initiator={initiator}"));
    let parts: Vec<String> = name.into_iter().chain(initiator).collect();
    if parts.is_empty() { String::new() } else { format!("?{}", parts.join("&")) }
}

/// The source of a LUN that is to be had at `first` and at `more` targets: at most [`MAX_TARGETS`], none
/// twice. An error shows it as `whole`.
pub fn source_of(
    first: IscsiTarget,
    more: Vec<IscsiTarget>,
    whole: &str,
) -> Result<IscsiSource, Malformed> {
    let IscsiTarget { target, portals, lun } = first;
    let source = IscsiSource {
        target,
        portals,
        lun,
        chap: None,
        more_targets: more,
        iface: Iface::default(),
    };
    let targets = source.targets();
    let keys: std::collections::BTreeSet<String> = targets.iter().map(IscsiTarget::key).collect();
    if keys.len() < targets.len() {
        return Err(Malformed::new("source", whole, "each target with its LUN once"));
    }
    if targets.len() > MAX_TARGETS {
        return Err(Malformed::new("source", whole, "at most 16 targets"));
    }
    Ok(source)
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
                let part = |t: &IscsiTarget| {
                    let portals: Vec<String> = t.portals.iter().map(ToString::to_string).collect();
                    format!("{}/{}", portals.join(","), t.key())
                };
                let parts: Vec<String> = s.targets().iter().map(part).collect();
                write!(f, "iscsi://{}{}", parts.join("+"), query_of(&s.iface))
            }
            Self::Fc(source) => f.write_str(&fc::write(source)),
            Self::Block(source) => write!(f, "block://{}", source.path),
            Self::File(source) => f.write_str(&local::write_file(source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Endpoint;
    use proptest::prelude::*;

    fn iscsi(url: &str) -> IscsiSource {
        let source: Source = url.parse().unwrap();
        source.as_iscsi().unwrap().clone()
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
        let (first, more) = (&read.first, &read.more);
        assert!(more.is_empty());
        let portals: Vec<String> = first.portals.iter().map(ToString::to_string).collect();
        assert_eq!(portals, ["san-a:3260", "10.0.0.1:3260", "san-a:860"]);
        assert_eq!(first.lun.to_string(), "flat:7");
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
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a/1+", "source"),
            ("iscsi://10.0.0.1/iqn.2001-04.com.example:a/1+/iqn.2001-04.com.example:b/1", "portal"),
            (
                "iscsi://10.0.0.1/iqn.2001-04.com.example:a/1+10.0.0.2/iqn.2001-04.com.example:A/1",
                "source",
            ),
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

    #[test]
    fn further_targets_have_portals_and_luns_of_their_own() {
        let url = "iscsi://10.0.0.1:3260,10.0.0.2:3260/iqn.2001-04.com.example:a/7+10.0.0.1:3260/iqn.2001-04.com.example:b/9";
        let source = iscsi(url);
        assert_eq!((source.lun.get(), source.portals.len()), (7, 2));
        let [more] = &source.more_targets[..] else { panic!("{source:?}") };
        assert_eq!(more.key(), "iqn.2001-04.com.example:b/9");
        let whole = Source::Iscsi(source);
        assert_eq!(whole.to_string(), url);
        let turned: Source =
            "iscsi://10.0.0.3/iqn.2001-04.com.example:b/9+10.0.0.4/iqn.2001-04.com.example:a/7"
                .parse()
                .unwrap();
        assert_eq!(whole.key(), turned.key(), "whatever their order and portals");
        let one: Source = "iscsi://10.0.0.5/iqn.2001-04.com.example:b/9".parse().unwrap();
        assert_eq!(whole.shared_with(&one).as_deref(), Some("iscsi://iqn.2001-04.com.example:b/9"));
        let other: Source = "iscsi://10.0.0.5/iqn.2001-04.com.example:b/7".parse().unwrap();
        assert_eq!(whole.shared_with(&other), None);
    }

    #[test]
    fn another_initiator_is_asked_for_behind_a_question_mark() {
        let plain = "iscsi://10.0.0.1:3260/iqn.2001-04.com.example:a/7";
        let url = format!("{plain}?iface=eth1&initiator=iqn.2001-04.com.example:vm-1");
        let source = iscsi(&url);
        assert_eq!(source.iface.name.as_str(), "eth1");
        assert_eq!(source.iface.initiator.unwrap().as_str(), "iqn.2001-04.com.example:vm-1");
        let of = |url: &str| url.parse::<Source>().unwrap();
        // What a target shows to one initiator by a number may be another LUN for the next.
        assert_eq!(of(&url).shared_with(&of(plain)), None);
        assert!(of(&format!("{plain}?iface=eth1")).shared_with(&of(plain)).is_some());
        for (query, what) in [
            ("", "source"),
            ("iface=a&iface=b", "source"),
            ("mtu=9000", "source"),
            ("iface=../x", "iface"),
            ("initiator=vm-1", "IQN"),
        ] {
            let error = format!("{plain}?{query}").parse::<Source>().unwrap_err();
            assert_eq!(error.what, what, "{query}");
        }
    }

    prop_compose! {
        fn sources()(
            v4 in proptest::collection::btree_set((1u32..0xdfff_ffff, 1u16..), 1..8),
            v6 in proptest::collection::btree_set((1u128..0xfe00 << 112, 1u16..), 0..8),
            name in "[a-z0-9][a-z0-9.:-]{0,60}",
            lun in 0u64..=16383,
            more in proptest::collection::btree_set((0u64..=16383, 1u32..0xdfff_ffff), 0..4),
            iface in proptest::option::of("[a-z0-9][A-Za-z0-9._:-]{0,63}"),
            initiator in proptest::option::of("[a-z0-9][a-z0-9.:-]{0,60}"),
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
                iface: Iface {
                    name: iface.map(|name| name.parse().unwrap()).unwrap_or_default(),
                    initiator: initiator.map(|i| format!("iqn.2001-04.{i}").parse().unwrap()),
                },
                more_targets: more.into_iter().enumerate().map(|(n, (lun, ip))| IscsiTarget {
                    target: format!("iqn.2001-05.com.example:{n}").parse().unwrap(),
                    portals: vec![std::net::Ipv4Addr::from(ip).to_string().parse().unwrap()],
                    lun: lun.try_into().unwrap(),
                }).collect(),
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
