//! What a guest sees when all paths of its disk are gone, by the disk's error policy.

use std::time::Duration;

use crate::node::{
    Configured, DOMAIN, Lab, Lun, Story, VM, add, guest_disk, in_guest, remove, sh, until, virsh,
    vm_info, volume,
};

const LONG: Duration = Duration::from_secs(60);
const POLICIES: [&str; 4] = ["stop", "report", "ignore", "enospace"];

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_dead_path_is_given_to_the_guest_as_the_policy_says() {
    Lab::get();
    let luns: Vec<Lun> =
        (1..).zip(POLICIES).map(|(n, policy)| Lun::new(policy, n, "16M")).collect();
    let story = Story::begin();
    let short = Configured::with(&[
        "iscsi.replacement_timeout_single=2s",
        "iscsi.noop_interval=1s",
        "iscsi.noop_timeout=1s",
    ]);
    for (policy, lun) in POLICIES.iter().zip(&luns) {
        let source = lun.source().replace("127.0.0.2:3260,", "");
        // A map of one path would queue for as long as multipath.conf says.
        add(policy, &source, &["--error-policy", policy, "--multipath", "off"]).ok();
        assert_eq!(volume(policy)["spec"]["error_policy"], *policy);
    }
    let write = |policy: &str| {
        let disk = guest_disk(policy).name;
        format!("echo lunplug-{policy} | dd of=/dev/{disk} bs=512 count=1 conv=sync oflag=direct")
    };
    let writes: Vec<String> = POLICIES.iter().map(|policy| write(policy)).collect();
    let [stop, report, ignore, enospace] = writes.try_into().expect("four");
    sh("target portal drop 127.0.0.3").ok();
    let told = in_guest(&report).fails();
    assert!(told.stderr.contains("Input/output error"), "{}", told.stderr);
    let told = in_guest(&enospace).fails();
    assert!(told.stderr.contains("Input/output error"), "{}", told.stderr);
    // The guest believes that it wrote.
    in_guest(&ignore).ok();

    // Not by in_guest, which waits for the end: the guest is paused by then.
    let line = format!("{stop} && touch /tmp/wrote");
    let arguments = serde_json::json!({"path": "/bin/sh", "arg": ["-c", line]});
    let exec = serde_json::json!({"execute": "guest-exec", "arguments": arguments}).to_string();
    in_guest("rm -f /tmp/wrote").ok();
    virsh(&["qemu-agent-command", DOMAIN, &exec]).ok();
    until("the guest is paused", LONG, || {
        virsh(&["domstate", DOMAIN, "--reason"]).stdout.contains("paused (I/O error)")
    });
    let vm = vm_info(VM);
    assert_eq!((&vm["state"], &vm["reason"]), (&"running".into(), &"VM_PAUSED_IO_ERROR".into()));
    sh("target portal restore 127.0.0.3").ok();
    until("the session is back", LONG, || {
        sh("grep -qx LOGGED_IN /sys/class/iscsi_session/session*/state").code == 0
    });
    // lunplug does not resume it, and does not forget it.
    assert!(virsh(&["domstate", DOMAIN]).stdout.contains("paused"));
    virsh(&["resume", DOMAIN]).ok();
    until("the write is done", LONG, || in_guest("test -e /tmp/wrote").code == 0);
    assert!(luns[0].read(12).starts_with(b"lunplug-stop"));
    assert!(luns[2].read(12).iter().all(|&b| b == 0), "what was ignored was not written");
    assert_eq!(vm_info(VM)["reason"], "");
    for policy in POLICIES {
        remove(policy, &[]).ok();
    }
    drop(short);
    story.nothing_left();
}
