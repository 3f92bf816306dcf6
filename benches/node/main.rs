//! A node with 1000 VMs of 10 volumes each: memory, idle CPU, bursts, watchers and a restart.
//!
//! The daemon runs as a process of its own, over its gRPC socket, with SQLite and the run directory as on
//! a real node; SAN, pods and libvirt are simulated within it, so its memory and CPU have those in them.
//! One JSON object a line is what was measured, on standard output; what goes on is told on the other.
//!
//! `cargo bench --bench node -- [--vms N] [--idle SECONDS]`
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    missing_docs,
    unreachable_pub,
    unsafe_code
)]

#[path = "../common/mod.rs"]
mod common;

mod clients;
mod measure;
mod serve;

use std::path::Path;
use std::time::{Duration, Instant};

use clients::{Clients, Watchers};
use common::table::{self, Limit};
use measure::{Daemon, MIB};

#[global_allocator]
static HEAP: common::heap::Counting = common::heap::Counting;

/// Tells a value.
fn row(what: &str, value: f64, unit: &str, limit: Limit) {
    table::row("node", what, value, unit, limit);
}

/// Volumes of a VM.
const VOLUMES: u32 = 10;
/// Clients that watch.
const WATCHERS: usize = 100;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str, default: u32| {
        let at = arguments.iter().position(|a| a == name);
        at.map_or(default, |at| arguments[at + 1].parse().unwrap())
    };
    let vms = value("--vms", 1000);
    if let Some(at) = arguments.iter().position(|a| a == "--serve") {
        return serve::run(Path::new(&arguments[at + 1]), vms);
    }
    // So long that each volume is looked at: of more than 1200 each less often than once a minute.
    let idle = Duration::from_secs(value("--idle", (vms * VOLUMES * 60 / 1200).max(60)).into());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(bench(vms, idle));
}

async fn bench(vms: u32, idle: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(dir.path(), vms);
    let empty = daemon.rss();
    row("simulated node alone: RSS", empty / MIB, "MiB", Limit::None);
    let clients = Clients::connect(&dir.path().join("lunplugd.sock")).await;

    let begin = Instant::now();
    clients.register(vms).await;
    row("register a VM", begin.elapsed().as_secs_f64() * 1e3 / f64::from(vms), "ms", Limit::None);
    let begin = Instant::now();
    clients.add_to_each(vms, 0..VOLUMES - 1).await;
    clients.all_ready(vms * (VOLUMES - 1)).await;
    let each = begin.elapsed().as_secs_f64() * 1e3 / f64::from(vms * (VOLUMES - 1));
    row("a volume, in batches of 9: host and all", each, "ms", Limit::None);

    burst(&clients, &mut daemon, vms).await;
    at_rest(&mut daemon, idle).await;
    fan_out(&clients, &mut daemon, dir.path(), vms).await;
    drop(clients);
    restart(&mut daemon, dir.path(), vms * VOLUMES).await;
    daemon.quit();
}

/// One volume more for each VM, all asked for at once.
async fn burst(clients: &Clients, daemon: &mut Daemon, vms: u32) {
    let memory = Memory::begin(daemon);
    let begin = Instant::now();
    let slowest = clients.add_one_to_each(vms, VOLUMES - 1).await;
    let durable = begin.elapsed();
    clients.all_ready(vms * VOLUMES).await;
    let ready = begin.elapsed();
    row(&format!("{vms} adds at once: all durable after"), durable.as_secs_f64(), "s", Limit::None);
    row(&format!("{vms} adds at once: slowest answer"), slowest.as_secs_f64(), "s", Limit::None);
    row(&format!("{vms} adds at once: all ready after"), ready.as_secs_f64(), "s", Limit::None);
    memory.rows(daemon, &format!("{vms} adds at once"));
}

/// Memory before something, for what it takes at its peak.
struct Memory {
    rss: f64,
}

impl Memory {
    fn begin(daemon: &mut Daemon) -> Self {
        daemon.forget_peak();
        daemon.tell("heap");
        Self { rss: daemon.rss() }
    }

    /// What stays is in the heap afterwards, too: what was passing is the rest.
    fn rows(&self, daemon: &mut Daemon, what: &str) {
        let more = daemon.peak_rss() - self.rss;
        row(&format!("{what}: RSS more at the peak"), more / MIB, "MiB", Limit::None);
        let [after, peak] = daemon.tell("heap")[..] else { panic!("two numbers") };
        let what = format!("{what}: heap more at the peak than after");
        row(&what, (peak - after) / MIB, "MiB", Limit::AtMost(64.0));
    }
}

/// Memory and CPU when nothing happens.
async fn at_rest(daemon: &mut Daemon, idle: Duration) {
    // The looks at volumes that came to be ready are over after five seconds, and then spread.
    tokio::time::sleep(Duration::from_secs(15)).await;
    row("at rest: RSS, the simulated node included", daemon.rss() / MIB, "MiB", Limit::None);
    let in_use = daemon.tell("heap")[0];
    row("at rest: heap in use, the simulated node included", in_use / MIB, "MiB", Limit::None);
    let (cpu, begin) = (daemon.cpu(), Instant::now());
    tokio::time::sleep(idle).await;
    let share = (daemon.cpu() - cpu).as_secs_f64() / begin.elapsed().as_secs_f64() * 100.0;
    row("at rest: CPU, the simulated node included", share, "% of a core", Limit::AtMost(0.5));
}

async fn fan_out(clients: &Clients, daemon: &mut Daemon, dir: &Path, vms: u32) {
    let memory = Memory::begin(daemon);
    let begin = Instant::now();
    let mut watchers = Watchers::connect(&dir.join("lunplugd.sock"), WATCHERS, vms * VOLUMES).await;
    row("100 watchers: all have their list after", begin.elapsed().as_secs_f64(), "s", Limit::None);
    row("100 watchers: bytes of a list", watchers.list_bytes() / MIB, "MiB", Limit::AtMost(4.0));
    memory.rows(daemon, "100 watchers");

    let begin = Instant::now();
    clients.limit(0, 0).await;
    watchers.all_saw(1).await;
    row(
        "100 watchers: one change is with all after",
        begin.elapsed().as_secs_f64() * 1e3,
        "ms",
        Limit::None,
    );

    let (memory, begin) = (Memory::begin(daemon), Instant::now());
    clients.remove_one_of_each(vms, VOLUMES - 1).await;
    watchers.all_know(vms * (VOLUMES - 1)).await;
    row(
        &format!("100 watchers, {vms} removals: all know after"),
        begin.elapsed().as_secs_f64(),
        "s",
        Limit::None,
    );
    row(
        &format!("100 watchers, {vms} removals: lists sent anew"),
        watchers.lists_anew(),
        "",
        Limit::None,
    );
    memory.rows(daemon, &format!("100 watchers, {vms} removals"));
    drop(watchers);
    clients.add_one_to_each(vms, VOLUMES - 1).await;
    clients.all_ready(vms * VOLUMES).await;
}

async fn restart(daemon: &mut Daemon, dir: &Path, volumes: u32) {
    let own = daemon.tell("restart");
    let begin = Instant::now();
    let [freed, serving] = own[..] else { panic!("two numbers: {own:?}") };
    row("own heap with all volumes", freed / MIB, "MiB", Limit::AtMost(64.0));
    row("restart: serving after", serving, "s", Limit::AtMost(2.0));
    let clients = Clients::connect(&dir.join("lunplugd.sock")).await;
    let troubles = clients.all_ready(volumes).await;
    let ready = serving + begin.elapsed().as_secs_f64();
    row("restart: every volume found as it should be after", ready, "s", Limit::None);
    row("restart: volumes that were in trouble meanwhile", troubles.into(), "", Limit::AtMost(0.0));
    row("after the restart: RSS", daemon.rss() / MIB, "MiB", Limit::None);
}
