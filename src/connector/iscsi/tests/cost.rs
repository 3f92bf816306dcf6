//! How many programs an attach and a detach start: on a node each costs some milliseconds and open-iscsi's
//! lock, so they are counted.

use super::*;

/// As many portals as a source may have at the most.
const MANY: u8 = 16;

fn san(portals: u8) -> (San, Vec<u8>) {
    let ns: Vec<u8> = (2..2 + portals).collect();
    let sim = SimStorage::new(Arc::new(Faults::default()));
    sim.add_target(&target(), &ns.iter().map(|n| portal(*n)).collect::<Vec<_>>());
    for n in 1..=2 {
        sim.add_lun(&target(), lun(n), SimLun::new(wwid(u32::try_from(n).expect("small")), GIB));
    }
    let connector = Arc::new(Luns::new(StorageDoors::sim(&sim), Settings::default()));
    (San { sim, connector }, ns)
}

impl San {
    /// How many programs were started since this was last asked.
    fn programs(&self, since: &mut u64) -> u64 {
        let started = self.connector.doors.commands.started();
        started - std::mem::replace(since, started)
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_target_costs_two_more_than_its_portals_and_a_known_one_nothing() {
    for count in 1..=MANY {
        let (san, portals) = san(count);
        let before = san.sim.snapshot();
        let mut since = 0;
        san.attach(&request("a", 1, &portals)).await;
        assert!(san.programs(&mut since) <= u64::from(count) + 2, "{count} portals");
        assert_eq!(san.count("session"), usize::from(count));

        san.attach(&request("b", 2, &portals)).await;
        assert_eq!(san.programs(&mut since), 0, "{count} portals: the sessions are there");
        san.detach("b", 2, &portals).await.expect("detached");
        assert_eq!(san.programs(&mut since), 0, "{count} portals: another needs the sessions");

        san.detach("a", 1, &portals).await.expect("detached");
        assert!(san.programs(&mut since) <= 2, "{count} portals: the last LUN");
        assert_eq!(san.sim.snapshot(), before);
    }
}

#[tokio::test(start_paused = true)]
async fn records_of_others_cost_three_programs_a_portal() {
    for count in 1..=MANY {
        let (san, portals) = san(count);
        // Of another target's interface: an update or a logout by the target's name would touch it.
        san.sim.add_record(&target(), portal(2), "other");
        let before = san.sim.snapshot();
        let mut since = 0;
        san.attach(&request("a", 1, &portals)).await;
        assert!(san.programs(&mut since) <= 3 * u64::from(count), "{count} portals");
        san.attach(&request("b", 2, &portals)).await;
        san.detach("b", 2, &portals).await.expect("detached");
        assert_eq!(san.programs(&mut since), 0, "{count} portals: the sessions are there");
        san.detach("a", 1, &portals).await.expect("detached");
        assert!(san.programs(&mut since) <= 2 * u64::from(count), "{count} portals: the last LUN");
        assert_eq!(san.sim.snapshot(), before);
    }
}
