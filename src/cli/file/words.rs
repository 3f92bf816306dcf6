//! The words of a volume's file, and the contract's values for them.

use std::str::FromStr;

use crate::api::{convert, v1};
use crate::cli::failure::Failure;
use crate::types::{Bus, CacheMode, ErrorPolicy, Malformed};

/// An enum's word without its prefix: `CACHE_MODE_NONE` is `none`; unspecified is nothing.
pub(in crate::cli) fn plain(name: &str, prefix: &str) -> String {
    match name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase() {
        word if word == "unspecified" => String::new(),
        word => word,
    }
}

pub(super) fn word<T: FromStr<Err = Malformed>>(field: &str, text: &str) -> Result<T, Failure> {
    text.parse().map_err(|error| Failure::malformed(field, &error))
}

pub(super) fn bus(text: &str) -> Result<v1::Bus, Failure> {
    Ok(match text {
        "" => v1::Bus::Unspecified,
        text => match word::<Bus>("bus", text)? {
            Bus::Scsi => v1::Bus::Scsi,
            Bus::Virtio => v1::Bus::Virtio,
        },
    })
}

pub(super) fn cache(text: &str) -> Result<v1::CacheMode, Failure> {
    Ok(match text {
        "" => v1::CacheMode::Unspecified,
        text => match word::<CacheMode>("cache", text)? {
            CacheMode::None => v1::CacheMode::None,
            CacheMode::Writethrough => v1::CacheMode::Writethrough,
            CacheMode::Writeback => v1::CacheMode::Writeback,
        },
    })
}

pub(super) fn error_policy(text: &str) -> Result<v1::ErrorPolicy, Failure> {
    let policy = match text {
        "" => None,
        text => Some(word::<ErrorPolicy>("error_policy", text)?),
    };
    Ok(convert::wire_error_policy(policy))
}

pub(super) fn disk_type(text: &str) -> Result<v1::DiskType, Failure> {
    on_wire("disk_type", text, convert::wire_disk_type, v1::DiskType::Unspecified)
}

pub(super) fn multipath(text: &str) -> Result<v1::MultipathPolicy, Failure> {
    match text {
        "" => Ok(v1::MultipathPolicy::Unspecified),
        "preferred" => Ok(v1::MultipathPolicy::Preferred),
        "required" => Ok(v1::MultipathPolicy::Required),
        "off" => Ok(v1::MultipathPolicy::Off),
        _ => {
            let rule = "preferred, required or off";
            Err(Failure::malformed("multipath", &Malformed::new("multipath policy", text, rule)))
        }
    }
}

/// A word whose value has a form on the wire; unspecified when empty.
fn on_wire<T, W>(field: &str, text: &str, wire: fn(T) -> W, unspecified: W) -> Result<W, Failure>
where
    T: FromStr<Err = Malformed>,
{
    if text.is_empty() { Ok(unspecified) } else { word(field, text).map(wire) }
}

pub(super) fn io(text: &str) -> Result<v1::IoMode, Failure> {
    on_wire("io", text, convert::wire_io_mode, v1::IoMode::Unspecified)
}

pub(super) fn discard(text: &str) -> Result<v1::DiscardMode, Failure> {
    on_wire("discard", text, convert::wire_discard, v1::DiscardMode::Unspecified)
}

pub(super) fn detect_zeroes(text: &str) -> Result<v1::DetectZeroes, Failure> {
    on_wire("detect_zeroes", text, convert::wire_detect_zeroes, v1::DetectZeroes::Unspecified)
}
