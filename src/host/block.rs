//! Block devices by number: flush, exclusive probe, dm tables.
