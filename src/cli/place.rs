//! Where a VM runs, as flags.

use crate::api::v1;

#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("place").required(true).args(["pod_uid", "host"]))]
pub(super) struct Place {
    /// The UID of the VM's pod, as in its metadata.uid.
    #[arg(long, value_name = "UID")]
    pod_uid: Option<String>,
    /// The VM runs under this host's own libvirt, without a pod.
    #[arg(long)]
    host: bool,
    /// The container's cgroup directory, absolute [default: found by way of QEMU].
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    cgroup: Option<String>,
    /// The hotplug directory, relative to the pod's kubelet directory [default:
    /// volumes/kubernetes.io~empty-dir/hotplug-disks].
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    hotplug_dir: Option<String>,
    /// The same directory as QEMU sees it [default: /var/run/kubevirt/hotplug-disks].
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    hotplug_dir_in_pod: Option<String>,
    /// libvirt's socket: with --pod-uid relative to the pod's kubelet directory, with --host
    /// absolute.
    #[arg(long, value_name = "PATH")]
    libvirt_socket: Option<String>,
}

/// A place of one of its two kinds.
pub(super) enum Written {
    /// In a pod.
    Pod(v1::PodPlace),
    /// On the host itself.
    Host(v1::HostPlace),
}

impl Place {
    pub(super) fn to_wire(&self) -> Written {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let libvirt_socket = text(&self.libvirt_socket);
        match &self.pod_uid {
            Some(uid) => Written::Pod(v1::PodPlace {
                uid: uid.clone(),
                cgroup: text(&self.cgroup),
                hotplug_dir: text(&self.hotplug_dir),
                hotplug_dir_in_pod: text(&self.hotplug_dir_in_pod),
                libvirt_socket,
            }),
            None => Written::Host(v1::HostPlace { libvirt_socket }),
        }
    }
}
