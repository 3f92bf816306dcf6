use super::*;

/// A volume in trouble is due to be tried again while it is being expanded: that is not lost.
#[tokio::test(start_paused = true)]
async fn what_comes_due_during_an_expand_is_done_after_it() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("v"), plain()).await.unwrap();
    world.reaches("v", Phase::Ready).await;
    let kept = Failure::new(Reason::NodeRefused, "as told");
    let kept = Err(AttachFailure { failure: kept, left: Left::Disk });
    world.script.attaches.lock().unwrap().push_back(kept);
    let differs = BTreeMap::from([(name("v"), Sight::Differs("its node is gone".into()))]);
    world.script.looks.lock().unwrap().push_back(Ok(differs));
    world.in_trouble("v").await;

    let goes_on = Arc::new(Notify::new());
    *world.script.expand_hangs.lock().unwrap() = Some(goes_on.clone());
    let end = async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(world.script.log().last().unwrap(), "expand v Some(1024)");
        goes_on.notify_one();
    };
    let (expanded, ()) = tokio::join!(handler.expand(name("v"), Some(1024)), end);
    assert!(expanded.unwrap().changed());
    let healed = |s: &VolumeStatus| s.phase == Phase::Ready;
    world.until("v", healed).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let log = world.script.log();
    assert_eq!(log[2..5], ["attach v", "expand v Some(1024)", "attach v"], "{log:?}");
}

#[tokio::test(start_paused = true)]
async fn an_expand_waits_for_an_attach_that_is_walked_again_and_not_for_the_first() {
    let world = World::new().await;
    let handler = world.handler().await;
    world.script.hung.lock().unwrap().insert("v".into());
    handler.add(volume("v"), plain()).await.unwrap();
    let refusal = handler.expand(name("v"), None).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::VolumeNotReady);
    let key = VolumeKey { vm: vm(), volume: name("v") };
    // As one that was ready when the daemon began to look at it anew.
    world.tools.board.phase(&key, Phase::Ready);
    let waits = tokio::time::timeout(Duration::from_secs(9), handler.expand(name("v"), None));
    assert!(waits.await.is_err(), "it waits for its turn");
    handler.remove(name("v"), RemoveOptions::default()).await.unwrap();
    world.gone("v").await;
    assert_eq!(world.script.log(), ["attach v", "detach v"], "and is never begun");
}
