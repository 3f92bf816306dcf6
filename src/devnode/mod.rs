//! The volume's block node in the VM pod's hotplug directory.
//!
//! The node has the volume's name, mode 0600, belongs to QEMU's user and has the directory's SELinux
//! label. One that is there already is compared, every time, and replaced where it differs: the same
//! volume may come back under another major:minor.

use std::io;
use std::sync::Arc;

pub use crate::host::nodes::{NODE_MODE, NodeOwner};
use crate::host::nodes::{NodeError, Nodes, Seen};
use crate::host::poddir::PathError;
pub use crate::host::poddir::{HotplugDir, host_node};
use crate::reason::Reason;
use crate::types::{DevNum, Outcome, VolumeName};

/// A node could not be made, removed or seen.
#[derive(Debug, thiserror::Error)]
#[error("device node of volume {volume}")]
pub struct DevNodeError {
    /// The volume.
    pub volume: VolumeName,
    /// Why.
    #[source]
    pub source: NodeError,
}

impl DevNodeError {
    /// The stable code.
    pub fn reason(&self) -> Reason {
        reason_of(&self.source)
    }
}

/// The reason behind an error of a name in a pod's directory.
pub(crate) fn reason_of(error: &NodeError) -> Reason {
    match error {
        NodeError::Dir(source) => path_reason(source, Reason::HotplugDirUnsafe),
        NodeError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
            Reason::DeadlineExceeded
        }
        NodeError::Refused { .. } | NodeError::Io { .. } => Reason::NodeRefused,
    }
}

/// The reason behind a path's error; `what` is that of a path which is not what it must be.
pub(crate) fn path_reason(error: &PathError, what: Reason) -> Reason {
    match error {
        PathError::NotPlain(_) => Reason::PathNotAllowed,
        PathError::BadUid(_) => Reason::InvalidName,
        PathError::PodGone(_) => Reason::PodGone,
        PathError::Missing(_) | PathError::Unsafe { .. } => what,
        PathError::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut => {
            Reason::DeadlineExceeded
        }
        PathError::Io { .. } => what,
    }
}

type Result<T> = std::result::Result<T, DevNodeError>;

/// The device nodes of this host's VMs.
#[derive(Clone)]
pub struct DevNodes {
    door: Arc<dyn Nodes>,
}

impl DevNodes {
    /// Over the door to nodes.
    pub fn new(door: Arc<dyn Nodes>) -> Self {
        Self { door }
    }

    /// Sees to it that the volume's node is there, right in device, owner, mode and label.
    pub async fn ensure(
        &self,
        dir: &HotplugDir,
        volume: &VolumeName,
        dev: DevNum,
        owner: NodeOwner,
    ) -> Result<Outcome> {
        self.door.ensure(dir, volume, dev, owner).await.map_err(|e| error(volume, e))
    }

    /// The same for a VM on the host's own libvirt. Whose the node is, is libvirt's affair: where QEMU has no
    /// /dev of its own, libvirt gives it to QEMU's user.
    pub async fn ensure_on_host(
        &self,
        dir: &HotplugDir,
        volume: &VolumeName,
        dev: DevNum,
    ) -> Result<Outcome> {
        if self.observe(dir, volume).await? == Some(dev) {
            return Ok(Outcome::Already(()));
        }
        self.ensure(dir, volume, dev, NodeOwner { uid: 0, gid: 0 }).await
    }

    /// Removes the volume's node; with `expect` only one of that device. What is there and is not
    /// such a node is not ours and is left: `Already`. So is a pod whose directory is gone.
    pub async fn remove(
        &self,
        dir: &HotplugDir,
        volume: &VolumeName,
        expect: Option<DevNum>,
    ) -> Result<Outcome> {
        match self.door.remove(dir, volume, expect).await {
            Err(NodeError::Dir(PathError::PodGone(_) | PathError::Missing(_))) => {
                Ok(Outcome::Already(()))
            }
            other => other.map_err(|e| error(volume, e)),
        }
    }

    /// The device of the volume's node; `None` when there is none, or something else.
    pub async fn observe(&self, dir: &HotplugDir, volume: &VolumeName) -> Result<Option<DevNum>> {
        let seen = self.door.observe(dir, volume).await.map_err(|e| error(volume, e))?;
        Ok(InPlace(seen).dev())
    }

    /// What is in the places of volumes' nodes, in their order.
    pub async fn observe_each(
        &self,
        dir: &HotplugDir,
        volumes: &[VolumeName],
    ) -> Vec<Result<InPlace>> {
        let seen = self.door.observe_each(dir, volumes).await;
        let of = |(volume, seen): (&VolumeName, std::result::Result<_, NodeError>)| {
            seen.map(InPlace).map_err(|e| error(volume, e))
        };
        volumes.iter().zip(seen).map(of).collect()
    }
}

/// What is in the place of a volume's node.
#[derive(Debug, Clone, Copy)]
pub struct InPlace(Option<Seen>);

impl InPlace {
    /// Whether it is the node as [`DevNodes::ensure`] leaves it, its label apart.
    pub fn is_right(self, dev: DevNum, owner: NodeOwner) -> bool {
        self.0 == Some(Seen::Node { dev, owner, mode: NODE_MODE })
    }

    /// The node's device; `None` when there is none, or something else.
    pub fn dev(self) -> Option<DevNum> {
        match self.0 {
            Some(Seen::Node { dev, .. }) => Some(dev),
            Some(Seen::Directory | Seen::Other) | None => None,
        }
    }
}

fn error(volume: &VolumeName, source: NodeError) -> DevNodeError {
    DevNodeError { volume: volume.clone(), source }
}
