//! The simulated libvirt, QEMU and guests.
