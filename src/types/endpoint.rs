//! Portals as people write them: by address, or by the name of a host.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Malformed, Portal};

const RULE: &str = "IPV4[:PORT], [IPV6][:PORT] or HOST[:PORT], a unicast address or a host's DNS name, and a port from 1 to 65535";

/// A host's DNS name (RFC 1123, in lower case) and a TCP port, `san1.example.com:3260`; the port defaults
/// to 3260 when parsed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostPort {
    host: String,
    port: u16,
}

impl HostPort {
    /// The host's name.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl FromStr for HostPort {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed::new("portal", s, RULE);
        let (host, port) = match s.split_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| malformed())?),
            None => (s, Portal::DEFAULT_PORT),
        };
        let plain = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
        };
        // What ends in a number is an address that was written wrongly.
        let last = host.rsplit('.').next().unwrap_or_default();
        let ok = host.len() <= 253
            && host.split('.').all(plain)
            && !last.bytes().all(|c| c.is_ascii_digit())
            && port != 0;
        if ok { Ok(Self { host: host.to_ascii_lowercase(), port }) } else { Err(malformed()) }
    }
}

impl TryFrom<String> for HostPort {
    type Error = Malformed;
    fn try_from(value: String) -> Result<Self, Malformed> {
        value.parse()
    }
}

impl From<HostPort> for String {
    fn from(value: HostPort) -> String {
        value.to_string()
    }
}

/// A portal as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Endpoint {
    /// By its address.
    Address(Portal),
    /// By the name of its host.
    Name(HostPort),
}

impl FromStr for Endpoint {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        s.parse().map(Self::Address).or_else(|_| s.parse().map(Self::Name))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(portal) => portal.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_portal_is_an_address_or_the_name_of_a_host() {
        for (text, shown, by_name) in [
            ("10.0.0.1", "10.0.0.1:3260", false),
            ("fd00::1", "[fd00::1]:3260", false),
            ("san1", "san1:3260", true),
            ("SAN-1.Example.com:860", "san-1.example.com:860", true),
            ("3par.example", "3par.example:3260", true),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(matches!(endpoint, Endpoint::Name(_)), by_name, "{text}");
        }
        let long = format!("{}.example", "x".repeat(64));
        for bad in [
            "",
            ":3260",
            "10.0.0",
            "10.0.0.1:0",
            "10.0.0.256",
            "0.0.0.0",
            "san1:0",
            "san1:x",
            "san1:70000",
            "-a.example",
            "a-.example",
            "a..example",
            "a.example.",
            "a_b.example",
            "a/b",
            "fd00::1:x",
            &long,
        ] {
            let error = bad.parse::<Endpoint>().unwrap_err();
            assert_eq!((error.what, error.rule), ("portal", RULE), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_again(host in "[a-z][a-z0-9-]{0,20}[a-z0-9](\\.[a-z]{1,9}){0,3}", port in 1u16..) {
            let name: HostPort = format!("{host}:{port}").parse().unwrap();
            prop_assert_eq!((name.host(), name.port()), (host.as_str(), port));
            prop_assert_eq!(name.to_string().parse::<HostPort>().unwrap(), name);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,300}") {
            let _ = text.parse::<Endpoint>();
        }
    }
}
