//! bpf(2), for the device grants of cgroup v2.
