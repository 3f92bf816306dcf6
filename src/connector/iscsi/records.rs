//! iscsiadm's part: node records, logins, logouts.
//!
//! Facts (open-iscsi 2.1.11): `-o new` takes no settings and writes an existing record anew, so it
//! is only called where there is none; ours are written after it ([`crate::host::iscsidb::IscsiDb::set`]).

use std::time::Duration;

use tokio::time::Instant;

use super::verdict::{NOT_CONNECTED, last_line};
use crate::connector::error::Error;
use crate::connector::settings::{Settings, ms};
use crate::host::cmd::{CmdError, Output, Tool};
use crate::host::iscsidb::{DbLockState, Setting};
use crate::host::place::is_place_error;
use crate::host::storage::StorageDoors;
use crate::types::{IfaceName, Nexus, Portal};

/// Two timeouts that mean nothing to anybody else tell our records from foreign ones across boots,
/// where no lease knows of them any more: seconds of `tgt_reset_timeout`, `host_reset_timeout`.
const MARK: [(&str, &str); 2] = [
    ("node.session.err_timeo.tgt_reset_timeout", MARKED_SESSION),
    ("node.session.err_timeo.host_reset_timeout", "61"),
];

/// What sysfs shows as `tgt_reset_tmo` of a session that was made by a record of ours.
pub(super) const MARKED_SESSION: &str = "31";

/// How long a portal may take to list its targets: long enough for one that is there.
const DISCOVERY: Duration = Duration::from_secs(3);

/// How often the lock of the database is looked at.
const LOCK_LOOK: Duration = Duration::from_millis(150);

/// The one of our calls that leaves the records alone.
const LOGOUT: &[&str] = &["--logout"];

/// What is known to be wrong with the installed iscsiadm. One that cannot be asked is told when it is
/// needed.
pub(super) async fn tool_fault(doors: &StorageDoors, settings: &Settings) -> Option<String> {
    let asked = doors.commands.run(Tool::Iscsiadm, &["--version"], ms(settings.command_ms)).await;
    fault_of(&asked.ok()?.stdout).map(str::to_owned)
}

/// 2.1.10 never answers a login with scan=manual (open-iscsi #484, mended in 2.1.11). The session
/// comes all the same, and sysfs shows it.
fn fault_of(version: &str) -> Option<&'static str> {
    (version.split_whitespace().last() == Some("2.1.10")).then_some(
        "open-iscsi 2.1.10 leaves every login of lunplug's hanging until its deadline: install 2.1.11 or newer",
    )
}

/// Calls iscsiadm for one target.
pub(crate) struct Iscsiadm<'a> {
    /// The doors.
    pub(crate) doors: &'a StorageDoors,
    /// Its deadlines.
    pub(crate) settings: &'a Settings,
    /// The target.
    pub(crate) target: &'a Nexus,
}

impl Iscsiadm<'_> {
    /// Makes a record, with the tag of the portal's group where there is to be room for others. There must be
    /// none at this portal by this iface: it would be written anew.
    pub(crate) async fn new_record(&self, portal: Portal, tag: Option<u16>) -> Result<(), Error> {
        let at = tag.map_or_else(|| portal.to_string(), |tag| format!("{portal},{tag}"));
        let args = ["-p", at.as_str(), "-I", self.target.iface().as_str(), "-o", "new"];
        let doing = || format!("making the record of {} at {portal}", self.target);
        let run = self.run(None, &args, ms(self.settings.command_ms)).await;
        let out = run.map_err(|source| Error::Command { doing: doing(), source })?;
        self.expect(out, &[], doing)
    }

    /// Asks iscsid to log out at `portal`, or at every portal of the target; `false` when it does not know the session (2, 21) or has
    /// no connection of it (32), as for a moment after it was started anew.
    pub(crate) async fn logout(&self, portal: Option<Portal>) -> Result<bool, Error> {
        let out = self.node(portal, LOGOUT).await?;
        let taken = out.code == Some(0);
        let doing = || format!("logging out of {}", self.at(portal));
        self.expect(out, &[2, 21, 32], doing).map(|()| taken)
    }

    /// What is meant, in words.
    fn at(&self, portal: Option<Portal>) -> String {
        portal.map_or_else(|| self.target.to_string(), |p| format!("{} at {p}", self.target))
    }

    /// Logs in at `portal`, or by every record of the target.
    pub(crate) async fn login(&self, portal: Option<Portal>) -> Result<Output, CmdError> {
        self.run(portal, &["--login"], self.settings.login()).await
    }

    /// Whether the record at `portal` bears our mark. One that cannot be shown is not ours.
    pub(crate) async fn is_marked(&self, portal: Portal) -> Result<bool, Error> {
        let out = self.node(Some(portal), &["-o", "show"]).await?;
        Ok(out.code == Some(0) && is_marked(&out.stdout))
    }

    /// Whether the portal lists the target; `None` where it cannot be asked.
    pub(crate) async fn is_exported(&self, portal: Portal) -> Option<bool> {
        let listed = self.listed(portal).await?;
        Some(listed.lines().any(|line| self.names(line)))
    }

    /// The portals at which a portal lists the target, each with the tag of its group; none where it cannot be
    /// asked.
    pub(crate) async fn groups(&self, portal: Portal) -> Vec<(Portal, u16)> {
        let listed = self.listed(portal).await.unwrap_or_default();
        let group = |line: &str| {
            let (at, tag) = line.split(' ').next()?.rsplit_once(',')?;
            Some((at.parse().ok()?, tag.parse().ok()?))
        };
        listed.lines().filter(|line| self.names(line)).filter_map(group).collect()
    }

    /// Whether a line `10.0.0.1:3260,1 iqn.2026-01.example:a` is of the target.
    fn names(&self, line: &str) -> bool {
        let name = line.trim().rsplit(' ').next().map(str::to_ascii_lowercase);
        name.as_deref() == Some(self.target.target().as_str())
    }

    /// What a portal lists, a line for each target and portal. Nothing is recorded.
    async fn listed(&self, portal: Portal) -> Option<String> {
        let at = portal.to_string();
        let mut args =
            vec!["-m", "discovery", "-t", "st", "-p", at.as_str(), "-o", "nonpersistent"];
        if *self.target.iface() != IfaceName::default() {
            // Another initiator may be shown other targets.
            args.extend(["-I", self.target.iface().as_str()]);
        }
        let out = self.doors.commands.run(Tool::Iscsiadm, &args, DISCOVERY).await.ok()?;
        (out.code == Some(0)).then_some(out.stdout)
    }

    async fn node(&self, portal: Option<Portal>, args: &[&str]) -> Result<Output, Error> {
        let run = self.run(portal, args, ms(self.settings.command_ms)).await;
        let doing = || format!("iscsiadm {} for {}", args.join(" "), self.target);
        run.map_err(|source| Error::Command { doing: doing(), source })
    }

    async fn run(
        &self,
        portal: Option<Portal>,
        args: &[&str],
        deadline: Duration,
    ) -> Result<Output, CmdError> {
        if args != LOGOUT {
            self.unlocked().await?;
        }
        let at = portal.map(|p| p.to_string());
        let mut all = vec!["-m", "node", "-T", self.target.target().as_str()];
        if let Some(at) = &at {
            // The iface is named, so that a foreign record through another one stays untouched.
            all.extend(["-p", at.as_str(), "-I", self.target.iface().as_str()]);
        }
        all.extend(args);
        self.doors.commands.run(Tool::Iscsiadm, &all, deadline).await
    }

    /// See [`unlocked`].
    pub(super) async fn unlocked(&self) -> Result<(), CmdError> {
        unlocked(self.doors, self.settings).await
    }

    fn expect(
        &self,
        out: Output,
        fine: &[i32],
        doing: impl FnOnce() -> String,
    ) -> Result<(), Error> {
        match out.code {
            Some(code) if code == 0 || fine.contains(&code) => Ok(()),
            Some(NOT_CONNECTED) => Err(Error::NoIscsid { doing: doing() }),
            code => {
                let stderr = last_line(&out.stderr).to_owned();
                Err(Error::Tool { doing: doing(), code, stderr })
            }
        }
    }
}

/// Waits while the database is locked: iscsiadm would, too, but for 30 s and then in vain when
/// whoever locked it was killed.
pub(super) async fn unlocked(doors: &StorageDoors, settings: &Settings) -> Result<(), CmdError> {
    let end = Instant::now() + ms(settings.db_lock_ms);
    loop {
        let by = match doors.iscsidb.look_at_lock().await {
            Ok(DbLockState::Free) => return Ok(()),
            Ok(DbLockState::Cleared) => {
                tracing::warn!(
                    "open-iscsi's database was locked by a process that is dead: the lock is removed"
                );
                return Ok(());
            }
            Ok(DbLockState::Held(by)) => by,
            // The program that is to be run says so itself.
            Err(error) if is_place_error(&error) => return Ok(()),
            Err(error) => {
                tracing::warn!(%error, "open-iscsi's lock could not be looked at");
                return Ok(());
            }
        };
        if Instant::now() >= end {
            let by = if by.is_empty() { "another process".into() } else { by.join(" or ") };
            let text = format!("open-iscsi's database is locked, perhaps by {by}");
            let source = std::io::Error::new(std::io::ErrorKind::WouldBlock, text);
            return Err(CmdError::Io { tool: Tool::Iscsiadm, source });
        }
        // No event tells that whoever holds it has died.
        tokio::time::sleep(LOCK_LOOK).await;
    }
}

/// Our records' settings.
pub(super) fn our_settings(settings: &Settings, multipath: bool) -> Vec<Setting> {
    let iscsi = &settings.iscsi;
    let replacement = if multipath {
        iscsi.replacement_timeout_multipath
    } else {
        iscsi.replacement_timeout_single
    };
    let manual = ["node.startup", "node.conn[0].startup", "node.session.scan"];
    let numbers = [
        ("node.session.timeo.replacement_timeout", replacement),
        ("node.session.initial_login_retry_max", iscsi.login_retries),
        ("node.conn[0].timeo.login_timeout", iscsi.login_timeout),
        ("node.conn[0].timeo.noop_out_interval", iscsi.noop_interval),
        ("node.conn[0].timeo.noop_out_timeout", iscsi.noop_timeout),
    ];
    let manual = manual.map(|name| (name, "manual".to_owned()));
    let numbers = numbers.map(|(name, number)| (name, number.to_string()));
    let mark = MARK.map(|(name, value)| (name, value.to_owned()));
    manual.into_iter().chain(numbers).chain(mark).collect()
}

/// Whether a record as `-o show` prints it bears our mark.
fn is_marked(shown: &str) -> bool {
    let has = |name: &str, value: &str| {
        shown.lines().filter_map(|l| l.split_once(" = ")).any(|(n, v)| n == name && v == value)
    };
    has("node.session.scan", "manual") && MARK.iter().all(|(name, value)| has(name, value))
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_version_that_hangs_is_told() {
        assert!(fault_of("iscsiadm version 2.1.10\n").is_some());
        for version in ["iscsiadm version 2.1.1\n", "iscsiadm version 2.1.11\n", ""] {
            assert_eq!(fault_of(version), None);
        }
    }

    #[test]
    fn our_records_are_known_by_their_mark() {
        let ours: String = our_settings(&Settings::default(), true)
            .iter()
            .map(|(n, v)| format!("{n} = {v}\n"))
            .collect();
        assert!(is_marked(&ours));
        assert!(!is_marked(&ours.replace("= 31", "= 30")));
        assert!(!is_marked(""));
    }
}
