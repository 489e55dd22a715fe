//! The exponentials, the order of sums, the conversions: every instruction set against exact values.

use super::*;

/// `f` of each part of a vector.
#[inline(always)]
fn map<S: Simd>(simd: S, x: &Vector, f: impl Fn(S::V) -> S::V) -> Vector {
    let mut y = [*x];
    for y in S::parts_mut(&mut y) {
        simd.store(y, f(simd.load(y)));
    }
    y[0]
}

/// Evaluates `exp` on a vector.
struct Exp(Vector);

impl Kernel for Exp {
    type Output = Vector;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        map(simd, &self.0, |x| exp(simd, x))
    }
}

/// Evaluates `exp_scaled` on a vector.
struct ExpScaled<const BIAS: i32>(Vector);

impl<const BIAS: i32> Kernel for ExpScaled<BIAS> {
    type Output = Vector;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vector {
        map(simd, &self.0, |x| exp_scaled::<BIAS, S>(simd, x))
    }
}

/// Evaluates `exp_weight` on a vector.
struct ExpWeight<const BIAS: i32>(Vector);

impl<const BIAS: i32> Kernel for ExpWeight<BIAS> {
    type Output = Vector;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vector {
        map(simd, &self.0, |x| exp_weight::<BIAS, S>(simd, x))
    }
}

/// Sums of the first register of a vector, alone, as one of four, and in f64; and its lanes.
struct Sum(Vector);

impl Kernel for Sum {
    type Output = (f32, [f32; 4], f64, usize);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let v = simd.load(&S::parts(&[self.0])[0]);
        (simd.sum(v), simd.sum4([simd.zero(), v, simd.splat(1.0), v]), simd.sum_f64(v), S::LANES)
    }
}

/// The smallest and the largest lane of the last register of a vector.
struct Ends(Vector);

impl Kernel for Ends {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let v = simd.load(&S::parts(&[self.0])[LANES / S::LANES - 1]);
        (simd.smallest(v), simd.largest(v))
    }
}

/// Loads f16 and bf16 of the same bits.
struct Convert([u16; LANES]);

impl Kernel for Convert {
    type Output = (Vector, Vector);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let (a, b) = (self.0.map(f16::from_bits), self.0.map(bf16::from_bits));
        let mut loaded = ([[0.0; LANES]], [[0.0; LANES]]);
        for (i, to) in S::parts_mut(&mut loaded.0).iter_mut().enumerate() {
            simd.store(to, f16::load_padded(simd, &a[i * S::LANES..]));
        }
        for (i, to) in S::parts_mut(&mut loaded.1).iter_mut().enumerate() {
            simd.store(to, bf16::load_padded(simd, &b[i * S::LANES..]));
        }
        (loaded.0[0], loaded.1[0])
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
        for start in (0..=u32::MAX - LANES as u32 * 1009).step_by(LANES * 1009) {
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
        let ends = [0.0, -0.0, f32::NEG_INFINITY, f32::NAN, f32::MIN, -87.0, 1.0, -1.0];
        let x: Vector = std::array::from_fn(|i| ends[i % 8]);
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
    let zeros = std::array::from_fn(|i| if i == 1 { -0.0 } else { 0.0 });
    assert_eq!(isa.run(ExpWeight::<BIAS>(zeros)), [2.0_f32.powi(BIAS); LANES]);
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
    let v: Vector =
        [1e8, 1.0, -1e8, 3.0, 5e7, -7.0, 1.5e-3, 11.0, 2.5e7, -3e6, 1e-4, 8e7, -6e7, 13.0, 0.25, -9e7];
    for isa in Isa::every() {
        let (sum, four, exact, lanes) = isa.run(Sum(v));
        let upper = |i: usize| if lanes == LANES { v[i + 8] } else { 0.0 };
        let f: [f32; 8] = std::array::from_fn(|i| v[i] + upper(i));
        let expected = ((f[0] + f[1]) + (f[2] + f[3])) + ((f[4] + f[5]) + (f[6] + f[7]));
        assert_eq!((sum, four), (expected, [0.0, expected, lanes as f32, expected]), "{isa:?}");
        let w: [f64; 8] = std::array::from_fn(|i| f64::from(v[i]) + f64::from(upper(i)));
        assert_eq!(exact, ((w[0] + w[4]) + (w[2] + w[6])) + ((w[1] + w[5]) + (w[3] + w[7])), "{isa:?}");
    }
}

#[test]
fn ends_pass_over_nan() {
    for isa in Isa::every() {
        for place in 8..LANES {
            let mut v = [2.0; LANES];
            (v[place], v[8 + (place + 3) % 8]) = (-5.0, f32::NAN);
            assert_eq!(isa.run(Ends(v)), (-5.0, 2.0), "{isa:?}");
            v[place] = 5.0;
            assert_eq!(isa.run(Ends(v)), (2.0, 5.0), "{isa:?}");
            assert_eq!(isa.run(Ends([f32::NAN; LANES])), (f32::INFINITY, f32::NEG_INFINITY), "{isa:?}");
        }
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
