//! lunplugd.

fn main() {}
