//! Admission: which requests a VM's handler takes, ignores or denies. Pure.
//!
//! ```text
//!               add, same particulars          add, other particulars      remove
//! absent        accept                         accept                      deny: not found
//! Failed        accept (starts anew)           accept (starts anew)        forget
//! pending..Ready ignore (Pending: try now)     deny: exists                accept
//! Detaching..   deny: being removed            deny: being removed         ignore (force: accept)
//! ```

pub mod fc;
pub mod set;

use std::collections::BTreeSet;
use std::sync::Arc;

use super::facade::Refusal;
use crate::reason::Reason;
use crate::spec::{FcSupport, Phase, RemoveOptions, VolumeSpec};
use crate::types::{TargetName, VolumeName};

/// What admission knows of a volume.
#[derive(Debug, Clone)]
pub struct Known {
    /// As it was asked for.
    pub spec: Arc<VolumeSpec>,
    /// Its add failed, which left nothing but the memory of it.
    pub failed: bool,
    /// How it is being removed, if it is.
    pub removing: Option<RemoveOptions>,
}

/// The same, with the removal of some asked for together with what is to be admitted.
pub fn without(mut known: Vec<Known>, leaving: &BTreeSet<VolumeName>) -> Vec<Known> {
    for one in known.iter_mut().filter(|k| leaving.contains(&k.spec.name)) {
        one.removing.get_or_insert_default();
    }
    known
}

/// What this node allows a VM.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// At most so many volumes.
    pub max_volumes: usize,
    /// The request must say which identity the LUN has.
    pub require_wwid: bool,
    /// There is a qemu-pr-helper for persistent reservations.
    pub reservations: bool,
    /// What was said of the VM and Fibre Channel.
    pub fc: FcSupport,
    /// What becomes of its mark.
    pub after_last_fc: fc::AfterLast,
}

/// What to do with a request that was not denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Carry it out.
    Accept,
    /// It is as asked already, or on its way there.
    Ignore,
    /// Only the memory of a failed add has to go.
    Forget,
}

/// Whether a volume may be added to a VM that has `known`.
pub fn admit_add(known: &[Known], spec: &VolumeSpec, rules: Rules) -> Result<Admission, Refusal> {
    if let Err((field, malformed)) = spec.check() {
        return Err(
            Refusal::new(reason_of(field), malformed.to_string()).field(format!("volume.{field}"))
        );
    }
    let live = || known.iter().filter(|k| !k.failed);
    if let Some(same) = live().find(|k| k.spec.name == spec.name) {
        if same.removing.is_some() {
            let message =
                format!("volume {} is being removed; add it again when it is gone", spec.name);
            return Err(Refusal::new(Reason::VolumeExists, message).field("volume.name"));
        }
        if *same.spec == *spec || outgrown(&same.spec, spec) {
            return Ok(Admission::Ignore);
        }
        let field = first_difference(&same.spec, spec);
        let message = format!("volume {} exists with another {field}", spec.name);
        return Err(Refusal::new(Reason::VolumeExists, message).field(format!("volume.{field}")));
    }
    if let Some(other) = live().find(|k| k.spec.disk == spec.disk) {
        let message = format!("disk {} is that of volume {}", spec.disk, other.spec.name);
        return Err(Refusal::new(Reason::VolumeExists, message).field("volume.disk_name"));
    }
    let shared = live().find_map(|k| Some((k, spec.source.shared_with(&k.spec.source)?)));
    if let Some((other, shared)) = shared {
        let message = format!("{shared} is attached as volume {}", other.spec.name);
        return Err(Refusal::new(Reason::SourceInUse, message).field("volume.source"));
    }
    if let Some(serial) = &spec.serial
        && let Some(other) = live().find(|k| k.spec.serial.as_ref() == Some(serial))
    {
        let message = format!("serial {serial} is that of volume {}", other.spec.name);
        return Err(Refusal::new(Reason::SerialInUse, message).field("volume.serial"));
    }
    let same_drive = |k: &&Known| spec.drive.is_some() && k.spec.drive == spec.drive;
    if let Some(other) = live().find(|k| k.removing.is_none() && same_drive(k)) {
        let drive = spec.drive.as_ref().map_or("", TargetName::as_str);
        let message = format!("drive {drive} is that of volume {}", other.spec.name);
        return Err(Refusal::new(Reason::DriveOccupied, message).field("volume.drive"));
    }
    if spec.reservations && !rules.reservations {
        let message =
            "persistent reservations need a qemu-pr-helper: this node has no pr_helper_socket set";
        let refusal = Refusal::new(Reason::Unsupported, message);
        return Err(refusal.field("volume.persistent_reservations"));
    }
    if rules.require_wwid && spec.expect_wwid.is_none() {
        let message = "the identity of the LUN is missing: this node has require_wwid set";
        return Err(Refusal::new(Reason::WwidRequired, message).field("volume.wwid"));
    }
    let limit = rules.max_volumes;
    if live().count() >= limit {
        let message =
            format!("the VM has {limit} volumes, as many as limits.max_volumes_per_vm allows");
        return Err(Refusal::new(Reason::LimitReached, message));
    }
    Ok(Admission::Accept)
}

/// Whether `asked` is the volume that there is, with a size that it has outgrown: an expand raises what
/// is expected of it, and whoever asked for it keeps asking for what it was.
fn outgrown(has: &VolumeSpec, asked: &VolumeSpec) -> bool {
    let smaller = asked.expect_size.is_some() && asked.expect_size < has.expect_size;
    smaller && VolumeSpec { expect_size: has.expect_size, ..asked.clone() } == *has
}

/// Whether a volume may be removed, and how. `known` is the volume of that name.
pub fn admit_remove(known: Option<&Known>, options: RemoveOptions) -> Option<Admission> {
    let known = known?;
    Some(match known.removing {
        _ if known.failed => Admission::Forget,
        Some(under_way) if under_way.force || !options.force => Admission::Ignore,
        Some(_) | None => Admission::Accept,
    })
}

/// What an attach that did not succeed has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Nothing: all was undone.
    Nothing,
    /// The disk, which the guest had before and still has: nothing was undone.
    Disk,
    /// What a VM that does not run had before: its next try, which knows more of it, undoes that or uses it.
    Off,
    /// Something, or nobody knows: the journal could not be read, or undoing failed as well. It is
    /// gone on from there, whatever the reason.
    Unknown,
}

/// What becomes of a volume whose attach failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It is tried again later, and shown in this phase meanwhile.
    Retry(Phase),
    /// It is wanted no more.
    GiveUp,
}

/// What becomes of a volume in phase `shown` whose attach failed for `reason`. One that was attached
/// before (`lasting`) stays wanted whatever happens to it; so does any whose VM is away, for that it
/// was there was checked when the volume was asked for.
pub fn after_failure(reason: Reason, left: Left, lasting: bool, shown: Phase) -> Next {
    match left {
        Left::Disk => Next::Retry(Phase::Ready),
        // Whatever was shown of it last.
        Left::Off => Next::Retry(Phase::Pending),
        Left::Unknown if shown == Phase::Ready => Next::Retry(Phase::Ready),
        Left::Unknown => Next::Retry(Phase::Pending),
        Left::Nothing if lasting || reason.is_transient() || reason.is_vm_away() => {
            Next::Retry(Phase::Pending)
        }
        Left::Nothing => Next::GiveUp,
    }
}

fn reason_of(field: &str) -> Reason {
    match field {
        "serial" => Reason::InvalidSerial,
        "source.portals" => Reason::InvalidPortal,
        _ => Reason::InvalidOption,
    }
}

/// The name of the first field in which two volumes differ.
fn first_difference(a: &VolumeSpec, b: &VolumeSpec) -> &'static str {
    let VolumeSpec {
        name: _,
        disk,
        source,
        serial,
        bus,
        device,
        drive,
        reservations,
        dedicated_io_thread,
        cache,
        error_policy,
        read_only,
        shareable,
        persist,
        multipath,
        expect_wwid,
        expect_size,
        expect_unit_serial,
        tuning,
        limits,
        names,
    } = a;
    let differs = [
        ("disk_name", *disk != b.disk),
        ("source", *source != b.source || *names != b.names),
        ("serial", *serial != b.serial),
        ("bus", *bus != b.bus),
        ("disk_type", *device != b.device),
        ("drive", *drive != b.drive),
        ("persistent_reservations", *reservations != b.reservations),
        ("dedicated_io_thread", *dedicated_io_thread != b.dedicated_io_thread),
        ("cache", *cache != b.cache),
        ("error_policy", *error_policy != b.error_policy),
        ("read_only", *read_only != b.read_only),
        ("shareable", *shareable != b.shareable),
        ("persist", *persist != b.persist),
        ("multipath", *multipath != b.multipath),
        ("wwid", *expect_wwid != b.expect_wwid),
        ("size_bytes", *expect_size != b.expect_size),
        ("io_limits", *limits != b.limits),
        ("unit_serial", *expect_unit_serial != b.expect_unit_serial),
    ];
    let first = differs.iter().find(|(_, differs)| *differs).map(|(field, _)| *field);
    first.or_else(|| tuning.first_difference(&b.tuning)).unwrap_or("name")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::{Source, volume_fixture};
    use crate::types::{Bus, Lun};

    fn with_lun(name: &str, lun: u64) -> VolumeSpec {
        let mut spec = volume_fixture(name);
        let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
        source.lun = Lun::try_from(lun).unwrap();
        spec
    }

    fn wanted(spec: VolumeSpec) -> Known {
        Known { spec: spec.into(), failed: false, removing: None }
    }

    fn leaving(spec: VolumeSpec) -> Known {
        Known { removing: Some(RemoveOptions::default()), ..wanted(spec) }
    }

    fn failed(spec: VolumeSpec) -> Known {
        Known { failed: true, ..wanted(spec) }
    }

    pub(super) const RULES: Rules = Rules {
        max_volumes: 256,
        require_wwid: false,
        reservations: false,
        fc: FcSupport::Unspecified,
        after_last_fc: fc::AfterLast::Keep,
    };

    fn denied(known: &[Known], spec: &VolumeSpec) -> (Reason, Option<String>) {
        let refusal = admit_add(known, spec, RULES).unwrap_err();
        (refusal.reason, refusal.field)
    }

    #[test]
    fn each_clash_has_its_own_reason_and_names_the_field() {
        let ready = [wanted(with_lun("a", 1))];
        assert_eq!(admit_add(&ready, &with_lun("a", 1), RULES).unwrap(), Admission::Ignore);
        assert_eq!(
            denied(&ready, &with_lun("a", 2)),
            (Reason::VolumeExists, Some("volume.source".into()))
        );
        assert_eq!(
            denied(&ready, &with_lun("b", 1)),
            (Reason::SourceInUse, Some("volume.source".into()))
        );
        let mut same_serial = with_lun("b", 2);
        same_serial.serial = Some("a".parse().unwrap());
        assert_eq!(
            denied(&ready, &same_serial),
            (Reason::SerialInUse, Some("volume.serial".into()))
        );
        let mut same_disk = with_lun("b", 2);
        same_disk.disk = "a".parse().unwrap();
        let clash = (Reason::VolumeExists, Some("volume.disk_name".into()));
        assert_eq!(denied(&ready, &same_disk), clash);
        let full =
            admit_add(&ready, &with_lun("b", 2), Rules { max_volumes: 1, ..RULES }).unwrap_err();
        assert_eq!(full.reason, Reason::LimitReached);
        let leaving = [leaving(with_lun("a", 1))];
        assert_eq!(denied(&leaving, &with_lun("a", 1)).0, Reason::VolumeExists);
    }

    #[test]
    fn a_drive_is_one_volumes_until_that_is_wanted_no_more() {
        let in_drive = |name, lun, drive: &str| {
            let device = crate::types::DiskType::Cdrom;
            let plain = with_lun(name, lun);
            let drive = drive.parse().ok();
            VolumeSpec { serial: None, device, drive, read_only: true, ..plain }
        };
        let field = Some("volume.drive".into());
        let ready = [wanted(in_drive("a", 1, "sda"))];
        assert_eq!(denied(&ready, &in_drive("b", 2, "sda")), (Reason::DriveOccupied, field));
        // What an unnamed drive is, the domain alone can say.
        for drive in ["sdb", ""] {
            let admitted = admit_add(&ready, &in_drive("b", 2, drive), RULES);
            assert_eq!(admitted.unwrap(), Admission::Accept);
        }
        let leaving = [leaving(in_drive("a", 1, "sda"))];
        let with_it = without(ready.to_vec(), &BTreeSet::from(["a".parse().unwrap()]));
        for known in [&leaving[..], &with_it] {
            let admitted = admit_add(known, &in_drive("b", 2, "sda"), RULES);
            assert_eq!(admitted.unwrap(), Admission::Accept);
        }
    }

    #[test]
    fn a_node_can_require_that_the_identity_is_given() {
        let strict = Rules { require_wwid: true, ..RULES };
        let mut spec = with_lun("a", 1);
        let refusal = admit_add(&[], &spec, strict).unwrap_err();
        assert_eq!(
            (refusal.reason, refusal.field),
            (Reason::WwidRequired, Some("volume.wwid".into()))
        );
        // What there was before the setting stays what it is.
        let before = [wanted(spec.clone())];
        assert_eq!(admit_add(&before, &spec, strict).unwrap(), Admission::Ignore);
        spec.expect_wwid = Some("naa.6001405abcdef0123456789abcdef012".parse().unwrap());
        assert_eq!(admit_add(&[], &spec, strict).unwrap(), Admission::Accept);
    }

    #[test]
    fn reservations_need_a_helper_and_luns_have_no_serial_to_clash() {
        let lun = |name, lun| {
            let plain = with_lun(name, lun);
            VolumeSpec { serial: None, device: crate::types::DiskType::Lun, ..plain }
        };
        let have = [wanted(lun("a", 1))];
        assert_eq!(admit_add(&have, &lun("b", 2), RULES).unwrap(), Admission::Accept);
        let reserving = VolumeSpec { reservations: true, ..lun("b", 2) };
        let field = Some("volume.persistent_reservations".into());
        assert_eq!(denied(&have, &reserving), (Reason::Unsupported, field));
        let helped = Rules { reservations: true, ..RULES };
        assert_eq!(admit_add(&have, &reserving, helped).unwrap(), Admission::Accept);
        assert_eq!(denied(&have, &with_lun("a", 1)).1, Some("volume.serial".into()));
    }

    #[test]
    fn a_size_that_was_outgrown_is_that_of_the_same_volume() {
        let sized = |size| VolumeSpec { expect_size: size, ..with_lun("a", 1) };
        let grown = [wanted(sized(Some(1024)))];
        for size in [512, 1024] {
            let same = admit_add(&grown, &sized(Some(size)), RULES);
            assert_eq!(same.unwrap(), Admission::Ignore, "{size}");
        }
        let other = (Reason::VolumeExists, Some("volume.size_bytes".into()));
        assert_eq!(denied(&grown, &sized(Some(2048))), other);
        assert_eq!(denied(&grown, &sized(None)), other);
        let elsewhere = VolumeSpec { read_only: true, ..sized(Some(512)) };
        assert_eq!(denied(&grown, &elsewhere).0, Reason::VolumeExists);
    }

    #[test]
    fn the_same_source_by_another_portal_is_the_same_source() {
        let ready = [wanted(with_lun("a", 1))];
        let mut other = with_lun("b", 1);
        let Source::Iscsi(source) = &mut other.source else { panic!("of iSCSI") };
        source.portals = vec!["192.0.2.9:3260".parse().unwrap()];
        assert_eq!(denied(&ready, &other).0, Reason::SourceInUse);
    }

    #[test]
    fn a_source_that_has_any_target_in_common_is_the_same_source() {
        let ready = [wanted(with_lun("a", 1))];
        let of = |lun: u64, more: &str| {
            let mut spec = with_lun("b", lun);
            spec.source = format!("{}+{more}", spec.source).parse().unwrap();
            spec
        };
        let first = ready[0].spec.source.to_string();
        let there = first.strip_prefix("iscsi://").unwrap();
        let (reason, field) = denied(&ready, &of(2, there));
        assert_eq!((reason, field.as_deref()), (Reason::SourceInUse, Some("volume.source")));
        let elsewhere = "192.0.2.9/iqn.2026-01.org.lunplug:elsewhere/1";
        assert_eq!(denied(&ready, &of(1, elsewhere)).0, Reason::SourceInUse);
        assert!(admit_add(&ready, &of(2, elsewhere), RULES).is_ok());
    }

    #[test]
    fn a_serial_too_long_for_its_bus_is_refused_and_points_at_the_flag() {
        let mut spec = with_lun("v", 1);
        spec.bus = Bus::Virtio;
        spec.serial = Some("a-serial-of-21-bytes-".parse().unwrap());
        let refusal = admit_add(&[], &spec, RULES).unwrap_err();
        assert_eq!(refusal.reason, Reason::InvalidSerial);
        assert!(refusal.message.contains("--serial"), "{}", refusal.message);
    }

    #[test]
    fn a_removal_can_only_become_more_forceful() {
        let plain = RemoveOptions::default();
        let force = RemoveOptions { force: true, ..plain };
        let leaving = leaving(with_lun("a", 1));
        let forced = Known { removing: Some(force), ..leaving.clone() };
        assert_eq!(admit_remove(None, plain), None);
        assert_eq!(admit_remove(Some(&leaving), plain), Some(Admission::Ignore));
        assert_eq!(admit_remove(Some(&leaving), force), Some(Admission::Accept));
        assert_eq!(admit_remove(Some(&forced), plain), Some(Admission::Ignore));
        let failed = failed(with_lun("a", 1));
        assert_eq!(admit_remove(Some(&failed), plain), Some(Admission::Forget));
    }

    #[test]
    fn what_becomes_of_a_failed_attach() {
        let (passes, away, lasts) =
            (Reason::PortalUnreachable, Reason::VmNotRunning, Reason::IdentityChanged);
        let (ready, pending) = (Next::Retry(Phase::Ready), Next::Retry(Phase::Pending));
        for (reason, left, lasting, shown, next) in [
            (passes, Left::Nothing, false, Phase::Bound, pending),
            (away, Left::Nothing, false, Phase::Bound, pending),
            (lasts, Left::Nothing, false, Phase::Bound, Next::GiveUp),
            (lasts, Left::Nothing, true, Phase::Bound, pending),
            (lasts, Left::Disk, true, Phase::Pending, ready),
            (away, Left::Unknown, false, Phase::Bound, pending),
            (lasts, Left::Unknown, false, Phase::Ready, ready),
            (lasts, Left::Off, true, Phase::Ready, pending),
        ] {
            let became = after_failure(reason, left, lasting, shown);
            assert_eq!(became, next, "{reason} {left:?} {lasting} {shown:?}");
        }
    }

    fn any_known() -> impl Strategy<Value = Vec<Known>> {
        const STATES: [fn(VolumeSpec) -> Known; 3] = [wanted, leaving, failed];
        let one = (0u64..4, 0u64..4, prop::sample::select(&STATES[..]));
        let one = one.prop_map(|(name, lun, state)| state(with_lun(&format!("v{name}"), lun)));
        prop::collection::vec(one, 0..6)
    }

    proptest! {
        /// Whatever is accepted, one after the other, no two live volumes share name, source or serial.
        #[test]
        fn what_is_accepted_never_clashes(requests in prop::collection::vec((0u64..5, 0u64..5), 0..20)) {
            let mut have: Vec<Known> = Vec::new();
            for (name, lun) in requests {
                let spec = with_lun(&format!("v{name}"), lun);
                if matches!(admit_add(&have, &spec, RULES), Ok(Admission::Accept)) {
                    have.push(wanted(spec));
                }
            }
            for (i, a) in have.iter().enumerate() {
                for b in &have[i + 1..] {
                    prop_assert_ne!(&a.spec.name, &b.spec.name);
                    prop_assert_ne!(a.spec.source.key(), b.spec.source.key());
                    prop_assert_ne!(&a.spec.serial, &b.spec.serial);
                }
            }
        }

        /// A failed add is no obstacle: admission answers as if it were not there.
        #[test]
        fn failed_adds_do_not_count(have in any_known(), name in 0u64..5, lun in 0u64..5) {
            let spec = with_lun(&format!("v{name}"), lun);
            let live: Vec<Known> = have.iter().filter(|k| !k.failed).cloned().collect();
            let few = Rules { max_volumes: 4, ..RULES };
            prop_assert_eq!(admit_add(&have, &spec, few), admit_add(&live, &spec, few));
        }
    }
}
