//! What was made is damaged behind lunplugd's back, by the system's own tools, and comes back by itself.

use std::time::Duration;

use crate::node::{
    DOMAIN, Lab, Lun, Story, add, guest_disk, guest_disks, in_guest, lunplug, open_in_pod, refused,
    remove, run, sh, until, virsh, volume,
};

const LONG: Duration = Duration::from_secs(60);

/// lunplugd looks every two seconds, until this is dropped.
struct Often;

impl Often {
    fn set() -> Self {
        sh("mkdir -p /run/systemd/system/lunplugd.service.d
            printf '[Service]\\nEnvironment=LUNPLUG_RECONCILE_INTERVAL=2s\\n' \
                > /run/systemd/system/lunplugd.service.d/often.conf
            systemctl daemon-reload && systemctl restart lunplugd")
        .ok();
        Self
    }
}

impl Drop for Often {
    fn drop(&mut self) {
        sh("rm -f /run/systemd/system/lunplugd.service.d/often.conf
            systemctl daemon-reload && systemctl restart lunplugd");
    }
}

/// The volume is ready, with two paths and no trouble.
fn is_well(name: &str) -> bool {
    let told = volume(name);
    told["phase"] == "Ready" && told["trouble"].is_null() && told["device"]["paths"] == 2
}

fn paths() -> String {
    sh("multipathd show paths format '%d %t' | grep -c active || true").ok().trim().to_owned()
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn what_was_taken_away_comes_back() {
    let lab = Lab::get();
    let lun = Lun::new("heal1", 1, "16M");
    let _often = Often::set();
    let story = Story::begin();
    add("heal", &lun.source(), &[]).ok();
    until("all is well", LONG, || is_well("heal"));
    let dev = volume("heal")["device"]["dev"].as_str().expect("a number").to_owned();
    let node = format!("{}/heal", lab.hotplug_dir());
    let is_node = || sh(&format!("test -b {node}")).code == 0 && open_in_pod("heal").code == 0;

    println!("the node is deleted, then replaced by a file, a symlink, another device");
    for damage in [
        format!("rm {node}"),
        format!("rm {node}; echo x > {node}"),
        format!("ln -sf /dev/vda {node}"),
        format!("rm {node}; mknod {node} b 1 1"),
    ] {
        sh(&damage).ok();
        until("the node is back", LONG, is_node);
        let stat = sh(&format!("stat -c '%Hr:%Lr %a' {node}")).ok();
        assert_eq!(stat.trim(), format!("{dev} 600"), "{damage}");
    }

    println!("the grant is deleted");
    sh("key=$(bpftool -j map dump name lunplug_grants | jq -r '.[0].key | join(\" \")')
        bpftool map delete name lunplug_grants key hex ${key//0x/}")
    .ok();
    open_in_pod("heal").fails();
    until("the grant is back", LONG, || open_in_pod("heal").code == 0);

    println!("a path is deleted");
    sh("echo 1 > /sys/block/$(multipathd show paths raw format '%d' | head -1)/device/delete").ok();
    until("one path is gone", LONG, || paths() == "1");
    until("the path is back", LONG, || is_well("heal") && paths() == "2");

    println!("a session is logged out");
    sh("iscsiadm -m node -p 127.0.0.3:3260 --logout").ok();
    until("the session is back", LONG, || is_well("heal") && paths() == "2");
    assert_eq!(volume("heal")["device"]["dev"], dev.as_str(), "still the same map");

    println!("the disk is detached by virsh");
    virsh(&["detach-device-alias", DOMAIN, "ua-lunplug-heal", "--live"]).ok();
    until("the disk is back", LONG, || guest_disks().iter().any(|d| d.serial == "heal"));
    let disk = guest_disk("heal");
    in_guest(&format!("dd if=/dev/{} of=/dev/null bs=64k count=4 iflag=direct", disk.name)).ok();
    until("all is well", LONG, || is_well("heal"));
    remove("heal", &[]).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_dead_portal_is_told_and_so_is_that_it_is_back() {
    Lab::get();
    let lun = Lun::new("heal2", 2, "16M");
    let _often = Often::set();
    let story = Story::begin();
    add("dead", &lun.source(), &[]).ok();
    until("all is well", LONG, || is_well("dead"));
    sh("target portal drop 127.0.0.3").ok();
    until("it is told", LONG, || volume("dead")["trouble"]["reason"] == "PATHS_DEGRADED");
    let told = volume("dead");
    assert_eq!((&told["phase"], &told["device"]["paths"]), (&"Ready".into(), &1.into()), "{told}");
    sh("target portal restore 127.0.0.3").ok();
    until("all is well", LONG * 2, || is_well("dead"));
    remove("dead", &[]).ok();
    story.nothing_left();
}

#[test]
#[ignore = "runs in the lab: hack/test"]
fn a_new_pod_of_the_same_vm_gets_its_volumes() {
    Lab::get();
    let luns: Vec<Lun> = (3..=5).map(|n| Lun::new(&format!("heal{n}"), n, "16M")).collect();
    let story = Story::begin();
    let uid = |pod: &str| sh(&format!("pod info {pod} | jq -r .uid")).ok().trim().to_owned();
    let register = |pod: &str| {
        lunplug(&["vm", "register", "moves", "--pod-uid", &uid(pod), "--domain", "default_moves"])
    };
    sh("pod up first && guest up first default_moves").ok();
    register("first").ok();
    for (name, lun) in ["zeta", "alpha", "mu"].iter().zip(&luns) {
        let source = lun.source();
        lunplug(&["addvolume", "moves", "--volume-name", name, "--source", &source]).ok();
    }
    let disks = |pod: &str| {
        run("pod", &["virsh", pod, "domblklist", "default_moves", "--details"])
            .stdout
            .lines()
            .filter(|line| line.contains("hotplug-disks"))
            .map(|line| line.split_whitespace().skip(2).collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    };
    let before = disks("first");
    assert_eq!(before.len(), 3, "{before:?}");

    sh("pod up second").ok();
    refused(register("second"), "VM_EXISTS");
    sh("pod down first; guest up second default_moves").ok();
    register("second").ok();
    until("the volumes are in the new pod", LONG * 2, || disks("second").len() == 3);
    assert_eq!(disks("second"), before, "the same targets in the same order");
    let grants = sh("bpftool -j map dump name lunplug_grants | jq length").ok();
    assert_eq!(grants.trim(), "3", "none of the old pod's");
    for name in ["zeta", "alpha", "mu"] {
        lunplug(&["removevolume", "moves", "--volume-name", name, "--timeout", "60s"]).ok();
    }
    lunplug(&["vm", "unregister", "moves"]).ok();
    sh("guest down second default_moves; pod down second").ok();
    story.nothing_left();
}
