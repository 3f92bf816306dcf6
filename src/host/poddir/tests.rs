use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;
use crate::host::libvirt::Socket;

/// A kubelet root with one pod.
fn kubelet() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().expect("a temporary directory");
    let pod = root.path().join("pods/0d1c2b3a-uid");
    std::fs::create_dir_all(pod.join("volumes/runtime")).expect("directories can be made");
    (root, pod)
}

async fn found(root: &tempfile::TempDir) -> PodDir {
    HostPodDirs.pod(root.path(), "0d1c2b3a-uid").await.expect("the pod is there")
}

#[tokio::test]
async fn a_socket_is_found_and_can_be_connected_to() {
    let (root, path) = kubelet();
    let _listener = UnixListener::bind(path.join("volumes/runtime/sock")).expect("bound");
    let pod = found(&root).await;
    let endpoint = HostPodDirs.socket(&pod, Path::new("volumes/runtime/sock")).await;
    let endpoint = endpoint.expect("it is a socket");
    let pinned = HostPodDirs.pin(&endpoint).await.expect("still there");
    let Socket::Opened(fd) = &pinned.socket else { panic!("it goes by descriptor: {pinned:?}") };
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    std::os::unix::net::UnixStream::connect(path).expect("connected through the fd");
}

#[tokio::test]
async fn what_is_planted_as_a_socket_is_refused() {
    let (root, path) = kubelet();
    let _host = UnixListener::bind(root.path().join("host-sock")).expect("bound");
    symlink(root.path().join("host-sock"), path.join("volumes/link")).expect("a symlink");
    symlink(root.path(), path.join("volumes/away")).expect("a symlink");
    symlink("/proc/self/fd", path.join("volumes/magic")).expect("a symlink");
    std::fs::write(path.join("volumes/file"), "").expect("writable");
    let pod = found(&root).await;
    for rel in ["volumes/link", "volumes/away/host-sock", "volumes/magic/0", "volumes/file"] {
        let result = HostPodDirs.socket(&pod, Path::new(rel)).await;
        assert!(matches!(result, Err(PathError::Unsafe { .. })), "{rel}: {result:?}");
    }
    for rel in ["../../host-sock", "/run/libvirt/libvirt-sock", "volumes/../x", "", "."] {
        let result = HostPodDirs.socket(&pod, Path::new(rel)).await;
        assert!(matches!(result, Err(PathError::NotPlain(_))), "{rel}: {result:?}");
    }
    let result = HostPodDirs.socket(&pod, Path::new("volumes/none")).await;
    assert!(matches!(result, Err(PathError::Missing(_))), "{result:?}");
}

#[tokio::test]
async fn a_socket_that_is_exchanged_later_is_noticed() {
    let (root, path) = kubelet();
    let sock = path.join("volumes/runtime/sock");
    let _host = UnixListener::bind(root.path().join("host-sock")).expect("bound");
    let listener = UnixListener::bind(&sock).expect("bound");
    let pod = found(&root).await;
    let endpoint = HostPodDirs.socket(&pod, Path::new("volumes/runtime/sock")).await.expect("ok");
    drop(listener);
    std::fs::remove_file(&sock).expect("the pod may");
    symlink(root.path().join("host-sock"), &sock).expect("the pod may");
    let pinned = HostPodDirs.pin(&endpoint).await;
    assert!(matches!(pinned, Err(PathError::Unsafe { .. })), "{pinned:?}");
}

#[tokio::test]
async fn a_hotplug_directory_is_a_plain_directory_beneath_the_pod() {
    let (root, path) = kubelet();
    std::fs::create_dir(path.join("volumes/disks")).expect("a directory");
    std::fs::write(path.join("volumes/file"), "").expect("writable");
    symlink("disks", path.join("volumes/link")).expect("a symlink");
    let pod = found(&root).await;
    let dir = HostPodDirs.hotplug(&pod, Path::new("volumes/disks")).await.expect("it is one");
    assert!(open_hotplug(&dir).is_ok());
    for rel in ["volumes/file", "volumes/link"] {
        let result = HostPodDirs.hotplug(&pod, Path::new(rel)).await;
        assert!(matches!(result, Err(PathError::Unsafe { .. })), "{rel}: {result:?}");
    }
    let result = HostPodDirs.hotplug(&pod, Path::new("volumes/..")).await;
    assert!(matches!(result, Err(PathError::NotPlain(_))));
}

#[tokio::test]
async fn a_pod_that_is_not_there_or_not_a_name_is_told() {
    let (root, _) = kubelet();
    let gone = HostPodDirs.pod(root.path(), "another-uid").await;
    assert!(matches!(gone, Err(PathError::PodGone(_))), "{gone:?}");
    let no_kubelet = HostPodDirs.pod(&root.path().join("none"), "another-uid").await;
    assert!(matches!(no_kubelet, Err(PathError::PodGone(_))), "{no_kubelet:?}");
    for uid in ["", "..", "a/b", "a b", &"x".repeat(65)] {
        let bad = HostPodDirs.pod(root.path(), uid).await;
        assert!(matches!(bad, Err(PathError::BadUid(_))), "{uid}: {bad:?}");
    }
}

#[tokio::test]
async fn the_hosts_socket_must_be_roots() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let path = root.path().join("libvirt-sock");
    let _listener = UnixListener::bind(&path).expect("bound");
    if nix::unistd::geteuid().is_root() {
        HostPodDirs.host_socket(&path).await.expect("root's");
        nix::unistd::chown(&path, Some(nix::unistd::Uid::from_raw(1)), None).expect("root may");
    }
    let result = HostPodDirs.host_socket(&path).await;
    assert!(matches!(result, Err(PathError::Unsafe { .. })), "{result:?}");
    let relative = HostPodDirs.host_socket(Path::new("run/sock")).await;
    assert!(matches!(relative, Err(PathError::Unsafe { .. })));
}

#[test]
fn a_directory_for_the_hosts_nodes_is_made_once_and_no_symlink_followed() {
    let dev = tempfile::tempdir().expect("a temporary directory");
    let root = dev.path().join("lunplug");
    let rel = || PathBuf::from(host_dir(&"ns/vm".parse().expect("a name")));
    let absent = host_nodes_in(&root, rel(), false);
    assert!(matches!(absent, Err(PathError::PodGone(_))), "{absent:?}");
    let made = host_nodes_in(&root, rel(), true).expect("made");
    assert_eq!(host_nodes_in(&root, rel(), true).expect("there"), made);
    assert_eq!(host_nodes_in(&root, rel(), false).expect("there"), made);
    assert_eq!(made.to_string(), root.join("ns_vm").display().to_string());
    symlink(dev.path(), root.join("ns_other")).expect("a symlink");
    let planted = host_nodes_in(&root, "ns_other".into(), true);
    assert!(matches!(planted, Err(PathError::Unsafe { .. })), "{planted:?}");
}
