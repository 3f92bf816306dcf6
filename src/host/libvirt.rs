//! libvirt's connection, events and calls.
