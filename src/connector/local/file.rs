//! A file as it is found, and what is known by it.

use super::device::known_by;
use super::lease::{Found, LocalUser};
use super::{Local, allowed, qcow2, roots_setting};
use crate::connector::error::Error;
use crate::connector::identity::judge;
use crate::connector::{AttachRequest, Attachment};
use crate::host::local::{FileSeen, HostFile, SourceError};
use crate::spec::{DeviceStatus, FileSource, Source};
use crate::step::Step;
use crate::types::{DevNum, FileFormat, Wwid};

/// A file that is a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskFile {
    /// Where it is, and which.
    pub(super) file: HostFile,
    /// How it is now.
    pub(super) seen: FileSeen,
    /// The size of the disk in it, in bytes.
    pub(super) size: u64,
}

impl Local {
    /// Finds the file of a source.
    pub(super) async fn find_file(
        &self,
        of: &Source,
        source: &FileSource,
    ) -> Result<DiskFile, Error> {
        let Some((root, rest)) = allowed(&self.settings.local, of) else {
            let setting = roots_setting(of);
            return Err(Error::NotAllowed { path: source.path.to_string(), setting });
        };
        let seen = self.doors.local.file(root, rest).await?;
        let (root, rest) = (root.to_owned(), rest.to_owned());
        let size = disk_size(source, &seen)?;
        Ok(DiskFile { file: HostFile { root, rest, inode: seen.inode }, seen, size })
    }

    /// The file that an attachment is of, if it is still that one. That it may be had was asked when it was
    /// attached.
    pub(super) async fn same_file(
        &self,
        of: &Source,
        attachment: &Attachment,
    ) -> Result<Option<DiskFile>, Error> {
        let (Some(source), Some(file)) = (of.as_file(), &attachment.file) else {
            return Ok(None);
        };
        let seen = match self.doors.local.file(&file.root, &file.rest).await {
            Err(error @ SourceError::Io { .. }) => return Err(error.into()),
            Err(_) => return Ok(None),
            Ok(seen) => seen,
        };
        let same = seen.inode == file.inode;
        Ok(match disk_size(source, &seen) {
            Ok(size) if same => Some(DiskFile { file: file.clone(), seen, size }),
            _ => None,
        })
    }

    /// Proves that the file may be had, and claims it for the user.
    pub(super) async fn take_file(
        &self,
        request: &AttachRequest,
        source: &FileSource,
        user: &mut LocalUser,
    ) -> Result<Attachment, Error> {
        let tracker = &self.doors.tracker;
        let prove = self.prove_file(request, source);
        let (disk, identity) = tracker.run(Step::Identity, prove).await?;
        let found = Found {
            wwid: identity.clone(),
            dev: DevNum::NONE,
            diskseq: 0,
            file: Some(disk.file.inode),
        };
        user.step = Some(Step::Claim);
        user.found = Some(found.clone());
        tracker.run(Step::Claim, self.claim_unproven(request, user, &found)).await?;
        if !request.read_only && disk.seen.read_only {
            let hint = ", whose file system is mounted for reading only";
            return Err(Error::ReadOnly { device: source.path.to_string(), hint });
        }
        let in_use =
            user.attachment.is_some() || self.is_shared(&request.owner, &request.source).await?;
        if disk.seen.locked && !in_use {
            let holder = "a process that has locked it as QEMU does".into();
            return Err(Error::DeviceHeld { device: source.path.to_string(), holder });
        }
        Ok(Attachment {
            device: DeviceStatus {
                dev: DevNum::NONE,
                wwid: identity,
                size: disk.size,
                map: None,
                paths: 1,
            },
            diskseq: 0,
            paths: Vec::new(),
            file: Some(disk.file),
        })
    }

    async fn prove_file(
        &self,
        request: &AttachRequest,
        source: &FileSource,
    ) -> Result<(DiskFile, Wwid), Error> {
        let disk = self.find_file(&request.source, source).await?;
        // A path of a source is within what an identity may be.
        let device = source.path.to_string();
        let wwid = format!("path.{}", source.path).parse();
        let identity = known_by(wwid.map_err(|_| Error::NoIdentity { device })?);
        judge(source.path.as_str(), &request.expect, &identity, disk.size)?;
        Ok((disk, identity.wwid))
    }
}

/// The size of the disk that is in a file.
fn disk_size(source: &FileSource, seen: &FileSeen) -> Result<u64, Error> {
    let path = source.path.to_string();
    let size = match source.format {
        FileFormat::Raw => seen.size,
        FileFormat::Qcow2 => {
            let header = qcow2::read(&seen.head);
            header.map_err(|source| Error::Image { path: path.clone(), source })?.size
        }
    };
    if size == 0 {
        let (path, is) = (source.path.as_path().to_owned(), "an empty disk");
        return Err(SourceError::Other { path, is, wanted: "one of at least 512 bytes" }.into());
    }
    Ok(size)
}
