//! iSCSI sessions as sysfs shows them: what iscsiadm prints, without starting it.

use super::records::MARKED_SESSION;
use crate::connector::error::Error;
use crate::connector::scsi::Hctl;
use crate::host::sysfs::{ReadError, Sysfs, View};
use crate::types::{IfaceName, Iqn, Nexus, Portal};

/// One session of open-iscsi's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Session {
    /// Its number, unique in this boot.
    pub(crate) sid: u32,
    /// Its directory below /sys: `devices/platform/host3/session1`.
    pub(crate) dir: String,
    /// Its SCSI host.
    pub(crate) host: u32,
    /// The target's id on that host.
    pub(crate) target_id: u32,
    /// The portal that it was made for (not where the target may have redirected it to).
    pub(crate) portal: Portal,
    /// The iface record that it goes through.
    pub(crate) iface: String,
    /// The tag of the portal group that the target named.
    pub(crate) group: Option<u16>,
    /// Logged in and usable now.
    pub(crate) up: bool,
    /// It bears the mark of our records, or goes by an iface record of ours.
    pub(crate) marked: bool,
}

impl Session {
    /// Where a LUN of it is, or would be.
    pub(crate) fn hctl(&self, lun: u64) -> Hctl {
        Hctl { host: self.host, channel: 0, target: self.target_id, lun }
    }

    /// Directory below /sys of the SCSI device at `hctl`.
    pub(crate) fn device_dir(&self, hctl: Hctl) -> String {
        let Hctl { host, channel, target, .. } = hctl;
        format!("{}/target{host}:{channel}:{target}/{hctl}", self.dir)
    }

    /// Whether it goes by the iface of that nexus, so that we could have made it.
    pub(crate) fn is_by(&self, nexus: &Nexus) -> bool {
        self.iface == nexus.iface().as_str()
    }
}

const CLASS: &str = "class/iscsi_session";

/// All sessions of a target, by exact name.
pub(crate) async fn of_target(sysfs: &dyn Sysfs, target: &Iqn) -> Result<Vec<Session>, Error> {
    let target = target.clone();
    let look = move |view: &View<'_>| {
        let mut found = Vec::new();
        for sid in numbers_in(view)? {
            let name = view.text(&format!("{CLASS}/session{sid}/targetname"))?;
            if name.is_some_and(|name| name.eq_ignore_ascii_case(target.as_str())) {
                found.extend(read_in(view, sid)?);
            }
        }
        Ok(found)
    };
    Ok(sysfs.look(CLASS, look).await?)
}

/// The targets, by their ifaces, and portals of all sessions that bear our mark.
pub(crate) async fn marked(sysfs: &dyn Sysfs) -> Result<Vec<(Nexus, Portal)>, Error> {
    let look = |view: &View<'_>| {
        let mut found = Vec::new();
        for sid in numbers_in(view)? {
            let target = view.text(&format!("{CLASS}/session{sid}/targetname"))?;
            let Some(Ok(target)) = target.map(|t| t.parse::<Iqn>()) else { continue };
            let Some(session) = read_in(view, sid)?.filter(|s| s.marked) else { continue };
            let Ok(iface) = session.iface.parse() else { continue };
            found.push((Nexus::new(target, iface), session.portal));
        }
        Ok(found)
    };
    Ok(sysfs.look(CLASS, look).await?)
}

fn numbers_in(view: &View<'_>) -> Result<impl Iterator<Item = u32> + use<>, ReadError> {
    let number = |name: String| name.strip_prefix("session")?.parse().ok();
    Ok(view.entries(CLASS)?.into_iter().filter_map(number))
}

/// The session of that number; `None` also while it is half made or half gone.
fn read_in(view: &View<'_>, sid: u32) -> Result<Option<Session>, ReadError> {
    let class = format!("{CLASS}/session{sid}");
    let Some(dir) = view.resolve(&class)? else { return Ok(None) };
    let Some((dir, _)) = dir.split_once("/iscsi_session/") else { return Ok(None) };
    let host = dir.split('/').find_map(|p| p.strip_prefix("host")?.parse::<u32>().ok());
    let Some(portal) = portal_in(view, sid)? else { return Ok(None) };
    let state = view.text(&format!("{class}/state"))?;
    let iface = view.text(&format!("{class}/ifacename"))?;
    let group = view.text(&format!("{class}/tpgt"))?;
    let target_id = target_id_in(view, &class, dir)?;
    let own = iface.as_deref().and_then(|i| i.parse().ok()).is_some_and(|i: IfaceName| i.is_own());
    let mark = view.text(&format!("{class}/tgt_reset_tmo"))?;
    Ok(host.map(|host| Session {
        sid,
        dir: dir.to_owned(),
        host,
        target_id,
        portal,
        iface: iface.unwrap_or_default(),
        group: group.and_then(|tag| tag.parse().ok()),
        up: state.as_deref() == Some("LOGGED_IN"),
        marked: own || mark.as_deref() == Some(MARKED_SESSION),
    }))
}

/// The portal of the session's leading connection.
fn portal_in(view: &View<'_>, sid: u32) -> Result<Option<Portal>, ReadError> {
    let class = format!("class/iscsi_connection/connection{sid}:0");
    let address = view.text(&format!("{class}/persistent_address"))?;
    let port = view.text(&format!("{class}/persistent_port"))?;
    Ok((|| parse_portal(&address?, &port?))())
}

fn parse_portal(address: &str, port: &str) -> Option<Portal> {
    let ip: std::net::IpAddr = address.trim_matches(['[', ']']).parse().ok()?;
    let port: u16 = port.parse().ok()?;
    std::net::SocketAddr::new(ip, port).to_string().parse().ok()
}

/// The target's id on its host: the session's own attribute, else what its directory shows, else 0
/// (iscsi_tcp gives each session a host of its own, with one target).
fn target_id_in(view: &View<'_>, class: &str, dir: &str) -> Result<u32, ReadError> {
    let id = view.text(&format!("{class}/target_id"))?;
    if let Some(id) = id.and_then(|t| t.parse().ok()) {
        return Ok(id);
    }
    let targets = view.entries(dir)?;
    Ok(targets
        .iter()
        .find_map(|t| t.strip_prefix("target")?.rsplit(':').next()?.parse().ok())
        .unwrap_or(0))
}

/// The SCSI devices under a session, whoever made them.
pub(crate) async fn devices(sysfs: &dyn Sysfs, session: &Session) -> Result<Vec<Hctl>, Error> {
    let dir = session.dir.clone();
    let look = move |view: &View<'_>| {
        let mut found = Vec::new();
        for target in view.entries(&dir)?.iter().filter(|t| t.starts_with("target")) {
            let entries = view.entries(&format!("{dir}/{target}"))?;
            found.extend(entries.iter().filter_map(|e| e.parse::<Hctl>().ok()));
        }
        Ok(found)
    };
    Ok(sysfs.look(&session.dir, look).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portals_are_read_in_both_families() {
        let p = |a, b| parse_portal(a, b).map(|p| p.to_string());
        assert_eq!(p("127.0.0.2", "3260").as_deref(), Some("127.0.0.2:3260"));
        assert_eq!(p("fd00:0:0:0:0:0:0:1", "3261").as_deref(), Some("[fd00::1]:3261"));
        assert_eq!(p("san.example", "3260"), None, "a foreign session by name is nobody of ours");
        assert_eq!(p("127.0.0.2", "-1"), None);
    }
}
