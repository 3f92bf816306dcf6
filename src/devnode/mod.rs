//! The volume's block node in the VM pod's hotplug directory.
