//! How a disk is run, as the guest and libvirt see it.

use crate::node::{
    DOMAIN, GuestDisk, Lab, Lun, Story, VM, add, guest_disk, guest_disks, guest_has, in_guest,
    lunplug, refused, remove, sh, until, virsh, volume,
};
use crate::san::SOON;

/// A limit of a disk as libvirt asks QEMU for it.
#[track_caller]
fn limit(target: &str, name: &str) -> u64 {
    let told = virsh(&["blkdeviotune", DOMAIN, target]).ok();
    let line = told.lines().find(|line| line.split(':').next().map(str::trim) == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in {told}"));
    line.split(':').nth(1).expect("a value").trim().parse().expect("a number")
}

/// The target name of a volume's disk.
#[track_caller]
fn target(name: &str) -> String {
    volume(name)["target"].as_str().expect("it has one").to_owned()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn block_sizes_and_discard_are_what_the_guest_sees() {
    Lab::get();
    let luns =
        [Lun::new("small", 1, "16M"), Lun::new("large", 2, "32M"), Lun::new("pci", 3, "48M")];
    let story = Story::begin();
    refused(
        add("small", &luns[0].source(), &["--io", "native", "--cache", "writeback"]),
        "INVALID_OPTION",
    );
    refused(add("small", &luns[0].source(), &["--logical-block-size", "1000"]), "INVALID_OPTION");
    add("small", &luns[0].source(), &["--io", "threads", "--discard", "ignore"]).ok();
    add("large", &luns[1].source(), &["--physical-block-size", "4096"]).ok();
    let pci = ["--bus", "virtio", "--logical-block-size", "4096", "--detect-zeroes", "unmap"];
    add("pci", &luns[2].source(), &pci).ok();
    let queue = |serial: &str, file: &str| {
        let disk = guest_disk(serial).name;
        in_guest(&format!("cat /sys/block/{disk}/queue/{file}")).ok().trim().to_owned()
    };
    for (serial, logical, physical) in
        [("small", "512", "512"), ("large", "512", "4096"), ("pci", "4096", "4096")]
    {
        assert_eq!(queue(serial, "logical_block_size"), logical, "{serial}");
        assert_eq!(queue(serial, "physical_block_size"), physical, "{serial}");
    }
    let xml = virsh(&["dumpxml", DOMAIN]).ok();
    for part in ["io='threads' discard='ignore'", "detect_zeroes='unmap'"] {
        assert!(xml.contains(part), "{part} in {xml}");
    }
    // Data get through whatever the sizes.
    for serial in ["small", "large", "pci"] {
        let disk = guest_disk(serial).name;
        let line = format!("printf %-4096s {serial} | dd of=/dev/{disk} bs=4096 oflag=direct");
        in_guest(&line).ok();
    }
    for (lun, serial) in luns.iter().zip(["small", "large", "pci"]) {
        assert!(lun.read(8).starts_with(serial.as_bytes()), "{serial}");
    }
    for name in ["small", "large", "pci"] {
        remove(name, &[]).ok();
    }
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn limits_come_with_the_disk_change_while_it_is_used_and_are_put_back() {
    Lab::get();
    let lun = Lun::new("limited", 4, "16M");
    let story = Story::begin();
    for bus in ["scsi", "virtio"] {
        let iops = ["--bus", bus, "--total-iops", "200", "--read-bytes", "10Mi"];
        add("limited", &lun.source(), &iops).ok();
        let at = target("limited");
        assert_eq!(limit(&at, "total_iops_sec"), 200);
        assert_eq!(limit(&at, "read_bytes_sec"), 10 << 20);
        let set = |more: &[&str]| {
            lunplug(&[&["iolimits", VM, "--volume-name", "limited"][..], more].concat())
        };
        set(&["--total-bytes", "20Mi", "--write-iops", "50"]).ok();
        assert_eq!((limit(&at, "total_iops_sec"), limit(&at, "write_iops_sec")), (0, 50));
        assert_eq!((limit(&at, "total_bytes_sec"), limit(&at, "read_bytes_sec")), (20 << 20, 0));
        assert!(
            set(&["--total-bytes", "20Mi", "--write-iops", "50"]).stderr.contains("nothing to do")
        );
        refused(set(&["--total-iops", "5", "--read-iops", "5"]), "INVALID_OPTION");
        // Somebody else's change lasts until the daemon looks; asking again looks at once.
        virsh(&["blkdeviotune", DOMAIN, &at, "--write-iops-sec", "7", "--live"]).ok();
        set(&["--total-bytes", "20Mi", "--write-iops", "50"]).ok();
        assert_eq!(limit(&at, "write_iops_sec"), 50);
        set(&["--unlimited"]).ok();
        assert_eq!((limit(&at, "total_bytes_sec"), limit(&at, "write_iops_sec")), (0, 0));
        let disk = guest_disk("limited").name;
        in_guest(&format!("dd if=/dev/{disk} of=/dev/null bs=64k count=4 iflag=direct")).ok();
        remove("limited", &[]).ok();
        guest_has(0);
    }
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_lun_is_passed_through_and_the_guest_is_asked_about_it() {
    Lab::get();
    let lun = Lun::new("passed", 5, "24M");
    let story = Story::begin();
    refused(
        add("passed", &lun.source(), &["--disk-type", "lun", "--bus", "virtio"]),
        "INVALID_OPTION",
    );
    refused(
        add("passed", &lun.source(), &["--disk-type", "lun", "--persistent-reservations"]),
        "UNSUPPORTED",
    );
    add("passed", &lun.source(), &["--disk-type", "lun"]).ok();
    // Its serial is the array's.
    let ours = |disk: &GuestDisk| disk.bytes == 24 << 20;
    until("the guest has the LUN", SOON, || guest_disks().iter().any(ours));
    let disk = guest_disks().into_iter().find(ours).expect("it was waited for").name;
    let inquiry = in_guest(&format!("cat /sys/block/{disk}/device/vendor")).ok();
    assert_eq!(inquiry.trim(), "LIO-ORG");
    let wwid = in_guest(&format!("cat /sys/block/{disk}/device/wwid")).ok();
    assert_eq!(wwid.trim(), lun.wwid);
    let write = format!("printf %-512s through | dd of=/dev/{disk} bs=512 oflag=direct");
    in_guest(&write).ok();
    assert!(lun.read(7).starts_with(b"through"));
    in_guest(&format!("mkfs.ext4 -q -F /dev/{disk} && mkdir -p /mnt && mount /dev/{disk} /mnt"))
        .ok();
    refused(remove("passed", &[]), "IN_USE_BY_GUEST");
    in_guest("umount /mnt").ok();
    remove("passed", &[]).ok();
    guest_has(0);
    story.nothing_left();
}

/// The ids of the domain's I/O threads, as QEMU has them.
#[track_caller]
fn io_threads() -> Vec<u32> {
    let told = virsh(&["iothreadinfo", DOMAIN]).ok();
    told.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_disk_has_an_io_thread_of_its_own_that_goes_with_it() {
    Lab::get();
    let luns = [Lun::new("own", 6, "16M"), Lun::new("other", 7, "16M")];
    let story = Story::begin();
    refused(add("own", &luns[0].source(), &["--dedicated-io-thread"]), "INVALID_OPTION");
    // Somebody else's, which must be there in the end.
    virsh(&["iothreadadd", DOMAIN, "1", "--live"]).ok();
    for (name, lun) in ["own", "other"].into_iter().zip(&luns) {
        add(name, &lun.source(), &["--bus", "virtio", "--dedicated-io-thread"]).ok();
    }
    let threads = io_threads();
    assert_eq!(threads.len(), 3, "{threads:?}");
    let xml = virsh(&["dumpxml", DOMAIN]).ok();
    for id in threads.iter().filter(|id| **id != 1) {
        assert!(xml.contains(&format!("iothread='{id}'")), "{id} in {xml}");
    }
    let disk = guest_disk("own").name;
    in_guest(&format!("printf %-512s threaded | dd of=/dev/{disk} bs=512 oflag=direct")).ok();
    assert!(luns[0].read(8).starts_with(b"threaded"));
    // Killed and started anew, it knows which thread is whose.
    sh("systemctl kill -s KILL lunplugd; systemctl start lunplugd").ok();
    remove("own", &[]).ok();
    assert_eq!(io_threads().len(), 2);
    in_guest(&format!("dd if=/dev/{} of=/dev/null bs=64k count=4", guest_disk("other").name)).ok();
    remove("other", &[]).ok();
    assert_eq!(io_threads(), [1]);
    virsh(&["iothreaddel", DOMAIN, "1", "--live"]).ok();
    guest_has(0);
    story.nothing_left();
}
