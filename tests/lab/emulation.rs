//! What emulated KVM does to guests (hack/lab/README.md), told from what lunplug does to them.

use crate::node::{run, sh};

/// hack/lab/stories looks for it.
const BROKEN: &str = "emulated KVM broke this guest";

/// What its kernel says at its end.
const CRASHES: [&str; 4] =
    ["Kernel panic - not syncing", "Oops: ", "BUG: ", "general protection fault"];

/// How emulation broke a guest; `None` where it did not, and on real hardware.
pub fn broken(pod: &str, domain: &str) -> Option<String> {
    if sh("systemd-detect-virt").stdout.trim() != "qemu" {
        return None;
    }
    let console = run("guest", &["console", pod, domain, "200"]).stdout;
    if let Some(line) = console.lines().find(|line| CRASHES.iter().any(|c| line.contains(c))) {
        return Some(format!("its kernel crashed: {line}"));
    }
    // The registers of the node's kernel in the guest's virtual CPU: its page tables lie beyond the
    // guest's memory, so it executes nothing any more.
    let query = ["virsh", pod, "qemu-monitor-command", domain, "--hmp", "info registers"];
    let cr3 = root_of_page_tables(&run("pod", &query).stdout)?;
    let memory = memory(&run("pod", &["virsh", pod, "dominfo", domain]).stdout)?;
    (cr3 >= memory).then(|| format!("CR3 is {cr3:#x}, and it has {memory:#x} bytes of memory"))
}

/// The address in CR3, of `CR0=... CR2=... CR3=000000010b85c000 CR4=...`.
fn root_of_page_tables(registers: &str) -> Option<u64> {
    let value = registers.split_whitespace().find_map(|word| word.strip_prefix("CR3="))?;
    // The lowest 12 bits are flags.
    Some(u64::from_str_radix(value, 16).ok()? & !0xfff)
}

/// In bytes, of `Max memory:     524288 KiB`.
fn memory(dominfo: &str) -> Option<u64> {
    let value = dominfo.lines().find_map(|line| line.strip_prefix("Max memory:"))?;
    Some(value.trim().strip_suffix(" KiB")?.parse::<u64>().ok()? << 10)
}

/// Tells of all guests that emulation broke.
pub fn tell_broken_guests() {
    for pod in sh("pod list").stdout.lines() {
        let domains = run("pod", &["virsh", pod, "list", "--name"]).stdout;
        for domain in domains.lines().filter(|line| !line.is_empty()) {
            if let Some(how) = broken(pod, domain) {
                println!("{BROKEN}: {domain} in pod {pod}: {how}");
            }
        }
    }
}

#[test]
fn registers_and_memory_are_read() {
    let registers =
        "RIP=ffffffffc07f80b0 RFL=00010246\nCR0=80050033 CR2=0 CR3=000000010b85c001 CR4=0";
    assert_eq!(root_of_page_tables(registers), Some(0x1_0b85_c000));
    assert_eq!(memory("Id: 1\nMax memory:     524288 KiB\nUsed memory: 1 KiB\n"), Some(512 << 20));
    assert_eq!((root_of_page_tables(""), memory("")), (None, None));
}
