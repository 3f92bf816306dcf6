//! CHAP credentials (RFC 1994, RFC 7143 12.1.3) and the names of secrets that hold them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Malformed;

/// A text that nobody may see: overwritten when it is dropped, never printed, not even by `{:?}`.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretText(Zeroizing<String>);

impl SecretText {
    /// The text itself, for whoever has to hand it on.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<String> for SecretText {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// One direction: who it is that proves to know which secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    /// The name (`CHAP_N`).
    pub name: String,
    /// The secret.
    pub secret: SecretText,
}

/// The credentials of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chap {
    /// By which this node proves to the target who it is.
    pub out: Login,
    /// By which the target proves to this node who it is (mutual CHAP), where that is wanted.
    pub back: Option<Login>,
}

/// The longest name and secret, in bytes: open-iscsi's records hold 256 with the final NUL
/// (include/config.h, AUTH_STR_MAX_LEN).
const MAX: usize = 255;

/// What stands for a secret in an error.
const NOT_SHOWN: &str = "(not shown)";

impl Chap {
    /// Checks and takes them; empty texts are absent ones. An error names the part, in the spelling
    /// of the contract's fields, and never shows a secret.
    pub fn new(
        username: String,
        password: SecretText,
        username_in: String,
        password_in: SecretText,
    ) -> Result<Self, Malformed> {
        let out = Login::new("username", username, "password", password)?;
        if username_in.is_empty() && password_in.is_empty() {
            return Ok(Self { out, back: None });
        }
        let back = Login::new("username_in", username_in, "password_in", password_in)?;
        if back.secret == out.secret {
            let rule = "another secret than the one for the other direction (RFC 7143, 12.1.3)";
            return Err(Malformed::new("password_in", NOT_SHOWN, rule));
        }
        Ok(Self { out, back: Some(back) })
    }

    /// Whether the target has to prove itself, too.
    pub fn is_mutual(&self) -> bool {
        self.back.is_some()
    }
}

impl Login {
    fn new(
        name_field: &'static str,
        name: String,
        secret_field: &'static str,
        secret: SecretText,
    ) -> Result<Self, Malformed> {
        const RULE: &str = "1 to 255 printable ASCII characters, none of them a space at either end; name and secret go together";
        if !fits(&name) {
            return Err(Malformed::new(name_field, &name, RULE));
        }
        if !fits(secret.expose()) {
            return Err(Malformed::new(secret_field, NOT_SHOWN, RULE));
        }
        Ok(Self { name, secret })
    }
}

/// Whether a line of a node record holds it unchanged: a value goes to the line's end, without the
/// white space around it (usr/idbm.c, idbm_recinfo_config).
fn fits(text: &str) -> bool {
    (1..=MAX).contains(&text.len())
        && text.bytes().all(|c| (b' '..=b'~').contains(&c))
        && text.trim() == text
}

/// The name of a secret in the configured directory: a DNS-1123 subdomain, as Kubernetes has it for
/// secrets; so it is one plain file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretName(String);
text_type!(SecretName);

impl FromStr for SecretName {
    type Err = Malformed;
    fn from_str(s: &str) -> Result<Self, Malformed> {
        const RULE: &str = "labels of 1 to 63 of a-z, 0-9 and '-', no '-' at either end, joined by '.', at most 253 characters";
        let label = |l: &str| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
                && !l.starts_with('-')
                && !l.ends_with('-')
        };
        if s.len() <= 253 && s.split('.').all(label) {
            Ok(Self(s.to_owned()))
        } else {
            Err(Malformed::new("secret name", s, RULE))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chap(parts: [&str; 4]) -> Result<Chap, Malformed> {
        let [username, password, username_in, password_in] = parts.map(str::to_owned);
        Chap::new(username, password.into(), username_in, password_in.into())
    }

    #[test]
    fn what_is_wrong_is_named_and_no_secret_is_shown() {
        assert!(!chap(["u", "a secret", "", ""]).unwrap().is_mutual());
        assert!(chap(["u", "a secret", "t", "another"]).unwrap().is_mutual());
        let long = "x".repeat(256);
        for (parts, what) in [
            (["", "hush-hush", "", ""], "username"),
            (["u", "", "", ""], "password"),
            (["u", "hush-hush ", "", ""], "password"),
            (["u", "hush\nhush", "", ""], "password"),
            (["u", "h\u{fc}sh", "", ""], "password"),
            (["u", long.as_str(), "", ""], "password"),
            (["u", "hush-hush", "t", ""], "password_in"),
            (["u", "hush-hush", "", "silence"], "username_in"),
            (["u", "hush-hush", "t", "hush-hush"], "password_in"),
        ] {
            let error = chap(parts).unwrap_err();
            assert_eq!(error.what, what, "{error}");
            assert!(!error.to_string().contains("hush"), "{error}");
        }
    }

    #[test]
    fn a_secret_is_not_printed() {
        let text = format!("{:?}", chap(["u", "hush-hush", "t", "silence"]).unwrap());
        assert!(!text.contains("hush") && !text.contains("silence"), "{text}");
        assert!(text.contains("\"u\""), "{text}");
    }

    #[test]
    fn names_of_secrets_stay_in_their_directory() {
        for good in ["a", "san-1.chap", "0"] {
            assert_eq!(good.parse::<SecretName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", ".a", "a.", "A", "a_b", "-a", "a..b", "a\0"] {
            assert_eq!(bad.parse::<SecretName>().unwrap_err().what, "secret name", "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_fits_on_a_line(name in ".{0,300}", secret in ".{0,300}") {
            if let Ok(chap) = chap([&name, &secret, "", ""]) {
                let line = format!("k = {}\n", chap.out.secret.expose());
                prop_assert_eq!(line.split_once('=').unwrap().1.trim(), secret);
            }
        }
    }
}
