//! Volumes that are files on the host.

use std::time::Duration;

use lunplug::domain::xml;
use lunplug::host::libvirt::Definition;
use lunplug::host::nodes::NodeOwner;
use lunplug::host::sim::SimFile;
use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, Phase, RemoveOptions, VolumeSpec, VolumeStatus};
use lunplug::types::{CacheMode, DiskType};
use lunplug::vm::facade::{Volumes, Wish};

use crate::world::{
    Daemon, FORCE, World, block, domain, file, image, img, key, medium, uid, vm, volume,
};

const GIB: u64 = 1 << 30;
/// The host's side of the pod's view.
const NAME: &str = "/var/run/kubevirt/hotplug-disks/data";

fn world() -> World {
    let mut world = World::new();
    world.config.reconcile.interval = Duration::from_secs(60);
    world
}

/// The first VM's disk, as libvirt has it: its source, and what is in that.
fn disk(world: &World, name: &str) -> Option<(String, String)> {
    let read = |d: &mut lunplug::host::sim::domain::SimDomain| d.xml(Definition::Live);
    let text = world.host.hypervisor.with_domain(&World::endpoint(1), &domain(1), read).unwrap();
    let live = xml::parse(&text).unwrap();
    let disk = live.disks.into_iter().find(|d| d.serial.as_deref() == Some(name))?;
    Some((disk.source.clone()?, disk.format.clone()?))
}

/// An image's header: version 3, and where its backing file's name is.
fn header(size: u64, backing: u64) -> Vec<u8> {
    let mut bytes = vec![0; 104];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    bytes[8..16].copy_from_slice(&backing.to_be_bytes());
    bytes[24..32].copy_from_slice(&size.to_be_bytes());
    bytes
}

fn snapshot(world: &World) -> String {
    world.host.pods.snapshot()
}

#[test]
fn a_file_comes_and_goes_and_no_device_is_granted_for_it() {
    let world = world();
    world
        .host
        .storage
        .files()
        .put(&img(2), SimFile { head: header(5 * GIB, 0), ..SimFile::raw(7) });
    world.life(async |daemon| {
        let status = daemon.add(1, &file("data", 1)).await;
        assert_eq!(status.phase, Phase::Ready, "{}", status.message);
        assert_eq!(status.device.unwrap().size, GIB);
        assert_eq!(disk(&world, "data"), Some((NAME.into(), "raw".into())));
        assert!(!snapshot(&world).contains("grant"), "{}", snapshot(&world));
        let status = daemon.add(1, &image("more", 2)).await;
        assert_eq!(status.phase, Phase::Ready, "{}", status.message);
        assert_eq!(status.device.unwrap().size, 5 * GIB, "that of the disk in it");
        assert_eq!(disk(&world, "more").unwrap().1, "qcow2");
        assert_eq!(daemon.add_fails(2, &file("same", 1)).await, Reason::SourceInUse);
        daemon.remove(2, "same").await;
        // A LUN after it by the same name gets a node, where there was a file.
        daemon.remove(1, "data").await;
        assert_eq!(daemon.add(1, &volume("data", 1)).await.phase, Phase::Ready);
        daemon.remove(1, "data").await;
        daemon.remove(1, "more").await;
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

#[test]
fn a_lun_a_block_device_and_a_file_in_one_request() {
    let world = world();
    let add = |spec: VolumeSpec| Wish::Add { spec: spec.into(), options: AddOptions::default() };
    let remove = |name: &str| Wish::Remove {
        name: name.parse().unwrap(),
        options: RemoveOptions::default(),
    };
    world.life(async |daemon| {
        let all = [volume("lun", 1), block("block", 1), file("file", 1)];
        let names = ["lun", "block", "file"];
        let answers = daemon.registry.change_volumes(&vm(1), all.map(add).into()).await.unwrap();
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        for name in names {
            daemon.ready(1, name).await;
        }
        let gone = names.map(remove).into();
        let answers = daemon.registry.change_volumes(&vm(1), gone).await.unwrap();
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        for name in names {
            daemon.gone(1, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

/// Wants a volume in vain, as the handler sees it only on its way.
async fn fails(world: &World, daemon: &Daemon, spec: &VolumeSpec) -> (Reason, String) {
    let reason = daemon.add_fails(1, spec).await;
    let message = daemon.get(1, spec.name.as_str()).await.unwrap().message;
    daemon.remove(1, spec.name.as_str()).await;
    daemon.quiet().await;
    world.assert_clean(&message);
    (reason, message)
}

#[test]
fn what_qemu_could_not_use_is_refused_before_the_guest_is_asked() {
    let world = world();
    let files = world.host.storage.files().clone();
    let change = |change: fn(&mut SimFile)| {
        files.put(&img(1), SimFile::raw(GIB));
        files.edit(&img(1), change);
    };
    world.life(async |daemon| {
        change(|f| f.owner = NodeOwner { uid: 0, gid: 0 });
        let (reason, message) = fails(&world, &daemon, &file("data", 1)).await;
        assert_eq!(reason, Reason::FileNotAccessible);
        assert!(message.contains(&img(1)) && message.contains("64055:107"), "{message}");

        change(|f| f.direct = false);
        let (reason, message) = fails(&world, &daemon, &file("data", 1)).await;
        assert_eq!(reason, Reason::FileNotAccessible);
        assert!(message.contains("cache writethrough"), "{message}");
        let cached = VolumeSpec { cache: CacheMode::Writethrough, ..file("data", 1) };
        assert_eq!(daemon.add(1, &cached).await.phase, Phase::Ready);
        daemon.remove(1, "data").await;

        change(|f| f.locked = true);
        assert_eq!(fails(&world, &daemon, &file("data", 1)).await.0, Reason::DeviceHeld);

        change(|f| f.read_only = true);
        assert_eq!(fails(&world, &daemon, &file("data", 1)).await.0, Reason::LunReadOnly);
        let read = VolumeSpec { read_only: true, ..file("data", 1) };
        assert_eq!(daemon.add(1, &read).await.phase, Phase::Ready);
        assert!(snapshot(&world).contains("ro"), "{}", snapshot(&world));
        daemon.remove(1, "data").await;

        change(|f| f.size = 0);
        assert_eq!(fails(&world, &daemon, &file("data", 1)).await.0, Reason::SourceNotFound);
        for (head, says) in [(header(GIB, 0x200), "backing file"), (vec![0; 104], "no qcow2 image")]
        {
            files.put(&img(1), SimFile { head, ..SimFile::raw(GIB) });
            let (reason, message) = fails(&world, &daemon, &image("data", 1)).await;
            assert_eq!(reason, Reason::ImageRefused);
            assert!(message.contains(says), "{message}");
        }
        let source = "file:///srv/guests/none".parse().unwrap();
        let absent = VolumeSpec { source, ..file("data", 1) };
        assert_eq!(fails(&world, &daemon, &absent).await.0, Reason::SourceNotFound);
    });
}

#[test]
fn what_may_not_be_had_is_refused_by_its_field() {
    let mut world = world();
    world.life(async |daemon| {
        let refused = async |spec: &VolumeSpec| {
            let refusal = daemon.want(1, spec).await.unwrap_err();
            (refusal.reason, refusal.field.unwrap_or_default())
        };
        let source = "file:///etc/shadow".parse().unwrap();
        let outside = VolumeSpec { source, ..file("data", 1) };
        let path = "volume.source.file.path";
        assert_eq!(refused(&outside).await, (Reason::SourceNotAllowed, path.into()));
        let lun = VolumeSpec { device: DiskType::Lun, serial: None, ..file("data", 1) };
        assert_eq!(refused(&lun).await, (Reason::InvalidOption, "volume.disk_type".into()));
        let shared = VolumeSpec { shareable: true, ..image("data", 1) };
        assert_eq!(refused(&shared).await, (Reason::InvalidOption, "volume.shareable".into()));
    });
    world.config.local.file_roots.clear();
    world.life(async |daemon| {
        let refusal = daemon.want(1, &file("data", 1)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::SourceNotAllowed, "nothing is allowed unless set");
        assert!(refusal.message.contains("local.file_roots"), "{}", refusal.message);
        daemon.quiet().await;
        world.assert_clean("refused");
    });
}

#[test]
fn a_file_that_was_replaced_under_a_guest_is_told_and_the_guest_keeps_its_own() {
    let world = world();
    world.life(async |daemon| {
        daemon.add(1, &file("data", 1)).await;
        let mounted = snapshot(&world);
        world.host.storage.files().put(&img(1), SimFile::raw(GIB));
        let told = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!(told.reason, Some(Reason::DeviceHeld), "{}", told.message);
        assert_eq!(snapshot(&world), mounted);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("replaced");
    });
}

#[test]
fn a_mount_that_is_lost_comes_back() {
    let world = world();
    world.life(async |daemon| {
        daemon.add(1, &file("data", 1)).await;
        daemon.quiet().await;
        let picture = world.picture();
        world.host.pods.edit(&uid(1), |pod| {
            pod.mounts.clear();
            pod.nodes.clear();
        });
        tokio::time::sleep(Duration::from_secs(300)).await;
        daemon.quiet().await;
        assert_eq!(world.picture(), picture);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("removed");
    });
}

#[test]
fn a_file_that_is_open_in_the_pod_is_waited_for_unless_forced() {
    let world = world();
    let open = |open| {
        world.host.pods.edit(&uid(1), |pod| pod.mounts.values_mut().for_each(|m| m.open = open));
    };
    world.life(async |daemon| {
        daemon.add(1, &file("data", 1)).await;
        open(true);
        daemon.drop_volume(1, "data", RemoveOptions::default()).await.unwrap();
        let held = |s: &VolumeStatus| s.reason == Some(Reason::DeviceHeld);
        let told = daemon.until(1, "data", held).await;
        assert!(told.message.contains("still open in the pod"), "{}", told.message);
        assert_eq!(disk(&world, "data"), None, "the guest has it no more");
        open(false);
        daemon.gone(1, "data").await;

        daemon.add(1, &file("data", 1)).await;
        open(true);
        // Where it cannot be found out who sees it, it is not taken for one that nobody has open.
        world.inject_all("procs.list");
        daemon.drop_volume(1, "data", RemoveOptions::default()).await.unwrap();
        daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert!(snapshot(&world).contains("mount data"), "{}", snapshot(&world));
        world.host.faults.clear();
        daemon.until(1, "data", held).await;
        daemon.drop_volume(1, "data", FORCE).await.unwrap();
        daemon.gone(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("forced");
    });
}

#[test]
fn a_raw_file_grows_while_the_guest_has_it() {
    let world = world();
    world.life(async |daemon| {
        daemon.add(1, &file("data", 1)).await;
        world.host.storage.files().edit(&img(1), |f| f.size = 2 * GIB);
        let grown = daemon.registry.expand_volume(&key(1, "data"), Some(2 * GIB)).await;
        grown.unwrap_or_else(|refusal| panic!("{refusal}"));
        let status = daemon.get(1, "data").await.unwrap();
        assert_eq!(status.device.unwrap().size, 2 * GIB);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("grown");
    });
}

#[test]
fn a_file_is_a_medium() {
    let world = World::with_drives(&["sda"]);
    world.life(async |daemon| {
        let iso = VolumeSpec { source: file("iso", 1).source, ..medium("iso", 1) };
        let status = daemon.add(1, &iso).await;
        assert_eq!(status.phase, Phase::Ready, "{}", status.message);
        let read = |d: &mut lunplug::host::sim::domain::SimDomain| d.xml(Definition::Live);
        let endpoint = World::endpoint(1);
        let text = world.host.hypervisor.with_domain(&endpoint, &domain(1), read).unwrap();
        let source = "<source file='/var/run/kubevirt/hotplug-disks/iso'";
        assert!(text.contains(source) && text.contains("type='file' device='cdrom'"), "{text}");
        daemon.remove(1, "iso").await;
        daemon.quiet().await;
        world.assert_clean("ejected");
    });
}
