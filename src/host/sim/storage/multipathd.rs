//! multipathd.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::dm::Dm;
use super::kernel::World;
use crate::types::{DevNum, Wwid};

/// Of which disks it makes maps by itself (`find_multipaths`, libmultipath/wwids.c should_multipath).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FindMultipaths {
    /// `no`, `greedy`: of each.
    No,
    /// `yes`, `smart`: of a LUN that has two paths, or whose WWID it knows.
    Yes,
    /// `strict`: of a LUN whose WWID it knows.
    Strict,
}

/// The daemon and its two files.
#[derive(Debug)]
pub(super) struct MultipathModel {
    pub(super) running: bool,
    pub(super) find_multipaths: FindMultipaths,
    /// `user_friendly_names`: maps have an alias of the bindings file, else their WWID for a name.
    pub(super) friendly_names: bool,
    /// Whether it handles new devices by itself, at once; otherwise when it is told to.
    pub(super) auto: bool,
    /// Whether it comes to a disk in the very moment in which that is deleted, and whether it then takes off
    /// the map that it has made.
    pub(super) late: Option<bool>,
    /// How many times it is told of a path before udev has read its identity: it refuses it then.
    pub(super) unread: u32,
    /// Disks it has not looked at yet.
    pub(super) pending: Vec<String>,
    /// Whether it puts removals off, as for a map that is in use by udev: `delayed`, a success.
    pub(super) delays: bool,
    /// Commands that it has put off.
    pub(super) delayed: Vec<String>,
    /// `/etc/multipath/wwids`.
    pub(super) wwids: BTreeSet<String>,
    /// `/etc/multipath/bindings`: alias to WWID.
    pub(super) bindings: BTreeMap<String, String>,
    /// The same by WWID.
    aliases: HashMap<String, String>,
    /// No alias is free before the one of this number.
    taken: u32,
}

impl Default for MultipathModel {
    fn default() -> Self {
        Self {
            running: true,
            find_multipaths: FindMultipaths::No,
            friendly_names: true,
            auto: true,
            late: None,
            unread: 0,
            pending: Vec::new(),
            delays: false,
            delayed: Vec::new(),
            wwids: BTreeSet::new(),
            bindings: BTreeMap::new(),
            aliases: HashMap::new(),
            taken: 0,
        }
    }
}

/// What the daemon answers when a command failed.
pub(super) const FAIL: &str = "fail\n";
/// What it answers when it will do it later, or not.
pub(super) const DELAYED: &str = "delayed\n";
/// What it answers when a command needs no other answer.
pub(super) const OK: &str = "ok\n";

impl World {
    /// The daemon's reaction to new disks, if it reacts by itself.
    pub(super) fn multipathd_react(&mut self) {
        if self.multipath.running && self.multipath.auto {
            self.multipathd_settle();
        }
    }

    /// Handles all disks that are new to it.
    pub(super) fn multipathd_settle(&mut self) {
        for hctl in std::mem::take(&mut self.multipath.pending) {
            self.add_path(&hctl);
        }
    }

    /// Puts a disk into its map, making that where it is to; `false` when it cannot.
    pub(super) fn add_path(&mut self, hctl: &str) -> bool {
        let Some(disk) = self.disks.get(hctl).cloned() else { return false };
        let Some(wwid) = disk.known.wwid.as_ref().map(Wwid::multipath) else { return false };
        // multipathd has no use for a disk without size, or one that somebody has mounted.
        if disk.known.size == 0 || self.claims.contains_key(&disk.dev) {
            return false;
        }
        let uuid = format!("mpath-{wwid}");
        let map = self.dm.by_uuid(&uuid).map(|d| (d.minor, d.slaves.clone()));
        match map {
            Some((_, slaves)) if slaves.contains(&disk.dev) => {}
            Some((minor, mut slaves)) => {
                slaves.push(disk.dev);
                self.set_slaves(minor, slaves);
            }
            None => {
                let known = self.multipath.wwids.contains(&wwid);
                let wanted = match self.multipath.find_multipaths {
                    FindMultipaths::No => true,
                    FindMultipaths::Yes => known || self.paths_of(&wwid).len() > 1,
                    FindMultipaths::Strict => known,
                };
                if wanted {
                    self.make_map(&wwid);
                }
            }
        }
        true
    }

    /// The disks of that WWID that it may use.
    fn paths_of(&self, wwid: &str) -> Vec<DevNum> {
        self.disks
            .of_wwid(wwid)
            .filter(|d| !self.multipath.pending.contains(&d.hctl))
            .filter(|d| d.known.size > 0 && !self.claims.contains_key(&d.dev))
            .map(|d| d.dev)
            .collect()
    }

    fn make_map(&mut self, wwid: &str) {
        let paths = self.paths_of(wwid);
        let alias = if self.multipath.friendly_names { self.alias(wwid) } else { wwid.to_owned() };
        self.multipath.wwids.insert(wwid.to_owned());
        self.create_dm(&alias, &format!("mpath-{wwid}"), &paths);
    }

    /// The alias that the bindings file has for a WWID, or the first that is free.
    fn alias(&mut self, wwid: &str) -> String {
        let model = &mut self.multipath;
        if let Some(alias) = model.aliases.get(wwid) {
            return alias.clone();
        }
        let mut alias = alias_of(model.taken);
        while model.bindings.contains_key(&alias) {
            model.taken += 1;
            alias = alias_of(model.taken);
        }
        model.bindings.insert(alias.clone(), wwid.to_owned());
        model.aliases.insert(wwid.to_owned(), alias.clone());
        alias
    }

    /// Removes a LUN's entries from both files; whether there were any.
    pub(super) fn forget(&mut self, wwid: &str) -> bool {
        let model = &mut self.multipath;
        let alias = model.aliases.remove(wwid);
        if let Some(alias) = &alias {
            model.bindings.remove(alias);
            model.taken = 0;
        }
        model.wwids.remove(wwid) || alias.is_some()
    }

    /// Carries out one command of the daemon's socket.
    pub(super) fn multipathd_command(&mut self, command: &str) -> String {
        let words: Vec<&str> = command.split_whitespace().collect();
        if self.multipath.delays && matches!(words[..], ["del" | "remove", ..]) {
            self.multipath.delayed.push(command.to_owned());
            return DELAYED.into();
        }
        let done = |ok: bool| if ok { OK.to_owned() } else { FAIL.to_owned() };
        match words[..] {
            ["show" | "list", "daemon"] => "pid 1 idle\n".into(),
            ["show" | "list", "maps" | "multipaths", "raw", "format", ..] => {
                self.show_maps(format_of(command))
            }
            ["show" | "list", "paths", "raw", "format", ..] => self.show_paths(format_of(command)),
            ["add", "path", _] if self.multipath.unread > 0 => {
                self.multipath.unread -= 1;
                FAIL.into()
            }
            ["add", "path", name] => {
                let Some(hctl) = self.hctl_of(name) else { return FAIL.into() };
                self.multipath.pending.retain(|p| *p != hctl);
                done(self.add_path(&hctl))
            }
            // Of a WWID, whatever `find_multipaths` says (libmultipath/configure.c, coalesce_paths).
            ["add", "map" | "multipath", wwid] => {
                if self.map_of(wwid).is_none() && self.paths_of(wwid).is_empty() {
                    return FAIL.into();
                }
                if self.map_of(wwid).is_none() {
                    self.make_map(wwid);
                }
                OK.into()
            }
            ["del" | "remove", "path", name] => {
                let Some(hctl) = self.hctl_of(name) else { return OK.into() };
                self.multipath.pending.retain(|p| *p != hctl);
                if let Some(dev) = self.disks.get(&hctl).map(|d| d.dev) {
                    self.drop_from_map(dev);
                }
                OK.into()
            }
            ["del" | "remove", "map" | "multipath", name] => match self.map_of(name) {
                Some(minor) => done(self.remove_dm(minor)),
                None => FAIL.into(),
            },
            ["disablequeueing" | "restorequeueing", "map" | "multipath", name] => {
                let queues = words[0] == "restorequeueing";
                done(self.map_of(name).is_some_and(|minor| self.dm.set_queueing(minor, queues)))
            }
            ["resize", "map" | "multipath", name] => {
                let minor = self.map_of(name);
                done(minor.is_some_and(|minor| self.resize_dm(minor)))
            }
            ["reload", "map" | "multipath", name] => match self.map_of(name) {
                Some(minor) => {
                    let slaves = self.dm.get(minor).map(|d| d.slaves.clone()).unwrap_or_default();
                    self.set_slaves(minor, slaves);
                    OK.into()
                }
                None => FAIL.into(),
            },
            ["reconfigure", ..] => {
                self.multipath.pending = self.disks.values().map(|d| d.hctl.clone()).collect();
                self.multipathd_settle();
                OK.into()
            }
            _ => FAIL.into(),
        }
    }

    /// multipathd reloads the map of a path whose write protection has changed (main.c,
    /// uev_update_path).
    pub(super) fn protection_changed(&mut self, dev: DevNum) {
        let map = self.map_above(dev).filter(|_| self.multipath.running && self.multipath.auto);
        if let Some((minor, slaves)) = map.map(|d| (d.minor, d.slaves.clone())) {
            self.set_slaves(minor, slaves);
        }
    }

    /// As when it hears that the last path has gone.
    pub(super) fn flush_empty_maps(&mut self) {
        let maps = self.dm.values().filter(|d| d.uuid.starts_with("mpath-"));
        let empty: Vec<u32> = maps.filter(|d| d.slaves.is_empty()).map(|d| d.minor).collect();
        for minor in empty {
            self.remove_dm(minor);
        }
    }

    fn drop_from_map(&mut self, dev: DevNum) {
        if let Some((minor, mut slaves)) = self.map_above(dev).map(|d| (d.minor, d.slaves.clone()))
        {
            slaves.retain(|s| *s != dev);
            self.set_slaves(minor, slaves);
        }
    }

    fn hctl_of(&self, name: &str) -> Option<String> {
        self.disks.by_name(name).map(|d| d.hctl.clone())
    }

    /// A map by alias, WWID or `dm-N`.
    pub(super) fn map_of(&self, name: &str) -> Option<u32> {
        let by_kernel = || self.dm.get(name.strip_prefix("dm-")?.parse().ok()?);
        let by_wwid = || self.dm.by_uuid(&format!("mpath-{name}"));
        let found = self.dm.by_name(name).or_else(by_kernel).or_else(by_wwid);
        found.filter(|d| d.uuid.starts_with("mpath-")).map(|d| d.minor)
    }

    /// The map that a path is in.
    fn map_above(&self, dev: DevNum) -> Option<&Dm> {
        self.dm.above(dev).find(|d| d.uuid.starts_with("mpath-"))
    }

    fn show_maps(&self, format: &str) -> String {
        let maps = self.dm.values().filter(|d| d.uuid.starts_with("mpath-"));
        maps.map(|d| {
            fill(format, |wildcard| match wildcard {
                'n' => Some(d.name.clone()),
                'w' => Some(d.uuid[6..].to_owned()),
                'd' => Some(d.kernel_name()),
                'N' => Some(d.slaves.len().to_string()),
                'Q' => Some(if d.queueing { "on" } else { "off" }.to_owned()),
                _ => None,
            })
        })
        .collect()
    }

    fn show_paths(&self, format: &str) -> String {
        self.disks
            .values()
            .map(|disk| {
                let map = self.map_above(disk.dev);
                fill(format, |wildcard| match wildcard {
                    'd' => Some(disk.name.clone()),
                    'D' => Some(disk.dev.to_string()),
                    'i' => Some(disk.hctl.clone()),
                    'w' => disk.known.wwid.as_ref().map(Wwid::multipath),
                    'm' => Some(map.map_or("[orphan]".to_owned(), |d| d.name.clone())),
                    'T' => Some(if disk.online { "ready" } else { "faulty" }.to_owned()),
                    't' => Some(if disk.online { "active" } else { "failed" }.to_owned()),
                    'o' => Some(if disk.online { "running" } else { "offline" }.to_owned()),
                    _ => None,
                })
            })
            .collect()
    }
}

/// The n-th alias, from 0.
fn alias_of(number: u32) -> String {
    format!("mpath{}", super::letters(number))
}

/// What follows `format`, with the quotes taken off.
fn format_of(command: &str) -> &str {
    command.split_once("format").map_or("", |(_, f)| f.trim().trim_matches('"'))
}

/// One line, with the wildcards of `multipathd show wildcards` put in.
fn fill(format: &str, value: impl Fn(char) -> Option<String>) -> String {
    let mut line = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, chars.clone().next()) {
            ('%', Some(wildcard)) => {
                chars.next();
                line.push_str(&value(wildcard).unwrap_or_default());
            }
            _ => line.push(c),
        }
    }
    line.push('\n');
    line
}
