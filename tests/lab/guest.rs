//! What the guest does with its disk is the guest's: the host looks away, and asks before it takes.

use std::time::Duration;

use crate::node::{
    Configured, DOMAIN, Lab, Lun, POD, Story, add, guest_disk, guest_disks, guest_has, in_guest,
    refused, remove, run, sh, snapshot, until, virsh, volume,
};

#[test]
#[ignore = "runs in the lab: hack/test"]
fn the_host_activates_nothing_of_what_the_guest_writes() {
    Lab::get();
    let (lvm, table) = (Lun::new("lvm", 1, "64M"), Lun::new("table", 2, "64M"));
    let story = Story::begin();
    add("lvm", &lvm.source(), &[]).ok();
    add("table", &table.source(), &[]).ok();
    let attached = snapshot();
    let (a, b) = (guest_disk("lvm").name, guest_disk("table").name);
    in_guest(&format!("pvcreate -q /dev/{a} && vgcreate -q guestvg /dev/{a} && lvcreate -q -n lv -l 100%FREE guestvg && vgchange -q -an guestvg")).ok();
    in_guest(&format!("printf 'label: gpt\\n,16M\\n,\\n' | sfdisk -q /dev/{b}")).ok();
    sh("udevadm settle").ok();
    assert_eq!(snapshot(), attached, "the host has new maps or volume groups");
    for round in 1..=2 {
        remove("lvm", &[]).ok();
        remove("table", &[]).ok();
        story.nothing_left();
        // Devices appear with the guest's metadata on them: the moment at which hosts used to bite.
        add("lvm", &lvm.source(), &[]).ok();
        add("table", &table.source(), &[]).ok();
        sh("udevadm settle").ok();
        assert_eq!(snapshot(), attached, "round {round}: the host has new maps or volume groups");
        let partitions = sh("ls -d /sys/block/sd*/*/partition 2>/dev/null || true").ok();
        assert_eq!(partitions, "", "round {round}: the guest's partitions are devices of the host");
        let b = guest_disk("table").name;
        in_guest(&format!("test -b /dev/{b}2")).ok();
    }
    remove("lvm", &[]).ok();
    remove("table", &[]).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_mounted_disk_is_not_taken_unless_forced() {
    Lab::get();
    let lun = Lun::new("mounted", 3, "64M");
    let story = Story::begin();
    add("mounted", &lun.source(), &[]).ok();
    let disk = guest_disk("mounted").name;
    in_guest(&format!("mkfs.ext4 -q -F /dev/{disk} && mkdir -p /mnt && mount /dev/{disk} /mnt"))
        .ok();
    let ran = remove("mounted", &[]).fails();
    assert!(
        ran.stderr.contains("IN_USE_BY_GUEST") && ran.stderr.contains("/mnt"),
        "{}",
        ran.stderr
    );
    in_guest("echo still here >/mnt/file && sync && cat /mnt/file").ok();
    assert_eq!(volume("mounted")["phase"], "Ready");

    in_guest("umount /mnt").ok();
    remove("mounted", &[]).ok();
    story.nothing_left();

    add("mounted", &lun.source(), &[]).ok();
    let disk = guest_disk("mounted").name;
    in_guest(&format!("mount /dev/{disk} /mnt && cat /mnt/file")).ok();
    let forced = remove("mounted", &["--force", "-o", "json"]).ok();
    let gone: serde_json::Value = serde_json::from_str(&forced).expect("JSON");
    assert!(gone["gave_up"][0].to_string().contains("/mnt"), "{gone}");
    in_guest("umount -l /mnt || true").ok();
    guest_has(0);
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_silent_guest_on_virtio_keeps_its_disk() {
    Lab::get();
    let lun = Lun::new("silent", 4, "16M");
    let story = Story::begin();
    add("silent", &lun.source(), &["--bus", "virtio", "--serial", "Virtio-Case"]).ok();
    let disk = guest_disk("Virtio-Case");
    assert_eq!(disk.bytes, 16 << 20);
    run("guest", &["hotplug", POD, DOMAIN, "off"]).ok();
    let waited = remove("silent", &["--timeout", "15s"]).fails();
    println!("told while waiting: {}", waited.stderr.trim());
    until("the reason is told", Duration::from_secs(60), || {
        volume("silent")["trouble"]["reason"] == "DETACH_UNACKNOWLEDGED"
    });
    assert_eq!(volume("silent")["phase"], "Detaching");
    in_guest(&format!("dd if=/dev/{} of=/dev/null bs=64k count=1 iflag=direct", disk.name)).ok();
    run("guest", &["hotplug", POD, DOMAIN, "on"]).ok();
    // The guest lost the request while it was silent; lunplug makes it again by itself.
    until("the volume is gone", Duration::from_secs(180), || guest_disks().is_empty());
    until("nothing of it is left", Duration::from_secs(30), || story.is_clean());
    refused(remove("silent", &[]), "VOLUME_NOT_FOUND");
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn without_an_agent_nothing_is_taken_unless_forced() {
    Lab::get();
    let lun = Lun::new("agentless", 6, "16M");
    let story = Story::begin();
    let short = Configured::with(&["deadlines.agent=3s"]);
    add("agentless", &lun.source(), &[]).ok();
    // The agent's process is stopped, not ended, so that it can go on afterwards.
    virsh(&[
        "qemu-agent-command",
        DOMAIN,
        r#"{"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c","(sleep 40; kill -CONT $(pidof qemu-ga)) >/dev/null 2>&1 & kill -STOP $(pidof qemu-ga)"]}}"#,
    ]);
    // It answers that before it is done.
    let ping = ["qemu-agent-command", "--timeout", "2", DOMAIN, r#"{"execute":"guest-ping"}"#];
    until("the agent is silent", Duration::from_secs(20), || virsh(&ping).code != 0);
    refused(remove("agentless", &[]), "GUEST_UNPROVEN");
    until("the agent answers again", Duration::from_secs(120), || in_guest("true").code == 0);
    assert_eq!(volume("agentless")["phase"], "Ready");
    drop(short);
    remove("agentless", &[]).ok();
    story.nothing_left();
}
