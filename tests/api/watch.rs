//! Lists, and streams of changes.

use lunplug::api::v1::watch_volumes_response::Event;

use super::*;

#[tokio::test]
async fn a_watch_lists_follows_filters_and_says_when_it_lost_something() {
    let server = Server::start();
    let mut client = server.client().await;
    for name in ["a", "b"] {
        client.register_vm(registration(name, pod())).await.unwrap();
        client.add_volume(addition(name, |_| {})).await.unwrap();
    }
    let request = v1::WatchVolumesRequest { vm: vm("a") };
    let mut stream = client.watch_volumes(request).await.unwrap().into_inner();
    let mut next = async || stream.message().await.unwrap().unwrap().event.unwrap();
    let Event::Snapshot(first) = next().await else { panic!("the list comes first") };
    assert!(!first.events_lost);
    assert_eq!(first.volumes.len(), 1);

    let of = |name: &str| server.memory.get(&format!("default/{name}/data")).unwrap();
    server.memory.publish(of("b"), Phase::Bound, None);
    server.memory.publish(of("a"), Phase::Ready, None);
    let Event::Changed(changed) = next().await else { panic!("a change") };
    assert_eq!((changed.vm, changed.phase), (vm("a"), v1::Phase::Ready.into()));

    // More changes than the server keeps, without a chance to send any of them.
    for _ in 0..100 {
        server.memory.publish(of("a"), Phase::Ready, Some(Reason::MapFailed));
    }
    let newest = of("a").generation;
    let snapshot = loop {
        if let Event::Snapshot(snapshot) = next().await {
            break snapshot;
        }
    };
    assert!(snapshot.events_lost);
    assert_eq!(snapshot.volumes[0].generation, newest);

    server.memory.publish(of("a"), Phase::Gone, None);
    let gone = loop {
        // What was still kept when the list was made is older and not sent again.
        match next().await {
            Event::Changed(changed) => break changed,
            Event::Snapshot(_) => {}
        }
    };
    assert_eq!((gone.phase(), gone.generation), (v1::Phase::Gone, newest + 1));
}

#[tokio::test]
async fn stopping_ends_watches_and_the_server_with_a_reason() {
    let server = Server::start();
    let mut client = server.client().await;
    let request = v1::WatchVolumesRequest::default();
    let mut stream = client.watch_volumes(request).await.unwrap().into_inner();
    stream.message().await.unwrap();
    server.stop.send(true).unwrap();
    let status = stream.message().await.unwrap_err();
    assert_eq!((status.code(), blame(&status).0), (Code::Unavailable, Reason::ShuttingDown));
    assert!(status.get_error_details().retry_info().is_some());
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_long_list_comes_in_parts_and_the_changes_after_it() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    client.add_volume(addition("a", |_| {})).await.unwrap();
    let blank = server.memory.get("default/a/data").unwrap();
    for n in 0..600 {
        let mut status = blank.clone();
        status.key.volume = format!("v{n:03}").parse().unwrap();
        std::sync::Arc::make_mut(&mut status.spec).name = status.key.volume.clone();
        server.memory.publish(status, Phase::Pending, None);
    }
    let request = v1::WatchVolumesRequest::default();
    let mut stream = client.watch_volumes(request).await.unwrap().into_inner();
    let mut next = async || stream.message().await.unwrap().unwrap().event.unwrap();
    let mut list = Vec::new();
    // While it is sent nothing else comes between.
    let changed = server.memory.get("default/a/v007").unwrap();
    loop {
        let Event::Snapshot(part) = next().await else { panic!("the list comes first") };
        assert!(!part.events_lost);
        list.extend(part.volumes.into_iter().map(|v| v.spec.unwrap().name));
        if list.len() < 300 {
            server.memory.publish(changed.clone(), Phase::Ready, None);
        }
        if !part.more {
            break;
        }
    }
    assert_eq!(list.len(), 601);
    assert!(list.is_sorted() && list[600] == "v599", "ordered by name, each once");
    let Event::Changed(ready) = next().await else { panic!("the change that came meanwhile") };
    assert_eq!(ready.spec.as_ref().unwrap().name, "v007");
    assert_eq!(ready.phase(), v1::Phase::Ready);

    // The client's own waiting takes the list together: its volume is in the last part.
    server.memory.script(&[(Phase::Bound, None), (Phase::Ready, None)]);
    let add = format!("addvolume a --volume-name zz --source {URL}");
    let (exit, out, err) = server.run(&add).await;
    assert_eq!(exit, 0, "{out}{err}");
}

#[tokio::test]
async fn lunplug_takes_a_list_of_any_size() {
    let server = Server::start();
    let mut client = server.client().await;
    client.register_vm(registration("a", pod())).await.unwrap();
    client.add_volume(addition("a", |_| {})).await.unwrap();
    let mut large = server.memory.get("default/a/data").unwrap();
    large.gave_up = vec!["x".repeat(5 << 20)];
    server.memory.publish(large, Phase::Ready, None);
    let (exit, out, err) = server.run("list").await;
    assert_eq!(exit, 0, "{err}");
    assert!(out.contains("data"), "{out}");
}
