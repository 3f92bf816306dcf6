//! One handler for each VM.

pub mod discover;
