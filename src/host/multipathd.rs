//! The multipath daemon, spoken to over its socket.
