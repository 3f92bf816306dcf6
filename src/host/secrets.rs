//! Secrets by reference: `DIR/NAME/KEY`, as Kubernetes mounts a secret, or as an operator writes it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use zeroize::Zeroizing;

use super::workers::Workers;
use crate::types::{SecretName, SecretText};

/// A local file system, mostly a tmpfs; only one in trouble takes this long.
const DEADLINE: Duration = Duration::from_secs(5);
/// A name or a secret of CHAP has 255 bytes at most.
const MAX: u64 = 4096;

/// The door to the configured directory of secrets.
#[async_trait]
pub trait Secrets: Send + Sync {
    /// The values of `keys` in a secret, in their order; `None` for one that it does not have. A
    /// secret that is not there is `NotFound`. No error shows a value.
    async fn read(&self, name: &SecretName, keys: &[&str]) -> io::Result<Vec<Option<SecretText>>>;
}

/// The real directory. It is opened anew each time: an operator, or kubelet, may exchange what is in it.
pub struct RealSecrets {
    dir: PathBuf,
    workers: Workers,
}

impl RealSecrets {
    /// The secrets in `dir`, which need not be there.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), workers: Workers::new("lunplug-secrets", 2, 2) }
    }
}

#[async_trait]
impl Secrets for RealSecrets {
    async fn read(&self, name: &SecretName, keys: &[&str]) -> io::Result<Vec<Option<SecretText>>> {
        let (dir, name) = (self.dir.clone(), name.clone());
        let keys: Vec<String> = keys.iter().map(|k| (*k).to_owned()).collect();
        let call = move || {
            let secret = open_secret(&dir, &name)?;
            keys.iter().map(|key| value(&secret, key)).collect()
        };
        self.workers.run("secrets", DEADLINE, call).await
    }
}

/// The configured directory is the host's own and may be a symlink; the secret's may not.
fn open_secret(dir: &Path, name: &SecretName) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = nix::fcntl::open(dir, flags, Mode::empty())?;
    let how = OpenHow::new().flags(flags).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    );
    Ok(openat2(&dir, name.as_str(), how)?)
}

/// kubelet exchanges a secret's values by a symlink (`KEY -> ..data/KEY`, `..data -> ..2026_11_20...`),
/// so symlinks are followed here, but none that leads out of the secret's own directory.
fn value(secret: &OwnedFd, key: &str) -> io::Result<Option<SecretText>> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(secret, key, how) {
        Ok(fd) => File::from(fd),
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(named(key, errno.into())),
    };
    let meta = file.metadata().map_err(|e| named(key, e))?;
    if !meta.is_file() || meta.len() > MAX {
        let text = "it must be a file of at most 4096 bytes";
        return Err(named(key, io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    // Of its full size from the start: one that grew would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(MAX).unwrap_or(0) + 1));
    file.take(MAX).read_to_end(&mut bytes).map_err(|e| named(key, e))?;
    let Ok(text) = std::str::from_utf8(&bytes) else {
        let text = "it is not text";
        return Err(named(key, io::Error::new(io::ErrorKind::InvalidData, text)));
    };
    // `echo` writes a line's end that nobody means.
    Ok(Some(text.strip_suffix('\n').unwrap_or(text).to_owned().into()))
}

fn named(key: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{key}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    async fn read(dir: &Path, name: &str, key: &str) -> io::Result<Option<String>> {
        let found = RealSecrets::new(dir).read(&name.parse().unwrap(), &[key]).await?;
        Ok(found[0].as_ref().map(|t| t.expose().to_owned()))
    }

    #[tokio::test]
    async fn a_secret_is_read_as_kubelet_mounts_it_and_as_people_write_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        fs::create_dir_all(at("mounted/..2026_11_20")).unwrap();
        fs::write(at("mounted/..2026_11_20/user"), "kube").unwrap();
        symlink("..2026_11_20", at("mounted/..data")).unwrap();
        symlink("..data/user", at("mounted/user")).unwrap();
        fs::create_dir(at("plain")).unwrap();
        fs::write(at("plain/user"), "by hand\n").unwrap();
        assert_eq!(read(dir.path(), "mounted", "user").await.unwrap().unwrap(), "kube");
        assert_eq!(read(dir.path(), "plain", "user").await.unwrap().unwrap(), "by hand");
        assert_eq!(read(dir.path(), "plain", "other").await.unwrap(), None);
        let none = read(dir.path(), "none", "user").await.unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
        let none = read(&at("nowhere"), "none", "user").await.unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn nothing_outside_of_a_secret_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        fs::write(at("outside"), "hush").unwrap();
        fs::create_dir_all(at("secrets/s/sub")).unwrap();
        symlink("../../outside", at("secrets/s/up")).unwrap();
        symlink(at("outside"), at("secrets/s/absolute")).unwrap();
        symlink(dir.path(), at("secrets/away")).unwrap();
        fs::write(at("secrets/s/long"), "x".repeat(4097)).unwrap();
        nix::unistd::mkfifo(&at("secrets/s/fifo"), Mode::S_IRWXU).unwrap();
        let secrets = at("secrets");
        for (name, key) in [
            ("s", "up"),
            ("s", "absolute"),
            ("s", "../../outside"),
            ("s", "sub"),
            ("s", "fifo"),
            ("s", "long"),
            ("away", "outside"),
        ] {
            let error = read(&secrets, name, key).await.expect_err(key);
            assert!(!error.to_string().contains("hush"), "{error}");
        }
    }
}
