//! Where a volume's CHAP credentials come from.

use std::io;

use super::failure::Failure;
use super::ways::Ways;
use crate::connector::Authentication;
use crate::spec::{ChapFrom, Source};
use crate::types::{Chap, Malformed, SecretName, SecretText, VolumeKey};

/// The keys of a secret, as Kubernetes' iscsi volumes have them, in the order of [`Chap::new`].
const KEYS: [&str; 4] = [
    "node.session.auth.username",
    "node.session.auth.password",
    "node.session.auth.username_in",
    "node.session.auth.password_in",
];

impl Ways {
    /// The credentials of a volume, read anew for each attempt: a secret may have been exchanged.
    pub(super) async fn authentication(
        &self,
        key: &VolumeKey,
        source: &Source,
    ) -> Result<Authentication, Failure> {
        let Source::Iscsi(source) = source;
        Ok(match &source.chap {
            None => Authentication::None,
            Some(ChapFrom::Request) => match self.effects.chap(key).await? {
                Some(chap) => Authentication::Chap(chap),
                None => Authentication::Lost(
                    "they came with the request, and are kept for one boot only: add the volume again with them"
                        .into(),
                ),
            },
            Some(ChapFrom::Secret(name)) => match self.host.secrets.read(name, &KEYS).await {
                Ok(values) => of_secret(name, values),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    Authentication::Lost(format!("there is no secret {name} in secrets_dir"))
                }
                Err(e) => Authentication::Lost(format!("secret {name} cannot be read: {e}")),
            },
        })
    }
}

fn of_secret(name: &SecretName, values: Vec<Option<SecretText>>) -> Authentication {
    let mut values = values.into_iter().map(Option::unwrap_or_default);
    let mut next = || values.next().unwrap_or_default();
    let [username, password, username_in, password_in] = [next(), next(), next(), next()];
    let (username, username_in) = (username.expose().to_owned(), username_in.expose().to_owned());
    match Chap::new(username, password, username_in, password_in) {
        Ok(chap) => Authentication::Chap(chap),
        Err(Malformed { what, rule, .. }) => {
            let key = format!("node.session.auth.{what}");
            Authentication::Lost(format!("secret {name} is not usable: {key} must be {rule}"))
        }
    }
}
