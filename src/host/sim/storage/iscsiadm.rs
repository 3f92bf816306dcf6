//! iscsiadm with its database, as far as lunplug uses it. Exit codes are open-iscsi's
//! (include/iscsi_err.h).

use std::collections::BTreeMap;
use std::time::Duration;

use super::SimStorage;
use super::array::{PortalState, SimTarget};
use super::kernel::World;
use crate::host::cmd::Output;
use crate::types::{Chap, Iqn, Portal};

/// open-iscsi's codes.
mod code {
    pub(super) const TRANS: i32 = 4;
    pub(super) const IDBM: i32 = 6;
    pub(super) const INVAL: i32 = 7;
    pub(super) const TRANS_TIMEOUT: i32 = 8;
    pub(super) const SESS_EXISTS: i32 = 15;
    pub(super) const FATAL_LOGIN: i32 = 19;
    pub(super) const ISCSID_NOTCONN: i32 = 20;
    pub(super) const NO_OBJS_FOUND: i32 = 21;
    pub(super) const LOGIN_AUTH_FAILED: i32 = 24;
}

/// A node record: what was set, beside its key.
#[derive(Debug, Clone, Default)]
pub(super) struct NodeRecord {
    pub(super) settings: BTreeMap<String, String>,
    /// As a crash leaves it: an empty file.
    pub(super) corrupt: bool,
    /// The portal group tag that it was made with.
    pub(super) group: Option<u16>,
}

/// Target, portal and iface.
pub(super) type RecordKey = (Iqn, Portal, String);

/// The database.
pub(super) type Records = BTreeMap<RecordKey, NodeRecord>;

/// A fresh record, as iscsid.conf has it on Debian.
pub(super) fn default_record(key: &RecordKey) -> NodeRecord {
    let (target, portal, iface) = key;
    let settings = [
        ("node.name", target.to_string()),
        ("node.tpgt", "-1".into()),
        ("node.startup", "manual".into()),
        ("iface.iscsi_ifacename", iface.clone()),
        ("node.conn[0].address", portal.ip().to_string()),
        ("node.conn[0].port", portal.port().to_string()),
        ("node.session.scan", "auto".into()),
    ];
    NodeRecord {
        settings: settings.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
        corrupt: false,
        group: None,
    }
}

/// The arguments, as getopt would have them.
#[derive(Debug, Default)]
struct Args {
    mode: String,
    op: String,
    target: Option<Iqn>,
    portal: Option<Portal>,
    group: Option<u16>,
    iface: Option<String>,
    sid: Option<u32>,
    discover: bool,
    login: bool,
    logout: bool,
    rescan: bool,
    version: bool,
}

fn parse(args: &[String]) -> Option<Args> {
    let mut parsed = Args::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        // `--op=new` and `--op new` are the same.
        let (flag, inline) = match arg.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, Some(value.to_owned())),
            _ => (arg.as_str(), None),
        };
        match flag {
            "-D" | "--discover" => parsed.discover = true,
            "-l" | "--login" => parsed.login = true,
            "-u" | "--logout" => parsed.logout = true,
            "-R" | "--rescan" => parsed.rescan = true,
            "-V" | "--version" => parsed.version = true,
            _ => {
                let value = inline.or_else(|| rest.next().cloned())?;
                match flag {
                    "-m" | "--mode" => parsed.mode = value,
                    "-o" | "--op" => parsed.op = value,
                    "-T" | "--targetname" => parsed.target = Some(value.parse().ok()?),
                    // A portal group tag may follow: `10.0.0.1:3260,1`.
                    "-p" | "--portal" => {
                        let (portal, group) = value.split_once(',').unwrap_or((&value, ""));
                        parsed.portal = Some(portal.parse().ok()?);
                        parsed.group = group.parse().ok();
                    }
                    "-I" | "--interface" => parsed.iface = Some(value),
                    "-r" | "--sid" => parsed.sid = Some(value.parse().ok()?),
                    "-d" | "--debug" | "-P" | "--print" | "-t" | "--type" => {}
                    _ => return None,
                }
            }
        }
    }
    Some(parsed)
}

fn output(code: i32, stdout: String, stderr: &str) -> Output {
    Output { code: Some(code), stdout, stderr: stderr.to_owned() }
}

fn done(stdout: String) -> Output {
    output(0, stdout, "")
}

const AUTH: &str = "node.session.auth.";

/// Writes credentials into a record, in the place of those that it has.
pub(super) fn put_chap(record: &mut NodeRecord, chap: &Chap) {
    let mut put = |name: &str, value: Option<&str>| {
        let name = format!("{AUTH}{name}");
        match value {
            Some(value) => drop(record.settings.insert(name, value.to_owned())),
            None => drop(record.settings.remove(&name)),
        }
    };
    let back = chap.back.as_ref();
    put("authmethod", Some("CHAP"));
    put("username", Some(&chap.out.name));
    put("password", Some(chap.out.secret.expose()));
    put("username_in", back.map(|b| b.name.as_str()));
    put("password_in", back.map(|b| b.secret.expose()));
}

/// The credentials that a record has in force.
fn chap_of(record: &NodeRecord) -> Option<Chap> {
    let get = |name: &str| record.settings.get(&format!("{AUTH}{name}")).cloned();
    if get("authmethod").as_deref() != Some("CHAP") {
        return None;
    }
    let text = |name: &str| get(name).unwrap_or_default();
    let (password, password_in) = (text("password").into(), text("password_in").into());
    Chap::new(text("username"), password, text("username_in"), password_in).ok()
}

/// What becomes of a login by CHAP, as open-iscsi 2.1.11 and LIO end it (tried): a target that does not
/// accept an initiator says so (24); of one that does not ask for credentials, or does not prove itself,
/// iscsid makes a fatal error (19).
fn chap_verdict(demanded: Option<&Chap>, given: Option<&Chap>) -> Option<i32> {
    let accepted = match (demanded, given) {
        (Some(demanded), Some(given)) => demanded.out == given.out,
        (Some(_), None) => false,
        (None, Some(_)) => return Some(code::FATAL_LOGIN),
        (None, None) => true,
    };
    let proof = given.and_then(|given| given.back.as_ref());
    let proven = proof.is_none() || demanded.and_then(|d| d.back.as_ref()) == proof;
    match (accepted, proven) {
        (false, _) => Some(code::LOGIN_AUTH_FAILED),
        (true, false) => Some(code::FATAL_LOGIN),
        (true, true) => None,
    }
}

/// How long iscsiadm tries to lock the database.
const LOCK_TIME: Duration = Duration::from_secs(30);
const LOCKED: &str =
    "iscsiadm: Timeout on acquiring lock on DB: /run/lock/iscsi/lock.write: 17: File exists\n";

const NO_RECORDS: &str = "iscsiadm: No records found\n";

impl SimStorage {
    /// Runs iscsiadm to its end; a login at a dead portal takes `login_time`.
    pub(super) async fn iscsiadm(&self, args: &[String], login_time: Duration) -> Output {
        let Some(args) = parse(args) else {
            return output(code::INVAL, String::new(), "iscsiadm: invalid arguments\n");
        };
        if args.version {
            return done("iscsiadm version 2.1.11\n".into());
        }
        // A logout looks at sessions alone (open-iscsi 2.1.11), the rest reads or writes records.
        if args.mode == "node" && !args.logout && self.db_locked().await {
            return output(code::IDBM, String::new(), LOCKED);
        }
        match (args.mode.as_str(), args.op.as_str()) {
            ("node", _) if args.login => self.login(&args, login_time).await,
            ("node" | "session", _) if args.logout => match self.iscsid("logout").await {
                Ok(()) => logout(&mut self.world(), &args),
                Err(none) => none,
            },
            ("discovery", "nonpersistent") => self.discover(&args, None, login_time).await,
            ("discoverydb", "nonpersistent") if args.discover => {
                let record = args.portal.and_then(|p| self.world().discoveries.get(&p).cloned());
                self.discover(&args, record.flatten(), login_time).await
            }
            ("session", _) if args.rescan => rescan(&mut self.world(), &args),
            ("session", "" | "show") => show_sessions(&self.world()),
            ("node", "new") => new(&mut self.world(), &args),
            ("node", "delete") => delete(&mut self.world(), &args),
            ("node", "" | "show") => show(&self.world(), &args),
            ("iface", "" | "show") => done("default tcp,<empty>,<empty>,<empty>,<empty>\n".into()),
            _ => output(code::INVAL, String::new(), "iscsiadm: unknown mode or operation\n"),
        }
    }

    /// Whether the database is locked for as long as iscsiadm tries.
    async fn db_locked(&self) -> bool {
        if self.world().db_lock.is_some() {
            tokio::time::sleep(LOCK_TIME).await;
        }
        self.world().db_lock.is_some()
    }

    /// iscsid takes the request, when it comes to it. A fault may stall it: what iscsiadm has asked
    /// for by then is done late, though iscsiadm may have ended.
    async fn iscsid(&self, request: &str) -> Result<(), Output> {
        let passed = self.faults().pass("iscsid", request).await;
        passed.map_err(|_| {
            let text = "iscsiadm: can not connect to iSCSI daemon (111)!\n";
            output(code::ISCSID_NOTCONN, String::new(), text)
        })
    }

    /// SendTargets of a portal, of which no record is made.
    async fn discover(&self, args: &Args, given: Option<Chap>, patience: Duration) -> Output {
        let Some(portal) = args.portal else {
            return output(code::INVAL, String::new(), "iscsiadm: discovery needs a portal\n");
        };
        let (text, answers) = sendtargets(&self.world(), portal);
        let refused = chap_verdict(self.world().discovery_chap.as_ref(), given.as_ref());
        let fails = |code| {
            output(code, String::new(), "iscsiadm: Could not perform SendTargets discovery\n")
        };
        match answers {
            Some(PortalState::Alive | PortalState::Denied) if refused.is_some() => {
                fails(refused.unwrap_or(code::FATAL_LOGIN))
            }
            Some(PortalState::Alive | PortalState::Denied) => done(text),
            Some(PortalState::Refusing) => {
                output(code::TRANS, String::new(), "iscsiadm: connection login retries exceeded\n")
            }
            Some(PortalState::Dead) | None => {
                tokio::time::sleep(patience).await;
                output(code::TRANS_TIMEOUT, String::new(), "iscsiadm: connection timed out\n")
            }
        }
    }

    async fn login(&self, args: &Args, login_time: Duration) -> Output {
        let keys = matching(&self.world(), args);
        if keys.is_empty() {
            return output(code::NO_OBJS_FOUND, String::new(), NO_RECORDS);
        }
        // iscsid gets the records with the request, and does not look at their files.
        let records = self.world().records.clone();
        if records.iter().any(|(k, r)| keys.contains(k) && r.corrupt) {
            return output(code::IDBM, String::new(), "iscsiadm: Could not read node record\n");
        }
        if let Err(none) = self.iscsid("login").await {
            return none;
        }
        let mut result = 0;
        let mut text = (String::new(), String::new());
        let mut silent = Vec::new();
        for key in keys {
            match try_login(&mut self.world(), &key, &records) {
                Some(0) => text.0 += &format!("Login to [{}] successful.\n", label(&key)),
                Some(code) => (result, text.1) = (code, text.1 + &complaint(&key, code)),
                None => silent.push(key),
            }
        }
        if !silent.is_empty() {
            tokio::time::sleep(login_time).await;
        }
        for key in silent {
            // iscsid tries on until its time is over: a portal that came back is logged in.
            match try_login(&mut self.world(), &key, &records) {
                Some(0) => text.0 += &format!("Login to [{}] successful.\n", label(&key)),
                late => {
                    result = late.unwrap_or(code::TRANS_TIMEOUT);
                    text.1 += &complaint(&key, result);
                }
            }
        }
        output(result, text.0, &text.1)
    }
}

/// What a portal lists, each target at each of its portals, and how it answers.
fn sendtargets(world: &World, portal: Portal) -> (String, Option<PortalState>) {
    let here = world.targets.iter().filter(|(_, t)| t.portals.contains_key(&portal));
    let mut text = String::new();
    let mut answers = None;
    for (name, target) in here {
        answers = target.portals.get(&portal).copied();
        for at in target.portals.keys() {
            text += &format!("{at},1 {name}\n");
        }
    }
    (text, answers)
}

fn label((target, portal, iface): &RecordKey) -> String {
    format!("iface: {iface}, target: {target}, portal: {},{}", portal.ip(), portal.port())
}

fn complaint(key: &RecordKey, code: i32) -> String {
    let why = match code {
        code::TRANS => "encountered connection failure",
        code::TRANS_TIMEOUT => "connection timed out",
        code::SESS_EXISTS => "session exists",
        code::FATAL_LOGIN => "encountered non-retryable iSCSI login failure",
        code::LOGIN_AUTH_FAILED => "iSCSI login failed due to authorization failure",
        _ => "unknown error",
    };
    format!(
        "iscsiadm: Could not login to [{}].\niscsiadm: initiator reported error ({code} - {why})\n",
        label(key)
    )
}

/// One login; `None` when nothing answers.
fn try_login(world: &mut World, key: &RecordKey, records: &Records) -> Option<i32> {
    let (target, portal, iface) = key;
    if world
        .sessions
        .values()
        .any(|s| s.target == *target && s.portal == *portal && s.iface == *iface)
    {
        return Some(code::SESS_EXISTS);
    }
    match world.portal_state(target, portal) {
        Some(PortalState::Alive) => {}
        Some(PortalState::Dead) => return None,
        Some(PortalState::Refusing) => return Some(code::TRANS),
        Some(PortalState::Denied) => return Some(code::LOGIN_AUTH_FAILED),
        None => return Some(code::FATAL_LOGIN),
    }
    let initiator = world.initiator(iface);
    let admits = |t: &SimTarget| {
        t.initiators.is_empty() || t.initiators.iter().any(|i| i.as_str() == initiator)
    };
    if !world.targets.get(target).is_some_and(admits) {
        return Some(code::LOGIN_AUTH_FAILED);
    }
    let given = records.get(key).and_then(chap_of);
    let demanded = world.targets.get(target).and_then(|t| t.chap.as_ref());
    if let Some(code) = chap_verdict(demanded, given.as_ref()) {
        return Some(code);
    }
    let sid = world.login(target, *portal, iface);
    for (name, value) in shown(given.as_ref()) {
        world.set_session_attribute(sid, name, value);
    }
    let setting = |name: &str| records.get(key).and_then(|r| r.settings.get(name));
    if let Some(value) = setting("node.session.err_timeo.tgt_reset_timeout") {
        world.set_session_attribute(sid, "tgt_reset_tmo", value);
    }
    let scan = setting("node.session.scan");
    if scan.is_none_or(|s| s != "manual") {
        let host = world.sessions[&sid].host;
        // What iscsid does after a login with scan=auto; a host it just made is there.
        let _ = world.write(&format!("class/scsi_host/host{host}/scan"), "- - -");
    }
    Some(0)
}

/// What the kernel shows of a session's credentials.
fn shown(given: Option<&Chap>) -> [(&'static str, &str); 4] {
    let back = given.and_then(|g| g.back.as_ref());
    [
        ("username", given.map_or("(null)", |g| &g.out.name)),
        ("password", given.map_or("(null)", |g| g.out.secret.expose())),
        ("username_in", back.map_or("(null)", |b| &b.name)),
        ("password_in", back.map_or("(null)", |b| b.secret.expose())),
    ]
}

/// The records that the arguments select.
fn matching(world: &World, args: &Args) -> Vec<RecordKey> {
    world
        .records
        .keys()
        .filter(|(target, portal, iface)| {
            args.target.as_ref().is_none_or(|t| t == target)
                && args.portal.is_none_or(|p| p == *portal)
                && args.iface.as_ref().is_none_or(|i| i == iface)
        })
        .cloned()
        .collect()
}

fn new(world: &mut World, args: &Args) -> Output {
    let (Some(target), Some(portal)) = (&args.target, args.portal) else {
        return output(code::INVAL, String::new(), "iscsiadm: new needs target and portal\n");
    };
    let key = (target.clone(), portal, args.iface.clone().unwrap_or_else(|| "default".into()));
    if !world.knows_iface(&key.2) {
        return output(code::INVAL, String::new(), "iscsiadm: Could not read iface info\n");
    }
    if world.records.get(&key).is_some_and(|r| r.corrupt) {
        return output(code::IDBM, String::new(), "iscsiadm: Could not read node record\n");
    }
    // One without a tag is a file in the portal's place, and one with a tag does away with that
    // (usr/idbm.c, idbm_rec_write).
    let beside = |k: &RecordKey| (&k.0, k.1) == (target, portal) && k.2 != key.2;
    world.records.retain(|k, r| !beside(k) || r.group.is_some());
    let record = NodeRecord { group: args.group, ..default_record(&key) };
    let line = format!("New iSCSI node [{}] added\n", label(&key));
    world.records.insert(key, record);
    done(line)
}

fn delete(world: &mut World, args: &Args) -> Output {
    let keys = matching(world, args);
    if keys.is_empty() {
        return output(code::NO_OBJS_FOUND, String::new(), NO_RECORDS);
    }
    for key in keys {
        let used = world
            .sessions
            .values()
            .any(|s| (&s.target, &s.portal, &s.iface) == (&key.0, &key.1, &key.2));
        if used {
            return output(
                code::SESS_EXISTS,
                String::new(),
                "iscsiadm: This command will remove the record, but a session is using it.\n",
            );
        }
        // What has no tag is met first, whatever its iface (usr/idbm.c, idbm_delete_node).
        let at_portal = |k: &RecordKey| (&k.0, k.1) == (&key.0, key.1);
        let untagged = world.records.iter().find(|(k, r)| at_portal(k) && r.group.is_none());
        let met = untagged.map_or_else(|| key.clone(), |(k, _)| k.clone());
        world.records.remove(&met);
    }
    done(String::new())
}

fn show(world: &World, args: &Args) -> Output {
    let keys = matching(world, args);
    if keys.is_empty() {
        return output(code::NO_OBJS_FOUND, String::new(), NO_RECORDS);
    }
    let mut text = String::new();
    for key in &keys {
        let record = &world.records[key];
        if args.op.is_empty() && args.target.is_none() {
            text += &format!("{},{} {}\n", key.1, -1, key.0);
            continue;
        }
        if record.corrupt {
            return output(code::IDBM, String::new(), "iscsiadm: Could not read node record\n");
        }
        text += "# BEGIN RECORD 2.1.11\n";
        for (name, value) in &record.settings {
            // As iscsiadm does without --show.
            let value = if name.ends_with("password") { "********" } else { value };
            text += &format!("{name} = {value}\n");
        }
        text += "# END RECORD\n";
    }
    done(text)
}

fn logout(world: &mut World, args: &Args) -> Output {
    let sids: Vec<u32> = world
        .sessions
        .values()
        .filter(|s| {
            args.sid.is_none_or(|sid| sid == s.sid)
                && args.target.as_ref().is_none_or(|t| *t == s.target)
                && args.portal.is_none_or(|p| p == s.portal)
                && args.iface.as_ref().is_none_or(|i| *i == s.iface)
        })
        .map(|s| s.sid)
        .collect();
    if sids.is_empty() {
        return output(
            code::NO_OBJS_FOUND,
            String::new(),
            "iscsiadm: No matching sessions found\n",
        );
    }
    for sid in &sids {
        world.logout(*sid);
    }
    done(format!("Logout of {} session(s) successful.\n", sids.len()))
}

fn rescan(world: &mut World, args: &Args) -> Output {
    let hosts: Vec<u32> = world
        .sessions
        .values()
        .filter(|s| args.sid.is_none_or(|sid| sid == s.sid))
        .map(|s| s.host)
        .collect();
    if hosts.is_empty() {
        return output(
            code::NO_OBJS_FOUND,
            String::new(),
            "iscsiadm: No matching sessions found\n",
        );
    }
    for host in hosts {
        let _ = world.write(&format!("class/scsi_host/host{host}/scan"), "- - -");
    }
    done(String::new())
}

fn show_sessions(world: &World) -> Output {
    if world.sessions.is_empty() {
        return output(code::NO_OBJS_FOUND, String::new(), "iscsiadm: No active sessions.\n");
    }
    let line = |s: &super::kernel::Session| {
        format!("tcp: [{}] {},1 {} (non-flash)\n", s.sid, s.portal, s.target)
    };
    done(world.sessions.values().map(line).collect())
}
