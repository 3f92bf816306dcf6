//! Discovery records of ours: credentials for one list of targets, and gone with it.
//!
//! `send_targets/ADDRESS,PORT/st_config`, beside the nodes, is a portal's discovery record (usr/idbm.c).

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::lock;
use super::real::{entries, portal};
use super::text::{OURS, discovery_text, has_mark};
use crate::types::{Chap, Portal};

const FILE: &str = "st_config";

struct Found {
    portal: Portal,
    dir: PathBuf,
    ours: bool,
}

fn find(base: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for (name, dir) in entries(base)? {
        let Some(portal) = portal(&name) else { continue };
        let ours = match fs::read(dir.join(FILE)).map(Zeroizing::new) {
            Ok(text) => has_mark(&text, OURS),
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            Err(_) => false,
        };
        found.push(Found { portal, dir, ours });
    }
    Ok(found)
}

/// The portals of those that are ours.
pub(super) fn ours(base: &Path) -> io::Result<Vec<Portal>> {
    Ok(find(base)?.into_iter().filter(|f| f.ours).map(|f| f.portal).collect())
}

/// Writes one; another's is `AlreadyExists`.
pub(super) fn put(base: &Path, locks: &Path, portal: Portal, chap: &Chap) -> io::Result<()> {
    let _lock = lock::Held::take(locks)?;
    for Found { dir, ours, .. } in find(base)?.into_iter().filter(|f| f.portal == portal) {
        if !ours {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        drop_record(&dir)?;
    }
    let dir = base.join(format!("{},{}", portal.ip(), portal.port()));
    fs::create_dir_all(&dir)?;
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(dir.join(FILE))?;
    let written = file.write_all(discovery_text(portal, chap).as_bytes());
    if written.is_err() {
        let _ = drop_record(&dir);
    }
    written
}

/// Removes that of a portal, if it is ours.
pub(super) fn remove(base: &Path, locks: &Path, portal: Portal) -> io::Result<()> {
    if !ours(base)?.contains(&portal) {
        return Ok(());
    }
    let _lock = lock::Held::take(locks)?;
    for found in find(base)?.into_iter().filter(|f| f.ours && f.portal == portal) {
        drop_record(&found.dir)?;
    }
    Ok(())
}

fn drop_record(dir: &Path) -> io::Result<()> {
    match fs::remove_file(dir.join(FILE)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Links that somebody else's discovery made are not ours to remove.
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::types::SecretText;

    struct Db(tempfile::TempDir);

    impl Db {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
        fn at(&self, path: &str) -> PathBuf {
            self.0.path().join("send_targets").join(path)
        }
        fn put(&self, portal: Portal, secret: &str) -> io::Result<()> {
            let none = SecretText::default;
            let chap = Chap::new("u".into(), secret.to_owned().into(), String::new(), none());
            super::put(&self.0.path().join("send_targets"), self.0.path(), portal, &chap.unwrap())
        }
        fn remove(&self, portal: Portal) {
            super::remove(&self.0.path().join("send_targets"), self.0.path(), portal).unwrap();
        }
        fn ours(&self) -> Vec<Portal> {
            super::ours(&self.0.path().join("send_targets")).unwrap()
        }
    }

    fn portal(text: &str) -> Portal {
        text.parse().unwrap()
    }

    #[test]
    fn a_record_is_for_one_discovery_and_those_of_others_stay() {
        let db = Db::new();
        let (v6, other) = (portal("[fd00::1]:3260"), portal("[fd00::2]:3260"));
        db.remove(v6);
        db.put(v6, "one").unwrap();
        db.put(v6, "two").unwrap();
        let file = db.at("fd00::1,3260/st_config");
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("\ndiscovery.sendtargets.auth.password = two\n"), "{text}");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        // Somebody else's, in another spelling.
        let foreign = db.at("fd00:0::2,3260");
        fs::create_dir_all(&foreign).unwrap();
        fs::write(foreign.join(FILE), "# BEGIN RECORD 2.1.11\n").unwrap();
        assert_eq!(db.put(other, "one").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(db.ours(), [v6]);
        db.remove(other);
        db.remove(v6);
        assert!(!db.at("fd00::1,3260").exists() && foreign.join(FILE).exists());
        assert!(!db.0.path().join("lock.write").exists(), "the database is unlocked again");
    }

    #[test]
    fn what_a_killed_writer_left_is_ours_at_any_length() {
        let whole = "# lunplug: for one discovery\ndiscovery.startup = manual\n";
        let at = portal("10.0.0.1:3260");
        for cut in 0..=whole.len() {
            let db = Db::new();
            fs::create_dir_all(db.at("10.0.0.1,3260")).unwrap();
            fs::write(db.at("10.0.0.1,3260/st_config"), &whole[..cut]).unwrap();
            assert_eq!(db.ours(), [at], "cut at {cut}");
            db.put(at, "one").unwrap();
            db.remove(at);
            assert!(!db.at("10.0.0.1,3260").exists(), "cut at {cut}");
        }
        let db = Db::new();
        fs::create_dir_all(db.at("10.0.0.1,3260")).unwrap();
        db.remove(at);
        assert!(!db.at("10.0.0.1,3260").exists(), "killed before the file was there");
    }
}
