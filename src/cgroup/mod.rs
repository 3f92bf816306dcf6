//! Device grants: which container may open which block device.
