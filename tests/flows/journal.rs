//! `lunplug journal dump` and `verify` over what a daemon really stores.

use std::path::Path;

use clap::Parser;
use lunplug::cli::{self, Cli, Screen};
use lunplug::host::storage::StorageDoors;
use lunplug::journal::Desired;
use serde_json::Value;

use crate::world::{World, node, split, volume};

/// The users of the first target.
const SIM_USERS: &str = "leases/iscsi/iqn.2026-01.org.lunplug_3asim:users";

/// Stores of a node with two volumes, one of them in its second VM and by two targets; the run directory is copied out of
/// the simulated host, in the name of this machine's boot.
struct Stores {
    dir: tempfile::TempDir,
}

impl Stores {
    fn make() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let db = dir.path().join("state/lunplug.db");
        let world = World::over(node(), Desired::open(&db).unwrap());
        world.life(async |daemon| {
            daemon.add(1, &volume("a", 1)).await;
            daemon.add(2, &split("b", 2)).await;
            daemon.quiet().await;
            let doors = StorageDoors::sim(&world.host.storage);
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            for place in [
                "effects/default/vm-1",
                "effects/default/vm-2",
                "leases/iscsi",
                SIM_USERS,
                "leases/iscsi/iqn.2026-01.org.lunplug_3amirror:users",
                "claims",
                "guest-luns",
            ] {
                let to = dir.path().join("run").join(place);
                std::fs::create_dir_all(&to).unwrap();
                for name in doors.rundir.list(place).await.unwrap() {
                    let bytes = doors.rundir.load(&format!("{place}/{name}")).await.unwrap();
                    let text = String::from_utf8(bytes.unwrap()).unwrap();
                    let text = text.replace(doors.rundir.boot_id(), boot.trim());
                    std::fs::write(to.join(name), text).unwrap();
                }
            }
        });
        Self { dir }
    }

    fn run(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("run").join(name)
    }

    fn db(&self) -> std::path::PathBuf {
        self.dir.path().join("state/lunplug.db")
    }

    fn sql(&self, line: &str) {
        let sqlite = rusqlite::Connection::open(self.db()).unwrap();
        sqlite.execute_batch(line).unwrap();
    }

    /// Runs `lunplug journal ...`: exit code, stdout, stderr.
    fn ask(&self, line: &str) -> (u8, String, String) {
        let dir = |name| self.dir.path().join(name).display().to_string();
        let dirs = ["--state-dir".into(), dir("state"), "--run-dir".into(), dir("run")];
        let words = ["lunplug", "journal"].into_iter().chain(line.split(' '));
        let args = words.map(str::to_owned).chain(dirs);
        let cli = Cli::try_parse_from(args).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut screen = Screen { out: &mut out, err: &mut err, live: false };
        let exit = runtime.block_on(cli::run(cli, &mut screen)) as u8;
        (exit, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    }

    /// What `verify` complains of, notes left out.
    fn problems(&self) -> Vec<Value> {
        let (exit, out, _) = self.ask("verify -o json");
        let all: Vec<Value> = serde_json::from_str(&out).unwrap();
        let problems: Vec<_> = all.into_iter().filter(|f| f["note"] == false).collect();
        assert_eq!(exit, if problems.is_empty() { 0 } else { 9 });
        problems
    }
}

fn everything(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(everything(&path));
        } else {
            all.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    all.sort();
    all
}

#[test]
fn a_sound_journal_is_shown_whole_and_found_clean_and_nothing_is_touched() {
    let stores = Stores::make();
    let before = everything(stores.dir.path());
    let (exit, out, err) = stores.ask("verify");
    assert_eq!((exit, out.trim()), (0, "no problems found"), "{err}");
    let (exit, out, _) = stores.ask("dump");
    assert_eq!(exit, 0);
    for words in
        ["default/vm-1", "naa.", "effects/default/vm-2/b.json", "mpath-", "made: 192.0.2.1"]
    {
        assert!(out.contains(words), "no {words} in {out}");
    }
    let (_, out, _) = stores.ask("dump -o json");
    let dump: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(dump["stores"][0]["volumes"][1]["volume"], "b");
    assert_eq!(dump["stores"][0]["volumes"][1]["spec"]["serial"], "b");
    assert_eq!(dump["effects"][0]["value"]["spec"]["name"], "a");
    let files = dump["leases"].as_array().unwrap().iter();
    let users: Vec<_> = files
        .map(|file| (&file["value"]["target"], &file["value"]["user"]["owner"]["volume"]))
        .filter_map(|(target, volume)| Some((target.as_str()?, volume.as_str()?)))
        .collect();
    let (sim, mirror) = ("iqn.2026-01.org.lunplug:sim", "iqn.2026-01.org.lunplug:mirror");
    assert_eq!(users, [(mirror, "b"), (sim, "a"), (sim, "b")]);
    let (_, yaml, _) = stores.ask("dump -o yaml");
    assert!(yaml.starts_with("---"), "{yaml}");
    assert!(everything(stores.dir.path()) == before, "something was changed");
}

#[test]
fn each_thing_that_is_wrong_is_named_with_what_it_means_and_what_to_do() {
    type Spoil = fn(&Stores);
    let cases: &[(&str, Spoil)] = &[
        ("lunplug.db", |s| std::fs::write(s.db(), "").unwrap()),
        ("lunplug.db", |s| {
            let bytes = std::fs::read(s.db()).unwrap();
            std::fs::write(s.db(), &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("lunplug.db", |s| s.sql("PRAGMA user_version = 99")),
        ("the state directory", |s| std::fs::remove_file(s.db()).unwrap()),
        ("vms default/vm-1", |s| s.sql("UPDATE vms SET spec = '{' WHERE vm = 'default/vm-1'")),
        ("volumes default/vm-2/b", |s| s.sql("UPDATE volumes SET spec = '[]' WHERE volume = 'b'")),
        ("volumes default/vm-2/b", |s| {
            s.sql("PRAGMA foreign_keys = OFF; DELETE FROM vms WHERE vm = 'default/vm-2'");
        }),
        ("identities default/vm-1/a", |s| {
            s.sql("UPDATE identities SET wwid = 'x' WHERE volume = 'a'")
        }),
        ("effects/default/vm-1/a.json", |s| s.sql("DELETE FROM volumes WHERE volume = 'a'")),
        ("effects/default/vm-1/a.json", |s| {
            std::fs::write(s.run("effects/default/vm-1/a.json"), "{\"boot").unwrap();
        }),
        ("effects/default/vm-1/A B", |s| {
            std::fs::write(s.run("effects/default/vm-1/A B"), "").unwrap();
        }),
        ("removals/default/vm-1/x.json", |s| {
            let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            std::fs::create_dir_all(s.run("removals/default/vm-1")).unwrap();
            let mark =
                format!("{{\"boot_id\":\"{}\",\"options\":{{\"force\":true}}}}", boot.trim());
            std::fs::write(s.run("removals/default/vm-1/x.json"), mark).unwrap();
        }),
        ("leases/iscsi/iqn.2026-01.org.lunplug_3asim", |s| {
            std::fs::write(s.run("leases/iscsi/iqn.2026-01.org.lunplug_3asim"), "").unwrap();
        }),
        ("leases/iscsi/iqn.2026-01.org.lunplug_3asim", |s| {
            s.sql("DELETE FROM volumes WHERE volume = 'b'");
            std::fs::remove_file(s.run("effects/default/vm-2/b.json")).unwrap();
        }),
        ("lunplug_3asim:users/1:default_2fvm-1_2fa", |s| {
            std::fs::write(s.run(SIM_USERS).join("1:default_2fvm-1_2fa"), "{").unwrap();
        }),
        ("lunplug_3asim:users/7:default_2fvm-1_2fa", |s| {
            let users = s.run(SIM_USERS);
            let (from, to) = ("1:default_2fvm-1_2fa", "7:default_2fvm-1_2fa");
            std::fs::rename(users.join(from), users.join(to)).unwrap();
        }),
        ("leases/iscsi/iqn.2026-01.org.lunplug_3asim", |s| {
            std::fs::remove_dir_all(s.run(SIM_USERS)).unwrap();
        }),
        ("lunplug_3asim:users/1:default_2fvm-1_2fa: default/vm-1/a", |s| {
            std::fs::remove_dir_all(s.run("claims")).unwrap();
        }),
        ("claims/", |s| std::fs::remove_dir_all(s.run("leases")).unwrap()),
    ];
    for (n, (place, spoil)) in cases.iter().enumerate() {
        let stores = Stores::make();
        spoil(&stores);
        let problems = stores.problems();
        let told = problems.iter().find(|p| p["place"].as_str().unwrap().contains(place));
        let told = told.unwrap_or_else(|| panic!("case {n}, {place}: {problems:#?}"));
        for field in ["problem", "means", "remedy"] {
            assert!(!told[field].as_str().unwrap().is_empty(), "{told}");
        }
        let (exit, out, err) = stores.ask("verify");
        assert_eq!(exit, 9);
        assert!(out.contains("what to do: ") && err.contains("found"), "{out}{err}");
        // What can be read is shown all the same.
        assert_eq!(stores.ask("dump").0, 0, "case {n}");
    }
}

#[test]
fn what_is_void_or_half_written_is_a_note() {
    let stores = Stores::make();
    std::fs::write(stores.run("claims/.tmp-1-1"), "").unwrap();
    for place in ["effects/default/vm-1/a.json", "effects/default/vm-2/b.json"] {
        let text = std::fs::read_to_string(stores.run(place)).unwrap();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        std::fs::write(stores.run(place), text.replace(boot.trim(), "another")).unwrap();
    }
    let (exit, out, err) = stores.ask("verify");
    assert_eq!(exit, 0, "{out}{err}");
    assert_eq!(out.matches("note: ").count(), 3, "{out}");
}

#[test]
fn a_store_that_is_not_there_is_said() {
    let stores = Stores::make();
    let (exit, _, err) = stores.ask("dump --vm default/vm-7");
    assert_eq!(exit, 3, "{err}");
    assert!(err.contains("default_vm-7.db"), "{err}");
    std::fs::remove_dir_all(stores.dir.path().join("state")).unwrap();
    let (exit, _, err) = stores.ask("verify");
    assert_eq!(exit, 3, "{err}");
    assert!(err.contains("--state-dir"), "{err}");
}
