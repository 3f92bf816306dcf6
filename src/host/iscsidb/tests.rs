//! The real database, in directories of its own.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;
use crate::types::{Chap, Iqn, Portal};

const IQN: &str = "iqn.2026-01.example.array:t1";

fn put(dir: &Path, path: &str, text: &str) {
    let file = dir.join(IQN).join(path);
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, text).unwrap();
}

#[tokio::test]
async fn both_layouts_are_read_and_corrupt_records_known() {
    let dir = tempfile::tempdir().unwrap();
    let whole = format!("# BEGIN RECORD 2.1.11\nnode.name = {IQN}\n# END RECORD\n");
    put(dir.path(), "127.0.0.3,3260,1/default", "");
    put(dir.path(), "127.0.0.3,3260,1/iface0", &whole);
    put(dir.path(), "127.0.0.2,3260", &whole);
    put(dir.path(), "fd00::1,3261,-1/default", "node.name = \nnode.tpgt = 1\n");
    put(dir.path(), "README", "not a record");
    let locks = tempfile::tempdir().unwrap();
    let db = RealIscsiDb::new(dir.path()).with_locks(locks.path());
    let target: Iqn = IQN.parse().unwrap();
    let records = db.records(&target).await.unwrap();
    let seen: Vec<String> =
        records.iter().map(|r| format!("{} {} {}", r.portal, r.iface, r.corrupt)).collect();
    assert_eq!(
        seen,
        [
            "127.0.0.2:3260 default false",
            "127.0.0.3:3260 default true",
            "127.0.0.3:3260 iface0 false",
            "[fd00::1]:3261 default true"
        ]
    );
    // A record that was repaired since it was read is not touched, nor one that was damaged.
    let lie = Record { corrupt: true, ..records[2].clone() };
    let whole = db.remove(&target, &lie).await.unwrap_err();
    assert_eq!(whole.kind(), io::ErrorKind::InvalidInput);
    let lie = Record { corrupt: false, ..records[1].clone() };
    assert!(db.remove(&target, &lie).await.is_err());
    assert_eq!(db.records(&target).await.unwrap(), records);
    db.remove(&target, &records[1]).await.unwrap();
    db.remove(&target, &records[1]).await.unwrap();
    db.remove(&target, &records[3]).await.unwrap();
    assert_eq!(db.records(&target).await.unwrap().len(), 2);
    assert!(!locks.path().join("lock.write").exists(), "the database is unlocked again");
    assert_eq!(db.look_at_lock().await.unwrap(), DbLockState::Free);
    fs::write(locks.path().join("lock.write"), "").unwrap();
    let locked = db.remove(&target, &records[0]).await.unwrap_err();
    assert_eq!(locked.kind(), io::ErrorKind::WouldBlock);
    assert!(!dir.path().join(IQN).join("fd00::1,3261,-1").exists());
    assert!(dir.path().join(IQN).join("127.0.0.3,3260,1").exists());
}

#[tokio::test]
async fn a_record_goes_with_the_links_to_it_and_leaves_those_of_others() {
    let (base, locks) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let nodes = base.path().join("nodes");
    let whole = format!("node.name = {IQN}\n");
    put(&nodes, "127.0.0.2,3260,1/default", &whole);
    put(&nodes, "127.0.0.2,3260,1/eth1", &whole);
    let portal = nodes.join(IQN).join("127.0.0.2,3260,1");
    let link = |dir: &str, iface: &str| {
        let dir = base.path().join(dir);
        fs::create_dir_all(&dir).unwrap();
        let link = dir.join(format!("{IQN},127.0.0.2,3260,1,{iface}"));
        std::os::unix::fs::symlink(&portal, &link).unwrap();
        link
    };
    let its = ["static", "send_targets/127.0.0.9,3260", "isns"].map(|dir| link(dir, "default"));
    let others = ["static", "send_targets/127.0.0.9,3260"].map(|dir| link(dir, "eth1"));
    let db = RealIscsiDb::new(&nodes).with_locks(locks.path());
    let target: Iqn = IQN.parse().unwrap();
    let records = db.records(&target).await.unwrap();
    assert_eq!(records[0].iface, "default");
    db.remove(&target, &records[0]).await.unwrap();
    assert_eq!(db.records(&target).await.unwrap(), records[1..]);
    assert!(its.iter().all(|link| !link.is_symlink()));
    assert!(others.iter().all(|link| link.is_symlink() && link.exists()));
    db.remove(&target, &records[1]).await.unwrap();
    assert!(others.iter().all(|link| !link.is_symlink()));
    assert!(nodes.exists() && !nodes.join(IQN).exists(), "empty directories go");
}

#[tokio::test]
async fn a_record_without_a_group_makes_room_for_others() {
    let (dir, locks) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let whole = format!(
        "# BEGIN RECORD 2.1.11\nnode.name = {IQN}\nnode.tpgt = -1\niface.iscsi_ifacename = eth1\n# END RECORD\n"
    );
    put(dir.path(), "127.0.0.2,3260", &whole);
    put(dir.path(), "127.0.0.3,3260", "");
    let db = RealIscsiDb::new(dir.path()).with_locks(locks.path());
    let (target, portal): (Iqn, Portal) = (IQN.parse().unwrap(), "127.0.0.2:3260".parse().unwrap());
    let seen = async || {
        let records = db.records(&target).await.unwrap();
        let one = |r: &Record| format!("{} {} {:?} {}", r.portal, r.iface, r.group, r.corrupt);
        records.iter().map(one).collect::<Vec<_>>()
    };
    let damaged = "127.0.0.3:3260 default None true";
    assert_eq!(seen().await, ["127.0.0.2:3260 eth1 None false", damaged]);
    db.set_group(&target, portal, 7).await.unwrap();
    assert_eq!(seen().await, ["127.0.0.2:3260 eth1 Some(7) false", damaged]);
    let text = fs::read_to_string(dir.path().join(IQN).join("127.0.0.2,3260,7/eth1")).unwrap();
    assert!(text.contains("\nnode.tpgt = 7\n") && !text.contains("-1"), "{text}");
    assert!(text.contains("iface.iscsi_ifacename = eth1") && text.ends_with("# END RECORD\n"));
    let gone = db.set_group(&target, portal, 7).await.unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    let damaged = db.set_group(&target, "127.0.0.3:3260".parse().unwrap(), 7).await.unwrap_err();
    assert_eq!(damaged.kind(), io::ErrorKind::InvalidData);
}

#[tokio::test]
async fn credentials_take_the_place_of_others_and_the_rest_stays() {
    let (dir, locks) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let record = format!(
        "# BEGIN RECORD 2.1.11\nnode.name = {IQN}\nnode.session.auth.authmethod = None\n\
         node.session.auth.username = site\nnode.session.auth.password_in=old\n\
         node.session.auth.chap_algs = MD5\nnode.conn[0].port = 3260\nnode.session.scan=auto\n# END RECORD\n"
    );
    put(dir.path(), "127.0.0.2,3260,1/default", &record);
    put(dir.path(), "127.0.0.2,3260,1/iface0", &record);
    put(dir.path(), "127.0.0.3,3260,1/default", "");
    let at = |p: &str| dir.path().join(IQN).join(p);
    fs::set_permissions(at("127.0.0.2,3260,1/default"), fs::Permissions::from_mode(0o644)).unwrap();
    let db = RealIscsiDb::new(dir.path()).with_locks(locks.path());
    let target: Nexus = IQN.parse().unwrap();
    let portal = |n: u8| format!("127.0.0.{n}:3260").parse::<Portal>().unwrap();
    let secret = |text: &str| crate::types::SecretText::from(text.to_owned());
    let chap = |back: &str, secret_in: &str| {
        let (user, back) = ("u = 1".to_owned(), back.to_owned());
        Chap::new(user, secret("p # w = x"), back, secret(secret_in)).unwrap()
    };
    db.set(&target, portal(2), &[], Some(&chap("t", "other"))).await.unwrap();
    let text = fs::read_to_string(at("127.0.0.2,3260,1/default")).unwrap();
    let head = format!(
        "# BEGIN RECORD 2.1.11\nnode.name = {IQN}\nnode.session.auth.chap_algs = MD5\n\
         node.conn[0].port = 3260\nnode.session.scan=auto\nnode.session.auth.authmethod = CHAP\n\
         node.session.auth.username = u = 1\nnode.session.auth.password = p # w = x\n"
    );
    let mutual = "node.session.auth.username_in = t\nnode.session.auth.password_in = other\n";
    assert_eq!(text, format!("{head}{mutual}# END RECORD\n"));
    let mode = fs::metadata(at("127.0.0.2,3260,1/default")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    db.set(&target, portal(2), &[], Some(&chap("", ""))).await.unwrap();
    let text = fs::read_to_string(at("127.0.0.2,3260,1/default")).unwrap();
    assert_eq!(text, format!("{head}# END RECORD\n"));
    assert_eq!(fs::read_to_string(at("127.0.0.2,3260,1/iface0")).unwrap(), record);
    // Settings alone leave the credentials, and what is of the same beginning.
    let settings = [("node.conn[0].port", "1".to_owned()), ("node.session.scan", "manual".into())];
    db.set(&target, portal(2), &settings, None).await.unwrap();
    let text = fs::read_to_string(at("127.0.0.2,3260,1/default")).unwrap();
    let head = head.replace("node.conn[0].port = 3260\nnode.session.scan=auto\n", "");
    let new = "node.conn[0].port = 1\nnode.session.scan = manual\n";
    assert_eq!(text, format!("{head}{new}# END RECORD\n"));
    // What this open-iscsi has never heard of would be read over: nothing is written.
    let unknown = [settings[0].clone(), ("node.session.no_such", "1".into())];
    let error = db.set(&target, portal(2), &unknown, None).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert!(error.to_string().contains("node.session.no_such"), "{error}");
    assert_eq!(fs::read_to_string(at("127.0.0.2,3260,1/default")).unwrap(), text);
    let kind = async |n| db.set(&target, portal(n), &settings, None).await.unwrap_err().kind();
    assert_eq!(kind(3).await, io::ErrorKind::InvalidData);
    assert_eq!(kind(4).await, io::ErrorKind::NotFound);
    fs::write(locks.path().join("lock.write"), "").unwrap();
    assert_eq!(kind(2).await, io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn no_directory_means_no_records() {
    let db = RealIscsiDb::new("/nonexistent/nodes");
    assert!(db.records(&IQN.parse().unwrap()).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_records_are_those_of_whoever_serves() {
    use crate::host::place::fake::{IN_FULL, Proc};
    let proc = Proc::new();
    let root = proc.root("image", &["iscsiadm"]);
    proc.runs(1, "systemd", Path::new("/"), IN_FULL, &[]);
    proc.runs(50, "iscsid", &root, IN_FULL, &[80]);
    proc.listens(&[80]);
    let db = RealIscsiDb::placed(proc.places());
    let target: Iqn = IQN.parse().unwrap();
    assert!(db.records(&target).await.unwrap().is_empty());
    put(&root.join("var/lib/iscsi/nodes"), "127.0.0.2,3260,1/default", "");
    let records = db.records(&target).await.unwrap();
    assert_eq!(records.len(), 1);
    assert_eq!(db.look_at_lock().await.unwrap(), DbLockState::Free);
    let lock = root.join("run/lock/iscsi/lock.write");
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    fs::write(&lock, "").unwrap();
    assert_eq!(db.look_at_lock().await.unwrap(), DbLockState::Held(Vec::new()));
    fs::remove_file(&lock).unwrap();
    db.remove(&target, &records[0]).await.unwrap();
    assert!(db.records(&target).await.unwrap().is_empty());
    let secret = crate::types::SecretText::from("secret".to_owned());
    let chap = Chap::new("u".into(), secret, String::new(), Default::default()).unwrap();
    db.put_discovery("127.0.0.2:3260".parse().unwrap(), &chap).await.unwrap();
    assert!(root.join("var/lib/iscsi/send_targets/127.0.0.2,3260/st_config").exists());
    assert_eq!(db.discoveries().await.unwrap().len(), 1);
    proc.ends(50);
    proc.listens(&[]);
    let gone = db.records(&target).await.unwrap_err();
    assert!(crate::host::place::is_place_error(&gone), "{gone}");
}
