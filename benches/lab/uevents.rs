//! udev's events, as libudev's monitor has them: they come when the rules for a device have been run.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};

/// The multicast group of udev's own events.
const UDEV_GROUP: u32 = 2;

/// An event's properties: ACTION, DEVPATH, SUBSYSTEM, those that rules have set.
pub type Event = HashMap<String, String>;

/// Hears every event from when it was opened.
pub struct Monitor(OwnedFd);

impl Monitor {
    pub fn open() -> Self {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )
        .unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, UDEV_GROUP)).unwrap();
        Self(socket)
    }

    /// Reads block devices' events until `is_last` says so.
    pub fn until(&self, what: &str, deadline: Instant, mut is_last: impl FnMut(&Event) -> bool) {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(left > Duration::ZERO, "did not come: {what}");
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, left).unwrap() == 0 {
                continue;
            }
            let mut buffer = [0; 16 << 10];
            let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
            let event = parse(&buffer[..length]);
            if event.get("SUBSYSTEM").is_some_and(|s| s == "block") && is_last(&event) {
                return;
            }
        }
    }
}

/// "libudev", NUL, a magic number, the header's size, where the properties begin and how long they are;
/// the latter three in the machine's own order (systemd, libsystemd/sd-device/device-monitor.c).
fn parse(message: &[u8]) -> Event {
    assert!(message.starts_with(b"libudev\0"), "not an event of udev's");
    let number = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap()) as usize;
    let (from, length) = (number(16), number(20));
    let fields = message[from..from + length].split(|b| *b == 0);
    let text = fields.map(|f| String::from_utf8_lossy(f).into_owned());
    text.filter_map(|f| f.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect()
}
