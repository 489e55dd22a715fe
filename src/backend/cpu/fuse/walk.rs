//! All sums over a slice, block by block.
//!
//! On a ladder of candidates the weights of one token, exp(L + α_k D), are a geometric progression: two
//! exponentials serve all candidates of an expert, and each further candidate is a product and two sums.
//!
//! **Range.** Everything is taken relative to the slice's most probable token under the large model: w = 2³²
//! exp(L − L*) and d = D − D*, so this token adds exactly 2³² to every candidate. Other tokens may be lost
//! only by falling below 2⁻¹²⁵: before the progression starts, from where it can grow by exp([`REACH`]), or
//! inside it. Together that is less than 2⁻³⁴ of the sum. Where d reaches further than that, or anything
//! overflows, [`wide`](super::wide) computes the slice again with f64 arguments and one exponential a candidate.
//!
//! **Precision.** Differences are taken between logits of one model before the models are subtracted, so a
//! constant added to a model costs nothing. Sums are f32 within a lane of a block (at most 128 terms, all of
//! one sign where they enter a logarithm), f64 across lanes and blocks.

use super::models::{Tile, TileCopy, VECTORS};
use super::slice::{Source, Tops};
use super::sums::{Ladder, Sums, Tilt};
use crate::backend::cpu::simd::{LANES, Simd, Vector, exp_scaled};
use crate::fusion::cumulant::{Direction, Lane};
use crate::fusion::{MAX_EXPERTS, PerExpert};

/// The weights of the large model's lanes carry this power of two.
const BIAS: i32 = 32;

/// How far α·d may lift a token, in nats. Lost are at most 2¹⁴ tokens below 2⁻¹²⁵, grown by e⁷⁵: 2⁻³⁴ of the 2³²
/// that one token alone adds. And the f32 rounding of α·d stays near 2⁻¹⁸ for tokens that it makes probable.
const REACH: f64 = 75.0;

/// The largest first candidate's sum: its weights times a ratio that was flushed at 2⁻¹²⁵ stay below 2⁻⁴⁵.
const LARGEST_START: f64 = (1_u128 << 80) as f64;

/// Candidates that share one walk over the block: with AVX2, ten sums, the weight, the ratio and d leave the
/// compiler a few of the sixteen registers.
const GROUP: usize = 5;

/// The walk over one slice.
pub(super) struct Walk<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) tops: &'a Tops,
    pub(super) tilts: &'a [Tilt],
}

/// The block's intermediate values.
struct Scratch {
    /// 2³² exp(L − max L).
    large: [Vector; VECTORS],
    /// exp(S − max S).
    small: [Vector; VECTORS],
    /// d = D − D*.
    difference: [Vector; VECTORS],
    /// exp(step·d).
    ratio: [Vector; VECTORS],
    /// The weights of the candidate that comes next.
    weight: [Vector; VECTORS],
}

/// S and E_t of the token that everything is relative to.
struct Star {
    small: f32,
    experts: PerExpert<f32>,
}

impl Star {
    /// D* of a tilt.
    fn along(&self, tilt: &Tilt) -> f64 {
        let small = f64::from(self.small);
        tilt.direction.iter().zip(&self.experts).map(|(c, &expert)| c * (f64::from(expert) - small)).sum()
    }
}

impl Walk<'_> {
    /// Sets `sums` to those of all blocks; false where the range of f32 doesn't suffice and they mean nothing.
    #[inline(always)]
    pub(super) fn run<S: Simd>(&self, simd: S, sums: &mut Sums) -> bool {
        let models = self.source.models;
        let token = self.tops.base.token as usize;
        let star = Star {
            small: models.small.get(token).copied().unwrap_or(0.0),
            experts: models.experts.iter().map(|expert| expert[token]).collect(),
        };
        self.open(sums);
        let mut reach = [(0.0_f32, 0.0_f32); MAX_EXPERTS];
        let blank = [[0.0; LANES]; VECTORS];
        let mut scratch =
            Scratch { large: blank, small: blank, difference: blank, ratio: blank, weight: blank };
        for block in self.source.blocks() {
            let (rest, copy);
            let tile = if self.source.is_direct(&block) {
                Tile::direct(models, block)
            } else if block.len() < LANES {
                rest = TileCopy::<1>::new(models, block);
                rest.tile()
            } else {
                copy = TileCopy::<VECTORS>::new(models, block);
                copy.tile()
            };
            self.targets(simd, &tile, &mut scratch, sums);
            for ((tilt, direction), reach) in self.tilts.iter().zip(&mut sums.directions).zip(&mut reach) {
                difference(simd, &tile, &star, tilt, &mut scratch.difference);
                let (lowest, highest) = self.candidates(simd, &tile, tilt.ladder, &mut scratch, direction);
                *reach = (reach.0.min(lowest), reach.1.max(highest));
            }
        }
        self.close(&star, &reach, sums)
    }

    /// Sets the scales of all lanes, and their sums to 0.
    fn open(&self, sums: &mut Sums) {
        let lane = |scale: f64| Lane { scale, sum: 0.0, weighted: 0.0 };
        let large = lane(f64::from(self.tops.base.value) - f64::from(BIAS) * std::f64::consts::LN_2);
        sums.base = large;
        for (target, top) in sums.targets.iter_mut().zip(&self.tops.experts) {
            *target = (lane(f64::from(self.tops.small)), lane(f64::from(top.value)));
        }
        for direction in &mut sums.directions {
            direction.base = large;
            direction.candidates.fill(large);
        }
    }

    /// Adds a block to the lanes of L, S and the experts.
    #[inline(always)]
    fn targets<S: Simd>(&self, simd: S, tile: &Tile<'_>, scratch: &mut Scratch, sums: &mut Sums) {
        let n = tile.base.len();
        sums.base.sum += weigh::<BIAS, S>(simd, tile.base, self.tops.base.value, &mut scratch.large[..n]);
        let weights = &mut scratch.small[..n];
        let small_sum = weigh::<0, S>(simd, tile.small, self.tops.small, weights);
        for ((expert, top), target) in tile.experts.iter().zip(&self.tops.experts).zip(&mut sums.targets) {
            target.0.sum += small_sum;
            weigh_expert(simd, (tile.small, self.tops.small, weights), (expert, top.value), target);
        }
    }

    /// Adds a block to the lanes of a tilt, whose d is in `scratch`; returns min d and max d.
    #[inline(always)]
    fn candidates<S: Simd>(
        &self,
        simd: S,
        tile: &Tile<'_>,
        ladder: Ladder,
        scratch: &mut Scratch,
        sums: &mut Direction,
    ) -> (f32, f32) {
        let n = tile.base.len();
        let (large, d) = (&scratch.large[..n], &scratch.difference[..n]);
        let (ratio, weight) = (&mut scratch.ratio[..n], &mut scratch.weight[..n]);
        let (weighted, extremes) = shift(simd, large, d, ladder.step, ratio);
        sums.base.weighted += weighted;
        if ladder.first != 0.0 {
            start(simd, (tile.base, self.tops.base.value), d, ladder.first as f32, weight);
        }
        // The first group reads the weights where they are.
        let mut first = (ladder.first == 0.0).then_some(large);
        for lanes in sums.candidates.chunks_mut(GROUP) {
            let from = first.take();
            match lanes.len() {
                1 => progress::<1, S>(simd, d, ratio, from, weight, lanes),
                2 => progress::<2, S>(simd, d, ratio, from, weight, lanes),
                3 => progress::<3, S>(simd, d, ratio, from, weight, lanes),
                4 => progress::<4, S>(simd, d, ratio, from, weight, lanes),
                _ => progress::<GROUP, S>(simd, d, ratio, from, weight, lanes),
            }
        }
        extremes
    }

    /// Undoes the centring; false where the range of f32 didn't suffice.
    fn close(&self, star: &Star, reach: &[(f32, f32)], sums: &mut Sums) -> bool {
        let is_sound = |lane: &Lane| lane.sum > 0.0 && lane.sum.is_finite() && lane.weighted.is_finite();
        let mut fits = is_sound(&sums.base);
        for ((small, expert), top) in sums.targets.iter_mut().zip(&self.tops.experts) {
            fits &= is_sound(small) && is_sound(expert);
            let offset = f64::from(top.value) - f64::from(self.tops.small);
            small.weighted += offset * small.sum;
            expert.weighted += offset * expert.sum;
        }
        for ((tilt, direction), &reach) in self.tilts.iter().zip(&mut sums.directions).zip(reach) {
            let (ladder, offset) = (tilt.ladder, star.along(tilt));
            direction.base.sum = sums.base.sum;
            fits &= is_sound(&direction.base) && direction.candidates.iter().all(is_sound);
            fits &= direction.candidates.first().is_none_or(|lane| lane.sum <= LARGEST_START);
            let (lowest, highest) = (f64::from(reach.0), f64::from(reach.1));
            let span = ladder.alpha(ladder.count.saturating_sub(1)) - ladder.first;
            let lift = (ladder.first * lowest).max(ladder.first * highest);
            fits &= lift + span * highest <= REACH;
            direction.base.weighted += offset * direction.base.sum;
            for (k, lane) in direction.candidates.iter_mut().enumerate() {
                lane.weighted += offset * lane.sum;
                lane.scale += ladder.alpha(k) * offset;
            }
        }
        fits
    }
}

/// `weights` = 2^`BIAS` exp(x − top), and their sum.
#[inline(always)]
fn weigh<const BIAS: i32, S: Simd>(simd: S, x: &[Vector], top: f32, weights: &mut [Vector]) -> f64 {
    let top = simd.splat(top);
    let mut sum = simd.zero();
    for (x, weight) in x.iter().zip(weights) {
        let w = exp_scaled::<BIAS, S>(simd, simd.sub(simd.load(x), top));
        simd.store(weight, w);
        sum = simd.add(sum, w);
    }
    simd.sum_f64(sum)
}

/// Adds Σ exp(E − max E), and the sums of both models' weights times D − (max E − max S), to (S, E).
#[inline(always)]
fn weigh_expert<S: Simd>(
    simd: S,
    (small, small_top, weights): (&[Vector], f32, &[Vector]),
    (expert, expert_top): (&[Vector], f32),
    target: &mut (Lane, Lane),
) {
    let (small_top, expert_top) = (simd.splat(small_top), simd.splat(expert_top));
    let [mut small_weighted, mut sum, mut weighted] = [simd.zero(); 3];
    for ((small, expert), q) in small.iter().zip(expert).zip(weights) {
        let (s, e) = (simd.sub(simd.load(small), small_top), simd.sub(simd.load(expert), expert_top));
        let d = simd.sub(e, s);
        let w = exp_scaled::<0, S>(simd, e);
        sum = simd.add(sum, w);
        weighted = simd.fma(w, d, weighted);
        small_weighted = simd.fma(simd.load(q), d, small_weighted);
    }
    target.0.weighted += simd.sum_f64(small_weighted);
    target.1.sum += simd.sum_f64(sum);
    target.1.weighted += simd.sum_f64(weighted);
}

/// d = Σ_t c_t ((E_t − E_t*) − (S − S*)): logits of one model are subtracted first, which is exact or nearly so
/// for all tokens near the top.
#[inline(always)]
fn difference<S: Simd>(simd: S, tile: &Tile<'_>, star: &Star, tilt: &Tilt, d: &mut [Vector; VECTORS]) {
    let small_star = simd.splat(star.small);
    let experts = tile.experts.iter().zip(&star.experts).zip(&tilt.direction).filter(|&(_, &c)| c != 0.0);
    let mut is_first = true;
    for ((expert, &star), &c) in experts {
        let (star, c) = (simd.splat(star), simd.splat(c as f32));
        for ((small, expert), d) in tile.small.iter().zip(*expert).zip(d.iter_mut()) {
            let (e, s) = (simd.sub(simd.load(expert), star), simd.sub(simd.load(small), small_star));
            let before = if is_first { simd.zero() } else { simd.load(d) };
            simd.store(d, simd.fma(c, simd.sub(e, s), before));
        }
        is_first = false;
    }
    if is_first {
        d.fill([0.0; LANES]);
    }
}

/// Σ w·d, and (min d, max d); `ratio` = exp(step·d).
#[inline(always)]
fn shift<S: Simd>(
    simd: S,
    weights: &[Vector],
    d: &[Vector],
    step: f64,
    ratio: &mut [Vector],
) -> (f64, (f32, f32)) {
    let step = simd.splat(step as f32);
    let [mut weighted, mut lowest, mut highest] = [simd.zero(); 3];
    for ((w, d), ratio) in weights.iter().zip(d).zip(ratio) {
        let d = simd.load(d);
        weighted = simd.fma(simd.load(w), d, weighted);
        lowest = simd.min(d, lowest);
        highest = simd.max(d, highest);
        simd.store(ratio, exp_scaled::<0, S>(simd, simd.mul(step, d)));
    }
    (simd.sum_f64(weighted), (simd.smallest(lowest), simd.largest(highest)))
}

/// `weights` = 2^`BIAS` exp(L − L* + α·d); those that overflow come out above [`LARGEST_START`].
#[inline(always)]
fn start<S: Simd>(simd: S, (base, top): (&[Vector], f32), d: &[Vector], alpha: f32, weights: &mut [Vector]) {
    let (top, alpha, highest) = (simd.splat(top), simd.splat(alpha), simd.splat(64.0));
    for ((base, d), weight) in base.iter().zip(d).zip(weights) {
        let x = simd.fma(alpha, simd.load(d), simd.sub(simd.load(base), top));
        simd.store(weight, exp_scaled::<BIAS, S>(simd, simd.min(x, highest)));
    }
}

/// The next `N` candidates: adds Σ w and Σ w·d to each lane, with w ← w·ratio from one to the next. The first w are
/// `from`, or what `weight` holds; the last go to `weight`.
#[inline(always)]
fn progress<const N: usize, S: Simd>(
    simd: S,
    d: &[Vector],
    ratio: &[Vector],
    from: Option<&[Vector]>,
    weight: &mut [Vector],
    lanes: &mut [Lane],
) {
    let mut sums = [(simd.zero(), simd.zero()); N];
    let tokens = d.iter().zip(ratio);
    match from {
        Some(from) => {
            for (((d, ratio), from), weight) in tokens.zip(from).zip(weight) {
                simd.store(weight, climb(simd, d, ratio, from, &mut sums));
            }
        }
        None => {
            for ((d, ratio), weight) in tokens.zip(weight) {
                let last = climb(simd, d, ratio, weight, &mut sums);
                simd.store(weight, last);
            }
        }
    }
    for (lane, (sum, weighted)) in lanes.iter_mut().zip(sums) {
        lane.sum += simd.sum_f64(sum);
        lane.weighted += simd.sum_f64(weighted);
    }
}

/// One vector's way up the ladder: adds w and w·d to each candidate's sums, and returns the next candidate's w.
#[inline(always)]
fn climb<const N: usize, S: Simd>(
    simd: S,
    d: &Vector,
    ratio: &Vector,
    weight: &Vector,
    sums: &mut [(S::V, S::V); N],
) -> S::V {
    let (d, ratio) = (simd.load(d), simd.load(ratio));
    let mut w = simd.load(weight);
    for (sum, weighted) in sums {
        *sum = simd.add(*sum, w);
        *weighted = simd.fma(w, d, *weighted);
        w = simd.mul(w, ratio);
    }
    w
}
