//! The continuous minimum between candidates, from the values and slopes that the candidates' sums give.
//!
//! Between two candidates A is taken for the cumulant function of a distribution of two atoms, the one whose value
//! and slope are A's at both ends. Where tails are heavy, the step from one candidate to the next moves nearly all
//! probability from some tokens to others: A has a bend inside the cell that no polynomial follows, and two atoms do.
//! Where they are light, a step is short against A's scale, and two atoms are one more interpolant of fourth order.

use arrayvec::ArrayVec;

use super::cumulant::{Direction, Divergences, loss};
use super::{MAX_CANDIDATES, Objective};

/// Points that each cell is looked at before the best of them is bracketed.
const SAMPLES: usize = 16;

/// The α that minimises the interpolated loss between the candidates next to `best`. `None` where there aren't two
/// candidates.
pub fn interpolate(
    objective: Objective,
    direction: &Direction,
    candidates: &[f64],
    targets: &[Divergences],
    best: usize,
) -> Option<f64> {
    let base_log_sum = direction.base.log_sum();
    let base_mean = direction.base.mean();
    let knots = direction.candidates.iter().zip(candidates);
    let knots =
        knots.map(|(lane, &alpha)| Knot { alpha, a: lane.log_sum() - base_log_sum, slope: lane.mean() });
    let knots = knots.collect::<ArrayVec<_, MAX_CANDIDATES>>();

    let mut least: Option<(f64, f64)> = None;
    for pair in knots.windows(2).take(best + 1).skip(best.saturating_sub(1)) {
        let cell = Cell::new(pair[0], pair[1]);
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
    Some(least?.0)
}

/// A and A′ at one candidate.
#[derive(Clone, Copy, Debug)]
struct Knot {
    alpha: f64,
    a: f64,
    slope: f64,
}

/// Two atoms between two candidates. At the fraction t of the way, with s = exp(−gap·t),
///
/// ```text
/// A = a + top·t + ln((s + ratio) / (1 + ratio))        step·A′ = top − gap·s / (s + ratio)
/// ```
///
/// `top` and `top − gap` are the atoms' positions times the step, `ratio` is the weight of the upper one at t = 0
/// over that of the lower. The bend, where both weigh the same, lies in the first half.
struct Cell {
    start: f64,
    step: f64,
    a: f64,
    top: f64,
    gap: f64,
    ratio: f64,
}

impl Cell {
    /// Halvings of the bracket of ln(gap / growth − 1), which is some 60 wide or half of a larger growth: 1e-10 is left.
    /// Where the bend is near the middle its place goes with the root of what is left.
    const HALVINGS: usize = 40;
    /// A rise that is 1 − r of the larger slope wants a gap of 1 / r: none in f32 wants more than e²⁰.
    const REACH: f64 = 20.0;
    /// The least growth of the slope, so that all is finite. Far below the rounding of f32 sums.
    const LEAST_GROWTH: f64 = 1e-12;

    /// Between neighbours, in either order.
    fn new(left: Knot, right: Knot) -> Self {
        // Above the parabola through the slopes A bends early; what lies below bends early seen from the right.
        let step = right.alpha - left.alpha;
        let excess = right.a - left.a - step * (left.slope + right.slope) / 2.0;
        let (from, step) = if excess < 0.0 { (right, -step) } else { (left, step) };
        let growth = ((right.slope - left.slope) * step.abs()).max(Self::LEAST_GROWTH);

        // gap = growth·(1 + x). The ratio that gives the slope its growth, and the excess that follows: both rise
        // with x. From x a sharp bend has its place: gap itself is then growth to the last bit.
        let solve = |x: f64| {
            let gap = growth * (1.0 + x);
            let fall = (-gap).exp();
            let sum = x * (1.0 - fall) - 2.0 * fall;
            let ratio = (sum + (sum * sum - 4.0 * fall).max(0.0).sqrt()) / 2.0;
            let excess = gap / (1.0 + ratio) + ln_of_ratio(fall, ratio) - growth / 2.0;
            (gap, ratio, if sum >= 2.0 * fall.sqrt() { excess } else { f64::NEG_INFINITY })
        };
        // The least x is that of equal weights in the middle, 2 / (exp(gap / 2) − 1).
        let mut low = -1.31 - growth / 2.0;
        let mut high = Self::REACH + (2.0 / growth.sqrt()).ln().max(0.0);
        for _ in 0..Self::HALVINGS {
            let middle = (low + high) / 2.0;
            if solve(middle.exp()).2 >= excess.abs() { high = middle } else { low = middle }
        }
        let (gap, ratio, _) = solve(high.exp());
        Self { start: from.alpha, step, a: from.a, top: step * from.slope + gap / (1.0 + ratio), gap, ratio }
    }

    /// (α, A, A′) at the fraction `t` of the way.
    fn at(&self, t: f64) -> (f64, f64, f64) {
        let Self { start, step, a, top, gap, ratio } = self;
        let s = (-gap * t).exp();
        let value = a + top * t + ln_of_ratio(s, *ratio);
        (start + t * step, value, (top - gap * s / (s + ratio).max(f64::MIN_POSITIVE)) / step)
    }
}

/// ln((s + ratio) / (1 + ratio)). Both may underflow where a step moves logits by 1400 nats, and then only a finite
/// result matters.
fn ln_of_ratio(s: f64, ratio: f64) -> f64 {
    ((s + ratio).max(f64::MIN_POSITIVE) / (1.0 + ratio)).ln()
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

    /// The sums of a distribution of which A and A′ are known, at the grid 0, 0.1, … 1.9, and the target that
    /// `truth` meets exactly.
    fn search(a: impl Fn(f64) -> f64, slope: impl Fn(f64) -> f64, truth: f64, best: usize) -> f64 {
        let alpha: Vec<f64> = (0..20).map(|k| f64::from(k) / 10.0).collect();
        let lane = |x: f64| Lane { scale: a(x), sum: 1.0, weighted: slope(x) };
        let direction = Direction { base: lane(0.0), candidates: alpha.iter().map(|&x| lane(x)).collect() };
        let target =
            Divergences { forward: truth * slope(truth) - a(truth), reverse: a(truth) - truth * slope(0.0) };
        assert!(interpolate(Objective::Both, &direction, &alpha[..1], &[target], 0).is_none());
        interpolate(Objective::Both, &direction, &alpha, &[target], best).unwrap()
    }

    #[test]
    fn a_quartic_cumulant_is_found() {
        let a = |x: f64| x * x / 2.0 + x.powi(4) / 50.0;
        let slope = |x: f64| x + 4.0 * x.powi(3) / 50.0;
        for best in [6, 7] {
            let found = search(a, slope, 0.637, best);
            // What Hermite's cubic would be off by in A′: h³ A⁗ √3 / 216 = 4e-6, and the loss turns on α A″ there.
            assert!((found - 0.637).abs() < 1e-5, "{found:?}");
        }
    }

    #[test]
    fn two_atoms_are_found_wherever_they_bend() {
        // d = −3 and d = D − 3 weigh the same at `bend`: near neither end, near both, far outside.
        for bend in [0.601, 0.65, 0.699, 0.55, 0.745, 1.4] {
            for gap in [0.01, 1.0, 30.0, 400.0, 5e3, 1e4] {
                let a = |x: f64| {
                    let log_sum = |z: f64| z.max(0.0) + (-z.abs()).exp().ln_1p();
                    -3.0 * x + log_sum(gap * (x - bend)) - log_sum(-gap * bend)
                };
                let slope = |x: f64| -3.0 + gap / (1.0 + (gap * (bend - x)).exp());
                let found = search(a, slope, 0.637, 6);
                // With all probability on one atom the loss is flat, and any α is right.
                let loss = |x: f64| (x * slope(x) - a(x)) - (0.637 * slope(0.637) - a(0.637));
                assert!(
                    (found - 0.637).abs() < 1e-5 || loss(found).abs() < 1e-9,
                    "bend {bend}, gap {gap}: {found}"
                );
            }
        }
    }

    #[test]
    fn rounding_does_no_harm() {
        // Slopes that fall and rises out of the slopes' range, as no distribution has them.
        for (a, slope) in [
            (0.0, 0.0),
            (0.1, 0.0),
            (-1e-7, -1e-7),
            (1e-7, -1e-9),
            (5.0, 1e-7),
            (-5.0, 1.0),
            (2e4, 1e6),
            (9e4, 1e6),
        ] {
            let cell = Cell::new(Knot { alpha: 0.5, a: 0.0, slope: 0.0 }, Knot { alpha: 0.6, a, slope });
            for t in [0.0, 0.3, 1.0] {
                let (alpha, a, slope) = cell.at(t);
                assert!((0.5..=0.6).contains(&alpha) && a.is_finite() && slope.is_finite(), "{a} {slope}");
            }
        }
    }
}
