//! A small file tree with symlinks, in the shape of /sys.

use std::collections::BTreeMap;
use std::io;

use nix::libc;

/// What is at one place of the tree.
#[derive(Debug, Clone)]
enum Node {
    Dir(BTreeMap<String, Node>),
    Value(Vec<u8>),
    /// An attribute without `show`, or one whose `show` fails: reading gives this errno.
    Unreadable(i32),
    /// A symlink; the target is a path from the tree's root.
    Link(String),
}

/// The tree. All paths are relative to its root, without a leading slash.
#[derive(Debug, Default, Clone)]
pub(super) struct Tree {
    root: BTreeMap<String, Node>,
}

/// How many symlinks one resolution may follow, as the kernel has it.
const MAX_LINKS: u32 = 40;

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Tree {
    /// Makes a directory and those above it.
    pub(super) fn mkdir(&mut self, path: &str) {
        let mut dir = &mut self.root;
        for name in path.split('/').filter(|c| !c.is_empty()) {
            let node = dir.entry(name.to_owned()).or_insert_with(|| Node::Dir(BTreeMap::new()));
            if !matches!(node, Node::Dir(_)) {
                *node = Node::Dir(BTreeMap::new());
            }
            let Node::Dir(next) = node else { return };
            dir = next;
        }
    }

    /// Writes an attribute as the kernel shows it: with a newline.
    pub(super) fn put(&mut self, path: &str, value: impl std::fmt::Display) {
        self.insert(path, Node::Value(format!("{value}\n").into_bytes()));
    }

    /// Writes a binary attribute.
    pub(super) fn put_bytes(&mut self, path: &str, value: Vec<u8>) {
        self.insert(path, Node::Value(value));
    }

    /// Makes an attribute whose reading fails with `code`.
    pub(super) fn put_unreadable(&mut self, path: &str, code: i32) {
        self.insert(path, Node::Unreadable(code));
    }

    /// Makes a symlink to a path from the root.
    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.insert(path, Node::Link(target.to_owned()));
    }

    /// Removes whatever is there, with all below it.
    pub(super) fn remove(&mut self, path: &str) {
        let (dir, name) = split(path);
        if let Some(parent) = self.dir_mut(dir) {
            parent.remove(name);
        }
    }

    /// The path with all symlinks followed.
    pub(super) fn resolve(&self, path: &str) -> io::Result<String> {
        let mut todo: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(name),
            }
            match self.node(&done) {
                None => return Err(errno(libc::ENOENT)),
                Some(Node::Link(target)) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(errno(libc::ELOOP));
                    }
                    done.clear();
                    todo.extend(target.split('/').rev().map(str::to_owned));
                }
                Some(Node::Dir(_)) => {}
                Some(_) if todo.iter().any(|c| !c.is_empty()) => return Err(errno(libc::ENOTDIR)),
                Some(_) => {}
            }
        }
        Ok(done.join("/"))
    }

    /// An attribute's bytes.
    pub(super) fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        match self.at(path)? {
            Node::Value(bytes) => Ok(bytes.clone()),
            Node::Unreadable(code) => Err(errno(*code)),
            Node::Dir(_) => Err(errno(libc::EISDIR)),
            Node::Link(_) => Err(errno(libc::ELOOP)),
        }
    }

    /// The names in a directory, sorted.
    pub(super) fn list(&self, path: &str) -> io::Result<Vec<String>> {
        if path.split('/').all(str::is_empty) {
            return Ok(self.root.keys().cloned().collect());
        }
        match self.at(path)? {
            Node::Dir(dir) => Ok(dir.keys().cloned().collect()),
            _ => Err(errno(libc::ENOTDIR)),
        }
    }

    fn at(&self, path: &str) -> io::Result<&Node> {
        let real = self.resolve(path)?;
        let names: Vec<String> = real.split('/').map(str::to_owned).collect();
        self.node(&names).ok_or_else(|| errno(libc::ENOENT))
    }

    fn node(&self, names: &[String]) -> Option<&Node> {
        let (last, dirs) = names.split_last()?;
        let mut dir = &self.root;
        for name in dirs {
            match dir.get(name)? {
                Node::Dir(next) => dir = next,
                _ => return None,
            }
        }
        dir.get(last)
    }

    fn dir_mut(&mut self, path: &str) -> Option<&mut BTreeMap<String, Node>> {
        let mut dir = &mut self.root;
        for name in path.split('/').filter(|c| !c.is_empty()) {
            match dir.get_mut(name)? {
                Node::Dir(next) => dir = next,
                _ => return None,
            }
        }
        Some(dir)
    }

    fn insert(&mut self, path: &str, node: Node) {
        let (dir, name) = split(path);
        self.mkdir(dir);
        if let Some(parent) = self.dir_mut(dir) {
            parent.insert(name.to_owned(), node);
        }
    }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_in_the_middle_of_a_path() {
        let mut tree = Tree::default();
        tree.put("devices/a/b/state", "running");
        tree.link("class/x/b", "devices/a/b");
        tree.link("devices/a/b/device", "devices/a");
        assert_eq!(tree.read("class/x/b/state").unwrap(), b"running\n");
        assert_eq!(tree.resolve("class/x/b/device/b/state").unwrap(), "devices/a/b/state");
        assert_eq!(tree.list("class/x").unwrap(), ["b"]);
        tree.remove("devices/a/b");
        let gone = tree.read("class/x/b/state").unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn a_loop_ends() {
        let mut tree = Tree::default();
        tree.link("a", "b");
        tree.link("b", "a");
        assert_eq!(tree.resolve("a").unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }
}
