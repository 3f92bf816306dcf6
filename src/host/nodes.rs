//! Device nodes, made and removed fd-relative beneath a pod's directory.
