//! Portals that are given by the names of their hosts: found in a request, and replaced by what they were
//! resolved to, so that nothing behind has to know of names.

use std::collections::BTreeSet;

use super::v1;
use crate::types::{Endpoint, HostPort};
use crate::vm::resolve::Names;

/// The name, if that is what a portal is given by.
pub(super) fn name(text: &str) -> Option<HostPort> {
    match text.parse() {
        Ok(Endpoint::Name(name)) => Some(name),
        // What is neither is told when the request is read.
        Ok(Endpoint::Address(_)) | Err(_) => None,
    }
}

/// The names in a volume's source.
pub(super) fn names(spec: &v1::VolumeSpec) -> BTreeSet<HostPort> {
    portals(&mut spec.clone()).filter_map(|text| name(text)).collect()
}

/// Puts addresses in their place.
pub(super) fn to_addresses(spec: &mut v1::VolumeSpec, resolved: &Names) {
    for text in portals(spec) {
        if let Some(address) = name(text).and_then(|name| resolved.get(&name)) {
            *text = address.to_string();
        }
    }
}

/// Puts names in the place of the addresses that they were resolved to: as it was asked for.
pub(super) fn to_names(spec: &mut v1::VolumeSpec, resolved: &Names) {
    for text in portals(spec) {
        if let Some((name, _)) = resolved.iter().find(|(_, portal)| portal.to_string() == *text) {
            *text = name.to_string();
        }
    }
}

/// Every portal of a volume's source; other kinds have none.
fn portals(spec: &mut v1::VolumeSpec) -> impl Iterator<Item = &mut String> {
    let kind = spec.source.as_mut().and_then(|source| source.kind.as_mut());
    let iscsi = kind.and_then(|kind| match kind {
        v1::source::Kind::Iscsi(iscsi) => Some(iscsi),
        v1::source::Kind::Fc(_) | v1::source::Kind::Block(_) | v1::source::Kind::File(_) => None,
    });
    iscsi.into_iter().flat_map(|iscsi| {
        let more = iscsi.more_targets.iter_mut().flat_map(|target| &mut target.portals);
        iscsi.portals.iter_mut().chain(more)
    })
}
