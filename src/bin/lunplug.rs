//! lunplug.

fn main() {}
