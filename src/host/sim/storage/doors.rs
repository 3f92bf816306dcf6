//! The storage doors, answered from the model.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;

use super::SimStorage;
use crate::host::block::{Blocks, Exclusive, listed};
use crate::host::cmd::{CmdError, Commands, Output, Tool};
use crate::host::multipathd::{Multipathd, MultipathdError};
use crate::host::resolver::Resolver;
use crate::host::secrets::Secrets;
use crate::host::sim::FaultAction;
use crate::host::sysfs::{Attributes, Guard, Guarded, Look, Looked, ReadError, Sysfs, View};
use crate::host::uevent::{UeventStream, Uevents};
use crate::types::{DevNum, HostPort, Outcome, SecretName, SecretText, Wwid};

/// How long a write to /sys, a flush or an answer of multipathd may take, as on the real host.
const DEADLINE: Duration = Duration::from_secs(10);

impl SimStorage {
    /// Lets a call pass its faults; one that hangs ends as on the real host.
    pub(super) async fn pass(&self, point: &str, detail: &str) -> io::Result<()> {
        tokio::time::timeout(DEADLINE, self.faults().pass(point, detail))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Carries out `work` on a task of its own: a caller that gives up does not end what the
    /// kernel does late.
    async fn detached<T, F>(&self, deadline: Duration, work: F) -> io::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = io::Result<T>> + Send + 'static,
    {
        match tokio::time::timeout(deadline, tokio::spawn(work)).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(io::Error::other("the simulated call ended with the runtime")),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The simulated /sys within a look, in which nothing waits: a fault that keeps a call is noted, and keeps the look.
struct Seen<'a> {
    sim: &'a SimStorage,
    kept: Cell<Option<FaultAction>>,
}

impl Seen<'_> {
    fn pass(&self, point: &str, detail: &str) -> io::Result<()> {
        match self.sim.faults().meet(point, detail) {
            None => Ok(()),
            Some(FaultAction::Fail(text)) => Err(io::Error::other(text)),
            Some(kept) => {
                self.kept.set(Some(kept));
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }
}

impl Attributes for Seen<'_> {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.pass("sysfs.read", path)?;
        self.sim.world().tree.read(path)
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.pass("sysfs.list", dir)?;
        self.sim.world().tree.list(dir)
    }

    fn resolve(&self, path: &str) -> io::Result<String> {
        self.pass("sysfs.resolve", path)?;
        self.sim.world().tree.resolve(path)
    }
}

#[async_trait]
impl Sysfs for SimStorage {
    async fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.pass("sysfs.read", path).await?;
        self.world().tree.read(path)
    }

    async fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.pass("sysfs.list", dir).await?;
        self.world().tree.list(dir)
    }

    async fn resolve(&self, path: &str) -> io::Result<String> {
        self.pass("sysfs.resolve", path).await?;
        self.world().tree.resolve(path)
    }

    async fn look_with(&self, about: &str, look: Look) -> Looked {
        let looked = async move {
            loop {
                let (found, kept) = {
                    let seen = Seen { sim: self, kept: Cell::default() };
                    (look(&View::of(&seen)), seen.kept.take())
                };
                let Some(kept) = kept else { return Ok(found) };
                self.faults().keep(kept).await?;
            }
        };
        let in_time = tokio::time::timeout(DEADLINE, looked).await;
        let in_time = in_time.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        in_time.map_err(ReadError::at(about))?
    }

    async fn write(&self, path: &str, value: &str) -> io::Result<()> {
        match self.write_guarded(path, value, &[]).await? {
            Guarded::Written { .. } => Ok(()),
            Guarded::Refused { .. } => Err(io::Error::other("refused without a guard")),
        }
    }

    async fn write_guarded(
        &self,
        path: &str,
        value: &str,
        guards: &[Guard],
    ) -> io::Result<Guarded> {
        let (sim, path, value, guards) =
            (self.clone(), path.to_owned(), value.to_owned(), guards.to_vec());
        self.detached(DEADLINE, async move {
            sim.faults().pass("sysfs.write", &path).await?;
            let mut world = sim.world();
            let real = world.tree.resolve(&path)?;
            for guard in guards {
                let found = match world.tree.read(&guard.path) {
                    Ok(bytes) => Some(String::from_utf8_lossy(&bytes).trim().to_owned()),
                    Err(e) if crate::host::sysfs::is_gone(&e) => None,
                    Err(e) => return Err(e),
                };
                if found.as_deref() != Some(guard.expect.trim()) {
                    return Ok(Guarded::Refused { guard, found });
                }
            }
            world.write(&real, &value)?;
            let device = path.rsplit_once('/').map_or("", |(device, _)| device);
            let gone = world.tree.resolve(device).is_err();
            Ok(Guarded::Written { gone })
        })
        .await
    }
}

impl Uevents for SimStorage {
    fn subscribe(&self) -> UeventStream {
        UeventStream::new(self.world().events.subscribe())
    }
}

#[async_trait]
impl Commands for SimStorage {
    async fn run(&self, tool: Tool, args: &[&str], deadline: Duration) -> Result<Output, CmdError> {
        if self.inner.missing_tools.lock().is_ok_and(|m| m.contains(&tool)) {
            return Err(CmdError::Missing(tool));
        }
        if tool == Tool::Iscsiadm {
            self.iscsid_place()?;
        }
        self.inner.started.fetch_add(1, Ordering::Relaxed);
        let sim = self.clone();
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        let line = format!("{} {}", tool.name(), args.join(" "));
        // A program is ended at its deadline; what it has asked iscsid for goes on.
        let asked = args.iter().any(|a| a == "--login" || a == "--logout");
        let patience = if asked { Duration::MAX } else { deadline };
        let run = self.detached(deadline, async move {
            let passed = tokio::time::timeout(patience, sim.faults().pass("cmd.run", &line)).await;
            match passed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(()) => Ok(sim.tool(tool, &args).await),
                // `exit N` orders a program that ran and failed, not one that could not be run.
                Err(e) => match e.to_string().strip_prefix("exit ").and_then(|c| c.parse().ok()) {
                    Some(code) => Ok(Output {
                        code: Some(code),
                        stdout: String::new(),
                        stderr: format!("{}: ordered to fail\n", tool.name()),
                    }),
                    None => Err(e),
                },
            }
        });
        run.await.map_err(|source| match source.kind() {
            io::ErrorKind::TimedOut => CmdError::TimedOut { tool, deadline },
            _ => CmdError::Io { tool, source },
        })
    }

    fn started(&self) -> u64 {
        self.inner.started.load(Ordering::Relaxed)
    }
}

impl SimStorage {
    async fn tool(&self, tool: Tool, args: &[String]) -> Output {
        let output = |code: i32, stderr: &str| Output {
            code: Some(code),
            stdout: String::new(),
            stderr: stderr.to_owned(),
        };
        match tool {
            Tool::Iscsiadm => self.iscsiadm(args, self.login_time()).await,
            Tool::Multipath => match args {
                [flag, wwid] if flag == "-w" => {
                    self.world().multipath.wwids.remove(wwid);
                    output(0, "")
                }
                [flag, map] if flag == "-f" => {
                    let mut world = self.world();
                    let removed = world.map_of(map).is_some_and(|m| world.remove_dm(m));
                    output(i32::from(!removed), "")
                }
                _ => output(1, "multipath: invalid arguments\n"),
            },
            Tool::Dmsetup => self.dmsetup(args),
            Tool::Lvmconfig => output(127, "not simulated"),
        }
    }

    /// `dmsetup`, only as far as it puts an `error` table under a device, and removes one.
    fn dmsetup(&self, args: &[String]) -> Output {
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut world = self.world();
        let dm = world.dm.values().find(|d| {
            words.iter().any(|w| *w == d.name || *w == d.uuid || w.ends_with(&d.kernel_name()))
        });
        let dm = dm.map(|d| (d.minor, d.error));
        let (code, stdout) = match (words.first(), dm) {
            (_, None) => (1, String::new()),
            (Some(&"wipe_table"), Some((minor, _))) => {
                world.dm.set_error(minor, true);
                world.set_slaves(minor, Vec::new());
                (0, String::new())
            }
            (Some(&"remove"), Some((minor, _))) => {
                (i32::from(!world.remove_dm(minor)), String::new())
            }
            (Some(&("load" | "reload")), Some((minor, _))) => {
                let error = words.iter().any(|w| w.split_whitespace().any(|f| f == "error"));
                world.dm.set_error(minor, error);
                (0, String::new())
            }
            (Some(&"table"), Some((_, error))) => {
                (0, format!("0 1 {}\n", if error { "error" } else { "multipath" }))
            }
            (Some(&("suspend" | "resume" | "info" | "message")), Some(_)) => (0, String::new()),
            _ => (1, String::new()),
        };
        let stderr = if code == 0 { "" } else { "Device does not exist or command unknown.\n" };
        Output { code: Some(code), stdout, stderr: stderr.to_owned() }
    }
}

#[async_trait]
impl Multipathd for SimStorage {
    async fn ask(&self, command: &str) -> Result<String, MultipathdError> {
        let passed = tokio::time::timeout(DEADLINE, self.faults().pass("multipathd.ask", command));
        match passed.await {
            Err(_) => return Err(MultipathdError::TimedOut { command: command.to_owned() }),
            Ok(Err(e)) => {
                return Err(MultipathdError::Refused {
                    command: command.to_owned(),
                    answer: e.to_string(),
                });
            }
            Ok(Ok(())) => {}
        }
        let mut world = self.world();
        if !world.multipath.running {
            return Err(MultipathdError::NotRunning);
        }
        let answer = world.multipathd_command(command);
        crate::host::multipathd::judge(command, answer)
    }

    async fn forget(&self, wwid: &Wwid) -> Result<Outcome, MultipathdError> {
        self.pass("multipathd.forget", wwid.as_str()).await.map_err(MultipathdError::Io)?;
        let there = self.world().forget(&wwid.multipath());
        Ok(if there { Outcome::Done(()) } else { Outcome::Already(()) })
    }
}

#[async_trait]
impl Blocks for SimStorage {
    async fn flush(&self, dev: DevNum) -> io::Result<()> {
        let sim = self.clone();
        self.detached(DEADLINE, async move {
            sim.faults().pass("blocks.flush", &dev.to_string()).await?;
            let works = sim.world().io_works(dev);
            match works {
                Some(true) => Ok(()),
                Some(false) => Err(io::Error::from_raw_os_error(nix::libc::EIO)),
                None => Err(io::Error::from_raw_os_error(nix::libc::ENXIO)),
            }
        })
        .await
    }

    async fn flush_unclaimed(&self, dev: DevNum) -> io::Result<Exclusive> {
        match self.exclusive(dev).await? {
            Exclusive::Free => self.flush(dev).await.map(|()| Exclusive::Free),
            Exclusive::Held => Ok(Exclusive::Held),
        }
    }

    async fn exclusive(&self, dev: DevNum) -> io::Result<Exclusive> {
        self.pass("blocks.exclusive", &dev.to_string()).await?;
        let world = self.world();
        match world.io_works(dev) {
            // The kernel looks at the claim before it has the driver open the device (bdev_open).
            _ if world.claimed(dev) => Ok(Exclusive::Held),
            None => Err(io::Error::from_raw_os_error(nix::libc::ENXIO)),
            Some(_) => Ok(Exclusive::Free),
        }
    }

    async fn mapped(&self, uuid: &str) -> io::Result<Option<DevNum>> {
        self.pass("blocks.mapped", uuid).await?;
        Ok(self.world().dm.by_uuid(uuid).map(|dm| dm.dev()))
    }

    async fn failed_paths(&self, maps: &[DevNum]) -> io::Result<Vec<BTreeSet<DevNum>>> {
        self.pass("blocks.failed_paths", &listed(maps)).await?;
        let world = self.world();
        Ok(maps.iter().map(|map| world.failed_paths(*map)).collect())
    }

    async fn openers(&self, devs: &[DevNum]) -> io::Result<Vec<Vec<String>>> {
        self.pass("blocks.openers", &listed(devs)).await?;
        let world = self.world();
        let of = |dev: &DevNum| {
            let kept = [&world.claims, &world.opens].into_iter().filter_map(|m| m.get(dev));
            kept.flatten().cloned().collect()
        };
        Ok(devs.iter().map(of).collect())
    }
}

#[async_trait]
impl Secrets for SimStorage {
    async fn read(&self, name: &SecretName, keys: &[&str]) -> io::Result<Vec<Option<SecretText>>> {
        self.pass("secrets.read", name.as_str()).await?;
        let secrets = super::lock(&self.inner.secrets);
        let found = secrets.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(keys.iter().map(|key| found.get(*key).cloned()).collect())
    }
}

#[async_trait]
impl Resolver for SimStorage {
    async fn resolve(&self, name: &HostPort) -> io::Result<Vec<SocketAddr>> {
        self.pass("resolver.resolve", &name.to_string()).await?;
        let hosts = super::lock(&self.inner.hosts);
        let ip = hosts.get(name.host()).ok_or(io::ErrorKind::NotFound)?;
        Ok(vec![SocketAddr::new(*ip, name.port())])
    }
}
