//! How sure a score is: Wilson's interval for proportions, the bootstrap for all else and for paired differences.

use serde::Serialize;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 4000;
/// Two-sided 95 % of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// A 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
    /// `wilson` or `bootstrap`.
    pub method: &'static str,
}

/// The mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Wilson's score interval of `hits` of `count`, without continuity correction; 0 to 1 where `count` is 0.
pub fn wilson(hits: f64, count: usize) -> Interval {
    let n = count as f64;
    let (p, z2) = (hits / n.max(1.0), Z * Z);
    if count == 0 {
        return Interval { low: 0.0, high: 1.0, method: "wilson" };
    }
    let center = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt() / (1.0 + z2 / n);
    // Of none right and of all right one end is exact; rounding must not move it.
    let low = if hits > 0.0 { (center - half).max(0.0) } else { 0.0 };
    let high = if hits < n { (center + half).min(1.0) } else { 1.0 };
    Interval { low, high, method: "wilson" }
}

/// The percentile bootstrap of a mean: 4000 resamples with a fixed seed, so that the same values give the same
/// interval. Of differences of two methods on the same samples it is the paired bootstrap.
pub fn bootstrap(values: &[f64]) -> Interval {
    let mut random = SplitMix(0x5eed);
    let n = values.len() as u64;
    let mut resample = || {
        let sum: f64 = (0..n).filter_map(|_| values.get(random.below(n) as usize)).sum();
        sum / n.max(1) as f64
    };
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| resample()).collect();
    means.sort_by(f64::total_cmp);
    let at =
        |share: f64| means.get((share * (RESAMPLES - 1) as f64).round() as usize).copied().unwrap_or(0.0);
    Interval { low: at(0.025), high: at(0.975), method: "bootstrap" }
}

/// Steele, Lea and Flood's SplitMix64.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `n`: by the high half of a product, whose bias is at most n/2⁶⁴.
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_by_the_formula() {
        // By hand for 8 of 10, z² = 3.8415: centre (0.8 + 0.19207)/1.38415, half 1.95996·√(0.016 + 0.0096036)/1.38415.
        let interval = wilson(8.0, 10);
        assert!(
            (interval.low - 0.4901).abs() < 1e-4 && (interval.high - 0.9433).abs() < 1e-4,
            "{interval:?}"
        );
        let none = wilson(0.0, 400);
        assert!(none.low == 0.0 && (none.high - 0.00951).abs() < 1e-5, "{none:?}");
    }

    #[test]
    fn the_bootstrap_has_the_width_of_the_normal_interval_where_that_holds() {
        let values: Vec<f64> = (0..1000).map(|k| f64::from(k % 10) / 10.0).collect();
        let deviation = (values.iter().map(|x| (x - 0.45).powi(2)).sum::<f64>() / 1000.0).sqrt();
        let half = Z * deviation / 1000f64.sqrt();
        let interval = bootstrap(&values);
        // A quantile of 4000 resamples has a relative error of some 3 %.
        assert!((interval.low - (0.45 - half)).abs() < 0.1 * half, "{interval:?} {half}");
        assert!((interval.high - (0.45 + half)).abs() < 0.1 * half, "{interval:?} {half}");
        assert_eq!(bootstrap(&values), interval);
        let none = bootstrap(&[0.0; 5]);
        assert_eq!((none.low, none.high), (0.0, 0.0));
    }
}
