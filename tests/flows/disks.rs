//! How a disk is run: what was asked for is in the domain, and stays so.

use lunplug::host::libvirt::Definition;
use lunplug::reason::Reason;
use lunplug::spec::{Phase, VolumeSpec};
use lunplug::types::{BlockSize, Blocks, Bus, CacheMode, DetectZeroes, Discard, IoMode, Tuning};

use crate::world::{World, domain, volume};

/// The first VM's domain as its libvirt shows it.
fn live(world: &World) -> String {
    let endpoint = World::endpoint(1);
    let xml = |d: &mut lunplug::host::sim::domain::SimDomain| d.xml(Definition::Live);
    world.host.hypervisor.with_domain(&endpoint, &domain(1), xml).unwrap()
}

fn tuned(tuning: Tuning) -> VolumeSpec {
    VolumeSpec { tuning, ..volume("data", 1) }
}

#[test]
fn a_disk_is_run_as_asked_and_another_life_finds_it_so() {
    let size = |bytes: u32| BlockSize::try_from(bytes).ok();
    let tuning = Tuning {
        io: Some(IoMode::IoUring),
        discard: Some(Discard::Ignore),
        detect_zeroes: Some(DetectZeroes::On),
        blocks: Blocks::new(size(512), size(4096)).unwrap(),
    };
    for bus in [Bus::Scsi, Bus::Virtio] {
        let world = World::new();
        let spec = VolumeSpec { bus, ..tuned(tuning) };
        let before = world.life(async |daemon| {
            assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
            let xml = live(&world);
            for part in [
                "io='io_uring' discard='ignore' detect_zeroes='on'",
                "<blockio logical_block_size='512' physical_block_size='4096'/>",
            ] {
                assert!(xml.contains(part), "{part} in {xml}");
            }
            xml
        });
        world.life(async |daemon| {
            assert_eq!(daemon.ready(1, "data").await.spec.tuning, tuning);
            assert_eq!(live(&world), before, "nothing was done anew");
            let other = tuned(Tuning { io: None, ..tuning });
            let refusal = daemon.want(1, &VolumeSpec { bus, ..other }).await.unwrap_err();
            assert_eq!(refusal.reason, Reason::VolumeExists);
            assert_eq!(refusal.field.as_deref(), Some("volume.io"));
            daemon.remove(1, "data").await;
            daemon.quiet().await;
            world.assert_clean("tuned");
        });
    }
}

#[test]
fn options_that_exclude_each_other_are_refused_before_anything_is_touched() {
    let world = World::new();
    world.life(async |daemon| {
        let native = Tuning { io: Some(IoMode::Native), ..Tuning::default() };
        let spec = VolumeSpec { cache: CacheMode::Writeback, ..tuned(native) };
        let refusal = daemon.want(1, &spec).await.unwrap_err();
        assert_eq!(
            (refusal.reason, refusal.field.as_deref()),
            (Reason::InvalidOption, Some("volume.io"))
        );
        assert!(refusal.message.contains("cache writeback"), "{refusal}");
        world.assert_clean("refused");
    });
}
