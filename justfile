# The recipes that CI runs too; `just` lists them.

_default:
    @just --list

# Format, lint, licences and advisories
check:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
    cargo deny check

# Tests that need nothing but cargo (root tests skip themselves)
unit:
    cargo test

# Tests that need root: real mknod, cgroups and BPF on this machine
root:
    sudo -E env "PATH=$PATH" cargo test root_

# Everything, the lab's tests included
test:
    hack/test

# The main job, shown step by step in the lab
demo:
    hack/demo

# A daemon on a simulated host, for trying the API: no SAN, no VM, no root
sim:
    cargo run --bin lunplugd -- --sim --run-dir /tmp/lunplug-sim/run --state-dir /tmp/lunplug-sim/state
