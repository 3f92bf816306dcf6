//! A domain with many disks, as text and as wanted.

use std::fmt::Write;

use lunplug::domain::DesiredDisk;
use lunplug::types::{Bus, CacheMode, DiskType, IoLimits, Tuning};

/// A running domain with `disks` disks of lunplug's, as libvirt writes them.
pub fn domain(disks: u32) -> String {
    let mut xml = String::from(
        "<domain type='kvm' id='1'><name>default_vm</name><os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><controller type='scsi' index='0' model='virtio-scsi'><alias name='scsi0'/>\
         <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></controller>\
         <controller type='pci' index='0' model='pcie-root'><alias name='pcie.0'/></controller>\
         <controller type='pci' index='1' model='pcie-root-port'><alias name='pci.1'/>\
         <address type='pci' domain='0x0000' bus='0x00' slot='0x01' function='0x0'/></controller>",
    );
    for n in 0..disks {
        write!(
            xml,
            "<disk type='block' device='disk'>\
               <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>\
               <source dev='/var/run/kubevirt/hotplug-disks/v{n}' index='{n}'>\
                 <seclabel model='dac' relabel='no'/></source>\
               <backingStore/><target dev='disk{n}' bus='scsi'/><serial>v{n}</serial>\
               <alias name='ua-lunplug-v{n}'/>\
               <address type='drive' controller='0' bus='0' target='{}' unit='{}'/>\
             </disk>",
            n % 256,
            n / 256
        )
        .unwrap();
    }
    xml.push_str("</devices></domain>");
    xml
}

/// A disk of that name as it is wanted.
pub fn disk(name: &str) -> DesiredDisk {
    DesiredDisk {
        volume: name.parse().unwrap(),
        source: format!("/var/run/kubevirt/hotplug-disks/{name}"),
        file: None,
        serial: name.parse().ok(),
        device: DiskType::Disk,
        reservations: None,
        bus: Bus::Scsi,
        cache: CacheMode::None,
        read_only: false,
        shareable: false,
        error_policy: None,
        io_thread: None,
        tuning: Tuning::default(),
        limits: IoLimits::default(),
        keep_owner: true,
    }
}
