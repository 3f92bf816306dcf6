//! Requests about many volumes.

use super::*;

fn entry(change: impl FnOnce(&mut v1::VolumeSpec)) -> v1::VolumeEntry {
    v1::VolumeEntry { spec: addition("a", change).volume, ..v1::VolumeEntry::default() }
}

/// A volume with a source of its own.
fn numbered(name: &str, lun: u32) -> v1::VolumeEntry {
    entry(|v| {
        v.name = name.into();
        v.source = iscsi(|s| s.lun = lun);
    })
}

/// Reason and field of each refusal; of what was taken on, whether it changed.
fn told(results: &[v1::VolumeResult]) -> Vec<(String, String)> {
    let one = |result: &v1::VolumeResult| match &result.error {
        None => {
            let named = result.volume.as_ref().unwrap().spec.as_ref().unwrap();
            assert_eq!(named.name, result.name);
            ("ok".into(), result.changed.to_string())
        }
        Some(error) => {
            let reason = Reason::from_code(&error.reason).unwrap();
            assert_eq!(error.remedy, reason.remedy());
            assert_eq!(error.transient, reason.is_transient());
            assert_eq!(error.retry_after.is_some(), reason.is_transient());
            assert!(!error.message.is_empty() && !result.changed && result.volume.is_none());
            (error.reason.clone(), error.field.clone())
        }
    };
    results.iter().map(one).collect()
}

fn expect(want: &[(&str, &str)]) -> Vec<(String, String)> {
    want.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[tokio::test]
async fn each_of_many_volumes_has_its_own_result() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    let mut chap = numbered("c", 3);
    chap.chap = Some(v1::ChapCredentials::default());
    let volumes = vec![
        numbered("b", 1),
        entry(|v| v.serial = "a b".into()),
        chap,
        v1::VolumeEntry::default(),
    ];
    let request = v1::AddVolumesRequest { vm: vm("a"), volumes, dry_run: false };
    let results = client.add_volumes(request).await.unwrap().into_inner().results;
    let names: Vec<&str> = results.iter().map(|result| result.name.as_str()).collect();
    assert_eq!(names, ["b", "data", "c", ""]);
    let want = [
        ("ok", "true"),
        ("INVALID_SERIAL", "volumes[1].spec.serial"),
        ("INVALID_OPTION", "volumes[2].chap.username"),
        ("INVALID_NAME", "volumes[3].spec"),
    ];
    assert_eq!(told(&results), expect(&want));
    let message = &results[1].error.as_ref().unwrap().message;
    assert!(
        message.starts_with("volumes[1].spec.serial: ") && message.contains("a b"),
        "{message}"
    );

    let by_name = entry(|v| v.source = iscsi(|s| s.portals = vec!["unknown".into()]));
    let volumes = vec![numbered("b", 1), by_name, numbered("d", 4)];
    let request = v1::AddVolumesRequest { vm: vm("a"), volumes, dry_run: false };
    let results = client.add_volumes(request).await.unwrap().into_inner().results;
    let unknown = ("PORTAL_NOT_RESOLVED", "volumes[1].spec.source.iscsi.portals");
    assert_eq!(told(&results), expect(&[("ok", "false"), unknown, ("ok", "true")]));

    let volumes = ["d", "D", "none"].map(str::to_owned).into();
    let request = v1::RemoveVolumesRequest { vm: vm("a"), volumes, ..Default::default() };
    let results = client.remove_volumes(request).await.unwrap().into_inner().results;
    let want = [("ok", "true"), ("INVALID_NAME", "volumes[1]"), ("VOLUME_NOT_FOUND", "volumes[2]")];
    assert_eq!(told(&results), expect(&want));
    assert_eq!(results[0].volume.as_ref().unwrap().phase(), v1::Phase::Detaching);
}

#[tokio::test]
async fn a_request_for_many_volumes_that_is_wrong_as_such_changes_nothing() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    let many = |n: u32| (0..n).map(|n| numbered(&format!("v{n}"), n)).collect::<Vec<_>>();
    let twice = vec![numbered("b", 1), numbered("c", 2), numbered("b", 3)];
    for (name, volumes, reason, field) in [
        ("b", vec![], Reason::VmNotFound, "vm"),
        ("A", vec![], Reason::InvalidName, "vm.name"),
        ("a", twice.clone(), Reason::InvalidOption, "volumes[2].spec.name"),
        ("a", many(5), Reason::LimitReached, "volumes"),
    ] {
        let vm = raw_vm("", name);
        let add =
            v1::AddVolumesRequest { vm: vm.clone(), volumes: volumes.clone(), dry_run: false };
        let status = client.add_volumes(add).await.unwrap_err();
        assert_eq!(blame(&status), (reason, field.to_owned()), "{status}");
        let sync =
            v1::SyncVolumesRequest { vm: vm.clone(), volumes, revision: 1, ..Default::default() };
        let status = client.sync_volumes(sync).await.unwrap_err();
        assert_eq!(blame(&status), (reason, field.to_owned()), "{status}");
    }
    let volumes = ["b", "c", "b"].map(str::to_owned).into();
    let request = v1::RemoveVolumesRequest { vm: vm("a"), volumes, ..Default::default() };
    let status = client.remove_volumes(request).await.unwrap_err();
    assert_eq!(blame(&status), (Reason::InvalidOption, "volumes[2]".into()));
    assert!(status.message().contains("volumes[0]"), "{status}");
    // What is to be removed could not be told.
    let unreadable = vec![numbered("b", 1), entry(|v| v.name = "B".into())];
    for (revision, volumes, reason, field) in [
        (0, vec![], Reason::InvalidOption, "revision"),
        (1 << 63, vec![], Reason::InvalidOption, "revision"),
        (1, unreadable, Reason::InvalidName, "volumes[1].spec.name"),
        (1, vec![v1::VolumeEntry::default()], Reason::InvalidName, "volumes[0].spec.name"),
    ] {
        let request =
            v1::SyncVolumesRequest { vm: vm("a"), volumes, revision, ..Default::default() };
        let status = client.sync_volumes(request).await.unwrap_err();
        assert_eq!(blame(&status), (reason, field.to_owned()), "{status}");
    }
    let listed = client.list_volumes(v1::ListVolumesRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().volumes, []);
}

#[tokio::test]
async fn a_set_tells_what_is_in_it_and_what_was_removed() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    let mut sync = async |revision, volumes: Vec<v1::VolumeEntry>| {
        let request =
            v1::SyncVolumesRequest { vm: vm("a"), volumes, revision, ..Default::default() };
        client.sync_volumes(request).await.map(tonic::Response::into_inner)
    };
    let answer = sync(1, vec![numbered("b", 1), numbered("c", 2)]).await.unwrap();
    assert_eq!(told(&answer.volumes), expect(&[("ok", "true"); 2]));
    assert_eq!(answer.removed, []);
    // One that is malformed stays what it is.
    let mut malformed = numbered("c", 2);
    malformed.spec.as_mut().unwrap().bus = 99;
    let next = vec![malformed, numbered("d", 3)];
    let answer = sync(2, next.clone()).await.unwrap();
    let wrong = ("INVALID_OPTION", "volumes[0].spec.bus");
    assert_eq!(told(&answer.volumes), expect(&[wrong, ("ok", "true")]));
    assert_eq!(told(&answer.removed), expect(&[("ok", "true")]));
    assert_eq!(answer.removed[0].name, "b");
    let turned = next.into_iter().rev().collect();
    let answer = sync(2, turned).await.unwrap();
    assert_eq!(told(&answer.volumes)[0], ("ok".into(), "false".into()));

    let status = sync(1, vec![]).await.unwrap_err();
    let outdated = (Reason::RevisionOutdated, "revision".into());
    assert_eq!((status.code(), blame(&status)), (Code::FailedPrecondition, outdated));
    assert!(status.message().contains("revision 1 is older than 2"), "{status}");
    let status = sync(2, vec![]).await.unwrap_err();
    assert_eq!(blame(&status), (Reason::RevisionReused, "revision".into()));
    let vms = client.list_vms(v1::ListVmsRequest {}).await.unwrap().into_inner().vms;
    assert_eq!(vms[0].revision, 7);
}
