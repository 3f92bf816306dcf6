//! Processes and mounts, by /proc and pidfd.
