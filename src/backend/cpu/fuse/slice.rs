//! The search over one slice of the vocabulary, in one pass over blocks that fit the first-level cache.
//!
//! The first sweep finds the maxima, the second ([`walk`]) the sums.

use std::ops::Range;

use super::models::{BLOCK, Models, NotFinite, Tile, TileCopy, VECTORS};
use super::sums::{Sought, Sums, Top};
use super::walk::Walk;
use super::wide;
use crate::backend::cpu::simd::{Kernel, LANES, Simd, Vector};
use crate::fusion::PerExpert;

/// Tokens in a slice. Slices are what threads share, and their sums are merged in order: results don't depend
/// on the number of threads.
pub(super) const SLICE: usize = 16 * BLOCK;

/// The sums over `range` of a row's logits, at most [`SLICE`] tokens, for all candidates of `sought`.
pub(super) struct Search<'a> {
    pub(super) models: &'a Models<'a>,
    pub(super) range: Range<usize>,
    pub(super) sought: &'a Sought,
}

impl Kernel for Search<'_> {
    type Output = Result<Sums, NotFinite>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let Self { models, range, sought } = self;
        let mut source = Source { models, range, masked: false };
        let mut tops = source.tops(simd);
        if !tops.finite {
            source.masked = source.models.inspect(source.range.clone())?;
            tops = source.tops(simd);
        }
        let mut sums = Sums::empty(&sought.tilts, models.experts.len());
        sums.masked = source.masked;
        if source.masked && source.range.clone().all(|token| models.excludes(token)) {
            return Ok(sums);
        }
        sums.base_top = tops.base;
        sums.expert_tops = tops.experts.clone();
        let fits = Walk { source: &source, tops: &tops, sought }.run(simd, &mut sums);
        if !fits {
            wide::search(simd, models, source.range.clone(), sought, &mut sums);
        }
        Ok(sums)
    }
}

/// The slice, block by block.
pub(super) struct Source<'a> {
    pub(super) models: &'a Models<'a>,
    range: Range<usize>,
    /// Whether blocks must be copied because some token is excluded.
    masked: bool,
}

/// The largest logits of a slice.
pub(super) struct Tops {
    pub(super) base: Top,
    pub(super) small: f32,
    pub(super) experts: PerExpert<Top>,
    /// Whether every logit is finite; where not, the rest means nothing.
    finite: bool,
}

impl Source<'_> {
    /// Blocks of whole vectors, and what is left as one of less than a vector: only that must be copied.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let Range { start, end } = self.range;
        let whole = end - (end - start) % LANES;
        let blocks = (start..whole).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(whole));
        blocks.chain((whole < end).then_some(whole..end))
    }

    /// Whether the block's logits can be used where they lie.
    #[inline(always)]
    pub(super) fn is_direct(&self, block: &Range<usize>) -> bool {
        !self.masked && block.len().is_multiple_of(LANES)
    }

    /// The first sweep: maxima, and whether all is finite.
    #[inline(always)]
    fn tops<S: Simd>(&self, simd: S) -> Tops {
        // The value, and the first token of the block that has it.
        let mut best = PerExpert::from_iter(self.models.experts.iter().map(|_| Top::NONE));
        let mut tops =
            Tops { base: Top::NONE, small: f32::NEG_INFINITY, experts: best.clone(), finite: true };
        for block in self.blocks() {
            let (rest, copy);
            let tile = if self.is_direct(&block) {
                Tile::direct(self.models, block.clone())
            } else if block.len() < LANES {
                rest = TileCopy::<1>::new(self.models, block.clone());
                tops.finite &= self.masked || !rest.masked;
                rest.tile()
            } else {
                copy = TileCopy::<VECTORS>::new(self.models, block.clone());
                tops.finite &= self.masked || !copy.masked;
                copy.tile()
            };
            let token = block.start as u32;
            let (value, base_finite) = maximum(simd, tile.base);
            tops.base = tops.base.or(Top { value, token });
            let (value, small_finite) = maximum(simd, tile.small);
            tops.small = tops.small.max(value);
            tops.finite &= base_finite & small_finite;
            for (best, expert) in best.iter_mut().zip(&tile.experts) {
                let (value, finite) = maximum(simd, expert);
                *best = best.or(Top { value, token });
                tops.finite &= finite;
            }
        }
        tops.base = self.locate(self.models.base.1, tops.base);
        let located = best.iter().zip(&self.models.experts).map(|(top, expert)| self.locate(expert, *top));
        tops.experts = located.collect();
        tops
    }

    /// The token of `top`, whose `token` is the first of its block so far.
    fn locate(&self, logits: &[f32], top: Top) -> Top {
        let tokens = top.token..self.range.end as u32;
        let is_top = |&token: &u32| {
            logits[token as usize] == top.value && !(self.masked && self.models.excludes(token as usize))
        };
        Top { token: tokens.clone().find(is_top).unwrap_or(top.token), ..top }
    }
}

/// The largest value, and whether all values are finite.
#[inline(always)]
pub(super) fn maximum<S: Simd>(simd: S, values: &[Vector]) -> (f32, bool) {
    let zero = simd.zero();
    let mut largest = [simd.splat(f32::NEG_INFINITY); 4];
    // 0·x is NaN for NaN and ±∞, and stays so.
    let mut check = [zero; 4];
    let (quads, rest) = S::parts(values).as_chunks::<4>();
    for quad in quads {
        for i in 0..4 {
            let x = simd.load(&quad[i]);
            largest[i] = simd.max(largest[i], x);
            check[i] = simd.fma(x, zero, check[i]);
        }
    }
    for x in rest {
        let x = simd.load(x);
        largest[0] = simd.max(largest[0], x);
        check[0] = simd.fma(x, zero, check[0]);
    }
    let largest = simd.max(simd.max(largest[0], largest[1]), simd.max(largest[2], largest[3]));
    let check = simd.add(simd.add(check[0], check[1]), simd.add(check[2], check[3]));
    (simd.largest(largest), simd.sum_f64(check) == 0.0)
}
