//! How a login ended: what iscsiadm's exit codes and words mean.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::host::cmd::Output;
use crate::reason::Reason;
use crate::types::Portal;

/// iscsiadm found nobody who serves as iscsid (`ISCSI_ERR_ISCSID_NOTCONN`), and could not have it started.
pub(super) const NOT_CONNECTED: i32 = 20;

/// A login did not lead to a session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// Nothing answers there.
    #[error("portal {portal} does not answer: {detail}")]
    Unreachable {
        /// The portal.
        portal: Portal,
        /// iscsiadm's words.
        detail: String,
    },
    /// The target does not let us in.
    #[error("portal {portal} refused the login: {detail}")]
    Refused {
        /// The portal.
        portal: Portal,
        /// iscsiadm's words.
        detail: String,
    },
    /// The target does not accept the credentials that it was given.
    #[error("portal {portal} refused the login of {user:?} by CHAP: {detail}")]
    ChapRejected {
        /// The portal.
        portal: Portal,
        /// The name that was given.
        user: String,
        /// iscsiadm's words.
        detail: String,
    },
    /// The target let us in, but asked for no credentials.
    #[error(
        "the target at portal {portal} asks for no CHAP credentials, and some were given: {detail}"
    )]
    Unasked {
        /// The portal.
        portal: Portal,
        /// iscsiadm's words.
        detail: String,
    },
    /// The target let us in, but could not prove who it is.
    #[error("the target at portal {portal} did not prove itself by mutual CHAP: {detail}")]
    Unproven {
        /// The portal.
        portal: Portal,
        /// iscsiadm's words.
        detail: String,
    },
    /// The portal has no such target.
    #[error("portal {portal} does not know the target: {detail}")]
    NotFound {
        /// The portal.
        portal: Portal,
        /// iscsiadm's words.
        detail: String,
    },
    /// iscsid, which bounds the login itself, did not answer in time.
    #[error(
        "iscsid did not end the login at portal {portal} within {deadline:?}; see systemctl status iscsid"
    )]
    Silent {
        /// The portal.
        portal: Portal,
        /// How long it was given.
        deadline: Duration,
    },
    /// It took too long.
    #[error("no session at portal {portal} in time")]
    TimedOut {
        /// The portal.
        portal: Portal,
    },
    /// Nobody serves as iscsid.
    #[error("portal {portal} was not logged in to, for want of iscsid: {detail}")]
    NoIscsid {
        /// The portal.
        portal: Portal,
        /// What is known of it.
        detail: String,
    },
    /// iscsiadm or iscsid is missing or does not work.
    #[error("iscsiadm could not log in at portal {portal}: {detail}")]
    Tool {
        /// The portal.
        portal: Portal,
        /// What was wrong.
        detail: String,
        /// Not installed.
        missing: bool,
    },
}

impl LoginError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } => Reason::PortalUnreachable,
            Self::Silent { .. } => Reason::DeadlineExceeded,
            Self::Refused { .. } => Reason::LoginRefused,
            Self::ChapRejected { .. } => Reason::ChapRejected,
            Self::Unasked { .. } => Reason::ChapNotWanted,
            Self::Unproven { .. } => Reason::ChapTargetUnproven,
            Self::NotFound { .. } => Reason::TargetNotFound,
            Self::NoIscsid { .. } => Reason::IscsidUnavailable,
            Self::Tool { missing: true, .. } => Reason::ToolMissing,
            Self::Tool { missing: false, .. } => Reason::ToolFailed,
        }
    }

    /// Whether iscsid may still be about to log in: nobody has heard how it ended.
    pub(crate) fn is_open(&self) -> bool {
        match self {
            // One that ends in the middle of several logins leaves that code, too.
            Self::Silent { .. }
            | Self::TimedOut { .. }
            | Self::NoIscsid { .. }
            | Self::Tool { .. } => true,
            Self::Unreachable { .. }
            | Self::Refused { .. }
            | Self::ChapRejected { .. }
            | Self::Unasked { .. }
            | Self::Unproven { .. }
            | Self::NotFound { .. } => false,
        }
    }

    /// The same, of a login with a volume's credentials in the name of `user`.
    pub(crate) fn of_user(self, user: Option<&String>) -> Self {
        match (self, user) {
            (Self::Refused { portal, detail }, Some(user)) => {
                Self::ChapRejected { portal, user: user.clone(), detail }
            }
            (other, _) => other,
        }
    }

    /// How much it tells, of several portals' failures: an answer says more than silence.
    pub(crate) fn weight(&self) -> u8 {
        match self {
            Self::TimedOut { .. } => 0,
            Self::Unreachable { .. } => 1,
            Self::Silent { .. } => 2,
            Self::NoIscsid { .. } | Self::Tool { .. } => 3,
            Self::NotFound { .. } => 4,
            Self::Refused { .. }
            | Self::ChapRejected { .. }
            | Self::Unasked { .. }
            | Self::Unproven { .. } => 5,
        }
    }
}

/// What a successful login says about whose the session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoggedIn {
    /// This call made it.
    New,
    /// It was there (`ISCSI_ERR_SESS_EXISTS`).
    Existed,
}

/// The outcome at `portal` of one `--login` that may have been for several portals. Codes are those
/// of open-iscsi's include/iscsi_err.h; per portal they stand in lines like
/// `Could not login to [iface: default, target: T, portal: 10.0.0.1,3260].` and
/// `initiator reported error (8 - connection timed out)`.
pub(crate) fn login_result(portal: Portal, out: &Output) -> Result<LoggedIn, LoginError> {
    let at = |line: &str| portal_in(line) == Some(portal);
    if out.stdout.lines().any(|l| l.starts_with("Login to ") && at(l) && l.contains("successful")) {
        return Ok(LoggedIn::New);
    }
    let mut lines = out.stderr.lines().skip_while(|l| !(l.contains("Could not login to") && at(l)));
    let told = lines.nth(1).and_then(reported_code);
    match told.or(out.code) {
        None => Err(LoginError::Tool {
            portal,
            detail: "it was ended by a signal".into(),
            missing: false,
        }),
        Some(code) => classify(portal, code, &out.stderr),
    }
}

/// The portal in `portal: 10.0.0.1,3260]`, whose address stands as the record has it: one of IPv6 has
/// many spellings.
fn portal_in(line: &str) -> Option<Portal> {
    let (address, port) = line.split_once("portal: ")?.1.rsplit_once(']')?.0.rsplit_once(',')?;
    let ip: IpAddr = address.trim_matches(['[', ']']).parse().ok()?;
    SocketAddr::new(ip, port.parse().ok()?).to_string().parse().ok()
}

/// The number in `initiator reported error (8 - connection timed out)`.
fn reported_code(line: &str) -> Option<i32> {
    let (_, rest) = line.split_once("initiator reported error (")?;
    rest.split_once(' ')?.0.parse().ok()
}

fn classify(portal: Portal, code: i32, stderr: &str) -> Result<LoggedIn, LoginError> {
    let detail = match last_line(stderr) {
        "" => format!("code {code}"),
        line => line.to_owned(),
    };
    match code {
        0 => Ok(LoggedIn::New),
        15 => Ok(LoggedIn::Existed),
        // transport, connect timed out, PDU timed out
        4 | 8 | 11 => Err(LoginError::Unreachable { portal, detail }),
        // generic login failure, access denied, authorization failure
        5 | 13 | 24 => Err(LoginError::Refused { portal, detail }),
        // Fatal login error. A missing authorization has a code of its own (24), so what remains of
        // the initiator-error class is mostly 0x0203, target not found.
        19 if stderr.contains("authoriz") || stderr.contains("authentic") => {
            Err(LoginError::Refused { portal, detail })
        }
        19 => Err(LoginError::NotFound { portal, detail }),
        NOT_CONNECTED => Err(LoginError::NoIscsid { portal, detail }),
        _ => Err(LoginError::Tool { portal, detail, missing: false }),
    }
}

/// The most telling line of what a program said: the reported error, else the first line.
pub(super) fn last_line(stderr: &str) -> &str {
    let mut lines = stderr.lines().map(|l| l.trim().trim_start_matches("iscsiadm: "));
    let first = lines.clone().find(|l| !l.is_empty()).unwrap_or("");
    lines.find(|l| l.contains("reported error")).unwrap_or(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn portal(n: u8) -> Portal {
        format!("127.0.0.{n}:3260").parse().expect("portal")
    }

    fn out(code: i32, stdout: &str, stderr: &str) -> Output {
        Output { code: Some(code), stdout: stdout.into(), stderr: stderr.into() }
    }

    fn failed(n: u8, code: i32, text: &str) -> String {
        format!(
            "iscsiadm: Could not login to [iface: default, target: iqn.2026-01.a:b, portal: 127.0.0.{n},3260].\n\
             iscsiadm: initiator reported error ({code} - {text})\n"
        )
    }

    #[test]
    fn each_code_has_its_reason() {
        let cases = [
            (4, "encountered connection failure", Reason::PortalUnreachable),
            (8, "connection timed out", Reason::PortalUnreachable),
            (11, "iSCSI PDU timed out", Reason::PortalUnreachable),
            (5, "encountered iSCSI login failure", Reason::LoginRefused),
            (24, "iSCSI login failed due to authorization failure", Reason::LoginRefused),
            (19, "encountered non-retryable iSCSI login failure", Reason::TargetNotFound),
            (20, "could not connect to iscsid", Reason::IscsidUnavailable),
            (6, "encountered iSCSI database failure", Reason::ToolFailed),
            (21, "no objects found", Reason::ToolFailed),
        ];
        for (code, text, reason) in cases {
            let o = out(code, "", &failed(2, code, text));
            let got = login_result(portal(2), &o).expect_err("failed");
            assert_eq!(got.reason(), reason, "{code}");
            assert!(got.to_string().contains(text), "{got}");
            // Without the line the exit code alone decides.
            let bare = login_result(portal(2), &out(code, "", "")).expect_err("failed");
            assert_eq!(bare.reason(), reason, "{code}");
        }
        assert_eq!(login_result(portal(2), &out(0, "", "")), Ok(LoggedIn::New));
        assert_eq!(login_result(portal(2), &out(15, "", "")), Ok(LoggedIn::Existed));
        let killed = Output { code: None, stdout: String::new(), stderr: String::new() };
        assert!(login_result(portal(2), &killed).is_err());
    }

    #[test]
    fn a_portal_of_ipv6_is_known_in_each_spelling() {
        let portal: Portal = "[fd00::10]:3260".parse().expect("portal");
        for spelling in ["fd00::10", "fd00:0:0:0:0:0:0:10", "FD00::0010", "[fd00::10]"] {
            let line = format!(
                "Login to [iface: default, target: iqn.2026-01.a:b, portal: {spelling},3260] successful.\n"
            );
            assert_eq!(login_result(portal, &out(8, &line, "")), Ok(LoggedIn::New), "{spelling}");
        }
        let other = "Login to [iface: default, target: iqn.2026-01.a:b, portal: fd00::1,3260] successful.\n";
        assert!(login_result(portal, &out(8, other, "")).is_err());
    }

    #[test]
    fn of_several_portals_each_has_its_own_outcome() {
        let o = out(
            8,
            "Logging in to [iface: default, target: iqn.2026-01.a:b, portal: 127.0.0.2,3260]\n\
             Login to [iface: default, target: iqn.2026-01.a:b, portal: 127.0.0.2,3260] successful.\n",
            &(failed(3, 8, "connection timed out") + &failed(20, 24, "authorization failure")),
        );
        let reason = |n| login_result(portal(n), &o).map_err(|e| e.reason());
        assert_eq!(reason(2), Ok(LoggedIn::New));
        assert_eq!(reason(3), Err(Reason::PortalUnreachable));
        assert_eq!(reason(20), Err(Reason::LoginRefused));
    }
}
