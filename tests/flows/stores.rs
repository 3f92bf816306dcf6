//! What becomes of volumes while a store cannot be written, or is damaged.

use std::path::{Path, PathBuf};

use lunplug::journal::Desired;
use lunplug::reason::Reason;
use lunplug::spec::{Phase, RemoveOptions};
use lunplug::vm::facade::Volumes;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::world::{World, node, vm, volume};

const PLAIN: RemoveOptions = RemoveOptions { force: false, dry_run: false };

/// A small filesystem for the state.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: it needs root");
            return None;
        }
        let disk = Self(tempfile::tempdir().unwrap());
        disk.set(MsFlags::empty());
        Some(disk)
    }

    fn set(&self, flags: MsFlags) {
        mount(Some("lunplug"), self.0.path(), Some("tmpfs"), flags, Some("size=256k")).unwrap();
    }

    fn db(&self) -> PathBuf {
        self.0.path().join("lunplug.db")
    }

    fn open(&self, scratch: &Path) -> Desired {
        Desired::open_beside(&self.db(), scratch).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

#[test]
fn root_a_daemon_that_starts_on_a_read_only_state_serves_and_removes_and_adds_nothing() {
    let Some(disk) = Disk::mount() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut world = World::over(node(), disk.open(scratch.path()));
    world.life(async |daemon| {
        for (name, lun) in [("a", 1), ("b", 2)] {
            assert_eq!(daemon.add(1, &volume(name, lun)).await.phase, Phase::Ready);
        }
        daemon.quiet().await;
    });
    let attached = world.picture();
    world.desired = Desired::in_memory().unwrap();
    disk.set(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY);
    world.desired = disk.open(scratch.path());
    world.life(async |daemon| {
        for name in ["a", "b"] {
            daemon.ready(1, name).await;
        }
        daemon.quiet().await;
        assert_eq!(world.picture(), attached);
        assert!(daemon.registry.node().await.state_trouble.is_some());

        let refusal = daemon.want(1, &volume("c", 3)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::StateStoreFailed);
        assert!(refusal.message.contains("cannot be written"), "{}", refusal.message);
        assert!(daemon.get(1, "c").await.is_none());
        let refusal = daemon.registry.unregister_vm(&vm(2)).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::StateStoreFailed);
        assert_eq!(daemon.registry.list_vms().await.len(), 2, "it is served on");
        assert_eq!(world.picture(), attached);

        daemon.drop_volume(1, "a", PLAIN).await.unwrap();
        let told = daemon.until(1, "a", |s| s.reason.is_some()).await;
        assert_eq!(told.phase, Phase::UnmountedFromPod);
        assert_eq!(told.reason, Some(Reason::StateStoreFailed));
        assert!(!world.picture().contains("ua-lunplug-a"), "it is carried through");
    });
    // Killed, and still no room: the removal holds by its mark.
    world.desired = disk.open(scratch.path());
    world.life(async |daemon| {
        let told = daemon.until(1, "a", |s| s.reason.is_some()).await;
        assert_eq!(told.reason, Some(Reason::StateStoreFailed));
        assert!(!world.picture().contains("ua-lunplug-a"), "it does not come back");

        disk.set(MsFlags::MS_REMOUNT);
        daemon.gone(1, "a").await;
        assert_eq!(daemon.registry.node().await.state_trouble, None);
        daemon.add(1, &volume("c", 3)).await;
        for name in ["b", "c"] {
            daemon.remove(1, name).await;
        }
        daemon.quiet().await;
        world.assert_clean("a state that was read-only");
    });
}

/// Overwrites a file of the run directory.
pub(crate) async fn damage(world: &World, name: &str) {
    let doors = lunplug::host::storage::StorageDoors::sim(&world.host.storage);
    assert!(doors.rundir.load(name).await.unwrap().is_some(), "there is no {name}");
    doors.rundir.store(name, b"{\"boot_id\": ").await.unwrap();
}

#[test]
fn a_damaged_file_under_run_is_named_and_is_that_volumes_or_vms_alone() {
    for name in ["effects/default/vm-1/data.json", "removals/default/vm-1/data.json"] {
        let world = World::new();
        world.life(async |daemon| {
            daemon.add(1, &volume("data", 1)).await;
            daemon.add(2, &volume("other", 2)).await;
            if name.starts_with("removals") {
                // Taken on, and not carried through yet: a holder keeps it.
                world.inject("libvirt.detach", 0, lunplug::host::sim::FaultAction::Hang);
                daemon.drop_volume(1, "data", PLAIN).await.unwrap();
                world.host.faults.meeting().await;
            }
            damage(&world, name).await;
        });
        world.host.faults.clear();
        let attached = world.picture();
        world.life(async |daemon| {
            daemon.ready(2, "other").await;
            daemon.quiet().await;
            let told = match daemon.get(1, "data").await {
                Some(status) => (status.reason, status.message),
                None => {
                    let vms = daemon.registry.list_vms().await;
                    (vms[0].reason, vms[0].message.clone())
                }
            };
            assert_eq!(told.0, Some(Reason::RecordCorrupt), "{told:?}");
            assert!(told.1.contains(name), "{told:?}");
            assert_eq!(world.picture(), attached, "nothing is touched");
            daemon.add(2, &volume("more", 3)).await;
            daemon.remove(2, "more").await;
        });
    }
}

#[test]
fn a_damaged_lease_is_its_targets_trouble_alone() {
    let world = World::new();
    let other = "iqn.2026-01.org.lunplug:other".parse().unwrap();
    world.host.add_target(&other, &[crate::world::portal(1), crate::world::portal(2)], 4);
    let mut elsewhere = volume("elsewhere", 1);
    elsewhere.source =
        "iscsi://192.0.2.1,192.0.2.2/iqn.2026-01.org.lunplug:other/1".parse().unwrap();
    let lease = "leases/iscsi/iqn.2026-01.org.lunplug_3asim";
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.add(2, &elsewhere).await;
        damage(&world, lease).await;
    });
    let attached = world.picture();
    world.life(async |daemon| {
        let told = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!((told.phase, told.reason), (Phase::Ready, Some(Reason::RecordCorrupt)));
        assert!(told.message.contains(lease), "{}", told.message);
        daemon.ready(2, "elsewhere").await;
        daemon.quiet().await;
        assert_eq!(world.picture(), attached, "the guest keeps its disk");
        daemon.remove(2, "elsewhere").await;
    });
}

#[test]
fn a_damaged_file_of_a_user_is_its_own_trouble_alone() {
    let world = World::new();
    let file = "leases/iscsi/iqn.2026-01.org.lunplug_3asim:users/1:default_2fvm-1_2fdata";
    world.life(async |daemon| {
        daemon.add(1, &volume("data", 1)).await;
        daemon.add(2, &volume("other", 2)).await;
        damage(&world, file).await;
    });
    let attached = world.picture();
    world.life(async |daemon| {
        let told = daemon.until(1, "data", |s| s.reason.is_some()).await;
        assert_eq!((told.phase, told.reason), (Phase::Ready, Some(Reason::RecordCorrupt)));
        assert!(told.message.contains(file), "{}", told.message);
        daemon.ready(2, "other").await;
        daemon.quiet().await;
        assert_eq!(world.picture(), attached, "the guest keeps its disk");
        daemon.add(2, &volume("more", 3)).await;
        daemon.remove(2, "more").await;
        daemon.remove(2, "other").await;
        let sessions = world.picture().lines().filter(|l| l.starts_with("session ")).count();
        assert_eq!(sessions, 2, "they are the volume's whose file cannot be read");
    });
}
