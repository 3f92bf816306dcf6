//! The targets of a volume's LUN, as this node comes to them.

use crate::spec::IscsiSource;
use crate::types::{Lun, Nexus, Portal};

/// One of the targets at which a volume's LUN is to be had, by the volume's iface record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Access {
    /// The target by that iface.
    pub(super) nexus: Nexus,
    /// Its portals, at least one.
    pub(super) portals: Vec<Portal>,
    /// The LUN's number there.
    pub(super) lun: Lun,
}

impl Access {
    /// Every one of a source's, in their order: at least one.
    pub(super) fn of(source: &IscsiSource) -> Vec<Self> {
        let iface = source.iface.record();
        let access = |target: crate::spec::IscsiTarget| Self {
            nexus: Nexus::new(target.target, iface.clone()),
            portals: target.portals,
            lun: target.lun,
        };
        source.targets().into_iter().map(access).collect()
    }

    /// What tells it from the others of the source: target and LUN, whatever the portals.
    pub(super) fn key(&self) -> String {
        format!("{}/{}", self.nexus, self.lun)
    }
}
