//! Documents as others write them.

use proptest::prelude::*;

use super::*;
use crate::api::v1;

fn of(text: &str) -> Result<(v1::VolumeSpec, Vec<String>, VolumeFile), String> {
    let document: Value = serde_yaml_ng::from_str(text).unwrap();
    let foreign = read(&document).expect("one of the forms")?;
    let wire = foreign.volume.to_wire().map_err(|failure| failure.message)?;
    Ok((wire, foreign.notes, foreign.volume))
}

fn iscsi(wire: &v1::VolumeSpec) -> v1::IscsiSource {
    let Some(v1::source::Kind::Iscsi(iscsi)) = wire.source.clone().unwrap().kind else {
        panic!("of iSCSI")
    };
    iscsi
}

fn fc(wire: &v1::VolumeSpec) -> v1::FcSource {
    let Some(v1::source::Kind::Fc(fc)) = wire.source.clone().unwrap().kind else {
        panic!("of Fibre Channel")
    };
    fc
}

fn places(source: &v1::FcSource) -> Vec<(&str, u32)> {
    source.targets.iter().map(|t| (t.wwpn.as_str(), t.lun)).collect()
}

const A: &str = "500a0982991b8dc5";
const B: &str = "500a0982891b8dc5";

#[test]
fn an_fc_stanza_is_read_verbatim() {
    let pv = format!(
        "kind: PersistentVolume\nspec: {{fc: {{targetWWNs: ['{A}', '50:0A:09:82:89:1B:8D:C5', '0x{A}'], lun: 2, wwids: [3600508b400105e210000900000490000], readOnly: true, fsType: ext4}}}}"
    );
    let (wire, notes, _) = of(&pv).unwrap();
    assert_eq!(places(&fc(&wire)), [(A, 2), (B, 2)]);
    assert_eq!((wire.read_only, wire.wwid.as_str()), (true, "3600508b400105e210000900000490000"));
    assert!(notes.len() == 1 && notes[0].contains("spec.fc.fsType"), "{notes:?}");
    let (wire, _, _) = of(&format!("fc: {{targetWWNs: ['{A}'], lun: 0}}")).unwrap();
    assert_eq!(places(&fc(&wire)), [(A, 0)]);
    for (stanza, words) in [
        ("{wwids: [3600508b400105e210000900000490000]}", "fc.targetWWNs and lun are missing"),
        ("{targetWWNs: [a]}", "fc.lun is missing"),
        ("{targetWWNs: [a], lun: 1, wwids: [a, b]}", "fc.wwids"),
        ("{targetWWNs: [a], lun: x}", "fc.lun"),
        ("{targetWWNs: [a], lun: 1, portals: [x]}", "fc.portals"),
    ] {
        let error = of(&format!("fc: {stanza}")).unwrap_err();
        assert!(error.contains(words), "{stanza}: {error}");
    }
    assert!(of("kind: PersistentVolume\nspec: {nfs: {}}").unwrap_err().contains("spec.fc"));
}

#[test]
fn a_local_volume_is_a_device_or_a_disk_image_of_the_node() {
    let pv = |spec: &str| of(&format!("kind: PersistentVolume\nspec: {spec}"));
    let (wire, notes, file) =
        pv("{volumeMode: Block, local: {path: /dev/vg/data, fsType: ext4}}").unwrap();
    let path = "/dev/vg/data".to_owned();
    let block = v1::source::Kind::Block(v1::BlockSource { path });
    assert_eq!(wire.source.unwrap().kind, Some(block));
    assert_eq!(file.source_url(), "block:///dev/vg/data");
    assert!(notes.len() == 1 && notes[0].contains("spec.local.fsType"), "{notes:?}");
    assert!(of("local: {path: /dev/vg/data}").is_ok());
    for mode in ["", "volumeMode: Filesystem, "] {
        let (_, _, file) = pv(&format!("{{{mode}local: {{path: /mnt/disks/a/}}}}")).unwrap();
        assert_eq!(file.source_url(), "file:///mnt/disks/a/disk.img");
    }
    for (spec, words) in [
        ("{volumeMode: Raw, local: {path: /mnt/a}}", "Block or Filesystem"),
        ("{volumeMode: Filesystem, local: {}}", "spec.local.path is missing"),
        ("{volumeMode: Block, local: {}}", "spec.local.path is missing"),
        ("{volumeMode: Block, local: {path: /dev/a, node: x}}", "spec.local.node"),
    ] {
        let error = pv(spec).unwrap_err();
        assert!(error.contains(words), "{spec}: {error}");
    }
}

#[test]
fn cinder_may_answer_with_fibre_channel() {
    let whole = |data: &str| format!("{{driver_volume_type: fibre_channel, data: {{{data}}}}}");
    let data = format!(
        "target_discovered: true, target_wwn: ['{A}', '{B}'], target_lun: 1, access_mode: ro, addressing_mode: SAM2, enable_wildcard_scan: true, initiator_target_map: {{'21000024ff3d2e5c': ['{A}'], '21000024ff3d2e5d': ['{B}'], '21000024ff3d2e5e': []}}"
    );
    let (wire, notes, _) = of(&whole(&data)).unwrap();
    let source = fc(&wire);
    assert_eq!(places(&source), [(A, 1), (B, 1)]);
    assert_eq!((source.initiator_target_map.len(), notes.len()), (2, 0));
    assert!(wire.read_only && source.wildcard_scan && !source.lip);
    let (wire, ..) = of(&whole(&format!("target_wwn: '{A}', target_lun: 300"))).unwrap();
    assert_eq!(fc(&wire).targets[0].lun_addressing(), v1::LunAddressing::Transparent);
    let data = format!("target_wwns: ['{A}', '{B}'], target_luns: [1, 2]");
    assert_eq!(places(&fc(&of(&whole(&data)).unwrap().0)), [(A, 1), (B, 2)]);
    for (data, words) in [
        ("target_lun: 1", "target_wwn is missing"),
        ("target_wwn: a", "target_lun is missing"),
        ("target_wwn: {a: b}, target_lun: 1", "target_wwn"),
        ("target_wwns: [a, b], target_luns: [1, 2, 3]", "one by one"),
        ("target_wwn: a, target_lun: 1, initiator_target_map: [x]", "initiator_target_map"),
        ("target_wwn: a, target_lun: 1, auth_method: CHAP", "auth_method"),
    ] {
        let error = of(&whole(data)).unwrap_err();
        assert!(error.contains(words), "{data}: {error}");
    }
}

const PV: &str = "
apiVersion: v1
kind: PersistentVolume
metadata: {name: iscsi-pv}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  iscsi:
    targetPortal: 10.0.2.15:3260
    portals: ['10.0.2.16:3260', '10.0.2.17:3261', '10.0.2.15']
    iqn: iqn.2001-04.com.example:storage.kube.sys1.xyz
    lun: 0
    iscsiInterface: default
    fsType: ext4
    readOnly: true
    chapAuthDiscovery: true
    chapAuthSession: true
    secretRef: {name: chap-secret, namespace: default}
";

#[test]
fn a_persistent_volume_is_read_verbatim() {
    let (wire, notes, _) = of(PV).unwrap();
    let source = iscsi(&wire);
    assert_eq!(source.portals, ["10.0.2.15:3260", "10.0.2.16:3260", "10.0.2.17:3261"]);
    assert_eq!((source.lun, source.chap_secret.as_str()), (0, "chap-secret"));
    assert!(wire.read_only);
    let of_field = |name: &str| notes.iter().any(|n| n.contains(name));
    assert!(of_field("fsType") && of_field("chapAuthDiscovery") && of_field("namespace"));
    assert_eq!(notes.len(), 3, "{notes:?}");
    let own = PV.replace(
        "iscsiInterface: default",
        "iscsiInterface: iser\n    initiatorName: iqn.2001-04.com.example:vm",
    );
    let source = iscsi(&of(&own).unwrap().0);
    assert_eq!(source.iface, "iser");
    assert_eq!(source.initiator_name, "iqn.2001-04.com.example:vm");
    let stanza = "iscsi: {targetPortal: 10.0.0.1, iqn: 'iqn.2001-04.com.example:a', lun: 7}";
    let (wire, notes, _) = of(stanza).unwrap();
    assert_eq!((iscsi(&wire).lun, notes.len()), (7, 0));
}

#[test]
fn what_a_persistent_volume_may_not_have_is_named() {
    for (from, to, words) in [
        ("iscsiInterface: default", "iscsiInterface: 5", "iscsiInterface: 5"),
        ("fsType: ext4", "fstype: ext4", "fstype: \"ext4\""),
        ("lun: 0", "", "spec.iscsi.lun is missing"),
        ("lun: 0", "lun: first", "lun: \"first\""),
        ("secretRef: {name: chap-secret, namespace: default}", "", "secretRef.name"),
        ("readOnly: true", "readOnly: often", "readOnly: \"often\""),
        ("iscsi:", "nfs:", "spec.iscsi is missing"),
    ] {
        assert!(PV.contains(from));
        let error = of(&PV.replace(from, to)).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

const CINDER: &str = r#"{
"driver_volume_type": "iscsi", "data": {
 "target_discovered": false, "target_portal": "10.0.0.1:3260", "target_iqn": "iqn.2010-10.org.openstack:v1",
 "target_lun": 1, "target_portals": ["10.0.0.1:3260", "10.0.0.2:3260"],
 "target_iqns": ["iqn.2010-10.org.openstack:v1", "iqn.2010-10.org.openstack:v1"], "target_luns": [1, 1],
 "volume_id": "6d2a", "auth_method": "CHAP", "auth_username": "stack", "auth_password": "hush-hush",
 "encrypted": false, "qos_specs": null, "access_mode": "rw", "addressing_mode": "SAM2"}}"#;

#[test]
fn connection_info_is_read_verbatim() {
    let (wire, notes, volume) = of(CINDER).unwrap();
    let source = iscsi(&wire);
    assert_eq!(source.portals, ["10.0.0.1:3260", "10.0.0.2:3260"]);
    assert_eq!((source.target.as_str(), source.lun), ("iqn.2010-10.org.openstack:v1", 1));
    let chap = volume.chap.unwrap().to_wire();
    assert_eq!((chap.username.as_str(), chap.password.as_str()), ("stack", "hush-hush"));
    assert!(notes.is_empty(), "{notes:?}");
    let nova = format!("{{\"connection_info\": {CINDER}}}");
    assert_eq!(iscsi(&of(&nova).unwrap().0), source);
}

/// As arrays answer that have a target for each port, and a LUN number for each of them.
#[test]
fn targets_and_luns_of_lists_belong_to_the_portals_one_by_one() {
    let several = CINDER
        .replace(
            "\"target_portals\": [",
            "\"target_portals\": [\"10.0.0.1\", \"10.0.0.3:3261\", ",
        )
        .replace(
            "\"target_iqns\": [",
            "\"target_iqns\": [\"iqn.2010-10.org.openstack:V1\", \"iqn.2010-10.org.openstack:v2\", ",
        )
        .replace("\"target_luns\": [1, 1]", "\"target_luns\": [1, 7, 1, 2]");
    let (wire, notes, volume) = of(&several).unwrap();
    assert_eq!(
        volume.source_url(),
        "iscsi://10.0.0.1:3260/iqn.2010-10.org.openstack:V1/1+10.0.0.3:3261/iqn.2010-10.org.openstack:v2/7+10.0.0.2:3260/iqn.2010-10.org.openstack:v1/2"
    );
    assert_eq!(iscsi(&wire).more_targets.len(), 2);
    assert!(notes.is_empty(), "{notes:?}");
    let flat = several.replace("\"SAM2\"", "\"SAM3-flat\"");
    let flat = iscsi(&of(&flat).unwrap().0);
    assert!(flat.more_targets.iter().all(|t| t.lun_addressing == flat.lun_addressing));
}

#[test]
fn connection_info_says_how_its_lun_is_addressed() {
    use v1::LunAddressing as To;
    for (mode, lun, to) in [
        ("\"SAM2\"", 300, To::Unspecified),
        ("\"SAM3-flat\"", 1, To::Sam3Flat),
        ("\"SAM\"", 16640, To::Transparent),
        ("\"transparent\"", 1, To::Transparent),
        ("null", 16640, To::Transparent),
    ] {
        let text = CINDER.replace("\"SAM2\"", mode).replace("[1, 1]", &format!("[{lun}, {lun}]"));
        let source = iscsi(&of(&text).unwrap().0);
        assert_eq!((source.lun, source.lun_addressing()), (lun, to), "{mode}");
    }
}

#[test]
fn what_connection_info_may_not_have_is_named_and_no_password_shown() {
    for (from, to, words) in [
        ("\"iscsi\"", "\"rbd\"", "driver_volume_type: \"rbd\""),
        ("\"encrypted\": false", "\"encrypted\": true", "data.encrypted: true"),
        ("\"access_mode\": \"rw\"", "\"access_mode\": \"wo\"", "access_mode: \"wo\""),
        ("\"SAM2\"", "\"SAM4\"", "addressing_mode: \"SAM4\""),
        ("\"CHAP\"", "\"KRB5\"", "auth_method: \"KRB5\""),
        ("\"target_luns\": [1, 1]", "\"target_luns\": [1]", "2, 2 and 1 entries"),
        ("\"volume_id\"", "\"colour\"", "data.colour: \"6d2a\""),
        ("\"hush-hush\"", "[\"hush-hush\"]", "auth_password: (not shown)"),
        ("\"auth_password\"", "\"my_password\"", "my_password: (not shown)"),
    ] {
        assert!(CINDER.contains(from), "{from}");
        let error = of(&CINDER.replace(from, to)).unwrap_err();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains("hush"), "{error}");
    }
}

#[test]
fn other_documents_are_not_taken_for_one_of_these() {
    for text in ["{name: a, source: x}", "[]", "text", "{source: {iscsi: {}}}"] {
        let document: Value = serde_yaml_ng::from_str(text).unwrap();
        assert_eq!(read(&document), None, "{text}");
    }
}

#[test]
fn limits_of_the_front_end_are_taken_and_bursts_refused() {
    let with =
        |qos: &str| CINDER.replace(r#""qos_specs": null"#, &format!(r#""qos_specs": {qos}"#));
    let (wire, notes, _) =
        of(&with(r#"{"total_iops_sec": "500", "read_bytes_sec": 1024}"#)).unwrap();
    let limits = wire.io_limits.unwrap();
    assert_eq!((limits.total_iops_sec, limits.read_bytes_sec), (500, 1024));
    assert!(notes.is_empty(), "{notes:?}");
    assert_eq!(of(&with("{}")).unwrap().0.io_limits, None);
    for (qos, field) in [
        (r#"{"total_iops_sec_max": "5"}"#, "qos_specs.total_iops_sec_max"),
        (r#"{"read_iops_sec": "many"}"#, "qos_specs.read_iops_sec"),
        ("[1]", "qos_specs"),
    ] {
        let error = of(&with(qos)).unwrap_err();
        assert!(error.contains(field), "{error}");
    }
}

proptest! {
    #[test]
    fn no_value_of_a_field_makes_the_reader_panic(
        field in prop::sample::select(vec![
            "target_portals", "target_iqns", "target_luns", "target_lun", "auth_method",
            "addressing_mode", "encrypted", "qos_specs", "x",
        ]),
        value in "[\\[{]?[a-z0-9\":, -]{0,30}[\\]}]?",
    ) {
        let text = format!("driver_volume_type: iscsi\ndata:\n  target_iqn: a\n  {field}: {value}\n");
        if let Ok(document) = serde_yaml_ng::from_str::<Value>(&text) {
            let _ = read(&document);
        }
    }

    #[test]
    fn the_portals_of_lists_are_each_there_once(ports in prop::collection::vec(1u16..9, 1..9)) {
        let portals: Vec<String> = ports.iter().map(|p| format!("10.0.0.1:{p}")).collect();
        let text = serde_json::json!({"driver_volume_type": "iscsi", "data": {
            "target_iqn": "iqn.2010-10.org.openstack:v1", "target_lun": "3",
            "target_portals": portals,
        }});
        let (wire, _, _) = of(&text.to_string()).unwrap();
        let found = iscsi(&wire).portals;
        let set: std::collections::BTreeSet<&String> = portals.iter().collect();
        prop_assert_eq!(found.iter().collect::<std::collections::BTreeSet<_>>(), set.clone());
        prop_assert_eq!(found.len(), set.len());
    }
}
