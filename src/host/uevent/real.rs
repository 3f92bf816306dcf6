//! Kernel uevents, and udev's, over netlink.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvmsg,
    setsockopt, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::broadcast;

use super::{Notice, Uevent, UeventStream, Uevents};
use crate::types::DevNum;

/// The multicast group of the kernel's own events (lib/kobject_uevent.c).
const KERNEL_GROUP: u32 = 1;
/// That of udev's (systemd, libsystemd/sd-device/device-monitor.c, MONITOR_GROUP_UDEV).
const UDEV_GROUP: u32 = 2;
/// Enough for a burst of several thousand events; the limit of the system is overridden as root.
const RECEIVE_BUFFER: usize = 16 << 20;
/// Events kept for a subscriber that is slow.
const BACKLOG: usize = 8192;
/// The kernel's own bound (UEVENT_BUFFER_SIZE is 2048, and the path comes first).
const MESSAGE: usize = 16 << 10;

/// The events, each kind read by one task and handed to all subscribers.
pub struct RealUevents {
    kernel: Source,
    udev: Option<Source>,
}

struct Source {
    notices: broadcast::Sender<Notice>,
    reader: tokio::task::JoinHandle<()>,
}

impl RealUevents {
    /// Opens the sockets and begins to read; to be called within the runtime.
    pub fn open() -> io::Result<Self> {
        let udev = Source::open(UDEV_GROUP, |_| Some(Notice::Recheck));
        let udev = udev.inspect_err(|error| tracing::warn!(%error, "udev's events are not heard"));
        Ok(Self { kernel: Source::open(KERNEL_GROUP, from_kernel)?, udev: udev.ok() })
    }
}

impl Uevents for RealUevents {
    fn subscribe(&self) -> UeventStream {
        UeventStream::new(self.kernel.notices.subscribe())
    }

    fn subscribe_to_udev(&self) -> UeventStream {
        let source = self.udev.as_ref().unwrap_or(&self.kernel);
        UeventStream::new(source.notices.subscribe())
    }

    fn is_ruled(&self, dev: DevNum) -> bool {
        // On a tmpfs: nothing to wait for. Where it is not to be seen, nothing is known.
        let database = Path::new("/run/udev/data");
        database.join(format!("b{dev}")).exists() || !database.exists()
    }
}

impl Source {
    /// `notice` is what subscribers are told of a message.
    fn open(group: u32, notice: fn(Message<'_>) -> Option<Notice>) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        // Only root may go past the system's limit; others have to do with that.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, group))?;
        let (notices, _) = broadcast::channel(BACKLOG);
        // SAFETY: an `OwnedFd` names one open descriptor until it is dropped.
        let socket = unsafe { AsyncFd::register(socket) }?;
        let reader = tokio::spawn(read_all(socket, notice, notices.clone()));
        Ok(Self { notices, reader })
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn read_all(
    socket: AsyncFd<OwnedFd>,
    notice: fn(Message<'_>) -> Option<Notice>,
    notices: broadcast::Sender<Notice>,
) {
    let mut buffer = vec![0; MESSAGE];
    loop {
        let Ok(mut ready) = socket.readable().await else { return };
        let received = ready.try_io(|fd| receive(fd.get_ref(), &mut buffer));
        let told = match received {
            // Not readable after all.
            Err(_) => continue,
            Ok(Ok(message)) => match notice(message) {
                Some(told) => told,
                None => continue,
            },
            // The buffer ran over: the kernel says so once and goes on (netlink(7), ENOBUFS).
            Ok(Err(e)) if e.raw_os_error() == Some(nix::libc::ENOBUFS) => Notice::Lost,
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => continue,
            Ok(Err(error)) => {
                tracing::error!(%error, "events can no longer be read; falling back to looking at /sys");
                return;
            }
        };
        // Nobody listening is fine.
        let _ = notices.send(told);
    }
}

/// A message as it came.
struct Message<'a> {
    text: &'a [u8],
    by_kernel: bool,
    is_whole: bool,
}

fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<Message<'a>> {
    let (length, by_kernel, is_whole) = {
        let mut io = [io::IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<NetlinkAddr>(socket.as_raw_fd(), &mut io, None, flags)
            .map_err(|e: Errno| io::Error::from(e))?;
        let by_kernel = message.address.is_some_and(|a| a.pid() == 0);
        (message.bytes, by_kernel, !message.flags.contains(MsgFlags::MSG_TRUNC))
    };
    Ok(Message { text: &buffer[..length], by_kernel, is_whole })
}

/// `None` for one that the kernel did not send, or that did not fit. Anybody with CAP_NET_ADMIN in the
/// namespace may send to a group; of udev's nothing is believed but that it is time to look.
fn from_kernel(message: Message<'_>) -> Option<Notice> {
    if !message.by_kernel || !message.is_whole {
        return None;
    }
    parse(message.text).map(|event| Notice::Event(event.into()))
}

/// `action@devpath`, then `KEY=value`, each ended by NUL.
fn parse(message: &[u8]) -> Option<Uevent> {
    let mut fields = message.split(|b| *b == 0).map(|f| String::from_utf8_lossy(f));
    let head = fields.next()?;
    let (action, devpath) = head.split_once("@/")?;
    let properties: std::collections::BTreeMap<String, String> = fields
        .filter_map(|f| f.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())))
        .collect();
    Some(Uevent {
        action: action.to_owned(),
        devpath: devpath.to_owned(),
        subsystem: properties.get("SUBSYSTEM").cloned().unwrap_or_default(),
        properties,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_taken_apart() {
        let message = b"add@/devices/platform/host3/session1/target3:0:0/3:0:0:1/block/sda\0\
            ACTION=add\0DEVPATH=/devices/platform/host3\0SUBSYSTEM=block\0MAJOR=8\0DEVNAME=sda\0";
        let event = parse(message).unwrap();
        assert_eq!(event.action, "add");
        assert_eq!(event.devpath, "devices/platform/host3/session1/target3:0:0/3:0:0:1/block/sda");
        assert_eq!(event.subsystem, "block");
        assert_eq!(event.properties["MAJOR"], "8");
        assert_eq!(parse(b"libudev\0\xfe\xed\xca\xfe"), None, "udev's own format");
        assert_eq!(parse(b""), None);
    }

    #[tokio::test]
    async fn udevs_word_is_a_call_to_look_again() {
        let socket = || {
            let flags = SockFlag::SOCK_CLOEXEC;
            let protocol = SockProtocol::NetlinkKObjectUEvent;
            socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol).unwrap()
        };
        let events = RealUevents::open().unwrap();
        let (mut udev, mut kernel) = (events.subscribe_to_udev(), events.subscribe());
        let to = NetlinkAddr::new(0, UDEV_GROUP);
        let text = b"libudev\0\xfe\xed\xca\xfe";
        let sent = nix::sys::socket::sendto(socket().as_raw_fd(), text, &to, MsgFlags::empty());
        if matches!(sent, Err(Errno::EPERM | Errno::ECONNREFUSED)) {
            eprintln!("skipped: no leave to send as udev does");
            return;
        }
        sent.unwrap();
        // The stream itself says so after a second: that it is earlier is not asserted, only that it comes.
        assert_eq!(udev.event().await, Notice::Recheck);
        let none = tokio::time::timeout(std::time::Duration::ZERO, kernel.event()).await;
        assert!(!matches!(none, Ok(Notice::Recheck)), "it is not the kernel's");
    }

    #[tokio::test]
    async fn root_an_event_that_the_kernel_sends_is_seen() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: writing a uevent file needs root");
            return;
        }
        let events = RealUevents::open().unwrap();
        let mut stream = events.subscribe();
        // Asks the kernel to send the event of /dev/null's device again.
        if std::fs::write("/sys/class/mem/null/uevent", "change").is_err() {
            eprintln!("skipped: /sys is read-only here");
            return;
        }
        loop {
            match stream.next().await {
                Notice::Event(event) if event.devpath.ends_with("mem/null") => {
                    assert_eq!(
                        (event.action.as_str(), event.subsystem.as_str()),
                        ("change", "mem")
                    );
                    return;
                }
                Notice::Event(_) | Notice::Lost => {}
                Notice::Recheck => panic!("the kernel's event did not come"),
            }
        }
    }
}
