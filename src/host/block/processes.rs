//! Which programs have block devices open: the kernel is asked (`host::bpf::OpenFiles`), or, where it does not tell, all
//! descriptors of all processes are looked at in /proc.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::libc;
use nix::sys::stat::{Mode, fstatat};

use crate::host::bpf::OpenFiles;

/// The processes of the host.
pub(super) struct Processes {
    proc: PathBuf,
    /// Empty inside where the kernel does not tell.
    files: Arc<OnceLock<Option<OpenFiles>>>,
}

/// The programs that have each of some devices open, as `NAME[PID]`, sorted.
type Openers = HashMap<u64, Vec<String>>;

impl Processes {
    /// Those that are in this process's /proc.
    pub(super) fn of_host() -> Self {
        let host = Self { proc: PathBuf::from("/proc"), files: Arc::default() };
        // It takes its time, in which nobody may have asked yet.
        let files = host.files.clone();
        let begin = std::thread::Builder::new().name("lunplug-btf".into());
        // Without a thread for it, it is loaded for the first who asks.
        let _ = begin.spawn(move || files.get_or_init(load).is_some());
        host
    }

    /// Those in a directory like /proc alone.
    #[cfg(test)]
    pub(super) fn below(proc: &Path) -> Self {
        Self { proc: proc.to_owned(), files: Arc::new(OnceLock::from(None)) }
    }

    /// Who but this process has each of the devices open.
    pub(super) fn openers(&self, devices: &HashSet<u64>) -> io::Result<Openers> {
        let files = self.files.get_or_init(load).as_ref();
        let mut found = match files.map(|files| told(files, devices)) {
            Some(Ok(found)) => found,
            Some(Err(error)) => {
                tracing::warn!(%error, "the kernel does not tell of open files: all of /proc is looked at");
                in_proc(&self.proc, devices)?
            }
            None => in_proc(&self.proc, devices)?,
        };
        for openers in found.values_mut() {
            openers.sort();
            openers.dedup();
        }
        Ok(found)
    }
}

fn load() -> Option<OpenFiles> {
    let loaded = OpenFiles::load();
    loaded
        .inspect_err(|error| {
            tracing::info!(%error, "who has a device open is looked for in all of /proc: the kernel cannot be asked");
        })
        .ok()
}

fn told(files: &OpenFiles, devices: &HashSet<u64>) -> io::Result<Openers> {
    let mut found = Openers::new();
    for opened in files.block_devices()? {
        let device = opened.dev.to_dev_t();
        if devices.contains(&device) {
            let opener = format!("{}[{}]", opened.name, opened.pid);
            found.entry(device).or_default().push(opener);
        }
    }
    Ok(found)
}

/// Looks at every open descriptor of every process; those that vanish meanwhile are passed over.
fn in_proc(proc: &Path, devices: &HashSet<u64>) -> io::Result<Openers> {
    let mut found = Openers::new();
    let own = std::process::id().to_string();
    for process in fs::read_dir(proc)? {
        let process = process?;
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|c| c.is_ascii_digit()) || pid == own {
            continue;
        }
        let held = opened(&process.path().join("fd"), devices).unwrap_or_default();
        if held.is_empty() {
            continue;
        }
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        let opener = format!("{}[{pid}]", name.trim_end());
        for device in held {
            found.entry(device).or_default().push(opener.clone());
        }
    }
    Ok(found)
}

/// Those of the devices that a process has open, by its directory of descriptors. Each is asked for from there: the way
/// through /proc is the most of what a question costs.
fn opened(descriptors: &Path, devices: &HashSet<u64>) -> nix::Result<HashSet<u64>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut dir = Dir::open(descriptors, flags, Mode::empty())?;
    let entries = dir.iter().flatten().map(|entry| entry.file_name().to_owned());
    let names: Vec<CString> = entries.filter(|name| !name.as_bytes().starts_with(b".")).collect();
    let device = |name: CString| {
        // Follows the link to the open file itself; opens nothing.
        let file = fstatat(&dir, name.as_c_str(), AtFlags::empty()).ok()?;
        let is_block = file.st_mode & libc::S_IFMT == libc::S_IFBLK;
        (is_block && devices.contains(&file.st_rdev)).then_some(file.st_rdev)
    };
    Ok(names.into_iter().filter_map(device).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::DevNum;

    #[test]
    fn openers_are_found_in_proc() {
        let Some(dev) = fs::read_dir("/dev/block").ok().and_then(|d| d.flatten().next()) else {
            eprintln!("skipped: no block device here");
            return;
        };
        let number: DevNum = dev.file_name().to_string_lossy().parse().unwrap();
        let proc = tempfile::tempdir().unwrap();
        let process = proc.path().join("4242");
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::write(process.join("comm"), "qemu-system-x86\n").unwrap();
        std::os::unix::fs::symlink(dev.path(), process.join("fd/9")).unwrap();
        fs::create_dir_all(proc.path().join("sys/fd")).unwrap();
        let other = number.to_dev_t() + 1;
        let found = Processes::below(proc.path());
        let found = found.openers(&[number.to_dev_t(), other].into()).unwrap();
        assert_eq!(found, [(number.to_dev_t(), vec!["qemu-system-x86[4242]".to_owned()])].into());
    }
}
