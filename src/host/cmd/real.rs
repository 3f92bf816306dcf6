//! Programs as child processes.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use super::{CmdError, Commands, Output, Tool};
use crate::doctor::Service;
use crate::host::place::{Entry, Place, PlaceError, Places};
use crate::host::workers::Workers;

/// What a child sees of `PATH`, and where programs are looked for after our own `PATH`.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Between SIGTERM and SIGKILL: a killed iscsiadm leaves its database locked.
const GRACE: Duration = Duration::from_secs(3);
/// More than any of the tools has reason to print.
const OUTPUT_LIMIT: u64 = 1 << 20;
/// For finding where a program is: /proc and a few directories.
const LOOK: Duration = Duration::from_secs(10);

/// Runs real programs.
pub struct RealCommands {
    own: Arc<Own>,
    /// Where daemons are whose programs are run beneath their roots; `None`: all are run beneath ours.
    places: Option<Places>,
    workers: Workers,
    started: AtomicU64,
}

/// The programs beneath our own root.
struct Own {
    search: Vec<PathBuf>,
    found: Mutex<HashMap<Tool, PathBuf>>,
}

/// A program, and the way to it where that is another's root.
struct Program {
    path: PathBuf,
    entry: Option<Entry>,
}

impl RealCommands {
    /// Looks in the directories of `path` (as in `PATH`) and then in those where distributions put
    /// system tools.
    pub fn new(path: Option<OsString>) -> Self {
        let own = path.map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
        let system = std::env::split_paths(SYSTEM_PATH);
        // A relative entry would mean another program in another working directory.
        Self::in_dirs(Vec::into_iter(own).chain(system).filter(|d| d.is_absolute()).collect())
    }

    /// Looks in `dirs` alone.
    pub fn in_dirs(dirs: Vec<PathBuf>) -> Self {
        let own = Arc::new(Own { search: dirs, found: Mutex::default() });
        let workers = Workers::new("lunplug-place", 4, 4);
        Self { own, places: None, workers, started: AtomicU64::new(0) }
    }

    /// The same with the programs of daemons that live beneath other roots.
    pub(crate) fn placed(self, places: Places) -> Self {
        Self { places: Some(places), ..self }
    }

    async fn program(&self, tool: Tool) -> Result<Program, CmdError> {
        let (own, places) = (self.own.clone(), self.places.clone());
        let look = move || Ok(own.program(tool, places.as_ref()));
        let found = self.workers.run("place", LOOK, look).await;
        found.unwrap_or_else(|source| Err(CmdError::Io { tool, source }))
    }
}

impl Own {
    /// Where a program is; looked up once, and again only while it is missing.
    fn locate(&self, tool: Tool) -> Option<PathBuf> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = found.get(&tool) {
            return Some(path.clone());
        }
        let path = self.search.iter().map(|d| d.join(tool.name())).find(|p| executable(p))?;
        found.insert(tool, path.clone());
        Some(path)
    }

    fn program(&self, tool: Tool, places: Option<&Places>) -> Result<Program, CmdError> {
        let own = || {
            let path = self.locate(tool).ok_or(CmdError::Missing(tool))?;
            Ok(Program { path, entry: None })
        };
        let Some(places) = places else { return own() };
        for place in homes(tool, places)? {
            let Place::Other(root) = place else { return own() };
            if let Some(path) = root.program(tool.name()) {
                let entry = root.entry().map_err(|source| CmdError::Io { tool, source })?;
                return Ok(Program { path, entry: Some(entry) });
            }
            if tool == Tool::Iscsiadm {
                // Another one's would speak another version's protocol, and write other records.
                let (service, pid) = (Service::Iscsid, root.pid());
                return Err(PlaceError::Lacks { service, pid, what: tool.name() }.into());
            }
        }
        own()
    }
}

/// Beneath whose root a program is to be run: the first of these that has it.
fn homes(tool: Tool, places: &Places) -> Result<Vec<Place>, CmdError> {
    Ok(match tool {
        Tool::Iscsiadm => vec![places.of(Service::Iscsid)?],
        // They wait for udev, which answers on the host.
        Tool::Multipath | Tool::Dmsetup => match places.of(Service::Multipathd) {
            Ok(Place::Ours) => vec![Place::Ours],
            Ok(other) => vec![other, places.host()],
            Err(_) => vec![places.host()],
        },
        Tool::Lvmconfig => vec![places.host()],
    })
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[async_trait]
impl Commands for RealCommands {
    async fn run(&self, tool: Tool, args: &[&str], deadline: Duration) -> Result<Output, CmdError> {
        let program = self.program(tool).await?;
        let failed = move |source| CmdError::Io { tool, source };
        let mut command = Command::new(program.path);
        command
            .args(args)
            .env_clear()
            .env("PATH", SYSTEM_PATH)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Not in our group: what a terminal or a service manager sends us is not for it.
            .process_group(0)
            .kill_on_drop(true);
        if let Some(entry) = program.entry {
            entry.prepare(&mut command);
        }
        let child = command.spawn().map_err(failed)?;
        self.started.fetch_add(1, Ordering::Relaxed);
        // A task of its own: a caller that is dropped must not kill the program half way.
        let task = tokio::spawn(attend(child, deadline));
        match task.await.map_err(|e| failed(io::Error::other(e)))? {
            Ok(Some(output)) => Ok(output),
            Ok(None) => Err(CmdError::TimedOut { tool, deadline }),
            Err(source) => Err(failed(source)),
        }
    }

    fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }
}

/// Waits for the end; after the deadline ends it, and says `None`.
async fn attend(mut child: Child, deadline: Duration) -> io::Result<Option<Output>> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let run = async {
        let (stdout, stderr, status) = tokio::join!(text(stdout), text(stderr), child.wait());
        Ok::<_, io::Error>((stdout?, stderr?, status?))
    };
    match tokio::time::timeout(deadline, run).await {
        Ok(ended) => {
            let (stdout, stderr, status) = ended?;
            Ok(Some(Output { code: ExitStatus::code(&status), stdout, stderr }))
        }
        Err(_) => {
            end(&mut child).await?;
            Ok(None)
        }
    }
}

async fn end(child: &mut Child) -> io::Result<()> {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    // The pid cannot be another's: the child is not reaped before `wait` below.
    if let Some(pid) = pid
        && kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok()
        && tokio::time::timeout(GRACE, child.wait()).await.is_ok()
    {
        return Ok(());
    }
    // In uninterruptible sleep it stays a while; tokio reaps it when it ends.
    child.start_kill()
}

async fn text(pipe: Option<impl AsyncRead + Unpin>) -> io::Result<String> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        (&mut pipe).take(OUTPUT_LIMIT).read_to_end(&mut bytes).await?;
        // The rest is read and dropped, lest the program waits for us.
        tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn script(body: &str) -> (tempfile::TempDir, RealCommands) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("iscsiadm");
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let commands = RealCommands::in_dirs(vec![dir.path().to_owned()]);
        (dir, commands)
    }

    #[tokio::test]
    async fn arguments_arrive_whole_and_the_environment_is_bare() {
        let (_dir, commands) = script(
            "printf '%s|' \"$@\"; env | cut -d= -f1 | sort | tr '\\n' ' '; echo no >&2; exit 21",
        );
        let output = commands.run(Tool::Iscsiadm, &["a b", "$(id)", ""], LONG).await.unwrap();
        assert_eq!(output.code, Some(21));
        assert!(output.stdout.starts_with("a b|$(id)||"), "{}", output.stdout);
        assert!(output.stdout.contains("LC_ALL "));
        assert!(!output.stdout.contains("CARGO"), "{}", output.stdout);
        assert_eq!(output.stderr, "no\n");
        assert_eq!(commands.started(), 1);
    }

    #[tokio::test]
    async fn one_that_is_not_there_is_named_with_its_package() {
        let (_dir, commands) = script("");
        let missing = commands.run(Tool::Multipath, &[], LONG).await.unwrap_err();
        assert_eq!(missing.to_string(), "multipath is not installed (package multipath-tools)");
        assert_eq!(commands.started(), 0);
    }

    #[tokio::test]
    async fn past_its_deadline_it_is_ended() {
        let (_dir, commands) = script("exec sleep 600");
        let late = commands.run(Tool::Iscsiadm, &[], Duration::from_millis(50)).await;
        assert!(matches!(late, Err(CmdError::TimedOut { tool: Tool::Iscsiadm, .. })));
    }

    #[tokio::test]
    async fn it_may_clean_up_before_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let body =
            "trap 'echo cleaned > \"$0\"; exit 0' TERM; echo up; while :; do read -r _; done";
        let mut child = Command::new("/bin/sh")
            .args(["-c", body])
            .arg(&mark)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut up).await.unwrap();
        end(&mut child).await.unwrap();
        assert_eq!(std::fs::read_to_string(mark).unwrap(), "cleaned\n");
    }
}
