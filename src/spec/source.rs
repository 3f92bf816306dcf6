//! Where a volume's data lives: one kind a transport.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::{FileFormat, HostPath, Iface, Iqn, Lun, Portal, SecretName, Wwpn};

/// A target at which a LUN is to be had.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IscsiTarget<P = Portal> {
    /// The target's name.
    pub target: Iqn,
    /// Its portals, at least one, without repetition.
    pub portals: Vec<P>,
    /// The LUN's number there.
    pub lun: Lun,
}

impl<P> IscsiTarget<P> {
    /// What tells it from the others of any source: target and LUN, whatever the portals.
    pub fn key(&self) -> String {
        format!("{}/{}", self.target, self.lun)
    }
}

/// An iSCSI LUN.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IscsiSource {
    /// The target's name.
    pub target: Iqn,
    /// Its portals, at least one, without repetition.
    pub portals: Vec<Portal>,
    /// The LUN behind it.
    pub lun: Lun,
    /// Where the session's CHAP credentials are, where it needs some. Never the credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chap: Option<ChapFrom>,
    /// Further targets at which the same LUN is to be had, perhaps by another number; none twice. That it
    /// is the same is proven on every path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_targets: Vec<IscsiTarget>,
    /// By what the node comes to all of them.
    #[serde(default, skip_serializing_if = "Iface::is_default")]
    pub iface: Iface,
}

impl IscsiSource {
    /// Every target at which it is to be had, in their order: at least one.
    pub fn targets(&self) -> Vec<IscsiTarget> {
        let first = IscsiTarget {
            target: self.target.clone(),
            portals: self.portals.clone(),
            lun: self.lun,
        };
        std::iter::once(first).chain(self.more_targets.iter().cloned()).collect()
    }

    /// Each LUN with its target, the number first: it is what two of one target differ in.
    fn luns(&self) -> impl Iterator<Item = (Lun, &Iqn)> {
        let more = self.more_targets.iter().map(|more| (more.lun, &more.target));
        std::iter::once((self.lun, &self.target)).chain(more)
    }
}

/// Where CHAP credentials are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChapFrom {
    /// In this secret of the configured directory.
    Secret(SecretName),
    /// They came with the request, and are kept for this boot.
    Request,
}

/// A target port at which a LUN is to be had by Fibre Channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FcTarget {
    /// The port's name.
    pub wwpn: Wwpn,
    /// The LUN's number there.
    pub lun: Lun,
}

impl fmt::Display for FcTarget {
    /// What tells it from the others of any source.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.wwpn, self.lun)
    }
}

/// A LUN that is had by Fibre Channel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FcSource {
    /// The target ports at which it is to be had, perhaps by different numbers: at least one, none twice.
    /// That it is the same LUN is proven on every path.
    pub targets: Vec<FcTarget>,
    /// Which HBAs are to come to which of the target ports, by name; each that sees one, when empty. HBAs of
    /// other nodes may be among them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub initiator_targets: BTreeMap<Wwpn, BTreeSet<Wwpn>>,
    /// Where no HBA sees any of the ports, all that the HBAs see may be scanned for the LUN's number.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wildcard_scan: bool,
    /// Where no HBA sees any of the ports, the links may be initialized anew (LIP), which disturbs all
    /// that goes over them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lip: bool,
}

/// A block device that is on the host already.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockSource {
    /// What leads to it.
    pub path: HostPath,
}

/// A file that is on the host already: a disk image, or the `disk.img` of a PersistentVolume that is a file system.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileSource {
    /// Its path.
    pub path: HostPath,
    /// What is in it.
    #[serde(default, skip_serializing_if = "FileFormat::is_raw")]
    pub format: FileFormat,
}

/// Where a volume's data lives. NVMe is a further variant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// An iSCSI LUN.
    Iscsi(IscsiSource),
    /// A LUN that is had by Fibre Channel.
    Fc(FcSource),
    /// A block device that is on the host already.
    Block(BlockSource),
    /// A file that is on the host already.
    File(FileSource),
}

impl Source {
    /// What makes two sources the same volume: for iSCSI the targets, each with its LUN, and the initiator's
    /// name where that is not the node's, whatever their order and portals; for Fibre Channel the target
    /// ports, each with its LUN; for what is on the host its path.
    pub fn key(&self) -> String {
        format!("{}://{}", self.scheme(), self.keys().join("+"))
    }

    /// What it has in common with another source, so that both are of one LUN: a target with its LUN.
    pub fn shared_with(&self, other: &Self) -> Option<String> {
        if !self.meets(other) {
            return None; // That it is the same LUN shows once it is attached.
        }
        let theirs = other.keys();
        let shared = self.keys().into_iter().find(|key| theirs.contains(key));
        shared.map(|key| format!("{}://{key}", self.scheme()))
    }

    /// The iSCSI source, where it is one.
    pub fn as_iscsi(&self) -> Option<&IscsiSource> {
        match self {
            Self::Iscsi(source) => Some(source),
            Self::Fc(_) | Self::Block(_) | Self::File(_) => None,
        }
    }

    /// The same, to be changed.
    pub fn as_iscsi_mut(&mut self) -> Option<&mut IscsiSource> {
        match self {
            Self::Iscsi(source) => Some(source),
            Self::Fc(_) | Self::Block(_) | Self::File(_) => None,
        }
    }

    /// The path on the host, where it is one.
    pub fn host_path(&self) -> Option<&HostPath> {
        match self {
            Self::Block(source) => Some(&source.path),
            Self::File(source) => Some(&source.path),
            Self::Iscsi(_) | Self::Fc(_) => None,
        }
    }

    /// The file on the host, where it is one.
    pub fn as_file(&self) -> Option<&FileSource> {
        match self {
            Self::File(source) => Some(source),
            Self::Iscsi(_) | Self::Fc(_) | Self::Block(_) => None,
        }
    }

    /// Whether it is had by Fibre Channel.
    pub fn is_fc(&self) -> bool {
        matches!(self, Self::Fc(_))
    }

    /// What its key begins with.
    pub fn scheme(&self) -> &'static str {
        match self {
            Self::Iscsi(_) => "iscsi",
            Self::Fc(_) => "fc",
            Self::Block(_) => "block",
            Self::File(_) => "file",
        }
    }

    /// Whether they have a key in common.
    fn meets(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Iscsi(one), Self::Iscsi(other)) => {
                one.iface.initiator == other.iface.initiator
                    && one.luns().any(|lun| other.luns().any(|its| its == lun))
            }
            (Self::Fc(one), Self::Fc(other)) => {
                one.targets.iter().any(|target| other.targets.contains(target))
            }
            (Self::Block(one), Self::Block(other)) => one.path == other.path,
            (Self::File(one), Self::File(other)) => one.path == other.path,
            _ => false,
        }
    }

    /// Each way to it, in a fixed order.
    fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = match self {
            Self::Iscsi(source) => {
                // A target may show each initiator other LUNs by the same numbers.
                let initiator = source.iface.initiator.as_ref();
                let whose = initiator.map_or(String::new(), |i| format!("?initiator={i}"));
                let key = |target: &IscsiTarget| format!("{}{whose}", target.key());
                source.targets().iter().map(key).collect()
            }
            Self::Fc(source) => source.targets.iter().map(ToString::to_string).collect(),
            Self::Block(source) => vec![source.path.to_string()],
            Self::File(source) => vec![source.path.to_string()],
        };
        keys.sort();
        keys
    }
}
