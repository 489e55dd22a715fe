//! The exponential, the order of sums, the conversions: every instruction set against exact values.

use super::*;

/// Evaluates `exp` on eight lanes.
struct Exp([f32; LANES]);

impl Kernel for Exp {
    type Output = [f32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        // SAFETY: eight f32.
        let x = unsafe { simd.load(self.0.as_ptr()) };
        simd.lanes(simd.exp(x))
    }
}

/// Sums eight lanes alone and as one of four.
struct Sum([f32; LANES]);

impl Kernel for Sum {
    type Output = (f32, [f32; 4]);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        // SAFETY: eight f32.
        let v = unsafe { simd.load(self.0.as_ptr()) };
        (simd.sum(v), simd.sum4([simd.zero(), v, simd.splat(1.0), v]))
    }
}

/// Loads eight f16 and eight bf16 of the same bits.
struct Convert([u16; LANES]);

impl Kernel for Convert {
    type Output = ([f32; LANES], [f32; LANES]);

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let (a, b) = (self.0.map(f16::from_bits), self.0.map(bf16::from_bits));
        // SAFETY: eight elements each.
        unsafe { (simd.lanes(simd.load_f16(a.as_ptr())), simd.lanes(simd.load_bf16(b.as_ptr()))) }
    }
}

fn every_isa() -> Vec<Isa> {
    let mut isas = vec![Isa::Portable];
    if Isa::detect() != Isa::Portable {
        isas.push(Isa::detect());
    }
    isas
}

#[test]
fn exp_is_within_two_ulp_of_f64() {
    for isa in every_isa() {
        let mut worst = 0.0_f64;
        // A step of a prime number of ulps visits both signs and every binade.
        for start in (0..=u32::MAX - 8 * 1009).step_by(8 * 1009) {
            let x: [f32; LANES] = std::array::from_fn(|i| f32::from_bits(start + 1009 * i as u32));
            for (x, y) in x.into_iter().zip(isa.run(Exp(x))) {
                let exact = f64::from(x).exp();
                if x.is_nan() {
                    assert!(y.is_nan());
                } else if exact as f32 == f32::INFINITY {
                    // The last value before overflow may round either way.
                    assert!(y == f32::INFINITY || y > 3.402e38, "exp({x}) = {y}");
                } else if exact as f32 >= f32::MIN_POSITIVE {
                    let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                    worst = worst.max((f64::from(y) - exact).abs() / ulp);
                } else {
                    let subnormal = f64::from(f32::from_bits(1));
                    assert!((f64::from(y) - exact).abs() <= 2.0 * subnormal, "exp({x}) = {y}");
                }
            }
        }
        assert!(worst <= 2.0, "{isa:?}: {worst} ulp");
        assert_eq!(isa.run(Exp([f32::NEG_INFINITY; LANES])), [0.0; LANES]);
        assert_eq!(isa.run(Exp([-1e30; LANES])), [0.0; LANES]);
        assert_eq!(isa.run(Exp([0.0; LANES])), [1.0; LANES]);
        assert_eq!(isa.run(Exp([f32::INFINITY; LANES])), [f32::INFINITY; LANES]);
    }
}

#[test]
fn sums_have_one_order() {
    // Magnitudes so different that every order of summation gives another result.
    let v = [1e8, 1.0, -1e8, 3.0, 5e7, -7.0, 1.5e-3, 11.0];
    let expected = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    for isa in every_isa() {
        assert_eq!(isa.run(Sum(v)), (expected, [0.0, expected, 8.0, expected]), "{isa:?}");
    }
}

#[test]
fn sixteen_bit_loads_are_exact() {
    for isa in every_isa() {
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
