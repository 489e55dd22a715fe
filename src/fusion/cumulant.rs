//! The few dozen operations between the sums over the vocabulary and the choice of α.
//!
//! Every number of the method comes from one sum over a tilted distribution, a [`Lane`]. With
//! A(α) = log E_P[exp(α D)], the cumulant function of D under P (paper.md section 7 derives it),
//!
//! ```text
//! KL(P̃‖P) = α A′(α) − A(α)            KL(P‖P̃) = A(α) − α A′(0)
//! ```
//!
//! and KL(Q_t‖Q), KL(Q‖Q_t) are the same two at α = 1 with Q in the place of P, because S + D_t = E_t.

use arrayvec::ArrayVec;

use super::{MAX_CANDIDATES, Objective, PerExpert};

/// Sums over (a part of) the vocabulary for the unnormalised distribution exp(x), x = base + α·d:
/// `sum` = Σ exp(x − scale) and `weighted` = Σ exp(x − scale)·d.
///
/// `scale` is any number near max x, so that nothing overflows. Lanes of disjoint parts form a commutative
/// monoid under [`merge`](Self::merge), with [`EMPTY`](Self::EMPTY) as its identity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lane {
    /// The logarithm of the factor that was taken out.
    pub scale: f64,
    /// Σ exp(x − scale).
    pub sum: f64,
    /// Σ exp(x − scale)·d.
    pub weighted: f64,
}

impl Lane {
    /// No token.
    pub const EMPTY: Self = Self { scale: f64::NEG_INFINITY, sum: 0.0, weighted: 0.0 };

    /// The lane of both parts together.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        let scale = self.scale.max(other.scale);
        if scale == f64::NEG_INFINITY {
            return Self::EMPTY;
        }
        let (a, b) = ((self.scale - scale).exp(), (other.scale - scale).exp());
        Self { scale, sum: a * self.sum + b * other.sum, weighted: a * self.weighted + b * other.weighted }
    }

    /// log Σ exp(x).
    pub fn log_sum(&self) -> f64 {
        self.scale + self.sum.ln()
    }

    /// The mean of d under the normalised distribution.
    pub fn mean(&self) -> f64 {
        self.weighted / self.sum
    }
}

/// Two divergences, in nats. Rounding may leave a value that should be 0 a little below it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergences {
    /// KL(tilted ‖ base).
    pub forward: f64,
    /// KL(base ‖ tilted).
    pub reverse: f64,
}

impl Divergences {
    /// Between a distribution and the one that `alpha` tilts it to. At α = 0 both are exactly 0, so that the same
    /// distribution reached through two experts ties.
    pub fn new(base: &Lane, tilted: &Lane, alpha: f64) -> Self {
        if alpha == 0.0 {
            return Self { forward: 0.0, reverse: 0.0 };
        }
        let a = tilted.log_sum() - base.log_sum();
        Self { forward: alpha * tilted.mean() - a, reverse: a - alpha * base.mean() }
    }
}

/// The candidates of one direction D: the large model's lane (α = 0) and one for each α.
#[derive(Clone, Debug)]
pub struct Direction {
    /// The large model alone, with D as the weight.
    pub base: Lane,
    /// The candidates in the order of their α.
    pub candidates: ArrayVec<Lane, MAX_CANDIDATES>,
}

/// Equation 6: Σ_t [ (KL(P̃‖P) − KL(Q_t‖Q))² + (KL(P‖P̃) − KL(Q‖Q_t))² ], or one of the two terms.
pub fn loss(objective: Objective, fused: &Divergences, targets: &[Divergences]) -> f64 {
    let square = |x: f64| x * x;
    let forward = || targets.iter().map(|t| square(fused.forward - t.forward)).sum::<f64>();
    let reverse = || targets.iter().map(|t| square(fused.reverse - t.reverse)).sum::<f64>();
    match objective {
        Objective::Both => forward() + reverse(),
        Objective::Forward => forward(),
        Objective::Reverse => reverse(),
    }
}

/// A chosen candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// The active expert.
    pub expert: usize,
    /// The index of its α among the expert's candidates.
    pub candidate: usize,
    /// Its loss.
    pub loss: f64,
    /// KL(P̃‖P) and KL(P‖P̃).
    pub divergences: Divergences,
}

/// The candidate with the least loss; the lowest expert, then the lowest α where several tie. `None` where there
/// is no candidate.
pub fn choose<'a>(
    objective: Objective,
    directions: &[Direction],
    candidates: impl Fn(usize) -> &'a [f64],
    targets: &[Divergences],
) -> Option<Best> {
    let mut best: Option<Best> = None;
    for (expert, direction) in directions.iter().enumerate() {
        for (candidate, (lane, &alpha)) in direction.candidates.iter().zip(candidates(expert)).enumerate() {
            let divergences = Divergences::new(&direction.base, lane, alpha);
            let loss = loss(objective, &divergences, targets);
            if best.is_none_or(|best| loss < best.loss) {
                best = Some(Best { expert, candidate, loss, divergences });
            }
        }
    }
    best
}

/// α of each expert where `expert` alone is active.
pub fn one_hot(experts: usize, expert: usize, alpha: f64) -> PerExpert<f64> {
    (0..experts).map(|t| if t == expert { alpha } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_a_monoid() {
        let lane = |x: f64, d: f64| Lane { scale: x, sum: 1.0, weighted: d };
        let (a, b, c) = (lane(3.0, 1.0), lane(900.0, -2.0), lane(898.5, 4.0));
        assert_eq!(a.merge(Lane::EMPTY), a);
        assert_eq!(Lane::EMPTY.merge(a), a);
        assert_eq!(Lane::EMPTY.merge(Lane::EMPTY), Lane::EMPTY);
        let (left, right) = (a.merge(b).merge(c), a.merge(b.merge(c)));
        // Two roundings of f64.
        assert!((left.log_sum() - right.log_sum()).abs() < 1e-12);
        let expected = (-2.0 + 4.0 * (-1.5_f64).exp()) / (1.0 + (-1.5_f64).exp());
        assert!((left.mean() - expected).abs() < 1e-12 && (right.mean() - expected).abs() < 1e-12);
    }

    #[test]
    fn divergences_of_a_coin() {
        // P = (1/2, 1/2), D = (ln 3, 0): P̃ at α = 1 is (3/4, 1/4).
        let d = 3.0_f64.ln();
        let base = Lane { scale: 0.0, sum: 2.0, weighted: d };
        let tilted = Lane { scale: 0.0, sum: 4.0, weighted: 3.0 * d };
        let kl = Divergences::new(&base, &tilted, 1.0);
        let forward = 0.75 * 1.5_f64.ln() + 0.25 * 0.5_f64.ln();
        let reverse = 0.5 * (1.0_f64 / 1.5).ln() + 0.5 * 2.0_f64.ln();
        // A few roundings of f64.
        assert!((kl.forward - forward).abs() < 1e-15 && (kl.reverse - reverse).abs() < 1e-15);
    }
}
