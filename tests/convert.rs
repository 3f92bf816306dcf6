//! The wire's forms: what goes out comes in the same, and nothing that comes in breaks anything.
#![allow(clippy::unwrap_used)]

use lunplug::api::convert::{vm_spec, volume_spec, wire_spec};
use lunplug::api::v1;
use lunplug::spec::{MultipathPolicy, Source, VolumeSpec};
use lunplug::types::{Bus, CacheMode, ErrorPolicy};
use lunplug::vm::resolve::Names;
use proptest::prelude::*;
use prost::Message;

prop_compose! {
    fn specs()(
        name in "[a-z0-9]{1,20}",
        serial in "[A-Za-z0-9_.+-]{1,20}",
        virtio: bool,
        cache in 0..3usize,
        multipath in 0..3usize,
        policy in proptest::option::of(0..4usize),
        (read_only, shareable, persist) in any::<(bool, bool, bool)>(),
        wwid in proptest::option::of("naa\\.[0-9a-f]{16}"),
        blocks in proptest::option::of(1..u64::MAX / 512),
        lun in 0..16384u32,
        (by_name, serial_expected, iface, initiator) in any::<(bool, bool, bool, bool)>(),
        more in 0..3u32,
    ) -> VolumeSpec {
        let resolved = ("san-1:99".parse().unwrap(), "[fd00::1]:99".parse().unwrap());
        let names: Names = if by_name { [resolved].into() } else { Names::new() };
        let cache = [CacheMode::None, CacheMode::Writethrough, CacheMode::Writeback][cache];
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
        let url = url + query;
        VolumeSpec {
            name: name.parse().unwrap(),
            source: url.parse::<Source>().unwrap(),
            disk: format!("disk-{lun}").parse().unwrap(),
            serial: serial.parse().unwrap(),
            bus: if virtio { Bus::Virtio } else { Bus::Scsi },
            cache: if shareable { CacheMode::None } else { cache },
            error_policy: policy.map(|at| ERRORS[at]),
            read_only,
            shareable,
            persist,
            multipath: policies[multipath],
            expect_wwid: wwid.map(|w| w.parse().unwrap()),
            expect_size: blocks.map(|b| b * 512),
            expect_unit_serial: serial_expected.then(|| "6000 A".parse().unwrap()),
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
        let spec = vm_spec(Some(v1::VmSpec { id, domain: String::new(), place }));
        if path.starts_with('/') || path.split('/').any(|part| part == "..") {
            prop_assert!(spec.is_err());
        }
    }
}
