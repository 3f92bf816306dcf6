//! Initiator names and iface records of a volume's own: a target shows each initiator what it maps to it.

use crate::node::{
    Lab, Lun, Story, VM, add, guest_disk, guest_has, lunplug, refused, remove, sh, volume,
};
use crate::san::Fault;
use crate::targets::{SECOND, Second};

const NAME: &str = "iqn.2026-01.org.lunplug:vm-a";

/// LUN `n` of the second target, by both of its portals.
fn at_second(n: u16) -> String {
    format!("iscsi://127.0.0.4,127.0.0.5/{SECOND}/{n}")
}

/// The sessions of the second target, a line each: iface and initiator name.
fn sessions() -> Vec<String> {
    let told = sh(&format!(
        "for s in /sys/class/iscsi_session/session*; do
            [ \"$(cat $s/targetname)\" != {SECOND} ] || echo $(cat $s/ifacename $s/initiatorname)
        done"
    ));
    told.ok().lines().map(str::to_owned).collect()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_initiator_name_of_its_own_gets_what_the_target_maps_to_that() {
    Lab::get();
    let second = Second::up();
    let (one, two) = (Lun::new("anybodys", 1, "16M"), Lun::new("masked", 2, "32M"));
    second.export(&one, 1);
    second.export(&two, 2);
    let _mask = Fault::new(
        &format!("target mask {NAME} 1 2 --iqn {SECOND}"),
        &format!("target unmask {NAME} --iqn {SECOND}"),
    );
    let story = Story::begin();

    // LUN 1 of one target is another LUN for each of two initiators.
    add("anybodys", &at_second(1), &[]).ok();
    add("masked", &at_second(1), &["--initiator-name", NAME]).ok();
    assert_eq!(volume("anybodys")["device"]["wwid"], one.wwid.as_str());
    assert_eq!(volume("masked")["device"]["wwid"], two.wwid.as_str());
    assert_eq!(guest_disk("masked").bytes, 32 << 20);
    guest_has(2);
    let all = sessions();
    let own = all.iter().filter(|s| s.starts_with("lunplug-") && s.ends_with(NAME)).count();
    assert_eq!((own, all.len()), (2, 4), "{all:?}");
    let told = lunplug(&["describe", VM, "masked"]).ok();
    assert!(told.contains(&format!("?initiator={NAME}")), "{told}");
    refused(add("none", &at_second(2), &["--initiator-name", NAME]), "LUN_NOT_FOUND");

    // iscsid starts over the sessions and knows whose they are.
    sh("systemctl restart iscsid").ok();
    remove("anybodys", &[]).ok();
    assert!(sessions().iter().all(|s| s.ends_with(NAME)));
    remove("masked", &[]).ok();
    guest_has(0);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn an_iface_of_the_nodes_is_used_and_left() {
    Lab::get();
    let lun = Lun::new("viaiface", 3, "16M");
    let story = Story::begin();
    let ran = add("viaiface", &lun.source(), &["--iface", "lab1"]);
    assert!(ran.stderr.contains("default, iser"), "it names those that there are: {ran:?}");
    refused(ran, "IFACE_NOT_FOUND");
    story.nothing_left();

    sh("iscsiadm -m iface -I lab1 -o new").ok();
    let story = Story::begin();
    add("viaiface", &lun.source(), &["--iface", "lab1"]).ok();
    assert_eq!(volume("viaiface")["device"]["wwid"], lun.wwid.as_str());
    assert_eq!(sh("cat /sys/class/iscsi_session/*/ifacename").ok(), "lab1\nlab1\n");
    // A name of its own, on top of that iface's settings.
    let own = Lun::new("viaboth", 4, "16M");
    add("viaboth", &own.source(), &["--iface", "lab1", "--initiator-name", NAME]).ok();
    assert_eq!(
        sh(&format!("grep -lx {NAME} /sys/class/iscsi_session/*/initiatorname | wc -l")).ok(),
        "2\n"
    );
    remove("viaboth", &[]).ok();
    remove("viaiface", &[]).ok();
    story.nothing_left();
    drop(own);
    sh("iscsiadm -m iface -I lab1 -o delete").ok();
}
