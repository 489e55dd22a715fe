//! The continuous minimum between candidates, from the values and slopes that the candidates' sums give.
//!
//! Between two candidates A is taken for the cumulant function of a distribution of two atoms, the one whose value
//! and slope are A's at both ends. Where tails are heavy, the step from one candidate to the next moves nearly all
//! probability from some tokens to others: A has a bend inside the cell that no polynomial follows, and two atoms do.
//! Where they are light, a step is short against A's scale, and two atoms are one more interpolant of fourth order.
//!
//! Where three tokens matter in one cell, A bends twice and two atoms miss it. The sums at the minimum, which a row's
//! numbers come from, tell: where they aren't what the atoms foretold, the minimum is sought once more between that α
//! and its neighbours.

use std::cmp::Ordering;

use super::cumulant::{Direction, Divergences, Lane, loss};
use super::{Objective, PerExpert};

/// How far a divergence may be from what was foretold, relative to 1 + both: what f32 sums may be off by.
const ROUNDING: f64 = 2e-6;

/// An α that would move by no more stays where it is.
const NEAR: f64 = 1e-3;

/// Sums over a row at most: where the loss is flat, rounding would ask for more and more.
const MOST_ROUNDS: usize = 4;

/// Points that each cell is looked at before the best of them is bracketed.
const SAMPLES: usize = 16;

/// The search between the candidates next to the best one: [`ask`](Self::ask) for an α and [`take`](Self::take) the
/// sums there, until no more are wanted.
#[derive(Clone, Debug)]
pub struct Refinement {
    objective: Objective,
    targets: PerExpert<Divergences>,
    base: Lane,
    /// The best of all that was summed, and its neighbours.
    left: Option<Knot>,
    middle: Knot,
    right: Option<Knot>,
    foretold: Option<Point>,
    rounds: usize,
    settled: bool,
    least: Option<Measured>,
}

/// What the sums over a row say at one α.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// α, its loss, and its divergences.
    pub point: Point,
    /// log Σ exp of the fused logits.
    pub log_sum: f64,
}

/// An α with its loss.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// α.
    pub alpha: f64,
    /// The loss there.
    pub loss: f64,
    /// KL(P̃‖P) and KL(P‖P̃) there.
    pub divergences: Divergences,
}

impl Refinement {
    /// Around the candidate `best`. `None` where there aren't two candidates.
    pub fn new(
        objective: Objective,
        direction: &Direction,
        candidates: &[f64],
        targets: &PerExpert<Divergences>,
        best: usize,
    ) -> Option<Self> {
        let base = direction.base;
        let knot = |k: usize| Some(Knot::new(&base, direction.candidates.get(k)?, *candidates.get(k)?));
        let (left, middle, right) = (best.checked_sub(1).and_then(knot), knot(best)?, knot(best + 1));
        (left.is_some() || right.is_some()).then(|| Self {
            objective,
            targets: targets.clone(),
            base,
            left,
            middle,
            right,
            foretold: None,
            rounds: 0,
            settled: false,
            least: None,
        })
    }

    /// The α at which sums are wanted next; `None` where [`least`](Self::least) is near enough.
    pub fn ask(&mut self) -> Option<f64> {
        if self.settled || self.rounds == MOST_ROUNDS {
            return None;
        }
        let next = self.interpolate()?;
        if self.least.is_some_and(|least| (least.point.alpha - next.alpha).abs() <= NEAR) {
            return None;
        }
        self.foretold = Some(next);
        self.rounds += 1;
        Some(next.alpha)
    }

    /// Takes the sums over the row at the α that was asked for.
    pub fn take(&mut self, fused: &Lane) {
        let Some(foretold) = self.foretold else { return };
        let found = Knot::new(&self.base, fused, foretold.alpha);
        let point = self.point(found.alpha, found.a, found.slope);
        self.settled = foretold.is_met_by(&point);
        if self.least.is_none_or(|least| point.loss < least.point.loss) {
            self.least = Some(Measured { point, log_sum: fused.log_sum() });
        }
        let best = self.point(self.middle.alpha, self.middle.a, self.middle.slope);
        let outer = if point.loss < best.loss { std::mem::replace(&mut self.middle, found) } else { found };
        match outer.alpha.total_cmp(&self.middle.alpha) {
            Ordering::Less => self.left = Some(outer),
            Ordering::Greater => self.right = Some(outer),
            Ordering::Equal => {}
        }
    }

    /// The least of all that was taken.
    pub fn least(&self) -> Option<Measured> {
        self.least
    }

    /// The minimum of the interpolated loss in both cells; the lower cell's where both are equal.
    fn interpolate(&self) -> Option<Point> {
        let cells = [(self.left, Some(self.middle)), (Some(self.middle), self.right)];
        let cells = cells.into_iter().filter_map(|(left, right)| Some(Cell::new(left?, right?)));
        let minima = cells.map(|cell| {
            minimise(|t| {
                let (alpha, a, slope) = cell.at(t);
                self.point(alpha, a, slope)
            })
        });
        minima.reduce(Point::or)
    }

    fn point(&self, alpha: f64, a: f64, slope: f64) -> Point {
        let divergences = Divergences { forward: alpha * slope - a, reverse: a - alpha * self.base.mean() };
        Point { alpha, loss: loss(self.objective, &divergences, &self.targets), divergences }
    }
}

impl Point {
    /// Takes `other` only where its loss is less.
    fn or(self, other: Self) -> Self {
        if other.loss < self.loss { other } else { self }
    }

    /// Whether these are the sums that were foretold.
    fn is_met_by(&self, found: &Self) -> bool {
        let (foretold, found) = (self.divergences, found.divergences);
        let near = ROUNDING * (1.0 + found.forward.abs() + found.reverse.abs());
        (found.forward - foretold.forward).abs() <= near && (found.reverse - foretold.reverse).abs() <= near
    }
}

/// A and A′ at one α.
#[derive(Clone, Copy, Debug)]
struct Knot {
    alpha: f64,
    a: f64,
    slope: f64,
}

impl Knot {
    fn new(base: &Lane, fused: &Lane, alpha: f64) -> Self {
        Self { alpha, a: fused.log_sum() - base.log_sum(), slope: fused.mean() }
    }
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

/// The least loss of `f` on [0, 1]: the best of a few samples, then a golden section around it.
fn minimise(f: impl Fn(f64) -> Point) -> Point {
    let sample = |i: usize| i as f64 / SAMPLES as f64;
    let (mut best, mut least) = (0, f(0.0));
    for i in 1..=SAMPLES {
        let point = f(sample(i));
        if point.loss < least.loss {
            (best, least) = (i, point);
        }
    }
    let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (sample(best.saturating_sub(1)), sample((best + 1).min(SAMPLES)));
    let inner = |low: f64, high: f64| (high - ratio * (high - low), low + ratio * (high - low));
    let (left, right) = inner(low, high);
    let (mut left, mut right) = (f(left), f(right));
    // Each step keeps 0.618 of the bracket, and one of its two points: 24 of them take 1/8 to 1e-6 of a cell.
    for _ in 0..24 {
        if left.loss < right.loss {
            (high, right) = (inner(low, high).1, left);
            left = f(inner(low, high).0);
        } else {
            (low, left) = (inner(low, high).0, right);
            right = f(inner(low, high).1);
        }
    }
    least.or(left).or(right)
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
        let targets = std::iter::once(target).collect();
        let around = |grid, best| Refinement::new(Objective::Both, &direction, grid, &targets, best);
        assert!(around(&alpha[..1], 0).is_none());
        around(&alpha, best).unwrap().ask().unwrap()
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
