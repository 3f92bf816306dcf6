//! Other places where a VM can be: a pod run by runc, a plain libvirt host.

use crate::agent;
use crate::node::{Lab, Lun, Story, lunplug, sh};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_pod_run_by_runc_works_alike() {
    Lab::get();
    let lun = Lun::new("runc1", 1, "16M");
    sh("pod up other --runtime runc && guest up other default_other").ok();
    let uid = sh("pod info other | jq -r .uid").ok();
    lunplug(&["vm", "register", "other", "--pod-uid", uid.trim(), "--domain", "default_other"])
        .ok();
    let story = Story::begin();
    lunplug(&["addvolume", "other", "--volume-name", "data", "--source", &lun.source()]).ok();
    agent::has("other", "default_other", &format!("{} data", 16 << 20));
    let read = "pod exec other dd if=/run/kubevirt/hotplug-disks/data of=/dev/null bs=512 count=1";
    sh(&format!("pod update other && {read}")).ok();
    lunplug(&["removevolume", "other", "--volume-name", "data"]).ok();
    story.nothing_left();
    lunplug(&["vm", "unregister", "other"]).ok();
    sh("guest down other default_other; pod down other").ok();
}

const PLAIN: &str = "
<domain type='qemu'><name>plain</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<controller type='scsi' model='virtio-scsi'/><memballoon model='none'/></devices></domain>";

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_plain_libvirt_host_works_without_a_pod() {
    Lab::get();
    let lun = Lun::new("plain1", 2, "16M");
    std::fs::write("/tmp/plain.xml", PLAIN).expect("/tmp is writable");
    sh("virsh -q -c qemu:///system create /tmp/plain.xml").ok();
    lunplug(&["vm", "register", "plain", "--host", "--domain", "plain"]).ok();
    let story = Story::begin();
    lunplug(&["addvolume", "plain", "--volume-name", "data", "--source", &lun.source()]).ok();
    let xml = sh("virsh -q -c qemu:///system dumpxml plain").ok();
    assert!(xml.contains("ua-lunplug-data"), "{xml}");
    // No operating system runs in it, so nobody can say whether it uses the disk.
    crate::node::refused(
        lunplug(&["removevolume", "plain", "--volume-name", "data"]),
        "GUEST_UNPROVEN",
    );
    lunplug(&["removevolume", "plain", "--volume-name", "data", "--force"]).ok();
    story.nothing_left();
    lunplug(&["vm", "unregister", "plain"]).ok();
    sh("virsh -q -c qemu:///system destroy plain").ok();
}
