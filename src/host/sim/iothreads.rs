//! The I/O threads of a simulated domain.

use std::collections::BTreeSet;

use super::domain::{SimDomain, read, refused};
use crate::domain::xml::{Disk, Domain};
use crate::host::libvirt::{Affect, LibvirtError};

impl SimDomain {
    /// Adds an I/O thread (`qemuDomainAddIOThreadCheck`).
    pub fn add_io_thread(&mut self, id: u32, affect: Affect) -> Result<(), LibvirtError> {
        self.change_io_threads(affect, |domain| {
            if !domain.io_threads.ids.insert(id) {
                let why =
                    format!("invalid argument: an IOThread is already using iothread_id '{id}'");
                return Err(refused(why));
            }
            Ok(())
        })
    }

    /// Removes one (`qemuDomainDelIOThreadCheck`).
    pub fn del_io_thread(&mut self, id: u32, affect: Affect) -> Result<(), LibvirtError> {
        self.change_io_threads(affect, |domain| {
            if !domain.io_threads.ids.remove(&id) {
                let why = format!("cannot find IOThread '{id}' in iothreadids list");
                return Err(LibvirtError::DeviceMissing { message: why });
            }
            if domain.io_threads.users.contains_key(&id) {
                let why = format!("cannot remove IOThread {id} since it is being used by disk");
                return Err(LibvirtError::IoThreadUsed { message: why });
            }
            Ok(())
        })
    }

    fn change_io_threads(
        &mut self,
        affect: Affect,
        change: impl Fn(&mut Domain) -> Result<(), LibvirtError>,
    ) -> Result<(), LibvirtError> {
        let changed = |text: &str| {
            let mut domain = read(text)?;
            change(&mut domain)?;
            Ok::<_, LibvirtError>(with_io_threads(text, &domain.io_threads.ids))
        };
        let live = affect.live.then(|| changed(self.running()?)).transpose()?;
        let config = affect.config.then(|| changed(self.defined()?)).transpose()?;
        self.live = live.or_else(|| self.live.take());
        self.config = config.or_else(|| self.config.take());
        Ok(())
    }
}

/// What libvirt refuses of a disk with an I/O thread (`qemuDomainCheckIothreads`).
pub(super) fn refuse_io_thread(disk: &Disk, domain: &Domain) -> Result<(), LibvirtError> {
    let unsupported = |why: String| Err(refused(format!("unsupported configuration: {why}")));
    match disk.io_thread {
        Some(_) if disk.bus != "virtio" => unsupported(format!(
            "IOThreads not available for bus {} target {}",
            disk.bus, disk.target
        )),
        Some(id) if !domain.io_threads.ids.contains(&id) => {
            unsupported(format!("IOThread '{id}' not defined in iothreadid"))
        }
        _ => Ok(()),
    }
}

/// The XML with these I/O threads.
fn with_io_threads(text: &str, ids: &BTreeSet<u32>) -> String {
    let mut text = text.to_owned();
    for element in ["iothreads", "iothreadids"] {
        let end = format!("</{element}>\n");
        if let Some((from, to)) = text.find(&format!("  <{element}>")).zip(text.find(&end)) {
            text.replace_range(from..to + end.len(), "");
        }
    }
    if ids.is_empty() {
        return text;
    }
    let all: String = ids.iter().map(|id| format!("<iothread id='{id}'/>")).collect();
    let new = format!(
        "</name>\n  <iothreads>{}</iothreads>\n  <iothreadids>{all}</iothreadids>\n",
        ids.len()
    );
    text.replacen("</name>\n", &new, 1)
}
