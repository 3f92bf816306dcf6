//! Iface records: those of the node are used, one with another initiator name is made from them.
//!
//! `ifaces/NAME`, beside the nodes, is a record, which people may write themselves (open-iscsi's README,
//! "Setup of iSCSI interfaces"); `default` and `iser` are built in (usr/iface.c). A node record names its iface
//! and has a copy of its settings.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::lock;
use super::real::{entries, portal};
use super::text::has_mark;
use crate::types::{Iface, IfaceName, Outcome};

/// Those that need no file, with their transport.
const BUILT_IN: [(&str, &str); 2] = [("default", "tcp"), ("iser", "iser")];

/// The first line of a record of ours: a comment to open-iscsi.
const OURS: &str = "# lunplug: an initiator name of a volume's\n";
const NAME: &str = "iface.iscsi_ifacename";
const INITIATOR: &str = "iface.initiatorname";

/// Has the record that `iface` needs.
pub(super) fn put(ifaces: &Path, locks: &Path, iface: &Iface) -> io::Result<Outcome> {
    let base = base(ifaces, &iface.name)?;
    let Some(initiator) = &iface.initiator else { return Ok(Outcome::Already(())) };
    let name = iface.record();
    let text = text(&base, &name, initiator.as_str());
    let file = ifaces.join(name.as_str());
    if fs::read_to_string(&file).is_ok_and(|there| there == text) {
        return Ok(Outcome::Already(()));
    }
    let _lock = lock::Held::take(locks)?;
    fs::create_dir_all(ifaces)?;
    // One that is cut off here is not used: it is compared before each use.
    let mut options = fs::OpenOptions::new();
    let mut made = options.write(true).create(true).truncate(true).mode(0o600).open(&file)?;
    made.write_all(text.as_bytes()).map(Outcome::Done)
}

/// The settings of a record of the node's, as text. None of that name is `NotFound`.
fn base(ifaces: &Path, name: &IfaceName) -> io::Result<String> {
    match fs::read_to_string(ifaces.join(name.as_str())) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let built_in = BUILT_IN.iter().find(|(built_in, _)| *built_in == name.as_str());
            let (_, transport) = built_in.ok_or(e)?;
            Ok(format!("iface.transport_name = {transport}\n"))
        }
        read => read,
    }
}

/// The same settings under another name, with another initiator.
fn text(base: &str, name: &IfaceName, initiator: &str) -> String {
    let setting = |line: &&str| {
        let of = line.split('=').next().unwrap_or("").trim();
        !of.is_empty() && !of.starts_with('#') && of != NAME && of != INITIATOR
    };
    let kept: String = base.lines().filter(setting).map(|line| format!("{line}\n")).collect();
    format!("{OURS}{NAME} = {name}\n{INITIATOR} = {initiator}\n{kept}")
}

/// All records of the node, the built-in ones first.
pub(super) fn all(ifaces: &Path) -> io::Result<Vec<IfaceName>> {
    let mut names: Vec<IfaceName> = entries(ifaces)?
        .into_iter()
        .filter_map(|(name, _)| name.parse().ok())
        .filter(|name: &IfaceName| BUILT_IN.iter().all(|(built_in, _)| *built_in != name.as_str()))
        .collect();
    names.sort();
    let built_in = BUILT_IN.iter().filter_map(|(name, _)| name.parse().ok());
    Ok(built_in.chain(names).collect())
}

/// Removes one of ours, unless a node record goes by it.
pub(super) fn remove(
    ifaces: &Path,
    nodes: &Path,
    locks: &Path,
    name: &IfaceName,
) -> io::Result<bool> {
    let file = ifaces.join(name.as_str());
    let ours = match fs::read(&file) {
        Ok(text) => name.is_own() && has_mark(&text, OURS),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    if !ours {
        return Ok(false);
    }
    let _lock = lock::Held::take(locks)?;
    if is_used(nodes, name)? {
        return Ok(false);
    }
    fs::remove_file(file)?;
    // The directory that is not empty stays, and so does one that is there for another reason.
    let _ = fs::remove_dir(ifaces);
    Ok(true)
}

/// Whether a node record goes by it, of whatever target.
fn is_used(nodes: &Path, name: &IfaceName) -> io::Result<bool> {
    for (_, target) in entries(nodes)? {
        if !target.is_dir() {
            continue;
        }
        for (at, records) in entries(&target)? {
            if portal(&at).is_some() && records.join(name.as_str()).exists() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Db(tempfile::TempDir);

    impl Db {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }
        fn at(&self, name: &str) -> std::path::PathBuf {
            self.0.path().join(name)
        }
        fn put(&self, iface: &Iface) -> io::Result<Outcome> {
            put(&self.at("ifaces"), &self.at("lock"), iface)
        }
        fn remove(&self, name: &IfaceName) -> bool {
            remove(&self.at("ifaces"), &self.at("nodes"), &self.at("lock"), name).unwrap()
        }
        fn text(&self, name: &IfaceName) -> String {
            fs::read_to_string(self.at("ifaces").join(name.as_str())).unwrap()
        }
    }

    fn own(name: &str) -> Iface {
        let initiator = "iqn.2026-01.example:vm-1".parse().ok();
        Iface { name: name.parse().unwrap(), initiator }
    }

    #[test]
    fn a_record_of_ours_has_the_settings_of_the_nodes() {
        let db = Db::new();
        fs::create_dir(db.at("ifaces")).unwrap();
        let site = "# BEGIN RECORD 2.1.11\niface.iscsi_ifacename = eth1\niface.transport_name = tcp\n\
                    iface.net_ifacename = eth1\niface.initiatorname = iqn.2026-01.site:x\n# END RECORD\n";
        fs::write(db.at("ifaces/eth1"), site).unwrap();
        let iface = own("eth1");
        assert_eq!(db.put(&iface).unwrap(), Outcome::Done(()));
        assert_eq!(db.put(&iface).unwrap(), Outcome::Already(()));
        let name = iface.record();
        assert_eq!(
            db.text(&name),
            format!(
                "{OURS}iface.iscsi_ifacename = {name}\niface.initiatorname = iqn.2026-01.example:vm-1\n\
                 iface.transport_name = tcp\niface.net_ifacename = eth1\n"
            )
        );
        // What the node's record says by now is what ours is to say.
        fs::write(db.at("ifaces/eth1"), site.replace("= eth1", "= eth2")).unwrap();
        assert_eq!(db.put(&iface).unwrap(), Outcome::Done(()));
        assert!(db.text(&name).contains("net_ifacename = eth2"));
        assert_eq!(db.put(&Iface { initiator: None, ..iface }).unwrap(), Outcome::Already(()));
        let all: Vec<String> =
            all(&db.at("ifaces")).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(all, ["default", "iser", "eth1", name.as_str()]);
    }

    #[test]
    fn built_in_ones_need_no_file_and_others_must_be_there() {
        let db = Db::new();
        assert_eq!(db.put(&Iface::default()).unwrap(), Outcome::Already(()));
        assert!(!db.at("ifaces").exists());
        let missing = Iface { name: "eth7".parse().unwrap(), initiator: None };
        assert_eq!(db.put(&missing).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(db.put(&own("iser")).unwrap(), Outcome::Done(()));
        assert!(db.text(&own("iser").record()).contains("iface.transport_name = iser"));
    }

    #[test]
    fn only_an_unused_one_of_ours_is_removed() {
        let db = Db::new();
        let (iface, name) = (own("default"), own("default").record());
        assert!(!db.remove(&name));
        db.put(&iface).unwrap();
        let node = db.at("nodes/iqn.2026-01.example:t/127.0.0.2,3260,1");
        fs::create_dir_all(&node).unwrap();
        fs::write(node.join(name.as_str()), "").unwrap();
        assert!(!db.remove(&name));
        fs::remove_file(node.join(name.as_str())).unwrap();
        assert!(db.remove(&name) && !db.at("ifaces").exists());
        // One that somebody else wrote under such a name.
        fs::create_dir(db.at("ifaces")).unwrap();
        fs::write(db.at("ifaces").join(name.as_str()), "iface.transport_name = tcp\n").unwrap();
        assert!(!db.remove(&name) && db.at("ifaces").join(name.as_str()).exists());
    }
}
