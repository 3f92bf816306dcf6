//! Several reads as one call: a device is known by half a dozen attributes, and each call on its own goes to a
//! thread that may block, and back.

use std::any::Any;
use std::io;

use super::{Sysfs, is_gone};

/// What is done in one look; a value of the type that the look is of. It may be done again.
pub type Look = Box<dyn Fn(&View<'_>) -> Looked + Send>;

/// What came of it.
pub type Looked = Result<Box<dyn Any + Send>, ReadError>;

/// Something below /sys that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("reading {path}")]
pub struct ReadError {
    /// Which.
    pub path: String,
    /// Why.
    pub source: io::Error,
}

impl ReadError {
    pub(crate) fn at(path: &str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { path: path.to_owned(), source }
    }

    /// Whether the driver has nothing to say by that attribute.
    pub(crate) fn is_invalid(&self) -> bool {
        self.source.raw_os_error() == Some(nix::libc::EINVAL)
    }
}

/// /sys for one who may block. Paths as for [`Sysfs`].
pub trait Attributes {
    /// See [`Sysfs::read`].
    fn read(&self, path: &str) -> io::Result<Vec<u8>>;

    /// See [`Sysfs::list`].
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// See [`Sysfs::resolve`].
    fn resolve(&self, path: &str) -> io::Result<String>;
}

/// /sys within one look. What is not there, or just going, is `None` or empty.
pub struct View<'a>(pub(super) &'a dyn Attributes);

impl<'a> View<'a> {
    pub(in crate::host) fn of(attributes: &'a dyn Attributes) -> Self {
        Self(attributes)
    }

    /// An attribute's bytes, as they are.
    pub fn bytes(&self, path: &str) -> Result<Option<Vec<u8>>, ReadError> {
        there(path, self.0.read(path))
    }

    /// An attribute as text without surrounding white space.
    pub fn text(&self, path: &str) -> Result<Option<String>, ReadError> {
        let bytes = self.bytes(path)?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()))
    }

    /// The names in a directory, sorted.
    pub fn entries(&self, dir: &str) -> Result<Vec<String>, ReadError> {
        there(dir, self.0.list(dir)).map(Option::unwrap_or_default)
    }

    /// The path with all symlinks followed.
    pub fn resolve(&self, path: &str) -> Result<Option<String>, ReadError> {
        there(path, self.0.resolve(path))
    }
}

fn there<T>(path: &str, read: io::Result<T>) -> Result<Option<T>, ReadError> {
    match read {
        Ok(found) => Ok(Some(found)),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(ReadError::at(path)(e)),
    }
}

impl dyn Sysfs + '_ {
    /// Does several reads in a row, with one deadline for all. `about` is what is read, a device or a class: calls
    /// that the kernel keeps are counted by it.
    pub async fn look<T: Send + 'static>(
        &self,
        about: &str,
        look: impl Fn(&View<'_>) -> Result<T, ReadError> + Send + 'static,
    ) -> Result<T, ReadError> {
        let erased: Look = Box::new(move |view| Ok(Box::new(look(view)?)));
        let found = self.look_with(about, erased).await?;
        let found = found.downcast().map_err(|_| io::Error::other("a look gave something else"));
        found.map(|found| *found).map_err(ReadError::at(about))
    }
}
