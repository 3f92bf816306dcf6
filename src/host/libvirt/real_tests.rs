//! The real door against libvirt's built-in `test:///default` driver, which runs in this process:
//! event loop, callbacks, calls and errors are the real ones.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use super::super::{DomainEvent, Lifecycle};
use super::*;

const SOON: Duration = Duration::from_secs(30);

async fn connect() -> Arc<dyn Connection> {
    let endpoint = Endpoint {
        name: "test".into(),
        socket: Socket::Uri("test:///default".into()),
        instance: Instance::Session,
    };
    RealHypervisor::default().connect(&endpoint, SOON).await.unwrap()
}

#[tokio::test]
async fn reads_a_domain_and_sorts_errors() {
    let c = connect().await;
    assert!(c.version(SOON).await.unwrap() >= Version { major: 9, minor: 0, micro: 0 });
    let info = c.info("test", SOON).await.unwrap().unwrap();
    // Paused while the other test of this shared domain is at it.
    assert!(info.persistent && info.state != DomainState::Shutoff && info.job.is_none());
    let xml = c.xml("test", Definition::Live, SOON).await.unwrap();
    let domain = crate::domain::xml::parse(&xml).unwrap();
    assert_eq!((domain.name.as_str(), domain.disks.len()), ("test", 1), "{xml}");
    assert!(c.xml("test", Definition::Config, SOON).await.is_ok());
    assert_ne!(c.state("test", SOON).await.unwrap().unwrap(), DomainState::Shutoff);
    assert_eq!(c.info("nobody", SOON).await, Ok(None));
    assert_eq!(c.state("nobody", SOON).await, Ok(None));
    let missing = c.xml("nobody", Definition::Live, SOON).await;
    assert!(matches!(missing, Err(LibvirtError::NoDomain { .. })), "{missing:?}");
    let no_alias = c.detach_alias("test", "ua-lunplug-x", Affect::LIVE, SOON).await;
    assert!(no_alias.is_err(), "{no_alias:?}");
    let no_agent = c.agent_command("test", r#"{"execute":"guest-ping"}"#, SOON).await;
    assert!(no_agent.is_err(), "{no_agent:?}");
    assert!(c.is_alive());
    assert_eq!(c.stuck_calls(), 0);
}

#[tokio::test]
async fn lifecycle_events_come_through_the_event_loop() {
    let c = connect().await;
    let mut events = c.events("test");
    ffi::start_event_loop().unwrap();
    let handle =
        Handle::open("test:///default", EventSender::default(), Arc::default(), false).unwrap();
    // All connections to "default" in this process share its state.
    std::thread::spawn(move || {
        let domain = handle.connect().lookup_domain_by_name("test").unwrap();
        domain.suspend().unwrap();
        domain.resume().unwrap();
    })
    .join()
    .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match events.next().await {
            DomainEvent::Recheck => {}
            event => seen.push(event),
        }
    }
    assert_eq!(
        seen,
        [DomainEvent::Lifecycle(Lifecycle::Suspended), DomainEvent::Lifecycle(Lifecycle::Resumed)]
    );
}

#[tokio::test]
async fn nobody_at_the_socket_is_no_connect() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::path(dir.path().join("no-such-sock"), Instance::Session);
    let error = RealHypervisor::default().connect(&endpoint, SOON).await.err().unwrap();
    assert!(error.is_disconnect(), "{error:?}");
    assert_eq!(error.reason(), crate::reason::Reason::LibvirtUnreachable);
}

/// A socket opened with O_PATH is reached through its descriptor, also after the path was replaced;
/// and a daemon that accepts but never speaks costs the caller its deadline, no more.
#[tokio::test]
async fn an_opened_socket_is_reached_though_its_path_was_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("libvirt-sock");
    let real = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let fd: OwnedFd = nix::fcntl::open(
        &path,
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .unwrap();
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    let planted = std::os::unix::net::UnixListener::bind(&path).unwrap();
    planted.set_nonblocking(true).unwrap();
    let endpoint = Endpoint::opened("in the pod", Arc::new(fd), Instance::Session);
    let connecting = RealHypervisor::default().connect(&endpoint, Duration::from_millis(300)).await;
    assert!(matches!(connecting, Err(LibvirtError::TimedOut { stuck: 1, .. })));
    let accepted = tokio::task::spawn_blocking(move || real.accept().is_ok()).await.unwrap();
    assert!(accepted, "the opened socket was connected to");
    assert_eq!(
        planted.accept().err().map(|e| e.kind()),
        Some(std::io::ErrorKind::WouldBlock),
        "the planted one was not"
    );
}

#[test]
fn a_path_is_escaped_in_the_uri() {
    let endpoint = Endpoint::path(PathBuf::from("/run/a b&mode=x?#%"), Instance::System);
    assert_eq!(
        uri(&endpoint, Instance::System),
        "qemu+unix:///system?socket=/run/a%20b%26mode%3Dx%3F%23%25"
    );
}
