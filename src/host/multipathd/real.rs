//! multipathd's socket (libmpathcmd): a native `size_t` with the length including the closing NUL,
//! then the text, both ways; one command a connection.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{Multipathd, MultipathdError, files, judge};
use crate::doctor::Service;
use crate::host::place::{Pinned, Place, Places};
use crate::host::workers::Workers;
use crate::types::{Outcome, Wwid};

/// The abstract name; anybody in the network namespace may bind it while multipathd does not.
const ABSTRACT: &str = "\0/org/kernel/linux/storage/multipathd";
/// Where newer versions listen as well.
const PATHNAME: &str = "/run/multipathd.socket";
/// Longer commands are cut off by the daemon.
const MAX_COMMAND: usize = 511;
/// Between two tries to connect while others are as many as it lets wait.
const NO_ROOM: Duration = Duration::from_millis(5);
/// libmpathcmd's own bound (MAX_REPLY_LEN) on what it takes for an answer.
const MAX_REPLY: usize = 32 << 20;

/// Asks the real multipathd.
pub struct RealMultipathd {
    sockets: Vec<PathBuf>,
    trusted_uid: u32,
    files: PathBuf,
    places: Option<Places>,
    workers: Workers,
}

impl RealMultipathd {
    /// `files` is the directory of `wwids` and `bindings`, `/etc/multipath` on a node.
    pub fn new(files: impl Into<PathBuf>) -> Self {
        let sockets = vec![PathBuf::from(ABSTRACT), PathBuf::from(PATHNAME)];
        Self::at(sockets, 0, files)
    }

    /// At other sockets, served by another user. A path that begins with NUL is an abstract name.
    pub fn at(sockets: Vec<PathBuf>, trusted_uid: u32, files: impl Into<PathBuf>) -> Self {
        let workers = Workers::new("lunplug-mpath", 2, 2);
        Self { sockets, trusted_uid, files: files.into(), places: None, workers }
    }

    /// The same with the files beneath the root of whoever serves as multipathd.
    pub(crate) fn placed(self, places: Places) -> Self {
        Self { places: Some(places), ..self }
    }

    /// Connects to the first socket that is served by whom we trust.
    async fn connect(&self) -> Result<UnixStream, MultipathdError> {
        let mut refusal = MultipathdError::NotRunning;
        for path in &self.sockets {
            let stream = match connect_in_turn(path).await {
                Ok(stream) => stream,
                Err(e) if is_absent(&e, path) => continue,
                Err(e) => {
                    refusal = MultipathdError::Io(e);
                    continue;
                }
            };
            // Who called listen(): under systemd's socket activation that is root as well.
            match stream.peer_cred().map_err(MultipathdError::Io)?.uid() {
                uid if uid == self.trusted_uid => return Ok(stream),
                uid => refusal = MultipathdError::Untrusted { uid },
            }
        }
        Err(refusal)
    }
}

/// The directory of its files, as it can be used from here. They are edited as its own are, so they are
/// those of the one that serves, or would.
fn beneath(places: Option<&Places>, dir: PathBuf) -> io::Result<Pinned> {
    match places.map(|places| places.of(Service::Multipathd)).transpose()? {
        Some(Place::Other(root)) => root.dir(&dir.to_string_lossy()),
        Some(Place::Ours) | None => Ok(Pinned::ours(dir)),
    }
}

/// Connects as soon as multipathd has room for another client: the kernel refuses one too many at once (EAGAIN)
/// and tells nobody when there is room. The caller has the deadline.
async fn connect_in_turn(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(NO_ROOM).await,
            connected => return connected,
        }
    }
}

fn is_absent(error: &io::Error, path: &Path) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    // The abstract name is refused where nobody has bound it.
    error.kind() == ConnectionRefused
        || (error.kind() == NotFound && !path.as_os_str().as_bytes().starts_with(b"\0"))
}

async fn exchange(mut stream: UnixStream, command: &str) -> io::Result<String> {
    let mut message = (command.len() + 1).to_ne_bytes().to_vec();
    message.extend(command.as_bytes());
    message.push(0);
    stream.write_all(&message).await?;
    let mut length = [0; size_of::<usize>()];
    stream.read_exact(&mut length).await?;
    let length = usize::from_ne_bytes(length);
    if length == 0 || length >= MAX_REPLY {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("multipathd announced an answer of {length} bytes"),
        ));
    }
    // Grown as it comes: the announced length is not trusted with memory.
    let mut answer = Vec::new();
    let announced = u64::try_from(length).map_err(io::Error::other)?;
    stream.take(announced).read_to_end(&mut answer).await?;
    if answer.len() != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    while answer.last() == Some(&0) {
        answer.pop();
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[async_trait]
impl Multipathd for RealMultipathd {
    async fn ask(&self, command: &str) -> Result<String, MultipathdError> {
        if command.len() > MAX_COMMAND || command.contains('\0') {
            return Err(MultipathdError::Io(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a command for multipathd has at most {MAX_COMMAND} bytes and no NUL"),
            )));
        }
        let stream = self.connect().await?;
        judge(command, exchange(stream, command).await.map_err(MultipathdError::Io)?)
    }

    async fn forget(&self, wwid: &Wwid) -> Result<Outcome, MultipathdError> {
        let (dir, wwid) = (self.files.clone(), wwid.multipath());
        let places = self.places.clone();
        let call = move || {
            let pinned = beneath(places.as_ref(), dir)?;
            let dir = &pinned.path;
            let listed = files::forget_wwid(&dir.join("wwids"), &wwid)?;
            let bound = files::forget_binding(&dir.join("bindings"), &wwid)?;
            Ok(listed || bound)
        };
        // Twice the lock's own waiting time, one for each file.
        let deadline = Duration::from_secs(12);
        let changed = self.workers.run("files", deadline, call).await;
        match changed.map_err(MultipathdError::Io)? {
            true => Ok(Outcome::Done(())),
            false => Ok(Outcome::Already(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::multipathd::InTurn;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    fn uid() -> u32 {
        nix::unistd::geteuid().as_raw()
    }

    /// Serves one command with `answer`, or with silence, and hands back what was asked.
    fn serve(
        path: &Path,
        answer: Option<&'static [u8]>,
    ) -> std::thread::JoinHandle<(usize, Vec<u8>)> {
        let listener = UnixListener::bind(path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let Some(answer) = answer else {
                // Until the client goes away.
                let _ = stream.read_to_end(&mut Vec::new());
                return Default::default();
            };
            let mut length = [0; size_of::<usize>()];
            stream.read_exact(&mut length).unwrap();
            let length = usize::from_ne_bytes(length);
            let mut command = vec![0; length];
            stream.read_exact(&mut command).unwrap();
            stream.write_all(&answer.len().to_ne_bytes()).unwrap();
            stream.write_all(answer).unwrap();
            (length, command)
        })
    }

    fn door(dir: &Path) -> RealMultipathd {
        let sockets = vec![dir.join("absent"), dir.join("socket")];
        RealMultipathd::at(sockets, uid(), dir)
    }

    #[tokio::test]
    async fn a_command_and_its_answer_carry_length_and_nul() {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(&dir.path().join("socket"), Some(b"mpatha 36001\n\0"));
        let answer = door(dir.path()).ask("show maps raw format \"%n %w\"").await.unwrap();
        assert_eq!(answer, "mpatha 36001\n");
        let (length, command) = server.join().unwrap();
        assert_eq!(command, b"show maps raw format \"%n %w\"\0");
        assert_eq!(length, command.len());
    }

    #[tokio::test]
    async fn refusals_are_told_from_answers() {
        for (answer, refused) in [
            (&b"ok\n\0"[..], false),
            (b"fail\n\0", true),
            (b"timeout\n\0", true),
            (b"blacklisted\n\0", false),
            (b"delayed\n\0", false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let server = serve(&dir.path().join("socket"), Some(answer));
            let result = door(dir.path()).ask("del map x").await;
            assert_eq!(matches!(result, Err(MultipathdError::Refused { .. })), refused);
            server.join().unwrap();
        }
    }

    #[tokio::test]
    async fn silence_an_absent_daemon_and_a_strangers_socket_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let absent = door(dir.path()).ask("show daemon").await;
        assert!(matches!(absent, Err(MultipathdError::NotRunning)));
        let nobody = vec![PathBuf::from("\0/lunplug/test/nobody-listens-here")];
        let absent = RealMultipathd::at(nobody, uid(), dir.path()).ask("show daemon").await;
        assert!(matches!(absent, Err(MultipathdError::NotRunning)));

        let socket = dir.path().join("socket");
        let server = serve(&socket, None);
        let door_in_turn =
            InTurn::new(std::sync::Arc::new(door(dir.path())), Duration::from_millis(100));
        let silent = door_in_turn.ask("show daemon").await;
        assert!(matches!(silent, Err(MultipathdError::TimedOut { .. })));
        server.join().unwrap();

        std::fs::remove_file(&socket).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        let strange = RealMultipathd::at(vec![socket], uid() + 1, dir.path());
        let untrusted = strange.ask("show daemon").await;
        assert!(matches!(untrusted, Err(MultipathdError::Untrusted { uid: u }) if u == uid()));
    }

    #[tokio::test]
    async fn a_client_of_a_burst_waits_until_there_is_room() {
        use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &UnixAddr::new(&path).unwrap())
            .unwrap();
        socket::listen(&socket, Backlog::new(0).unwrap()).unwrap();
        let listener = UnixListener::from(socket);
        let _before = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let door = door(dir.path());
        let serve = async {
            // The other one has tried by now, and there was no room.
            drop(listener.accept().unwrap());
            std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(&4_usize.to_ne_bytes()).unwrap();
                stream.write_all(b"ok\n\0").unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            })
        };
        let (answer, server) = tokio::join!(door.ask("show daemon"), serve);
        assert_eq!(answer.unwrap(), "ok\n");
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_hostile_length_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&usize::MAX.to_ne_bytes()).unwrap();
            let _ = stream.read(&mut [0; 64]);
        });
        let answer = door(dir.path()).ask("show daemon").await;
        assert!(matches!(answer, Err(MultipathdError::Io(_))));
        server.join().unwrap();
        let long = "x".repeat(600);
        assert!(matches!(door(dir.path()).ask(&long).await, Err(MultipathdError::Io(_))));
    }

    #[tokio::test]
    async fn forgetting_is_idempotent() {
        let dir = tempfile::tempdir().unwrap();
        let wwid: Wwid = "naa.60014050000000000000000000000001".parse().unwrap();
        std::fs::write(dir.path().join("wwids"), format!("/{}/\n", wwid.multipath())).unwrap();
        std::fs::write(dir.path().join("bindings"), format!("mpatha {}\n", wwid.multipath()))
            .unwrap();
        let door = door(dir.path());
        assert_eq!(door.forget(&wwid).await.unwrap(), Outcome::Done(()));
        assert_eq!(door.forget(&wwid).await.unwrap(), Outcome::Already(()));
        assert_eq!(std::fs::read(dir.path().join("bindings")).unwrap(), b"");
    }
}
