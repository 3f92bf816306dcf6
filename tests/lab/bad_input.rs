//! What is wrong is refused with a code of its own, and leaves nothing behind.

use std::time::Duration;

use crate::node::{
    DOMAIN, Lab, Lun, Story, VM, add, guest_disks, guest_has, iqn, lunplug, refused, sh, source_of,
    until, virsh,
};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn each_wrong_source_has_its_own_code() {
    Lab::get();
    let story = Story::begin();
    let iqn = iqn();
    let cases = [
        ("iscsi://127.0.0.2/iqn.26-1.wrong/1".to_owned(), "INVALID_IQN"),
        (format!("iscsi://127.0.0.2:99999/{iqn}/1"), "INVALID_PORTAL"),
        (format!("iscsi://127.0.0.2/{iqn}/16384"), "INVALID_LUN"),
        ("tape://x".to_owned(), "INVALID_SOURCE"),
        (source_of(99), "LUN_NOT_FOUND"),
        (format!("iscsi://127.0.0.2:3260/{iqn}.unknown/1"), "TARGET_NOT_FOUND"),
    ];
    for (source, code) in cases {
        println!("{source}: {code}");
        refused(add("bad", &source, &[]), code);
        story.nothing_left();
    }
    guest_has(0);
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_portal_that_refuses_is_told_and_can_be_given_up() {
    Lab::get();
    let story = Story::begin();
    let iqn = iqn();
    let source = format!("iscsi://127.0.0.9:3260/{iqn}/1");
    refused(add("bad", &source, &["--timeout", "60s"]), "PORTAL_UNREACHABLE");
    crate::node::remove("bad", &[]).ok();
    // iscsid goes on with the login that was called off; what it needed goes when that ends.
    until("nothing of it is left", Duration::from_secs(90), || story.is_clean());
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn wrong_names_and_serials_are_refused() {
    Lab::get();
    let lun = Lun::new("names", 1, "16M");
    let story = Story::begin();
    let source = lun.source();
    refused(add("Wrong_Name", &source, &[]), "INVALID_NAME");
    refused(add("data", &source, &["--serial", "has space"]), "INVALID_SERIAL");
    refused(add("data", &source, &["--serial", &"x".repeat(37)]), "INVALID_SERIAL");
    refused(
        add("data", &source, &["--serial", &"x".repeat(21), "--bus", "virtio"]),
        "INVALID_SERIAL",
    );
    let unknown = ["addvolume", "nobody", "--volume-name", "data", "--source", &source];
    refused(lunplug(&unknown), "VM_NOT_FOUND");
    refused(lunplug(&["removevolume", VM, "--volume-name", "nothing"]), "VOLUME_NOT_FOUND");
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_serial_of_somebody_elses_disk_is_refused_and_the_disk_not_removed() {
    let lab = Lab::get();
    let lun = Lun::new("theirs", 2, "16M");
    let story = Story::begin();
    let image = format!("{}/theirs.img", lab.hotplug_dir());
    sh(&format!("truncate -s 16M {image} && chmod 666 {image}")).ok();
    let xml = "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/run/kubevirt/hotplug-disks/theirs.img'/><target dev='sdq' bus='scsi'/><address type='drive' controller='0' bus='0' target='200' unit='0'/><serial>data</serial><alias name='ua-theirs'/></disk>";
    std::fs::write("/tmp/theirs.xml", xml).expect("/tmp is writable");
    virsh(&["attach-device", DOMAIN, "/tmp/theirs.xml"]).ok();
    refused(add("data", &lun.source(), &[]), "SERIAL_IN_USE");
    refused(lunplug(&["removevolume", VM, "--volume-name", "theirs"]), "NOT_HOTPLUGGED");
    guest_has(1);
    virsh(&["detach-device-alias", DOMAIN, "ua-theirs"]).ok();
    crate::node::until("it is gone", std::time::Duration::from_secs(20), || {
        guest_disks().is_empty()
    });
    sh(&format!("rm {image}")).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn what_a_pod_plants_in_its_directory_is_never_followed() {
    let lab = Lab::get();
    let lun = Lun::new("planted", 3, "16M");
    let story = Story::begin();
    let node = format!("{}/planted", lab.hotplug_dir());
    // A symlink to a file of the host's where the node belongs: replaced, the file untouched.
    sh("echo precious >/root/precious; chmod 600 /root/precious").ok();
    sh(&format!("ln -s /root/precious {node}")).ok();
    add("planted", &lun.source(), &[]).ok();
    assert_eq!(sh("cat /root/precious; stat -c %a:%u /root/precious").ok(), "precious\n600:0\n");
    crate::node::remove("planted", &[]).ok();
    // A directory cannot be replaced without deleting what is in it.
    sh(&format!("mkdir {node}; touch {node}/file")).ok();
    refused(add("planted", &lun.source(), &[]), "NODE_REFUSED");
    sh(&format!("rm -r {node}")).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_planted_socket_does_not_lead_to_the_hosts_libvirt() {
    let lab = Lab::get();
    let story = Story::begin();
    let runtime = format!(
        "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~empty-dir/libvirt-runtime",
        lab.uid()
    );
    sh(&format!("mv {runtime}/libvirt-sock {runtime}/away; ln -s /run/libvirt/libvirt-sock {runtime}/libvirt-sock")).ok();
    let planted =
        lunplug(&["vm", "register", "planted", "--pod-uid", lab.uid(), "--domain", DOMAIN]);
    sh(&format!("mv -f {runtime}/away {runtime}/libvirt-sock")).ok();
    refused(planted, "SOCKET_UNTRUSTED");
    refused(
        lunplug(&["vm", "register", "escape", "--pod-uid", "../../../etc", "--domain", DOMAIN]),
        "INVALID_OPTION",
    );
    let gone = "00000000-0000-4000-8000-000000000000";
    refused(
        lunplug(&["vm", "register", "gone", "--pod-uid", gone, "--domain", DOMAIN]),
        "POD_GONE",
    );
    story.nothing_left();
}
