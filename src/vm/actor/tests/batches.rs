//! Many volumes in one request, and the whole set of a VM's volumes.

use super::*;
use crate::spec::Revision;
use crate::types::SecretText;
use crate::vm::facade::{Answer, Set, Synced, Wish};

fn add(name: &str) -> Wish {
    Wish::Add { spec: volume(name).into(), options: plain() }
}

fn remove(name: &str) -> Wish {
    Wish::Remove { name: name.parse().unwrap(), options: RemoveOptions::default() }
}

/// What became of each wish, in short.
fn told(answers: &[Answer]) -> Vec<&'static str> {
    let one = |answer: &Answer| match answer {
        Ok(outcome) if outcome.changed() => "done",
        Ok(_) => "already",
        Err(refusal) => refusal.reason.code(),
    };
    answers.iter().map(one).collect()
}

fn set(number: i64, names: &[&str]) -> Set {
    let revision = Revision { number, asked: names.join(",").into() };
    let volumes = names.iter().map(|name| (volume(name), plain())).collect();
    Set { revision, volumes, others: BTreeSet::new(), removals: RemoveOptions::default() }
}

/// What became of a set: its volumes, and what was there beside it.
fn synced(synced: &Synced) -> (Vec<&'static str>, Vec<(&str, &'static str)>) {
    let removed = synced.removed.iter();
    let removed =
        removed.map(|(name, answer)| (name.as_str(), told(std::slice::from_ref(answer))[0]));
    (told(&synced.volumes), removed.collect())
}

impl World {
    fn slow_check(&self, name: &str) -> Arc<Notify> {
        let goes_on = Arc::new(Notify::new());
        self.script.slow_checks.lock().unwrap().insert(name.into(), goes_on.clone());
        goes_on
    }

    async fn stored(&self) -> Vec<String> {
        let volumes = self.tools.desired.volumes(&vm()).await.unwrap();
        volumes.iter().map(|v| v.spec.name.to_string()).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn each_wish_has_its_own_answer_and_what_is_wanted_is_stored_in_its_order() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.add(volume("old"), plain()).await.unwrap();
    world.reaches("old", Phase::Ready).await;
    let mut twin = volume("twin");
    twin.serial = "new".parse().ok();
    let twin = Wish::Add { spec: twin.into(), options: plain() };
    let mut other = volume("old");
    other.read_only = true;
    let other = Wish::Add { spec: other.into(), options: plain() };
    let wishes = vec![add("new"), twin, add("check-panics"), other, remove("none"), add("a")];
    let answers = handler.change(wishes).await.unwrap();
    let expected =
        ["done", "SERIAL_IN_USE", "INTERNAL", "VOLUME_EXISTS", "VOLUME_NOT_FOUND", "done"];
    assert_eq!(told(&answers), expected);
    assert_eq!(world.stored().await, ["old", "new", "a"]);
    let answers = handler.change(vec![add("new"), remove("old"), remove("a")]).await.unwrap();
    assert_eq!(told(&answers), ["already", "done", "done"]);
    world.gone("old").await;
    world.gone("a").await;
    assert_eq!(world.stored().await, ["new"]);
}

#[tokio::test(start_paused = true)]
async fn many_volumes_count_against_the_limit_one_by_one() {
    let world = World::new().await;
    let handler = world.handler().await;
    let names: Vec<String> = (0..10).map(|n| format!("v{n}")).collect();
    for dry_run in [true, false] {
        let options = AddOptions { dry_run, ..plain() };
        let add = |name: &String| Wish::Add { spec: volume(name).into(), options: options.clone() };
        let answers = handler.change(names.iter().map(add).collect()).await.unwrap();
        assert_eq!(told(&answers)[8..], ["LIMIT_REACHED"; 2]);
        assert!(
            answers[..8].iter().all(|answer| answer.as_ref().is_ok_and(|a| a.changed() != dry_run))
        );
    }
    assert_eq!(world.stored().await.len(), 8);
}

#[tokio::test(start_paused = true)]
async fn a_removal_whose_check_takes_long_holds_up_no_other_wish() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.change(vec![add("slow"), add("fine")]).await.unwrap();
    let goes_on = world.slow_check("slow");
    let wishes = vec![remove("slow"), remove("fine"), add("new")];
    let all = async {
        let answers = handler.change(wishes).await.unwrap();
        assert_eq!(told(&answers), ["done"; 3]);
    };
    let others = async {
        world.gone("fine").await;
        world.reaches("new", Phase::Ready).await;
        assert_eq!(world.stored().await, ["slow", "new"]);
        goes_on.notify_one();
    };
    tokio::join!(all, others);
    world.gone("slow").await;
}

#[tokio::test(start_paused = true)]
async fn credentials_that_cannot_be_kept_fail_their_volume_alone() {
    let world = World::new().await;
    let handler = world.handler().await;
    let secret = SecretText::from("hush-hush-hush".to_owned());
    let chap = crate::types::Chap::new("u".into(), secret, String::new(), SecretText::default());
    let options = AddOptions { chap: Some(chap.unwrap()), ..plain() };
    let with = |name: &str| Wish::Add { spec: volume(name).into(), options: options.clone() };
    world.sim.faults().inject(Fault {
        point: "rundir.store".into(),
        detail: "secrets/prod/a/b".into(),
        skip: 0,
        times: Some(1),
        action: FaultAction::Fail("no space left".into()),
    });
    let answers = handler.change(vec![with("a"), with("b"), add("c")]).await.unwrap();
    assert_eq!(told(&answers), ["done", "STATE_STORE_FAILED", "done"]);
    assert_eq!(world.stored().await, ["a", "c"]);
    let kept = world.tools.effects.kept_chaps(&vm()).await.unwrap();
    assert_eq!(kept.iter().map(|key| key.volume.as_str()).collect::<Vec<_>>(), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn a_set_adds_what_is_missing_and_removes_the_rest() {
    let world = World::new().await;
    let handler = world.handler().await;
    let answers = handler.sync(set(1, &["a", "b"])).await.unwrap();
    assert_eq!(synced(&answers), (vec!["done"; 2], vec![]));
    assert_eq!(handler.revision().await.unwrap(), Some(1));
    let mut dry = set(2, &["c"]);
    dry.removals.dry_run = true;
    dry.volumes[0].1.dry_run = true;
    let answers = handler.sync(dry).await.unwrap();
    assert_eq!(synced(&answers), (vec!["already"], vec![("a", "already"), ("b", "already")]));
    assert_eq!(handler.revision().await.unwrap(), Some(1), "a dry run records nothing");
    let mut next = set(2, &["b", "c"]);
    next.others.insert(name("malformed"));
    let answers = handler.sync(next.clone()).await.unwrap();
    assert_eq!(synced(&answers), (vec!["already", "done"], vec![("a", "done")]));
    world.gone("a").await;
    let answers = handler.sync(next).await.unwrap();
    assert_eq!(synced(&answers), (vec!["already"; 2], vec![]));
    assert_eq!(
        handler.sync(set(1, &["a", "b"])).await.unwrap_err().reason,
        Reason::RevisionOutdated
    );
    assert_eq!(handler.sync(set(2, &["b"])).await.unwrap_err().reason, Reason::RevisionReused);
    assert_eq!(world.stored().await, ["b", "c"]);
    let successor = world.handler().await;
    assert_eq!(successor.revision().await.unwrap(), Some(2));
    assert_eq!(successor.sync(set(1, &[])).await.unwrap_err().reason, Reason::RevisionOutdated);
}

#[tokio::test(start_paused = true)]
async fn single_requests_hold_until_the_next_set() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.sync(set(1, &["a"])).await.unwrap();
    handler.change(vec![add("b"), remove("a")]).await.unwrap();
    world.gone("a").await;
    assert_eq!(world.stored().await, ["b"]);
    let answers = handler.sync(set(1, &["a"])).await.unwrap();
    assert_eq!(synced(&answers), (vec!["done"], vec![("b", "done")]));
    world.gone("b").await;
    assert_eq!(world.stored().await, ["a"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_still_being_checked_of_an_older_set_is_given_up() {
    let world = World::new().await;
    let handler = world.handler().await;
    handler.sync(set(1, &["keep", "gone"])).await.unwrap();
    let (adds, removes) = (world.slow_check("old"), world.slow_check("keep"));
    let older = async {
        let answers = handler.sync(set(2, &["gone", "old"])).await.unwrap();
        let expected = vec!["already", "REVISION_OUTDATED"];
        assert_eq!(synced(&answers), (expected, vec![("keep", "REVISION_OUTDATED")]));
    };
    let newer = async {
        let answers = handler.sync(set(3, &["keep"])).await.unwrap();
        assert_eq!(synced(&answers), (vec!["already"], vec![("gone", "done")]));
        adds.notify_one();
        removes.notify_one();
    };
    tokio::join!(biased; older, newer);
    world.gone("gone").await;
    assert_eq!(world.stored().await, ["keep"]);
}

#[tokio::test(start_paused = true)]
async fn a_set_forces_what_is_being_removed_already() {
    let world = World::new().await;
    let held = Failure::new(Reason::DeviceHeld, "as told");
    world.script.detaches.lock().unwrap().push_back(Err(held));
    let handler = world.handler().await;
    handler.sync(set(1, &["a"])).await.unwrap();
    handler.sync(set(2, &[])).await.unwrap();
    world.in_trouble("a").await;
    let mut forced = set(2, &[]);
    forced.removals.force = true;
    let answers = handler.sync(forced).await.unwrap();
    assert_eq!(synced(&answers), (vec![], vec![("a", "done")]));
    world.gone("a").await;
    assert_eq!(world.script.log().last().unwrap(), "detach a force");
}

#[tokio::test(start_paused = true)]
async fn one_addition_that_is_asked_for_twice_at_once_is_taken_on_once() {
    let world = World::new().await;
    let handler = world.handler().await;
    let other = VolumeSpec { read_only: true, ..volume("a") };
    let asked = [volume("a"), volume("a"), other].map(|spec| handler.add(spec, plain()));
    let answers = futures_util::future::join_all(asked).await;
    assert_eq!(told(&answers), ["done", "already", "VOLUME_EXISTS"]);
    assert_eq!(world.stored().await, ["a"]);
    world.reaches("a", Phase::Ready).await;
    let asked = [name("a"), name("a")].map(|n| handler.remove(n, RemoveOptions::default()));
    let answers = futures_util::future::join_all(asked).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    world.gone("a").await;
    assert_eq!(world.stored().await, Vec::<String>::new());
}
