//! Where iscsid and multipathd live: beside lunplugd, on the host while lunplugd is in a container, or
//! in containers of their own.
//!
//! Whoever holds the daemon's listening socket serves. iscsid listens on an abstract name alone, which
//! one process can have in a network namespace, and the kernel speaks iSCSI's netlink only in the first
//! one (drivers/scsi/scsi_transport_iscsi.c makes its socket in `init_net`), where lunplugd is, too. So
//! what can differ is the root: programs, configuration and database. SO_PEERCRED would tell who called
//! listen(2), which under systemd's socket activation is systemd, and connecting would start the daemon;
//! so the holder is looked for in /proc, as [`crate::host::survey`] does.
//!
//! ```text
//!              holder of the socket          root is ours        another root
//!  served ──┬─ the daemon itself ─────────►  as ever             enter it
//!           ├─ systemd (socket unit) ─────►  as ever             enter it (the host's, mostly)
//!           └─ one that may not administer the node: refused
//!  nobody ──┬─ was in a container before ─► refused: iscsiadm on the host would start the host's
//!           └─ otherwise ─────────────────► the host's root, if it has the program, else ours
//! ```

#[cfg(test)]
pub(crate) mod fake;
mod root;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::Mode;

pub(crate) use root::{Entry, Pinned, Root};

use crate::doctor::Service;

/// `__SO_ACCEPTCON` in the flags of /proc/net/unix: it listens.
const LISTENS: u32 = 0x1_0000;
/// CAP_SYS_ADMIN's bit (linux/capability.h).
const SYS_ADMIN: u32 = 21;
/// The host's first process: lunplugd shares the host's PID namespace.
const INIT: i32 = 1;

/// A daemon's place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It was in a container, which has gone.
    #[error(
        "{} does not run: it ran in a container (pid {pid}), and that has ended; start it again, or restart lunplugd to use the host's",
        .service.name()
    )]
    Gone {
        /// The daemon.
        service: Service,
        /// Its process.
        pid: i32,
    },
    /// Its socket is held by one that could not be it.
    #[error(
        "{}'s socket @{} is held by {comm} (pid {pid}, uid {uid}), which may not administer this node: it is not spoken to",
        .service.name(), .service.socket()
    )]
    Untrusted {
        /// The daemon.
        service: Service,
        /// The holder.
        pid: i32,
        /// Its user.
        uid: u32,
        /// Its name.
        comm: String,
    },
    /// Its container lacks what belongs to it.
    #[error(
        "{} runs in a container (pid {pid}) that has no {what}: put both of one version into one image",
        .service.name()
    )]
    Lacks {
        /// The daemon.
        service: Service,
        /// Its process.
        pid: i32,
        /// A program.
        what: &'static str,
    },
    /// /proc could not be read.
    #[error("who serves {} could not be found out", .service.name())]
    Io {
        /// The daemon.
        service: Service,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<PlaceError> for io::Error {
    fn from(error: PlaceError) -> Self {
        Self::new(io::ErrorKind::NotConnected, error)
    }
}

/// Whether an error of another door is one of a daemon's place.
pub fn is_place_error(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<PlaceError>())
}

/// Where a daemon's programs and files are.
pub(crate) enum Place {
    /// Where ours are.
    Ours,
    /// Beneath another root.
    Other(Root),
}

/// Finds the daemons' places, and remembers them as long as they serve. All calls block.
#[derive(Clone)]
pub(crate) struct Places {
    proc: Arc<Path>,
    found: Arc<Mutex<HashMap<Service, Found>>>,
}

/// Who was found to serve.
struct Found {
    /// The listening socket.
    inode: u64,
    pid: i32,
    /// Its directory in /proc: once it has ended nothing can be opened there, whoever has its number.
    dir: OwnedFd,
    /// Its descriptor of the socket, in there.
    descriptor: PathBuf,
    /// Its root is ours.
    ours: bool,
    /// Its root is neither ours nor the host's.
    contained: bool,
}

impl Found {
    /// Whether it still has that socket. As long as it does nobody else can have the socket's name, so the list of all
    /// sockets, which is long on a node with many pods, need not be read.
    fn serves(&self) -> bool {
        let link = readlinkat(&self.dir, &self.descriptor);
        link.is_ok_and(|link| *link == *socket_link(self.inode))
    }
}

/// What a descriptor of a socket shows itself to be.
fn socket_link(inode: u64) -> String {
    format!("socket:[{inode}]")
}

impl Default for Places {
    fn default() -> Self {
        Self { proc: Path::new("/proc").into(), found: Arc::default() }
    }
}

impl Places {
    /// Where a daemon's programs and files are.
    pub(crate) fn of(&self, service: Service) -> Result<Place, PlaceError> {
        let io = |source| PlaceError::Io { service, source };
        let mut known = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(&service).filter(|found| found.serves()) {
            match self.place(found) {
                Ok(place) => return Ok(place),
                Err(e) if is_gone(&e) => {}
                Err(e) => return Err(io(e)),
            }
        }
        let inode = self.socket(service).map_err(io)?;
        let holder = inode.map(|inode| self.holder(service, inode)).transpose()?.flatten();
        match holder {
            Some(found) => {
                let place = self.place(&found).map_err(io)?;
                if !found.ours {
                    let (daemon, pid) = (service.name(), found.pid);
                    tracing::info!(daemon, pid, "used where it is, beneath another root");
                }
                known.insert(service, found);
                Ok(place)
            }
            None => match known.get(&service) {
                Some(Found { contained: true, pid, .. }) if service == Service::Iscsid => {
                    Err(PlaceError::Gone { service, pid: *pid })
                }
                _ => Ok(self.unserved(service)),
            },
        }
    }

    /// The host's root.
    pub(crate) fn host(&self) -> Place {
        let host = self.directory(INIT).and_then(|dir| Root::open(INIT, &dir));
        match host {
            Ok(root) if !root.is_ours() => Place::Other(root),
            // Where it cannot be looked at, it is not to be used either.
            _ => Place::Ours,
        }
    }

    /// Without anybody who serves: where it would be started, if at all.
    fn unserved(&self, service: Service) -> Place {
        let tool = match service {
            Service::Iscsid => "iscsiadm",
            Service::Multipathd => "multipath",
        };
        match self.host() {
            Place::Other(host) if host.program(tool).is_some() => Place::Other(host),
            _ => Place::Ours,
        }
    }

    fn place(&self, found: &Found) -> io::Result<Place> {
        match found.ours {
            true => Ok(Place::Ours),
            false => Ok(Place::Other(Root::open(found.pid, &found.dir)?)),
        }
    }

    fn directory(&self, pid: i32) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(open(&self.proc.join(pid.to_string()), flags, Mode::empty())?)
    }

    /// The daemon's listening socket in our network namespace.
    fn socket(&self, service: Service) -> io::Result<Option<u64>> {
        let text = fs::read_to_string(self.proc.join("net/unix"))?;
        Ok(listening(&text).into_iter().find(|(s, _)| *s == service).map(|(_, inode)| inode))
    }

    /// Who holds a socket: the daemon itself rather than who has opened it for it.
    fn holder(&self, service: Service, inode: u64) -> Result<Option<Found>, PlaceError> {
        let io = |source| PlaceError::Io { service, source };
        let link = socket_link(inode);
        for pid in self.candidates(service).map_err(io)? {
            match self.examine(pid, &link) {
                Ok(None) => {}
                Ok(Some((dir, descriptor, who))) => {
                    if !who.trusted {
                        let Who { uid, comm, .. } = who;
                        return Err(PlaceError::Untrusted { service, pid, uid, comm });
                    }
                    return self.found(inode, pid, dir, descriptor).map(Some).map_err(io);
                }
                // It has ended meanwhile, or is not ours to look at.
                Err(e) if is_gone(&e) || e.kind() == io::ErrorKind::PermissionDenied => {}
                Err(e) => return Err(io(e)),
            }
        }
        Ok(None)
    }

    fn found(&self, inode: u64, pid: i32, dir: OwnedFd, descriptor: PathBuf) -> io::Result<Found> {
        let root = Root::open(pid, &dir)?;
        let ours = root.is_ours();
        let contained = !ours && !matches!(self.host(), Place::Other(host) if root.is_same(&host));
        Ok(Found { inode, pid, dir, descriptor, ours, contained })
    }

    /// All processes: first those of the daemon's name, then the host's init, then the rest.
    fn candidates(&self, service: Service) -> io::Result<Vec<i32>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.proc)? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            let rank = match comm.trim_end() {
                name if name == service.name() => 0,
                _ if pid == INIT => 1,
                _ => 2,
            };
            all.push((rank, pid));
        }
        all.sort_unstable();
        Ok(all.into_iter().map(|(_, pid)| pid).collect())
    }

    /// A process, if it has that file open, and by which descriptor in its directory.
    fn examine(&self, pid: i32, link: &str) -> io::Result<Option<(OwnedFd, PathBuf, Who)>> {
        let dir = self.directory(pid)?;
        let at = super::poddir::proc_path(&dir);
        let mut fds = fs::read_dir(at.join("fd"))?.flatten();
        let found = fds.find(|fd| fs::read_link(fd.path()).is_ok_and(|l| l.as_os_str() == link));
        let Some(found) = found else { return Ok(None) };
        let who = Who::read(&at)?;
        Ok(Some((dir, Path::new("fd").join(found.file_name()), who)))
    }
}

/// What a process is.
pub(crate) struct Who {
    /// Its effective user, as we see it.
    pub(crate) uid: u32,
    /// Its name.
    pub(crate) comm: String,
    /// It may administer this node, as the kernel's side of iSCSI and device-mapper demand: whoever is
    /// it gains nothing by what we run beneath its root. Root's uid alone says nothing, for any container
    /// in the host's network could take the socket's name.
    pub(crate) trusted: bool,
}

impl Who {
    /// `dir` is its directory in /proc.
    pub(crate) fn read(dir: &Path) -> io::Result<Self> {
        let status = fs::read_to_string(dir.join("status"))?;
        let user = |of: &Path| fs::metadata(of.join("ns/user")).map(|ns| ns.ino());
        let (uid, capable) = credentials(&status).ok_or(io::ErrorKind::InvalidData)?;
        let ours = user(dir)? == user(Path::new("/proc/self"))?;
        let comm = fs::read_to_string(dir.join("comm"))?.trim_end().to_owned();
        Ok(Self { uid, comm, trusted: uid == 0 && capable && ours })
    }
}

/// The effective uid, and whether CAP_SYS_ADMIN is effective (proc_pid_status(5)).
fn credentials(status: &str) -> Option<(u32, bool)> {
    let line = |key| status.lines().find_map(|l: &str| l.strip_prefix(key));
    let uid = line("Uid:")?.split_whitespace().nth(1)?.parse().ok()?;
    let caps = u64::from_str_radix(line("CapEff:")?.trim(), 16).ok()?;
    Some((uid, caps >> SYS_ADMIN & 1 == 1))
}

/// The daemons' listening sockets in /proc/net/unix, by inode. Fields: number, reference count,
/// protocol, flags, type, state, inode, path; an abstract name begins with `@` (proc_pid_net(5)).
pub(crate) fn listening(text: &str) -> Vec<(Service, u64)> {
    let read = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, flags, _, _, inode, name] = fields[..] else { return None };
        let name = name.strip_prefix('@')?;
        let service = Service::ALL.into_iter().find(|s| s.socket() == name)?;
        let listens = u32::from_str_radix(flags, 16).ok()? & LISTENS != 0;
        Some((service, inode.parse().ok()?)).filter(|_| listens)
    };
    text.lines().filter_map(read).collect()
}

/// What is left of a process that has ended cannot be opened (ENOENT, ESRCH).
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ESRCH)
}
