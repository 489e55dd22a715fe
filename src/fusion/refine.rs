//! The continuous minimum between candidates, from the values and slopes that the candidates' sums give.

use super::Objective;
use super::cumulant::{Direction, Divergences, loss};

/// Points that each cell is looked at before the best of them is bracketed.
const SAMPLES: usize = 16;

/// The α that minimises the loss between the candidates next to `best`, and the interpolated loss there.
///
/// In each cell A is the cubic through the values A(α_k) and the slopes A′(α_k) at both ends, whose own
/// derivative stands for A′. For steps h the error of A is h⁴/384 and that of A′ is 0.008·h³ times the fourth
/// cumulant of D under P̃.
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
    let knots = knots.map(|(lane, &alpha)| Knot { alpha, a: lane.log_sum() - base_log_sum, slope: lane.mean() });
    let first = best.saturating_sub(1);
    let near = knots.skip(first).take(best - first + 2).collect::<arrayvec::ArrayVec<_, 3>>();

    let mut least: Option<(f64, f64)> = None;
    for cell in near.windows(2) {
        let at = |t: f64| {
            let (alpha, a, slope) = Knot::between(&cell[0], &cell[1], t);
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

impl Knot {
    /// (α, A, A′) at the fraction `t` of the way from `left` to `right`.
    fn between(left: &Self, right: &Self, t: f64) -> (f64, f64, f64) {
        let h = right.alpha - left.alpha;
        let rise = right.a - left.a;
        let (m0, m1) = (h * left.slope, h * right.slope);
        let (c2, c3) = (3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise);
        let a = left.a + t * (m0 + t * (c2 + t * c3));
        let slope = (m0 + t * (2.0 * c2 + 3.0 * t * c3)) / h;
        (left.alpha + t * h, a, slope)
    }
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
