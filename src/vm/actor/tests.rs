use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;

use super::*;
use crate::connector::Paths;
use crate::host::sim::{Fault, FaultAction, Faults, SimStorage};
use crate::journal::Effects;
use crate::reason::Reason;
use crate::spec::FcSupport;
use crate::spec::{
    AddOptions, DeviceStatus, Phase, RemoveOptions, VmPlace, VmSpec, VolumeSpec, VolumeStatus,
    volume_fixture,
};
use crate::types::Outcome;
use crate::vm::facade::Refusal;
use crate::vm::failure::Failure;
use crate::vm::handler::Handler;
use crate::vm::plan::fc::{AfterLast, Power};
use crate::vm::plan::{Left, Rules};
use crate::vm::steps::{
    AttachFailure, Came, Circumstances, ExpandFailure, Grown, LookedAt, Sight, Stir,
};

/// Steps that do what they are told, and tell what they did.
#[derive(Default)]
struct Script {
    off: Mutex<bool>,
    attaches: Mutex<VecDeque<Result<Came, AttachFailure>>>,
    detaches: Mutex<VecDeque<Result<(), Failure>>>,
    refuse_remove: Mutex<Option<Refusal>>,
    log: Mutex<Vec<String>>,
    /// Attaches of these volumes never end.
    hung: Mutex<BTreeSet<String>>,
    /// The next check of these volumes waits.
    slow_checks: Mutex<BTreeMap<String, Arc<Notify>>>,
    /// The next expand waits for this.
    expand_hangs: Mutex<Option<Arc<Notify>>>,
    looks: Mutex<VecDeque<Result<BTreeMap<VolumeName, Sight>, Failure>>>,
    looked: Notify,
    /// What the first look after a start finds.
    first_looks: Mutex<VecDeque<Result<BTreeMap<VolumeName, Sight>, Failure>>>,
    stirs: Mutex<Option<mpsc::Sender<Stir>>>,
    board: Board,
}

impl Script {
    fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

#[async_trait]
impl Steps for Script {
    async fn check_add(
        &self,
        spec: &VolumeSpec,
        _: &BTreeSet<VolumeName>,
    ) -> Result<Power, Refusal> {
        let slow = self.slow_checks.lock().unwrap().remove(spec.name.as_str());
        if let Some(goes_on) = slow {
            goes_on.notified().await;
        }
        assert_ne!(spec.name.as_str(), "check-panics", "told to");
        Ok(if *self.off.lock().unwrap() { Power::Off } else { Power::On })
    }

    async fn check_remove(
        &self,
        name: &VolumeName,
        known: Option<&VolumeSpec>,
        options: RemoveOptions,
    ) -> Result<Vec<String>, Refusal> {
        let slow = self.slow_checks.lock().unwrap().remove(name.as_str());
        if let Some(goes_on) = slow {
            goes_on.notified().await;
        }
        if known.is_none() {
            return Err(Refusal::new(Reason::VolumeNotFound, format!("no volume {name}")));
        }
        match (options.force, self.refuse_remove.lock().unwrap().clone()) {
            (false, Some(refusal)) => Err(refusal),
            (true, Some(refusal)) => Ok(vec![refusal.message]),
            _ => Ok(Vec::new()),
        }
    }

    async fn attach(
        &self,
        volume: &StoredVolume,
        how: Circumstances,
    ) -> Result<Came, AttachFailure> {
        let name = volume.spec.name.to_string();
        self.note(format!(
            "attach {name}{}",
            match (volume.accept_new_identity, how.starting) {
                (true, _) => " accept",
                (_, true) => " starting",
                _ => "",
            }
        ));
        if self.hung.lock().unwrap().contains(&name) {
            std::future::pending::<()>().await;
        }
        assert_ne!(name, "panics", "told to");
        let result = self.attaches.lock().unwrap().pop_front().unwrap_or(Ok(Came::ToGuest));
        if matches!(result, Ok(Came::ToGuest)) {
            let key = VolumeKey { vm: vm(), volume: volume.spec.name.clone() };
            self.board.phase(&key, Phase::Ready);
        }
        result
    }

    async fn expand(
        &self,
        volume: &StoredVolume,
        expected: Option<u64>,
    ) -> Result<Outcome<Grown>, ExpandFailure> {
        let name = volume.spec.name.to_string();
        self.note(format!("expand {name} {expected:?}"));
        let hung = self.expand_hangs.lock().unwrap().take();
        if let Some(goes_on) = hung {
            goes_on.notified().await;
        }
        let size = expected.unwrap_or(1024);
        Ok(Outcome::Done(Grown { before: 512, size, expect_size: None }))
    }

    async fn set_limits(&self, volume: &StoredVolume) -> Result<Outcome, Failure> {
        self.note(format!("limits {} {}", volume.spec.name, volume.spec.limits.total_iops_sec));
        Ok(Outcome::Done(()))
    }

    async fn look(&self, volumes: &[LookedAt]) -> Result<BTreeMap<VolumeName, Sight>, Failure> {
        if volumes.iter().all(|v| v.anew) {
            let first = self.first_looks.lock().unwrap().pop_front();
            // Nothing is found, unless told so.
            let walked =
                |v: &LookedAt| (v.volume.spec.name.clone(), Sight::Differs("told to".into()));
            return first.unwrap_or_else(|| Ok(volumes.iter().map(walked).collect()));
        }
        self.note(format!("look {}", volumes.len()));
        let mut looks = self.looks.lock().unwrap();
        let found = looks.pop_front().unwrap_or_else(|| {
            let right = |v: &LookedAt| (v.volume.spec.name.clone(), right(2));
            Ok(volumes.iter().map(right).collect())
        });
        self.looked.notify_waiters();
        found
    }

    async fn watch(&self, stirs: mpsc::Sender<Stir>) {
        *self.stirs.lock().unwrap() = Some(stirs);
        std::future::pending().await
    }

    async fn detach(&self, volume: &VolumeSpec, options: RemoveOptions) -> Result<(), Failure> {
        let name = &volume.name;
        self.note(format!("detach {name}{}", if options.force { " force" } else { "" }));
        self.detaches.lock().unwrap().pop_front().unwrap_or(Ok(()))
    }
}

/// A volume of two paths that is as it was made, `living` of them.
fn right(living: u32) -> Sight {
    let device = DeviceStatus {
        dev: "253:1".parse().unwrap(),
        wwid: "naa.6001405000000000000000000000000a".parse().unwrap(),
        size: 512,
        map: Some("mpatha".into()),
        paths: 2,
    };
    let paths = Paths { wanted: 2, present: 2, living, ..Paths::default() };
    Sight::Right {
        attachment: Attachment { device, diskseq: 1, paths: Vec::new(), file: None },
        paths,
        target: Some("sda".into()),
    }
}

fn vm() -> VmId {
    "prod/a".parse().unwrap()
}

struct World {
    script: Arc<Script>,
    tools: Tools,
    sim: SimStorage,
}

impl World {
    async fn new() -> Self {
        let board = Board::default();
        let script = Arc::new(Script { board: board.clone(), ..Script::default() });
        let sim = SimStorage::new(Arc::new(Faults::default()));
        let desired = Desired::in_memory().unwrap();
        let place = VmPlace::Host { libvirt_socket: None };
        desired
            .put_vm(&VmSpec { id: vm(), domain: "a".into(), place, fc: FcSupport::default() })
            .await
            .unwrap();
        let tools = Tools {
            tracker: Tracker::new(sim.faults().clone()),
            steps: script.clone(),
            board,
            desired,
            effects: EffectsStore::new(sim.rundir()),
            backoff: Backoff { first: Duration::from_secs(1), cap: Duration::from_secs(60) },
            look_interval: Duration::from_secs(60),
            auto_expand: false,
            rules: Rules {
                max_volumes: 8,
                require_wwid: false,
                reservations: false,
                fc: FcSupport::default(),
                after_last_fc: AfterLast::default(),
            },
            moving: false,
        };
        Self { script, tools, sim }
    }

    async fn handler(&self) -> Handler {
        Handler::start(vm(), self.tools.clone()).await.unwrap()
    }

    /// Waits for the volume to come to a phase.
    async fn reaches(&self, name: &str, phase: Phase) -> VolumeStatus {
        self.until(name, |s| s.phase == phase).await
    }

    /// Waits for the volume to be gone, which it may be already.
    async fn gone(&self, name: &str) {
        let mut watch = self.tools.board.watch();
        let key = VolumeKey { vm: vm(), volume: name.parse().unwrap() };
        while self.tools.board.get(&key).is_some() {
            watch.recv().await.unwrap();
        }
    }

    /// Waits for the volume to have a trouble.
    async fn in_trouble(&self, name: &str) -> VolumeStatus {
        self.until(name, |s| s.reason.is_some()).await
    }

    async fn until(&self, name: &str, is: impl Fn(&VolumeStatus) -> bool) -> VolumeStatus {
        let mut watch = self.tools.board.watch();
        let key = VolumeKey { vm: vm(), volume: name.parse().unwrap() };
        if let Some(status) = self.tools.board.get(&key).filter(&is) {
            return status;
        }
        loop {
            let status = watch.recv().await.unwrap();
            if status.key == key && is(&status) {
                return (*status).clone();
            }
        }
    }
}

/// A volume whose LUN is the number in its name.
fn volume(name: &str) -> VolumeSpec {
    let mut spec = volume_fixture(name);
    let crate::spec::Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
    let number: u64 = name.bytes().map(u64::from).sum();
    source.lun = number.try_into().unwrap();
    spec
}

fn name(name: &str) -> VolumeName {
    name.parse().unwrap()
}

fn failed(reason: Reason) -> Result<Came, AttachFailure> {
    Err(AttachFailure { failure: Failure::new(reason, "as told"), left: Left::Nothing })
}

fn plain() -> AddOptions {
    AddOptions::default()
}

#[tokio::test(start_paused = true)]
async fn an_add_is_durable_before_it_is_answered_and_a_remove_forgets_it() {
    let world = World::new().await;
    let handler = world.handler().await;
    let added = handler.add(volume("v"), plain()).await.unwrap();
    assert!(added.changed());
    assert_eq!(world.tools.desired.volumes(&vm()).await.unwrap().len(), 1);
    world.reaches("v", Phase::Ready).await;
    assert!(!handler.add(volume("v"), plain()).await.unwrap().changed(), "the same again");
    handler.remove(name("v"), RemoveOptions::default()).await.unwrap();
    world.gone("v").await;
    assert!(world.tools.desired.volumes(&vm()).await.unwrap().is_empty());
    assert!(world.tools.effects.volumes(&vm()).await.unwrap().is_empty());
    let again = handler.remove(name("v"), RemoveOptions::default()).await.unwrap_err();
    assert_eq!(again.reason, Reason::VolumeNotFound);
    assert_eq!(world.script.log(), ["attach v", "detach v"]);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_changes_nothing() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("v"), AddOptions { dry_run: true, ..plain() }).await.unwrap();
    assert!(world.tools.desired.volumes(&vm()).await.unwrap().is_empty());
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    let dry = RemoveOptions { dry_run: true, force: false };
    let status = handler.remove(name("v"), dry).await.unwrap().into_inner();
    assert_eq!(status.phase, Phase::Ready);
    assert_eq!(world.script.log(), ["attach v"]);
}

#[tokio::test(start_paused = true)]
async fn transient_trouble_is_tried_again_with_growing_waits() {
    let world = World::new().await;
    for _ in 0..3 {
        world.script.attaches.lock().unwrap().push_back(failed(Reason::PortalUnreachable));
    }
    let handler = world.handler().await;
    let mut watch = world.tools.board.watch();
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    let mut told = 0;
    while let Ok(status) = watch.try_recv() {
        if status.reason == Some(Reason::PortalUnreachable) {
            assert_eq!(status.phase, Phase::Pending);
            assert!(status.retry_at.is_some());
            told += 1;
        }
    }
    assert_eq!(told, 3);
    assert_eq!(world.script.log().len(), 4);
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn a_failure_for_good_ends_the_add_and_the_next_add_starts_anew() {
    let world = World::new().await;
    world.script.attaches.lock().unwrap().push_back(failed(Reason::IdentityChanged));
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    let status = world.reaches("v", Phase::Failed).await;
    assert_eq!(status.reason, Some(Reason::IdentityChanged));
    assert_eq!(status.retry_at, None);
    assert!(
        world.tools.desired.volumes(&vm()).await.unwrap().is_empty(),
        "it is not wanted any more"
    );
    assert_eq!(handler.count().await.unwrap(), 0);
    let accept = AddOptions { accept_new_identity: true, ..plain() };
    assert!(handler.add(volume("v"), accept).await.unwrap().changed());
    world.reaches("v", Phase::Ready).await;
    assert_eq!(world.script.log(), ["attach v", "attach v accept"]);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_the_guest_has_stays_ready_with_its_trouble() {
    let world = World::new().await;
    let kept =
        AttachFailure { failure: Failure::new(Reason::PathsDisagree, "as told"), left: Left::Disk };
    world.script.attaches.lock().unwrap().push_back(Err(kept));
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    let status = world.reaches("v", Phase::Ready).await;
    assert_eq!(status.reason, Some(Reason::PathsDisagree));
    assert_eq!(world.tools.desired.volumes(&vm()).await.unwrap().len(), 1);
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn what_was_wanted_at_the_start_is_not_given_up() {
    let world = World::new().await;
    let stored =
        StoredVolume { spec: volume("v").into(), accept_new_identity: false, removing: None };
    world.tools.desired.put_volume(&vm(), &stored).await.unwrap();
    let fails = failed(Reason::VmNotRunning);
    world.script.attaches.lock().unwrap().push_back(fails);
    let handler = world.handler().await;
    let status = world.in_trouble("v").await;
    assert_eq!((status.phase, status.reason), (Phase::Pending, Some(Reason::VmNotRunning)));
    world.reaches("v", Phase::Ready).await;
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_undone_is_not_given_up() {
    let world = World::new().await;
    let failure = Failure::new(Reason::DeviceHeld, "as told");
    let held = AttachFailure { failure, left: Left::Unknown };
    let ends = failed(Reason::LunNotFound);
    world.script.attaches.lock().unwrap().extend([Err(held), ends]);
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    let status = world.in_trouble("v").await;
    assert_eq!((status.phase, status.reason), (Phase::Pending, Some(Reason::DeviceHeld)));
    world.reaches("v", Phase::Failed).await;
    assert!(world.tools.desired.volumes(&vm()).await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_remove_during_an_add_calls_it_off_and_undoes_it() {
    let world = World::new().await;
    world.script.hung.lock().unwrap().insert("v".into());
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    let status = handler.remove(name("v"), RemoveOptions::default()).await.unwrap().into_inner();
    assert_eq!(status.phase, Phase::Detaching);
    world.gone("v").await;
    assert_eq!(world.script.log(), ["attach v", "detach v"]);
}

#[tokio::test(start_paused = true)]
async fn a_hung_volume_holds_up_no_other() {
    let world = World::new().await;
    world.script.hung.lock().unwrap().insert("hung".into());
    let handler = world.handler().await;
    handler.add(volume("hung"), plain()).await.unwrap();
    handler.add(volume("fine"), plain()).await.unwrap();
    world.reaches("fine", Phase::Ready).await;
    handler.remove(name("fine"), RemoveOptions::default()).await.unwrap();
    world.gone("fine").await;
    assert_eq!(handler.count().await.unwrap(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refused_remove_changes_nothing_and_force_is_explicit() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    let refusal = Refusal::new(Reason::InUseByGuest, "mounted at /mnt");
    *world.script.refuse_remove.lock().unwrap() = Some(refusal.clone());
    let refused = handler.remove(name("v"), RemoveOptions::default()).await.unwrap_err();
    assert_eq!(refused, refusal);
    assert_eq!(world.tools.desired.volumes(&vm()).await.unwrap().len(), 1);
    handler.remove(name("v"), RemoveOptions { force: true, dry_run: false }).await.unwrap();
    world.gone("v").await;
    assert_eq!(world.script.log(), ["attach v", "detach v force"]);
}

#[tokio::test(start_paused = true)]
async fn a_removal_is_carried_through_whatever_the_trouble() {
    let world = World::new().await;
    let held = Failure::new(Reason::DeviceHeld, "qemu[7] has it open");
    world.script.detaches.lock().unwrap().extend([Err(held.clone()), Err(held)]);
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    let mut watch = world.tools.board.watch();
    handler.remove(name("v"), RemoveOptions::default()).await.unwrap();
    world.gone("v").await;
    let mut reasons = BTreeSet::new();
    while let Ok(status) = watch.try_recv() {
        reasons.extend(status.reason.map(Reason::code));
    }
    assert_eq!(reasons, BTreeSet::from(["DEVICE_HELD"]));
    assert_eq!(world.script.log().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_successor_takes_up_what_was_wanted_begun_and_being_removed() {
    let world = World::new().await;
    let stored = |n: &str| StoredVolume {
        spec: volume(n).into(),
        accept_new_identity: false,
        removing: None,
    };
    let key = |n: &str| VolumeKey { vm: vm(), volume: name(n) };
    let begun = |n: &str| -> Effects { world.tools.effects.begin("pod", &volume(n)) };
    for wanted in ["wanted", "leaving"] {
        world.tools.desired.put_volume(&vm(), &stored(wanted)).await.unwrap();
    }
    // The state disk was full when the removal came: only its mark is there.
    world
        .tools
        .effects
        .put_removal(&key("leaving"), RemoveOptions { force: true, dry_run: false }, &[])
        .await
        .unwrap();
    // Forgotten durably, but killed before it was undone.
    world.tools.effects.put(&key("orphan"), &begun("orphan")).await.unwrap();
    // Nothing but a mark: all was undone before the kill.
    world.tools.effects.put_removal(&key("done"), RemoveOptions::default(), &[]).await.unwrap();

    let handler = world.handler().await;
    world.reaches("wanted", Phase::Ready).await;
    while handler.count().await.unwrap() > 1 {
        tokio::task::yield_now().await;
    }
    let mut log = world.script.log();
    log.sort();
    assert_eq!(log, ["attach wanted", "detach leaving force", "detach orphan"]);
    assert!(world.tools.effects.volumes(&vm()).await.unwrap().is_empty());
    assert_eq!(world.tools.desired.volumes(&vm()).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn effects_of_another_boot_are_void() {
    let world = World::new().await;
    let key = VolumeKey { vm: vm(), volume: name("old") };
    let effects = world.tools.effects.begin("pod", &volume("old"));
    let bytes = serde_json::to_string(&effects).unwrap();
    let boot = serde_json::to_value(&effects).unwrap()["boot_id"].as_str().unwrap().to_owned();
    let old = bytes.replace(&boot, "another-boot");
    assert_ne!(old, bytes);
    world.sim.rundir().store("effects/prod/a/old.json", old.as_bytes()).await.unwrap();
    assert_eq!(world.tools.effects.get(&key).await.unwrap(), None);
    assert!(world.tools.effects.volumes(&vm()).await.unwrap().is_empty(), "and removed");
}

#[tokio::test(start_paused = true)]
async fn an_intent_that_cannot_be_written_is_refused_before_anything_is_done() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    world.sim.faults().inject(Fault {
        point: "rundir.store".into(),
        detail: "removals".into(),
        skip: 0,
        times: Some(1),
        action: FaultAction::Fail("no space left".into()),
    });
    let refused = handler.remove(name("v"), RemoveOptions::default()).await.unwrap_err();
    assert_eq!(refused.reason, Reason::StateStoreFailed);
    assert_eq!(world.script.log(), ["attach v"], "nothing was begun");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_step_is_that_volumes_alone() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("panics"), plain()).await.unwrap();
    let status = world.in_trouble("panics").await;
    assert_eq!((status.phase, status.reason), (Phase::Pending, Some(Reason::Internal)));
    handler.add(volume("fine"), plain()).await.unwrap();
    world.reaches("fine", Phase::Ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_detaches_nothing() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    world.script.hung.lock().unwrap().insert("slow".into());
    handler.add(volume("slow"), plain()).await.unwrap();
    handler.stop(Duration::from_secs(5)).await;
    let after = handler.add(volume("late"), plain()).await.unwrap_err();
    assert_eq!(after.reason, Reason::ShuttingDown);
    assert_eq!(world.script.log(), ["attach v", "attach slow"]);
    assert_eq!(world.tools.desired.volumes(&vm()).await.unwrap().len(), 2);
}

mod batches;
mod expands;
mod looks;
