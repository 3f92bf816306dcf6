//! Attaches a remote LUN to the host as one verified block device, and detaches it.
