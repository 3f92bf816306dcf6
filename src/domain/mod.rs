//! The libvirt domain: reading its XML, planning a change, applying it.
