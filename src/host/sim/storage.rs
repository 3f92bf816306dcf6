//! The simulated SAN and SCSI layer: targets, sessions, sysfs, uevents, multipathd.
