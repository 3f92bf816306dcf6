//! A volume as people write it in a file and as results show it: the contract's fields, in YAML or
//! JSON. A source may also be its URL.

mod fc;
mod many;
mod source;
mod words;

use serde::{Deserialize, Serialize};

pub(super) use fc::{FcFile, FcTargetFile};
pub(super) use many::many;
pub(super) use source::{SourceFile, TargetFile};
pub(super) use words::plain;

use super::chap::{self, ChapFile};
use super::disk::LimitsFile;
use super::failure::Failure;
use crate::api::v1;
use crate::types::Malformed;

/// A volume's fields; what is not given has the contract's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct VolumeFile {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) name: String,
    #[serde(alias = "diskName", skip_serializing_if = "String::is_empty")]
    pub(super) disk_name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) source: Option<SourceFile>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) serial: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) bus: String,
    #[serde(alias = "diskType", skip_serializing_if = "String::is_empty")]
    pub(super) disk_type: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) drive: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) cache: String,
    #[serde(alias = "errorPolicy", skip_serializing_if = "String::is_empty")]
    pub(super) error_policy: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) io: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) discard: String,
    #[serde(alias = "detectZeroes", skip_serializing_if = "String::is_empty")]
    pub(super) detect_zeroes: String,
    #[serde(alias = "logicalBlockSize", skip_serializing_if = "is_zero")]
    pub(super) logical_block_size: u32,
    #[serde(alias = "physicalBlockSize", skip_serializing_if = "is_zero")]
    pub(super) physical_block_size: u32,
    #[serde(alias = "ioLimits", skip_serializing_if = "Option::is_none")]
    pub(super) io_limits: Option<LimitsFile>,
    #[serde(alias = "persistentReservations", skip_serializing_if = "is_zero")]
    pub(super) persistent_reservations: bool,
    #[serde(
        alias = "dedicatedIoThread",
        alias = "dedicatedIOThread",
        skip_serializing_if = "is_zero"
    )]
    pub(super) dedicated_io_thread: bool,
    #[serde(alias = "readOnly")]
    pub(super) read_only: bool,
    pub(super) shareable: bool,
    pub(super) persist: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) multipath: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) wwid: String,
    #[serde(alias = "unitSerial", skip_serializing_if = "String::is_empty")]
    pub(super) unit_serial: String,
    #[serde(alias = "sizeBytes", skip_serializing_if = "is_zero")]
    pub(super) size_bytes: u64,
    /// CHAP credentials: read, and never shown.
    #[serde(skip_serializing, deserialize_with = "chap::unseen")]
    pub(super) chap: Option<ChapFile>,
}

fn is_zero<T: Default + PartialEq>(n: &T) -> bool {
    *n == T::default()
}

impl VolumeFile {
    /// Reads YAML, of which JSON is a part.
    pub(super) fn parse(text: &str) -> Result<Self, serde_yaml_ng::Error> {
        serde_yaml_ng::from_str(text)
    }

    /// The contract's form. Words are read here, values are left for the daemon to judge.
    pub(super) fn to_wire(&self) -> Result<v1::VolumeSpec, Failure> {
        Ok(v1::VolumeSpec {
            name: self.name.clone(),
            disk_name: self.disk_name.clone(),
            source: self.source.as_ref().map(SourceFile::to_wire).transpose()?,
            serial: self.serial.clone(),
            bus: words::bus(&self.bus)?.into(),
            disk_type: words::disk_type(&self.disk_type)?.into(),
            drive: self.drive.clone(),
            cache: words::cache(&self.cache)?.into(),
            error_policy: words::error_policy(&self.error_policy)?.into(),
            io: words::io(&self.io)?.into(),
            discard: words::discard(&self.discard)?.into(),
            detect_zeroes: words::detect_zeroes(&self.detect_zeroes)?.into(),
            logical_block_size: self.logical_block_size,
            physical_block_size: self.physical_block_size,
            io_limits: self.io_limits.and_then(LimitsFile::to_wire),
            persistent_reservations: self.persistent_reservations,
            dedicated_io_thread: self.dedicated_io_thread,
            read_only: self.read_only,
            shareable: self.shareable,
            persist: self.persist,
            multipath: words::multipath(&self.multipath)?.into(),
            wwid: self.wwid.clone(),
            size_bytes: self.size_bytes,
            unit_serial: self.unit_serial.clone(),
            ..v1::VolumeSpec::default()
        })
    }

    /// From the contract's form; what a newer daemon says and we do not know is left out.
    pub(super) fn from_wire(spec: &v1::VolumeSpec) -> Self {
        let kind = spec.source.clone().and_then(|source| source.kind);
        Self {
            name: spec.name.clone(),
            disk_name: spec.disk_name.clone(),
            source: kind.map(SourceFile::from_wire),
            serial: spec.serial.clone(),
            bus: plain(spec.bus().as_str_name(), "BUS_"),
            disk_type: plain(spec.disk_type().as_str_name(), "DISK_TYPE_"),
            drive: spec.drive.clone(),
            cache: plain(spec.cache().as_str_name(), "CACHE_MODE_"),
            error_policy: plain(spec.error_policy().as_str_name(), "ERROR_POLICY_"),
            io: plain(spec.io().as_str_name(), "IO_MODE_"),
            discard: plain(spec.discard().as_str_name(), "DISCARD_MODE_"),
            detect_zeroes: plain(spec.detect_zeroes().as_str_name(), "DETECT_ZEROES_"),
            logical_block_size: spec.logical_block_size,
            physical_block_size: spec.physical_block_size,
            io_limits: spec.io_limits.as_ref().map(LimitsFile::from_wire),
            persistent_reservations: spec.persistent_reservations,
            dedicated_io_thread: spec.dedicated_io_thread,
            read_only: spec.read_only,
            shareable: spec.shareable,
            persist: spec.persist,
            multipath: plain(spec.multipath().as_str_name(), "MULTIPATH_POLICY_"),
            wwid: spec.wwid.clone(),
            size_bytes: spec.size_bytes,
            unit_serial: spec.unit_serial.clone(),
            chap: None,
        }
    }

    /// Has it be the LUN that is to be had at `first` and at `more_targets`; without credentials where
    /// `chap_secret` is empty.
    pub(super) fn set_iscsi(
        &mut self,
        first: TargetFile,
        more_targets: Vec<TargetFile>,
        chap_secret: String,
    ) {
        self.source = Some(SourceFile::iscsi(first, more_targets, chap_secret));
    }

    /// Has it be the LUN that is to be had by Fibre Channel.
    pub(super) fn set_fc(&mut self, fc: FcFile) {
        self.source = Some(SourceFile::fc(fc));
    }

    /// Has it be a block device that is on the node already.
    pub(super) fn set_block(&mut self, path: String) {
        self.source = Some(SourceFile::block(path));
    }

    /// Has it be a raw file that is on the node already.
    pub(super) fn set_file(&mut self, path: String) {
        self.source = Some(SourceFile::file(path));
    }

    /// Has the source refer to a secret.
    pub(super) fn set_chap_secret(&mut self, name: &str) -> Result<(), Failure> {
        if let Some(source) = &self.source {
            self.source = Some(source.with_chap_secret(name)?);
        }
        Ok(())
    }

    /// Has the source be come to by another iface record, or with another initiator name; what is empty
    /// stays as it is.
    pub(super) fn set_iface(&mut self, iface: &str, initiator: &str) -> Result<(), Failure> {
        if let Some(source) = &self.source {
            self.source = Some(source.with_iface(iface, initiator)?);
        }
        Ok(())
    }

    /// The source as a URL; empty when it is not known.
    pub(super) fn source_url(&self) -> String {
        self.source.as_ref().map(SourceFile::url).unwrap_or_default()
    }
}

/// A size: bytes, or with a unit of K, M, G, T (powers of 1000) or Ki, Mi, Gi, Ti (of 1024).
pub(super) fn size(text: &str) -> Result<u64, Malformed> {
    let wrong = || {
        let rule = "bytes, or a number with K, M, G, T, Ki, Mi, Gi or Ti, e.g. 10Gi";
        Malformed::new("size", text, rule)
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return Err(wrong()),
    };
    number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Exit;

    const FULL: &str = "
name: data
disk_name: d
source: {iscsi: {target: 'iqn.2001-04.com.example:a', portals: [10.0.0.1], lun: 3}}
serial: Data-1
bus: virtio
disk_type: lun
drive: sda
persistent_reservations: true
dedicated_io_thread: true
cache: none
error_policy: stop
io: io_uring
discard: ignore
detect_zeroes: 'on'
logical_block_size: 512
physical_block_size: 4096
io_limits: {total_iops_sec: 100, read_bytes_sec: 5}
read_only: true
multipath: required
size_bytes: 1024
unit_serial: 6000-A
";

    #[test]
    fn yaml_json_and_either_form_of_a_source_are_read() {
        let full = VolumeFile::parse(FULL).unwrap();
        let wire = full.to_wire().unwrap();
        assert_eq!((wire.bus(), wire.read_only), (v1::Bus::Virtio, true));
        assert_eq!(VolumeFile::from_wire(&wire), full);
        let json = serde_json::to_string(&full).unwrap();
        assert_eq!(VolumeFile::parse(&json).unwrap(), full);
        let yaml = serde_yaml_ng::to_string(&full.source).unwrap();
        assert!(yaml.contains("iqn.2001-04"), "{yaml}");
        let url = VolumeFile::parse(
            "{name: data, readOnly: true, source: 'iscsi://10.0.0.1/iqn.2001-04.com.example:a/3'}",
        )
        .unwrap()
        .to_wire()
        .unwrap();
        let Some(v1::source::Kind::Iscsi(iscsi)) = url.source.unwrap().kind else { panic!() };
        assert_eq!(iscsi.portals, ["10.0.0.1:3260"]);
        let more = FULL.replace(
            "lun: 3}",
            "lun: 3, more_targets: [{target: 'iqn.2001-04.com.example:b', portals: [10.0.0.2], lun: 4}]}",
        );
        let more = VolumeFile::parse(&more).unwrap();
        let wire = more.to_wire().unwrap();
        assert_eq!(VolumeFile::from_wire(&wire), more);
        assert_eq!(VolumeFile::parse(&serde_json::to_string(&more).unwrap()).unwrap(), more);
        let whole =
            "iscsi://10.0.0.1/iqn.2001-04.com.example:a/3+10.0.0.2/iqn.2001-04.com.example:b/4";
        assert_eq!(more.source_url(), whole);
    }

    #[test]
    fn a_source_by_fibre_channel_is_read_in_either_form() {
        const A: &str = "500a0982991b8dc5";
        let fields = format!(
            "source: {{fc: {{targets: [{{wwpn: '{A}', lun: 3, lun_addressing: sam3_flat}}, {{wwpn: '500a0982891b8dc5', lun: 4}}], initiator_target_map: {{'21000024ff3d2e5c': ['{A}']}}, wildcard_scan: true, lip: true}}}}"
        );
        let url = format!(
            "fc://{A}/flat:3+500a0982891b8dc5/4?map=21000024ff3d2e5c/{A}&wildcard_scan&lip"
        );
        let full = VolumeFile::parse(&fields).unwrap();
        assert_eq!(full.source_url(), url);
        let by_url = VolumeFile::parse(&format!("source: '{url}'")).unwrap();
        assert_eq!(by_url.to_wire().unwrap().source, full.to_wire().unwrap().source);
        assert_eq!(VolumeFile::from_wire(&full.to_wire().unwrap()).source, full.source);
        let json = serde_json::to_string(&full).unwrap();
        assert_eq!(VolumeFile::parse(&json).unwrap(), full);
        let mut full = full;
        let failure = full.set_chap_secret("san-1").unwrap_err();
        assert!(failure.message.contains("iscsi"), "{}", failure.message);
        let error = VolumeFile::parse("source: {fc: {targets: [], portals: []}}").unwrap_err();
        assert!(error.to_string().contains("portals"), "{error}");
        let failure = VolumeFile::parse("source: 'fc://x/1'").unwrap().to_wire().unwrap_err();
        assert_eq!((failure.field.as_str(), failure.exit), ("source", Exit::Usage));
    }

    #[test]
    fn a_device_of_the_node_is_read_in_either_form() {
        let full = VolumeFile::parse("source: {block: {path: /dev/vg/data}}").unwrap();
        assert_eq!(full.source_url(), "block:///dev/vg/data");
        let by_url = VolumeFile::parse("source: 'block:///dev/vg/data'").unwrap();
        assert_eq!(by_url.to_wire().unwrap().source, full.to_wire().unwrap().source);
        assert_eq!(VolumeFile::from_wire(&full.to_wire().unwrap()).source, full.source);
        let json = serde_json::to_string(&full).unwrap();
        assert_eq!(VolumeFile::parse(&json).unwrap(), full);
        let failure = by_url.clone().set_chap_secret("san-1").unwrap_err();
        assert!(failure.message.contains("an iscsi source"), "{}", failure.message);
        let two = "source: {block: {path: /dev/a}, fc: {targets: []}}";
        let error = VolumeFile::parse(two).unwrap_err().to_string();
        assert!(error.contains("one of iscsi, fc, block and file"), "{error}");
        let failure = VolumeFile::parse("source: 'block://dev'").unwrap().to_wire().unwrap_err();
        assert_eq!((failure.field.as_str(), failure.exit), ("source", Exit::Usage));
    }

    #[test]
    fn a_file_of_the_node_is_read_in_either_form() {
        for (text, url) in [
            ("{path: /srv/a}", "file:///srv/a"),
            ("{path: /srv/a, format: raw}", "file:///srv/a"),
            ("{path: /srv/a, format: qcow2}", "file+qcow2:///srv/a"),
        ] {
            let full = VolumeFile::parse(&format!("source: {{file: {text}}}")).unwrap();
            assert_eq!(full.source_url(), url);
            let again = VolumeFile::from_wire(&full.to_wire().unwrap());
            assert_eq!(again.source_url(), url);
            let by_url = VolumeFile::parse(&format!("source: '{url}'")).unwrap();
            assert_eq!(VolumeFile::from_wire(&by_url.to_wire().unwrap()).source_url(), url);
        }
        let wrong = VolumeFile::parse("source: {file: {path: /srv/a, format: vmdk}}").unwrap();
        let failure = wrong.to_wire().unwrap_err();
        assert_eq!((failure.field.as_str(), failure.exit), ("source.file.format", Exit::Usage));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, words) in [
            ("name: a\ncolour: red", "colour"),
            ("source: {iscsi: {target: a, portals: [], lun: 0, user: x}}", "user"),
            ("source: {nfs: {}}", "nfs"),
            ("source: 5", "a URL"),
        ] {
            let error = VolumeFile::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        for chap in ["hush", "{username: [hush]}", "{username: u, hush: x}", "[hush]"] {
            let error = VolumeFile::parse(&format!("chap: {chap}")).unwrap_err().to_string();
            assert!(error.contains("username_in") && !error.contains("hush"), "{error}");
            assert!(ChapFile::parse(chap).is_err());
        }
        for (text, field) in [
            ("bus: ide", "bus"),
            ("cache: unsafe", "cache"),
            ("error_policy: pause", "error_policy"),
            ("disk_type: floppy", "disk_type"),
            ("io: uring", "io"),
            ("discard: 'on'", "discard"),
            ("detect_zeroes: maybe", "detect_zeroes"),
            ("multipath: maybe", "multipath"),
            ("source: x", "source"),
        ] {
            let failure = VolumeFile::parse(text).unwrap().to_wire().unwrap_err();
            assert_eq!((failure.field.as_str(), failure.exit), (field, Exit::Usage));
        }
    }

    #[test]
    fn credentials_are_read_and_never_shown() {
        let mut volume = VolumeFile::parse(
            "{name: a, source: 'iscsi://10.0.0.1/iqn.2001-04.com.example:a/3', chap: {username: u, password: hush}}",
        )
        .unwrap();
        let wire = volume.chap.as_ref().unwrap().to_wire();
        assert_eq!((wire.username.as_str(), wire.password.as_str()), ("u", "hush"));
        let shown = [
            format!("{volume:?} {wire:?}"),
            serde_json::to_string(&volume).unwrap(),
            serde_yaml_ng::to_string(&volume).unwrap(),
        ];
        assert!(shown.iter().all(|text| !text.contains("hush")), "{shown:?}");
        volume.set_chap_secret("san-1").unwrap();
        let source = volume.to_wire().unwrap().source.unwrap();
        let Some(v1::source::Kind::Iscsi(iscsi)) = source.kind else { panic!() };
        assert_eq!((iscsi.chap_secret.as_str(), iscsi.lun), ("san-1", 3));
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("512", 512), ("10Gi", 10 << 30), ("2K", 2000), ("0", 0)] {
            assert_eq!(size(text).unwrap(), bytes);
        }
        for text in ["", "Gi", "-1", "1.5G", "99999999999Ti", "1gb"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
