use super::*;
use crate::connector::Touched;

const INTERVAL: Duration = Duration::from_secs(60);

fn away() -> Failure {
    Failure::new(Reason::VmNotRunning, "it was stopped")
}

fn one(sight: Sight) -> Result<BTreeMap<VolumeName, Sight>, Failure> {
    Ok(BTreeMap::from([(name("v"), sight)]))
}

impl World {
    /// A handler whose volume `v` is ready and was looked at.
    async fn steady(&self) -> Handler {
        let handler = self.handler().await;
        handler.add(volume("v"), plain()).await.unwrap();
        self.reaches("v", Phase::Ready).await;
        self.script.looked.notified().await;
        handler
    }

    async fn stir(&self, stir: Stir) {
        let stirs = self.script.stirs.lock().unwrap().clone().unwrap();
        stirs.send(stir).await.unwrap();
    }

    fn looks(&self) -> usize {
        self.script.log().iter().filter(|l| l.starts_with("look")).count()
    }

    fn next_look(&self, found: Result<BTreeMap<VolumeName, Sight>, Failure>) {
        self.script.looks.lock().unwrap().push_back(found);
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_goes_and_comes_back() {
    let world = World::new().await;
    let handler = world.steady().await;
    let gone = AttachFailure { failure: away(), left: Left::Nothing };
    world.script.attaches.lock().unwrap().push_back(Err(gone));
    world.next_look(Err(away()));
    world.stir(Stir::Vm).await;
    world.reaches("v", Phase::Pending).await;
    world.stir(Stir::Vm).await;
    world.reaches("v", Phase::Ready).await;
    let log = world.script.log();
    assert_eq!(log[..5], ["attach v", "look 1", "look 1", "attach v", "attach v"], "{log:?}");
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn what_differs_is_repaired_and_shown_all_the_time_as_ready() {
    let world = World::new().await;
    let handler = world.steady().await;
    let mut watch = world.tools.board.watch();
    world.next_look(one(Sight::Differs("its node is gone".into())));
    tokio::time::sleep(INTERVAL * 2).await;
    let log = world.script.log();
    assert_eq!(log[..4], ["attach v", "look 1", "look 1", "attach v"], "{log:?}");
    assert!(watch.try_recv().is_err(), "watchers see nothing of it");
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn a_storm_of_events_is_a_look_or_two() {
    let world = World::new().await;
    let handler = world.steady().await;
    let before = world.looks();
    for _ in 0..1000 {
        world.stir(Stir::Storage(Arc::new(Touched::any()))).await;
        world.stir(Stir::Disks).await;
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(world.looks() - before <= 2, "{}", world.looks());
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn events_about_others_are_not_looked_at_and_the_timer_is_slow() {
    let world = World::new().await;
    let handler = world.steady().await;
    let before = world.looks();
    world.stir(Stir::Storage(Arc::new(Touched::default()))).await;
    tokio::time::sleep(INTERVAL / 2).await;
    assert_eq!(world.looks(), before);
    tokio::time::sleep(INTERVAL * 10).await;
    let looks = world.looks() - before;
    assert!((9..=14).contains(&looks), "{looks}");
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn paths_that_fail_are_told_and_so_is_that_they_are_back() {
    let world = World::new().await;
    let handler = world.steady().await;
    for (living, reason) in
        [(1, Some(Reason::PathsDegraded)), (0, Some(Reason::NoPaths)), (2, None)]
    {
        world.next_look(one(right(living)));
        let mut watch = world.tools.board.watch();
        world.stir(Stir::Disks).await;
        let status = watch.recv().await.unwrap();
        assert_eq!((status.phase, status.reason), (Phase::Ready, reason));
        assert_eq!(status.message.is_empty(), reason.is_none(), "{}", status.message);
    }
    assert_eq!(world.script.log().iter().filter(|l| *l == "attach v").count(), 1);
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn missing_paths_are_looked_for_ever_more_rarely() {
    let world = World::new().await;
    let handler = world.steady().await;
    let Sight::Right { attachment, paths, target } = right(1) else { unreachable!() };
    let missing = Sight::Right { attachment, paths: Paths { present: 1, ..paths }, target };
    for _ in 0..100 {
        world.next_look(one(missing.clone()));
    }
    tokio::time::sleep(INTERVAL * 14).await;
    // At once, after one, two, four and four intervals, counted in looks.
    let tries = world.script.log().iter().filter(|l| *l == "attach v").count() - 1;
    assert!((4..=6).contains(&tries), "{tries}");
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn a_libvirt_that_is_down_is_told_and_asked_ever_more_rarely() {
    let world = World::new().await;
    let handler = world.steady().await;
    let down = Failure::new(Reason::LibvirtUnreachable, "connection refused");
    for _ in 0..6 {
        world.next_look(Err(down.clone()));
    }
    let before = world.looks();
    world.stir(Stir::Vm).await;
    let status = world.until("v", |s| s.reason == Some(Reason::LibvirtUnreachable)).await;
    assert_eq!(status.phase, Phase::Ready);
    assert!(status.retry_at.is_some());
    let status = world.until("v", |s| s.reason.is_none()).await;
    assert_eq!((status.phase, status.retry_at), (Phase::Ready, None));
    assert_eq!(world.looks() - before, 7);
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn what_was_there_at_the_start_is_looked_at_and_only_the_rest_is_walked() {
    let world = World::new().await;
    for name in ["v", "w"] {
        let spec = volume(name).into();
        let stored = StoredVolume { spec, accept_new_identity: false, removing: None };
        world.tools.desired.put_volume(&vm(), &stored).await.unwrap();
    }
    let found = BTreeMap::from([
        (name("v"), right(2)),
        (name("w"), Sight::Differs("its node is gone".into())),
    ]);
    world.script.first_looks.lock().unwrap().push_back(Ok(found));
    let handler = world.handler().await;
    let status = world.reaches("v", Phase::Ready).await;
    assert_eq!((status.reason, status.target.as_deref()), (None, Some("sda")), "{status:?}");
    world.reaches("w", Phase::Ready).await;
    assert_eq!(world.script.log()[0], "attach w");
    assert!(!world.script.log().contains(&"attach v".into()), "{:?}", world.script.log());
    drop(handler);
}

#[tokio::test(start_paused = true)]
async fn where_nothing_can_be_seen_at_the_start_all_is_walked() {
    let world = World::new().await;
    let spec = volume("v").into();
    let stored = StoredVolume { spec, accept_new_identity: false, removing: None };
    world.tools.desired.put_volume(&vm(), &stored).await.unwrap();
    let unseen = Failure::new(Reason::LibvirtUnreachable, "as told");
    world.script.first_looks.lock().unwrap().push_back(Err(unseen));
    let handler = world.handler().await;
    world.reaches("v", Phase::Ready).await;
    assert_eq!(world.script.log()[0], "attach v");
    drop(handler);
}
