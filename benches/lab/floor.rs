//! The same operations done bare: what the kernel, iscsid, multipathd and libvirt take by themselves. No
//! proof of anything, no record, nothing undone; events are waited for. This code stays as it is, so that figures of
//! different versions can be compared.

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys::VIR_DOMAIN_AFFECT_LIVE;

use crate::cases::{Case, Contender, Took, VMS};
use crate::node::{Lun, PORTALS, Pod, sh};
use crate::uevents::Monitor;

const DEADLINE: Duration = Duration::from_secs(300);

/// The way to LUNs of the target.
pub struct Floor {
    iqn: String,
    luns: Vec<Lun>,
    guests: [Guest; VMS],
    attached: Vec<Attached>,
}

/// A VM.
struct Guest {
    libvirt: Domain,
    pod: Pod,
}

/// What was attached.
struct Attached {
    /// The directories of its SCSI devices below /sys.
    paths: Vec<String>,
    /// The map over them, by device-mapper's name.
    map: Option<String>,
    /// The number of what a guest would get.
    dev: (u64, u64),
}

impl Floor {
    /// In pods that may have every device.
    pub fn new(iqn: &str, luns: Vec<Lun>, pods: [Pod; VMS]) -> Self {
        Self { iqn: iqn.into(), luns, guests: pods.map(Guest::new), attached: Vec::new() }
    }

    fn iscsiadm(&self, more: &[&str]) {
        let arguments = [&["-m", "node", "-T", &self.iqn], more].concat();
        let status = Command::new("iscsiadm").args(arguments).stdout(Stdio::null()).status();
        assert!(status.unwrap().success(), "iscsiadm {more:?}");
    }

    /// SCSI hosts of the sessions with these portals.
    fn hosts(&self, portals: &[&str]) -> Vec<u32> {
        let mut hosts = Vec::new();
        for entry in fs::read_dir("/sys/class/iscsi_connection").unwrap() {
            let dir = entry.unwrap().path().canonicalize().unwrap();
            let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap().trim().to_owned();
            let portal = format!("{}:{}", read("persistent_address"), read("persistent_port"));
            if portals.contains(&portal.as_str()) {
                hosts.push(host_of(&dir));
            }
        }
        assert_eq!(hosts.len(), portals.len(), "sessions with {portals:?}");
        hosts
    }

    /// Scans for a LUN by each way, and waits until udev is done with its disks, and, of several, until the map has
    /// them all.
    fn attach_lun(&self, lun: &Lun, portals: usize) -> Attached {
        let monitor = Monitor::open();
        let hosts = self.hosts(&PORTALS[..portals]);
        let addresses: Vec<String> =
            hosts.iter().map(|host| format!("/{host}:0:0:{}/", lun.number)).collect();
        std::thread::scope(|scope| {
            for host in &hosts {
                let scan = format!("/sys/class/scsi_host/host{host}/scan");
                scope.spawn(move || fs::write(scan, format!("0 0 {}", lun.number)).unwrap());
            }
        });
        let uuid = format!("mpath-{}", lun.wwid);
        let mut disks = vec![None; portals];
        let mut map = None;
        let what = format!("LUN {} by {hosts:?}", lun.number);
        monitor.until(&what, Instant::now() + DEADLINE, |event| {
            let path = format!("{}/", event["DEVPATH"]);
            if let Some(at) = addresses.iter().position(|a| path.contains(a)) {
                disks[at] = Some((event["DEVPATH"].clone(), number(event)));
            }
            if event.get("DM_UUID") == Some(&uuid) {
                let slaves = fs::read_dir(format!("/sys{}/slaves", event["DEVPATH"]));
                if slaves.is_ok_and(|s| s.count() == portals) {
                    map = event.get("DM_NAME").map(|name| (name.clone(), number(event)));
                }
            }
            disks.iter().all(Option::is_some) && (portals == 1 || map.is_some())
        });
        let disks: Vec<_> = disks.into_iter().flatten().collect();
        let device = |disk: &str| format!("/sys{}", disk.split_once("/block/").unwrap().0);
        Attached {
            dev: map.as_ref().map_or(disks[0].1, |map| map.1),
            paths: disks.iter().map(|d| device(&d.0)).collect(),
            map: map.map(|map| map.0),
        }
    }

    /// Takes the map away and deletes the paths; waits until udev is done with them.
    fn detach_lun(&self, attached: &Attached) {
        let monitor = Monitor::open();
        if let Some(map) = &attached.map {
            // It fails while udev's rules have the map open.
            let deadline = Instant::now() + DEADLINE;
            while multipathd(&format!("remove map {map}")) != "ok\n" {
                assert!(Instant::now() < deadline, "map {map} is not removed");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        std::thread::scope(|scope| {
            for path in &attached.paths {
                scope.spawn(move || fs::write(format!("{path}/delete"), "1").unwrap());
            }
        });
        let mut left: Vec<&str> = attached.paths.iter().map(|p| &p["/sys".len()..]).collect();
        monitor.until("the disks' removal", Instant::now() + DEADLINE, |event| {
            if event["ACTION"] == "remove" && event.get("DEVTYPE").is_some_and(|t| t == "disk") {
                left.retain(|path| !event["DEVPATH"].starts_with(&format!("{path}/")));
            }
            left.is_empty()
        });
    }
}

impl Guest {
    /// Takes the pod's device filter off.
    fn new(pod: Pod) -> Self {
        // The runtime's filter is on the container's cgroup or on the scope around it.
        sh(&format!(
            "for dir in {0} $(dirname {0}); do
               bpftool -j cgroup show $dir | jq -r '.[]? | select(.attach_type | test(\"device\")) | .id' |
                 while read -r id; do bpftool cgroup detach $dir device id $id multi; done
             done",
            pod.cgroup
        ));
        let connection = Connect::open(Some(&pod.libvirt_uri)).unwrap();
        let libvirt = connection.lookup_domain_by_name(&pod.domain).unwrap();
        Self { libvirt, pod }
    }

    /// Gives a device to the guest: a node, and libvirt's own attach.
    fn plug(&self, name: &str, at: usize, dev: (u64, u64)) {
        let node = Path::new(&self.pod.hotplug_dir).join(name);
        let mode = Mode::from_bits_truncate(0o666);
        mknod(&node, SFlag::S_IFBLK, mode, makedev(dev.0, dev.1)).unwrap();
        // mknod's mode is less the umask.
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666)).unwrap();
        self.libvirt.attach_device_flags(&self.xml(name, at), VIR_DOMAIN_AFFECT_LIVE).unwrap();
    }

    /// libvirt's own detach, and the node's end.
    fn unplug(&self, name: &str, at: usize) {
        self.libvirt.detach_device_flags(&self.xml(name, at), VIR_DOMAIN_AFFECT_LIVE).unwrap();
        fs::remove_file(Path::new(&self.pod.hotplug_dir).join(name)).unwrap();
    }

    fn xml(&self, name: &str, at: usize) -> String {
        let letter = |n: usize| char::from(b'a' + n as u8);
        // The guest's cdrom drive is sdz.
        let at = if at < 25 { at } else { at + 1 };
        let target = if at < 26 {
            letter(at).to_string()
        } else {
            format!("{}{}", letter(at / 26 - 1), letter(at % 26))
        };
        format!(
            "<disk type='block' device='disk'>
               <driver name='qemu' type='raw' cache='none' io='native' discard='unmap' error_policy='stop'/>
               <source dev='{}/{name}'/>
               <backingStore/>
               <target dev='sd{target}' bus='scsi'/>
               <serial>{name}</serial>
               <alias name='ua-bench-{name}'/>
               <address type='drive' controller='0' bus='0' target='{at}' unit='0'/>
             </disk>",
            self.pod.hotplug_dir_in_pod
        )
    }
}

impl Contender for Floor {
    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// Records for a login that scans nothing, as a host has that has been at the target before.
    fn prepare(&mut self, case: &Case) {
        for portal in PORTALS[..case.portals].iter().filter(|_| case.login) {
            self.iscsiadm(&["-p", portal, "-o", "new"]);
            let scan = ["-n", "node.session.scan", "-v", "manual"];
            self.iscsiadm(&[&["-p", portal, "-o", "update"], &scan[..]].concat());
        }
    }

    fn tidy_up(&mut self, case: &Case) {
        if case.login {
            self.iscsiadm(&["-o", "delete"]);
        }
    }

    fn attach(&mut self, case: &Case) -> Took {
        let begin = Instant::now();
        if case.login {
            self.iscsiadm(&["--login"]);
        }
        let luns = &self.luns[..case.at_once.into()];
        let attached: Vec<(Attached, Duration)> = at_once(luns, |at, lun| {
            let attached = self.attach_lun(lun, case.portals);
            let host = begin.elapsed();
            self.guests[at % case.vms].plug(&format!("lun{at}"), at, attached.dev);
            (attached, host)
        });
        let whole = begin.elapsed();
        let host = attached.iter().map(|(_, host)| *host).max().unwrap();
        self.attached = attached.into_iter().map(|(attached, _)| attached).collect();
        Took { host, whole }
    }

    fn detach(&mut self, case: &Case) -> Took {
        let begin = Instant::now();
        let attached = std::mem::take(&mut self.attached);
        let unplugged = at_once(&attached, |at, attached| {
            self.guests[at % case.vms].unplug(&format!("lun{at}"), at);
            let unplugged = begin.elapsed();
            self.detach_lun(attached);
            unplugged
        });
        if case.login {
            self.iscsiadm(&["--logout"]);
        }
        let whole = begin.elapsed();
        Took { host: whole - unplugged.into_iter().min().unwrap(), whole }
    }
}

/// Does something with each, in a thread for each.
fn at_once<T: Sync, R: Send>(all: &[T], work: impl Fn(usize, &T) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = &work;
        let begin = |(at, one)| scope.spawn(move || work(at, one));
        let threads: Vec<_> = all.iter().enumerate().map(begin).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn host_of(dir: &Path) -> u32 {
    let mut parts = dir.iter().rev();
    let host = parts.find_map(|part| part.to_str()?.strip_prefix("host")?.parse().ok());
    host.expect("a session is below its host")
}

fn number(event: &crate::uevents::Event) -> (u64, u64) {
    (event["MAJOR"].parse().unwrap(), event["MINOR"].parse().unwrap())
}

/// One command by multipathd's socket: a length with the closing NUL, and text, both ways.
fn multipathd(command: &str) -> String {
    let name = "/org/kernel/linux/storage/multipathd";
    let mut socket =
        UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    socket.write_all(&(command.len() + 1).to_ne_bytes()).unwrap();
    socket.write_all(format!("{command}\0").as_bytes()).unwrap();
    let mut length = [0; size_of::<usize>()];
    socket.read_exact(&mut length).unwrap();
    let mut answer = vec![0; usize::from_ne_bytes(length)];
    socket.read_exact(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).trim_end_matches('\0').to_owned()
}
