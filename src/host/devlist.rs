//! Device lists of cgroup v1, by way of cgroups-rs.
//!
//! The kernel lets a group allow only what its parent allows, so parents come first; and it takes
//! from the children what is denied to their parent.

use std::error::Error as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use cgroups_rs::fs::DeviceResource;
use cgroups_rs::fs::devices::{DevicePermissions, DeviceType, DevicesController};
use nix::libc;
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, fstatfs};

use super::blocking::blocking;
use super::grants::{Access, CgroupRef, DeviceLists, GrantStoreError, Hierarchy, ListChange};
use super::mounts;
use crate::types::{DevNum, Outcome};

type Result<T> = std::result::Result<T, GrantStoreError>;

/// The `devices` hierarchy as this process sees it.
#[derive(Debug, Clone)]
pub(in crate::host) struct CgroupV1Devices {
    mount: Option<PathBuf>,
}

impl CgroupV1Devices {
    /// Where the hierarchy is mounted, if it is.
    pub(in crate::host) fn new() -> Self {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mount = mounts::parse(&table)
            .into_iter()
            .find(|m| m.fs_type == "cgroup" && m.super_options.iter().any(|o| o == "devices"))
            .map(|m| m.mount_point);
        Self { mount }
    }

    /// Checks that the directory is the group that was meant.
    fn verify(&self, cgroup: &CgroupRef) -> Result<&Path> {
        let refused = |why| GrantStoreError::Refused { path: cgroup.path.clone(), why };
        let mount = self.mount.as_deref().ok_or(refused("cgroup v1 is not mounted here"))?;
        if cgroup.path == mount || !cgroup.path.starts_with(mount) {
            return Err(refused("it is not below the root of cgroup v1's devices hierarchy"));
        }
        let dir = File::open(&cgroup.path).map_err(|e| gone_or(e, &cgroup.path))?;
        let kind = fstatfs(&dir).map_err(io::Error::from)?.filesystem_type();
        if kind != CGROUP_SUPER_MAGIC {
            return Err(refused("it is not a cgroup v1 directory"));
        }
        if dir.metadata()?.ino() != cgroup.id {
            return Err(GrantStoreError::Gone(cgroup.path.clone()));
        }
        Ok(mount)
    }

    fn controller(&self, path: &Path) -> DevicesController {
        let root = self.mount.clone().unwrap_or_default();
        DevicesController::new(path.to_owned(), root)
    }

    fn rules(&self, path: &Path) -> Result<Vec<DeviceResource>> {
        self.controller(path).allowed_devices().map_err(|e| cgroups_error(e, path))
    }

    /// From the topmost group below the root down to the group itself.
    fn missing(&self, cgroup: &CgroupRef, dev: DevNum, access: Access) -> Result<Vec<ListChange>> {
        let mount = self.verify(cgroup)?;
        let mut groups: Vec<&Path> =
            cgroup.path.ancestors().take_while(|path| *path != mount).collect();
        groups.reverse();
        let mut changes = Vec::new();
        for path in groups {
            let added = access.without(listed(&self.rules(path)?, dev));
            if added != Access::NONE {
                let id = std::fs::metadata(path).map_err(|e| gone_or(e, path))?.ino();
                let cgroup = CgroupRef { path: path.to_owned(), hierarchy: Hierarchy::V1, id };
                changes.push(ListChange { cgroup, added });
            }
        }
        Ok(changes)
    }

    fn allow(&self, change: &ListChange, dev: DevNum) -> Result<Outcome> {
        self.verify(&change.cgroup)?;
        let path = &change.cgroup.path;
        if listed(&self.rules(path)?, dev).covers(change.added) {
            return Ok(Outcome::Already(()));
        }
        self.controller(path)
            .allow_device(
                DeviceType::Block,
                dev.major.into(),
                dev.minor.into(),
                &permissions(change.added),
            )
            .map_err(|e| cgroups_error(e, path))?;
        Ok(Outcome::Done(()))
    }

    fn deny(&self, change: &ListChange, dev: DevNum, spare_children: bool) -> Result<Outcome> {
        let path = &change.cgroup.path;
        match self.verify(&change.cgroup) {
            Err(GrantStoreError::Gone(_)) => return Ok(Outcome::Already(())),
            other => other?,
        };
        let rules = self.rules(path)?;
        let has = listed(&rules, dev);
        if allows_all(&rules) || change.added.without(has) == change.added {
            return Ok(Outcome::Already(()));
        }
        if spare_children && self.child_lists(path, dev)? {
            return Ok(Outcome::Already(()));
        }
        self.controller(path)
            .deny_device(
                DeviceType::Block,
                dev.major.into(),
                dev.minor.into(),
                &permissions(change.added),
            )
            .map_err(|e| cgroups_error(e, path))?;
        Ok(Outcome::Done(()))
    }

    fn child_lists(&self, path: &Path, dev: DevNum) -> Result<bool> {
        for entry in std::fs::read_dir(path).map_err(|e| gone_or(e, path))? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            match self.rules(&entry.path()) {
                Ok(rules) if listed(&rules, dev) != Access::NONE => return Ok(true),
                Ok(_) | Err(GrantStoreError::Gone(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }
}

#[async_trait]
impl DeviceLists for CgroupV1Devices {
    async fn missing(
        &self,
        cgroup: &CgroupRef,
        dev: DevNum,
        access: Access,
    ) -> Result<Vec<ListChange>> {
        let (this, cgroup) = (self.clone(), cgroup.clone());
        blocking("reading device lists", move || this.missing(&cgroup, dev, access)).await
    }

    async fn allow(&self, change: &ListChange, dev: DevNum) -> Result<Outcome> {
        let (this, change) = (self.clone(), change.clone());
        blocking("allowing a device", move || this.allow(&change, dev)).await
    }

    async fn deny(
        &self,
        change: &ListChange,
        dev: DevNum,
        spare_children: bool,
    ) -> Result<Outcome> {
        let (this, change) = (self.clone(), change.clone());
        blocking("denying a device", move || this.deny(&change, dev, spare_children)).await
    }

    async fn allowed(&self, cgroup: &CgroupRef, dev: DevNum) -> Result<Access> {
        let (this, cgroup) = (self.clone(), cgroup.clone());
        blocking("reading a device list", move || {
            this.verify(&cgroup)?;
            Ok(listed(&this.rules(&cgroup.path)?, dev))
        })
        .await
    }
}

/// `a *:* rwm`: everything is allowed, so that single devices need not (and must not) be.
fn allows_all(rules: &[DeviceResource]) -> bool {
    rules.iter().any(|r| r.devtype == DeviceType::All && r.major == -1 && r.minor == -1)
}

/// What the rules have for `dev`, wildcards (-1) included.
fn listed(rules: &[DeviceResource], dev: DevNum) -> Access {
    let fits = |rule: i64, number: u32| rule == -1 || rule == i64::from(number);
    rules
        .iter()
        .filter(|r| r.devtype != DeviceType::Char)
        .filter(|r| fits(r.major, dev.major) && fits(r.minor, dev.minor))
        .fold(Access::NONE, |access, r| {
            access.with(Access {
                read: r.access.contains(&DevicePermissions::Read),
                write: r.access.contains(&DevicePermissions::Write),
            })
        })
}

fn permissions(access: Access) -> Vec<DevicePermissions> {
    let read = access.read.then_some(DevicePermissions::Read);
    let write = access.write.then_some(DevicePermissions::Write);
    read.into_iter().chain(write).collect()
}

fn gone_or(error: io::Error, path: &Path) -> GrantStoreError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR) => GrantStoreError::Gone(path.to_owned()),
        _ => error.into(),
    }
}

fn cgroups_error(error: cgroups_rs::fs::error::Error, path: &Path) -> GrantStoreError {
    let errno = error
        .source()
        .and_then(|e| e.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error);
    match errno {
        Some(libc::ENOENT | libc::ENODEV) => GrantStoreError::Gone(path.to_owned()),
        Some(errno) => GrantStoreError::Io {
            what: format!("device list of cgroup {}", path.display()),
            source: io::Error::from_raw_os_error(errno),
        },
        None => GrantStoreError::Io {
            what: format!("device list of cgroup {}", path.display()),
            source: io::Error::other(error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests;
