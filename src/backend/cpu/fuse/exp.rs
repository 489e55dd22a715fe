//! The exponential of eight f32 at a time.

use super::simd::Simd;

/// The largest argument of [`exp_scaled`] with `BIAS` 0.
#[cfg(test)]
pub(crate) const LARGEST: f32 = 88.0;

/// 2^`BIAS`·eˣ, for x up to 88 − `BIAS`·ln 2.
///
/// Within 1 ulp of the exact value with FMA and 2 ulp without. Where the result would fall below 2⁻¹²⁵ it is
/// exactly 0, never a denormal; so is that of −∞ and of NaN. The bias costs nothing, and moves that bound: with
/// 32 the weights reach down to 2⁻¹⁵⁷ of the largest one.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and eʳ by a polynomial of degree 6 whose relative error is 4.4e-9.
#[inline(always)]
pub(crate) fn exp_scaled<const BIAS: i32, S: Simd>(simd: S, x: S::F32) -> S::F32 {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits of the mantissa, with the bias on top.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two pieces; the first has nine bits, so that its product with n is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // A weighted minimax fit of (eʳ − 1 − r) / r² on |r| ≤ ln 2 / 2, rounded to f32.
    const C: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_393, 0.008_368_781, 0.001_381_446_7];

    let magic = simd.splat(ROUND + BIAS as f32);
    let rounded = simd.mul_add(x, simd.splat(std::f32::consts::LOG2_E), magic);
    let n = simd.sub(rounded, magic);
    let r = simd.mul_add(n, simd.splat(-LN_2_HIGH), x);
    let r = simd.mul_add(n, simd.splat(-LN_2_LOW), r);
    let mut p = simd.splat(C[4]);
    for c in [C[3], C[2], C[1], C[0], 1.0, 1.0] {
        p = simd.mul_add(p, r, simd.splat(c));
    }
    let lowest = -(125 + BIAS) as f32 * std::f32::consts::LN_2;
    simd.keep_from(simd.scale_by_power(p, rounded), x, simd.splat(lowest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::fuse::simd::{Kernel, LANES, Level, dispatch};

    struct Exp<const BIAS: i32>([f32; LANES]);
    impl<const BIAS: i32> Kernel for Exp<BIAS> {
        type Output = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; LANES] {
            simd.to_array(exp_scaled::<BIAS, S>(simd, simd.load(&self.0)))
        }
    }

    /// The largest error in units of the result's last place, over arguments that walk the float's bits.
    fn largest_error<const BIAS: i32>(level: Level) -> f64 {
        let bias = f64::from(BIAS) * std::f64::consts::LN_2;
        let (low, high) = (-125.0 * std::f64::consts::LN_2 - bias, f64::from(LARGEST) - bias);
        let mut worst: f64 = 0.0;
        // A prime stride through all bit patterns: 5.6 million arguments of both signs and every exponent.
        let mut patterns = (0..u32::MAX).step_by(769).map(f32::from_bits);
        while let Some(first) = patterns.next() {
            let x = [first; LANES].map(|x| patterns.next().unwrap_or(x));
            for (x, y) in x.into_iter().zip(dispatch(level, Exp::<BIAS>(x))) {
                let exact = (f64::from(x) + bias).exp();
                if f64::from(x) > low + 1e-4 && f64::from(x) <= high {
                    let ulp = f64::from(f32::EPSILON) * exact.log2().floor().exp2();
                    worst = worst.max((f64::from(y) - exact).abs() / ulp);
                } else if x.is_nan() || f64::from(x) < low - 1e-4 {
                    assert_eq!(y, 0.0, "exp({x})");
                }
            }
        }
        worst
    }

    #[test]
    fn every_exponent_is_within_its_bound() {
        // 1 ulp with FMA; without, the argument's reduction and each step of the polynomial round once more.
        let (best, portable) = (largest_error::<0>(Level::detect()), largest_error::<0>(Level::Portable));
        assert!(best <= if Level::detect() == Level::Portable { 2.0 } else { 1.0 }, "{best}");
        assert!(portable <= 2.0, "{portable}");
        assert!(largest_error::<32>(Level::detect()) <= 2.0);
        assert!(largest_error::<32>(Level::Portable) <= 2.0);
    }

    #[test]
    fn one_is_exact_and_infinity_is_nothing() {
        for level in [Level::detect(), Level::Portable] {
            let x = [0.0, -0.0, f32::NEG_INFINITY, f32::NAN, f32::MIN, -87.0, 1.0, -1.0];
            let y = dispatch(level, Exp::<0>(x));
            assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
            assert_eq!(y[5], 0.0, "below 2⁻¹²⁵");
            assert_eq!(dispatch(level, Exp::<32>(x))[0], 4_294_967_296.0);
        }
    }
}
