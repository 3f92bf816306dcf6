//! Other places where a VM can be: a pod run by runc, a plain libvirt host.

use crate::agent;
use crate::node::{Lab, Lun, Story, lunplug, sh, until};

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

const DEFINED: &str = "
<domain type='qemu'><name>defined</name><memory unit='MiB'>128</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<controller type='scsi' model='virtio-scsi'/><memballoon model='none'/>
<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
<source dev='/dev/lunplug/default_defined/data'/><target dev='sda' bus='scsi'/><serial>data</serial>
<alias name='ua-lunplug-data'/></disk></devices></domain>";

/// The hook is there while the story is told, and so is the domain.
struct Hooked;

impl Hooked {
    #[track_caller]
    fn new() -> Self {
        let hook = Self;
        std::fs::write("/tmp/defined.xml", DEFINED).expect("/tmp is writable");
        sh("install -D -m 755 /opt/lunplug/dist/libvirt-hook /etc/libvirt/hooks/qemu.d/lunplug
            systemctl restart libvirtd
            virsh -q -c qemu:///system define /tmp/defined.xml")
        .ok();
        hook
    }
}

impl Drop for Hooked {
    fn drop(&mut self) {
        sh("virsh -q -c qemu:///system destroy defined || true
            virsh -q -c qemu:///system undefine defined
            rm -r /etc/libvirt/hooks/qemu.d; systemctl restart libvirtd");
    }
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_domain_of_the_hosts_starts_with_the_disk_of_its_definition() {
    Lab::get();
    let lun = Lun::new("hook1", 3, "16M");
    let hooked = Hooked::new();
    let start = || sh("virsh -q -c qemu:///system start defined");
    lunplug(&["vm", "register", "defined", "--host", "--domain", "defined"]).ok();
    let story = Story::begin();
    let unknown = start().fails();
    assert!(unknown.stderr.contains("has no volume for disk data"), "{unknown:?}");

    lunplug(&["addvolume", "defined", "--volume-name", "data", "--source", &lun.source()]).ok();
    let is = |phase: &str| {
        let told = lunplug(&["describe", "defined", "data", "-o", "json"]).ok();
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        told["phase"] == phase
    };
    let long = std::time::Duration::from_secs(60);
    for _ in 0..2 {
        start().ok();
        until("lunplug knows the disk as the volume's", long, || is("Ready"));
        let shown = "virsh -q -c qemu:///system dumpxml defined | grep -c '<disk '";
        assert_eq!(sh(shown).ok().trim(), "1");
        // It is this LUN that QEMU has.
        let qemu = "cat /run/libvirt/qemu/defined.pid";
        let number =
            format!("stat -c %Hr:%Lr /proc/$({qemu})/root/dev/lunplug/default_defined/data");
        assert_eq!(sh(&number).ok(), sh("stat -c %Hr:%Lr /dev/lunplug/default_defined/data").ok());
        sh("virsh -q -c qemu:///system destroy defined").ok();
        let gone = || sh("test -e /dev/lunplug/default_defined/data").code != 0;
        until("its node is gone", long, || gone() && is("Pending"));
    }

    println!("a LUN that does not come keeps the domain from starting");
    sh(&format!("target lun unmap {}", lun.name)).ok();
    let failed = start().fails();
    assert!(failed.stderr.contains("LUN_NOT_FOUND"), "{failed:?}");
    lunplug(&["removevolume", "defined", "--volume-name", "data"]).ok();
    // It was tried again, and a login that was under way then is undone when it ends.
    until("no session is left", long, || sh("iscsiadm -m session").code != 0);
    until("no record is left", long, || sh("iscsiadm -m node").code != 0);
    story.nothing_left();
    lunplug(&["vm", "unregister", "defined"]).ok();
    drop(hooked);
}
