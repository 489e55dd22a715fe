//! The continuous minimum between candidates, from the values and slopes that the candidates' sums give.

use arrayvec::ArrayVec;

use super::cumulant::{Direction, Divergences, loss};
use super::{MAX_CANDIDATES, Objective};

/// Points that each cell is looked at before the best of them is bracketed.
const SAMPLES: usize = 16;

/// The α that minimises the loss between the candidates next to `best`, and the interpolated loss there.
///
/// In each cell A is the cubic through the values A(α_k) and the slopes A′(α_k) at both ends. Its derivative would
/// divide the rounding of A by the step, so A′ is a cubic of its own, through the slopes at the ends and their
/// central differences. For steps h the errors are of order h⁴ and h³.
pub fn interpolate(
    objective: Objective,
    direction: &Direction,
    candidates: &[f64],
    targets: &[Divergences],
    best: usize,
) -> Option<(f64, f64)> {
    let base_log_sum = direction.base.log_sum();
    let base_mean = direction.base.mean();
    let knots = direction.candidates.iter().zip(candidates);
    let knots =
        knots.map(|(lane, &alpha)| Knot { alpha, a: lane.log_sum() - base_log_sum, slope: lane.mean() });
    let knots = knots.collect::<ArrayVec<_, MAX_CANDIDATES>>();

    let mut least: Option<(f64, f64)> = None;
    for cell in best.saturating_sub(1)..(best + 1).min(knots.len().saturating_sub(1)) {
        let cell = Cell::new(&knots, cell);
        let at = |t: f64| {
            let (alpha, a, slope) = cell.at(t);
            let fused = Divergences { forward: alpha * slope - a, reverse: a - alpha * base_mean };
            (loss(objective, &fused, targets), alpha)
        };
        let (value, alpha) = minimise(at);
        if least.is_none_or(|(_, least)| value < least) {
            least = Some((alpha, value));
        }
    }
    least
}

/// A and A′ at one candidate.
#[derive(Clone, Copy, Debug)]
struct Knot {
    alpha: f64,
    a: f64,
    slope: f64,
}

/// The cubics between two candidates.
struct Cell {
    start: f64,
    step: f64,
    a: [f64; 4],
    slope: [f64; 4],
}

impl Cell {
    /// Between the knots `i` and `i + 1`.
    fn new(knots: &[Knot], i: usize) -> Self {
        let (left, right) = (knots[i], knots[i + 1]);
        let step = right.alpha - left.alpha;
        // A″·step at a knot, from the slopes next to it; one-sided at an end.
        let bend = |i: usize| {
            let (before, after) = (knots[i.saturating_sub(1)], knots[(i + 1).min(knots.len() - 1)]);
            step * (after.slope - before.slope) / (after.alpha - before.alpha)
        };
        Self {
            start: left.alpha,
            step,
            a: hermite(left.a, right.a, step * left.slope, step * right.slope),
            slope: hermite(left.slope, right.slope, bend(i), bend(i + 1)),
        }
    }

    /// (α, A, A′) at the fraction `t` of the way.
    fn at(&self, t: f64) -> (f64, f64, f64) {
        let value = |[c0, c1, c2, c3]: [f64; 4]| c0 + t * (c1 + t * (c2 + t * c3));
        (self.start + t * self.step, value(self.a), value(self.slope))
    }
}

/// The coefficients of the cubic on [0, 1] with these values and derivatives at its ends.
fn hermite(left: f64, right: f64, left_slope: f64, right_slope: f64) -> [f64; 4] {
    let rise = right - left;
    [left, left_slope, 3.0 * rise - 2.0 * left_slope - right_slope, left_slope + right_slope - 2.0 * rise]
}

/// The least value of `f` on [0, 1]: the best of a few samples, then a golden section around it.
fn minimise(f: impl Fn(f64) -> (f64, f64)) -> (f64, f64) {
    let sample = |i: usize| i as f64 / SAMPLES as f64;
    let mut best = 0;
    for i in 1..=SAMPLES {
        if f(sample(i)).0 < f(sample(best)).0 {
            best = i;
        }
    }
    let (mut low, mut high) = (sample(best.saturating_sub(1)), sample((best + 1).min(SAMPLES)));
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    // Each step keeps 0.618 of the bracket: 24 of them take 1/8 to 1e-6 of a cell.
    for _ in 0..24 {
        let (left, right) = (high - ratio * (high - low), low + ratio * (high - low));
        if f(left).0 < f(right).0 { high = right } else { low = left }
    }
    let (inside, end) = (f((low + high) / 2.0), f(sample(best)));
    if inside.0 < end.0 { inside } else { end }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fusion::cumulant::Lane;

    #[test]
    fn a_quartic_cumulant_is_found() {
        // A(α) = α²/2 + α⁴/50, the base's mean 0, and the target that α = 0.637 meets exactly.
        let a = |x: f64| x * x / 2.0 + x.powi(4) / 50.0;
        let slope = |x: f64| x + 4.0 * x.powi(3) / 50.0;
        let alpha: Vec<f64> = (0..20).map(|k| f64::from(k) / 10.0).collect();
        let lane = |x: f64| Lane { scale: a(x), sum: 1.0, weighted: slope(x) };
        let direction = Direction { base: lane(0.0), candidates: alpha.iter().map(|&x| lane(x)).collect() };
        let truth = 0.637;
        let target = Divergences { forward: truth * slope(truth) - a(truth), reverse: a(truth) };
        for best in [6, 7] {
            let found = interpolate(Objective::Both, &direction, &alpha, &[target], best).unwrap();
            // Central differences are off by h² A⁗/6, which moves A′ inside a cell by at most 0.1·h³ A⁗/6 = 8e-6.
            assert!((found.0 - truth).abs() < 1e-5, "{found:?}");
        }
        assert!(interpolate(Objective::Both, &direction, &alpha[..0], &[target], 0).is_none());
    }
}
