//! The exponentials, the order of sums, the conversions: every instruction set against exact values.

use super::*;

/// Evaluates `exp` on eight lanes.
struct Exp(Vector);

impl Kernel for Exp {
    type Output = Vector;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        simd.lanes(exp(simd, simd.load(&self.0)))
    }
}

/// Evaluates `exp_scaled` on eight lanes.
struct ExpScaled<const BIAS: i32>(Vector);

impl<const BIAS: i32> Kernel for ExpScaled<BIAS> {
    type Output = Vector;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vector {
        simd.lanes(exp_scaled::<BIAS, S>(simd, simd.load(&self.0)))
    }
}

/// Evaluates `exp_weight` on eight lanes.
struct ExpWeight<const BIAS: i32>(Vector);

impl<const BIAS: i32> Kernel for ExpWeight<BIAS> {
    type Output = Vector;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vector {
        simd.lanes(exp_weight::<BIAS, S>(simd, simd.load(&self.0)))
    }
}

/// Sums eight lanes alone, as one of four, and in f64.
struct Sum(Vector);

impl Kernel for Sum {
    type Output = (f32, [f32; 4], f64);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let v = simd.load(&self.0);
        (simd.sum(v), simd.sum4([simd.zero(), v, simd.splat(1.0), v]), simd.sum_f64(v))
    }
}

/// Loads eight f16 and eight bf16 of the same bits.
struct Convert([u16; LANES]);

impl Kernel for Convert {
    type Output = (Vector, Vector);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let (a, b) = (self.0.map(f16::from_bits), self.0.map(bf16::from_bits));
        // SAFETY: eight elements each.
        unsafe { (simd.lanes(simd.load_f16_at(a.as_ptr())), simd.lanes(simd.load_bf16_at(b.as_ptr()))) }
    }
}

/// The bound on the exponentials: without FMA, the argument's reduction and each step of the polynomial round once
/// more.
fn most_ulp(isa: Isa) -> f64 {
    if isa == Isa::Portable { 2.0 } else { 1.0 }
}

/// |y − exact| in units of the last place of a normal f32 near `exact`.
fn ulp(y: f32, exact: f64) -> f64 {
    (f64::from(y) - exact).abs() / (f64::from(f32::EPSILON) * exact.log2().floor().exp2())
}

#[test]
fn exp_is_within_its_bound_of_f64() {
    for isa in Isa::every() {
        let mut worst = 0.0_f64;
        // A step of a prime number of ulps visits both signs and every binade.
        for start in (0..=u32::MAX - 8 * 1009).step_by(8 * 1009) {
            let x: Vector = std::array::from_fn(|i| f32::from_bits(start + 1009 * i as u32));
            for (x, y) in x.into_iter().zip(isa.run(Exp(x))) {
                let exact = f64::from(x).exp();
                if x.is_nan() {
                    assert!(y.is_nan());
                } else if exact as f32 == f32::INFINITY {
                    // The last value before overflow may round either way.
                    assert!(y == f32::INFINITY || y > 3.402e38, "exp({x}) = {y}");
                } else if exact as f32 >= f32::MIN_POSITIVE {
                    worst = worst.max(ulp(y, exact));
                } else {
                    let subnormal = f64::from(f32::from_bits(1));
                    assert!((f64::from(y) - exact).abs() <= subnormal, "exp({x}) = {y}");
                }
            }
        }
        assert!(worst <= most_ulp(isa), "{isa:?}: {worst} ulp");
        assert_eq!(isa.run(Exp([f32::NEG_INFINITY; LANES])), [0.0; LANES]);
        assert_eq!(isa.run(Exp([-1e30; LANES])), [0.0; LANES]);
        assert_eq!(isa.run(Exp([0.0; LANES])), [1.0; LANES]);
        assert_eq!(isa.run(Exp([f32::INFINITY; LANES])), [f32::INFINITY; LANES]);
    }
}

/// The largest error of `exp_scaled` in ulp, over arguments that walk the float's bits.
fn largest_error<const BIAS: i32>(isa: Isa) -> f64 {
    let bias = f64::from(BIAS) * std::f64::consts::LN_2;
    let (low, high) = (-125.0 * std::f64::consts::LN_2 - bias, 88.0 - bias);
    let mut worst: f64 = 0.0;
    // A prime stride through all bit patterns: 5.6 million arguments of both signs and every exponent.
    let mut patterns = (0..u32::MAX).step_by(769).map(f32::from_bits);
    while let Some(first) = patterns.next() {
        let x = [first; LANES].map(|x| patterns.next().unwrap_or(x));
        for (x, y) in x.into_iter().zip(isa.run(ExpScaled::<BIAS>(x))) {
            if f64::from(x) > low + 1e-4 && f64::from(x) <= high {
                worst = worst.max(ulp(y, (f64::from(x) + bias).exp()));
            } else if x.is_nan() || f64::from(x) < low - 1e-4 {
                assert_eq!(y, 0.0, "exp({x})");
            }
        }
    }
    worst
}

#[test]
fn exp_scaled_is_within_its_bound_of_f64() {
    for isa in Isa::every() {
        let worst = largest_error::<0>(isa).max(largest_error::<32>(isa));
        assert!(worst <= most_ulp(isa), "{isa:?}: {worst} ulp");
    }
}

#[test]
fn exp_scaled_has_exact_ends() {
    for isa in Isa::every() {
        let x = [0.0, -0.0, f32::NEG_INFINITY, f32::NAN, f32::MIN, -87.0, 1.0, -1.0];
        let y = isa.run(ExpScaled::<0>(x));
        assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(y[5], 0.0, "below 2⁻¹²⁵");
        assert_eq!(isa.run(ExpScaled::<32>(x))[0], 4_294_967_296.0);
    }
}

/// Compares `exp_weight` with its bound, over arguments that walk the float's bits.
fn check_weights<const BIAS: i32>(isa: Isa) {
    let bias = f64::from(BIAS) * std::f64::consts::LN_2;
    let (low, high) = (-125.0 * std::f64::consts::LN_2 - bias, 88.0 - bias);
    let mut patterns = (0..u32::MAX).step_by(769).map(f32::from_bits);
    while let Some(first) = patterns.next() {
        let x = [first; LANES].map(|x| patterns.next().unwrap_or(x));
        for (x, y) in x.into_iter().zip(isa.run(ExpWeight::<BIAS>(x))) {
            let (wide, least) = (f64::from(x), 2.0_f64.powi(-125));
            if wide > low + 1e-4 && wide <= high {
                let error = f64::from(y) / (wide + bias).exp() - 1.0;
                // Without FMA, the product with log2 e is rounded, too.
                let bound =
                    if isa == Isa::Portable { 3e-7 + 1.4e-7 * wide.abs() } else { 2e-7 + 2e-8 * wide.abs() };
                assert!(error.abs() <= bound, "{isa:?}: exp({x}) is off by {error}");
            } else if x.is_nan() || wide < low {
                assert!((f64::from(y) / least - 1.0).abs() < 1e-4, "exp({x}) = {y}");
            }
        }
    }
    assert_eq!(
        isa.run(ExpWeight::<BIAS>([0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])),
        [2.0_f32.powi(BIAS); LANES]
    );
}

#[test]
fn exp_weight_is_within_its_bound_of_f64() {
    for isa in Isa::every() {
        check_weights::<0>(isa);
        check_weights::<32>(isa);
    }
}

#[test]
fn sums_have_one_order() {
    // Magnitudes so different that every order of summation gives another result.
    let v = [1e8, 1.0, -1e8, 3.0, 5e7, -7.0, 1.5e-3, 11.0];
    let expected = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    let w = v.map(f64::from);
    let exact = ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7]));
    for isa in Isa::every() {
        assert_eq!(isa.run(Sum(v)), (expected, [0.0, expected, 8.0, expected], exact), "{isa:?}");
    }
}

#[test]
fn sixteen_bit_loads_are_exact() {
    for isa in Isa::every() {
        for start in (0..=u16::MAX).step_by(LANES) {
            let bits: [u16; LANES] = std::array::from_fn(|i| start + i as u16);
            let (a, b) = isa.run(Convert(bits));
            for i in 0..LANES {
                let (half, brain) = (f16::from_bits(bits[i]).to_f32(), bf16::from_bits(bits[i]).to_f32());
                assert!(a[i].to_bits() == half.to_bits() || a[i].is_nan() && half.is_nan(), "{:#x}", bits[i]);
                assert!(
                    b[i].to_bits() == brain.to_bits() || b[i].is_nan() && brain.is_nan(),
                    "{:#x}",
                    bits[i]
                );
            }
        }
    }
}
