//! The same sums for rows whose range f32 can't hold: arguments in f64, one exponential a candidate.
//!
//! Several times slower than [`walk`](super::walk), and right for all finite logits: each block of each lane is
//! taken relative to its own largest x, so only tokens below 2⁻¹²⁵ of the largest are lost.

use std::ops::Range;

use super::models::{BLOCK, Models, VECTORS};
use super::sums::{Sought, Sums};
use crate::backend::cpu::simd::{LANES, Simd, Vector, exp_scaled};
use crate::fusion::cumulant::Lane;

/// A block in f64.
struct Block {
    base: [f64; BLOCK],
    d: [f64; BLOCK],
    tokens: usize,
}

impl Block {
    /// base and d of each token that no model excludes.
    fn fill(&mut self, models: &Models<'_>, block: Range<usize>, base: &[f32], d: impl Fn(usize) -> f64) {
        self.tokens = 0;
        for token in block.filter(|&token| !models.excludes(token)) {
            self.base[self.tokens] = f64::from(base[token]);
            self.d[self.tokens] = d(token);
            self.tokens += 1;
        }
    }

    /// Adds the block's tokens to `lane`.
    #[inline(always)]
    fn add<S: Simd>(&self, simd: S, lane: &mut Lane, alpha: f64) {
        *lane = lane.merge(self.lane(simd, alpha));
    }

    /// The lane of x = base + α·d.
    #[inline(always)]
    fn lane<S: Simd>(&self, simd: S, alpha: f64) -> Lane {
        let mut x = [0.0; BLOCK];
        let (base, d) = (&self.base[..self.tokens], &self.d[..self.tokens]);
        let mut top = (f64::NEG_INFINITY, 0.0);
        for ((x, base), &d) in x.iter_mut().zip(base).zip(d) {
            *x = base + alpha * d;
            if *x > top.0 {
                top = (*x, d);
            }
        }
        let (scale, centre) = top;
        let mut argument = [[f32::NEG_INFINITY; LANES]; VECTORS];
        let mut shifted = [[0.0; LANES]; VECTORS];
        for (i, (x, &d)) in x.iter().zip(d).enumerate() {
            argument[i / LANES][i % LANES] = (x - scale) as f32;
            shifted[i / LANES][i % LANES] = (d - centre) as f32;
        }
        let n = self.tokens.div_ceil(LANES);
        let (sum, weighted) = weigh(simd, &argument[..n], &shifted[..n]);
        if sum == 0.0 { Lane::EMPTY } else { Lane { scale, sum, weighted: weighted + centre * sum } }
    }
}

/// Σ exp(x) and Σ exp(x)·d.
#[inline(always)]
fn weigh<S: Simd>(simd: S, x: &[Vector], d: &[Vector]) -> (f64, f64) {
    let [mut sum, mut weighted] = [simd.zero(); 2];
    for (x, d) in S::parts(x).iter().zip(S::parts(d)) {
        let w = exp_scaled::<0, S>(simd, simd.load(x));
        sum = simd.add(sum, w);
        weighted = simd.fma(w, simd.load(d), weighted);
    }
    (simd.sum_f64(sum), simd.sum_f64(weighted))
}

/// Sets all lanes of `sums` to those of `range`.
#[inline(always)]
pub(super) fn search<S: Simd>(
    simd: S,
    models: &Models<'_>,
    range: Range<usize>,
    sought: &Sought,
    sums: &mut Sums,
) {
    let experts = models.experts.len();
    let (tops, masked) = ((sums.base_top, sums.expert_tops.clone()), sums.masked);
    *sums = Sums::empty(&sought.tilts, experts);
    (sums.base_top, sums.expert_tops, sums.masked) = (tops.0, tops.1, masked);
    let difference =
        |t: usize, token: usize| f64::from(models.experts[t][token]) - f64::from(models.small[token]);
    let mut buffer = Block { base: [0.0; BLOCK], d: [0.0; BLOCK], tokens: 0 };
    for start in range.clone().step_by(BLOCK) {
        let block = start..(start + BLOCK).min(range.end);
        buffer.fill(models, block.clone(), models.base.1, |_| 0.0);
        buffer.add(simd, &mut sums.base, 0.0);
        for (t, (small, expert)) in sums.targets.iter_mut().enumerate().filter(|_| sought.targets) {
            buffer.fill(models, block.clone(), models.small, |token| difference(t, token));
            buffer.add(simd, small, 0.0);
            buffer.add(simd, expert, 1.0);
        }
        for (tilt, direction) in sought.tilts.iter().zip(&mut sums.directions) {
            buffer.fill(models, block.clone(), models.base.1, |token| {
                let terms = tilt.direction.iter().enumerate().filter(|(_, c)| **c != 0.0);
                terms.map(|(t, c)| c * difference(t, token)).sum()
            });
            buffer.add(simd, &mut direction.base, 0.0);
            for (k, lane) in direction.candidates.iter_mut().enumerate() {
                buffer.add(simd, lane, tilt.ladder.alpha(k));
            }
        }
    }
}
