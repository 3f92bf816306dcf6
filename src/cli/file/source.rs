//! A source in a volume's file: its URL, or the fields of its kind.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::fc::FcFile;
use super::plain;
use super::words::word;
use crate::api::{convert, v1};
use crate::cli::failure::Failure;
use crate::source::{IscsiUrl, query_of};
use crate::spec::{FileSource, IscsiTarget, Source};
use crate::types::{Addressing, Endpoint, Iface, Lun, Malformed};

/// A source: its URL, or the fields of its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(in crate::cli) enum SourceFile {
    Url(String),
    Kind(SourceKind),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::cli) enum SourceKind {
    Iscsi(IscsiFile),
    Fc(FcFile),
    Block(BlockFile),
    File(FileFile),
}

/// What is on the host already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct BlockFile {
    path: String,
}

/// A file on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct FileFile {
    path: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    format: String,
}

const FILE_FORMAT: &str = "FILE_FORMAT_";

impl FileFile {
    fn to_wire(&self) -> Result<v1::FileSource, Failure> {
        let format = match self.format.as_str() {
            "" => v1::FileFormat::Unspecified,
            text => convert::wire_format(word("source.file.format", text)?),
        };
        Ok(v1::FileSource { path: self.path.clone(), format: format.into() })
    }

    fn from_wire(wire: v1::FileSource) -> Self {
        let format = plain(wire.format().as_str_name(), FILE_FORMAT);
        Self { path: wire.path, format }
    }

    fn url(&self) -> String {
        match self.format.as_str() {
            "" | "raw" => format!("file://{}", self.path),
            format => format!("file+{format}://{}", self.path),
        }
    }
}

impl From<FileSource> for FileFile {
    fn from(source: FileSource) -> Self {
        let format = if source.format.is_raw() { "" } else { source.format.as_str() };
        Self { path: source.path.into(), format: format.into() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct IscsiFile {
    target: String,
    portals: Vec<String>,
    lun: u32,
    #[serde(default, alias = "lunAddressing", skip_serializing_if = "String::is_empty")]
    lun_addressing: String,
    #[serde(default, alias = "chapSecret", skip_serializing_if = "String::is_empty")]
    chap_secret: String,
    #[serde(default, alias = "chapInRequest", skip_serializing_if = "std::ops::Not::not")]
    chap_in_request: bool,
    #[serde(default, alias = "moreTargets", skip_serializing_if = "Vec::is_empty")]
    more_targets: Vec<TargetFile>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    iface: String,
    #[serde(default, alias = "initiatorName", skip_serializing_if = "String::is_empty")]
    initiator_name: String,
}

/// A target at which the LUN is to be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct TargetFile {
    pub(in crate::cli) target: String,
    pub(in crate::cli) portals: Vec<String>,
    pub(in crate::cli) lun: u32,
    #[serde(default, alias = "lunAddressing", skip_serializing_if = "String::is_empty")]
    lun_addressing: String,
}

pub(super) const LUN_ADDRESSING: &str = "LUN_ADDRESSING_";

impl TargetFile {
    pub(in crate::cli) fn new(target: String, portals: Vec<String>, lun: u32) -> Self {
        Self { target, portals, lun, lun_addressing: String::new() }
    }

    /// Has its LUN be addressed so.
    pub(in crate::cli) fn address(&mut self, addressing: Addressing) {
        let word = convert::wire_addressing(addressing).as_str_name();
        self.lun_addressing = plain(word, LUN_ADDRESSING);
    }

    fn to_wire(&self) -> Result<v1::IscsiTarget, Failure> {
        let Self { target, portals, lun, lun_addressing } = self.clone();
        let lun_addressing = match lun_addressing.as_str() {
            "" => v1::LunAddressing::Unspecified,
            text => convert::wire_addressing(word("source.iscsi.lun_addressing", text)?),
        };
        Ok(v1::IscsiTarget { target, portals, lun, lun_addressing: lun_addressing.into() })
    }

    fn from_wire(wire: v1::IscsiTarget) -> Self {
        let lun_addressing = plain(wire.lun_addressing().as_str_name(), LUN_ADDRESSING);
        let v1::IscsiTarget { target, portals, lun, .. } = wire;
        Self { target, portals, lun, lun_addressing }
    }

    /// Its part of a URL.
    fn url(&self) -> String {
        let addressing = self.lun_addressing.parse().unwrap_or_default();
        let lun = Lun::new(self.lun.into(), addressing);
        let lun = lun.map_or_else(|_| self.lun.to_string(), |lun| lun.to_string());
        format!("{}/{}/{lun}", self.portals.join(","), self.target)
    }
}

impl From<IscsiTarget<Endpoint>> for TargetFile {
    fn from(of: IscsiTarget<Endpoint>) -> Self {
        let portals = of.portals.iter().map(ToString::to_string).collect();
        let mut target = Self::new(of.target.to_string(), portals, of.lun.get().into());
        target.address(of.lun.addressing());
        target
    }
}

impl SourceFile {
    /// The LUN that is to be had at `first` and at `more_targets`; without credentials where
    /// `chap_secret` is empty.
    pub(super) fn iscsi(
        first: TargetFile,
        more_targets: Vec<TargetFile>,
        chap_secret: String,
    ) -> Self {
        Self::of(IscsiFile { chap_secret, ..IscsiFile::of(first, more_targets) })
    }

    /// The LUN that is to be had by Fibre Channel.
    pub(super) fn fc(fields: FcFile) -> Self {
        Self::Kind(SourceKind::Fc(fields))
    }

    /// The block device that is on the node already.
    pub(super) fn block(path: String) -> Self {
        Self::Kind(SourceKind::Block(BlockFile { path }))
    }

    /// The raw file that is on the node already.
    pub(super) fn file(path: String) -> Self {
        Self::Kind(SourceKind::File(FileFile { path, format: String::new() }))
    }

    /// The same with a reference to a secret.
    pub(super) fn with_chap_secret(&self, name: &str) -> Result<Self, Failure> {
        Ok(Self::of(IscsiFile { chap_secret: name.into(), ..self.fields()? }))
    }

    /// The same by another iface record, or another initiator name; what is empty stays as it is.
    pub(super) fn with_iface(&self, iface: &str, initiator: &str) -> Result<Self, Failure> {
        let mut fields = self.fields()?;
        for (to, from) in [(&mut fields.iface, iface), (&mut fields.initiator_name, initiator)] {
            if !from.is_empty() {
                *to = from.into();
            }
        }
        Ok(Self::of(fields))
    }

    pub(super) fn to_wire(&self) -> Result<v1::Source, Failure> {
        let kind = match self.elsewhere()? {
            Some(SourceKind::Fc(fc)) => v1::source::Kind::Fc(fc.to_wire()?),
            Some(SourceKind::Block(BlockFile { path })) => {
                v1::source::Kind::Block(v1::BlockSource { path })
            }
            Some(SourceKind::File(file)) => v1::source::Kind::File(file.to_wire()?),
            Some(SourceKind::Iscsi(fields)) => v1::source::Kind::Iscsi(fields.to_wire()?),
            None => v1::source::Kind::Iscsi(self.fields()?.to_wire()?),
        };
        Ok(v1::Source { kind: Some(kind) })
    }

    pub(super) fn from_wire(kind: v1::source::Kind) -> Self {
        match kind {
            v1::source::Kind::Iscsi(iscsi) => Self::of(IscsiFile::from_wire(iscsi)),
            v1::source::Kind::Fc(fc) => Self::fc(FcFile::from_wire(fc)),
            v1::source::Kind::Block(v1::BlockSource { path }) => Self::block(path),
            v1::source::Kind::File(file) => Self::Kind(SourceKind::File(FileFile::from_wire(file))),
        }
    }

    pub(super) fn url(&self) -> String {
        match self {
            Self::Url(url) => url.clone(),
            Self::Kind(SourceKind::Iscsi(s)) => {
                let first = s.first().url();
                let more = |t: &TargetFile| format!("+{}", t.url());
                let more = s.more_targets.iter().map(more).collect::<String>();
                format!("iscsi://{first}{more}{}", query_of(&s.iface()))
            }
            Self::Kind(SourceKind::Fc(s)) => s.url(),
            Self::Kind(SourceKind::Block(s)) => format!("block://{}", s.path),
            Self::Kind(SourceKind::File(s)) => s.url(),
        }
    }

    fn of(fields: IscsiFile) -> Self {
        Self::Kind(SourceKind::Iscsi(fields))
    }

    /// The fields where it is no iSCSI source, those of a URL read. An iSCSI URL is not read here, for it may
    /// name hosts.
    fn elsewhere(&self) -> Result<Option<SourceKind>, Failure> {
        Ok(match self {
            Self::Kind(kind) => Some(kind.clone()),
            Self::Url(url) if !is_iscsi(url) => match word::<Source>("source", url)? {
                Source::Fc(source) => Some(SourceKind::Fc(source.into())),
                Source::Block(source) => {
                    Some(SourceKind::Block(BlockFile { path: source.path.into() }))
                }
                Source::File(source) => Some(SourceKind::File(source.into())),
                Source::Iscsi(_) => None,
            },
            Self::Url(_) => None,
        })
    }

    /// The fields of an iSCSI source, those of a URL read.
    fn fields(&self) -> Result<IscsiFile, Failure> {
        let IscsiUrl { first, more, iface } = match self {
            Self::Kind(SourceKind::Iscsi(fields)) => return Ok(fields.clone()),
            Self::Url(url) if is_iscsi(url) => word::<IscsiUrl<Endpoint>>("source", url)?,
            Self::Url(_)
            | Self::Kind(SourceKind::Fc(_) | SourceKind::Block(_) | SourceKind::File(_)) => {
                let rule =
                    "an iscsi source: others have no credentials, iface records or initiator names";
                let malformed = Malformed::new("source", &self.url(), rule);
                return Err(Failure::malformed("source", &malformed));
            }
        };
        let more = more.into_iter().map(TargetFile::from).collect();
        let initiator_name = iface.initiator.as_ref().map(ToString::to_string).unwrap_or_default();
        let iface = iface.name.unless_default().to_owned();
        Ok(IscsiFile { iface, initiator_name, ..IscsiFile::of(first.into(), more) })
    }
}

/// Whether a URL is of iSCSI: of no other kind that there is.
fn is_iscsi(url: &str) -> bool {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    !["fc", "block", "file", "file+qcow2"].iter().any(|other| scheme.eq_ignore_ascii_case(other))
}

impl IscsiFile {
    fn of(first: TargetFile, more_targets: Vec<TargetFile>) -> Self {
        let TargetFile { target, portals, lun, lun_addressing } = first;
        let (chap_secret, chap_in_request) = (String::new(), false);
        Self {
            target,
            portals,
            lun,
            lun_addressing,
            chap_secret,
            chap_in_request,
            more_targets,
            iface: String::new(),
            initiator_name: String::new(),
        }
    }

    /// As far as it can be read; of what came from a daemon that is all.
    fn iface(&self) -> Iface {
        let name = self.iface.parse().unwrap_or_default();
        Iface { name, initiator: self.initiator_name.parse().ok() }
    }

    fn first(&self) -> TargetFile {
        let Self { target, portals, lun, lun_addressing, .. } = self.clone();
        TargetFile { target, portals, lun, lun_addressing }
    }

    fn to_wire(&self) -> Result<v1::IscsiSource, Failure> {
        let v1::IscsiTarget { target, portals, lun, lun_addressing } = self.first().to_wire()?;
        let more_targets = self.more_targets.iter().map(TargetFile::to_wire);
        Ok(v1::IscsiSource {
            target,
            portals,
            lun,
            lun_addressing,
            chap_secret: self.chap_secret.clone(),
            chap_in_request: self.chap_in_request,
            more_targets: more_targets.collect::<Result<_, _>>()?,
            iface: self.iface.clone(),
            initiator_name: self.initiator_name.clone(),
        })
    }

    fn from_wire(wire: v1::IscsiSource) -> Self {
        let v1::IscsiSource { target, portals, lun, lun_addressing, .. } = wire;
        let first = v1::IscsiTarget { target, portals, lun, lun_addressing };
        let more = wire.more_targets.into_iter().map(TargetFile::from_wire).collect();
        Self {
            chap_secret: wire.chap_secret,
            chap_in_request: wire.chap_in_request,
            iface: wire.iface,
            initiator_name: wire.initiator_name,
            ..Self::of(TargetFile::from_wire(first), more)
        }
    }
}

impl<'de> Deserialize<'de> for SourceFile {
    // By hand: serde's untagged enums cannot say what is wrong.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = SourceFile;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a URL (iscsi://PORTAL[,PORTAL]/IQN/LUN, fc://WWPN[,WWPN]/LUN, block:///PATH, file:///PATH), iscsi: {target, portals, lun}, fc: {targets: [{wwpn, lun}]}, block: {path} or file: {path, format}",
                )
            }
            fn visit_str<E>(self, url: &str) -> Result<SourceFile, E> {
                Ok(SourceFile::Url(url.into()))
            }
            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<SourceFile, M::Error> {
                /// As a struct, for YAML has a tag, not a map, for an enum.
                #[derive(Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Kinds {
                    iscsi: Option<IscsiFile>,
                    fc: Option<FcFile>,
                    block: Option<BlockFile>,
                    file: Option<FileFile>,
                }
                let Kinds { iscsi, fc, block, file } =
                    Kinds::deserialize(MapAccessDeserializer::new(map))?;
                let kinds = [
                    iscsi.map(SourceKind::Iscsi),
                    fc.map(SourceKind::Fc),
                    block.map(SourceKind::Block),
                    file.map(SourceKind::File),
                ];
                let mut given = kinds.into_iter().flatten();
                match (given.next(), given.next()) {
                    (Some(kind), None) => Ok(SourceFile::Kind(kind)),
                    _ => Err(serde::de::Error::custom("give one of iscsi, fc, block and file")),
                }
            }
        }
        from.deserialize_any(Either)
    }
}
