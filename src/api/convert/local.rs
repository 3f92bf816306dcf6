//! Sources that are on the host already, on the wire and back.

use super::{parse, unknown_value};
use crate::api::v1;
use crate::spec::{BlockSource, FileSource, Source};
use crate::types::FileFormat;
use crate::vm::facade::Refusal;

pub(super) fn block(given: &v1::BlockSource) -> Result<Source, Refusal> {
    let path = parse("volume.source.block.path", &given.path)?;
    Ok(Source::Block(BlockSource { path }))
}

pub(super) fn file(given: &v1::FileSource) -> Result<Source, Refusal> {
    let path = parse("volume.source.file.path", &given.path)?;
    let format = match v1::FileFormat::try_from(given.format) {
        Ok(v1::FileFormat::Unspecified | v1::FileFormat::Raw) => FileFormat::Raw,
        Ok(v1::FileFormat::Qcow2) => FileFormat::Qcow2,
        Err(_) => {
            let rule = "raw (1) or qcow2 (2)";
            return Err(unknown_value("volume.source.file.format", given.format, rule));
        }
    };
    Ok(Source::File(FileSource { path, format }))
}

pub(super) fn wire_block(source: &BlockSource) -> v1::source::Kind {
    v1::source::Kind::Block(v1::BlockSource { path: source.path.to_string() })
}

pub(super) fn wire_file(source: &FileSource) -> v1::source::Kind {
    let format = wire_format(source.format).into();
    v1::source::Kind::File(v1::FileSource { path: source.path.to_string(), format })
}

/// A file's format on the wire.
pub fn wire_format(format: FileFormat) -> v1::FileFormat {
    match format {
        FileFormat::Raw => v1::FileFormat::Raw,
        FileFormat::Qcow2 => v1::FileFormat::Qcow2,
    }
}
