//! What the stories of a failing SAN share: short timeouts, and a guest that goes on writing.

use std::time::Duration;

use crate::node::{Lun, add, guest_disk, in_guest, remove, sh, until, volume};

/// Longer than anything here takes with [`Brisk`] settings.
pub const SOON: Duration = Duration::from_secs(60);

/// lunplugd and multipathd with short timeouts, for as long as it lives: a dead path is noticed
/// within seconds. Sessions of volumes that are added meanwhile have them.
pub struct Brisk(());

const DROP_IN: &str = "/run/systemd/system/lunplugd.service.d/brisk.conf";
const MULTIPATH: &str = "/etc/multipath/conf.d/brisk.conf";

impl Brisk {
    /// I/O without a path is queued for some five seconds: for what is to fail.
    #[track_caller]
    pub fn new() -> Self {
        Self::queueing(5)
    }

    /// It is queued for longer than a story takes: for what is to wait, however slow the node is.
    #[track_caller]
    pub fn patient() -> Self {
        Self::queueing(600)
    }

    /// Ends the patience of all maps that are there.
    #[track_caller]
    pub fn loses_patience(&self) {
        sh(&format!(
            "sed -i 's/no_path_retry .*/no_path_retry 5/' {MULTIPATH}; multipathd reconfigure"
        ))
        .ok();
    }

    #[track_caller]
    fn queueing(checks: u32) -> Self {
        let brisk = Self(());
        sh(&format!(
            "mkdir -p $(dirname {DROP_IN}) $(dirname {MULTIPATH})
            printf '%s\\n' '[Service]' \
                Environment=LUNPLUG_ISCSI_NOOP_INTERVAL=1s \
                Environment=LUNPLUG_ISCSI_NOOP_TIMEOUT=1s \
                Environment=LUNPLUG_ISCSI_REPLACEMENT_TIMEOUT_MULTIPATH=1s \
                Environment=LUNPLUG_ISCSI_LOGIN_TIMEOUT=2s \
                Environment=LUNPLUG_ISCSI_LOGIN_RETRIES=1 \
                Environment=LUNPLUG_DEADLINES_MULTIPATHD=3s \
                Environment=LUNPLUG_DEADLINES_KERNEL_CALL=20s \
                Environment=LUNPLUG_DEADLINES_AGENT=20s >{DROP_IN}
            printf '%s\\n' 'defaults {{' ' polling_interval 1' ' max_polling_interval 1' \
                ' no_path_retry {checks}' ' fast_io_fail_tmo 1' '}}' >{MULTIPATH}"
        ))
        .ok();
        restart_both();
        brisk
    }
}

fn restart_both() {
    sh("systemctl daemon-reload; systemctl reset-failed lunplugd multipathd
        systemctl restart multipathd; systemctl restart lunplugd")
    .ok();
}

impl Drop for Brisk {
    fn drop(&mut self) {
        sh(&format!(
            "rm -f {DROP_IN} {MULTIPATH}; rmdir /etc/multipath/conf.d 2>/dev/null || true"
        ));
        restart_both();
    }
}

/// A fault that is ended at the latest when the story ends.
pub struct Fault {
    end: Option<String>,
}

impl Fault {
    /// Begins it by a line of shell; `end` is the line that ends it.
    #[track_caller]
    pub fn new(begin: &str, end: &str) -> Self {
        let fault = Self { end: Some(end.into()) };
        sh(begin).ok();
        fault
    }

    /// No packet of a portal passes.
    #[track_caller]
    pub fn dead(portal: &str) -> Self {
        Self::new(
            &format!("target portal drop {portal}"),
            &format!("target portal restore {portal}"),
        )
    }

    /// A program's processes are stopped.
    #[track_caller]
    pub fn stopped(program: &str) -> Self {
        let all = format!("kill -STOP $(pidof {program})");
        Self::new(&all, &format!("kill -CONT $(pidof {program})"))
    }

    #[track_caller]
    pub fn end(mut self) {
        let end = self.end.take().expect("it has not ended yet");
        sh(&end).ok();
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        if let Some(end) = self.end.take() {
            sh(&end);
        }
    }
}

/// A volume whose guest writes to it all the time: each block of 512 bytes has its number, and is
/// written again until the disk took it. What was taken must be what the array has in the end.
pub struct Writer {
    name: String,
}

/// So many blocks are written in turn.
const BLOCKS: usize = 64;

impl Writer {
    /// Adds a volume and begins to write to it.
    #[track_caller]
    pub fn begin(name: &str, lun: &Lun) -> Self {
        add(name, &lun.source(), &[]).ok();
        Self::on(name)
    }

    /// Begins to write to a volume that is there.
    #[track_caller]
    pub fn on(name: &str) -> Self {
        let writer = Self { name: name.into() };
        writer.write_to(&guest_disk(name).name);
        writer
    }

    fn write_to(&self, disk: &str) {
        let at = format!("/run/writer-{}", self.name);
        // Without the disk dd would make a file of that name, in the place of the next disk's node.
        let line = format!(
            "mkdir -p {at}; rm -f {at}/*; echo 0 >{at}/errors; (i=0; while [ ! -e {at}/stop ] && [ -b /dev/{disk} ]; do
                if printf '%-511s\\n' \"{name} $i\" | dd of=/dev/{disk} bs=512 count=1 \
                    seek=$((i % {BLOCKS})) iflag=fullblock oflag=direct conv=notrunc
                then echo $i >{at}/new && mv {at}/new {at}/done; i=$((i + 1))
                else echo $(($(cat {at}/errors) + 1)) >{at}/errors; sleep 1; fi
            done; touch {at}/ended) >/dev/null 2>&1 </dev/null &",
            name = self.name
        );
        in_guest(&line).ok();
        until("the guest writes", SOON, || self.done().is_some());
    }

    fn number(&self, file: &str) -> Option<u64> {
        in_guest(&format!("cat /run/writer-{}/{file}", self.name)).stdout.trim().parse().ok()
    }

    /// The number of the last block that was taken.
    fn done(&self) -> Option<u64> {
        self.number("done")
    }

    /// How often a write failed.
    #[track_caller]
    pub fn errors(&self) -> u64 {
        self.number("errors").expect("the writer keeps count")
    }

    /// Waits until more is written than was at the call.
    #[track_caller]
    pub fn goes_on(&self, why: &str) -> Duration {
        let before = self.done().expect("it has begun");
        // One write may have been under way before whatever it was that happened.
        until(why, SOON, || self.done().is_some_and(|now| now > before + 1))
    }

    /// Ends the writing and compares the array's data with what was written.
    #[track_caller]
    pub fn end(self, lun: &Lun) {
        let at = format!("/run/writer-{}", self.name);
        in_guest(&format!("touch {at}/stop")).ok();
        until("the writer ends", SOON, || in_guest(&format!("test -e {at}/ended")).code == 0);
        let last = usize::try_from(self.done().expect("it has begun")).expect("small");
        let data = lun.read(BLOCKS * 512);
        for number in (last + 1).saturating_sub(BLOCKS)..=last {
            let block = &data[(number % BLOCKS) * 512..][..512];
            let expected = format!("{:<511}\n", format!("{} {number}", self.name));
            let found = String::from_utf8_lossy(block);
            assert!(block == expected.as_bytes(), "block {number} of {last}: {:?}", found.trim());
        }
        println!(
            "{}: {last} blocks, {} errors",
            self.name,
            in_guest(&format!("cat {at}/errors")).stdout.trim()
        );
    }

    /// The same, and removes the volume.
    #[track_caller]
    pub fn finish(self, lun: &Lun) {
        let name = self.name.clone();
        self.end(lun);
        remove(&name, &[]).ok();
    }
}

/// In a story that fails it ends before the volumes are taken away.
impl Drop for Writer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            in_guest(&format!("touch /run/writer-{}/stop", self.name));
        }
    }
}

/// How many paths of a LUN's map multipathd finds alive.
pub fn living_paths(lun: &Lun) -> usize {
    let wwid = lun.wwid.trim_start_matches("naa.");
    let shown = sh("multipathd show paths raw format '%w %t'").stdout;
    shown.lines().filter(|l| l.contains(wwid) && l.contains("active")).count()
}

/// Both paths of the LUN are alive, and lunplug says so.
#[track_caller]
pub fn is_whole(name: &str, lun: &Lun) {
    until("both paths are alive", SOON, || living_paths(lun) == 2);
    assert_eq!(volume(name)["phase"], "Ready");
    // It looks when the kernel tells that something changed.
    until("lunplug says so", SOON, || volume(name)["device"]["paths"] == 2);
}
