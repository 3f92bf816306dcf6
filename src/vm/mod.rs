//! One handler for each VM.
