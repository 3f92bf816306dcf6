//! The command line against a server: what it prints, where, and how it exits.
#![allow(clippy::unwrap_used)]

mod common;

use common::{POD, Server, URL};
use lunplug::reason::Reason;
use lunplug::spec::Phase;

async fn with_vm() -> Server {
    let server = Server::start();
    let (exit, out, err) = server.run(&format!("vm register a --pod-uid {POD}")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("default/a") && out.contains("default_a"), "{out}");
    server
}

fn add(more: &str) -> String {
    format!("addvolume a --volume-name data --source {URL} {more}")
}

const ATTACH: &[(Phase, Option<Reason>)] = &[
    (Phase::Bound, None),
    (Phase::Pending, Some(Reason::PortalUnreachable)),
    (Phase::Bound, None),
    (Phase::AttachedToNode, None),
    (Phase::MountedToPod, None),
    (Phase::Ready, None),
];

#[tokio::test]
async fn a_volume_is_added_shown_and_removed() {
    let server = with_vm().await;
    server.memory.script(ATTACH);
    let (exit, out, err) = server.run(&add("-o json")).await;
    assert_eq!(exit, 0, "{err}");
    let volume: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(volume["phase"], "Ready");
    assert_eq!(volume["vm"], "default/a");
    assert_eq!(volume["device"]["dev"], "253:7");
    assert_eq!(volume["spec"]["serial"], "data");
    assert_eq!(volume["spec"]["source"]["iscsi"]["lun"], 3);
    assert!(err.lines().last().unwrap().contains("Ready"), "the last phase is shown: {err}");

    let (exit, out, _) = server.run("list").await;
    assert_eq!(exit, 0);
    let rows: Vec<Vec<&str>> = out.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..3], ["VM", "VOLUME", "PHASE"]);
    assert_eq!(rows[1][..6], ["default/a", "data", "Ready", "sda", "1Gi", "2"]);
    let (_, out, _) = server.run("list -n other").await;
    assert_eq!(out.lines().count(), 1, "{out}");
    let (_, out, _) = server.run("describe a data").await;
    assert!(out.contains("naa.6001405123456789"), "{out}");
    assert!(out.contains("iscsi://10.0.0.1:3260,10.0.0.2:3260/iqn.2001-04.com.example:a/3"));

    let (exit, _, err) = server.run("vm unregister a").await;
    assert_eq!(exit, 4, "{err}");
    assert!(err.contains("VM_HAS_VOLUMES"), "{err}");

    server.memory.script(&[(Phase::UnmountedFromPod, None), (Phase::Gone, None)]);
    let (exit, out, err) = server.run("removevolume a --volume-name data -o yaml").await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("phase: Gone"), "{out}");
    let (exit, _, err) = server.run("removevolume a --volume-name data").await;
    assert_eq!(exit, 3, "{err}");
    assert!(err.contains("error: VOLUME_NOT_FOUND: no volume default/a/data"), "{err}");
    let (exit, _, _) = server.run("vm unregister a").await;
    assert_eq!(exit, 0);
    let (exit, _, err) = server.run("vm unregister a").await;
    assert_eq!((exit, err.trim()), (0, "it was not registered"));
}

#[tokio::test]
async fn limits_are_given_with_a_volume_and_set_later() {
    let server = with_vm().await;
    server.memory.script(ATTACH);
    let (exit, out, err) = server.run(&add("--total-iops 100 --read-bytes 1Mi -o json")).await;
    assert_eq!(exit, 0, "{err}");
    let volume: serde_json::Value = serde_json::from_str(&out).unwrap();
    let limits = serde_json::json!({"read_bytes_sec": 1 << 20, "total_iops_sec": 100});
    assert_eq!(volume["spec"]["io_limits"], limits);
    let set = "iolimits a --volume-name data";
    let (exit, out, err) = server.run(&format!("{set} --total-bytes-sec 5K -o json")).await;
    assert_eq!(exit, 0, "{err}");
    let volume: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(volume["spec"]["io_limits"], serde_json::json!({"total_bytes_sec": 5000}));
    let (_, out, _) = server.run("describe a data").await;
    assert!(out.contains("total_bytes_sec 5000"), "{out}");
    let (exit, out, err) = server.run(&format!("{set} --unlimited -o json")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(!out.contains("io_limits"), "{out}");
    let (_, _, err) = server.run(&format!("{set} --unlimited")).await;
    assert!(err.contains("nothing to do"), "{err}");
    let (exit, _, err) = server.run(&format!("{set} --total-iops 1 --read-iops 1")).await;
    assert_eq!(exit, 2, "{err}");
    assert!(err.contains("total excludes"), "{err}");
}

#[tokio::test]
async fn a_reason_to_act_ends_the_wait_and_one_that_passes_does_not() {
    let server = with_vm().await;
    server.memory.script(&[(Phase::Bound, None), (Phase::Pending, Some(Reason::LoginRefused))]);
    let (exit, out, err) = server.run(&add("")).await;
    assert_eq!((exit, out.as_str()), (5, ""), "{err}");
    assert!(err.contains("error: LOGIN_REFUSED: it is so\n  what to do: "), "{err}");

    // It is still wanted, and in trouble that passes: only --timeout ends the wait.
    let status = server.memory.get("default/a/data").unwrap();
    server.memory.publish(status, Phase::Pending, Some(Reason::PortalUnreachable));
    let (exit, _, err) = server.run(&add("--timeout 0s")).await;
    assert_eq!(exit, 6, "{err}");
    assert!(err.contains("still Pending after 0s (PORTAL_UNREACHABLE: it is so)"), "{err}");
    let (exit, out, _) = server.run(&add("--no-wait")).await;
    assert_eq!(exit, 0);
    assert!(out.contains("PORTAL_UNREACHABLE"), "{out}");

    server.memory.script(&[(Phase::Detaching, Some(Reason::InUseByGuest))]);
    let (exit, _, err) = server.run("removevolume a --volume-name data").await;
    assert_eq!(exit, 5, "{err}");
    assert!(err.contains("IN_USE_BY_GUEST") && err.contains("--force"), "{err}");
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_says_so() {
    let server = with_vm().await;
    let (exit, out, err) = server.run(&add("--dry-run")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("Pending") && err.contains("nothing was changed"), "{out}{err}");
    assert!(server.memory.get("default/a/data").is_none());
}

#[tokio::test]
async fn a_volume_comes_from_a_file_and_flags_win_over_it() {
    let server = with_vm().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{{name: data, serial: A, bus: virtio, source: '{URL}'}}"))
        .unwrap();
    let path = file.path().display();
    let line = format!("addvolume a -f {path} --serial B --size 1Gi --no-wait -o json");
    let (exit, out, err) = server.run(&line).await;
    assert_eq!(exit, 0, "{err}");
    let volume: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(volume["spec"]["serial"], "B");
    assert_eq!(volume["spec"]["bus"], "virtio");
    assert_eq!(volume["spec"]["size_bytes"], 1 << 30);

    std::fs::write(file.path(), "name: data\ncolour: red").unwrap();
    let (exit, _, err) = server.run(&format!("addvolume a -f {path}")).await;
    assert_eq!(exit, 2, "{err}");
    assert!(err.contains("colour"), "{err}");
}

#[tokio::test]
async fn what_is_wrong_is_said_with_reason_and_exit_code() {
    let server = with_vm().await;
    let url = |url: &str| format!("addvolume a --volume-name data --source {url}");
    for (line, exit, reason) in [
        (url("iscsi://10.0.0.1/iqn.2001-04.com.example:a"), 2, "INVALID_SOURCE"),
        (url("iscsi://x_/iqn.2001-04.com.example:a/1"), 2, "INVALID_PORTAL"),
        (url("iscsi://10.0.0.1/disk/1"), 2, "INVALID_IQN"),
        (url("iscsi://10.0.0.1/iqn.2001-04.com.example:a/x"), 2, "INVALID_LUN"),
        (add("--cache unsafe"), 2, "INVALID_OPTION"),
        (add("--bus ide"), 2, "INVALID_OPTION"),
        (add("--bus virtio --serial abcdefghijklmnopqrstu"), 2, "INVALID_SERIAL"),
        (add("--wwid 5"), 2, "INVALID_WWID"),
        (add("--size many"), 2, "INVALID_OPTION"),
        (add("--disk-type lun --io threads"), 2, "INVALID_OPTION"),
        (add("--disk-type lun --bus virtio"), 2, "INVALID_OPTION"),
        (add("--disk-type lun --serial a"), 2, "INVALID_SERIAL"),
        (add("--io native --cache writeback"), 2, "INVALID_OPTION"),
        (add("").replace("addvolume a", "addvolume b"), 3, "VM_NOT_FOUND"),
        (add("").replace("10.0.0.1", "unknown"), 6, "PORTAL_NOT_RESOLVED"),
        (add("").replace("addvolume a", "addvolume B"), 2, "INVALID_NAME"),
        ("list b".into(), 3, "VM_NOT_FOUND"),
        ("describe a data".into(), 3, "VOLUME_NOT_FOUND"),
    ] {
        let (code, out, err) = server.run(&line).await;
        assert_eq!((code, out.as_str()), (exit, ""), "{line}: {err}");
        assert!(err.starts_with(&format!("error: {reason}: ")), "{line}: {err}");
        let (_, _, err) = server.run(&format!("{line} -o json")).await;
        let json: serde_json::Value = serde_json::from_str(&err).unwrap();
        assert_eq!(json["error"]["reason"], reason);
        assert!(json["error"]["remedy"].is_string());
    }
}

#[tokio::test]
async fn node_and_vms_are_shown_and_a_daemon_that_is_not_there() {
    let server = with_vm().await;
    let (_, out, _) = server.run("node").await;
    let hba = "21000024ff3d2e5c (host6) Online, 16 Gbit, fabric 100000051e0a1234";
    assert!(out.contains(hba), "{out}");
    assert!(out.contains("cgroup2-override") && out.contains("nothing is real"), "{out}");
    let (_, out, _) = server.run("vm list -o json").await;
    let vms: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(vms[0]["pod_uid"], POD);
    assert_eq!(vms[0]["state"], "running");
    let (exit, _, err) = server.run("node --socket /nonexistent/s.sock").await;
    assert_eq!(exit, 6, "{err}");
    assert!(err.contains("what to do: Start lunplugd"), "{err}");
}

#[tokio::test]
async fn an_expand_tells_the_sizes_and_whether_anything_was_done() {
    let server = with_vm().await;
    server.memory.script(ATTACH);
    assert_eq!(server.run(&add("")).await.0, 0);
    let expand =
        async |more: &str| server.run(&format!("expand a --volume-name data {more}")).await;
    let (exit, out, err) = expand("").await;
    assert_eq!(exit, 0, "{err}");
    assert!(err.contains("nothing to do: host and guest have 1Gi"), "{err}");
    assert!(out.contains("1073741824"), "{out}");
    let (exit, out, err) = expand("--size 2Gi").await;
    assert_eq!(exit, 0, "{err}");
    assert!(err.contains("grown from 1Gi to 2Gi"), "{err}");
    assert!(out.contains("2Gi (2147483648 bytes)"), "{out}");
    let (_, out, err) = expand("--size 3Gi -o json").await;
    assert_eq!(err, "");
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(told["size_before_bytes"], 2_u64 << 30);
    assert_eq!(told["size_bytes"], 3_u64 << 30);
    assert_eq!(told["changed"], true);
    assert_eq!(told["volume"]["device"]["size_bytes"], 3_u64 << 30);
    let (_, out, _) = expand("-o yaml").await;
    assert!(out.contains("changed: false"), "{out}");
    assert_eq!(expand("--size 1000").await.0, 2, "no multiple of 512");
    assert_eq!(expand("--size x").await.0, 2);
    assert_eq!(server.run("expand a --volume-name none").await.0, 3);
}

#[tokio::test]
async fn targets_are_discovered_as_a_table_and_as_json() {
    let server = Server::start();
    let (exit, out, err) = server.run("discover 10.0.0.1").await;
    assert_eq!(exit, 0, "{err}");
    let rows: Vec<Vec<&str>> = out.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["TARGET", "PORTALS"]);
    assert_eq!(rows[1], ["iqn.2001-04.com.example:a", "10.0.0.1:3260,[fd00::1]:3260"]);
    let (_, out, _) = server.run("discover 10.0.0.1 -o json").await;
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(found[0]["portals"][1], "[fd00::1]:3260");
    let (exit, _, err) = server.run("discover 10.0.0").await;
    assert_eq!(exit, 2);
    assert!(err.contains("INVALID_PORTAL"), "{err}");
    let (exit, _, err) = server.run("discover 10.0.0.1 --chap-secret ../x").await;
    assert_eq!(exit, 2, "{err}");
    let (exit, _, err) = server.run("discover 10.0.0.1 --chap-secret x").await;
    assert_eq!((exit, err.contains("CHAP_REJECTED")), (5, true), "{err}");
}

#[tokio::test]
async fn volumes_of_others_and_their_credentials_are_read_from_files() {
    let server = with_vm().await;
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let pv = put(
        "pv.yaml",
        "iscsi: {targetPortal: 10.0.0.1, iqn: 'iqn.2001-04.com.example:a', lun: 3, fsType: ext4,
                 iscsiInterface: eth1, initiatorName: 'iqn.2001-04.com.example:pv',
                 chapAuthSession: true, secretRef: {name: san-1}}",
    );
    server.memory.script(ATTACH);
    let (exit, out, err) =
        server.run(&format!("addvolume a --volume-name pv -f {pv} --iface iser -o json")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(err.contains("note: iscsi.fsType is passed over"), "{err}");
    let volume: serde_json::Value = serde_json::from_str(&out).unwrap();
    let iscsi = &volume["spec"]["source"]["iscsi"];
    assert_eq!(iscsi["chap_secret"], "san-1");
    assert_eq!(iscsi["iface"], "iser", "flags win");
    assert_eq!(iscsi["initiator_name"], "iqn.2001-04.com.example:pv");

    let info = put(
        "info.json",
        r#"{"driver_volume_type": "iscsi", "data": {"target_portal": "10.0.0.1:3260",
            "target_iqn": "iqn.2001-04.com.example:b", "target_lun": 4, "auth_method": "CHAP",
            "auth_username": "u", "auth_password": "hush-hush"}}"#,
    );
    server.memory.script(ATTACH);
    let (exit, out, err) =
        server.run(&format!("addvolume a --volume-name info -f {info} -o json")).await;
    assert_eq!(exit, 0, "{err}");
    let volume: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(volume["spec"]["source"]["iscsi"]["chap_in_request"], true);
    let (_, shown, _) = server.run("list -o yaml").await;
    assert!(!format!("{out}{err}{shown}").contains("hush"), "{shown}");

    // What was printed cannot be added again without the credentials, and says so.
    let again = put("again.json", &volume["spec"].to_string());
    let (exit, _, err) = server.run(&format!("addvolume a -f {again}")).await;
    assert_eq!((exit, err.contains("chap_in_request")), (2, true), "{err}");
    let chap = put("chap.yaml", "username: u\npassword: [hush]");
    let (exit, _, err) = server.run(&format!("{} --chap-file {chap}", add(""))).await;
    assert_eq!(exit, 2, "{err}");
    let chap = put("chap.yaml", "username: u\npassword: 'hush '");
    let (exit, _, err) = server.run(&format!("{} --chap-file {chap}", add(""))).await;
    assert_eq!((exit, err.contains("chap.password")), (2, true), "{err}");
    assert!(!err.contains("hush"), "{err}");
}

const READY: &[(Phase, Option<Reason>)] = &[(Phase::Bound, None), (Phase::Ready, None)];
const GONE: &[(Phase, Option<Reason>)] = &[(Phase::UnmountedFromPod, None), (Phase::Gone, None)];

fn rows(table: &str) -> Vec<Vec<String>> {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
    table.lines().skip(1).map(words).collect()
}

#[tokio::test]
async fn a_set_from_a_file_is_made_so_and_shown() {
    let server = with_vm().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().display().to_string();
    let url = |lun: u8| format!("iscsi://10.0.0.1/iqn.2001-04.com.example:a/{lun}");
    let put = |names: &[&str]| {
        let volume = |(n, name): (usize, &&str)| {
            format!("- {{name: {name}, source: '{}'}}\n", url(u8::try_from(n).unwrap()))
        };
        let volumes: String = names.iter().enumerate().map(volume).collect();
        std::fs::write(file.path(), format!("volumes:\n{volumes}")).unwrap();
    };
    put(&["b", "c"]);
    let (exit, out, err) = server.run(&format!("sync a -f {path} --revision 1 --dry-run")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("Pending") && err.contains("nothing was changed"), "{out}{err}");
    server.memory.script_of("b", READY);
    server.memory.script_of("c", READY);
    let (exit, out, err) = server.run(&format!("sync a -f {path} --revision 1")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.starts_with("VOLUME"), "{out}");
    let [b, c] = &rows(&out)[..] else { panic!("{out}") };
    assert_eq!(b[..6], ["b", "add", "yes", "Ready", "sda", "1Gi"]);
    assert_eq!(c[..4], ["c", "add", "yes", "Ready"]);
    assert!(err.contains("b: Ready") && err.contains("c: Ready"), "{err}");

    put(&["b", "d"]);
    server.memory.script_of("c", GONE);
    server.memory.script_of("d", READY);
    let (exit, out, err) = server.run(&format!("sync a -f {path} --revision 2 -o json")).await;
    assert_eq!(exit, 0, "{err}");
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    let short =
        |n: usize| (told[n]["name"].clone(), told[n]["wish"].clone(), told[n]["changed"].clone());
    assert_eq!(short(0), ("b".into(), "add".into(), false.into()));
    assert_eq!(short(2), ("c".into(), "remove".into(), true.into()));
    assert_eq!(told[2]["volume"]["phase"], "Gone");
    assert_eq!(told[1]["error"], serde_json::Value::Null);

    let (exit, _, err) = server.run(&format!("sync a -f {path} --revision 1")).await;
    assert_eq!(exit, 4, "{err}");
    assert!(err.contains("REVISION_OUTDATED") && err.contains("what to do"), "{err}");
    std::fs::write(file.path(), "").unwrap();
    let (exit, _, err) = server.run(&format!("sync a -f {path} --revision 3")).await;
    assert_eq!((exit, err.contains("volumes: []")), (2, true), "{err}");
    std::fs::write(file.path(), "volumes: []").unwrap();
    let (exit, out, err) = server.run(&format!("sync a -f {path} --revision 3 --no-wait")).await;
    assert_eq!(exit, 0, "{err}");
    assert_eq!(rows(&out).iter().map(|row| row[3].as_str()).collect::<Vec<_>>(), ["Detaching"; 2]);
}

#[tokio::test]
async fn what_of_many_volumes_did_not_come_about_is_told_and_the_rest_is_waited_for() {
    let server = with_vm().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().display().to_string();
    let documents =
        format!("name: b\nsource: '{URL}'\n---\n{{name: c, wwid: 5, source: '{URL}'}}\n");
    std::fs::write(file.path(), documents.replace("wwid: 5", "wwid: '5'")).unwrap();
    server.memory.script_of("b", READY);
    let (exit, out, err) = server.run(&format!("sync a -f {path} --revision 1")).await;
    assert_eq!(exit, 2, "{err}");
    assert_eq!(rows(&out)[0][3], "Ready");
    assert_eq!(rows(&out)[1], ["c", "add", "no", "INVALID_WWID"]);
    assert!(err.contains("error: INVALID_WWID: c: volumes[1].spec.wwid: "), "{err}");

    server.memory.script_of("b", &[(Phase::Detaching, Some(Reason::InUseByGuest))]);
    let (exit, out, err) = server.run("removevolume a --volume-name b --volume-name none").await;
    assert_eq!(exit, 5, "{err}");
    assert_eq!(rows(&out)[0][..4], ["b", "remove", "yes", "Detaching"]);
    for words in ["IN_USE_BY_GUEST: b: ", "VOLUME_NOT_FOUND: none: ", "2 of 2 volumes did not"] {
        assert!(err.contains(words), "{words}: {err}");
    }
    let status = server.memory.get("default/a/b").unwrap();
    server.memory.publish(status, Phase::Detaching, None);
    let line = "removevolume a --volume-name b --volume-name none --timeout 0s -o yaml";
    let (exit, out, err) = server.run(line).await;
    assert_eq!(exit, 6, "{err}");
    assert!(out.contains("DEADLINE_EXCEEDED") && out.contains("VOLUME_NOT_FOUND"), "{out}");
}

#[tokio::test]
async fn a_vm_that_starts_or_moves_is_told_volume_by_volume() {
    let server = with_vm().await;
    server.memory.script(ATTACH);
    assert_eq!(server.run(&add("")).await.0, 0);
    let (exit, out, err) = server.run("preparestart a -o json").await;
    assert_eq!(exit, 0, "{err}");
    let parts: serde_json::Value = serde_json::from_str(&out).unwrap();
    let told = (&parts[0]["name"], &parts[0]["wish"], &parts[0]["changed"]);
    assert_eq!(told, (&"data".into(), &"prepare".into(), &false.into()));
    let prepare = format!("migration prepare a --pod-uid {POD} --within 10m");
    let (exit, out, err) = server.run(&prepare).await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("data") && out.contains("prepare"), "{out}");

    server.memory.script(&[(Phase::Pending, Some(Reason::VmNotRunning))]);
    let more = add("--no-wait").replace("data", "more").replace("/3", "/4");
    assert_eq!(server.run(&more).await.0, 0);
    let (exit, out, err) = server.run("preparestart a").await;
    assert_eq!(exit, 6, "one is not there: {err}");
    assert!(out.contains("PORTAL_UNREACHABLE") && err.contains("more: "), "{out}{err}");

    let (exit, _, err) = server.run("migration prepare a --host").await;
    assert_eq!(exit, 5, "{err}");
    let (exit, _, err) = server.run("migration finish a").await;
    assert!(exit == 5 && err.contains("VM_RUNNING"), "{err}");
    let (exit, _, err) = server.run("migration cancel a").await;
    assert_eq!((exit, err.trim()), (0, "nothing was prepared"));
    assert_eq!(server.run("preparestart nobody").await.0, 3);
    assert_eq!(server.run("preparestart a --within 0s").await.0, 2);
}

/// Of a VM that is off the wish is what there is to wait for.
#[tokio::test]
async fn a_volume_of_a_vm_that_is_off_is_not_waited_for() {
    let server = with_vm().await;
    server.memory.script(&[(Phase::Pending, Some(Reason::VmNotRunning))]);
    let (exit, out, err) = server.run(&add("")).await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("Pending") && err.contains("VM_NOT_RUNNING"), "{out}{err}");
}
