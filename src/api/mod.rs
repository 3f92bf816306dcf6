//! The gRPC service: validates, converts, maps errors, and nothing else.
