//! OFD locks and small state files under /run/lunplug.
