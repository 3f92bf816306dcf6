//! One value for each key, for as long as somebody uses it.

use std::collections::HashMap;
use std::sync::Arc;

/// With fewer values than this nothing is forgotten.
const FEW: usize = 256;

/// The values that are in use, and some that were.
pub(super) struct Keyed<V> {
    values: HashMap<String, Arc<V>>,
    /// With so many the unused ones are forgotten.
    sweep_at: usize,
}

impl<V> Default for Keyed<V> {
    fn default() -> Self {
        Self { values: HashMap::new(), sweep_at: FEW }
    }
}

impl<V> Keyed<V> {
    /// The value that everybody who uses this key has.
    pub(super) fn get(&mut self, key: &str, make: impl FnOnce() -> V) -> Arc<V> {
        if let Some(known) = self.values.get(key) {
            return known.clone();
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|_, value| Arc::strong_count(value) > 1);
            // Not at each call when there are many in use.
            self.sweep_at = FEW.max(2 * self.values.len());
        }
        let value = Arc::new(make());
        self.values.insert(key.to_owned(), value.clone());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_is_one_and_the_rest_is_forgotten_in_time() {
        let mut keyed = Keyed::default();
        let used = keyed.get("used", || 7);
        for n in 0..10 * FEW {
            keyed.get(&n.to_string(), || n);
            assert!(keyed.values.len() <= FEW);
        }
        assert!(Arc::ptr_eq(&used, &keyed.get("used", || 8)));
        let many: Vec<_> = (0..2 * FEW).map(|n| keyed.get(&format!("m{n}"), || n)).collect();
        assert!(many.iter().enumerate().all(|(n, value)| **value == n));
        drop(many);
        (0..4 * FEW).for_each(|n| drop(keyed.get(&format!("x{n}"), || n)));
        assert!(keyed.values.len() <= 4 * FEW, "{}", keyed.values.len());
    }
}
