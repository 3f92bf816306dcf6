//! The API as a client meets it: real socket, real wire, façade in memory.
#![allow(clippy::unwrap_used)]

#[path = "api/batch.rs"]
mod batch;
mod common;
#[path = "api/watch.rs"]
mod watch;

use common::{POD, Server, URL};
use lunplug::api::auth::AllowedPeers;
use lunplug::api::convert::{wire_source, wire_vm_id};
use lunplug::api::v1;
use lunplug::reason::Reason;
use lunplug::spec::{Phase, Source};
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn vm(name: &str) -> Option<v1::VmId> {
    Some(wire_vm_id(&name.parse().unwrap()))
}

fn raw_vm(namespace: &str, name: &str) -> Option<v1::VmId> {
    Some(v1::VmId { namespace: namespace.into(), name: name.into() })
}

fn pod() -> v1::PodPlace {
    v1::PodPlace { uid: POD.into(), ..v1::PodPlace::default() }
}

fn registration(name: &str, pod: v1::PodPlace) -> v1::RegisterVmRequest {
    let place = Some(v1::vm_spec::Place::Pod(pod));
    v1::RegisterVmRequest {
        vm: Some(v1::VmSpec { id: vm(name), domain: String::new(), place, fc: 0 }),
    }
}

fn iscsi(change: impl FnOnce(&mut v1::IscsiSource)) -> Option<v1::Source> {
    let mut source = wire_source(&URL.parse::<Source>().unwrap());
    let Some(v1::source::Kind::Iscsi(iscsi)) = &mut source.kind else { unreachable!() };
    change(iscsi);
    Some(source)
}

fn block(path: &str) -> Option<v1::Source> {
    let block = v1::BlockSource { path: path.into() };
    Some(v1::Source { kind: Some(v1::source::Kind::Block(block)) })
}

fn fc(change: impl FnOnce(&mut v1::FcSource)) -> Option<v1::Source> {
    let url = "fc://500a0982991b8dc5,500a0982891b8dc5/7?map=21000024ff3d2e5c/500a0982991b8dc5";
    let mut source = wire_source(&url.parse::<Source>().unwrap());
    let Some(v1::source::Kind::Fc(fc)) = &mut source.kind else { unreachable!() };
    change(fc);
    Some(source)
}

fn addition(vm_name: &str, change: impl FnOnce(&mut v1::VolumeSpec)) -> v1::AddVolumeRequest {
    let mut volume =
        v1::VolumeSpec { name: "data".into(), source: iscsi(|_| {}), ..v1::VolumeSpec::default() };
    change(&mut volume);
    v1::AddVolumeRequest { vm: vm(vm_name), volume: Some(volume), ..Default::default() }
}

/// The reason and the field that a status names.
fn blame(status: &Status) -> (Reason, String) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "lunplug");
    assert!(details.localized_message().is_some_and(|m| !m.message.is_empty()));
    let field = info.metadata.get("field").cloned().unwrap_or_default();
    if status.code() == Code::InvalidArgument {
        let violations = &details.bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
        assert!(!violations[0].description.is_empty());
    }
    (Reason::from_code(&info.reason).unwrap(), field)
}

fn more(portals: &[&str], lun: u32) -> v1::IscsiTarget {
    let portals = portals.iter().map(|p| (*p).to_owned()).collect();
    let target = "iqn.2001-04.com.example:more".into();
    v1::IscsiTarget { target, portals, lun, ..Default::default() }
}

#[tokio::test]
async fn every_wrong_volume_is_refused_with_its_reason_and_field() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    let long = "x".repeat(40);
    let cases: Vec<(v1::AddVolumeRequest, Reason, &str)> = vec![
        (v1::AddVolumeRequest::default(), Reason::InvalidName, "vm"),
        (v1::AddVolumeRequest { vm: vm("a"), ..Default::default() }, Reason::InvalidName, "volume"),
        (addition("a", |v| v.name = "Data".into()), Reason::InvalidName, "volume.name"),
        (addition("a", |v| v.source = None), Reason::InvalidSource, "volume.source"),
        (
            addition("a", |v| v.source = Some(v1::Source { kind: None })),
            Reason::InvalidSource,
            "volume.source",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.target = "disk".into())),
            Reason::InvalidIqn,
            "volume.source.iscsi.target",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.portals.clear())),
            Reason::InvalidPortal,
            "volume.source.iscsi.portals",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.portals[1] = "host:0".into())),
            Reason::InvalidPortal,
            "volume.source.iscsi.portals",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.lun = 16384)),
            Reason::InvalidLun,
            "volume.source.iscsi.lun",
        ),
        (
            addition("a", |v| {
                v.source = iscsi(|s| s.more_targets = vec![more(&["10.0.0.9:0"], 1)])
            }),
            Reason::InvalidPortal,
            "volume.source.iscsi.more_targets[0].portals",
        ),
        (
            addition("a", |v| {
                v.source = iscsi(|s| s.more_targets = vec![more(&["10.0.0.9"], 1); 2]);
            }),
            Reason::InvalidSource,
            "volume.source.iscsi.more_targets",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.iface = "../x".into())),
            Reason::InvalidOption,
            "volume.source.iscsi.iface",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.iface = "lunplug-1".into())),
            Reason::InvalidOption,
            "volume.source.iscsi.iface",
        ),
        (
            addition("a", |v| v.source = iscsi(|s| s.initiator_name = "vm".into())),
            Reason::InvalidIqn,
            "volume.source.iscsi.initiator_name",
        ),
        (
            addition("a", |v| v.source = fc(|s| s.targets.clear())),
            Reason::InvalidWwpn,
            "volume.source.fc.targets",
        ),
        (
            addition("a", |v| v.source = fc(|s| s.targets[1].wwpn = "500a".into())),
            Reason::InvalidWwpn,
            "volume.source.fc.targets[1].wwpn",
        ),
        (
            addition("a", |v| v.source = fc(|s| s.targets[1] = s.targets[0].clone())),
            Reason::InvalidWwpn,
            "volume.source.fc.targets",
        ),
        (
            addition("a", |v| v.source = fc(|s| s.targets[0].lun = 16384)),
            Reason::InvalidLun,
            "volume.source.fc.targets[0].lun",
        ),
        (
            addition("a", |v| v.source = fc(|s| s.initiator_target_map[0].wwpn.clear())),
            Reason::InvalidWwpn,
            "volume.source.fc.initiator_target_map[0].wwpn",
        ),
        (
            addition("a", |v| v.source = fc(|s| s.initiator_target_map[0].targets.clear())),
            Reason::InvalidWwpn,
            "volume.source.fc.initiator_target_map[0].targets",
        ),
        (
            addition("a", |v| {
                v.source = fc(|s| s.initiator_target_map[0].targets[0].replace_range(..1, "6"));
            }),
            Reason::InvalidOption,
            "volume.source.fc.initiator_target_map",
        ),
        (
            v1::AddVolumeRequest {
                chap: Some(v1::ChapCredentials::default()),
                ..addition("a", |v| v.source = fc(|_| {}))
            },
            Reason::InvalidOption,
            "chap",
        ),
        (
            addition("a", |v| v.source = block("/dev/../etc/shadow")),
            Reason::InvalidSource,
            "volume.source.block.path",
        ),
        (
            addition("a", |v| {
                v.source = block("/dev/vg/data");
                v.set_multipath(v1::MultipathPolicy::Required);
            }),
            Reason::InvalidOption,
            "volume.multipath",
        ),
        (addition("a", |v| v.serial = "a b".into()), Reason::InvalidSerial, "volume.serial"),
        (addition("a", |v| v.serial = long.clone()), Reason::InvalidSerial, "volume.serial"),
        // The default, taken from the name, must fit as well.
        (addition("a", |v| v.name = long.clone()), Reason::InvalidSerial, "volume.serial"),
        (
            addition("a", |v| {
                v.set_bus(v1::Bus::Virtio);
                v.name = "x".repeat(21);
            }),
            Reason::InvalidSerial,
            "volume.serial",
        ),
        (addition("a", |v| v.bus = 99), Reason::InvalidOption, "volume.bus"),
        (addition("a", |v| v.cache = 99), Reason::InvalidOption, "volume.cache"),
        (addition("a", |v| v.disk_type = 99), Reason::InvalidOption, "volume.disk_type"),
        (
            addition("a", |v| {
                v.set_disk_type(v1::DiskType::Lun);
                v.set_bus(v1::Bus::Virtio);
            }),
            Reason::InvalidOption,
            "volume.bus",
        ),
        (addition("a", |v| v.io = 99), Reason::InvalidOption, "volume.io"),
        (
            addition("a", |v| {
                v.set_io(v1::IoMode::Native);
                v.set_cache(v1::CacheMode::Writeback);
            }),
            Reason::InvalidOption,
            "volume.io",
        ),
        (addition("a", |v| v.discard = 99), Reason::InvalidOption, "volume.discard"),
        (addition("a", |v| v.detect_zeroes = 99), Reason::InvalidOption, "volume.detect_zeroes"),
        (
            addition("a", |v| v.logical_block_size = 1000),
            Reason::InvalidOption,
            "volume.logical_block_size",
        ),
        (
            addition("a", |v| v.physical_block_size = 256),
            Reason::InvalidOption,
            "volume.physical_block_size",
        ),
        (
            addition("a", |v| (v.logical_block_size, v.physical_block_size) = (4096, 512)),
            Reason::InvalidOption,
            "volume.logical_block_size",
        ),
        (
            addition("a", |v| {
                let limits =
                    v1::IoLimits { total_iops_sec: 1, read_iops_sec: 1, ..Default::default() };
                v.io_limits = Some(limits);
            }),
            Reason::InvalidOption,
            "volume.io_limits.total_iops_sec",
        ),
        (
            addition("a", |v| {
                v.set_disk_type(v1::DiskType::Lun);
                v.serial = "mine".into();
            }),
            Reason::InvalidSerial,
            "volume.serial",
        ),
        (
            addition("a", |v| v.persistent_reservations = true),
            Reason::InvalidOption,
            "volume.persistent_reservations",
        ),
        (
            addition("a", |v| v.dedicated_io_thread = true),
            Reason::InvalidOption,
            "volume.dedicated_io_thread",
        ),
        (addition("a", |v| v.drive = "sda".into()), Reason::InvalidOption, "volume.drive"),
        (
            addition("a", |v| {
                v.set_disk_type(v1::DiskType::Cdrom);
                v.drive = "/dev/sda".into();
            }),
            Reason::InvalidOption,
            "volume.drive",
        ),
        (
            addition("a", |v| {
                v.set_disk_type(v1::DiskType::Cdrom);
                v.persist = true;
            }),
            Reason::InvalidOption,
            "volume.persist",
        ),
        (addition("a", |v| v.multipath = 99), Reason::InvalidOption, "volume.multipath"),
        (
            addition("a", |v| {
                v.shareable = true;
                v.set_cache(v1::CacheMode::Writeback);
            }),
            Reason::InvalidOption,
            "volume.cache",
        ),
        (addition("a", |v| v.wwid = "naa.1".into()), Reason::InvalidWwid, "volume.wwid"),
        (addition("a", |v| v.size_bytes = 1000), Reason::InvalidOption, "volume.size_bytes"),
        (addition("b", |_| {}), Reason::VmNotFound, "vm"),
    ];
    for (request, reason, field) in cases {
        let status = client.add_volume(request.clone()).await.unwrap_err();
        assert_eq!(blame(&status), (reason, field.to_owned()), "{request:?}\n{status}");
    }
    assert_eq!(
        client.list_volumes(v1::ListVolumesRequest::default()).await.unwrap().into_inner().volumes,
        []
    );
}

#[tokio::test]
async fn portals_by_name_are_resolved_and_told_as_they_were_asked_for() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    let by_name = |name: &str| {
        let portals = vec!["10.0.0.1".into(), name.into()];
        addition("a", |v| v.source = iscsi(|s| s.portals = portals))
    };
    for _ in 0..2 {
        let answer = client.add_volume(by_name("SAN:860")).await.unwrap().into_inner();
        let spec = answer.volume.unwrap().spec.unwrap();
        let Some(v1::source::Kind::Iscsi(source)) = spec.source.unwrap().kind else { panic!() };
        assert_eq!(source.portals, ["10.0.0.1:3260", "san:860"]);
        let resolved: Vec<_> = spec.resolved_portals.into_iter().collect();
        assert_eq!(resolved, [("san:860".into(), "10.0.0.9:860".into())]);
    }
    let stored = server.memory.get("default/a/data").unwrap().spec;
    let Source::Iscsi(source) = &stored.source else { panic!("of iSCSI") };
    assert_eq!(source.portals[1].to_string(), "10.0.0.9:860");
    let unknown = client.add_volume(by_name("unknown")).await.unwrap_err();
    let field = "volume.source.iscsi.portals".to_owned();
    assert_eq!(blame(&unknown), (Reason::PortalNotResolved, field));

    let mut discover = v1::DiscoverTargetsRequest { portal: "san".into(), ..Default::default() };
    let found = client.discover_targets(discover.clone()).await.unwrap().into_inner();
    assert_eq!(found.targets[0].portals[0], "10.0.0.9:3260");
    discover.portal = "unknown".into();
    let unknown = client.discover_targets(discover).await.unwrap_err();
    assert_eq!(blame(&unknown), (Reason::PortalNotResolved, "portal".into()));
}

#[tokio::test]
async fn every_wrong_vm_is_refused_with_its_reason_and_field() {
    let server = Server::start();
    let mut client = server.client().await;
    let host = |socket: &str| v1::RegisterVmRequest {
        vm: Some(v1::VmSpec {
            fc: 0,
            id: vm("a"),
            domain: String::new(),
            place: Some(v1::vm_spec::Place::Host(v1::HostPlace { libvirt_socket: socket.into() })),
        }),
    };
    let place = |change: &dyn Fn(&mut v1::PodPlace)| {
        let mut pod = pod();
        change(&mut pod);
        registration("a", pod)
    };
    let mut no_place = registration("a", pod());
    no_place.vm.as_mut().unwrap().place = None;
    let mut domain = registration("a", pod());
    domain.vm.as_mut().unwrap().domain = "../x".into();
    let mut name = registration("a", pod());
    name.vm.as_mut().unwrap().id = raw_vm("ns", "Big");
    for (request, reason, field) in [
        (v1::RegisterVmRequest::default(), Reason::InvalidName, "vm"),
        (name, Reason::InvalidName, "vm.id.name"),
        (no_place, Reason::InvalidOption, "vm.place"),
        (domain, Reason::InvalidOption, "vm.domain"),
        (place(&|p| p.uid = "../../etc".into()), Reason::InvalidOption, "vm.pod.uid"),
        (place(&|p| p.cgroup = "kubepods".into()), Reason::PathNotAllowed, "vm.pod.cgroup"),
        (
            place(&|p| p.hotplug_dir = "a/../..".into()),
            Reason::PathNotAllowed,
            "vm.pod.hotplug_dir",
        ),
        (place(&|p| p.hotplug_dir = "/dev".into()), Reason::PathNotAllowed, "vm.pod.hotplug_dir"),
        (
            place(&|p| p.hotplug_dir_in_pod = "x".into()),
            Reason::PathNotAllowed,
            "vm.pod.hotplug_dir_in_pod",
        ),
        (
            place(&|p| p.libvirt_socket = "/run/libvirt/libvirt-sock".into()),
            Reason::PathNotAllowed,
            "vm.pod.libvirt_socket",
        ),
        (host("libvirt-sock"), Reason::PathNotAllowed, "vm.host.libvirt_socket"),
    ] {
        let status = client.register_vm(request.clone()).await.unwrap_err();
        assert_eq!(blame(&status), (reason, field.to_owned()), "{request:?}\n{status}");
    }
}

#[tokio::test]
async fn what_is_unknown_or_clashes_is_told_apart() {
    let server = Server::start();
    let mut client = server.client().await;
    assert!(client.register_vm(registration("a", pod())).await.unwrap().into_inner().changed);
    assert!(!client.register_vm(registration("a", pod())).await.unwrap().into_inner().changed);
    let other = v1::PodPlace { uid: POD.replace('0', "1"), ..pod() };
    let status = client.register_vm(registration("a", other)).await.unwrap_err();
    assert_eq!((status.code(), blame(&status).0), (Code::AlreadyExists, Reason::VmExists));

    let added = client.add_volume(addition("a", |_| {})).await.unwrap().into_inner();
    assert!(added.changed);
    let spec = added.volume.unwrap().spec.unwrap();
    assert_eq!((spec.serial.as_str(), spec.bus()), ("data", v1::Bus::Scsi), "defaults are shown");
    assert!(!client.add_volume(addition("a", |_| {})).await.unwrap().into_inner().changed);
    let status = client.add_volume(addition("a", |v| v.read_only = true)).await.unwrap_err();
    assert_eq!((status.code(), blame(&status).0), (Code::AlreadyExists, Reason::VolumeExists));
    let metadata = status.get_error_details().error_info().unwrap().metadata.clone();
    assert_eq!((metadata["vm"].as_str(), metadata["volume"].as_str()), ("default/a", "data"));

    let status = client.unregister_vm(v1::UnregisterVmRequest { vm: vm("a") }).await.unwrap_err();
    assert_eq!((status.code(), blame(&status).0), (Code::FailedPrecondition, Reason::VmHasVolumes));
    let unknown = v1::GetVolumeRequest { vm: vm("a"), volume: "no".into() };
    let status = client.get_volume(unknown).await.unwrap_err();
    assert_eq!((status.code(), blame(&status).0), (Code::NotFound, Reason::VolumeNotFound));
    for status in [
        client.list_volumes(v1::ListVolumesRequest { vm: vm("no") }).await.unwrap_err(),
        client.watch_volumes(v1::WatchVolumesRequest { vm: vm("no") }).await.unwrap_err(),
    ] {
        assert_eq!(blame(&status), (Reason::VmNotFound, "vm".into()));
    }
}

#[tokio::test]
async fn a_peer_that_is_not_allowed_gets_nothing_at_all() {
    let other = nix::unistd::geteuid().as_raw() + 1;
    let server = Server::start_for(AllowedPeers::exactly([other]));
    let mut client = server.client().await;
    let status = client.get_node(v1::GetNodeRequest {}).await.unwrap_err();
    assert_eq!((status.code(), blame(&status).0), (Code::PermissionDenied, Reason::PeerNotAllowed));
    let mut health = tonic_health::pb::health_client::HealthClient::new(server.channel().await);
    let request = tonic_health::pb::HealthCheckRequest::default();
    assert_eq!(health.check(request).await.unwrap_err().code(), Code::PermissionDenied);
    let (exit, _, err) = server.run("node").await;
    assert_eq!(exit, 7, "{err}");
}

#[tokio::test]
async fn health_and_reflection_are_served() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let server = Server::start();
    let mut health = tonic_health::pb::health_client::HealthClient::new(server.channel().await);
    let service = "lunplug.v1.LunplugService".to_owned();
    let request = tonic_health::pb::HealthCheckRequest { service: service.clone() };
    let answer = health.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status(), tonic_health::pb::health_check_response::ServingStatus::Serving);

    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::FileContainingSymbol(service)),
    };
    let mut answers = ServerReflectionClient::new(server.channel().await)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
}

#[tokio::test]
async fn where_a_guest_is_to_come_is_checked_field_by_field() {
    use v1::prepare_migration_target_request::Place;
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    let pod = |uid: &str| v1::PodPlace { uid: uid.into(), ..v1::PodPlace::default() };
    let within = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let up = v1::PodPlace { libvirt_socket: "../x".into(), ..pod(POD) };
    for (place, time, field) in [
        (None, None, "place"),
        (Some(Place::Pod(pod("x"))), None, "pod.uid"),
        (Some(Place::Pod(up)), None, "pod.libvirt_socket"),
        (Some(Place::Pod(pod(POD))), within(0), "within"),
        (Some(Place::Pod(pod(POD))), within(90_000), "within"),
        (
            Some(Place::Host(v1::HostPlace { libvirt_socket: "x".into() })),
            None,
            "host.libvirt_socket",
        ),
    ] {
        let request = v1::PrepareMigrationTargetRequest { vm: vm("a"), place, within: time };
        let status = client.prepare_migration_target(request).await.unwrap_err();
        assert_eq!(blame(&status).1, field, "{status}");
    }
    let request = v1::PrepareMigrationTargetRequest {
        vm: vm("a"),
        place: Some(Place::Pod(pod(POD))),
        within: within(60),
    };
    assert!(client.prepare_migration_target(request).await.is_ok());
}
