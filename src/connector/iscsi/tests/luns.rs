//! Which LUN is meant.

use super::*;

#[tokio::test(start_paused = true)]
async fn lun_1_is_not_lun_10() {
    let san = San::new();
    let ten = san.attach(&request("ten", 10, &[2])).await;
    let one = san.attach(&request("one", 1, &[2])).await;
    assert_eq!((one.device.wwid, ten.device.wwid.clone()), (wwid(1), wwid(10)));
    san.detach("one", 1, &[2]).await.expect("detached");
    let still = san.connector.observe(&owner("ten"), &source(10, &[2])).await.expect("read");
    assert_eq!(still.expect("there").device.wwid, wwid(10));
}

#[tokio::test(start_paused = true)]
async fn a_lun_is_addressed_as_was_asked_for() {
    let san = San::new();
    let others = [("flat:1", 91), ("plain:300", 92), ("300", 93)];
    for (text, n) in others {
        let lun = text.parse().expect("a LUN");
        san.sim.add_lun(&target(), lun, SimLun::new(wwid(n), GIB));
    }
    let before = san.sim.snapshot();
    san.attach(&request("one", 1, &[2])).await;
    let mut sources = Vec::new();
    for (text, n) in others {
        let mut request = request(&format!("v{n}"), 1, &[2]);
        let Source::Iscsi(source) = &mut request.source else { panic!("of iSCSI") };
        source.lun = text.parse().expect("a LUN");
        let at = format!(":{}", source.lun.scsi());
        let got = san.attach(&request).await;
        assert_eq!(got.device.wwid, wwid(n), "{text}");
        assert!(got.paths[0].hctl.ends_with(&at), "{text}: {}", got.paths[0].hctl);
        sources.push((request.owner, request.source));
    }
    for (owner, source) in sources {
        let gone = san.connector.detach(&owner, &source, DetachOptions::default()).await;
        gone.expect("detached");
    }
    san.detach("one", 1, &[2]).await.expect("detached");
    assert_eq!(san.sim.snapshot(), before);
}
