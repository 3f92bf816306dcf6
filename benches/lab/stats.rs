//! Samples of a few repetitions, and how two series of the same repetitions compare.

use std::time::Duration;

/// Milliseconds, one for each repetition.
#[derive(Debug, Clone, Default)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    pub fn push(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1000.0);
    }

    pub fn median(&self) -> f64 {
        median(&sorted(self.0.clone()))
    }

    pub fn min(&self) -> f64 {
        sorted(self.0.clone())[0]
    }

    pub fn max(&self) -> f64 {
        *sorted(self.0.clone()).last().unwrap()
    }
}

/// The median of the ratios of pairs, with a confidence interval of at least 95 %.
#[derive(Debug, Clone, Copy)]
pub struct Ratio {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Ratio {
    pub fn of(ours: &Samples, floor: &Samples) -> Self {
        let ratios = sorted(ours.0.iter().zip(&floor.0).map(|(a, b)| a / b).collect());
        let drop = dropped(ratios.len());
        Self { median: median(&ratios), low: ratios[drop], high: ratios[ratios.len() - 1 - drop] }
    }
}

/// How many of the ordered values may be left out at either end so that what is left still holds the median
/// with a probability of 95 %: each value is above it by one half (the sign test's interval). Below six
/// values even all of them hold it less surely.
fn dropped(many: usize) -> usize {
    let mut drop = 0;
    let (mut term, mut tail) = (0.5_f64.powi(many as i32), 0.0);
    for k in 0..many / 2 {
        tail += term;
        if 2.0 * tail > 0.05 {
            break;
        }
        drop = k;
        term *= (many - k) as f64 / (k + 1) as f64;
    }
    drop
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        return sorted[middle];
    }
    (sorted[middle - 1] + sorted[middle]) / 2.0
}
