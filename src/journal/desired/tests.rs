//! What is kept, in which order, and what goes with what.

use super::*;
use crate::spec::FcSupport;
use crate::spec::{VmPlace, volume_fixture};
use crate::types::DiskType;

fn vm(name: &str) -> VmSpec {
    VmSpec {
        id: VmId::new("prod", name).unwrap(),
        domain: format!("prod_{name}"),
        place: VmPlace::Host { libvirt_socket: None },
        fc: FcSupport::default(),
    }
}

fn key(name: &str, volume: &str) -> VolumeKey {
    VolumeKey { vm: vm(name).id, volume: volume.parse().unwrap() }
}

fn stored(name: &str) -> StoredVolume {
    StoredVolume { spec: volume_fixture(name).into(), accept_new_identity: true, removing: None }
}

#[tokio::test]
async fn what_was_stored_is_there_after_reopening_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/lunplug.db");
    let force = RemoveOptions { force: true, dry_run: false };
    {
        let store = Desired::open(&path).unwrap();
        store.put_vm(&vm("a")).await.unwrap();
        for name in ["z", "y", "x"] {
            store.put_volume(&vm("a").id, &stored(name)).await.unwrap();
        }
        store.delete_volume(&key("a", "y"), false).await.unwrap();
        store.put_volume(&vm("a").id, &stored("z")).await.unwrap();
        let leaving = [(key("a", "x").volume, force)];
        store.put_removals(&vm("a").id, &leaving).await.unwrap();
    }
    let store = Desired::open(&path).unwrap();
    let vms: Vec<_> = store.vms().await.unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(vms, [vm("a")]);
    let leaving = StoredVolume { removing: Some(force), ..stored("x") };
    assert_eq!(store.volumes(&vm("a").id).await.unwrap(), [stored("z"), leaving]);
}

#[tokio::test]
async fn disks_are_told_of_all_volumes_and_which_keep_their_place() {
    let store = Desired::in_memory().unwrap();
    store.put_vm(&vm("a")).await.unwrap();
    let with = |name: &str, change: &dyn Fn(&mut VolumeSpec)| {
        let mut spec = volume_fixture(name);
        change(&mut spec);
        StoredVolume { spec: spec.into(), ..stored(name) }
    };
    let virtio = with("z", &|spec| spec.bus = Bus::Virtio);
    let short = with("y", &|spec| spec.disk = "d1".parse().unwrap());
    let medium = with("x", &|spec| spec.device = DiskType::Cdrom);
    let lun = with("w", &|spec| spec.device = DiskType::Lun);
    for volume in [virtio, short, medium, lun, stored("v")] {
        store.put_volume(&vm("a").id, &volume).await.unwrap();
    }
    let force = RemoveOptions { force: true, dry_run: false };
    store.put_removals(&vm("a").id, &[(key("a", "v").volume, force)]).await.unwrap();
    let disks = store.disks(&vm("a").id).await.unwrap();
    let told = disks.iter().map(|d| (d.volume.as_str(), d.disk.as_str(), d.bus, d.keeps_place));
    let expected = [
        ("z", "z", Bus::Virtio, true),
        ("y", "d1", Bus::Scsi, true),
        ("x", "x", Bus::Scsi, false),
        ("w", "w", Bus::Scsi, true),
        ("v", "v", Bus::Scsi, false),
    ];
    assert_eq!(told.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn an_identity_outlives_its_volume_but_not_its_vm() {
    let store = Desired::in_memory().unwrap();
    let wwid: Wwid = "naa.6001405000000000000000000000000a".parse().unwrap();
    store.put_vm(&vm("a")).await.unwrap();
    store.put_volume(&vm("a").id, &stored("v")).await.unwrap();
    store.put_identity(&key("a", "v"), "src", &wwid).await.unwrap();
    let volumes = store.volumes(&vm("a").id).await.unwrap();
    assert!(!volumes[0].accept_new_identity, "the permission is used up");
    store.delete_volume(&key("a", "v"), false).await.unwrap();
    assert_eq!(store.identity(&key("a", "v"), "src").await.unwrap(), Some(wwid));
    assert_eq!(store.identity(&key("a", "v"), "other").await.unwrap(), None);
    store.delete_vm(&vm("a").id).await.unwrap();
    assert_eq!(store.identity(&key("a", "v"), "src").await.unwrap(), None);
}

/// An expand ends beside the handler, which may have taken on the volume's removal meanwhile.
#[tokio::test]
async fn a_size_is_raised_without_touching_a_removal_or_bringing_a_volume_back() {
    let store = Desired::in_memory().unwrap();
    store.put_vm(&vm("a")).await.unwrap();
    store.put_volume(&vm("a").id, &stored("v")).await.unwrap();
    let force = RemoveOptions { force: true, dry_run: false };
    let removal = (stored("v").spec.name.clone(), force);
    store.put_removals(&vm("a").id, &[removal]).await.unwrap();
    store.raise_size(&key("a", "v"), 1 << 40).await.unwrap();
    let mut raised = StoredVolume { removing: Some(force), ..stored("v") };
    Arc::make_mut(&mut raised.spec).expect_size = Some(1 << 40);
    assert_eq!(store.volumes(&vm("a").id).await.unwrap(), [raised]);
    store.delete_volume(&key("a", "v"), false).await.unwrap();
    store.raise_size(&key("a", "v"), 1 << 41).await.unwrap();
    assert_eq!(store.volumes(&vm("a").id).await.unwrap(), []);
}

#[tokio::test]
async fn many_volumes_are_stored_in_their_order_all_or_none() {
    let store = Desired::in_memory().unwrap();
    store.put_vm(&vm("a")).await.unwrap();
    let names = |volumes: Vec<StoredVolume>| {
        volumes.iter().map(|v| v.spec.name.to_string()).collect::<Vec<_>>()
    };
    store.put_volumes(&vm("a").id, &["c", "a", "b"].map(stored), false).await.unwrap();
    assert_eq!(names(store.volumes(&vm("a").id).await.unwrap()), ["c", "a", "b"]);
    let full = "CREATE TRIGGER full BEFORE INSERT ON volumes WHEN NEW.volume = 'e'
                BEGIN SELECT RAISE(ABORT, 'no room'); END";
    store.write(move |c| c.execute_batch(full)).await.unwrap();
    store.put_volumes(&vm("a").id, &["d", "e"].map(stored), true).await.unwrap_err();
    assert_eq!(names(store.volumes(&vm("a").id).await.unwrap()), ["c", "a", "b"]);
    assert!(!store.fc_marked(&vm("a").id).await.unwrap(), "nor is the VM marked for them");
}

#[tokio::test]
async fn a_mark_comes_with_volumes_and_outlives_a_registration_anew() {
    let store = Desired::in_memory().unwrap();
    for name in ["a", "b"] {
        store.put_vm(&vm(name)).await.unwrap();
    }
    store.put_volumes(&vm("a").id, &[stored("x")], true).await.unwrap();
    store.put_vm(&VmSpec { fc: FcSupport::Unsupported, ..vm("a") }).await.unwrap();
    assert!(store.fc_marked(&vm("a").id).await.unwrap());
    assert!(!store.fc_marked(&vm("b").id).await.unwrap());
    store.delete_volume(&key("a", "x"), true).await.unwrap();
    assert!(!store.fc_marked(&vm("a").id).await.unwrap());
}

#[tokio::test]
async fn a_revision_outlives_a_registration_anew_but_not_its_vm() {
    let store = Desired::in_memory().unwrap();
    let revision = |number| Revision { number, asked: vec![0, 255] };
    store.put_vm(&vm("a")).await.unwrap();
    assert_eq!(store.revision(&vm("a").id).await.unwrap(), None);
    for number in [1, i64::MAX] {
        store.put_revision(&vm("a").id, &revision(number)).await.unwrap();
    }
    store.put_vm(&VmSpec { domain: "other".into(), ..vm("a") }).await.unwrap();
    assert_eq!(store.revision(&vm("a").id).await.unwrap(), Some(revision(i64::MAX)));
    store.delete_vm(&vm("a").id).await.unwrap();
    assert_eq!(store.revision(&vm("a").id).await.unwrap(), None);
    assert!(store.put_revision(&vm("a").id, &revision(1)).await.is_err(), "no such VM");
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lunplug.db");
    let raw = Connection::open(&path).unwrap();
    raw.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(raw);
    let before = std::fs::read(&path).unwrap();
    let error = Desired::open(&path).unwrap_err();
    assert_eq!(error.reason(), Reason::StateStoreNewer);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_damaged_value_is_named_not_reset_and_is_that_vms_alone() {
    let store = Desired::in_memory().unwrap();
    store.put_vm(&vm("b")).await.unwrap();
    store
        .write(|c| c.execute("INSERT INTO vms (vm, spec) VALUES ('prod/a', '{')", []))
        .await
        .unwrap();
    let vms = store.vms().await.unwrap();
    let (name, error) = vms[0].as_ref().unwrap_err();
    assert_eq!((name.as_str(), error.reason()), ("prod/a", Reason::RecordCorrupt));
    assert!(error.to_string().contains("prod/a"), "{error}");
    assert_eq!(vms[1].as_ref().unwrap(), &vm("b"));
}

use crate::reason::Reason;
