//! SCSI disks: scan, rescan, delete, and how sysfs shows them.

use std::io;

use nix::libc;

use super::array::{SimLun, vpd_pg80, vpd_pg83};
use super::kernel::{World, block_properties};
use crate::types::{DevNum, Iqn, Wwpn};

/// By what LUNs are scanned: a session, or a remote port.
#[derive(Debug, Clone)]
pub(super) struct Behind {
    /// Its number.
    pub(super) sid: u32,
    pub(super) host: u32,
    /// The target's id on that host.
    pub(super) id: u32,
    /// Its directory below /sys.
    pub(super) dir: String,
    pub(super) target: Iqn,
    /// The target's name where it is a remote port.
    pub(super) fc: Option<Wwpn>,
}

/// A SCSI disk as the kernel knows it, which may be behind what the array has.
#[derive(Debug, Clone)]
pub(super) struct ScsiDev {
    pub(super) hctl: String,
    /// The session's or remote port's number.
    pub(super) sid: u32,
    pub(super) target: Iqn,
    pub(super) scsi_lun: u64,
    /// Counts sd names and minors, lowest first.
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) dev: DevNum,
    pub(super) known: SimLun,
    /// Whether its path works.
    pub(super) online: bool,
}

impl World {
    /// `C T LUN` with `-` for all: devices of LUNs that are new are made, known ones are left as
    /// they are even when the array has something else there by now.
    pub(super) fn scan(&mut self, host: u32, value: &str) -> io::Result<()> {
        let fields: Vec<&str> = value.split_whitespace().collect();
        let wanted = |field: &str| -> io::Result<Option<u64>> {
            match field {
                "-" => Ok(None),
                number => {
                    number.parse().map(Some).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
                }
            }
        };
        let [channel, id, lun] = fields[..] else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let (channel, id, lun) = (wanted(channel)?, wanted(id)?, wanted(lun)?);
        if channel.is_some_and(|c| c != 0) {
            return Ok(());
        }
        if self.is_hba(host) {
            self.scan_hba(host, id, lun);
            self.multipathd_react();
            return Ok(());
        }
        if id.is_some_and(|t| t != 0) {
            return Ok(());
        }
        let Some(session) = self.sessions.values().find(|s| s.host == host).cloned() else {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        };
        if session.failed {
            return Ok(());
        }
        self.scan_behind(&session.behind(), lun);
        self.multipathd_react();
        Ok(())
    }

    /// Finds one LUN, or all.
    pub(super) fn scan_behind(&mut self, behind: &Behind, lun: Option<u64>) {
        let Some(target) = self.targets.get(&behind.target) else { return };
        let found: Vec<(u64, SimLun)> = target
            .luns
            .iter()
            .filter(|(n, _)| lun.is_none_or(|wanted| wanted == n.scsi()))
            .map(|(n, l)| (n.scsi(), l.clone()))
            .collect();
        for (scsi_lun, known) in found {
            let hctl = format!("{}:0:{}:{scsi_lun}", behind.host, behind.id);
            if !self.disks.contains_key(&hctl) {
                self.add_disk(behind, scsi_lun, known);
            }
        }
    }

    fn add_disk(&mut self, behind: &Behind, scsi_lun: u64, known: SimLun) {
        let index = self.disks.indexes.take();
        let disk = ScsiDev {
            hctl: format!("{}:0:{}:{scsi_lun}", behind.host, behind.id),
            sid: behind.sid,
            target: behind.target.clone(),
            scsi_lun,
            index,
            name: sd_name(index),
            dev: sd_dev(index),
            known,
            online: true,
        };
        let diskseq = self.next_diskseq();
        let target_dir = format!("{}/target{}:0:{}", behind.dir, behind.host, behind.id);
        if self.tree.resolve(&target_dir).is_err() {
            self.tree.mkdir(&target_dir);
            if let Some(wwpn) = behind.fc {
                self.show_fc_target(&target_dir, wwpn);
            }
            self.emit("add", &target_dir, "scsi", &[("DEVTYPE", "scsi_target".into())]);
        }
        self.disks.insert(disk.clone());
        self.show_disk(&target_dir, &disk, diskseq);
        self.multipath.pending.push(disk.hctl);
    }

    fn show_disk(&mut self, target_dir: &str, disk: &ScsiDev, diskseq: u64) {
        let ScsiDev { hctl, name, dev, .. } = disk;
        let dir = format!("{target_dir}/{hctl}");
        let block = format!("{dir}/block/{name}");
        let tree = &mut self.tree;
        tree.put(&format!("{dir}/state"), "running");
        tree.put(&format!("{dir}/vendor"), "LIO-ORG ");
        tree.put(&format!("{dir}/model"), format!("{:<16}", disk.known.model));
        tree.put(&format!("{dir}/rev"), "4.0 ");
        tree.put(&format!("{dir}/type"), 0);
        tree.put(&format!("{dir}/timeout"), 30);
        tree.put_unreadable(&format!("{dir}/delete"), libc::EIO);
        tree.put_unreadable(&format!("{dir}/rescan"), libc::EIO);
        let class = format!("{dir}/scsi_device/{hctl}");
        tree.link(&format!("{class}/device"), &dir);
        tree.link(&format!("class/scsi_device/{hctl}"), &class);
        tree.link(&format!("bus/scsi/devices/{hctl}"), &dir);
        tree.put(&format!("{block}/dev"), dev);
        tree.put(&format!("{block}/diskseq"), diskseq);
        tree.put(&format!("{block}/uevent"), "DEVTYPE=disk");
        tree.put(&format!("{block}/removable"), 0);
        tree.put(&format!("{block}/queue/logical_block_size"), 512);
        tree.link(&format!("{block}/device"), &dir);
        tree.mkdir(&format!("{block}/holders"));
        tree.mkdir(&format!("{block}/slaves"));
        for link in
            [format!("class/block/{name}"), format!("block/{name}"), format!("dev/block/{dev}")]
        {
            tree.link(&link, &block);
        }
        self.show_identity(&dir, disk);
        self.emit("add", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
        self.emit("add", &class, "scsi_device", &[]);
        self.emit("add", &block, "block", &block_properties(name, *dev, diskseq));
        self.emit("bind", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
    }

    /// Shows what INQUIRY and READ CAPACITY said when they were last asked.
    fn show_identity(&mut self, dir: &str, disk: &ScsiDev) {
        let port = self.sessions.get(&disk.sid).map_or(1, |s| match s.portal.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            std::net::IpAddr::V6(ip) => ip.octets()[15],
        });
        let wwid = disk.known.wwid.as_ref();
        match wwid {
            Some(wwid) => self.tree.put(&format!("{dir}/wwid"), wwid),
            // scsi_vpd_lun_id() finds no designator.
            None => self.tree.put_unreadable(&format!("{dir}/wwid"), libc::ENXIO),
        }
        self.tree.put_bytes(&format!("{dir}/vpd_pg83"), vpd_pg83(wwid, port));
        self.tree.put_bytes(&format!("{dir}/vpd_pg80"), vpd_pg80(&disk.known));
        let block = format!("{dir}/block/{}", disk.name);
        self.tree.put(&format!("{block}/size"), disk.known.size / 512);
        self.tree.put(&format!("{block}/ro"), u8::from(disk.known.read_only));
    }

    /// Reads VPD and size again. When the array no longer has the LUN, the old pages are kept (the
    /// kernel replaces them only by new ones) and the size becomes 0.
    pub(super) fn rescan(&mut self, hctl: &str) {
        let Some(mut disk) = self.disks.get(hctl).cloned().filter(|d| d.online) else { return };
        let Some(dir) = self.disk_dir(hctl) else { return };
        let (before, protected) = (disk.known.size, disk.known.read_only);
        match self.targets.get(&disk.target).and_then(|t| t.by_scsi(disk.scsi_lun)) {
            Some(now) => disk.known = now.clone(),
            None => disk.known.size = 0,
        }
        self.show_identity(&dir, &disk);
        if disk.known.size != before {
            let block = format!("{dir}/block/{}", disk.name);
            self.emit("change", &block, "block", &[("RESIZE", "1".into())]);
        }
        if disk.known.read_only != protected {
            let block = format!("{dir}/block/{}", disk.name);
            let ro = u8::from(disk.known.read_only).to_string();
            self.emit("change", &block, "block", &[("DISK_RO", ro)]);
            self.protection_changed(disk.dev);
        }
        self.disks.insert(disk);
    }

    /// Removes a SCSI device, whoever uses it: the kernel asks nobody.
    pub(super) fn delete_disk(&mut self, hctl: &str) {
        let Some(dir) = self.disk_dir(hctl) else { return };
        if self.multipath.late.is_some() {
            self.add_path(hctl);
        }
        let Some(disk) = self.disks.remove(hctl) else { return };
        let block = format!("{dir}/block/{}", disk.name);
        self.drop_path(disk.dev, &disk.name);
        if self.multipath.late == Some(true) {
            self.flush_empty_maps();
        }
        for link in [
            format!("class/block/{}", disk.name),
            format!("block/{}", disk.name),
            format!("dev/block/{}", disk.dev),
            format!("class/scsi_device/{hctl}"),
            format!("bus/scsi/devices/{hctl}"),
            dir.clone(),
        ] {
            self.tree.remove(&link);
        }
        self.claims.remove(&disk.dev);
        self.opens.remove(&disk.dev);
        self.multipath.pending.retain(|p| p != hctl);
        self.emit("unbind", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
        self.emit("remove", &format!("{dir}/scsi_device/{hctl}"), "scsi_device", &[]);
        self.emit("remove", &block, "block", &block_properties(&disk.name, disk.dev, 0));
        self.emit("remove", &dir, "scsi", &[("DEVTYPE", "scsi_device".into())]);
        let target_dir = dir.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
        let device = |name: &String| name.contains(':');
        if self.tree.list(&target_dir).is_ok_and(|names| !names.iter().any(device)) {
            self.tree.remove(&target_dir);
            let name = target_dir.rsplit('/').next().unwrap_or_default();
            self.tree.remove(&format!("class/fc_transport/{name}"));
            self.emit("remove", &target_dir, "scsi", &[("DEVTYPE", "scsi_target".into())]);
        }
    }

    pub(super) fn disk_dir(&self, hctl: &str) -> Option<String> {
        self.tree.resolve(&format!("bus/scsi/devices/{hctl}")).ok()
    }
}

/// The kernel's name of the n-th SCSI disk: sda, ..., sdz, sdaa, ...
fn sd_name(index: u32) -> String {
    format!("sd{}", super::letters(index))
}

/// The kernel's number of the n-th SCSI disk (drivers/scsi/sd.c, sd_major and sd_probe).
fn sd_dev(index: u32) -> DevNum {
    let block = (index & 0xf0) >> 4;
    let major = match block {
        0 => 8,
        1..=7 => 65 + block - 1,
        _ => 128 + block - 8,
    };
    DevNum { major, minor: (index & 0xf) << 4 | (index & 0xf_ff00) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_and_numbered_as_the_kernel_does() {
        assert_eq!(["sda", "sdz", "sdaa", "sdba"].map(str::to_owned), [0, 25, 26, 52].map(sd_name));
        assert_eq!(sd_dev(0).to_string(), "8:0");
        assert_eq!(sd_dev(15).to_string(), "8:240");
        assert_eq!(sd_dev(16).to_string(), "65:0");
        assert_eq!(sd_dev(128).to_string(), "128:0");
        assert_eq!(sd_dev(256).to_string(), "8:256");
    }
}
