//! What a volume costs on a node that has many.

use super::*;

/// The calls on the host that a detach takes beside so many other maps.
async fn calls_beside(san: &San, others: u32) -> usize {
    for n in 1..=others + 1 {
        san.sim.add_lun(&target(), lun(u64::from(n) + 100), SimLun::new(wwid(n + 100), GIB));
        san.attach(&request(&format!("v{n}"), u64::from(n) + 100, &[2, 3])).await;
    }
    let before = san.sim.faults().calls();
    // The last: whoever looks for its map meets all others first.
    let last = others + 1;
    san.detach(&format!("v{last}"), u64::from(last) + 100, &[2, 3]).await.unwrap();
    san.sim.faults().calls() - before
}

#[tokio::test(start_paused = true)]
async fn a_detach_costs_the_same_however_many_maps_there_are() {
    let (few, many) = (calls_beside(&San::new(), 1).await, calls_beside(&San::new(), 21).await);
    assert_eq!(few, many);
}

#[tokio::test(start_paused = true)]
async fn where_device_mapper_cannot_be_asked_each_map_is() {
    let cannot = || {
        let san = San::new();
        let refused = FaultAction::Fail("no /dev/mapper/control".into());
        san.sim.faults().inject(fault("blocks.mapped", "", refused));
        san
    };
    let (few, many) = (calls_beside(&cannot(), 1).await, calls_beside(&cannot(), 21).await);
    assert_eq!(many - few, 20, "once each, whether multipathd has made the map anew meanwhile");
}
