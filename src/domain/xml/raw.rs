//! A domain's XML as serde reads it, and its checks.

use serde::Deserialize;

use crate::types::IoLimits;

use super::{Disk, DriveAddress, PciAddress, Written, XmlError};

#[derive(Deserialize)]
pub(super) struct RawDomain {
    pub(super) name: String,
    /// How many I/O threads.
    pub(super) iothreads: Option<String>,
    pub(super) iothreadids: Option<RawIoThreads>,
    pub(super) os: RawOs,
    pub(super) devices: RawDevices,
    #[serde(default)]
    pub(super) seclabel: Vec<RawSeclabel>,
}

#[derive(Deserialize)]
pub(super) struct RawIoThreads {
    #[serde(default)]
    pub(super) iothread: Vec<RawIoThread>,
}

#[derive(Deserialize)]
pub(super) struct RawIoThread {
    #[serde(rename = "@id")]
    pub(super) id: String,
}

#[derive(Deserialize)]
pub(super) struct RawOs {
    #[serde(rename = "type")]
    pub(super) kind: RawOsType,
}

#[derive(Deserialize)]
pub(super) struct RawOsType {
    #[serde(rename = "@machine")]
    pub(super) machine: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RawSeclabel {
    #[serde(rename = "@model")]
    pub(super) model: Option<String>,
    #[serde(rename = "@relabel")]
    pub(super) relabel: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RawDevices {
    #[serde(default)]
    pub(super) disk: Vec<RawDisk>,
    #[serde(default)]
    pub(super) controller: Vec<RawController>,
    #[serde(default)]
    pub(super) channel: Vec<RawChannel>,
}

#[derive(Deserialize)]
pub(super) struct RawDisk {
    #[serde(rename = "@device")]
    pub(super) device: Option<String>,
    pub(super) driver: Option<RawDriver>,
    pub(super) alias: Option<RawAlias>,
    pub(super) target: Option<RawTarget>,
    pub(super) serial: Option<String>,
    pub(super) source: Option<RawSource>,
    pub(super) address: Option<RawAddress>,
    pub(super) readonly: Option<Empty>,
    pub(super) shareable: Option<Empty>,
    pub(super) blockio: Option<RawBlockIo>,
    /// What else is in it is not ours.
    pub(super) iotune: Option<IoLimits>,
}

#[derive(Deserialize)]
pub(super) struct Empty {}

#[derive(Deserialize, Default)]
pub(super) struct RawDriver {
    #[serde(rename = "@type")]
    pub(super) format: Option<String>,
    #[serde(rename = "@io")]
    pub(super) io: Option<String>,
    #[serde(rename = "@discard")]
    pub(super) discard: Option<String>,
    #[serde(rename = "@detect_zeroes")]
    pub(super) detect_zeroes: Option<String>,
    #[serde(rename = "@error_policy")]
    pub(super) error_policy: Option<String>,
    #[serde(rename = "@iothread")]
    pub(super) iothread: Option<String>,
}

#[derive(Deserialize, Default)]
pub(super) struct RawBlockIo {
    #[serde(rename = "@logical_block_size")]
    pub(super) logical: Option<String>,
    #[serde(rename = "@physical_block_size")]
    pub(super) physical: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RawAlias {
    #[serde(rename = "@name")]
    pub(super) name: String,
}

#[derive(Deserialize)]
pub(super) struct RawTarget {
    #[serde(rename = "@dev")]
    pub(super) dev: Option<String>,
    #[serde(rename = "@bus")]
    pub(super) bus: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RawSource {
    #[serde(rename = "@dev")]
    pub(super) dev: Option<String>,
    #[serde(rename = "@file")]
    pub(super) file: Option<String>,
    #[serde(rename = "@dir")]
    pub(super) dir: Option<String>,
    #[serde(rename = "@protocol")]
    pub(super) protocol: Option<String>,
    #[serde(rename = "@name")]
    pub(super) name: Option<String>,
    #[serde(rename = "@pool")]
    pub(super) pool: Option<String>,
    #[serde(rename = "@volume")]
    pub(super) volume: Option<String>,
    /// Of the kinds that have no path (`nvme`, `vhostuser`, `vhostvdpa`).
    #[serde(rename = "@type")]
    pub(super) kind: Option<String>,
    pub(super) reservations: Option<Empty>,
}

impl RawSource {
    /// What it leads to, in words; `None` where it leads nowhere, as that of an empty drive with a
    /// startup policy.
    fn medium(&self) -> Option<String> {
        let path = self.dev.as_ref().or(self.file.as_ref()).or(self.dir.as_ref());
        if let Some(path) = path {
            return Some(path.clone());
        }
        let parts = [&self.protocol, &self.kind, &self.pool, &self.name, &self.volume];
        let parts: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
        (!parts.is_empty()).then(|| parts.join(" "))
    }
}

#[derive(Deserialize)]
pub(super) struct RawController {
    #[serde(rename = "@type")]
    pub(super) kind: String,
    #[serde(rename = "@index")]
    pub(super) index: Option<String>,
    #[serde(rename = "@model")]
    pub(super) model: Option<String>,
    #[serde(rename = "target", default)]
    pub(super) targets: Vec<RawControllerTarget>,
}

#[derive(Deserialize)]
pub(super) struct RawControllerTarget {
    #[serde(rename = "@hotplug")]
    pub(super) hotplug: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RawChannel {
    #[serde(default)]
    pub(super) target: Vec<RawChannelTarget>,
}

#[derive(Deserialize, Clone)]
pub(super) struct RawChannelTarget {
    #[serde(rename = "@name")]
    pub(super) name: Option<String>,
    #[serde(rename = "@state")]
    pub(super) state: Option<String>,
}

#[derive(Deserialize, Default)]
pub(super) struct RawAddress {
    #[serde(rename = "@type")]
    pub(super) kind: Option<String>,
    #[serde(rename = "@controller")]
    pub(super) controller: Option<String>,
    #[serde(rename = "@domain")]
    pub(super) domain: Option<String>,
    #[serde(rename = "@bus")]
    pub(super) bus: Option<String>,
    #[serde(rename = "@target")]
    pub(super) target: Option<String>,
    #[serde(rename = "@unit")]
    pub(super) unit: Option<String>,
    #[serde(rename = "@slot")]
    pub(super) slot: Option<String>,
    #[serde(rename = "@function")]
    pub(super) function: Option<String>,
}

/// libvirt writes numbers of addresses in decimal or as `0x..`, and leaves zeros out at times.
pub(super) fn number(text: Option<&str>) -> Option<u32> {
    match text {
        None => Some(0),
        Some(t) => match t.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => t.parse().ok(),
        },
    }
}

impl RawAddress {
    fn bad(&self, of: &str) -> XmlError {
        XmlError::Unsupported {
            element: format!("<address type='{}'> of {of}", self.kind.as_deref().unwrap_or("")),
            why: "its numbers cannot be read",
        }
    }

    pub(super) fn drive(&self, of: &str) -> Result<DriveAddress, XmlError> {
        let read = || {
            Some(DriveAddress {
                controller: number(self.controller.as_deref())?,
                bus: number(self.bus.as_deref())?,
                target: number(self.target.as_deref())?,
                unit: number(self.unit.as_deref())?,
            })
        };
        read().ok_or_else(|| self.bad(of))
    }

    pub(super) fn pci(&self, of: &str) -> Result<PciAddress, XmlError> {
        let read = || {
            Some(PciAddress {
                domain: number(self.domain.as_deref())?,
                bus: number(self.bus.as_deref())?,
                slot: number(self.slot.as_deref())?,
                function: number(self.function.as_deref())?,
            })
        };
        read().ok_or_else(|| self.bad(of))
    }
}

impl RawDisk {
    pub(super) fn check(self) -> Result<Disk, XmlError> {
        let alias = self.alias.map(|a| a.name);
        let unsupported = |why| XmlError::Unsupported {
            element: format!("<disk> {}", alias.as_deref().unwrap_or("without alias")),
            why,
        };
        let target = self.target.ok_or_else(|| unsupported("a disk without a target"))?;
        let dev = target.dev.ok_or_else(|| unsupported("a disk whose target has no name"))?;
        let bus = target.bus.ok_or_else(|| unsupported("a disk whose target has no bus"))?;
        let drive = match &self.address {
            Some(a) if a.kind.as_deref() == Some("drive") => Some(a.drive(&dev)?),
            _ => None,
        };
        let pci = match &self.address {
            Some(a) if a.kind.as_deref() == Some("pci") => Some(a.pci(&dev)?),
            _ => None,
        };
        let driver = self.driver.unwrap_or_default();
        let blockio = self.blockio.unwrap_or_default();
        Ok(Disk {
            alias,
            target: dev,
            bus,
            device: self.device.unwrap_or_else(|| "disk".into()),
            serial: self.serial.filter(|s| !s.is_empty()),
            medium: self.source.as_ref().and_then(RawSource::medium),
            reservations: self.source.as_ref().is_some_and(|s| s.reservations.is_some()),
            source: self.source.and_then(|s| s.dev.or(s.file)),
            format: driver.format,
            readonly: self.readonly.is_some(),
            shareable: self.shareable.is_some(),
            // That it is a number was seen where its users are counted.
            io_thread: driver.iothread.and_then(|id| id.parse().ok()),
            error_policy: driver.error_policy,
            tuning: Written {
                io: driver.io,
                discard: driver.discard,
                detect_zeroes: driver.detect_zeroes,
                logical_block: blockio.logical,
                physical_block: blockio.physical,
            },
            limits: self.iotune.unwrap_or_default(),
            drive,
            pci,
        })
    }
}

impl RawController {
    pub(super) fn index(&self) -> Result<u32, XmlError> {
        number(self.index.as_deref()).ok_or_else(|| XmlError::Unsupported {
            element: format!("<controller type='{}'>", self.kind),
            why: "its index is not a number",
        })
    }
}
