//! CHAP: the right credentials, all the wrong ones, and where they may be seen.

use lunplug::reason::Reason;
use lunplug::spec::{AddOptions, ChapFrom, Phase, Source, VolumeSpec};
use lunplug::types::{Chap, Outcome, SecretText};
use lunplug::vm::facade::Volumes;

use crate::world::{Daemon, World, portal, single, target, vm, volume};

const SECRET: &str = "a-secret-of-the-node";
const BACK: &str = "a-secret-of-the-target";

fn chap(name: &str, secret: &str, back: &str) -> Chap {
    let text = |t: &str| SecretText::from(t.to_owned());
    let target = if back.is_empty() { "" } else { "array" };
    Chap::new(name.into(), text(secret), target.into(), text(back)).unwrap()
}

fn right() -> Chap {
    chap("node", SECRET, "")
}

fn with(mut spec: VolumeSpec, from: ChapFrom) -> VolumeSpec {
    let Source::Iscsi(source) = &mut spec.source else { panic!("of iSCSI") };
    source.chap = Some(from);
    spec
}

fn by_request(spec: VolumeSpec) -> VolumeSpec {
    with(spec, ChapFrom::Request)
}

fn by_secret(spec: VolumeSpec) -> VolumeSpec {
    with(spec, ChapFrom::Secret("san-1".parse().unwrap()))
}

fn put_secret(world: &World, secret: &str, back: Option<&str>) {
    let mut values =
        vec![("node.session.auth.username", "node"), ("node.session.auth.password", secret)];
    if let Some(back) = back {
        values.push(("node.session.auth.username_in", "array"));
        values.push(("node.session.auth.password_in", back));
    }
    world.host.storage.set_secret(&"san-1".parse().unwrap(), Some(&values));
}

/// Asks for a volume with credentials in the request.
async fn want(daemon: &Daemon, number: u8, spec: &VolumeSpec, chap: &Chap) -> Outcome<Phase> {
    let options = AddOptions { chap: Some(chap.clone()), ..AddOptions::default() };
    let added = daemon.registry.add_volume(&vm(number), spec.clone(), options).await.unwrap();
    match added {
        Outcome::Done(status) => Outcome::Done(status.phase),
        Outcome::Already(status) => Outcome::Already(status.phase),
    }
}

async fn fails(daemon: &Daemon, number: u8, spec: &VolumeSpec, chap: &Chap) -> (Reason, String) {
    want(daemon, number, spec, chap).await;
    let status = daemon.comes_to(number, spec.name.as_str()).await;
    assert_eq!(status.phase, Phase::Failed, "{status:?}");
    (status.reason.unwrap(), status.message)
}

fn setting(world: &World, n: u8, name: &str) -> Option<String> {
    world.host.storage.record_setting(&target(), portal(n), &format!("node.session.auth.{name}"))
}

#[test]
fn credentials_of_either_kind_log_in_at_every_portal_and_are_kept_nowhere_else() {
    for mutual in [false, true] {
        let back = if mutual { BACK } else { "" };
        let world = World::new();
        world.host.storage.set_chap(&target(), Some(chap("node", SECRET, BACK)));
        put_secret(&world, SECRET, mutual.then_some(BACK));
        world.life(async |daemon| {
            let one = by_request(volume("one", 1));
            want(&daemon, 1, &one, &chap("node", SECRET, back)).await;
            assert_eq!(daemon.ready(1, "one").await.device.unwrap().paths, 2);
            for n in [1, 2] {
                assert_eq!(setting(&world, n, "authmethod").as_deref(), Some("CHAP"));
                assert_eq!(setting(&world, n, "password").as_deref(), Some(SECRET));
                assert_eq!(setting(&world, n, "password_in").is_some(), mutual);
            }
            // The same ones by reference share the session.
            assert_eq!(daemon.add(2, &by_secret(volume("two", 2))).await.phase, Phase::Ready);
            let shown: Vec<String> =
                daemon.registry.list_volumes(None).await.iter().map(|v| format!("{v:?}")).collect();
            assert!(!shown.concat().contains("a-secret"), "{shown:?}");
            let stored = world.desired.volumes(&vm(1)).await.unwrap();
            assert!(!format!("{stored:?}").contains("a-secret"), "{stored:?}");
            let picture = world.picture();
            let seen = picture.lines().filter(|l| l.contains("a-secret"));
            assert!(seen.clone().count() > 0);
            assert!(seen.clone().all(|l| l.starts_with("run secrets/default/vm-1/one.json ")));
            daemon.remove(1, "one").await;
            assert!(!world.picture().contains("a-secret"), "{}", world.picture());
            daemon.remove(2, "two").await;
            daemon.quiet().await;
            world.assert_clean("both are gone");
        });
    }
}

#[test]
fn wrong_missing_and_surplus_credentials_are_told_apart() {
    let world = World::new();
    let sim = &world.host.storage;
    sim.set_chap(&target(), Some(right()));
    world.life(async |daemon| {
        let spec = by_request(volume("data", 1));
        let cases = [
            (chap("node", "not-the-secret", ""), Reason::ChapRejected),
            (chap("somebody", SECRET, ""), Reason::ChapRejected),
            // The target has nothing to prove itself with.
            (chap("node", SECRET, BACK), Reason::ChapTargetUnproven),
        ];
        for (given, reason) in cases {
            let (got, message) = fails(&daemon, 1, &spec, &given).await;
            assert_eq!(got, reason, "{message}");
            assert!(!message.contains("secret"), "{message}");
            daemon.quiet().await;
            world.assert_clean("refused");
        }
        assert_eq!(daemon.add_fails(1, &volume("none", 1)).await, Reason::LoginRefused);
        // It has, but another.
        sim.set_chap(&target(), Some(chap("node", SECRET, "another-one")));
        let (got, message) = fails(&daemon, 1, &spec, &chap("node", SECRET, BACK)).await;
        assert_eq!(got, Reason::ChapTargetUnproven, "{message}");
        // It demands none.
        sim.set_chap(&target(), None);
        let (got, message) = fails(&daemon, 1, &spec, &right()).await;
        assert_eq!(got, Reason::ChapNotWanted, "{message}");
        daemon.quiet().await;
        world.assert_clean("all tried");
    });
}

#[test]
fn a_session_is_shared_only_by_those_who_could_have_made_it() {
    let world = World::new();
    world.life(async |daemon| {
        world.host.storage.set_chap(&target(), Some(right()));
        want(&daemon, 1, &by_request(volume("one", 1)), &right()).await;
        daemon.ready(1, "one").await;
        let two = by_request(volume("two", 2));
        for other in [chap("node", "another-secret", ""), chap("node", SECRET, BACK)] {
            let (reason, message) = fails(&daemon, 2, &two, &other).await;
            assert_eq!(reason, Reason::ChapDiffers, "{message}");
        }
        assert_eq!(daemon.add_fails(2, &volume("three", 3)).await, Reason::ChapDiffers);
        want(&daemon, 2, &two, &right()).await;
        daemon.ready(2, "two").await;
        daemon.remove(2, "two").await;
        daemon.remove(1, "one").await;
        // And the other way round.
        world.host.storage.set_chap(&target(), None);
        daemon.add(1, &volume("one", 1)).await;
        let (reason, message) = fails(&daemon, 2, &two, &right()).await;
        assert_eq!(reason, Reason::ChapDiffers, "{message}");
        daemon.remove(1, "one").await;
        daemon.quiet().await;
        world.assert_clean("all gone");
    });
}

#[test]
fn sessions_and_records_of_others_are_used_and_left_as_they_are() {
    let world = World::new();
    let sim = &world.host.storage;
    sim.add_session(&target(), portal(1), "default");
    sim.add_record(&target(), portal(2), "default");
    world.life(async |daemon| {
        want(&daemon, 1, &by_request(volume("data", 1)), &right()).await;
        assert_eq!(daemon.ready(1, "data").await.device.unwrap().paths, 2);
        assert_eq!(setting(&world, 2, "authmethod"), None);
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        assert_eq!(setting(&world, 2, "authmethod"), None);
        let picture = world.picture();
        assert!(picture.lines().any(|l| l.starts_with("session") && l.contains("192.0.2.1")));
    });
}

#[test]
fn credentials_of_a_request_are_for_one_boot_and_can_be_given_again() {
    let world = World::new();
    world.host.storage.set_chap(&target(), Some(right()));
    let spec = by_request(volume("data", 1));
    world.life(async |daemon| {
        want(&daemon, 1, &spec, &right()).await;
        daemon.ready(1, "data").await;
    });
    // A daemon that was killed has them still, and needs none for what is there.
    world.life(async |daemon| {
        daemon.ready(1, "data").await;
        world.host.storage.end_session(&target(), portal(1));
        daemon.quiet().await;
    });
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        let status = daemon.comes_to(1, "data").await;
        assert_eq!(
            (status.phase, status.reason),
            (Phase::Pending, Some(Reason::SecretUnavailable))
        );
        assert!(status.message.contains("one boot"), "{}", status.message);
        // Adding it again unchanged gives them back.
        assert_eq!(want(&daemon, 1, &spec, &right()).await, Outcome::Already(Phase::Pending));
        daemon.ready(1, "data").await;
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("gone");
    });
}

#[test]
fn a_secret_that_is_not_there_fails_an_add_and_keeps_what_was_ready() {
    let world = World::new();
    world.host.storage.set_chap(&target(), Some(right()));
    let spec = by_secret(single("data", 1));
    world.life(async |daemon| {
        assert_eq!(daemon.add_fails(1, &spec).await, Reason::SecretUnavailable);
        let message = daemon.get(1, "data").await.unwrap().message;
        assert!(message.contains("san-1"), "{message}");
        put_secret(&world, "too short \n", None);
        assert_eq!(daemon.add_fails(1, &spec).await, Reason::SecretUnavailable);
        let message = daemon.get(1, "data").await.unwrap().message;
        assert!(message.contains("node.session.auth.password") && !message.contains("too short"));
        put_secret(&world, SECRET, None);
        assert_eq!(daemon.add(1, &spec).await.phase, Phase::Ready);
    });
    // It went, and with it the way back after a reboot; it comes back with the secret.
    world.host.storage.set_secret(&"san-1".parse().unwrap(), None);
    world.life(async |daemon| drop(daemon.ready(1, "data").await));
    world.shut_down();
    world.boot();
    world.life(async |daemon| {
        let status = daemon.comes_to(1, "data").await;
        assert_eq!(
            (status.phase, status.reason),
            (Phase::Pending, Some(Reason::SecretUnavailable))
        );
        put_secret(&world, SECRET, None);
        daemon.ready(1, "data").await;
        daemon.remove(1, "data").await;
        daemon.quiet().await;
        world.assert_clean("gone");
    });
}

/// Wherever the daemon is killed, no credentials are left behind when the volume is gone, or was never
/// taken on.
#[test]
fn no_credentials_outlive_their_volume() {
    for step in 0.. {
        let world = World::new();
        world.host.storage.set_chap(&target(), Some(right()));
        let spec = by_request(single("data", 1));
        world.inject("", step, lunplug::host::sim::FaultAction::Hang);
        let met = world.life(async |daemon| {
            let add = async {
                want(&daemon, 1, &spec, &right()).await;
                daemon.ready(1, "data").await;
            };
            let limit = std::time::Duration::from_millis(200);
            tokio::time::timeout(limit, add).await.is_err()
        });
        world.host.faults.clear();
        world.life(async |daemon| {
            if daemon.get(1, "data").await.is_some() {
                daemon.ready(1, "data").await;
                daemon.remove(1, "data").await;
            }
            daemon.quiet().await;
            world.assert_clean(&format!("killed at call {step}"));
        });
        if !met {
            break;
        }
    }
}
