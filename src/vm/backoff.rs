//! When a volume in trouble is tried again.

use std::time::Duration;

/// When a volume in trouble is tried again.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// After the first failure.
    pub first: Duration,
    /// The longest wait.
    pub cap: Duration,
}

impl Backoff {
    /// The wait after `attempts` failures, doubled each time, less up to a fifth of it so that many
    /// volumes do not come back at the same instant. `dice` is in 0..1.
    pub(super) fn delay(self, attempts: u32, dice: f64) -> Duration {
        let doubled = self.first.saturating_mul(1 << attempts.saturating_sub(1).min(16));
        doubled.min(self.cap).mul_f64(1.0 - dice * 0.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_cap_and_jitter_only_shortens() {
        let backoff = Backoff { first: Duration::from_secs(1), cap: Duration::from_secs(60) };
        let whole: Vec<u64> = (1..9).map(|n| backoff.delay(n, 0.0).as_secs()).collect();
        assert_eq!(whole, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff.delay(u32::MAX, 1.0), Duration::from_secs(48));
    }
}
