//! The exponential.

use super::Simd;

/// Adding 1.5 · 2²³ rounds to a whole number and leaves it in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// eʳ and n, with x = n ln 2 + r and |r| ≤ ln 2 / 2. `magic` is [`ROUND`] plus a whole number that n gets on top in
/// its low bits, the second result; the third is n itself.
///
/// A polynomial of degree 6 with relative error 4.4e-9.
#[inline(always)]
fn reduced<S: Simd>(simd: S, x: S::V, magic: S::V) -> (S::V, S::V, S::V) {
    // ln 2 in two pieces; the first has nine bits: n times it is exact, with or without FMA.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // A weighted minimax fit of (eʳ − 1 − r) / r² on |r| ≤ ln 2 / 2, rounded to f32.
    const C: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];

    let rounded = simd.fma(x, simd.splat(std::f32::consts::LOG2_E), magic);
    let n = simd.sub(rounded, magic);
    let r = simd.fma(n, simd.splat(-LN_2_HIGH), x);
    let r = simd.fma(n, simd.splat(-LN_2_LOW), r);
    let mut p = simd.splat(C[4]);
    for c in [C[3], C[2], C[1], C[0], 1.0, 1.0] {
        p = simd.fma(p, r, simd.splat(c));
    }
    (p, rounded, n)
}

/// eˣ for every x: exactly 0 below −104, +∞ above 88.73, NaN for NaN.
///
/// Within 1 ulp of the exact value with FMA and 2 ulp without; subnormals within 1 of their steps.
#[inline(always)]
pub(crate) fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    // NaN passes as the second operand. e⁻¹⁰⁴ is less than half the smallest subnormal, e⁸⁹ overflows.
    let x = simd.max(simd.splat(-104.0), simd.min(simd.splat(89.0), x));
    let magic = simd.splat(ROUND);
    let (p, _, n) = reduced(simd, x, magic);
    // Two factors, because 2ⁿ alone may not be a normal number. Products, because they keep NaN.
    let half = simd.fma(n, simd.splat(0.5), magic);
    let rest = simd.add(simd.sub(n, simd.sub(half, magic)), magic);
    let one = simd.splat(1.0);
    simd.mul(simd.mul(p, simd.scale_by_power(one, half)), simd.scale_by_power(one, rest))
}

/// 2^`BIAS` · eˣ, for x up to 88 − `BIAS` · ln 2: faster than [`exp`].
///
/// Within 1 ulp of the exact value with FMA and 2 ulp without. Where the result would fall below 2⁻¹²⁵ it is
/// exactly 0, never a subnormal; so is that of −∞ and of NaN. The bias costs nothing, and moves that bound: with
/// 32 the weights reach down to 2⁻¹⁵⁷ of the largest one.
#[inline(always)]
pub(crate) fn exp_scaled<const BIAS: i32, S: Simd>(simd: S, x: S::V) -> S::V {
    let (p, rounded, _) = reduced(simd, x, simd.splat(ROUND + BIAS as f32));
    let lowest = -(125 + BIAS) as f32 * std::f32::consts::LN_2;
    simd.keep_from(simd.scale_by_power(p, rounded), x, simd.splat(lowest))
}

/// 2^`BIAS` · eˣ, for x up to 88 − `BIAS` · ln 2: the fastest, for the terms of sums.
///
/// Relative to the exact value it is off by less than 2e-7 + 2e-8·|x|, as if x had been rounded a little more, and exactly
/// 2^`BIAS` at 0. Nothing is below 2⁻¹²⁵: smaller results, those of −∞ and those of NaN are about that.
#[inline(always)]
pub(crate) fn exp_weight<const BIAS: i32, S: Simd>(simd: S, x: S::V) -> S::V {
    // A minimax fit of 2ʳ on |r| ≤ 1/2 with relative error 1.05e-7, rounded to f32, 1 + r ln 2 near 0.
    const C: [f32; 5] = [std::f32::consts::LN_2, 0.240_222_83, 0.055_505_585, 0.009_669_66, 0.001_330_051_6];

    let x = simd.max(x, simd.splat(-(125 + BIAS) as f32 * std::f32::consts::LN_2));
    let log2_e = simd.splat(std::f32::consts::LOG2_E);
    let magic = simd.splat(ROUND + BIAS as f32);
    let rounded = simd.fma(x, log2_e, magic);
    let r = simd.fma(x, log2_e, simd.sub(magic, rounded));
    let mut p = simd.splat(C[4]);
    for c in [C[3], C[2], C[1], C[0], 1.0] {
        p = simd.fma(p, r, simd.splat(c));
    }
    simd.scale_by_power(p, rounded)
}
