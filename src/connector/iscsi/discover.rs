//! SendTargets: which targets a portal lists. iscsiadm makes no record of what it finds
//! (`nonpersistent`); its credentials it takes from a discovery record, which is ours for that time.
//! One that a killed daemon leaves is known by its first line, and removed at the next start.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::Inner;
use super::records::unlocked;
use super::verdict::{LoginError, login_result};
use crate::connector::error::{Error, chain};
use crate::connector::lease::file_name;
use crate::connector::settings::ms;
use crate::connector::{Authentication, Discovered};
use crate::host::cmd::{CmdError, Output, Tool};
use crate::types::{Chap, Portal};

/// "No portals found" (ISCSI_ERR_NO_OBJS_FOUND).
const NOTHING: i32 = 21;

impl Inner {
    /// The targets that `portal` lists.
    pub(super) async fn discover_at(
        self: &Arc<Self>,
        portal: Portal,
        authentication: Authentication,
    ) -> Result<Vec<Discovered>, Error> {
        let chap = match authentication {
            Authentication::None => None,
            Authentication::Chap(chap) => Some(chap),
            Authentication::Lost(why) => return Err(Error::SecretUnavailable(why)),
        };
        let inner = self.clone();
        // Whoever asked may give up: the record goes all the same.
        self.to_its_end(async move {
            let ran = match &chap {
                None => inner.sendtargets("discovery", portal).await,
                Some(chap) => inner.sendtargets_by(portal, chap).await?,
            };
            read(portal, &ran, chap.as_ref())
        })
        .await
    }

    /// By a record of ours with these credentials, one discovery at a time for a portal.
    async fn sendtargets_by(
        &self,
        portal: Portal,
        chap: &Chap,
    ) -> Result<Result<Output, CmdError>, Error> {
        let _lock = self.doors.rundir.lock(&lock_of(portal), ms(self.settings.lock_ms)).await?;
        let doing = || format!("writing the credentials for a discovery at {portal}");
        let free = unlocked(&self.doors, &self.settings).await;
        free.map_err(|source| Error::Command { doing: doing(), source })?;
        let put = self.doors.iscsidb.put_discovery(portal, chap).await;
        put.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => Error::DiscoveryRecord { portal },
            _ => Error::Io { doing: doing(), source },
        })?;
        let ran = self.sendtargets("discoverydb", portal).await;
        self.forget_discovery(portal).await?;
        Ok(ran)
    }

    async fn forget_discovery(&self, portal: Portal) -> Result<(), Error> {
        let removed = match unlocked(&self.doors, &self.settings).await {
            Ok(()) => self.doors.iscsidb.remove_discovery(portal).await,
            Err(e) => Err(io::Error::other(e)),
        };
        removed.map_err(Error::io(format!("removing the discovery record of {portal}")))
    }

    /// Removes the records that killed daemons left, with the credentials in them; not that of a
    /// discovery which another lunplugd of this node is just making.
    pub(super) async fn sweep_discoveries(&self) {
        let left = match self.doors.iscsidb.discoveries().await {
            Ok(left) => left,
            Err(error) => {
                tracing::warn!(%error, "what killed daemons left of discoveries cannot be looked for");
                return;
            }
        };
        for portal in left {
            let Ok(_lock) = self.doors.rundir.lock(&lock_of(portal), Duration::ZERO).await else {
                continue;
            };
            if let Err(error) = self.forget_discovery(portal).await {
                let why = chain(&error);
                tracing::warn!(%portal, why, "the credentials of a discovery are still in its record");
            }
        }
    }

    async fn sendtargets(&self, mode: &str, portal: Portal) -> Result<Output, CmdError> {
        let at = portal.to_string();
        let mut args = vec!["-m", mode, "-t", "st", "-p", at.as_str(), "-o", "nonpersistent"];
        if mode == "discoverydb" {
            args.push("--discover");
        }
        self.doors.commands.run(Tool::Iscsiadm, &args, self.settings.login()).await
    }
}

/// The lock of a portal's discovery record, held as long as that is needed.
fn lock_of(portal: Portal) -> String {
    format!("discoveries/{}", file_name(&portal.to_string()))
}

/// What came of it.
fn read(
    portal: Portal,
    ran: &Result<Output, CmdError>,
    chap: Option<&Chap>,
) -> Result<Vec<Discovered>, Error> {
    let failed = |source| Err(Error::Discovery { portal, source });
    match ran {
        Ok(out) if matches!(out.code, Some(0 | NOTHING)) => Ok(targets(&out.stdout)),
        Ok(out) => match login_result(portal, out) {
            Err(error) => failed(of_discovery(error, chap)),
            // A session of discovery that exists already is nobody's.
            Ok(_) => Ok(targets(&out.stdout)),
        },
        Err(CmdError::TimedOut { .. }) => failed(LoginError::TimedOut { portal }),
        Err(CmdError::Place(e)) => failed(LoginError::NoIscsid { portal, detail: chain(e) }),
        Err(source @ (CmdError::Missing(_) | CmdError::Io { .. })) => failed(LoginError::Tool {
            portal,
            detail: chain(source),
            missing: matches!(source, CmdError::Missing(_)),
        }),
    }
}

/// A login for discovery names no target, so none can be unknown: what iscsiadm tells so is that the
/// target did not go through with it.
fn of_discovery(error: LoginError, chap: Option<&Chap>) -> LoginError {
    match (error.of_user(chap.map(|chap| &chap.out.name)), chap) {
        (LoginError::NotFound { portal, detail }, Some(chap)) if chap.is_mutual() => {
            LoginError::Unproven { portal, detail }
        }
        (LoginError::NotFound { portal, detail }, Some(_)) => {
            LoginError::Unasked { portal, detail }
        }
        (LoginError::NotFound { portal, detail }, None) => LoginError::Refused { portal, detail },
        (other, _) => other,
    }
}

/// `10.0.0.1:3260,1 iqn.2026-01.example:a`, a line for each target and portal; what cannot be read is
/// left out, for the array may say anything.
fn targets(text: &str) -> Vec<Discovered> {
    let mut found: Vec<Discovered> = Vec::new();
    for line in text.lines() {
        let parts = line.trim().split_once(' ');
        let Some((at, name)) = parts else { continue };
        let at = at.rsplit_once(',').map_or(at, |(portal, _)| portal);
        let (Ok(portal), Ok(target)) = (at.parse::<Portal>(), name.trim().parse()) else {
            tracing::debug!(line, "not a target at a portal");
            continue;
        };
        match found.iter_mut().find(|d| d.target == target) {
            Some(known) if known.portals.contains(&portal) => {}
            Some(known) => known.portals.push(portal),
            None => found.push(Discovered { target, portals: vec![portal] }),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn targets_come_with_all_their_portals() {
        let text = "127.0.0.2:3260,1 iqn.2026-01.a:one\n[fd00::1]:3261,-1 iqn.2026-01.a:one\n\
                    127.0.0.2:3260,2 iqn.2026-01.a:two\n127.0.0.2:3260,1 iqn.2026-01.a:one\n\
                    san.example:3260,1 iqn.2026-01.a:three\nnonsense\n\n";
        let found = targets(text);
        let shown: Vec<String> = found
            .iter()
            .map(|d| {
                let portals: Vec<String> = d.portals.iter().map(ToString::to_string).collect();
                format!("{} {}", d.target, portals.join(","))
            })
            .collect();
        assert_eq!(
            shown,
            ["iqn.2026-01.a:one 127.0.0.2:3260,[fd00::1]:3261", "iqn.2026-01.a:two 127.0.0.2:3260"]
        );
    }

    proptest! {
        #[test]
        fn what_is_listed_is_found(names in prop::collection::btree_set("[a-z]{1,8}", 0..9), ports in prop::collection::btree_set(1u16.., 1..4)) {
            let mut text = String::new();
            for name in &names {
                for port in &ports {
                    text += &format!("[fd00::2]:{port},1 iqn.2026-01.a:{name}\n");
                }
            }
            let found = targets(&text);
            prop_assert_eq!(found.len(), names.len());
            prop_assert!(found.iter().all(|d| d.portals.len() == ports.len()));
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "([ -~]{0,40}\n){0,5}") {
            let _ = targets(&text);
        }
    }
}
