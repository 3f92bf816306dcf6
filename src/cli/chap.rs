//! CHAP credentials as people write them in a file. They are read, and never shown.

use serde::Deserialize;
use serde::de::Deserializer;

use crate::api::v1;
use crate::types::SecretText;

/// CHAP credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ChapFile {
    username: String,
    password: SecretText,
    #[serde(alias = "usernameIn")]
    username_in: String,
    #[serde(alias = "passwordIn")]
    password_in: SecretText,
}

/// What is said of credentials that cannot be read: the parser's own words may quote them.
const CHAP_RULE: &str = "CHAP credentials are username, password and, for mutual CHAP, username_in and password_in, each as NAME: \"TEXT\"";

pub(super) fn unseen<'de, D: Deserializer<'de>>(from: D) -> Result<Option<ChapFile>, D::Error> {
    Option::deserialize(from).map_err(|_| serde::de::Error::custom(CHAP_RULE))
}

impl ChapFile {
    /// Reads YAML, of which JSON is a part.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        serde_yaml_ng::from_str(text).map_err(|_| CHAP_RULE)
    }

    /// Those of the node alone.
    pub(super) fn one_way(username: String, password: SecretText) -> Self {
        Self { username, password, ..Self::default() }
    }

    /// The contract's form.
    pub(super) fn to_wire(&self) -> v1::ChapCredentials {
        v1::ChapCredentials {
            username: self.username.clone(),
            password: self.password.expose().into(),
            username_in: self.username_in.clone(),
            password_in: self.password_in.expose().into(),
        }
    }
}
