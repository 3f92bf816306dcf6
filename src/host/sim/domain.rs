//! A simulated domain: its XML, as text that is edited in place, and its guest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::json;

use super::devices::{remove_disk, set_limits, with_device};
use crate::domain::xml::{self, Disk, Domain};
use crate::host::libvirt::{Affect, Definition, DomainInfo, DomainState, Job, LibvirtError};
use crate::types::IoLimits;

/// How a guest takes a removal on bus virtio. On bus scsi it is not asked, as with QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unplug {
    /// It lets go at once.
    #[default]
    Acknowledge,
    /// It refuses.
    Refuse,
    /// It does not answer until [`super::hypervisor::SimHypervisor::acknowledge`].
    Silent,
}

/// A simulated guest's agent.
#[derive(Debug, Clone, Default)]
pub struct SimAgent {
    /// Whether it is connected.
    pub connected: bool,
    /// What is mounted: serial of the disk to mount point.
    pub mounted: BTreeMap<String, String>,
    /// Devices built on disks: serial of the disk to device-mapper name.
    pub holders: BTreeMap<String, String>,
    /// Whole answers to commands, instead of those made from the above.
    pub scripted: BTreeMap<String, String>,
}

/// A simulated domain.
#[derive(Debug, Clone)]
pub struct SimDomain {
    name: String,
    pub(super) live: Option<String>,
    pub(super) config: Option<String>,
    /// The guest is held.
    pub paused: bool,
    /// It is so because of an I/O error.
    pub io_error: bool,
    /// What has the domain to itself.
    pub job: Option<Job>,
    /// How the guest takes removals.
    pub unplug: Unplug,
    /// Its agent.
    pub agent: SimAgent,
    unanswered: BTreeSet<String>,
    /// How many bytes QEMU shows the guest of each disk, by its alias.
    pub(super) shown: BTreeMap<String, u64>,
    /// Target names of the drives whose trays the guest has locked.
    pub(super) locked: BTreeSet<String>,
    /// Those whose trays are locked for one request, as by a guest's udev that looks at a medium.
    pub(super) looked_at: BTreeSet<String>,
    /// What the device behind each disk is, by the disk's alias.
    identities: BTreeMap<String, String>,
}

/// A device that QEMU has open.
#[derive(Debug, Clone, Default)]
pub struct SimDevice {
    /// In bytes.
    pub size: u64,
    /// The LUN's identity as a udev has it.
    pub identity: Option<String>,
}

impl SimDomain {
    /// A running domain from its XML; `persistent` gives it the same as its definition.
    pub fn from_xml(name: &str, xml: &str, persistent: bool) -> Self {
        Self {
            name: name.to_owned(),
            live: Some(xml.to_owned()),
            config: persistent.then(|| xml.to_owned()),
            paused: false,
            io_error: false,
            job: None,
            unplug: Unplug::default(),
            agent: SimAgent { connected: true, ..SimAgent::default() },
            unanswered: BTreeSet::new(),
            shown: BTreeMap::new(),
            locked: BTreeSet::new(),
            looked_at: BTreeSet::new(),
            identities: BTreeMap::new(),
        }
    }

    /// Its XML as it runs; `None` when it does not.
    pub fn live(&self) -> Option<&str> {
        self.live.as_deref()
    }

    /// A running q35 domain with a boot disk, a virtio-scsi controller and eight free root ports.
    pub fn q35(name: &str, persistent: bool) -> Self {
        let ports: String = (1..=10)
            .map(|i| {
                format!(
                    "    <controller type='pci' index='{i}' model='pcie-root-port'>\n      \
                     <address type='pci' domain='0x0000' bus='0x00' slot='{i:#04x}' function='0x0'/>\n    \
                     </controller>\n"
                )
            })
            .collect();
        let xml = format!(
            "<domain type='kvm' id='1'>
  <name>{name}</name>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/boot.qcow2'/>
      <target dev='vda' bus='virtio'/>
      <serial>boot</serial>
      <alias name='ua-boot'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </disk>
    <controller type='scsi' index='0' model='virtio-scsi'>
      <alias name='scsi0'/>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
    </controller>
    <controller type='pci' index='0' model='pcie-root'/>
{ports}  </devices>
</domain>
"
        );
        Self::from_xml(name, &xml, persistent)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// At a glance.
    pub fn info(&self) -> DomainInfo {
        let state = match (&self.live, self.paused) {
            (None, _) => DomainState::Shutoff,
            (Some(_), true) => DomainState::Paused,
            (Some(_), false) => DomainState::Running,
        };
        DomainInfo {
            state,
            persistent: self.config.is_some(),
            job: self.job,
            io_error: state == DomainState::Paused && self.io_error,
        }
    }

    /// One of its definitions, as libvirt has it: of a domain that does not run, both are the
    /// persistent one.
    pub fn xml(&self, definition: Definition) -> String {
        let text = match definition {
            Definition::Live => self.live.as_ref().or(self.config.as_ref()),
            Definition::Config => self.config.as_ref().or(self.live.as_ref()),
        };
        text.cloned().unwrap_or_default()
    }

    /// Stops; whether anything of it remains.
    pub fn stop(&mut self) -> bool {
        self.live = None;
        self.unanswered.clear();
        self.locked.clear();
        self.looked_at.clear();
        self.config.is_some()
    }

    /// Starts from the persistent definition.
    pub fn start(&mut self) {
        self.live.clone_from(&self.config);
    }

    /// The guest answers to a removal; whether one was pending.
    pub fn acknowledge(&mut self, alias: &str) -> bool {
        self.unanswered.remove(alias)
            && self.live.as_mut().is_some_and(|xml| remove_disk(xml, alias))
    }

    /// Adds a device; its alias when it was a disk of the running domain.
    pub fn attach(
        &mut self,
        device: &str,
        affect: Affect,
        may_open: &dyn Fn(&str, bool) -> Result<(), String>,
        device_of: &dyn Fn(&str) -> Option<SimDevice>,
    ) -> Result<Option<String>, LibvirtError> {
        let live = affect.live.then(|| with_device(self.running()?, device)).transpose()?;
        let config = affect.config.then(|| with_device(self.defined()?, device)).transpose()?;
        let mut added = None;
        if let Some((text, disk)) = live {
            if let Some(disk) = disk {
                let path = disk.source.unwrap_or_default();
                may_open(&path, disk.readonly).map_err(|why| LibvirtError::Other {
                    code: 1,
                    message: format!(
                        "internal error: unable to execute QEMU command 'blockdev-add': Could not open '{path}': {why}"
                    ),
                })?;
                if let Some(alias) = &disk.alias {
                    let device = device_of(&path).unwrap_or_default();
                    self.shown.insert(alias.clone(), device.size);
                    self.identities.insert(alias.clone(), device.identity.unwrap_or_default());
                }
                added = disk.alias;
            }
            self.live = Some(text);
        }
        if let Some((text, _)) = config {
            self.config = Some(text);
        }
        Ok(added)
    }

    /// Asks for a disk's removal; what came of it in the running domain.
    pub fn detach(&mut self, alias: &str, affect: Affect) -> Result<Option<Unplug>, LibvirtError> {
        let missing = || LibvirtError::DeviceMissing {
            message: format!("device not found: no device found with alias {alias}"),
        };
        let mut result = None;
        if affect.config {
            self.defined()?;
            if !self.config.as_mut().is_some_and(|xml| remove_disk(xml, alias)) {
                return Err(missing());
            }
        }
        if affect.live {
            let domain = read(self.running()?)?;
            let bus = domain.disk(alias).ok_or_else(missing)?.bus.clone();
            let outcome = if bus == "scsi" { Unplug::Acknowledge } else { self.unplug };
            match outcome {
                Unplug::Acknowledge => {
                    if let Some(xml) = &mut self.live {
                        remove_disk(xml, alias);
                    }
                }
                Unplug::Refuse => {}
                Unplug::Silent => {
                    if !self.unanswered.insert(alias.to_owned()) {
                        return Err(LibvirtError::UnplugPending {
                            message: format!("Device {alias} is already in the process of unplug"),
                        });
                    }
                }
            }
            result = Some(outcome);
        }
        Ok(result)
    }

    /// How many bytes the guest sees of the disk of that alias; `None` when it has none.
    pub fn shown(&self, alias: &str) -> Option<u64> {
        let domain = read(self.live.as_deref()?).ok()?;
        domain.disk(alias)?;
        self.shown.get(alias).copied()
    }

    /// How many bytes QEMU shows of the disk with that source.
    pub fn capacity(&self, source: &str) -> Result<u64, LibvirtError> {
        let alias = self.by_source(source)?.alias.unwrap_or_default();
        Ok(self.shown.get(&alias).copied().unwrap_or_default())
    }

    /// Has QEMU take over the size of a block device, which is `has` by now (block/file-posix.c,
    /// raw_co_truncate; block/io.c, bdrv_co_truncate).
    pub fn resize(&mut self, source: &str, bytes: u64, has: u64) -> Result<(), LibvirtError> {
        let disk = self.by_source(source)?;
        let qemu = |why: &str| LibvirtError::Other {
            code: 1,
            message: format!(
                "internal error: unable to execute QEMU command 'block_resize': {why}"
            ),
        };
        if disk.readonly {
            return Err(qemu("Image is read-only"));
        }
        if bytes > has {
            return Err(qemu("Cannot grow device files"));
        }
        self.shown.insert(disk.alias.unwrap_or_default(), has);
        Ok(())
    }

    /// Sets all I/O limits of the disk with that source (`qemuDomainSetBlockIoTune`).
    pub fn limit(
        &mut self,
        source: &str,
        limits: &IoLimits,
        affect: Affect,
    ) -> Result<(), LibvirtError> {
        if let Err((_, error)) = limits.check() {
            return Err(refused(format!("unsupported configuration: {error}")));
        }
        for (wanted, text) in [(affect.live, &mut self.live), (affect.config, &mut self.config)] {
            let Some(text) = text.as_mut().filter(|_| wanted) else { continue };
            set_limits(text, source, limits)?;
        }
        Ok(())
    }

    fn by_source(&self, source: &str) -> Result<Disk, LibvirtError> {
        let disks = read(self.running()?)?.disks;
        let found = disks.into_iter().find(|disk| disk.source.as_deref() == Some(source));
        let found = found.map(Arc::unwrap_or_clone);
        found.ok_or_else(|| refused(format!("invalid argument: invalid path: {source}")))
    }

    /// Answers a command to the guest agent.
    pub fn agent(&self, request: &str) -> Result<String, LibvirtError> {
        let domain = read(self.running()?)?;
        if !self.agent.connected {
            return Err(LibvirtError::AgentUnresponsive {
                message: "Guest agent is not responding: QEMU guest agent is not connected".into(),
            });
        }
        let request: serde_json::Value = serde_json::from_str(request).unwrap_or_default();
        let command = request["execute"].as_str().unwrap_or_default();
        if let Some(answer) = self.agent.scripted.get(command) {
            return Ok(answer.clone());
        }
        let answer = match command {
            "guest-ping" => json!({"return": {}}),
            "guest-get-fsinfo" => json!({"return": self.fsinfo(&domain)}),
            "guest-get-disks" => json!({"return": self.disks(&domain)}),
            other => json!({"error": {"class": "CommandNotFound",
                "desc": format!("The command {other} has not been found")}}),
        };
        Ok(answer.to_string())
    }

    fn fsinfo(&self, domain: &Domain) -> Vec<serde_json::Value> {
        let mut list = Vec::new();
        for disk in &domain.disks {
            let Some(at) = self.agent.mounted.get(self.serial(disk)) else {
                continue;
            };
            list.push(json!({
                "name": format!("{}1", disk.target), "mountpoint": at, "type": "ext4",
                "disk": [self.address(disk, &format!("/dev/{}1", disk.target))],
            }));
        }
        list
    }

    fn disks(&self, domain: &Domain) -> Vec<serde_json::Value> {
        let mut list = Vec::new();
        for disk in domain.disks.iter().filter(|d| ["disk", "lun"].contains(&d.device.as_str())) {
            let node = format!("/dev/{}", disk.target);
            list.push(json!({"name": node, "partition": false, "dependencies": [],
                "address": self.address(disk, &node)}));
            let serial = self.serial(disk);
            if self.agent.mounted.contains_key(serial) {
                list.push(json!({"name": format!("{node}1"), "partition": true,
                    "dependencies": [node]}));
            }
            if let Some(name) = self.agent.holders.get(serial) {
                list.push(json!({"name": format!("/dev/dm-{}", list.len()), "partition": false,
                    "dependencies": [node], "alias": name}));
            }
        }
        list
    }

    /// What the guest takes for a disk's serial: of a LUN that is passed through its own identity.
    fn serial<'a>(&'a self, disk: &'a Disk) -> &'a str {
        let own = disk.alias.as_ref().and_then(|alias| self.identities.get(alias));
        let serial = if disk.device == "lun" { own } else { disk.serial.as_ref() };
        serial.map_or("", String::as_str)
    }

    fn address(&self, disk: &Disk, dev: &str) -> serde_json::Value {
        let serial = match (disk.bus.as_str(), disk.device.as_str()) {
            ("scsi", "disk") => format!("0QEMU_QEMU_HARDDISK_{}", self.serial(disk)),
            _ => self.serial(disk).to_owned(),
        };
        json!({"serial": serial, "bus-type": disk.bus, "dev": dev, "bus": 0, "target": 0, "unit": 0,
            "pci-controller": {"domain": 0, "bus": 0, "slot": 0, "function": 0}})
    }

    /// The sources that QEMU has open.
    pub fn open_paths(&self) -> Vec<String> {
        let disks = self.live.as_deref().and_then(|x| read(x).ok()).map(|d| d.disks);
        disks.into_iter().flatten().filter_map(|d| d.source.clone()).collect()
    }

    /// Its disks and I/O threads, one a line, in both definitions.
    pub fn snapshot(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (which, text) in [("live", &self.live), ("config", &self.config)] {
            let domain = text.as_deref().and_then(|x| read(x).ok());
            let threads = domain.iter().flat_map(|d| &d.io_threads.ids);
            lines.extend(threads.map(|id| format!("{which} iothread {id}")));
            let disks = domain.map(|d| d.disks);
            lines.extend(disks.into_iter().flatten().map(|d| {
                format!(
                    "{which} {} {} serial={} source={}",
                    d.target,
                    d.alias.clone().unwrap_or_default(),
                    d.serial.clone().unwrap_or_default(),
                    d.source.clone().unwrap_or_default()
                )
            }));
        }
        lines
    }

    pub(super) fn running(&self) -> Result<&str, LibvirtError> {
        self.live.as_deref().ok_or_else(|| LibvirtError::NotRunning {
            message: "Requested operation is not valid: domain is not running".into(),
        })
    }

    pub(super) fn defined(&self) -> Result<&str, LibvirtError> {
        self.config.as_deref().ok_or_else(|| LibvirtError::NotRunning {
            message: "Requested operation is not valid: transient domains do not have any persistent config".into(),
        })
    }
}

pub(super) fn refused(message: String) -> LibvirtError {
    LibvirtError::Other { code: 27, message }
}

pub(super) fn read(text: &str) -> Result<Domain, LibvirtError> {
    xml::parse(text).map_err(|e| refused(e.to_string()))
}
