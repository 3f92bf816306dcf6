//! A file's part of the ways: it is mounted into the pod, where a device gets a node and a grant.
//!
//! ```text
//! attach: may QEMU open it? ─ placeholder ─ mount          detach: unmount, unless it is open ─ no placeholder
//! ```
//! The kernel has no way to take an open file away from a process. So a removal waits while the file is open in the pod;
//! with force the pod keeps what it has open, and that is said.

use super::attach::Way;
use super::discover::{self, DiscoverError, Place, PodPlace, Wanted};
use super::failure::Failure;
use super::ways::Ways;
use crate::connector::{Attachment, GaveUp};
use crate::devnode::HotplugDir;
use crate::host::local::HostFile;
use crate::host::podfiles::{InPod, OpenAs};
use crate::journal::NodeEffect;
use crate::reason::Reason;
use crate::spec::{VmPlace, VolumeSpec};
use crate::step::Step;
use crate::types::{CacheMode, VolumeName};

impl Way<'_> {
    /// What was attached is where QEMU can open it.
    pub(super) async fn show(
        &mut self,
        place: &Place,
        attachment: &Attachment,
    ) -> Result<(), Failure> {
        match (&place.pod, &attachment.file) {
            (Some(pod), Some(file)) => self.mount(pod, file).await,
            (Some(pod), None) => {
                self.node(pod, attachment.device.dev).await?;
                self.grant(pod, attachment.device.dev).await
            }
            (None, None) => self.host_node(attachment.device.dev).await,
            (None, Some(_)) => Err(Failure::new(Reason::Unsupported, ONLY_IN_PODS)),
        }
    }

    async fn mount(&mut self, pod: &PodPlace, file: &HostFile) -> Result<(), Failure> {
        self.effects.node = Some(NodeEffect { dev: None });
        self.announce(Step::Node).await?;
        let (ways, spec) = (self.ways, self.spec);
        let files = &ways.host.pods.files;
        let how = OpenAs {
            user: pod.owner,
            write: !spec.read_only,
            // A drive has the cache mode that it was defined with.
            direct: spec.cache == CacheMode::None && !spec.device.is_cdrom(),
        };
        let mount = async {
            files.may_open(file, how).await?;
            files.ensure(&in_pod(pod), &spec.disk, file, spec.read_only).await
        };
        ways.host.tracker.run(Step::Node, mount).await?;
        Ok(())
    }
}

/// Why a VM on a plain host gets no file of us.
pub(super) const ONLY_IN_PODS: &str = "file sources are for VMs in pods: a libvirt of the host's own opens files by itself (virsh attach-disk --type file)";

fn in_pod(pod: &PodPlace) -> InPod {
    InPod { hotplug: pod.hotplug.clone(), dir_in_pod: pod.dir_in_pod.clone(), process: pod.by }
}

/// What of a file in its pod is not as it was made.
pub(super) async fn wrong(
    ways: &Ways,
    pod: &PodPlace,
    spec: &VolumeSpec,
    file: &HostFile,
) -> Option<String> {
    match ways.host.pods.files.is_seen(&in_pod(pod), &spec.disk, file.inode).await {
        Ok(true) => None,
        Ok(false) => Some("its file is not mounted in the pod".into()),
        Err(error) => Some(Failure::from(error).message),
    }
}

/// Takes a volume's file from a pod. With `force` also one that is open there.
pub(super) async fn unmount(
    ways: &Ways,
    place: &VmPlace,
    dir: &HotplugDir,
    disk: &VolumeName,
    force: Option<&GaveUp>,
) -> Result<(), Failure> {
    let seen = match seen_by(ways, place).await {
        Err(failure) if force.is_none() => return Err(failure),
        Err(failure) => {
            tracing::warn!(
                why = failure.message,
                "nobody can say whether a file is open in the pod"
            );
            None
        }
        Ok(seen) => seen,
    };
    let files = &ways.host.pods.files;
    let taken = files.remove(dir, seen.as_ref(), disk, force.is_some()).await?;
    if let (true, Some(gave_up)) = (taken.was_open, force) {
        gave_up.note(format!(
            "the file of {disk} is open in the pod, which keeps it until it closes it"
        ));
    }
    Ok(())
}

/// The pod as a process sees it that has the mount: QEMU, or libvirt's daemon where QEMU has ended or is yet to come.
/// `None` where there is neither, or none that sees our directory: then nobody has it open whom a guest's data are
/// given to. An error says that it could not be found out.
async fn seen_by(ways: &Ways, place: &VmPlace) -> Result<Option<InPod>, Failure> {
    let (pods, settings) = (&ways.host.pods, &ways.settings().discover);
    for wanted in [Wanted::Qemu(ways.vm.domain.clone()), Wanted::Libvirt] {
        match discover::discover(pods, settings, place, &wanted).await {
            Ok(found) => return Ok(found.pod.as_ref().map(in_pod)),
            Err(error @ DiscoverError::Procs { .. }) => return Err(error.into()),
            Err(_) => {}
        }
    }
    Ok(None)
}
