//! The fused logits of one row, and their argmax.

use std::ops::Range;

use super::models::{BLOCK, Models};
use super::slice::maximum;
use crate::backend::cpu::simd::{Kernel, LANES, Simd, Vector};

/// L + Σ α_t (E_t − S) in f32, −∞ where a model excludes the token. Its output is the lowest token with the largest
/// one.
pub(super) struct FusedRow<'a> {
    pub(super) models: &'a Models<'a>,
    pub(super) alpha: &'a [f64],
    /// Whether some token is excluded.
    pub(super) masked: bool,
    /// Where the logits go; nowhere if empty, which saves a pass over memory.
    pub(super) row: &'a mut [f32],
}

impl Kernel for FusedRow<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> u32 {
        let width = self.models.width();
        let mut scratch = [0.0; BLOCK];
        let mut best = (f32::NEG_INFINITY, 0..BLOCK.min(width));
        for start in (0..width).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(width);
            let row = std::mem::take(&mut self.row);
            let fused = row.get_mut(range.clone()).unwrap_or(&mut scratch[..range.len()]);
            self.block(simd, range.clone(), fused);
            let (vectors, rest) = fused.as_chunks();
            let top = rest.iter().copied().fold(maximum(simd, vectors).0, f32::max);
            self.row = row;
            if top > best.0 {
                best = (top, range);
            }
        }
        let (top, range) = best;
        let fused = &mut scratch[..range.len()];
        self.block(simd, range.clone(), fused);
        (range.start + fused.iter().position(|&x| x == top).unwrap_or(0)) as u32
    }
}

impl FusedRow<'_> {
    /// The logits of `range`.
    #[inline(always)]
    fn block<S: Simd>(&self, simd: S, range: Range<usize>, fused: &mut [f32]) {
        let Self { models, alpha, masked, .. } = self;
        let mut from = Some(&models.base.1[range.clone()]);
        for (expert, &alpha) in models.experts.iter().zip(*alpha).filter(|&(_, &alpha)| alpha != 0.0) {
            let (expert, small) = (&expert[range.clone()], &models.small[range.clone()]);
            add_difference(simd, from.take(), fused, alpha as f32, expert, small);
        }
        if let Some(base) = from {
            fused.copy_from_slice(base);
        }
        if *masked {
            for (token, x) in range.zip(fused) {
                if models.excludes(token) {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// `fused` ← from + α·(E − S), where `from` is `fused` itself if not given; the product and the sum are rounded
/// once where the CPU has such an instruction.
#[inline(always)]
fn add_difference<S: Simd>(
    simd: S,
    from: Option<&[f32]>,
    fused: &mut [f32],
    alpha: f32,
    expert: &[f32],
    small: &[f32],
) {
    let ((expert, expert_tail), (small, small_tail)) = (expert.as_chunks(), small.as_chunks());
    let (fused, tail) = fused.as_chunks_mut();
    let from = from.map(|from| from.as_chunks());
    add_vectors(simd, from.map(|(from, _)| from), fused, alpha, expert, small);
    let mut last = [vector(from.map_or(&*tail, |(_, from)| from))];
    add_vectors(simd, None, &mut last, alpha, &[vector(expert_tail)], &[vector(small_tail)]);
    tail.copy_from_slice(&last[0][..tail.len()]);
}

/// [`add_difference`] of whole vectors.
#[inline(always)]
fn add_vectors<S: Simd>(
    simd: S,
    from: Option<&[Vector]>,
    fused: &mut [Vector],
    alpha: f32,
    expert: &[Vector],
    small: &[Vector],
) {
    let alpha = simd.splat(alpha);
    let models = S::parts(expert).iter().zip(S::parts(small));
    match from.map(S::parts) {
        Some(from) => {
            for ((fused, from), (expert, small)) in S::parts_mut(fused).iter_mut().zip(from).zip(models) {
                let difference = simd.sub(simd.load(expert), simd.load(small));
                simd.store(fused, simd.fma(alpha, difference, simd.load(from)));
            }
        }
        None => {
            for (fused, (expert, small)) in S::parts_mut(fused).iter_mut().zip(models) {
                let difference = simd.sub(simd.load(expert), simd.load(small));
                simd.store(fused, simd.fma(alpha, difference, simd.load(fused)));
            }
        }
    }
}

/// Less than a vector, with zeros behind.
fn vector(tail: &[f32]) -> Vector {
    let mut vector = [0.0; LANES];
    vector[..tail.len()].copy_from_slice(tail);
    vector
}
