//! What a volume costs, held against benches/budget.toml: allocations, calls on the host, fsyncs, and the
//! instructions of the pure parts. All are counted, none is a time, so each run counts the same.
//!
//! A value that has risen fails: either the change mends that, or it says why and writes the new value in,
//! `LUNPLUG_BUDGET=write cargo test --test budget`. One that has fallen by much fails too, so that what was
//! won is written in, and not lost again unseen.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, unsafe_code)]

#[path = "../benches/common/mod.rs"]
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::callgrind::Profile;
use common::domain::{disk, domain};
use common::{Stores, heap};
use lunplug::domain::diff::{self, Views};
use lunplug::domain::xml;
use lunplug::host::sim::SimHost;
use lunplug::spec::{AddOptions, FcSupport};
use lunplug::vm::facade::{Volumes, Wish};
use lunplug::vm::plan::fc::AfterLast;
use lunplug::vm::plan::{self, Known, Rules};
use lunplug::vm::registry::Registry;
use nix::libc;

#[global_allocator]
static HEAP: heap::Counting = heap::Counting;

static FSYNCS: AtomicU64 = AtomicU64::new(0);

/// In the place of libc's: SQLite and the standard library come by here.
///
/// # Safety
/// As fsync(2): any number may be given.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: libc::c_int) -> libc::c_int {
    FSYNCS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel checks the descriptor.
    unsafe { libc::syscall(libc::SYS_fsync, fd) as libc::c_int }
}

/// The same for fdatasync(2).
///
/// # Safety
/// As fdatasync(2): any number may be given.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: libc::c_int) -> libc::c_int {
    FSYNCS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel checks the descriptor.
    unsafe { libc::syscall(libc::SYS_fdatasync, fd) as libc::c_int }
}

/// Volumes over which the cost of one is taken.
const MANY: u32 = 16;

type Costs = BTreeMap<String, BTreeMap<String, u64>>;

#[test]
fn a_volume_costs_no_more_than_its_budget() {
    let mut costs = Costs::new();
    in_memory(&mut costs);
    in_files(&mut costs);
    pure(&mut costs);
    instructions(&mut costs);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/budget.toml");
    if std::env::var_os("LUNPLUG_BUDGET").is_some_and(|wish| wish == "write") {
        std::fs::write(&path, render(&costs)).unwrap();
        return;
    }
    let budget: Costs = toml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let differs = compare(&budget, &costs);
    assert!(
        differs.is_empty(),
        "benches/budget.toml says otherwise; where the change has a reason for it, write it in by LUNPLUG_BUDGET=write cargo test --test budget:\n{}",
        differs.join("\n")
    );
}

/// By how much a value may differ from the budget unremarked, in percent: upwards, and downwards.
fn tolerance(unit: &str) -> (u64, u64) {
    match unit {
        // The same each time, whatever the machine.
        "host_calls" | "fsyncs" => (0, 0),
        // Allocations: by what other threads do meanwhile. Instructions: string functions differ by the processor.
        _ => (5, 15),
    }
}

fn compare(budget: &Costs, costs: &Costs) -> Vec<String> {
    let mut differs = Vec::new();
    for (what, units) in costs {
        for (unit, &is) in units {
            let Some(&may) = budget.get(what).and_then(|units| units.get(unit)) else {
                differs.push(format!("{what}: {unit}: {is}, and no budget"));
                continue;
            };
            let (up, down) = tolerance(unit);
            let (is_100, may_100) = (is * 100, may * 100);
            if is_100 > may_100 + may * up {
                differs.push(format!("{what}: {unit}: {is}, and {may} was budgeted"));
            } else if is_100 + may * down < may_100 {
                differs.push(format!("{what}: {unit}: {is}, down from {may}"));
            }
        }
    }
    for (what, units) in budget {
        for unit in units.keys() {
            // Without valgrind there are none.
            let counted = costs.get(what).is_some_and(|units| units.contains_key(unit));
            if !counted && unit != "instructions" {
                differs.push(format!("{what}: {unit}: budgeted, and not counted any more"));
            }
        }
    }
    differs
}

fn render(costs: &Costs) -> String {
    let mut text = String::from(
        "# What a volume costs; `cargo test --test budget` compares, and tests/budget.rs says how and how to\n\
         # change it. Each is of one volume, the mean of 16. Allocations have the simulated\n\
         # host's in them; instructions are those of the dev profile.\n",
    );
    for (what, units) in costs {
        writeln!(text, "\n[{what}]").unwrap();
        for (unit, value) in units {
            writeln!(text, "{unit} = {value}").unwrap();
        }
    }
    text
}

fn note(costs: &mut Costs, what: &str, unit: &str, value: u64) {
    costs.entry(what.into()).or_default().insert(unit.into(), value);
}

/// What one of many costs, rounded up.
fn each(total: u64) -> u64 {
    total.div_ceil(MANY.into())
}

/// What is counted of a stretch of work.
struct Counts<'a> {
    host: &'a SimHost,
    allocations: u64,
    calls: usize,
    fsyncs: u64,
}

impl<'a> Counts<'a> {
    fn begin(host: &'a SimHost) -> Self {
        let (allocations, calls) = (heap::allocations(), host.faults.calls());
        Self { host, allocations, calls, fsyncs: FSYNCS.load(Ordering::Relaxed) }
    }

    fn allocations(&self) -> u64 {
        heap::allocations() - self.allocations
    }

    fn calls(&self) -> u64 {
        (self.host.faults.calls() - self.calls) as u64
    }

    fn fsyncs(&self) -> u64 {
        FSYNCS.load(Ordering::Relaxed) - self.fsyncs
    }
}

/// A registered VM on a node of two, with a volume of the other so that the target is logged in to.
async fn daemon(host: &SimHost, dir: &Path, stores: Stores) -> std::sync::Arc<Registry> {
    let registry = common::start(host, &common::config(dir, 2), stores).await;
    for number in [0, 1] {
        registry.register_vm(common::vm_spec(number)).await.unwrap();
    }
    // The first of anything makes what the later ones find.
    common::add(&registry, &common::vm(1), common::lun(0, 300)).await;
    common::add(&registry, &common::vm(0), common::lun(0, 301)).await;
    registry
}

/// Volumes one by one, with both stores in memory and the clock paused: no thread runs but this one and
/// SQLite's, which is waited for.
fn in_memory(costs: &mut Costs) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let (host, dir) = (common::node(2), tempfile::tempdir().unwrap());
    runtime.unwrap().block_on(async {
        let registry = daemon(&host, dir.path(), Stores::Memory).await;
        let vm = common::vm(0);
        let counts = Counts::begin(&host);
        for number in 0..MANY {
            common::add(&registry, &vm, common::lun(0, number)).await;
        }
        note(costs, "add", "allocations", each(counts.allocations()));
        note(costs, "add", "host_calls", each(counts.calls()));
        let counts = Counts::begin(&host);
        for number in 0..MANY {
            common::remove(&registry, &vm, &common::lun(0, number)).await;
        }
        note(costs, "remove", "allocations", each(counts.allocations()));
        note(costs, "remove", "host_calls", each(counts.calls()));
    });
}

/// Volumes one by one, and in one request, with the stores in files.
fn in_files(costs: &mut Costs) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (host, dir) = (common::node(2), tempfile::tempdir().unwrap());
    runtime.block_on(async {
        let registry = daemon(&host, dir.path(), Stores::Files).await;
        let vm = common::vm(0);
        let counts = Counts::begin(&host);
        for number in 0..MANY {
            common::add(&registry, &vm, common::lun(0, number)).await;
        }
        note(costs, "add", "fsyncs", each(counts.fsyncs()));
        let counts = Counts::begin(&host);
        for number in 0..MANY {
            common::remove(&registry, &vm, &common::lun(0, number)).await;
        }
        note(costs, "remove", "fsyncs", each(counts.fsyncs()));
        let counts = Counts::begin(&host);
        let wish = |number| {
            let spec = Box::new(common::lun(0, number));
            Wish::Add { spec, options: AddOptions::default() }
        };
        let answers =
            registry.change_volumes(&vm, (MANY..2 * MANY).map(wish).collect()).await.unwrap();
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        for number in MANY..2 * MANY {
            common::ready(&registry, &vm, &common::lun(0, number)).await;
        }
        note(costs, "add_16_in_one_request", "fsyncs", counts.fsyncs());
    });
}

/// What is computed beside 256 volumes.
struct Beside {
    text: String,
    views: Views,
    known: Vec<Known>,
}

const RULES: Rules = Rules {
    max_volumes: 1000,
    require_wwid: false,
    reservations: false,
    fc: FcSupport::Unspecified,
    after_last_fc: AfterLast::Keep,
};

impl Beside {
    fn many() -> Self {
        let text = domain(256);
        let views = Views { live: Some(Arc::new(xml::parse(&text).unwrap())), config: None };
        let known = |n| Known { spec: common::lun(0, n).into(), failed: false, removing: None };
        Self { views, known: (0..256).map(known).collect(), text }
    }
}

type Work = fn(&Beside);

const PURE: [(&str, Work); 3] = [
    ("xml_read_of_256_disks", xml_read),
    ("plan_of_a_disk_beside_256", plan_of_a_disk),
    ("admission_beside_256", admission),
];

#[inline(never)]
fn xml_read(beside: &Beside) {
    black_box(xml::parse(black_box(&beside.text)).unwrap());
}

#[inline(never)]
fn plan_of_a_disk(beside: &Beside) {
    black_box(diff::plan(black_box(&beside.views), &disk("new"), &BTreeSet::new()).unwrap());
}

#[inline(never)]
fn admission(beside: &Beside) {
    let new = common::lun(0, 1000);
    black_box(plan::admit_add(black_box(&beside.known), &new, RULES).unwrap());
}

fn pure(costs: &mut Costs) {
    let beside = Beside::many();
    for (name, work) in PURE {
        let before = heap::allocations();
        work(&beside);
        note(costs, name, "allocations", heap::allocations() - before);
    }
}

/// Which of [`PURE`] to do once, for whoever counts its instructions.
const ONE: &str = "LUNPLUG_BUDGET_ONE";

#[test]
#[ignore = "is run by the test of the budget, under callgrind"]
fn one_pure_part() {
    let name = std::env::var(ONE).unwrap();
    let (_, work) = PURE.into_iter().find(|(known, _)| *known == name).unwrap();
    let beside = Beside::many();
    Profile::begin();
    counted(work, &beside);
}

#[inline(never)]
fn counted(work: Work, beside: &Beside) {
    work(black_box(beside));
}

fn instructions(costs: &mut Costs) {
    for (name, _) in PURE {
        let arguments = ["--ignored", "--exact", "one_pure_part"];
        match Profile::of(&arguments, &[(ONE, name)], "budget::counted") {
            Some(profile) => note(costs, name, "instructions", profile.entered("budget::counted")),
            None => return eprintln!("valgrind is not installed: instructions are not counted"),
        }
    }
}
