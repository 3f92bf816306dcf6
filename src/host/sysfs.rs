//! Reading and writing /sys.
