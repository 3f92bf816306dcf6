//! The arrays: targets, portals and LUNs, as they are beyond the network.

use std::collections::{BTreeMap, BTreeSet};

use crate::types::{Addressing, Chap, Iqn, Lun, Portal, Wwid};

/// How a portal answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortalState {
    /// It lets us in.
    Alive,
    /// Nothing answers: a login times out, a session fails.
    Dead,
    /// Connections are refused.
    Refusing,
    /// It answers, but this initiator may not log in.
    Denied,
}

/// A LUN as the array has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimLun {
    /// Its designator; `None` for one that has no unique identity.
    pub wwid: Option<Wwid>,
    /// Size in bytes, a multiple of 512.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Its serial number; made of the designator where `None`.
    pub serial: Option<String>,
    /// Its product name.
    pub model: String,
}

impl SimLun {
    /// A writable LUN.
    pub fn new(wwid: Wwid, size: u64) -> Self {
        let model = "simulated".into();
        Self { wwid: Some(wwid), size, read_only: false, serial: None, model }
    }

    /// The same without a unique designator.
    pub fn nameless(self) -> Self {
        Self { wwid: None, ..self }
    }
}

/// A target.
#[derive(Debug, Default)]
pub(super) struct SimTarget {
    pub(super) portals: BTreeMap<Portal, PortalState>,
    pub(super) luns: BTreeMap<Lun, SimLun>,
    /// What was written to a LUN by a test or a guest, from its first byte.
    pub(super) data: BTreeMap<Lun, Vec<u8>>,
    /// What an initiator must prove to know, and what the target can prove in its turn; anybody may log
    /// in where there is none.
    pub(super) chap: Option<Chap>,
    /// Which initiators alone may log in; any where none is named.
    pub(super) initiators: BTreeSet<Iqn>,
}

impl SimTarget {
    /// The LUN that the SCSI layer knows by this number.
    pub(super) fn by_scsi(&self, scsi_lun: u64) -> Option<&SimLun> {
        self.luns.get(&Lun::new(scsi_lun, Addressing::Plain).ok()?)
    }
}

/// VPD page 0x83: designators as LIO gives them, the LUN's own and one of the port, which differs
/// from path to path and says nothing of the LUN (SPC-5 7.7.6).
pub(super) fn vpd_pg83(wwid: Option<&Wwid>, port: u8) -> Vec<u8> {
    let mut body = Vec::new();
    let mut designator = |code_set: u8, assoc_and_type: u8, bytes: &[u8]| {
        // A designator's length is one byte; those here are at most 256 by the type of Wwid.
        let len = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
        body.extend([code_set, assoc_and_type, 0, len]);
        body.extend(&bytes[..usize::from(len)]);
    };
    match wwid.and_then(|w| w.as_str().split_once('.')) {
        Some(("naa", hex)) => designator(1, 0x03, &unhex(hex)),
        Some(("eui", hex)) => designator(1, 0x02, &unhex(hex)),
        Some((_, text)) => designator(2, 0x01, text.as_bytes()),
        None => {}
    }
    designator(1, 0x14, &[0, 0, 0, port]);
    let mut page = vec![0, 0x83];
    page.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    page.extend(body);
    page
}

/// VPD page 0x80: the unit's serial number.
pub(super) fn vpd_pg80(lun: &SimLun) -> Vec<u8> {
    let named = lun.wwid.as_ref().and_then(|w| w.as_str().split_once('.')).map(|(_, s)| s);
    let serial = lun.serial.as_deref().or(named).unwrap_or_default();
    let mut page = vec![0, 0x80];
    page.extend(u16::try_from(serial.len()).unwrap_or(u16::MAX).to_be_bytes());
    page.extend(serial.as_bytes());
    page
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok()).unwrap_or(0);
    text.as_bytes()
        .chunks(2)
        .map(|pair| pair.iter().fold(0, |byte, &c| byte << 4 | digit(c)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_83_is_well_formed() {
        let wwid: Wwid = "naa.60014050000000000000000000000001".parse().unwrap();
        let page = vpd_pg83(Some(&wwid), 2);
        assert_eq!(page[1], 0x83);
        assert_eq!(usize::from(u16::from_be_bytes([page[2], page[3]])), page.len() - 4);
        assert_eq!(page[4..8], [1, 3, 0, 16]);
        assert_eq!(page[8..11], [0x60, 0x01, 0x40]);
        assert_eq!(page[24..28], [1, 0x14, 0, 4]);
    }
}
