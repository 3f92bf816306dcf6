//! `lunplug addvolume`.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zeroize::Zeroizing;

use super::chap::ChapFile;
use super::client::{CALL, connect, timed, timed_for};
use super::disk::DiskFlags;
use super::failure::{Exit, Failure};
use super::file::{self, SourceFile, VolumeFile};
use super::output::{self, Format};
use super::wait::{Goal, wait};
use super::{Screen, VmArg, foreign};
use crate::api::convert::wire_vm_id;
use crate::api::v1;

/// How to wait.
#[derive(Debug, clap::Args)]
pub(super) struct Waiting {
    /// Return as soon as the wish is durable.
    #[arg(long)]
    no_wait: bool,
    /// Wait so long at most, e.g. 30s or 2m; lunplugd goes on afterwards.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    timeout: Duration,
    /// Check everything, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Waiting {
    /// The daemon's answer, or, if that is wanted, the end of what it began.
    pub(super) async fn end(
        &self,
        socket: &Path,
        client: super::Client,
        goal: Goal,
        volume: v1::Volume,
        screen: &mut Screen<'_>,
    ) -> Result<v1::Volume, Failure> {
        let Some(patience) = self.patience(screen)? else { return Ok(volume) };
        wait(socket, client, goal, volume, patience, screen).await
    }

    /// How long to wait, if that is wanted; says so when nothing was changed.
    pub(super) fn patience(&self, screen: &mut Screen<'_>) -> Result<Option<Duration>, Failure> {
        if self.dry_run {
            writeln!(screen.err, "dry run: nothing was changed")?;
        }
        let wanted = !self.dry_run && !self.no_wait;
        Ok(wanted.then_some(self.timeout))
    }

    /// A request about many volumes, with the deadline of a call.
    pub(super) fn timed<T>(&self, message: T) -> tonic::Request<T> {
        timed_for(self.timeout.max(CALL), message)
    }

    pub(super) fn dry_run(&self) -> bool {
        self.dry_run
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|value| Duration::try_from(value).ok())
        .filter(|value| *value <= Duration::from_secs(7 * 24 * 3600))
        .ok_or_else(|| "write it as 30s, 2m or 1h 30m, at most 7 days".into())
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    vm: VmArg,
    /// The volume's name: a DNS-1123 label, at most 63 characters.
    #[arg(long, value_name = "NAME", required_unless_present = "file")]
    volume_name: Option<String>,
    /// A shorter name for the disk, seen in its alias and its node [default: the volume's name].
    #[arg(long, value_name = "NAME")]
    disk_name: Option<String>,
    /// Where the data lives: a URL, e.g. iscsi://10.0.0.1,san-b/IQN/LUN, fc://WWPN,WWPN/LUN, block:///dev/NAME, file:///PATH or file+qcow2:///PATH; where the LUN is to
    /// be had at further targets, each of them after a +.
    #[arg(long, value_name = "URL", required_unless_present = "file")]
    source: Option<String>,
    /// Read the volume from a file, YAML or JSON, `-` for stdin; flags win over it. Also a Kubernetes
    /// PersistentVolume or its iscsi, fc or local stanza, or Cinder's connection_info, together with --volume-name.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The serial that the guest sees, at most 36 characters (bus virtio: 20) [default: the
    /// volume's name].
    #[arg(long)]
    serial: Option<String>,
    /// none, writethrough or writeback [default: none].
    #[arg(long, value_name = "MODE")]
    cache: Option<String>,
    /// What QEMU does on an I/O error: stop (pause the guest), report, ignore or enospace [default:
    /// QEMU's own].
    #[arg(long, value_name = "POLICY")]
    error_policy: Option<String>,
    /// scsi or virtio [default: scsi].
    #[arg(long)]
    bus: Option<String>,
    /// disk; lun: the guest's SCSI commands go to the LUN itself; needs bus scsi, and takes no serial; or
    /// cdrom: a medium in a drive that the VM has (--drive) [default: disk].
    #[arg(long, value_name = "TYPE")]
    disk_type: Option<String>,
    /// Also in the VM's persistent definition, so that it is there after a restart.
    #[arg(long)]
    persist: bool,
    /// Several VMs may have it at once; needs cache none.
    #[arg(long)]
    shareable: bool,
    /// The guest may not write.
    #[arg(long)]
    read_only: bool,
    /// The identity that the LUN must have: naa.HEX, eui.HEX, t10.TEXT.
    #[arg(long)]
    wwid: Option<String>,
    /// The serial number that the LUN must have, as VPD page 0x80 has it.
    #[arg(long, value_name = "TEXT")]
    unit_serial: Option<String>,
    /// The size that the LUN must have: bytes, or with a unit as 10Gi.
    #[arg(long)]
    size: Option<String>,
    /// Take the LUN although it is not the one that this volume was before.
    #[arg(long)]
    accept_new_identity: bool,
    /// preferred, required or off [default: preferred].
    #[arg(long, value_name = "POLICY")]
    multipath: Option<String>,
    /// The iface record of the node by which the target is logged in to (iscsiadm -m iface) [default:
    /// default].
    #[arg(long, value_name = "NAME")]
    iface: Option<String>,
    /// The initiator name that the target is to see [default: that of the iface, or the node's].
    #[arg(long, value_name = "IQN")]
    initiator_name: Option<String>,
    /// The secret of lunplugd's secrets_dir that has the session's CHAP credentials.
    #[arg(long, value_name = "NAME", conflicts_with = "chap_file")]
    chap_secret: Option<String>,
    /// Read the session's CHAP credentials from a file, YAML or JSON, `-` for stdin: username,
    /// password, and for mutual CHAP username_in and password_in. Kept for this boot only.
    #[arg(long, value_name = "FILE")]
    chap_file: Option<PathBuf>,
    #[command(flatten)]
    disk: DiskFlags,
    #[command(flatten)]
    waiting: Waiting,
}

impl Args {
    /// The file's volume, if there is one, with the flags on top.
    fn volume(&self, screen: &mut Screen<'_>) -> Result<VolumeFile, Failure> {
        let (mut volume, notes) = match &self.file {
            Some(path) => read(path)?,
            None => Default::default(),
        };
        for note in notes {
            writeln!(screen.err, "note: {note}")?;
        }
        let set = |to: &mut String, from: &Option<String>| {
            if let Some(text) = from {
                to.clone_from(text);
            }
        };
        set(&mut volume.name, &self.volume_name);
        set(&mut volume.disk_name, &self.disk_name);
        set(&mut volume.serial, &self.serial);
        set(&mut volume.cache, &self.cache);
        set(&mut volume.error_policy, &self.error_policy);
        set(&mut volume.bus, &self.bus);
        set(&mut volume.disk_type, &self.disk_type);
        set(&mut volume.wwid, &self.wwid);
        set(&mut volume.unit_serial, &self.unit_serial);
        set(&mut volume.multipath, &self.multipath);
        if let Some(url) = &self.source {
            volume.source = Some(SourceFile::Url(url.clone()));
        }
        if self.iface.is_some() || self.initiator_name.is_some() {
            let given = |flag: &Option<String>| flag.clone().unwrap_or_default();
            volume.set_iface(&given(&self.iface), &given(&self.initiator_name))?;
        }
        if let Some(size) = &self.size {
            volume.size_bytes = file::size(size).map_err(|e| Failure::malformed("size", &e))?;
        }
        if let Some(name) = &self.chap_secret {
            volume.set_chap_secret(name)?;
        }
        if let Some(path) = &self.chap_file {
            volume.chap = Some(chap_file(path)?);
        }
        self.disk.set(&mut volume);
        volume.persist |= self.persist;
        volume.shareable |= self.shareable;
        volume.read_only |= self.read_only;
        Ok(volume)
    }
}

pub(super) fn wrong(path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::plain(Exit::Usage, format!("{}: {error}", path.display()))
}

/// A volume in lunplug's own form, or in one of those that others have; and notes on what is passed over.
fn read(path: &Path) -> Result<(VolumeFile, Vec<String>), Failure> {
    let text = text(path)?;
    // What cannot be read at all is told by the own form's reader.
    let document = serde_yaml_ng::from_str(&text).unwrap_or(serde_yaml_ng::Value::Null);
    match foreign::read(&document) {
        Some(Ok(found)) => Ok((found.volume, found.notes)),
        Some(Err(error)) => Err(wrong(path, error)),
        None => VolumeFile::parse(&text).map(|v| (v, Vec::new())).map_err(|e| wrong(path, e)),
    }
}

/// The credentials in a file.
pub(super) fn chap_file(path: &Path) -> Result<ChapFile, Failure> {
    ChapFile::parse(&text(path)?).map_err(|e| wrong(path, e))
}

/// A file's text, which may hold secrets.
pub(super) fn text(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    text.map(Zeroizing::new).map_err(|e| wrong(path, e))
}

pub(super) async fn run(
    args: Args,
    socket: &Path,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let volume = args.volume(screen)?;
    let request = v1::AddVolumeRequest {
        vm: Some(wire_vm_id(&args.vm.id()?)),
        volume: Some(volume.to_wire()?),
        chap: volume.chap.as_ref().map(ChapFile::to_wire),
        accept_new_identity: args.accept_new_identity,
        dry_run: args.waiting.dry_run(),
    };
    let mut client = connect(socket).await?;
    let answer = client.add_volume(timed(request)).await?.into_inner();
    let volume = answer.volume.unwrap_or_default();
    let volume = args.waiting.end(socket, client, Goal::Ready, volume, screen).await?;
    Ok(output::volume(format, &volume, screen.out)?)
}
