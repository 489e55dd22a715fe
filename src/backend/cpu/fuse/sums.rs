//! What a row's search asks for, and the sums that answer it: per slice, merged to those of the row.

use crate::fusion::PerExpert;
use crate::fusion::cumulant::{Direction, Divergences, Lane, one_hot};

/// Candidates of α at equal distances: `first`, `first + step`, ….
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ladder {
    pub(super) first: f64,
    pub(super) step: f64,
    pub(super) count: usize,
}

impl Ladder {
    /// One candidate.
    pub(super) fn single(alpha: f64) -> Self {
        Self { first: alpha, step: 0.0, count: 1 }
    }

    /// The ladder through evenly spaced candidates.
    pub(super) fn through(candidates: &[f64]) -> Self {
        match candidates {
            [first, .., last] => {
                let count = candidates.len();
                Self { first: *first, step: (last - first) / (count - 1) as f64, count }
            }
            [first] => Self::single(*first),
            [] => Self { first: 0.0, step: 0.0, count: 0 },
        }
    }

    /// The α of candidate `k`.
    pub(super) fn alpha(&self, k: usize) -> f64 {
        self.first + k as f64 * self.step
    }
}

/// A direction D = Σ_t c_t D_t in which the large model's logits are tilted, and the candidates along it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tilt {
    /// c_t of each expert.
    pub(super) direction: PerExpert<f64>,
    pub(super) ladder: Ladder,
}

impl Tilt {
    /// Along D_t of `expert` alone, of `experts`.
    pub(super) fn expert(experts: usize, expert: usize, ladder: Ladder) -> Self {
        Self { direction: one_hot(experts, expert, 1.0), ladder }
    }

    /// Whether this is D_t of expert `t` alone.
    pub(super) fn is_expert(&self, t: usize) -> bool {
        self.direction.iter().enumerate().all(|(i, &c)| c == f64::from(u8::from(i == t)))
    }

    /// L + Σ_t α_t D_t as the one candidate.
    pub(super) fn fixed(alpha: &PerExpert<f64>) -> Self {
        Self { direction: alpha.clone(), ladder: Ladder::single(1.0) }
    }
}

/// What is summed over a row.
#[derive(Clone, Debug, Default)]
pub(super) struct Sought {
    /// The directions, each with its candidates.
    pub(super) tilts: PerExpert<Tilt>,
    /// Whether the lanes of S and the experts are wanted, too.
    pub(super) targets: bool,
}

/// The largest logit of a model, and the lowest token that has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Top {
    pub(super) value: f32,
    pub(super) token: u32,
}

impl Top {
    pub(super) const NONE: Self = Self { value: f32::NEG_INFINITY, token: 0 };

    /// Takes `later`, which comes from higher token ids, only where it is larger.
    pub(super) fn or(self, later: Self) -> Self {
        if later.value > self.value { later } else { self }
    }
}

/// The sums over one slice of the vocabulary, or over all of it.
#[derive(Clone, Debug)]
pub(super) struct Sums {
    /// The base model's lane; its `weighted` is unused and 0.
    pub(super) base: Lane,
    pub(super) base_top: Top,
    pub(super) expert_tops: PerExpert<Top>,
    /// The lanes of S and of E_t with D_t as the weight, where they were wanted.
    pub(super) targets: PerExpert<(Lane, Lane)>,
    /// One for each tilt.
    pub(super) directions: PerExpert<Direction>,
    /// Whether some token is excluded.
    pub(super) masked: bool,
}

impl Sums {
    /// The sums over no token.
    pub(super) fn empty(tilts: &[Tilt], experts: usize) -> Self {
        let direction =
            |count| Direction { base: Lane::EMPTY, candidates: (0..count).map(|_| Lane::EMPTY).collect() };
        Self {
            base: Lane::EMPTY,
            base_top: Top::NONE,
            expert_tops: (0..experts).map(|_| Top::NONE).collect(),
            targets: (0..experts).map(|_| (Lane::EMPTY, Lane::EMPTY)).collect(),
            directions: tilts.iter().map(|tilt| direction(tilt.ladder.count)).collect(),
            masked: false,
        }
    }

    /// Adds the sums over the tokens that follow. Of the same tilts.
    pub(super) fn append(&mut self, later: &Self) {
        let merge = |a: &mut Lane, b: &Lane| *a = a.merge(*b);
        merge(&mut self.base, &later.base);
        self.base_top = self.base_top.or(later.base_top);
        for (top, later) in self.expert_tops.iter_mut().zip(&later.expert_tops) {
            *top = top.or(*later);
        }
        for (target, later) in self.targets.iter_mut().zip(&later.targets) {
            merge(&mut target.0, &later.0);
            merge(&mut target.1, &later.1);
        }
        for (direction, later) in self.directions.iter_mut().zip(&later.directions) {
            merge(&mut direction.base, &later.base);
            for (lane, later) in direction.candidates.iter_mut().zip(&later.candidates) {
                merge(lane, later);
            }
        }
        self.masked |= later.masked;
    }

    /// KL(Q_t‖Q) and KL(Q‖Q_t) of each expert.
    pub(super) fn divergences(&self) -> PerExpert<Divergences> {
        self.targets.iter().map(|(small, expert)| Divergences::new(small, expert, 1.0)).collect()
    }
}
