//! Settings and credentials in the text of open-iscsi's records.

use zeroize::Zeroizing;

use super::Setting;
use crate::types::{Chap, Portal};

/// A record's last line.
const END: &str = "# END RECORD";

/// The settings that hold credentials (usr/idbm_fields.h); iscsiadm itself counts the lengths.
const METHOD: &str = "node.session.auth.authmethod";
const OUT: [&str; 2] = ["node.session.auth.username", "node.session.auth.password"];
const BACK: [&str; 2] = ["node.session.auth.username_in", "node.session.auth.password_in"];

/// What a record's text has for a setting; `None` where that is nothing.
pub(super) fn value_of<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    let value =
        |line: &'a str| Some(line.trim().strip_prefix(name)?.trim().strip_prefix('=')?.trim());
    record.lines().filter_map(value).find(|value| !value.is_empty())
}

/// A record's text with these settings in the place of those that it has.
pub(super) fn with_settings(
    record: &str,
    settings: &[Setting],
    chap: Option<&Chap>,
) -> Zeroizing<String> {
    let is_auth = |name: &str| name == METHOD || OUT.contains(&name) || BACK.contains(&name);
    let is_new =
        |name: &str| settings.iter().any(|(n, _)| *n == name) || (chap.is_some() && is_auth(name));
    let stays = |line: &&str| {
        line.trim() != END && !is_new(line.split('=').next().unwrap_or_default().trim())
    };
    // Of its full size from the start: one that grew would leave copies behind.
    let more: usize = settings.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    let mut text = Zeroizing::new(String::with_capacity(record.len() + more + 2048));
    for line in record.lines().filter(stays) {
        text.push_str(line);
        text.push('\n');
    }
    let mut put = |name: &str, value: &str| {
        for part in [name, " = ", value, "\n"] {
            text.push_str(part);
        }
    };
    for (name, value) in settings {
        put(name, value);
    }
    if let Some(chap) = chap {
        put(METHOD, "CHAP");
        let back = chap.back.iter().map(|login| (BACK, login));
        for ([name, secret], login) in [(OUT, &chap.out)].into_iter().chain(back) {
            put(name, &login.name);
            put(secret, login.secret.expose());
        }
    }
    text.push_str(END);
    text.push('\n');
    text
}

/// Whether a file of ours begins with its line, or is cut off in it: whoever wrote it was killed, and there
/// is nothing in it that anybody could lose.
pub(super) fn has_mark(text: &[u8], line: &str) -> bool {
    text.starts_with(line.as_bytes()) || line.as_bytes().starts_with(text)
}

/// The first line of a discovery record of ours: a comment to open-iscsi.
pub(super) const OURS: &str = "# lunplug: for one discovery\n";

/// A discovery record's settings (usr/idbm_fields.h), in the order of [`METHOD`], [`OUT`] and [`BACK`].
pub(super) fn discovery_text(portal: Portal, chap: &Chap) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(4096));
    text.push_str(OURS);
    let mut put = |name: &str, value: &str| {
        for part in ["discovery.", name, " = ", value, "\n"] {
            text.push_str(part);
        }
    };
    put("startup", "manual");
    put("type", "sendtargets");
    put("sendtargets.address", &portal.ip().to_string());
    put("sendtargets.port", &portal.port().to_string());
    put("sendtargets.auth.authmethod", "CHAP");
    put("sendtargets.auth.username", &chap.out.name);
    put("sendtargets.auth.password", chap.out.secret.expose());
    if let Some(back) = &chap.back {
        put("sendtargets.auth.username_in", &back.name);
        put("sendtargets.auth.password_in", back.secret.expose());
    }
    put("sendtargets.reopen_max", "1");
    text
}
