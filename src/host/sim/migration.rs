//! A live migration between two pods of the simulated node, as libvirt goes about it.

use std::sync::Arc;

use super::SimHost;
use crate::domain::ALIAS_PREFIX;
use crate::domain::xml::{self, Disk};
use crate::host::grants::Hierarchy;
use crate::vm::discover::HOTPLUG_DIR_IN_POD;

impl SimHost {
    /// Adds a pod with a libvirt that has no domain yet.
    pub fn add_pod(&self, uid: &str) {
        self.pods.add_pod(uid, Hierarchy::V2);
        self.hypervisor.add_libvirt(&Self::endpoint(uid));
    }

    /// A guest moves from one pod to another: a QEMU there opens its disks, under the same paths, before the
    /// one here ends. `Err` is the system's words for why it could not; then the guest stays.
    pub fn migrate(&self, from: &str, to: &str, domain: &str) -> Result<(), String> {
        self.receive(from, to, domain)?;
        self.pods.kill_qemu(from);
        self.hypervisor.stop_domain(&Self::endpoint(from), domain);
        Ok(())
    }

    /// The first half of it: the other QEMU has come up, and the guest is still where it was.
    pub fn receive(&self, from: &str, to: &str, domain: &str) -> Result<(), String> {
        let (here, there) = (Self::endpoint(from), Self::endpoint(to));
        let moving = self.hypervisor.with_domain(&here, domain, |d| d.clone());
        let moving = moving.ok_or_else(|| format!("no domain {domain}"))?;
        self.pods.start_qemu(to, domain);
        let disks = xml::parse(moving.live().unwrap_or_default()).map_err(|e| e.to_string())?.disks;
        // A medium is in a drive of the domain's own.
        let starts =
            |text: &Option<String>, with| text.as_ref().is_some_and(|t| t.starts_with(with));
        let hotplugged = |disk: &&Arc<Disk>| {
            starts(&disk.alias, ALIAS_PREFIX) || starts(&disk.source, HOTPLUG_DIR_IN_POD)
        };
        for disk in disks.iter().filter(hotplugged) {
            let path = disk.source.as_deref().unwrap_or_default();
            if let Err(why) = self.hypervisor.may_open(&there, path, disk.readonly) {
                self.pods.kill_qemu(to);
                return Err(format!("cannot access storage file '{path}': {why}"));
            }
        }
        self.hypervisor.add_domain(&there, moving);
        Ok(())
    }

    /// An incoming guest does not come after all.
    pub fn give_up(&self, to: &str, domain: &str) {
        self.pods.kill_qemu(to);
        self.hypervisor.remove_domain(&Self::endpoint(to), domain);
    }
}
