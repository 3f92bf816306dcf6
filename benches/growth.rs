//! How the cost of one more volume grows with those that are there, in instructions, which are the same
//! each time: a volume is added to a VM that has none, and to one that has 255.
//!
//! Callgrind counts what is done between the request and the ready disk. What the simulated host does is
//! taken off, and what is left is lunplug's own; so are the durable store's threads, which the bench `pure`
//! has. Needs valgrind; without it, this says so and measures nothing.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    missing_docs,
    unreachable_pub,
    unsafe_code
)]

#[path = "common/mod.rs"]
mod common;

use common::Stores;
use common::callgrind::Profile;
use common::table::{Limit, row};
use lunplug::vm::facade::Volumes;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|a| a == "--beside") {
        return add_beside(arguments[at + 1].parse().unwrap());
    }
    let Some(first) = own(0) else {
        return eprintln!("valgrind is not installed: growth is not measured");
    };
    let last = own(255).expect("it was there");
    let say = |what, value: u64| row("growth", what, value as f64, "instructions", Limit::None);
    say("the 1st volume of a VM: own share", first);
    say("the 256th volume of a VM: own share", last);
    let ratio = last as f64 / first as f64;
    row("growth", "the 256th volume against the 1st", ratio, "times", Limit::AtMost(1.2));
}

fn own(beside: u32) -> Option<u64> {
    let profile = Profile::of(&["--beside", &beside.to_string()], &[], "growth::measured")?;
    // What is done within a look at /sys is called by the simulated host, and is not its own.
    Some(profile.without("lunplug::host::sim::", "lunplug::host::sysfs::look::"))
}

/// Adds a volume to a VM that has so many.
fn add_beside(beside: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().start_paused(true).build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (host, vm, other) = (common::node(2), common::vm(0), common::vm(1));
    let registry = runtime.block_on(async {
        let registry = common::start(&host, &common::config(dir.path(), 2), Stores::Memory).await;
        for number in [0, 1] {
            registry.register_vm(common::vm_spec(number)).await.unwrap();
        }
        // The target is logged in to in both cases.
        common::add(&registry, &other, common::lun(0, 300)).await;
        for number in 0..beside {
            common::add(&registry, &vm, common::lun(0, number)).await;
        }
        registry
    });
    Profile::begin();
    measured(&runtime, async {
        common::add(&registry, &vm, common::lun(0, 255)).await;
    });
}

#[inline(never)]
fn measured(runtime: &tokio::runtime::Runtime, work: impl Future<Output = ()>) {
    runtime.block_on(work);
}
