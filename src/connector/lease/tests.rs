use std::sync::Arc;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::connector::error::Error;
use crate::host::sim::{Fault, FaultAction, Faults, SimStorage};
use crate::host::storage::StorageDoors;

proptest! {
    #[test]
    fn file_names_are_safe_and_do_not_clash(a in "[ -~]{1,90}", b in "[ -~]{1,90}") {
        let ok = |s: &str| s.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c));
        let (x, y) = (file_name(&a), file_name(&b));
        prop_assert!(ok(&x) && x.len() <= 255 && !x.starts_with('.'));
        prop_assert_eq!(a == b, x == y);
    }
}

#[test]
fn a_colon_is_written_out() {
    assert_eq!(file_name("iqn.2026-01.a:b"), "iqn.2026-01.a_3ab");
}

const TARGET: &str = "iqn.2026-01.a:b";
const FILE: &str = "leases/test/iqn.2026-01.a_3ab";

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Count(u32);

impl Made for Count {
    const TRANSPORT: &'static str = "test";
}

fn owner(volume: &str) -> VolumeKey {
    VolumeKey { vm: "ns/vm".parse().expect("vm"), volume: volume.parse().expect("volume") }
}

fn lun(number: u64) -> Lun {
    number.try_into().expect("lun")
}

fn user(volume: &str, number: u64, made: bool) -> User {
    User {
        owner: owner(volume),
        lun: lun(number),
        shareable: true,
        routes: vec!["10.0.0.1:3260".into()],
        wwid: None,
        paths: vec![PathLease {
            hctl: format!("3:0:0:{number}").parse().expect("hctl"),
            dir: "d".into(),
            made,
            seen: None,
        }],
        map: Some(MapLease { uuid: "mpath-3x".into(), made }),
        attachment: None,
        first: None,
        step: None,
    }
}

/// Leases on a simulated node.
struct Node {
    sim: SimStorage,
    leases: Leases,
}

impl Node {
    fn new() -> Self {
        let sim = SimStorage::new(Arc::new(Faults::default()));
        let leases = Leases::new(StorageDoors::sim(&sim), std::time::Duration::from_secs(1));
        Self { sim, leases }
    }

    async fn enter(&self, user: User) {
        let enter = self.leases.enter::<Count>(TARGET, user, |known, intent| *known = intent);
        enter.await.expect("entered");
    }

    async fn user(&self, volume: &str, number: u64) -> Option<User> {
        self.leases.user::<Count>(TARGET, &owner(volume), lun(number)).await.expect("read")
    }

    async fn remove(&self, volume: &str, number: u64) -> Result<(), Error> {
        self.leases.remove::<Count>(TARGET, &owner(volume), lun(number)).await
    }

    async fn damage(&self, name: &str) {
        self.sim.rundir().store(name, b"{").await.expect("stored");
    }

    /// The files below `leases/`.
    fn files(&self) -> Vec<String> {
        let snapshot = self.sim.snapshot();
        let name =
            |l: &str| Some(l.strip_prefix("run leases/")?.split_whitespace().next()?.to_owned());
        snapshot.lines().filter_map(name).collect()
    }

    /// Writes a lease as a lunplugd of before did, with all users in the target's file.
    async fn write_old(&self, users: &[User], made: &Count) {
        let rundir = self.sim.rundir();
        let old = serde_json::json!({
            "boot_id": rundir.boot_id(), "target": TARGET, "users": users, "made": made,
        });
        let bytes = serde_json::to_vec(&old).expect("written");
        rundir.store(FILE, &bytes).await.expect("stored");
    }

    /// The next call but `skip` at a point hangs for ever; `false` where `work` ended without one.
    async fn cut_short(
        &self,
        point: &str,
        skip: u32,
        work: impl Future<Output = Result<(), Error>>,
    ) -> bool {
        let fault = Fault {
            point: point.into(),
            detail: "leases/".into(),
            skip,
            times: Some(1),
            action: FaultAction::Hang,
        };
        self.sim.faults().inject(fault);
        let met = tokio::select! {
            biased;
            () = self.sim.faults().meeting() => true,
            done = work => {
                done.expect("done");
                false
            }
        };
        self.sim.faults().clear();
        met
    }
}

#[tokio::test(start_paused = true)]
async fn a_user_is_a_file_of_its_own_and_the_last_one_closes_the_door() {
    let node = Node::new();
    node.enter(user("a", 1, true)).await;
    node.enter(user("b", 2, true)).await;
    let users = "test/iqn.2026-01.a_3ab:users";
    let (a, b) = (format!("{users}/1:ns_2fvm_2fa"), format!("{users}/2:ns_2fvm_2fb"));
    assert_eq!(node.files(), ["test/iqn.2026-01.a_3ab", &a, &b]);
    let made = |made: &mut Count| made.0 = 7;
    node.leases.update_made(TARGET, made).await.expect("noted");
    node.damage(&format!("leases/{b}")).await;
    let step = |user: &mut User| user.step = Some(Step::Scan);
    let changed = node.leases.change::<Count, _>(TARGET, &owner("a"), lun(1), step).await;
    assert_eq!(changed.expect("another's damage is none of its trouble"), Some(()));
    assert_eq!(node.user("a", 1).await.expect("there").step, Some(Step::Scan));
    assert_eq!(node.user("a", 2).await, None);
    node.remove("a", 1).await.expect("removed");
    let unread = node.leases.user::<Count>(TARGET, &owner("b"), lun(2)).await;
    assert!(matches!(unread, Err(Error::LeaseCorrupt { name, .. }) if name.ends_with(&b)));
    let unwanted = node.leases.unwanted::<Count, _>(TARGET, vec!["10.0.0.9:3260"]).await;
    assert!(unwanted.expect("read").is_empty(), "who cannot be read may want it");
    node.sim.rundir().remove(&format!("leases/{b}")).await.expect("removed");
    node.leases.update_made(TARGET, |made: &mut Count| made.0 = 0).await.expect("noted");
    assert_eq!(node.files(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_way_is_wanted_while_one_user_wants_it() {
    let node = Node::new();
    let ways = || vec!["10.0.0.1:3260", "10.0.0.2:3260"];
    let unwanted = async || node.leases.unwanted::<Count, _>(TARGET, ways()).await.expect("read");
    assert_eq!(unwanted().await, ways());
    for number in 1..4 {
        node.enter(user(&format!("v{number}"), number, true)).await;
    }
    assert_eq!(unwanted().await, ["10.0.0.2:3260"]);
    node.enter(User { routes: ways().into_iter().map(Into::into).collect(), ..user("w", 9, true) })
        .await;
    assert_eq!(unwanted().await, [""; 0]);
    node.remove("w", 9).await.expect("removed");
    node.sim.reboot();
    let after =
        Node { leases: Leases::new(StorageDoors::sim(&node.sim), node.leases.lock), ..node };
    assert_eq!(after.leases.unwanted::<Count, _>(TARGET, ways()).await.expect("read"), ways());
}

#[tokio::test(start_paused = true)]
async fn luns_and_owners_are_told_apart_by_their_whole_names() {
    let node = Node::new();
    for (volume, number) in [("a", 1), ("a", 10), ("aa", 1), ("b", 10), ("b", 16)] {
        node.enter(user(volume, number, true)).await;
    }
    let names = |users: Vec<User>| -> Vec<String> {
        users.iter().map(|u| format!("{} {}", u.owner.volume, u.lun)).collect()
    };
    let of = node.leases.users_of::<Count>(TARGET, &owner("a")).await.expect("read");
    assert_eq!(names(of), ["a 10", "a 1"]);
    let with = node.leases.users_with::<Count>(TARGET, lun(1)).await.expect("read");
    assert_eq!(names(with), ["a 1", "aa 1"]);
    let others =
        node.leases.others_filed::<Count>(TARGET, &owner("a"), lun(1)).await.expect("read");
    assert_eq!(names(others), ["aa 1"]);
    let mut all = node.leases.owners::<Count>().await.expect("read");
    all.dedup();
    assert_eq!(all.len(), 4, "{all:?}");
}

#[tokio::test(start_paused = true)]
async fn the_last_user_of_a_lun_removes_what_the_first_made_wherever_it_was_cut_short() {
    for skip in 0.. {
        let node = Node::new();
        node.enter(user("a", 1, true)).await;
        node.enter(user("b", 1, false)).await;
        let met = node.cut_short("", skip, node.remove("a", 1)).await;
        node.remove("a", 1).await.expect("removed");
        assert_eq!(node.user("a", 1).await, None);
        let heir = node.user("b", 1).await.expect("there");
        assert!(heir.paths[0].made && heir.map.is_some_and(|m| m.made), "{skip}");
        node.remove("b", 1).await.expect("removed");
        assert_eq!(node.files(), [""; 0], "{skip}");
        if !met {
            return assert!(skip > 5);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_of_before_is_read_and_brought_to_the_form_of_now_wherever_that_was_cut_short() {
    for skip in 0.. {
        let node = Node::new();
        // Left by one that was cut short, before a lunplugd of before removed that volume.
        node.enter(user("gone", 3, true)).await;
        let old = [user("a", 1, true), user("b", 1, false), user("c", 2, true)];
        node.write_old(&old, &Count(7)).await;
        let before = async || {
            assert_eq!(node.user("gone", 3).await, None);
            for known in &old {
                let read = node.user(known.owner.volume.as_str(), known.lun.get().into()).await;
                assert_eq!(read.as_ref(), Some(known), "{skip}");
            }
            let made = node.leases.made::<Count>(TARGET).await.expect("read");
            assert_eq!(made, Count(7));
            assert_eq!(node.leases.owners::<Count>().await.expect("read").len(), 3);
            let with = node.leases.users_with::<Count>(TARGET, lun(1)).await.expect("read");
            assert_eq!(with, old[..2]);
            let ways = node.leases.unwanted::<Count, _>(TARGET, vec!["10.0.0.1:3260", "x"]).await;
            assert_eq!(ways.expect("read"), ["x"]);
        };
        before().await;
        let nothing = async || {
            let gone = owner("gone");
            let changed = node.leases.change::<Count, ()>(TARGET, &gone, lun(3), |_| ()).await?;
            assert_eq!(changed, None);
            Ok(())
        };
        let met = node.cut_short("", skip, nothing()).await;
        before().await;
        nothing().await.expect("brought to the form of now");
        before().await;
        assert_eq!(node.files().len(), 4);
        let text = node.sim.rundir().load(FILE).await.expect("read").expect("there");
        let of_before: Result<Before, _> = serde_json::from_slice(&text);
        assert!(of_before.is_err(), "a lunplugd of before leaves it alone");
        for (volume, number) in [("a", 1), ("b", 1), ("c", 2)] {
            node.remove(volume, number).await.expect("removed");
        }
        node.leases.update_made(TARGET, |made: &mut Count| made.0 = 0).await.expect("noted");
        assert_eq!(node.files(), [""; 0]);
        if !met {
            return assert!(skip > 7);
        }
    }
}

/// A lease as lunplugds of before read it.
#[derive(Deserialize)]
#[allow(dead_code)]
struct Before {
    boot_id: String,
    target: String,
    users: Vec<User>,
    made: Count,
}
