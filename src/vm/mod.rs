//! One handler for each VM.

pub mod facade;
