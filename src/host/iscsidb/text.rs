//! Credentials in the text of open-iscsi's records.

use zeroize::Zeroizing;

use crate::types::{Chap, Portal};

/// The settings that hold credentials (usr/idbm_fields.h); iscsiadm itself counts the lengths.
const METHOD: &str = "node.session.auth.authmethod";
const OUT: [&str; 2] = ["node.session.auth.username", "node.session.auth.password"];
const BACK: [&str; 2] = ["node.session.auth.username_in", "node.session.auth.password_in"];

/// A record's text with these credentials instead of those that it has.
pub(super) fn with_chap(record: &str, chap: &Chap) -> Zeroizing<String> {
    let name = |line: &str| line.split('=').next().unwrap_or("").trim().to_owned();
    let is_auth = |line: &str| {
        let name = name(line);
        name == METHOD || OUT.contains(&name.as_str()) || BACK.contains(&name.as_str())
    };
    // Of its full size from the start: one that grew would leave copies behind.
    let mut text = Zeroizing::new(String::with_capacity(record.len() + 2048));
    let kept = record.lines().filter(|l| !is_auth(l) && l.trim() != "# END RECORD");
    for line in kept {
        text.push_str(line);
        text.push('\n');
    }
    let mut put = |name: &str, value: &str| {
        for part in [name, " = ", value, "\n"] {
            text.push_str(part);
        }
    };
    put(METHOD, "CHAP");
    let back = chap.back.iter().map(|login| (BACK, login));
    for ([name, secret], login) in [(OUT, &chap.out)].into_iter().chain(back) {
        put(name, &login.name);
        put(secret, login.secret.expose());
    }
    text.push_str("# END RECORD\n");
    text
}

/// A record's text with this portal group tag.
pub(super) fn with_group(record: &str, group: u16) -> Zeroizing<String> {
    const TAG: &str = "node.tpgt";
    let mut text = Zeroizing::new(String::with_capacity(record.len() + 64));
    let is_tag = |line: &str| line.split('=').next().is_some_and(|name| name.trim() == TAG);
    let kept = record.lines().filter(|l| !is_tag(l) && l.trim() != "# END RECORD");
    for line in kept {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str(&format!("{TAG} = {group}\n# END RECORD\n"));
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
