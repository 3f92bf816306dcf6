//! Many disks of one guest at once.

use std::time::Duration;

use crate::batch::sync;
use crate::node::{Lab, Lun, Story, VM, guest_disks, guest_has, nightly, until, vm_info};

/// 75 in the long run, some else: as many as KubeVirt's users ask for at once.
#[test]
#[ignore = "runs in the lab: hack/test"]
fn many_disks_at_once_are_all_there_in_the_guest() {
    Lab::get();
    let many = if nightly() { 75 } else { 12 };
    let luns: Vec<Lun> = (1..=many).map(|n| Lun::new(&format!("many{n}"), n, "8M")).collect();
    let story = Story::begin();
    let first = vm_info(VM)["revision"].as_u64().expect("a number") + 1;
    let set: Vec<_> = luns.iter().map(|lun| (lun.name.as_str(), 2, lun)).collect();
    sync(first, &set, &[]).ok();
    // A burst of plugs may be more than virtio-scsi's queue of events holds.
    until("the guest has all of them", Duration::from_secs(60), || {
        guest_disks().len() == luns.len()
    });
    let mut serials: Vec<String> = guest_disks().into_iter().map(|disk| disk.serial).collect();
    serials.sort();
    let mut names: Vec<String> = luns.iter().map(|lun| lun.name.clone()).collect();
    names.sort();
    assert_eq!(serials, names);
    sync(first + 1, &[], &[]).ok();
    guest_has(0);
    story.nothing_left();
}
