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
use std::iter::successors;

use arrayvec::ArrayVec;

use super::cumulant::{Best, Direction, Divergences, Lane, loss};
use super::{Objective, PerExpert};

/// How far a divergence may be from what was foretold, relative to 1 + both: what f32 sums may be off by.
const ROUNDING: f64 = 2e-6;

/// How far those of candidates may be from each other that tie. Where one token has all probability f32 sums have no more to
/// round than it.
const TIED: f64 = 2e-7;

/// An α that would move by no more after a first sum stays where it is.
const NEAR: f64 = 1e-3;

/// Two α that are no further apart are one.
const SAME: f64 = 1e-6;

/// A second valley is looked into where its loss may be below that of the first by what two atoms err.
const SECOND: f64 = 2.0;

/// Sums over a row at most: where the loss is flat, rounding would ask for more and more.
const MOST_ROUNDS: usize = 6;

/// Points that each cell is looked at before the best of them is bracketed, twice: evenly, and around its bend.
const SAMPLES: usize = 16;

/// The search between the candidates next to the best one: [`ask`](Self::ask) for an α and [`take`](Self::take) the
/// sums there, until no more are wanted.
#[derive(Clone, Debug)]
pub struct Refinement {
    objective: Objective,
    targets: PerExpert<Divergences>,
    base: Lane,
    valley: Valley,
    /// The other cell next to the best candidate, until it is looked into.
    other: Option<Valley>,
    /// What was asked for last.
    asked: Option<Point>,
    rounds: usize,
    least: Measured,
}

/// Where a minimum is foretold, if it isn't known.
#[derive(Clone, Copy, Debug)]
struct Valley {
    bracket: Bracket,
    bottom: Option<Point>,
}

/// The better of two α that were summed, or the best of three, and its neighbours.
#[derive(Clone, Copy, Debug)]
struct Bracket {
    left: Option<Knot>,
    middle: Knot,
    right: Option<Knot>,
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
    /// Next to the candidate that was chosen. `None` where nothing lies between candidates.
    pub fn new(
        objective: Objective,
        direction: &Direction,
        candidates: &[f64],
        targets: &PerExpert<Divergences>,
        best: &Best,
    ) -> Option<Self> {
        let base = direction.base;
        let knot = |k: usize| Some(Knot::new(&base, direction.candidates.get(k)?, *candidates.get(k)?));
        let Best { candidate, loss, divergences, .. } = *best;
        let middle = knot(candidate)?;
        let point = Point { alpha: middle.alpha, loss, divergences };
        let refinement = Self {
            objective,
            targets: targets.clone(),
            base,
            valley: Valley { bracket: Bracket { left: None, middle, right: None }, bottom: None },
            other: None,
            asked: None,
            rounds: 0,
            least: Measured { point, log_sum: direction.candidates.get(candidate)?.log_sum() },
        };
        // While one token has all probability a divergence doesn't move, and rounding decides which of those candidates is
        // the best. Where it passes its target is next to the first or the last of them; and on the way through α = 0 it
        // falls to 0 and rises again.
        let tied = |k: usize, next: usize| {
            knot(k).zip(knot(next)).is_some_and(|(knot, next)| {
                knot.alpha * next.alpha >= 0.0 && refinement.point(&next).is_as(&point, objective, TIED)
            })
        };
        let down = |&k: &usize| k.checked_sub(1).filter(|&next| tied(k, next));
        let up = |&k: &usize| Some(k + 1).filter(|&next| tied(k, next));
        let (first, last) =
            (successors(Some(candidate), down).last()?, successors(Some(candidate), up).last()?);
        let cell = |left: Option<Knot>, right: Option<Knot>| Some(refinement.between(left?, right?));
        let lower = cell(first.checked_sub(1).and_then(knot), knot(first));
        let upper = cell(knot(last), knot(last + 1));
        let (valley, other) = match (lower, upper) {
            (Some(lower), Some(upper)) if upper.is_deeper_than(&lower) => (upper, Some(lower)),
            (Some(lower), upper) => (lower, upper),
            (None, upper) => (upper?, None),
        };
        Some(Self { valley, other, ..refinement })
    }

    /// The α at which sums are wanted next; `None` where [`least`](Self::least) is near enough.
    pub fn ask(&mut self) -> Option<f64> {
        if self.valley.bottom.is_none() {
            let may_be_deeper = |point: &Point| point.loss < SECOND * self.least.point.loss;
            self.valley =
                self.other.take().filter(|other| other.bottom.as_ref().is_some_and(may_be_deeper))?;
        }
        self.asked = self.valley.bottom.filter(|_| self.rounds < MOST_ROUNDS);
        self.rounds += 1;
        self.asked.map(|point| point.alpha)
    }

    /// Takes the sums over the row at the α that was asked for.
    pub fn take(&mut self, fused: &Lane) {
        let Some(foretold) = self.asked else { return };
        let knot = Knot::new(&self.base, fused, foretold.alpha);
        let point = self.point(&knot);
        if point.loss < self.least.point.loss {
            self.least = Measured { point, log_sum: fused.log_sum() };
        }
        let better = point.loss < self.point(&self.valley.bracket.middle).loss;
        self.valley.bracket.add(knot, better);
        self.valley.bottom = if point.is_as(&foretold, Objective::Both, ROUNDING) {
            None
        } else {
            let bottom = self.bottom(&self.valley.bracket);
            bottom.filter(|bottom| (bottom.alpha - point.alpha).abs() > NEAR)
        };
    }

    /// The least of the best candidate and of all that was taken.
    pub fn least(&self) -> Measured {
        self.least
    }

    /// The valley between two candidates.
    fn between(&self, left: Knot, right: Knot) -> Valley {
        let bracket = if self.point(&right).loss < self.point(&left).loss {
            Bracket { left: Some(left), middle: right, right: None }
        } else {
            Bracket { left: None, middle: left, right: Some(right) }
        };
        Valley { bracket, bottom: self.bottom(&bracket) }
    }

    /// The minimum of the interpolated loss, the lower cell's where two are equal; `None` where an end of a cell is lower.
    fn bottom(&self, bracket: &Bracket) -> Option<Point> {
        let Bracket { left, middle, right } = *bracket;
        let cells = [left.map(|left| Cell::new(left, middle)), right.map(|right| Cell::new(middle, right))];
        let minima = cells.iter().flatten().map(|cell| cell.minimise(|knot| self.point(&knot)));
        let bottom = minima.reduce(Point::or)?;
        let known = [left, Some(middle), right];
        let known = known.iter().flatten().any(|knot| (knot.alpha - bottom.alpha).abs() <= SAME);
        Some(bottom).filter(|_| !known)
    }

    fn point(&self, knot: &Knot) -> Point {
        let Knot { alpha, a, slope } = *knot;
        let divergences = Divergences { forward: alpha * slope - a, reverse: a - alpha * self.base.mean() };
        Point { alpha, loss: loss(self.objective, &divergences, &self.targets), divergences }
    }
}

impl Valley {
    /// An unknown minimum is deeper than a known one: sums were made there, and are the best candidate's or worse.
    fn is_deeper_than(&self, other: &Self) -> bool {
        match (self.bottom, other.bottom) {
            (Some(bottom), Some(other)) => bottom.loss < other.loss,
            (bottom, _) => bottom.is_some(),
        }
    }
}

impl Bracket {
    /// With one more that was summed, which is `better` than the best so far or isn't.
    fn add(&mut self, knot: Knot, better: bool) {
        let outer = if better { std::mem::replace(&mut self.middle, knot) } else { knot };
        match outer.alpha.total_cmp(&self.middle.alpha) {
            Ordering::Less => self.left = Some(outer),
            Ordering::Greater => self.right = Some(outer),
            Ordering::Equal => {}
        }
    }
}

impl Point {
    /// Takes `other` only where its loss is less.
    fn or(self, other: Self) -> Self {
        if other.loss < self.loss { other } else { self }
    }

    /// Whether the divergences of the objective are the same, but for `rounding` relative to 1 + both.
    fn is_as(&self, other: &Self, objective: Objective, rounding: f64) -> bool {
        let (a, b) = (self.divergences, other.divergences);
        let size = |kl: Divergences| 1.0 + kl.forward.abs() + kl.reverse.abs();
        let near = rounding * size(a).max(size(b));
        (objective == Objective::Reverse || (a.forward - b.forward).abs() <= near)
            && (objective == Objective::Forward || (a.reverse - b.reverse).abs() <= near)
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
        // Both lanes are the same at 0, and are summed apart.
        let a = if alpha == 0.0 { 0.0 } else { fused.log_sum() - base.log_sum() };
        Self { alpha, a, slope: fused.mean() }
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
    /// Where the slope grows by less over the step, the rounding of A, some 2e-7, hides how: the bend is put into the middle.
    const LEAST_SHAPED: f64 = 2e-6;

    /// Between neighbours, in either order.
    fn new(left: Knot, right: Knot) -> Self {
        // Above the parabola through the slopes A bends early; what lies below bends early seen from the right.
        let step = right.alpha - left.alpha;
        let excess = right.a - left.a - step * (left.slope + right.slope) / 2.0;
        let (from, step) = if excess < 0.0 { (right, -step) } else { (left, step) };
        let growth = ((right.slope - left.slope) * step.abs()).max(Self::LEAST_GROWTH);
        let excess = if growth < Self::LEAST_SHAPED { 0.0 } else { excess.abs() };

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
            if solve(middle.exp()).2 >= excess { high = middle } else { low = middle }
        }
        let (gap, ratio, _) = solve(high.exp());
        Self { start: from.alpha, step, a: from.a, top: step * from.slope + gap / (1.0 + ratio), gap, ratio }
    }

    /// The least loss between the two: the best of a few samples, then a golden section around it.
    fn minimise(&self, point: impl Fn(Knot) -> Point) -> Point {
        // Where a step moves logits by many nats, all that happens is within a few fractions 1 / gap of the bend.
        let bend = -self.ratio.max(f64::MIN_POSITIVE).ln() / self.gap;
        let even = (0..SAMPLES).map(|i| i as f64 / (SAMPLES - 1) as f64);
        let around = (0..SAMPLES).map(|i| bend + (i as f64 - SAMPLES as f64 / 2.0) / self.gap);
        let around = around.filter(|t| (0.0..=1.0).contains(t));
        let mut samples: ArrayVec<f64, { 2 * SAMPLES }> = even.chain(around).collect();
        samples.sort_unstable_by(f64::total_cmp);
        let f = |t: f64| point(self.at(t));
        let (mut best, mut least) = (0, f(0.0));
        for (i, &t) in samples.iter().enumerate().skip(1) {
            let point = f(t);
            if point.loss < least.loss {
                (best, least) = (i, point);
            }
        }
        let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
        let (mut low, mut high) =
            (samples[best.saturating_sub(1)], samples[(best + 1).min(samples.len() - 1)]);
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

    /// What is between, at the fraction `t` of the way.
    fn at(&self, t: f64) -> Knot {
        let Self { start, step, a, top, gap, ratio } = self;
        let s = (-gap * t).exp();
        let slope = (top - gap * s / (s + ratio).max(f64::MIN_POSITIVE)) / step;
        Knot { alpha: start + t * step, a: a + top * t + ln_of_ratio(s, *ratio), slope }
    }
}

/// ln((s + ratio) / (1 + ratio)). Both may underflow where a step moves logits by 1400 nats, and then only a finite
/// result matters.
fn ln_of_ratio(s: f64, ratio: f64) -> f64 {
    ((s + ratio).max(f64::MIN_POSITIVE) / (1.0 + ratio)).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums of a distribution of which A and A′ are known, at the grid 0, 0.1, … 1.9, and the target that
    /// `truth` meets exactly.
    fn search(a: impl Fn(f64) -> f64, slope: impl Fn(f64) -> f64, truth: f64, best: usize) -> f64 {
        let alpha: Vec<f64> = (0..20).map(|k| f64::from(k) / 10.0).collect();
        let lane = |x: f64| Lane { scale: a(x), sum: 1.0, weighted: slope(x) };
        let direction = Direction { base: lane(0.0), candidates: alpha.iter().map(|&x| lane(x)).collect() };
        let target =
            Divergences { forward: truth * slope(truth) - a(truth), reverse: a(truth) - truth * slope(0.0) };
        let targets: PerExpert<Divergences> = std::iter::once(target).collect();
        let chosen = |candidate: usize| {
            let divergences =
                Divergences::new(&direction.base, &direction.candidates[candidate], alpha[candidate]);
            Best { expert: 0, candidate, loss: loss(Objective::Both, &divergences, &targets), divergences }
        };
        let alone = Refinement::new(Objective::Both, &direction, &alpha[..1], &targets, &chosen(0));
        assert!(alone.is_none());
        let mut refinement =
            Refinement::new(Objective::Both, &direction, &alpha, &targets, &chosen(best)).unwrap();
        refinement.ask().unwrap_or(refinement.least().point.alpha)
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
            for gap in [0.03, 1.0, 30.0, 400.0, 5e3, 1e4] {
                let a = |x: f64| {
                    let log_sum = |z: f64| z.max(0.0) + (-z.abs()).exp().ln_1p();
                    -3.0 * x + log_sum(gap * (x - bend)) - log_sum(-gap * bend)
                };
                let slope = |x: f64| -3.0 + gap / (1.0 + (gap * (bend - x)).exp());
                let found = search(a, slope, 0.637, 6);
                // With all probability on one atom the loss is flat, and any α is right. The bend's place is known to some 1e-9
                // of a step, by which A is off behind it.
                let loss = |x: f64| (x * slope(x) - a(x)) - (0.637 * slope(0.637) - a(0.637));
                assert!(
                    (found - 0.637).abs() < 1e-5 || loss(found).abs() < 1e-9 * gap,
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
                let Knot { alpha, a, slope } = cell.at(t);
                assert!((0.5..=0.6).contains(&alpha) && a.is_finite() && slope.is_finite(), "{a} {slope}");
            }
        }
    }
}
