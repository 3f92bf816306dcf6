//! The commands of `lunplug`, one file each.
