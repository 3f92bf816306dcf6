//! Damaged files, and (as root) a disk without room.

use std::os::unix::fs::FileExt;

use super::*;
use crate::reason::Reason;

fn count(store: &Store) -> i64 {
    store.read(|c| c.query_row("SELECT count(*) FROM vms", [], |r| r.get(0))).unwrap()
}

fn put(store: &Store, vm: &str) -> Result<usize, Error> {
    let vm = vm.to_owned();
    store.write(move |c| c.execute("INSERT INTO vms (vm, spec) VALUES (?1, '{}')", [vm]))
}

/// A store with some VMs in it, and its file.
fn made(dir: &Path) -> PathBuf {
    let path = dir.join("lunplug.db");
    let store = Store::open(&path, dir).unwrap();
    for n in 0..200 {
        put(&store, &format!("ns/vm-{n}")).unwrap();
    }
    path
}

#[test]
fn a_damaged_file_is_refused_by_name_and_left_as_it_is() {
    type Damage = fn(&Path);
    let cases: &[(&str, Damage)] = &[
        ("cut to nothing", |p| fs::write(p, "").unwrap()),
        ("cut in the middle", |p| {
            let len = fs::metadata(p).unwrap().len();
            File::options().write(true).open(p).unwrap().set_len(len / 2).unwrap();
        }),
        ("garbage", |p| fs::write(p, [0xA5; 8192]).unwrap()),
        ("wrong header", |p| {
            File::options()
                .write(true)
                .open(p)
                .unwrap()
                .write_at(b"SQLite 2", 0)
                .map(drop)
                .unwrap();
        }),
        ("a page overwritten", |p| {
            let len = fs::metadata(p).unwrap().len();
            let file = File::options().write(true).open(p).unwrap();
            file.write_at(&[0x5A; 4096], len - 4096).unwrap();
        }),
        ("another program's database", |p| {
            fs::remove_file(p).unwrap();
            Connection::open(p).unwrap().execute_batch("CREATE TABLE x (y)").unwrap();
        }),
    ];
    for (what, damage) in cases {
        let dir = tempfile::tempdir().unwrap();
        let path = made(dir.path());
        damage(&path);
        let before = fs::read(&path).unwrap();
        for _ in 0..2 {
            let error = Store::open(&path, dir.path()).unwrap_err();
            assert_eq!(error.reason(), Reason::RecordCorrupt, "{what}: {error}");
            assert!(error.to_string().contains("lunplug.db"), "{what}: {error}");
        }
        assert_eq!(fs::read(&path).unwrap(), before, "{what}");
    }
}

#[test]
fn a_damaged_file_keeps_what_a_killed_daemon_left_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path());
    let store = Store::open(&path, dir.path()).unwrap();
    put(&store, "ns/last").unwrap();
    let wal = fs::read(with(&path, "-wal")).unwrap();
    drop(store);
    File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
    fs::write(with(&path, "-wal"), &wal).unwrap();
    let before = fs::read(&path).unwrap();
    for _ in 0..2 {
        let error = Store::open(&path, dir.path()).unwrap_err();
        assert_eq!(error.reason(), Reason::RecordCorrupt, "{error}");
        assert!(fs::read(&path).unwrap() == before, "the file was changed");
        assert!(fs::read(with(&path, "-wal")).unwrap() == wal, "the -wal was changed");
    }
}

#[test]
fn a_closed_store_is_one_file_whoever_still_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path());
    let store = Store::open(&path, dir.path()).unwrap();
    put(&store, "ns/last").unwrap();
    store.close();
    assert!(!with(&path, "-wal").exists());
    assert_eq!(put(&store, "ns/later").unwrap_err().reason(), Reason::ShuttingDown);
    assert_eq!(store.read(|_| Ok(())).unwrap_err().reason(), Reason::ShuttingDown);
    assert_eq!(count(&Store::open(&path, dir.path()).unwrap()), 201);
}

#[test]
fn a_file_that_went_without_its_wal_is_not_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path());
    let store = Store::open(&path, dir.path()).unwrap();
    put(&store, "ns/last").unwrap();
    fs::copy(with(&path, "-wal"), dir.path().join("kept")).unwrap();
    drop(store);
    fs::remove_file(&path).unwrap();
    fs::rename(dir.path().join("kept"), with(&path, "-wal")).unwrap();
    let error = Store::open(&path, dir.path()).unwrap_err();
    assert_eq!(error.reason(), Reason::RecordCorrupt, "{error}");
    assert!(!path.exists());
}

#[test]
fn a_creation_that_was_cut_short_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lunplug.db");
    fs::write(with(&path, ".new"), "half a database").unwrap();
    assert_eq!(count(&Store::open(&path, dir.path()).unwrap()), 0);
    assert!(!with(&path, ".new").exists());
}

/// A database of schema 1, with a VM in it.
fn of_schema_1(path: &Path) {
    let raw = Connection::open(path).unwrap();
    let vm = "INSERT INTO vms (vm, spec) VALUES ('ns/old', '{}'); PRAGMA user_version = 1;";
    raw.execute_batch(&format!("PRAGMA journal_mode = WAL; {FIRST} {vm}")).unwrap();
}

fn schema(path: &Path) -> i64 {
    let raw = Connection::open(path).unwrap();
    raw.query_row("PRAGMA user_version", [], |r| r.get(0)).unwrap()
}

#[test]
fn an_older_schema_is_brought_up_and_keeps_what_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lunplug.db");
    of_schema_1(&path);
    for _ in 0..2 {
        let store = Store::open(&path, dir.path()).unwrap();
        assert_eq!(count(&store), 1);
        let put = "INSERT OR REPLACE INTO revisions VALUES ('ns/old', 7, x'00')";
        store.write(move |c| c.execute_batch(put)).unwrap();
    }
    assert_eq!(schema(&path), SCHEMA);
}

#[test]
fn a_copy_of_an_older_schema_can_be_read_as_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lunplug.db");
    of_schema_1(&path);
    let copy = copy_of(&path, dir.path()).unwrap();
    let count = |table: &str| -> i64 {
        copy.query_row(&format!("SELECT count(*) FROM {table}"), [], |r| r.get(0)).unwrap()
    };
    assert_eq!((count("vms"), count("revisions")), (1, 0));
    assert_eq!(schema(&path), 1, "the file stays as it is");
}

#[test]
fn an_upgrade_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lunplug.db");
    of_schema_1(&path);
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE revisions (x)").unwrap();
    let error = Store::open(&path, dir.path()).unwrap_err();
    assert_eq!(error.reason(), Reason::StateStoreFailed, "{error}");
    assert_eq!(schema(&path), 1);
}

#[test]
fn a_copy_has_what_only_the_wal_has_and_touches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = made(dir.path());
    let writer = Store::open(&path, dir.path()).unwrap();
    put(&writer, "ns/last").unwrap();
    let files = || {
        let mut all: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .map(|p| (p.clone(), fs::read(p).unwrap()))
            .collect();
        all.sort();
        all
    };
    let before = files();
    assert!(before.iter().any(|(p, b)| p.ends_with("lunplug.db-wal") && !b.is_empty()));
    let copy = copy_of(&path, dir.path()).unwrap();
    let there: i64 = copy.query_row("SELECT count(*) FROM vms", [], |r| r.get(0)).unwrap();
    assert_eq!(there, 201);
    assert!(copy.execute("DELETE FROM vms", []).is_err());
    assert!(files() == before, "the store was touched");
}

/// A small filesystem of its own, and what is in the way of writing to it.
struct Disk(tempfile::TempDir);

impl Disk {
    fn mount() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: it needs root");
            return None;
        }
        let disk = Self(tempfile::tempdir().unwrap());
        disk.flags(nix::mount::MsFlags::empty());
        Some(disk)
    }

    fn flags(&self, flags: nix::mount::MsFlags) {
        let options = Some("size=256k");
        nix::mount::mount(Some("lunplug"), self.0.path(), Some("tmpfs"), flags, options).unwrap();
    }

    fn db(&self) -> PathBuf {
        self.0.path().join("lunplug.db")
    }

    fn fill(&self) {
        use std::io::Write;
        let mut file = File::create(self.0.path().join("filler")).unwrap();
        while file.write_all(&[1; 1024]).is_ok() {}
    }

    fn free(&self) {
        fs::remove_file(self.0.path().join("filler")).unwrap();
    }

    fn read_only(&self, is: bool) {
        let ro = if is { nix::mount::MsFlags::MS_RDONLY } else { nix::mount::MsFlags::empty() };
        self.flags(nix::mount::MsFlags::MS_REMOUNT | ro);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// What a killed daemon leaves: the last write is in the `-wal` alone. The `-shm` may be there, or not.
fn killed(disk: &Disk, with_shm: bool) {
    let store = Store::open(&disk.db(), disk.0.path()).unwrap();
    for vm in ["ns/a", "ns/b"] {
        put(&store, vm).unwrap();
    }
    let parts: &[&str] = if with_shm { &["", "-wal", "-shm"] } else { &["", "-wal"] };
    let read = |part: &&str| fs::read(with(&disk.db(), part)).unwrap();
    let kept: Vec<_> = parts.iter().map(read).collect();
    drop(store);
    for (part, bytes) in parts.iter().zip(kept) {
        fs::write(with(&disk.db(), part), bytes).unwrap();
    }
}

#[test]
fn root_a_store_without_room_is_read_refuses_and_becomes_whole() {
    type InTheWay = (fn(&Disk), fn(&Disk));
    let full: InTheWay = (Disk::fill, Disk::free);
    let read_only: InTheWay = (|d| d.read_only(true), |d| d.read_only(false));
    for (n, (hinder, mend)) in [full, read_only, full, read_only].into_iter().enumerate() {
        let Some(disk) = Disk::mount() else { return };
        let scratch = tempfile::tempdir().unwrap();
        killed(&disk, n >= 2);
        hinder(&disk);
        let store = Store::open(&disk.db(), scratch.path()).unwrap();
        assert!(store.trouble().is_some());
        assert_eq!(count(&store), 2, "what was asked for last is known");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "the copy is gone");
        // The try to open it may have put the -wal where it belongs, and so made some room.
        hinder(&disk);
        let error = put(&store, "ns/c").unwrap_err();
        assert_eq!(error.reason(), Reason::StateStoreFailed);
        assert!(error.to_string().contains("cannot be written"), "{error}");
        mend(&disk);
        put(&store, "ns/c").unwrap();
        assert_eq!((count(&store), store.trouble()), (3, None));
        drop(store);
        assert_eq!(count(&Store::open(&disk.db(), scratch.path()).unwrap()), 3);
    }
}

#[test]
fn root_a_running_store_whose_disk_fills_up_goes_on_when_there_is_room() {
    let Some(disk) = Disk::mount() else { return };
    let store = Store::open(&disk.db(), disk.0.path()).unwrap();
    put(&store, "ns/a").unwrap();
    disk.fill();
    let refused = (0..1000).find_map(|n| put(&store, &format!("ns/filler-{n}")).err()).unwrap();
    assert_eq!(refused.reason(), Reason::StateStoreFailed);
    assert!(store.trouble().is_some_and(|why| why.contains("full")));
    let before = count(&store);
    disk.free();
    put(&store, "ns/b").unwrap();
    assert_eq!((count(&store), store.trouble()), (before + 1, None));
}

#[test]
fn root_without_a_store_and_without_room_there_is_nothing_to_serve() {
    let Some(disk) = Disk::mount() else { return };
    disk.read_only(true);
    let error = Store::open(&disk.db(), disk.0.path()).unwrap_err();
    assert_eq!(error.reason(), Reason::StateStoreFailed, "{error}");
}
