//! Where a volume's CHAP credentials come from.

use std::io;

use super::failure::Failure;
use super::ways::Ways;
use crate::connector::Authentication;
use crate::host::secrets::Secrets;
use crate::spec::{ChapFrom, Source};
use crate::types::{Chap, Malformed, SecretName, SecretText, VolumeKey};

/// What the keys of a secret begin with, as Kubernetes' iscsi volumes have them: for sessions.
const SESSION: &str = "node.session.auth.";
/// And for discoveries.
pub(super) const DISCOVERY: &str = "discovery.sendtargets.auth.";
/// What they end with, in the order of [`Chap::new`].
const KEYS: [&str; 4] = ["username", "password", "username_in", "password_in"];

impl Ways {
    /// The credentials of a volume, read anew for each attempt: a secret may have been exchanged.
    pub(super) async fn authentication(
        &self,
        key: &VolumeKey,
        source: &Source,
    ) -> Result<Authentication, Failure> {
        let Some(source) = source.as_iscsi() else { return Ok(Authentication::None) };
        Ok(match &source.chap {
            None => Authentication::None,
            Some(ChapFrom::Request) => match self.effects.chap(key).await? {
                Some(chap) => Authentication::Chap(chap),
                None => Authentication::Lost(
                    "they came with the request, and are kept for one boot only: add the volume again with them"
                        .into(),
                ),
            },
            Some(ChapFrom::Secret(name)) => secret(&*self.host.secrets, name, SESSION).await,
        })
    }
}

/// The credentials in a secret, under keys that begin so.
pub(super) async fn secret(
    secrets: &dyn Secrets,
    name: &SecretName,
    prefix: &'static str,
) -> Authentication {
    let keys = KEYS.map(|key| format!("{prefix}{key}"));
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    match secrets.read(name, &keys).await {
        Ok(values) => of_secret(name, prefix, values),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Authentication::Lost(format!("there is no secret {name} in secrets_dir"))
        }
        Err(e) => Authentication::Lost(format!("secret {name} cannot be read: {e}")),
    }
}

fn of_secret(name: &SecretName, prefix: &str, values: Vec<Option<SecretText>>) -> Authentication {
    let mut values = values.into_iter().map(Option::unwrap_or_default);
    let mut next = || values.next().unwrap_or_default();
    let [username, password, username_in, password_in] = [next(), next(), next(), next()];
    let (username, username_in) = (username.expose().to_owned(), username_in.expose().to_owned());
    match Chap::new(username, password, username_in, password_in) {
        Ok(chap) => Authentication::Chap(chap),
        Err(Malformed { what, rule, .. }) => Authentication::Lost(format!(
            "secret {name} is not usable: {prefix}{what} must be {rule}"
        )),
    }
}
