//! One handler for each VM.

pub mod facade;
pub mod failure;
pub mod plan;
pub mod publish;
