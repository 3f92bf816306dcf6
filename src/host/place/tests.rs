use super::*;

#[test]
fn listening_sockets_are_found_by_name() {
    let text = "Num       RefCount Protocol Flags    Type St Inode Path\n\
        0000000000000000: 00000002 00000000 00010000 0001 01  1666 @ISCSIADM_ABSTRACT_NAMESPACE\n\
        0000000000000000: 00000003 00000000 00000000 0001 03  1700 @ISCSIADM_ABSTRACT_NAMESPACE\n\
        0000000000000000: 00000002 00000000 00010000 0001 01   779 @/org/kernel/linux/storage/multipathd\n\
        0000000000000000: 00000002 00000000 00010000 0001 01   800 /org/kernel/linux/storage/multipathd\n\
        0000000000000000: 00000002 00000000 00010000 0001 01   801 @/org/kernel/linux/storage/multipathd2\n\
        0000000000000000: 00000003 00000000 00000000 0001 03  1701\n";
    assert_eq!(listening(text), [(Service::Iscsid, 1666), (Service::Multipathd, 779)]);
    assert_eq!(listening(""), []);
}

#[test]
fn whoever_may_not_administer_the_node_is_not_trusted() {
    let status =
        |uid: u32, caps: &str| format!("Name:\tx\nUid:\t1000\t{uid}\t0\t0\nCapEff:\t{caps}\n");
    assert_eq!(credentials(&status(0, "000001ffffffffff")), Some((0, true)));
    // What a container that is not privileged has.
    assert_eq!(credentials(&status(0, "00000000a80425fb")), Some((0, false)));
    assert_eq!(credentials(&status(1000, "0000000000000000")), Some((1000, false)));
    assert_eq!(credentials("Name:\tx\n"), None);
}

use fake::{IN_FULL, Proc};

/// Whose root is used: `None` for ours.
fn whose(places: &Places) -> Result<Option<i32>, PlaceError> {
    Ok(match places.of(Service::Iscsid)? {
        Place::Ours => None,
        Place::Other(root) => Some(root.pid()),
    })
}

#[test]
fn on_the_host_all_is_as_ever() {
    let proc = Proc::new();
    let places = proc.places();
    proc.runs(1, "systemd", Path::new("/"), IN_FULL, &[70]);
    assert_eq!(whose(&places).unwrap(), None, "nobody listens");
    proc.listens(&[70]);
    assert_eq!(whose(&places).unwrap(), None, "systemd listens for it");
    proc.runs(40, "iscsid", Path::new("/"), IN_FULL, &[70]);
    assert_eq!(whose(&places).unwrap(), None);
    proc.ends(40);
    proc.listens(&[]);
    assert_eq!(whose(&places).unwrap(), None, "it may be started by iscsiadm");
}

#[test]
fn from_a_container_the_hosts_are_used() {
    let proc = Proc::new();
    let places = proc.places();
    let host = proc.root("host", &["iscsiadm"]);
    proc.runs(1, "systemd", &host, IN_FULL, &[70]);
    assert_eq!(whose(&places).unwrap(), Some(1), "where it would be started");
    proc.listens(&[70]);
    assert_eq!(whose(&places).unwrap(), Some(1));
    proc.closes(1, 70);
    proc.runs(40, "iscsid", &host, IN_FULL, &[71]);
    proc.listens(&[71]);
    assert_eq!(whose(&places).unwrap(), Some(40));
    proc.ends(40);
    proc.listens(&[]);
    assert_eq!(whose(&places).unwrap(), Some(1), "the host's may come back at any time");
}

#[test]
fn a_host_without_the_program_is_not_the_place() {
    let proc = Proc::new();
    let host = proc.root("host", &[]);
    proc.runs(1, "systemd", &host, IN_FULL, &[]);
    assert_eq!(whose(&proc.places()).unwrap(), None);
}

#[test]
fn a_containers_is_followed_and_not_replaced_by_the_hosts() {
    let proc = Proc::new();
    let places = proc.places();
    let image = proc.root("image", &["iscsiadm"]);
    proc.runs(1, "systemd", Path::new("/"), IN_FULL, &[]);
    proc.runs(50, "iscsid", &image, IN_FULL, &[80]);
    proc.listens(&[80]);
    assert_eq!(whose(&places).unwrap(), Some(50));
    assert_eq!(whose(&places).unwrap(), Some(50), "remembered");
    // Its container ends: iscsiadm on the host would have systemd start the host's.
    proc.ends(50);
    proc.listens(&[]);
    let gone = whose(&places).unwrap_err();
    assert!(matches!(gone, PlaceError::Gone { pid: 50, .. }), "{gone}");
    assert!(is_place_error(&gone.into()));
    // Its number is another's by now.
    proc.runs(50, "sleep", Path::new("/"), IN_FULL, &[]);
    assert!(whose(&places).is_err());
    proc.runs(60, "iscsid", &image, IN_FULL, &[81]);
    proc.listens(&[81]);
    assert_eq!(whose(&places).unwrap(), Some(60), "its container is back");
    // Somebody has started the host's instead: it serves now.
    proc.ends(60);
    proc.runs(70, "iscsid", Path::new("/"), IN_FULL, &[82]);
    proc.listens(&[82]);
    assert_eq!(whose(&places).unwrap(), None);
}

#[test]
fn a_stranger_with_the_sockets_name_is_refused() {
    let proc = Proc::new();
    let image = proc.root("image", &["iscsiadm"]);
    proc.runs(1, "systemd", Path::new("/"), IN_FULL, &[]);
    proc.runs(50, "iscsid", &image, "00000000a80425fb", &[80]);
    proc.listens(&[80]);
    let refused = whose(&proc.places()).unwrap_err();
    assert!(matches!(refused, PlaceError::Untrusted { pid: 50, uid: 0, .. }), "{refused}");
}

#[test]
fn who_has_let_go_of_the_socket_is_not_asked_any_more() {
    let proc = Proc::new();
    let places = proc.places();
    let image = proc.root("image", &["iscsiadm"]);
    proc.runs(1, "systemd", Path::new("/"), IN_FULL, &[80]);
    proc.listens(&[80]);
    assert_eq!(whose(&places).unwrap(), None, "the socket is systemd's");
    // Its unit is stopped, and a container has the name now; systemd lives on.
    proc.closes(1, 80);
    proc.runs(50, "iscsid", &image, IN_FULL, &[81]);
    proc.listens(&[81]);
    assert_eq!(whose(&places).unwrap(), Some(50));
}
