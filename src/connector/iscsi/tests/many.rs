//! What a volume costs on a node that has many.

use super::*;

/// The calls on the host that a detach takes beside so many other maps.
async fn calls_beside(others: u32) -> usize {
    let san = San::new();
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
async fn a_map_is_looked_for_among_the_others_once_in_a_detach() {
    const MORE: u32 = 20;
    let (few, many) = (calls_beside(1).await, calls_beside(1 + MORE).await);
    // Once each is asked whether multipathd has made the map anew meanwhile.
    assert_eq!(many - few, MORE as usize);
}
