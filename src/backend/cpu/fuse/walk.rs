//! All sums over a slice, block by block.
//!
//! On a ladder of candidates the weights of one token, exp(L + α_k D), are a geometric progression: two
//! exponentials serve all candidates of an expert, and each further candidate is a product and two sums. Where 1 is
//! ten or twenty steps, exp(E) = exp(S)·exp(D) is four or five more products.
//!
//! **Range.** Everything is taken relative to the slice's most probable token under the large model: w = 2³²
//! exp(L − L*) and d = D − D*, so this token adds exactly 2³² to every candidate. Other tokens may be lost (or count as 2⁻¹²⁵)
//! only by falling below 2⁻¹²⁵: before the progression starts, from where it can grow by exp([`REACH`]), or
//! inside it. Together that is less than 2⁻³⁴ of the sum. Where d reaches further than that, or anything
//! overflows, [`wide`](super::wide) computes the slice again with f64 arguments and one exponential a candidate.
//!
//! **Precision.** Differences are taken between logits of one model before the models are subtracted, so a
//! constant added to a model costs nothing. Sums are f32 within a lane of a block (at most 128 terms, all of
//! one sign where they enter a logarithm), f64 across lanes and blocks.

use super::models::{Tile, TileCopy, VECTORS};
use super::slice::{Source, Tops};
use super::sums::{Ladder, Sought, Sums, Tilt};
use crate::backend::cpu::simd::{LANES, Simd, Vector, exp_weight};
use crate::fusion::cumulant::{Direction, Lane};
use crate::fusion::{MAX_EXPERTS, PerExpert};

/// The weights carry this power of two.
const BIAS: i32 = 32;

/// How far α·d may lift a token, in nats. Lost are at most 2¹⁴ tokens below 2⁻¹²⁵, grown by e⁷⁵: 2⁻³⁴ of the 2³²
/// that one token alone adds. And the f32 rounding of α·d stays near 2⁻¹⁸ for tokens that it makes probable.
const REACH: f64 = 75.0;

/// How far E and S may be, in nats, from their largest where L is largest, for exp(E) to come from exp(S): f32 rounds
/// that distance by 2⁻¹⁹ at most.
const LARGEST_RISE: f64 = 32.0;

/// The largest first candidate's sum: its weights times a ratio that was flushed at 2⁻¹²⁵ stay below 2⁻⁴⁵.
const LARGEST_START: f64 = (1_u128 << 80) as f64;

/// Candidates that share one walk over the block: ten sums, the weight, the ratio and d leave the compiler a few of
/// sixteen registers, twenty sums of thirty-two.
const fn group<S: Simd>() -> usize {
    if S::MANY_REGISTERS { 10 } else { 5 }
}

/// The walk over one slice.
pub(super) struct Walk<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) tops: &'a Tops,
    pub(super) sought: &'a Sought,
}

/// The block's intermediate values.
struct Scratch {
    /// 2³² exp(L − max L).
    large: [Vector; VECTORS],
    /// 2³² exp(S − max S).
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
    /// D* of an expert.
    fn difference(&self, t: usize) -> f64 {
        f64::from(self.experts[t]) - f64::from(self.small)
    }

    /// D* of a tilt.
    fn along(&self, tilt: &Tilt) -> f64 {
        tilt.direction.iter().enumerate().map(|(t, c)| c * self.difference(t)).sum()
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
        self.open(&star, sums);
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
            let n = tile.base.len();
            sums.base.sum += weigh(simd, tile.base, self.tops.base.value, &mut scratch.large[..n]);
            if self.sought.targets {
                self.targets(simd, &tile, &star, &mut scratch, sums, &mut reach);
            }
            for (t, tilt) in self.sought.tilts.iter().enumerate() {
                if !self.climbs(t) {
                    let lanes = (&mut sums.directions[t], &mut reach[t]);
                    self.mixture(simd, &tile, &star, tilt, &mut scratch, lanes);
                }
            }
        }
        self.close(&star, &reach, sums)
    }

    /// Whether the search along expert `t` is one with the sums over S and E_t.
    fn climbs(&self, t: usize) -> bool {
        self.sought.targets && self.sought.tilts.get(t).is_some_and(|tilt| tilt.is_expert(t))
    }

    /// In how many steps of the ladder along expert `t` α = 1 is reached, where exp(E) is had from that; else 0.
    fn power(&self, t: usize) -> usize {
        // What f64 rounds in a grid's bounds moves no weight.
        let is_one = |n: usize, step: f64| (n as f64 * step - 1.0).abs() < 1e-12;
        let steps = |tilt: &Tilt| [10, 20].into_iter().find(|&n| is_one(n, tilt.ladder.step));
        if self.climbs(t) { self.sought.tilts.get(t).and_then(steps).unwrap_or(0) } else { 0 }
    }

    /// What is taken from D_t in the lanes of S and E_t: D* where exp(E) comes from exp(S), which bounds d; else what
    /// makes d small where either model is sure, however far D* is from that.
    fn centre(&self, star: &Star, t: usize) -> f64 {
        let tops = || f64::from(self.tops.experts[t].value) - f64::from(self.tops.small);
        if self.power(t) > 0 { star.difference(t) } else { tops() }
    }

    /// Sets the scales of all lanes, and their sums to 0.
    fn open(&self, star: &Star, sums: &mut Sums) {
        let lane = |scale: f64| Lane { scale, sum: 0.0, weighted: 0.0 };
        let biased = |top: f32| f64::from(top) - f64::from(BIAS) * std::f64::consts::LN_2;
        let (large, small) = (lane(biased(self.tops.base.value)), biased(self.tops.small));
        sums.base = large;
        for (t, target) in sums.targets.iter_mut().enumerate() {
            *target = (lane(small), lane(small + self.centre(star, t)));
        }
        for direction in &mut sums.directions {
            direction.base = large;
            direction.candidates.fill(large);
        }
    }

    /// Adds a block to the lanes of S and the experts, and to those of the candidates along one expert.
    #[inline(always)]
    fn targets<S: Simd>(
        &self,
        simd: S,
        tile: &Tile<'_>,
        star: &Star,
        scratch: &mut Scratch,
        sums: &mut Sums,
        reach: &mut [(f32, f32)],
    ) {
        if tile.experts.is_empty() {
            return;
        }
        let small_sum = weigh(simd, tile.small, self.tops.small, &mut scratch.small[..tile.base.len()]);
        for (t, ((expert, top), target)) in
            tile.experts.iter().zip(&self.tops.experts).zip(&mut sums.targets).enumerate()
        {
            let tilt = if self.climbs(t) { self.sought.tilts.get(t) } else { None };
            let step = tilt.map_or(0.0, |tilt| tilt.ladder.step as f32);
            let (star, top) = ((star.small, star.experts[t]), (self.tops.small, top.value));
            let pair = Pair { small: tile.small, expert, star, top };
            let pass = match (tilt, self.power(t)) {
                (None, _) => pair.pass::<false, 0, S>(simd, step, scratch),
                (_, 10) => pair.pass::<true, 10, S>(simd, step, scratch),
                (_, 20) => pair.pass::<true, 20, S>(simd, step, scratch),
                _ => pair.pass::<true, 0, S>(simd, step, scratch),
            };
            target.0.sum += small_sum;
            target.0.weighted += pass.small_weighted;
            target.1.sum += pass.expert_sum;
            target.1.weighted += pass.expert_weighted;
            if let (Some(tilt), Some(direction)) = (tilt, sums.directions.get_mut(t)) {
                direction.base.weighted += pass.large_weighted;
                reach[t] = (reach[t].0.min(pass.lowest), reach[t].1.max(pass.highest));
                self.candidates(simd, tile, tilt.ladder, scratch, direction);
            }
        }
    }

    /// Adds a block to the lanes of a tilt that has one candidate.
    #[inline(always)]
    fn mixture<S: Simd>(
        &self,
        simd: S,
        tile: &Tile<'_>,
        star: &Star,
        tilt: &Tilt,
        scratch: &mut Scratch,
        (sums, reach): (&mut Direction, &mut (f32, f32)),
    ) {
        let n = tile.base.len();
        difference(simd, tile, star, tilt, &mut scratch.difference);
        let (weighted, lowest, highest) = shift(simd, &scratch.large[..n], &scratch.difference[..n]);
        sums.base.weighted += weighted;
        *reach = (reach.0.min(lowest), reach.1.max(highest));
        // Of one candidate no ratio is used.
        self.candidates(simd, tile, tilt.ladder, scratch, sums);
    }

    /// Adds a block to the lanes of a ladder. Of d, the ratio and, where the ladder begins at 0, the weights of the
    /// second candidate, which are in `scratch`.
    #[inline(always)]
    fn candidates<S: Simd>(
        &self,
        simd: S,
        tile: &Tile<'_>,
        ladder: Ladder,
        scratch: &mut Scratch,
        sums: &mut Direction,
    ) {
        let n = tile.base.len();
        let (d, ratio, weight) = (&scratch.difference[..n], &scratch.ratio[..n], &mut scratch.weight[..n]);
        let known = usize::from(ladder.first == 0.0).min(sums.candidates.len());
        if known == 0 {
            start(simd, (tile.base, self.tops.base.value), d, ladder.first as f32, weight);
        }
        for lanes in sums.candidates[known..].chunks_mut(group::<S>()) {
            match lanes.len() {
                1 => progress::<1, S>(simd, d, ratio, weight, lanes),
                2 => progress::<2, S>(simd, d, ratio, weight, lanes),
                3 => progress::<3, S>(simd, d, ratio, weight, lanes),
                4 => progress::<4, S>(simd, d, ratio, weight, lanes),
                5 => progress::<5, S>(simd, d, ratio, weight, lanes),
                6 => progress::<6, S>(simd, d, ratio, weight, lanes),
                7 => progress::<7, S>(simd, d, ratio, weight, lanes),
                8 => progress::<8, S>(simd, d, ratio, weight, lanes),
                9 => progress::<9, S>(simd, d, ratio, weight, lanes),
                _ => progress::<10, S>(simd, d, ratio, weight, lanes),
            }
        }
    }

    /// Undoes the centring; false where the range of f32 didn't suffice.
    fn close(&self, star: &Star, reach: &[(f32, f32)], sums: &mut Sums) -> bool {
        let is_sound = |lane: &Lane| lane.sum > 0.0 && lane.sum.is_finite() && lane.weighted.is_finite();
        let mut fits = is_sound(&sums.base);
        if self.sought.targets {
            for (t, (small, expert)) in sums.targets.iter_mut().enumerate() {
                fits &= is_sound(small) && is_sound(expert);
                let offset = self.centre(star, t);
                small.weighted += offset * small.sum;
                expert.weighted += offset * expert.sum;
                if self.power(t) > 0 {
                    let rises = [self.tops.experts[t].value - star.experts[t], self.tops.small - star.small]
                        .map(f64::from);
                    // As of the candidates, no weight is lost that matters.
                    fits &= f64::from(reach[t].1) - (rises[0] - rises[1]) <= REACH;
                    fits &= rises.into_iter().all(|rise| rise <= LARGEST_RISE);
                }
            }
        }
        for ((tilt, direction), &reach) in self.sought.tilts.iter().zip(&mut sums.directions).zip(reach) {
            let (ladder, offset) = (tilt.ladder, star.along(tilt));
            direction.base.sum = sums.base.sum;
            if let Some(first) = direction.candidates.first_mut().filter(|_| ladder.first == 0.0) {
                *first = direction.base;
            }
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

/// What one pass over S and an expert gives: Σ w·d under the large model's weights, the small one's and the
/// expert's, the expert's Σ w, min d and max d.
struct Pass {
    large_weighted: f64,
    small_weighted: f64,
    expert_sum: f64,
    expert_weighted: f64,
    lowest: f32,
    highest: f32,
}

/// A block of S and of an expert, their logits of the token that the candidates are relative to, and their largest.
struct Pair<'a> {
    small: &'a [Vector],
    expert: &'a [Vector],
    star: (f32, f32),
    top: (f32, f32),
}

impl Pair<'_> {
    /// Puts d into `scratch`, and with `CLIMBS` exp(step·d) and the weights of α = step. exp(E) is exp(S) times the
    /// ratio's `POWER`th power, or an exponential of its own where that is 0.
    #[inline(always)]
    fn pass<const CLIMBS: bool, const POWER: usize, S: Simd>(
        &self,
        simd: S,
        step: f32,
        scratch: &mut Scratch,
    ) -> Pass {
        let (small_star, expert_star) = (simd.splat(self.star.0), simd.splat(self.star.1));
        let (small_top, expert_top) = (simd.splat(self.top.0), simd.splat(self.top.1));
        let step = simd.splat(step);
        let [mut large_weighted, mut small_weighted, mut expert_sum, mut expert_weighted] = [simd.zero(); 4];
        let [mut lowest, mut highest] = [simd.zero(); 2];
        let weights = S::parts(&scratch.large).iter().zip(S::parts(&scratch.small));
        let [difference, ratio, weight] =
            [&mut scratch.difference, &mut scratch.ratio, &mut scratch.weight].map(|x| S::parts_mut(x));
        let results = difference.iter_mut().zip(ratio).zip(weight);
        let models = S::parts(self.small).iter().zip(S::parts(self.expert));
        for (((small, expert), (w, q)), ((to_d, to_ratio), to_weight)) in models.zip(weights).zip(results) {
            let (small, expert) = (simd.load(small), simd.load(expert));
            let d = simd.sub(simd.sub(expert, expert_star), simd.sub(small, small_star));
            simd.store(to_d, d);
            let (w, q) = (simd.load(w), simd.load(q));
            let (mut e, mut centred) = (q, d);
            if CLIMBS {
                let ratio = exp_weight::<0, S>(simd, simd.mul(step, d));
                simd.store(to_ratio, ratio);
                simd.store(to_weight, simd.mul(w, ratio));
                large_weighted = simd.fma(w, d, large_weighted);
                lowest = simd.min(d, lowest);
                highest = simd.max(d, highest);
                e = simd.mul(e, power::<POWER, S>(simd, ratio));
            }
            if POWER == 0 {
                let relative = simd.sub(expert, expert_top);
                centred = simd.sub(relative, simd.sub(small, small_top));
                e = exp_weight::<BIAS, S>(simd, relative);
            }
            small_weighted = simd.fma(q, centred, small_weighted);
            expert_sum = simd.add(expert_sum, e);
            expert_weighted = simd.fma(e, centred, expert_weighted);
        }
        Pass {
            large_weighted: simd.sum_f64(large_weighted),
            small_weighted: simd.sum_f64(small_weighted),
            expert_sum: simd.sum_f64(expert_sum),
            expert_weighted: simd.sum_f64(expert_weighted),
            lowest: simd.smallest(lowest),
            highest: simd.largest(highest),
        }
    }
}

/// xⁿ for n = 10 and 20; anything for another.
#[inline(always)]
fn power<const N: usize, S: Simd>(simd: S, x: S::V) -> S::V {
    let x2 = simd.mul(x, x);
    let x4 = simd.mul(x2, x2);
    let x5 = simd.mul(x4, x);
    let x10 = simd.mul(x5, x5);
    if N == 20 { simd.mul(x10, x10) } else { x10 }
}

/// `weights` = 2^[`BIAS`] exp(x − top), and their sum.
#[inline(always)]
fn weigh<S: Simd>(simd: S, x: &[Vector], top: f32, weights: &mut [Vector]) -> f64 {
    let top = simd.splat(top);
    let mut sum = simd.zero();
    for (x, weight) in S::parts(x).iter().zip(S::parts_mut(weights)) {
        let w = exp_weight::<BIAS, S>(simd, simd.sub(simd.load(x), top));
        simd.store(weight, w);
        sum = simd.add(sum, w);
    }
    simd.sum_f64(sum)
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
        let models = S::parts(tile.small).iter().zip(S::parts(expert));
        for ((small, expert), d) in models.zip(S::parts_mut(d)) {
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

/// Σ w·d, min d and max d.
#[inline(always)]
fn shift<S: Simd>(simd: S, weights: &[Vector], d: &[Vector]) -> (f64, f32, f32) {
    let [mut weighted, mut lowest, mut highest] = [simd.zero(); 3];
    for (w, d) in S::parts(weights).iter().zip(S::parts(d)) {
        let d = simd.load(d);
        weighted = simd.fma(simd.load(w), d, weighted);
        lowest = simd.min(d, lowest);
        highest = simd.max(d, highest);
    }
    (simd.sum_f64(weighted), simd.smallest(lowest), simd.largest(highest))
}

/// `weights` = 2^`BIAS` exp(L − L* + α·d); those that overflow come out above [`LARGEST_START`].
#[inline(always)]
fn start<S: Simd>(simd: S, (base, top): (&[Vector], f32), d: &[Vector], alpha: f32, weights: &mut [Vector]) {
    let (top, alpha, highest) = (simd.splat(top), simd.splat(alpha), simd.splat(64.0));
    for ((base, d), weight) in S::parts(base).iter().zip(S::parts(d)).zip(S::parts_mut(weights)) {
        let x = simd.fma(alpha, simd.load(d), simd.sub(simd.load(base), top));
        simd.store(weight, exp_weight::<BIAS, S>(simd, simd.min(x, highest)));
    }
}

/// The next `N` candidates: adds Σ w and Σ w·d to each lane, with w ← w·ratio from one to the next. The first w are
/// what `weight` holds; the last go there.
#[inline(always)]
fn progress<const N: usize, S: Simd>(
    simd: S,
    d: &[Vector],
    ratio: &[Vector],
    weight: &mut [Vector],
    lanes: &mut [Lane],
) {
    let mut sums = [(simd.zero(), simd.zero()); N];
    for ((d, ratio), weight) in S::parts(d).iter().zip(S::parts(ratio)).zip(S::parts_mut(weight)) {
        let (d, ratio, mut w) = (simd.load(d), simd.load(ratio), simd.load(weight));
        for (sum, weighted) in &mut sums {
            *sum = simd.add(*sum, w);
            *weighted = simd.fma(w, d, *weighted);
            w = simd.mul(w, ratio);
        }
        simd.store(weight, w);
    }
    for (lane, (sum, weighted)) in lanes.iter_mut().zip(sums) {
        lane.sum += simd.sum_f64(sum);
        lane.weighted += simd.sum_f64(weighted);
    }
}
