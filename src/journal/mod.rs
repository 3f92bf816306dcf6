//! The two stores: desired state (durable) and effects (this boot's).
