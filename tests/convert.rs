//! The wire's forms: what goes out comes in the same, and nothing that comes in breaks anything.
#![allow(clippy::unwrap_used)]

use lunplug::api::convert::{vm_spec, volume_spec, wire_spec};
use lunplug::api::v1;
use lunplug::spec::{MultipathPolicy, Source, VolumeSpec};
use lunplug::types::{
    BlockSize, Blocks, Bus, CacheMode, DetectZeroes, Discard, DiskType, ErrorPolicy, IoLimits,
    IoMode, Tuning,
};
use lunplug::vm::resolve::Names;
use proptest::prelude::*;
use prost::Message;

prop_compose! {
    /// Without what it would be anyway.
    fn tunings()(
        cache in 0..3usize,
        shareable: bool,
        io in 0..3usize,
        (ignore, zeroes) in (any::<bool>(), 0..3usize),
        logical in proptest::option::of(9..22u32),
        more in proptest::option::of(0..3u32),
    ) -> (Tuning, CacheMode, bool) {
        let cache = [CacheMode::None, CacheMode::Writethrough, CacheMode::Writeback][cache];
        let cache = if shareable { CacheMode::None } else { cache };
        let size = |log: u32| BlockSize::try_from(1u32 << log.min(21)).unwrap();
        let physical = logical.and_then(|at| more.map(|more| size(at + more)));
        let tuning = Tuning {
            io: [Some(IoMode::Threads), Some(IoMode::IoUring), None][io],
            discard: ignore.then_some(Discard::Ignore),
            detect_zeroes: [Some(DetectZeroes::On), Some(DetectZeroes::Unmap), None][zeroes]
                .filter(|zeroes| !(ignore && *zeroes == DetectZeroes::Unmap)),
            blocks: Blocks::new(logical.map(size), physical).unwrap(),
        };
        (tuning.normal(cache), cache, shareable)
    }
}

prop_compose! {
    fn limits()((total, a, b) in any::<(bool, u32, u32)>()) -> IoLimits {
        let (a, b) = (u64::from(a), u64::from(b));
        if total {
            IoLimits { total_bytes_sec: a, total_iops_sec: b, ..IoLimits::default() }
        } else {
            IoLimits { read_bytes_sec: a, write_iops_sec: b, ..IoLimits::default() }
        }
    }
}

prop_compose! {
    fn specs()(
        name in "[a-z0-9]{1,20}",
        serial in "[A-Za-z0-9_.+-]{1,20}",
        virtio: bool,
        (tuning, cache, shareable) in tunings(),
        multipath in 0..3usize,
        policy in proptest::option::of(0..4usize),
        limits in limits(),
        (read_only, persist) in any::<(bool, bool)>(),
        wwid in proptest::option::of("naa\\.[0-9a-f]{16}"),
        blocks in proptest::option::of(1..u64::MAX / 512),
        lun in 0..16384u32,
        (by_name, serial_expected, iface, initiator) in any::<(bool, bool, bool, bool)>(),
        (more, kind, map) in (0..3u32, 0..3u8, any::<bool>()),
    ) -> VolumeSpec {
        let resolved = ("san-1:99".parse().unwrap(), "[fd00::1]:99".parse().unwrap());
        let names: Names = if by_name { [resolved].into() } else { Names::new() };
        let policies =
            [MultipathPolicy::Preferred, MultipathPolicy::Required, MultipathPolicy::Off];
        const ERRORS: [ErrorPolicy; 4] = [
            ErrorPolicy::Stop,
            ErrorPolicy::Report,
            ErrorPolicy::Ignore,
            ErrorPolicy::Enospace,
        ];
        let first = format!("iscsi://10.0.0.1,[fd00::1]:99/iqn.2001-04.com.example:{name}/{lun}");
        let more = (0..more).map(|n| format!("+10.0.0.2/iqn.2001-04.com.example:{name}/{}", lun ^ (n + 1)));
        let url = more.fold(first, |url, more| url + &more);
        let query = match (iface, initiator) {
            (false, false) => "",
            (true, false) => "?iface=iser",
            (false, true) => "?initiator=iqn.2001-04.com.example:vm",
            (true, true) => "?iface=iser&initiator=iqn.2001-04.com.example:vm",
        };
        let local = kind >= 2;
        let url = if local {
            let scheme = ["block", "file", "file+qcow2"][usize::from(kind) - 2];
            format!("{scheme}:///dev/vg/{name}-{lun}")
        } else if kind == 1 {
            let wwpn = "500a0982991b8dc5";
            let map = if map { format!("map=21000024ff3d2e5c/{wwpn}&lip") } else { "wildcard_scan".into() };
            format!("fc://{wwpn},500a0982891b8dc5/{lun}+500a0982891b8dc6/flat:7?{map}")
        } else {
            url + query
        };
        VolumeSpec {
            name: name.parse().unwrap(),
            source: url.parse::<Source>().unwrap(),
            disk: format!("disk-{lun}").parse().unwrap(),
            serial: Some(serial.parse().unwrap()),
            device: DiskType::Disk,
            drive: None,
            reservations: false,
            dedicated_io_thread: virtio && lun % 2 == 0,
            bus: if virtio { Bus::Virtio } else { Bus::Scsi },
            cache,
            error_policy: policy.map(|at| ERRORS[at]),
            read_only,
            shareable,
            persist,
            // Of what is on the host no map is made.
            multipath: policies[if local { 2 } else { multipath }],
            expect_wwid: wwid.map(|w| w.parse().unwrap()),
            expect_size: blocks.map(|b| b * 512),
            expect_unit_serial: serial_expected.then(|| "6000 A".parse().unwrap()),
            tuning,
            limits,
            names,
        }
    }
}

proptest! {
    #[test]
    fn a_volume_that_goes_out_comes_in_the_same(spec in specs()) {
        prop_assert_eq!(volume_spec(Some(wire_spec(&spec)), spec.names.clone()).unwrap(), spec);
    }

    #[test]
    fn a_medium_that_goes_out_comes_in_the_same(spec in specs(), named: bool) {
        let medium = VolumeSpec {
            serial: None,
            device: DiskType::Cdrom,
            drive: named.then(|| "sda".parse().unwrap()),
            dedicated_io_thread: false,
            bus: Bus::Scsi,
            cache: CacheMode::None,
            error_policy: None,
            read_only: true,
            persist: false,
            tuning: Tuning::default(),
            limits: IoLimits::default(),
            ..spec
        };
        let mut wire = wire_spec(&medium);
        // That it is read-only need not be said.
        wire.read_only = false;
        prop_assert_eq!(volume_spec(Some(wire), medium.names.clone()).unwrap(), medium);
    }

    #[test]
    fn a_lun_that_goes_out_comes_in_the_same(spec in specs(), reservations: bool) {
        let lun = VolumeSpec {
            serial: None,
            device: DiskType::Lun,
            reservations,
            dedicated_io_thread: false,
            // What is on the host may be no LUN.
            source: match spec.source {
                Source::Block(_) | Source::File(_) => "fc://500a0982991b8dc5/7".parse().unwrap(),
                source => source,
            },
            bus: Bus::Scsi,
            cache: CacheMode::None,
            read_only: false,
            tuning: Tuning::default(),
            limits: IoLimits::default(),
            ..spec
        };
        prop_assert_eq!(volume_spec(Some(wire_spec(&lun)), lun.names.clone()).unwrap(), lun);
    }

    #[test]
    fn no_bytes_from_the_wire_make_the_conversion_panic(bytes: Vec<u8>) {
        if let Ok(request) = v1::AddVolumeRequest::decode(&*bytes) {
            let _ = volume_spec(request.volume, Names::new());
        }
        if let Ok(request) = v1::RegisterVmRequest::decode(&*bytes) {
            let _ = vm_spec(request.vm);
        }
    }

    #[test]
    fn no_text_makes_the_conversion_panic_or_leave_the_pod(
        uid in "[0-9a-f-]{36}",
        path in "[a./~\\x00 -]{0,20}",
    ) {
        let pod = v1::PodPlace { uid, hotplug_dir: path.clone(), ..Default::default() };
        let id = Some(v1::VmId { namespace: String::new(), name: "a".into() });
        let place = Some(v1::vm_spec::Place::Pod(pod));
        let spec = vm_spec(Some(v1::VmSpec { id, domain: String::new(), place, fc: 0 }));
        if path.starts_with('/') || path.split('/').any(|part| part == "..") {
            prop_assert!(spec.is_err());
        }
    }
}
