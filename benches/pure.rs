//! What one more volume costs beside those that are there: the pure parts, and the durable store.
//!
//! Each is measured beside 1, 64 and 256 volumes, so that it shows how it grows. `cargo bench --bench pure`;
//! docs/performance.md has results.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, unsafe_code)]

#[path = "common/mod.rs"]
mod common;

use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;

use common::domain::{disk, domain};
use common::lun;
use criterion::{Criterion, criterion_group, criterion_main};
use lunplug::cgroup::Grants;
use lunplug::domain::diff::{self, Views};
use lunplug::domain::xml;
use lunplug::host::grants::{Access, CgroupRef, Hierarchy};
use lunplug::host::sim::SimHost;
use lunplug::journal::{Desired, StoredVolume};
use lunplug::spec::{FcSupport, VmPlace, VmSpec};
use lunplug::types::{DevNum, VolumeKey};
use lunplug::vm::plan::fc::AfterLast;
use lunplug::vm::plan::{self, Known, Rules};

const BESIDE: [u32; 3] = [1, 64, 256];

/// The name of a measurement beside so many volumes.
fn id(what: &str, beside: u32) -> String {
    format!("{what}/{beside}")
}

/// A look reads the domain's XML and compares each disk; an attach does so and finds a place.
fn domain_xml(c: &mut Criterion) {
    let none = BTreeSet::new();
    for disks in BESIDE {
        let text = domain(disks);
        let views = Views { live: Some(Arc::new(xml::parse(&text).unwrap())), config: None };
        c.bench_function(&id("xml read", disks), |b| {
            b.iter(|| xml::parse(black_box(&text)).unwrap());
        });
        let (new, last) = (disk("new"), disk(&format!("v{}", disks - 1)));
        c.bench_function(&id("plan of a new disk", disks), |b| {
            b.iter(|| diff::plan(black_box(&views), &new, &none).unwrap());
        });
        c.bench_function(&id("comparison of a disk", disks), |b| {
            b.iter(|| diff::plan(black_box(&views), &last, &none).unwrap());
        });
    }
}

fn admission(c: &mut Criterion) {
    let rules = Rules {
        max_volumes: 1000,
        require_wwid: false,
        reservations: false,
        fc: FcSupport::default(),
        after_last_fc: AfterLast::default(),
    };
    for beside in BESIDE {
        let known: Vec<Known> = (0..beside)
            .map(|n| Known { spec: lun(0, n).into(), failed: false, removing: None })
            .collect();
        let new = lun(0, 1000);
        c.bench_function(&id("admission", beside), |b| {
            b.iter(|| plan::admit_add(black_box(&known), &new, rules).unwrap());
        });
    }
}

/// A wish made durable and forgotten again: two transactions with their fsyncs.
fn journal(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let vm: lunplug::types::VmId = "default/vm".parse().unwrap();
    for beside in BESIDE {
        let dir = tempfile::tempdir().unwrap();
        let store = Desired::open(&dir.path().join("lunplug.db")).unwrap();
        let stored =
            |n| StoredVolume { spec: lun(0, n).into(), accept_new_identity: false, removing: None };
        let there: Vec<StoredVolume> = (0..beside).map(stored).collect();
        let spec = VmSpec {
            id: vm.clone(),
            domain: "default_vm".into(),
            place: VmPlace::Host { libvirt_socket: None },
            fc: FcSupport::default(),
        };
        runtime.block_on(async {
            store.put_vm(&spec).await.unwrap();
            store.put_volumes(&vm, &there, false).await.unwrap();
        });
        let new = stored(1000);
        let key = VolumeKey { vm: vm.clone(), volume: new.spec.name.clone() };
        c.bench_function(&id("journal", beside), |b| {
            b.iter(|| {
                runtime.block_on(async {
                    store.put_volume(&vm, &new).await.unwrap();
                    store.delete_volume(&key, false).await.unwrap();
                });
            });
        });
    }
}

/// Whether a grant is in force, and whether all of a VM's are: what a look asks.
fn grants(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let host = SimHost::default();
    let doors = host.pods.doors();
    let grants = Grants::new(doors.overrides.clone(), doors.lists.clone());
    let cgroup = CgroupRef { path: "/sys/fs/cgroup/bench".into(), hierarchy: Hierarchy::V2, id: 1 };
    runtime.block_on(async { grants.install().await.unwrap() });
    let mut made = Vec::new();
    for beside in BESIDE {
        while made.len() < beside as usize {
            let dev = DevNum { major: 253, minor: u32::try_from(made.len()).unwrap() };
            runtime.block_on(async {
                let record = grants.prepare(&cgroup, dev, Access::READ_WRITE).await.unwrap();
                grants.grant(&record).await.unwrap();
                made.push(record);
            });
        }
        let (one, all) = (&made[..1], &made[..]);
        c.bench_function(&id("grant lookup", beside), |b| {
            b.iter(|| runtime.block_on(grants.hold(black_box(one))).unwrap());
        });
        c.bench_function(&id("grants of a VM", beside), |b| {
            b.iter(|| runtime.block_on(grants.hold(black_box(all))).unwrap());
        });
    }
}

criterion_group!(benches, domain_xml, admission, journal, grants);
criterion_main!(benches);
