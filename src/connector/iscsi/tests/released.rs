//! A detach that begins before the guest has let go.

use tokio::sync::watch;

use super::*;

#[tokio::test(start_paused = true)]
async fn nothing_is_changed_before_the_guest_has_let_go() {
    let san = San::new();
    let before = san.sim.snapshot();
    san.attach(&request("a", 1, &[2, 3])).await;
    let (owner, source) = (owner("a"), source(1, &[2, 3]));

    let attached = san.sim.snapshot();
    let (release, released) = watch::channel(false);
    let options = DetachOptions { released: Some(&released), ..DetachOptions::default() };
    let detach = san.connector.detach(&owner, &source, options);
    tokio::pin!(detach);
    // The clock is paused: it moves on once all that can be done without the guest is done.
    let early = tokio::time::timeout(ms(60_000), &mut detach).await;
    early.expect_err("the guest has it");
    assert_eq!(san.sim.snapshot(), attached);
    // Nor does anybody wait for it.
    let other = san.connector.attach(&request("b", 1, &[2, 3])).await.expect_err("it is taken");
    assert_eq!(other.reason(), Reason::SourceInUse, "{other}");
    assert_eq!(san.sim.snapshot(), attached);

    release.send_replace(true);
    assert_eq!(detach.await.expect("detached"), Outcome::Done(()));
    assert_eq!(san.sim.snapshot(), before);
}

#[tokio::test(start_paused = true)]
async fn it_ends_where_the_guest_will_not_let_go() {
    let san = San::new();
    san.attach(&request("a", 1, &[2, 3])).await;
    let attached = san.sim.snapshot();
    for volume in ["a", "b"] {
        let (release, released) = watch::channel(false);
        drop(release);
        let options = DetachOptions { released: Some(&released), ..DetachOptions::default() };
        let ended = san.connector.detach(&owner(volume), &source(1, &[2, 3]), options).await;
        assert!(matches!(ended, Err(Error::NotReleased)), "{volume}: {ended:?}");
        assert_eq!(san.sim.snapshot(), attached, "{volume}");
    }
}
