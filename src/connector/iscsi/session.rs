//! iSCSI sessions as sysfs shows them: what iscsiadm prints, without starting it.

use super::records::MARKED_SESSION;
use crate::connector::error::Error;
use crate::connector::scsi::Hctl;
use crate::host::sysfs::Sysfs;
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

/// All sessions of a target, by exact name.
pub(crate) async fn of_target(sysfs: &dyn Sysfs, target: &Iqn) -> Result<Vec<Session>, Error> {
    let class = "class/iscsi_session";
    let names = sysfs.entries(class).await.map_err(Error::io("listing iSCSI sessions"))?;
    let mut found = Vec::new();
    for name in names {
        let Some(sid) = name.strip_prefix("session").and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let session = read(sysfs, target, sid).await;
        found.extend(session.map_err(Error::io(format!("reading {class}/{name}")))?);
    }
    Ok(found)
}

/// The targets, by their ifaces, and portals of all sessions that bear our mark.
pub(crate) async fn marked(sysfs: &dyn Sysfs) -> Result<Vec<(Nexus, Portal)>, Error> {
    let class = "class/iscsi_session";
    let names = sysfs.entries(class).await.map_err(Error::io("listing iSCSI sessions"))?;
    let mut found = Vec::new();
    for name in names {
        let path = format!("{class}/{name}/targetname");
        let target = sysfs.text(&path).await.map_err(Error::io(format!("reading {path}")))?;
        let Some(Ok(target)) = target.map(|t| t.parse::<Iqn>()) else {
            continue;
        };
        let sessions = of_target(sysfs, &target).await?;
        let ours = sessions.iter().filter(|s| format!("session{}", s.sid) == name && s.marked);
        found.extend(ours.filter_map(|s| {
            let iface = s.iface.parse().ok()?;
            Some((Nexus::new(target.clone(), iface), s.portal))
        }));
    }
    Ok(found)
}

/// The session if it is of that target; `None` also while it is half made or half gone.
async fn read(sysfs: &dyn Sysfs, target: &Iqn, sid: u32) -> std::io::Result<Option<Session>> {
    let class = format!("class/iscsi_session/session{sid}");
    let name = sysfs.text(&format!("{class}/targetname")).await?;
    if !name.is_some_and(|n| n.eq_ignore_ascii_case(target.as_str())) {
        return Ok(None);
    }
    let dir = match sysfs.resolve(&class).await {
        Ok(dir) => dir,
        Err(e) if crate::host::sysfs::is_gone(&e) => return Ok(None),
        Err(e) => return Err(e),
    };
    let Some((dir, _)) = dir.split_once("/iscsi_session/") else { return Ok(None) };
    let host = dir.split('/').find_map(|p| p.strip_prefix("host")?.parse::<u32>().ok());
    let Some(portal) = portal(sysfs, sid).await? else { return Ok(None) };
    let state = sysfs.text(&format!("{class}/state")).await?;
    let iface = sysfs.text(&format!("{class}/ifacename")).await?;
    let group = sysfs.text(&format!("{class}/tpgt")).await?;
    let target_id = target_id(sysfs, &class, dir).await?;
    let own = iface.as_deref().and_then(|i| i.parse().ok()).is_some_and(|i: IfaceName| i.is_own());
    let mark = sysfs.text(&format!("{class}/tgt_reset_tmo")).await?;
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
async fn portal(sysfs: &dyn Sysfs, sid: u32) -> std::io::Result<Option<Portal>> {
    let class = format!("class/iscsi_connection/connection{sid}:0");
    let address = sysfs.text(&format!("{class}/persistent_address")).await?;
    let port = sysfs.text(&format!("{class}/persistent_port")).await?;
    Ok((|| parse_portal(&address?, &port?))())
}

fn parse_portal(address: &str, port: &str) -> Option<Portal> {
    let ip: std::net::IpAddr = address.trim_matches(['[', ']']).parse().ok()?;
    let port: u16 = port.parse().ok()?;
    std::net::SocketAddr::new(ip, port).to_string().parse().ok()
}

/// The target's id on its host: the session's own attribute, else what its directory shows, else 0
/// (iscsi_tcp gives each session a host of its own, with one target).
async fn target_id(sysfs: &dyn Sysfs, class: &str, dir: &str) -> std::io::Result<u32> {
    if let Some(id) = sysfs.text(&format!("{class}/target_id")).await?.and_then(|t| t.parse().ok())
    {
        return Ok(id);
    }
    let targets = sysfs.entries(dir).await?;
    Ok(targets
        .iter()
        .find_map(|t| t.strip_prefix("target")?.rsplit(':').next()?.parse().ok())
        .unwrap_or(0))
}

/// The SCSI devices under a session, whoever made them.
pub(crate) async fn devices(sysfs: &dyn Sysfs, session: &Session) -> Result<Vec<Hctl>, Error> {
    let list =
        async |dir: &str| sysfs.entries(dir).await.map_err(Error::io(format!("listing {dir}")));
    let mut found = Vec::new();
    for target in list(&session.dir).await?.iter().filter(|t| t.starts_with("target")) {
        let entries = list(&format!("{}/{target}", session.dir)).await?;
        found.extend(entries.iter().filter_map(|e| e.parse::<Hctl>().ok()));
    }
    Ok(found)
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
