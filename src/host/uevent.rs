//! Kernel uevents over netlink.
