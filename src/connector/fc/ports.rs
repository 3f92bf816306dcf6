//! HBAs and remote ports as sysfs shows them (drivers/scsi/scsi_transport_fc.c).
//!
//! ```text
//! class/fc_host/host6                 the HBA: port_name, port_state, ...
//! class/fc_remote_ports/rport-6:0-2   a port that it sees: B of H:B-R is the channel, scsi_target_id the target
//! class/fc_transport/target6:0:1      the same from the SCSI side, once it has been scanned
//! ```

use crate::connector::Hba;
use crate::connector::error::Error;
use crate::connector::scsi::Hctl;
use crate::host::sysfs::{ReadError, Sysfs, View};
use crate::types::Wwpn;

/// What `port_state` says of a port by which LUNs are to be had.
const ONLINE: &str = "Online";

/// A target port as one HBA sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemotePort {
    /// The HBA.
    pub(crate) initiator: Wwpn,
    /// The port.
    pub(crate) target: Wwpn,
    /// The HBA's SCSI host.
    pub(crate) host: u32,
    /// Its channel there.
    pub(crate) channel: u32,
    /// Its target id there.
    pub(crate) target_id: u32,
    /// The directory below /sys in which the SCSI target is, or would be.
    pub(crate) dir: String,
    /// Its `port_state`.
    pub(crate) state: String,
}

impl RemotePort {
    /// Whether LUNs can be had by it now.
    pub(crate) fn is_online(&self) -> bool {
        self.state == ONLINE
    }

    /// Where a LUN of it is, or would be.
    pub(crate) fn hctl(&self, lun: u64) -> Hctl {
        Hctl { host: self.host, channel: self.channel, target: self.target_id, lun }
    }

    /// Directory below /sys of the SCSI device at `hctl`.
    pub(crate) fn device_dir(&self, hctl: Hctl) -> String {
        let Self { dir, host, channel, target_id, .. } = self;
        format!("{dir}/target{host}:{channel}:{target_id}/{hctl}")
    }
}

/// The node's HBAs.
pub(crate) async fn hbas(sysfs: &dyn Sysfs) -> Result<Vec<Hba>, Error> {
    // Without the class there is no module that could have made one.
    let class = "class/fc_host";
    let look = move |view: &View<'_>| {
        let mut found = Vec::new();
        for name in view.entries(class)? {
            let Some(host) = name.strip_prefix("host").and_then(|n| n.parse().ok()) else {
                continue;
            };
            let text = |attribute: &str| view.text(&format!("{class}/{name}/{attribute}"));
            let name_of = |text: Option<String>| text.and_then(|name| name.parse::<Wwpn>().ok());
            // One that is going has none any more.
            let Some(wwpn) = name_of(text("port_name")?) else { continue };
            found.push(Hba {
                host,
                wwpn,
                wwnn: name_of(text("node_name")?),
                state: text("port_state")?.unwrap_or_default(),
                speed: text("speed")?.unwrap_or_default(),
                fabric: name_of(text("fabric_name")?),
                port_type: text("port_type")?.unwrap_or_default(),
            });
        }
        found.sort_by_key(|hba| hba.host);
        Ok(found)
    };
    Ok(sysfs.look(class, look).await?)
}

/// Every port of that name that one of `hbas` sees as a SCSI target, in whatever state.
pub(crate) async fn of_target(
    sysfs: &dyn Sysfs,
    hbas: &[Hba],
    target: Wwpn,
) -> Result<Vec<RemotePort>, Error> {
    let hbas = hbas.to_vec();
    let look = move |view: &View<'_>| of_target_in(view, &hbas, target);
    Ok(sysfs.look("class/fc_remote_ports", look).await?)
}

fn of_target_in(view: &View<'_>, hbas: &[Hba], target: Wwpn) -> Result<Vec<RemotePort>, ReadError> {
    let mut found = Vec::new();
    for name in view.entries("class/fc_remote_ports")? {
        let Some((host, channel)) = rport_address(&name) else { continue };
        let Some(hba) = hbas.iter().find(|hba| hba.host == host) else { continue };
        let path = format!("class/fc_remote_ports/{name}");
        found.extend(remote_port_in(view, &path, (hba.wwpn, host, channel), target)?);
    }
    for name in view.entries("class/fc_transport")? {
        let Some([host, channel, target_id]) = target_address(&name) else { continue };
        let Some(hba) = hbas.iter().find(|hba| hba.host == host) else { continue };
        let known = |p: &RemotePort| (p.host, p.channel, p.target_id) == (host, channel, target_id);
        if found.iter().any(known) {
            continue;
        }
        let path = format!("class/fc_transport/{name}");
        let Some(dir) = bare_target_in(view, &path, target)? else { continue };
        let (initiator, state) = (hba.wwpn, ONLINE.to_owned());
        found.push(RemotePort { initiator, target, host, channel, target_id, dir, state });
    }
    found.sort_by_key(|port| (port.host, port.channel, port.target_id));
    Ok(found)
}

/// H and B of `rport-H:B-R`.
fn rport_address(name: &str) -> Option<(u32, u32)> {
    let (host, rest) = name.strip_prefix("rport-")?.split_once(':')?;
    let (channel, number) = rest.split_once('-')?;
    number.parse::<u32>().ok()?;
    Some((host.parse().ok()?, channel.parse().ok()?))
}

/// H, C and T of `targetH:C:T`.
fn target_address(name: &str) -> Option<[u32; 3]> {
    let numbers: Option<Vec<u32>> =
        name.strip_prefix("target")?.split(':').map(|n| n.parse().ok()).collect();
    numbers?.try_into().ok()
}

/// The remote port if it is that target; `None` also while it is half made or half gone.
fn remote_port_in(
    view: &View<'_>,
    class: &str,
    (initiator, host, channel): (Wwpn, u32, u32),
    target: Wwpn,
) -> Result<Option<RemotePort>, ReadError> {
    let name = view.text(&format!("{class}/port_name"))?;
    if name.and_then(|name| name.parse::<Wwpn>().ok()) != Some(target) {
        return Ok(None);
    }
    // -1 where it is no target (FCP_TARGET is not among its roles), or is not known to be one yet.
    let id = view.text(&format!("{class}/scsi_target_id"))?;
    let Some(target_id) = id.and_then(|id| id.parse::<u32>().ok()) else { return Ok(None) };
    let state = view.text(&format!("{class}/port_state"))?.unwrap_or_default();
    let dir = parent_in(view, class, "/fc_remote_ports/")?;
    Ok(dir.map(|dir| RemotePort { initiator, target, host, channel, target_id, dir, state }))
}

/// Of a SCSI target of that name the directory in which it is: HBAs are known that show no remote ports.
fn bare_target_in(view: &View<'_>, class: &str, target: Wwpn) -> Result<Option<String>, ReadError> {
    let name = view.text(&format!("{class}/port_name"))?;
    if name.and_then(|name| name.parse::<Wwpn>().ok()) != Some(target) {
        return Ok(None);
    }
    let target = parent_in(view, class, "/fc_transport/")?;
    Ok(target.and_then(|dir| Some(dir.rsplit_once('/')?.0.to_owned())))
}

/// The directory below /sys of what a class entry describes.
fn parent_in(view: &View<'_>, class: &str, under: &str) -> Result<Option<String>, ReadError> {
    let dir = view.resolve(class)?;
    Ok(dir.and_then(|dir| Some(dir.split_once(under)?.0.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_exactly() {
        assert_eq!(rport_address("rport-6:0-12"), Some((6, 0)));
        assert_eq!(target_address("target6:0:1"), Some([6, 0, 1]));
        for bad in ["rport-6:0", "rport-6-0", "rport-a:0-1", "host6", "rport-6:0-x"] {
            assert_eq!(rport_address(bad), None, "{bad}");
        }
        for bad in ["target6:0", "target6:0:1:2", "target6:0:x", "6:0:1"] {
            assert_eq!(target_address(bad), None, "{bad}");
        }
    }
}
